//! One 512-byte tar header and the PAX records before it, turned into an [`Entry`].

use super::sparse::{self, Form};
use super::tar::{Entry, Extensions, Kind, TarError};

pub(super) const BLOCK: usize = 512;
pub(super) type Block = [u8; BLOCK];
/// Key and value of a PAX record; values may be binary.
pub(super) type Record = (Vec<u8>, Vec<u8>);

/// The sum of all bytes with the checksum field taken as spaces must be what the field says; some
/// old writers summed signed bytes.
pub(super) fn verify_checksum(block: &Block, at: u64) -> Result<(), TarError> {
    let field = 148..156;
    let with_spaces = block.iter().enumerate().map(|(i, &byte)| if field.contains(&i) { b' ' } else { byte });
    let (unsigned, signed) =
        with_spaces.fold((0u64, 0i64), |(u, s), byte| (u + u64::from(byte), s + i64::from(byte as i8)));
    match number(&block[148..156]) {
        Some(said) if said == unsigned || i64::try_from(said) == Ok(signed) => Ok(()),
        _ => Err(TarError::Checksum { at }),
    }
}

/// A non-negative numeric field: octal text, or GNU's base 256 when the first bit is set.
pub(super) fn number(field: &[u8]) -> Option<u64> {
    signed_number(field).and_then(|value| u64::try_from(value).ok())
}

fn signed_number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Two's complement over the field without the marking bit; the next bit is the sign.
        let start: i128 = if first & 0x40 != 0 { i128::from(first) - 0x100 } else { i128::from(first & 0x7f) };
        let value =
            rest.iter().try_fold(start, |value, &byte| value.checked_mul(256)?.checked_add(i128::from(byte)))?;
        return i64::try_from(value).ok();
    }
    let text = field.iter().copied().skip_while(|byte| *byte == b' ');
    let digits: Vec<u8> = text.take_while(|byte| *byte != 0 && *byte != b' ').collect();
    if digits.is_empty() {
        return Some(0);
    }
    i64::from_str_radix(std::str::from_utf8(&digits).ok()?, 8).ok()
}

pub(super) fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// `LENGTH key=value\n` records, LENGTH counting the whole record.
pub(super) fn pax_records(mut data: &[u8], at: u64) -> Result<Vec<Record>, TarError> {
    let bad = TarError::Field { at, field: "PAX record" };
    let mut records = Vec::new();
    // Some writers pad the last record with zeros.
    while data.first().is_some_and(|byte| *byte != 0) {
        let parsed = (|| {
            let space = data.iter().take(20).position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&data[..space]).ok()?.parse().ok()?;
            let record = data.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|byte| *byte == b'=')?;
            Some((length, record[..equals].to_vec(), record[equals + 1..].to_vec()))
        })();
        let Some((length, key, value)) = parsed else { return Err(bad) };
        records.push((key, value));
        data = &data[length..];
    }
    Ok(records)
}

