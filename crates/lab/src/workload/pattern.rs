//! Content that follows from a seed and a position, so that any part can be made and checked alone.

/// One step of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
/// generators"), used as a hash of `x`.
pub(crate) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The eight bytes at `index * 8` of the sequence of `seed`.
pub(crate) fn word(seed: u64, index: u64) -> u64 {
    mix(mix(seed).wrapping_add(index))
}

/// Fills `buffer` with the sequence of `seed` from byte `position` on.
pub(crate) fn fill(seed: u64, position: u64, buffer: &mut [u8]) {
    let mut done = 0;
    while done < buffer.len() {
        let at = position + done as u64;
        let bytes = word(seed, at / 8).to_le_bytes();
        let part = &bytes[(at % 8) as usize..];
        let length = part.len().min(buffer.len() - done);
        buffer[done..done + length].copy_from_slice(&part[..length]);
        done += length;
    }
}

/// The first position at which `data`, received at `position`, differs from the sequence of `seed`.
pub(crate) fn first_difference(seed: u64, position: u64, data: &[u8]) -> Option<u64> {
    let mut expected = [0; 4096];
    let mut at = position;
    for part in data.chunks(expected.len()) {
        let expected = &mut expected[..part.len()];
        fill(seed, at, expected);
        if let Some(offset) = part.iter().zip(expected.iter()).position(|(a, b)| a != b) {
            return Some(at + offset as u64);
        }
        at += part.len() as u64;
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn any_part_is_the_same_as_the_whole() {
        let mut whole = [0; 10_000];
        fill(7, 0, &mut whole);
        for (start, length) in [(0, 1), (3, 9), (8, 8), (4_095, 4_099), (9_999, 1)] {
            let mut part = vec![0; length];
            fill(7, start as u64, &mut part);
            assert_eq!(part, &whole[start..start + length]);
            assert_eq!(first_difference(7, start as u64, &part), None);
        }
        // Lost, doubled, flipped.
        assert_eq!(first_difference(7, 0, &whole[1..]), Some(0));
        let mut flipped = whole;
        flipped[5_000] ^= 1;
        assert_eq!(first_difference(7, 0, &flipped), Some(5_000));
        assert_ne!(word(7, 0), word(8, 0));
    }
}
