//! Which bit of a mapping's flags has which name in `VmFlags`, learnt from mappings of which both are known.
//!
//! The kernel writes names in the order of their bits, and some bits have none (`show_smap_vma_flags` in its
//! fs/proc/task_mmu.c). Bits have other numbers from version to version, and from architecture to architecture.

/// As in `VmFlags`.
pub(super) type Name = [u8; 2];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bit {
    Unknown,
    Nameless,
    Named(Name),
}

/// A mapping's flags as bits and as names.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub bits: u64,
    pub names: Vec<Name>,
}

/// What each bit is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names([Bit; u64::BITS as usize]);

impl Names {
    /// All that follows from `samples` without doubt; `None` if they contradict each other.
    pub(super) fn learn(samples: &[Sample]) -> Option<Self> {
        let mut names = Self([Bit::Unknown; u64::BITS as usize]);
        // What is learnt from one sample may decide another: each turn but the last learns a bit.
        for _ in 0..=u64::BITS {
            let before = names.clone();
            for sample in samples {
                names.learn_from(sample)?;
            }
            if names == before {
                break;
            }
        }
        let holds = |s: &Sample| names.unknown(s.bits) != 0 || names.of(s.bits).is_some_and(|told| told == s.names);
        samples.iter().all(holds).then_some(names)
    }

    fn learn_from(&mut self, sample: &Sample) -> Option<()> {
        let mut names = sample.names.clone();
        for bit in bits(sample.bits) {
            if let Bit::Named(name) = self.0[bit] {
                let at = names.iter().position(|n| *n == name)?;
                names.remove(at);
            }
        }
        let unknown = self.unknown(sample.bits);
        if names.is_empty() {
            bits(unknown).for_each(|bit| self.0[bit] = Bit::Nameless);
        } else if unknown.count_ones() as usize == names.len() {
            bits(unknown).zip(names).for_each(|(bit, name)| self.0[bit] = Bit::Named(name));
        }
        Some(())
    }

    /// The bits of `flags` that nothing is known about.
    pub(super) fn unknown(&self, flags: u64) -> u64 {
        bits(flags).filter(|bit| self.0[*bit] == Bit::Unknown).fold(0, |all, bit| all | 1 << bit)
    }

    /// The names of `flags`, in the kernel's order; `None` where one of the bits is not known.
    pub(super) fn of(&self, flags: u64) -> Option<Vec<Name>> {
        let mut names = Vec::new();
        for bit in bits(flags) {
            match self.0[bit] {
                Bit::Unknown => return None,
                Bit::Nameless => {}
                Bit::Named(name) => names.push(name),
            }
        }
        Some(names)
    }
}

fn bits(flags: u64) -> impl Iterator<Item = usize> {
    (0..u64::BITS as usize).filter(move |bit| flags >> bit & 1 == 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample(bits: u64, names: &str) -> Sample {
        let names = names.split_ascii_whitespace().map(|n| n.as_bytes().try_into().unwrap());
        Sample { bits, names: names.collect() }
    }

    #[test]
    fn as_many_names_as_bits_are_theirs_in_order() {
        let names = Names::learn(&[sample(0b1_0011, "rd wr ac")]).unwrap();
        assert_eq!(names.of(0b1_0001).unwrap(), [*b"rd", *b"ac"]);
        assert_eq!(names.of(0b100), None);
        assert_eq!(names.unknown(0b1_0111), 0b100);
    }

    #[test]
    fn a_bit_without_a_name_is_found_out_by_other_samples() {
        // Bit 2 has no name, which the first sample alone does not tell.
        let doubtful = sample(0b1111, "rd wr ac");
        let alone = Names::learn(std::slice::from_ref(&doubtful)).unwrap();
        assert_eq!(alone.unknown(0b1111), 0b1111);
        let names = Names::learn(&[doubtful, sample(0b1011, "rd wr ac"), sample(0b1, "rd")]).unwrap();
        assert_eq!(names.of(0b1110).unwrap(), [*b"wr", *b"ac"]);
    }

    #[test]
    fn contradictions_are_told() {
        assert_eq!(Names::learn(&[sample(0b1, "rd"), sample(0b11, "wr ex")]), None);
        assert_eq!(Names::learn(&[sample(0b1, "rd"), sample(0b10, "wr"), sample(0b11, "wr rd")]), None);
    }
}