/// The entry that a header and its extensions describe, and where its sparse map is.
pub(super) fn entry(block: &Block, at: u64, extensions: &Extensions) -> Result<(Entry, Form), TarError> {
    let field = |field| TarError::Field { at, field };
    let decimal = |key: &str, name| match extensions.get(key) {
        None => Ok(None),
        Some(text) => parse::<u64>(text).map(Some).ok_or(field(name)),
    };
    let octal = |range: std::ops::Range<usize>, name| number(&block[range]).ok_or(field(name));
    let id = |value: u64, name| u32::try_from(value).ok().filter(|id| *id != u32::MAX).ok_or(field(name));

    let mut path = match (extensions.get("GNU.sparse.name"), extensions.get("path"), &extensions.path) {
        (Some(path), _, _) | (None, Some(path), _) => path.to_vec(),
        (None, None, Some(path)) => path.clone(),
        (None, None, None) => short_path(block),
    };
    let link = match (extensions.get("linkpath"), &extensions.link) {
        (Some(link), _) => link.to_vec(),
        (None, Some(link)) => link.clone(),
        (None, None) => until_zero(&block[157..257]).to_vec(),
    };
    let mut kind = match block[156] {
        0 | b'0' | b'7' | b'S' => Kind::File,
        b'1' => Kind::HardLink,
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        other => {
            let path = String::from_utf8_lossy(&path).into_owned();
            return Err(TarError::Kind { path, kind: other as char });
        }
    };
    // Before ustar a directory was a file whose name ends with a slash.
    if kind == Kind::File && path.ends_with(b"/") {
        kind = Kind::Directory;
    }
    if kind == Kind::Directory {
        while path.ends_with(b"/") {
            path.pop();
        }
    }
    let said = match decimal("size", "size")? {
        Some(size) => size,
        None => octal(124..136, "size")?,
    };
    // Only files have data; writers that put a size on other kinds store none.
    let stored = if kind == Kind::File { said } else { 0 };
    let mtime = match extensions.get("mtime") {
        Some(text) => pax_time(text).ok_or(field("mtime"))?,
        None => (signed_number(&block[136..148]).ok_or(field("mtime"))?, 0),
    };
    let uid = match decimal("uid", "uid")? {
        Some(uid) => uid,
        None => octal(108..116, "uid")?,
    };
    let gid = match decimal("gid", "gid")? {
        Some(gid) => gid,
        None => octal(116..124, "gid")?,
    };
    let device = match kind {
        Kind::CharDevice | Kind::BlockDevice => (
            id(octal(329..337, "device major")?, "device major")?,
            id(octal(337..345, "device minor")?, "device minor")?,
        ),
        _ => (0, 0),
    };
    let xattrs = extensions
        .records
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone())))
        .collect();
    let mut entry = Entry {
        path,
        link,
        kind,
        mode: (octal(100..108, "mode")? & 0o7777) as u32,
        uid: id(uid, "uid")?,
        gid: id(gid, "gid")?,
        mtime,
        device,
        size: stored,
        stored,
        sparse: None,
        xattrs,
    };
    let form = match kind {
        Kind::File => sparse::form(block, &mut entry, extensions)?,
        _ => Form::None,
    };
    Ok((entry, form))
}

/// ustar splits long names into prefix and name; GNU uses the prefix's place otherwise.
fn short_path(block: &Block) -> Vec<u8> {
    let name = until_zero(&block[..100]);
    let prefix = until_zero(&block[345..500]);
    if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
        return [prefix, b"/", name].concat();
    }
    name.to_vec()
}

pub(super) fn parse<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with an optional fraction, possibly negative; the fraction counts upwards from the floor.
fn pax_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{:0<9.9}", fraction).parse().ok()?;
    match whole.starts_with('-') && nanos > 0 {
        true => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos)),
        false => Some((seconds, nanos)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"  644 \0\0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"0000x44\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]), Some(256));
        assert_eq!(signed_number(&[0xff; 12]), Some(-1));
        assert_eq!(number(&[0xff; 12]), None);
    }

    #[test]
    fn times() {
        assert_eq!(pax_time(b"1350244992.023960108"), Some((1350244992, 23960108)));
        assert_eq!(pax_time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time(b"12.x"), None);
    }

    #[test]
    fn records_are_binary() {
        let records = pax_records(b"13 k=a\nb=c\n\0\n6 z=1\n", 0).unwrap();
        assert_eq!(records[0], (b"k".to_vec(), b"a\nb=c\n\0".to_vec()));
        assert_eq!(records[1], (b"z".to_vec(), b"1".to_vec()));
        for bad in [&b"99 k=v\n"[..], b"x k=v\n", b"6 kvv\n", b"0 k=v\n", b"2 k=v\n"] {
            assert!(pax_records(bad, 0).is_err(), "{bad:?}");
        }
    }
}
