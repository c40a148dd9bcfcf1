//! Sparse files in their four encodings (GNU tar manual, "Sparse Formats").

use super::header::{BLOCK, Block, number, parse};
use super::tar::{Entry, Extensions, Skip, TarError, TarReader};
use crate::limits::MAX_SPARSE_PIECES;

type Pieces = Vec<(u64, u64)>;

/// Where an entry's map of data pieces is.
pub(super) enum Form {
    None,
    /// PAX 0.0 and 0.1: it was in the records.
    Listed {
        pieces: Pieces,
    },
    /// Old GNU: in the header, and in further blocks after it.
    Gnu,
    /// PAX 1.0: at the start of the data, as decimal lines padded to a block.
    InData,
}

fn malformed(entry: &Entry) -> TarError {
    TarError::Sparse { path: String::from_utf8_lossy(&entry.path).into_owned() }
}

/// Recognises the encoding and sets the entry's unpacked size.
pub(super) fn form(block: &Block, entry: &mut Entry, extensions: &Extensions) -> Result<Form, TarError> {
    if block[156] == b'S' {
        entry.size = number(&block[483..495]).ok_or_else(|| malformed(entry))?;
        return Ok(Form::Gnu);
    }
    let has = |key: &str| extensions.get(key).is_some();
    if !has("GNU.sparse.major") && !has("GNU.sparse.map") && !has("GNU.sparse.offset") {
        return Ok(Form::None);
    }
    let real = extensions.get("GNU.sparse.realsize").or(extensions.get("GNU.sparse.size"));
    entry.size = real.and_then(parse).ok_or_else(|| malformed(entry))?;
    if extensions.get("GNU.sparse.major") == Some(b"1") {
        return Ok(Form::InData);
    }
    let numbers: Option<Vec<u64>> = match extensions.get("GNU.sparse.map") {
        Some(map) => map.split(|byte| *byte == b',').filter(|text| !text.is_empty()).map(parse).collect(),
        None => {
            let wanted = |key: &[u8]| key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes";
            extensions.records.iter().filter(|(key, _)| wanted(key)).map(|(_, value)| parse(value)).collect()
        }
    };
    let numbers = numbers.filter(|numbers| numbers.len() % 2 == 0).ok_or_else(|| malformed(entry))?;
    let pieces = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    Ok(Form::Listed { pieces })
}

fn gnu_pieces(fields: &[u8], pieces: &mut Pieces, entry: &Entry) -> Result<(), TarError> {
    for field in fields.chunks_exact(24).take_while(|field| field[0] != 0) {
        let piece = number(&field[..12]).zip(number(&field[12..]));
        pieces.push(piece.ok_or_else(|| malformed(entry))?);
    }
    if pieces.len() > MAX_SPARSE_PIECES {
        return Err(malformed(entry));
    }
    Ok(())
}

/// The four pieces of the header itself.
pub(super) fn gnu_first(block: &Block, entry: &Entry) -> Result<Pieces, TarError> {
    let mut pieces = Vec::new();
    gnu_pieces(&block[386..482], &mut pieces, entry)?;
    Ok(pieces)
}

/// The 21 pieces of a further block; says whether another follows.
pub(super) fn gnu_next(block: &Block, pieces: &mut Pieces, entry: &Entry) -> Result<bool, TarError> {
    gnu_pieces(&block[..504], pieces, entry)?;
    // An empty block that announces another would go on for ever.
    if block[0] == 0 && block[504] != 0 {
        return Err(malformed(entry));
    }
    Ok(block[504] != 0)
}

/// Reads the map at the start of the data, with its padding.
pub(super) fn from_data<R: Skip>(reader: &mut TarReader<R>, entry: &Entry) -> Result<Pieces, TarError> {
    let mut lines = Lines { block: [0; BLOCK], next: BLOCK };
    let count = lines.number(reader, entry)?;
    if count > MAX_SPARSE_PIECES as u64 {
        return Err(malformed(entry));
    }
    (0..count).map(|_| Ok((lines.number(reader, entry)?, lines.number(reader, entry)?))).collect()
}

/// Decimal lines, taken block by block.
struct Lines {
    block: Block,
    next: usize,
}

impl Lines {
    fn number<R: Skip>(&mut self, reader: &mut TarReader<R>, entry: &Entry) -> Result<u64, TarError> {
        let mut value: u64 = 0;
        // 20 digits hold any u64.
        for digits in 0..=20 {
            if self.next == BLOCK {
                reader.read_exact_data(&mut self.block)?;
                self.next = 0;
            }
            let byte = self.block[self.next];
            self.next += 1;
            match byte {
                b'\n' if digits > 0 => return Ok(value),
                b'0'..=b'9' => {
                    let next = value.checked_mul(10).and_then(|v| v.checked_add(u64::from(byte - b'0')));
                    value = next.ok_or_else(|| malformed(entry))?;
                }
                _ => break,
            }
        }
        Err(malformed(entry))
    }
}

/// Pieces lie in order, do not overlap, end within the file and hold exactly the stored bytes.
pub(super) fn check(entry: &Entry) -> Result<(), TarError> {
    let Some(pieces) = &entry.sparse else { return Ok(()) };
    let (mut end, mut stored) = (0u64, 0u64);
    for &(offset, length) in pieces {
        if offset < end {
            return Err(malformed(entry));
        }
        end = offset.checked_add(length).ok_or_else(|| malformed(entry))?;
        // Cannot overflow: pieces do not overlap.
        stored += length;
    }
    if end > entry.size || stored != entry.stored {
        return Err(malformed(entry));
    }
    Ok(())
}
