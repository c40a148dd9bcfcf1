//! The kernel's types by name (Documentation/bpf/btf.rst).

use std::num::NonZeroU32;

use super::BpfError;

const KERNEL: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const HEADER_BYTES: usize = 24;
const TYPE_BYTES: usize = 12;
/// Structures within structures, and names for names of types, that are followed.
const MAX_DEPTH: u32 = 16;

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const TYPE_TAG: u32 = 18;

/// A type's or function's number in the kernel that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TypeId(NonZeroU32);

impl TypeId {
    pub(super) fn number(self) -> u32 {
        self.0.get()
    }
}

/// A description of types, held whole (5 to 10 MB for a kernel's): to be dropped when everything has been looked up.
pub struct Btf {
    bytes: Vec<u8>,
    /// Where each type begins; the one at 0 has the number 1.
    types: Vec<u32>,
    strings: std::ops::Range<usize>,
}

/// One type: the three words all kinds have.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    info: u32,
    /// Its size in bytes, or the number of the type it refers to.
    size_or_type: u32,
}

impl Type {
    fn kind(self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn members(self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Members then have their bits' number in the top byte of their offset.
    fn has_bit_fields(self) -> bool {
        self.info >> 31 == 1
    }

    /// How long it is with all that follows its three words; `None` for kinds that are not known.
    fn bytes(self) -> Option<usize> {
        let more = match self.kind() {
            2 | 7..=12 | 16 | TYPE_TAG => 0,
            1 | 14 | 17 => 4,
            3 => 12,
            STRUCT | UNION | 15 | 19 => 12 * self.members(),
            ENUM | 13 => 8 * self.members(),
            _ => return None,
        };
        Some(TYPE_BYTES + more)
    }
}

impl Btf {
    /// The running kernel's. Takes a few milliseconds.
    pub fn of_kernel() -> Result<Self, BpfError> {
        let bytes = std::fs::read(KERNEL).map_err(|source| BpfError::NoTypes { path: KERNEL, source })?;
        Self::parse(bytes)
    }

    /// Any bytes: what is not understood is an error.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, BpfError> {
        let wrong = |why: &str| BpfError::Types { why: why.to_owned() };
        let magic = bytes.first_chunk().map(|b| u16::from_ne_bytes(*b));
        if magic != Some(MAGIC) {
            return Err(wrong("it begins with something else"));
        }
        let header = |at: usize| word(&bytes, at).map(|w| w as usize).ok_or_else(|| wrong("its header is cut off"));
        let header_bytes = header(4)?;
        if header_bytes < HEADER_BYTES {
            return Err(wrong("its header is short"));
        }
        let part = |offset: usize, length: usize| {
            let start = header_bytes.checked_add(offset)?;
            let end = start.checked_add(length).filter(|end| *end <= bytes.len())?;
            Some(start..end)
        };
        let types_at = part(header(8)?, header(12)?).ok_or_else(|| wrong("its types are cut off"))?;
        let strings = part(header(16)?, header(20)?).ok_or_else(|| wrong("its names are cut off"))?;
        let (mut types, mut at) = (Vec::new(), types_at.start);
        // Each turn takes at least a type's three words.
        while at < types_at.end {
            let found = read_type(&bytes, at).ok_or_else(|| wrong("a type is cut off"))?;
            let next = found.bytes().map(|b| at + b);
            let next = next.ok_or_else(|| BpfError::Types { why: format!("types of kind {}", found.kind()) })?;
            if next > types_at.end {
                return Err(wrong("a type is cut off"));
            }
            types.push(u32::try_from(at).map_err(|_| wrong("it is larger than 4 GiB"))?);
            at = next;
        }
        Ok(Self { bytes, types, strings })
    }

    /// A function of the kernel.
    pub fn function(&self, name: &str) -> Result<TypeId, BpfError> {
        self.find(name, &[FUNC]).ok_or_else(|| BpfError::Missing { what: format!("function {name}") })
    }

    /// A tracepoint, as programs with typed arguments attach to it.
    pub fn tracepoint(&self, name: &str) -> Result<TypeId, BpfError> {
        let found = self.find(&format!("btf_trace_{name}"), &[TYPEDEF]);
        found.ok_or_else(|| BpfError::Missing { what: format!("tracepoint {name}") })
    }

    /// Where a field is within `struct structure`, in bytes. Fields of unnamed structures within it count as its own;
    /// dots lead into named ones (`f_path.dentry`). Pointers are not followed.
    pub fn offset_of(&self, structure: &str, field: &str) -> Result<i16, BpfError> {
        let missing = || BpfError::Missing { what: format!("field {field} in struct {structure}") };
        let mut found = self.find(structure, &[STRUCT, UNION]).ok_or_else(missing)?.number();
        let mut bits = 0u64;
        for name in field.split('.') {
            let (member, at) = self.member(found, name, 0).ok_or_else(missing)?;
            found = member;
            bits += u64::from(at);
        }
        if !bits.is_multiple_of(8) {
            return Err(BpfError::Missing { what: format!("whole bytes for {field} in struct {structure}") });
        }
        // As far as an instruction reaches.
        i16::try_from(bits / 8).map_err(|_| missing())
    }

    /// The number behind a name in `enum enumeration`, if it is not below zero.
    pub fn value_of(&self, enumeration: &str, name: &str) -> Result<u32, BpfError> {
        let missing = || BpfError::Missing { what: format!("value {name} in enum {enumeration}") };
        let found = self.find(enumeration, &[ENUM]).and_then(|id| self.get(id.number())).ok_or_else(missing)?;
        let value = (0..found.members()).find_map(|n| {
            let at = found.at + TYPE_BYTES + n * 8;
            self.is_called(word(&self.bytes, at)?, name).then(|| word(&self.bytes, at + 4))?
        });
        value.filter(|value| i32::try_from(*value).is_ok()).ok_or_else(missing)
    }

    /// The type of a member and where it is, in bits.
    fn member(&self, of: u32, name: &str, depth: u32) -> Option<(u32, u32)> {
        let of = self.structure(of)?;
        if depth == MAX_DEPTH {
            return None;
        }
        for n in 0..of.members() {
            let at = of.at + TYPE_BYTES + n * 12;
            let (called, kind, place) =
                (word(&self.bytes, at)?, word(&self.bytes, at + 4)?, word(&self.bytes, at + 8)?);
            let bits = if of.has_bit_fields() { place & 0xff_ffff } else { place };
            if called == 0 {
                if let Some((found, within)) = self.member(kind, name, depth + 1) {
                    return Some((found, bits.checked_add(within)?));
                }
            } else if self.is_called(called, name) {
                return Some((kind, bits));
            }
        }
        None
    }

    /// The structure or union that a number stands for, through other names for it.
    fn structure(&self, number: u32) -> Option<Type> {
        let mut number = number;
        for _ in 0..MAX_DEPTH {
            let found = self.get(number)?;
            match found.kind() {
                STRUCT | UNION => return Some(found),
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => number = found.size_or_type,
                _ => return None,
            }
        }
        None
    }

    fn get(&self, number: u32) -> Option<Type> {
        let at = self.types.get(usize::try_from(number).ok()?.checked_sub(1)?)?;
        read_type(&self.bytes, *at as usize)
    }

    fn find(&self, name: &str, kinds: &[u32]) -> Option<TypeId> {
        let found = self.types.iter().position(|at| {
            read_type(&self.bytes, *at as usize)
                .is_some_and(|t| kinds.contains(&t.kind()) && self.is_called(t.name, name))
        })?;
        NonZeroU32::new(u32::try_from(found + 1).ok()?).map(TypeId)
    }

    fn is_called(&self, at: u32, name: &str) -> bool {
        let strings = &self.bytes[self.strings.clone()];
        let rest = strings.get(at as usize..).and_then(|s| s.strip_prefix(name.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn read_type(bytes: &[u8], at: usize) -> Option<Type> {
    Some(Type { at, name: word(bytes, at)?, info: word(bytes, at + 4)?, size_or_type: word(bytes, at + 8)? })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// struct outer { u32 a; union { struct inner b; u32 c; }; }, struct inner { u32 x; u32 y; }, a function f.
    fn sample() -> Vec<u8> {
        let names = b"\0outer\0inner\0a\0b\0c\0x\0y\0f\0u32\0";
        let name = |n: &str| {
            let with_zero = format!("\0{n}\0");
            names.windows(with_zero.len()).position(|w| w == with_zero.as_bytes()).unwrap() as u32 + 1
        };
        let info = |kind: u32, members: u32| kind << 24 | members;
        let words: Vec<u32> = [
            vec![name("u32"), info(1, 0), 4, 32],
            vec![name("inner"), info(STRUCT, 2), 8, name("x"), 1, 0, name("y"), 1, 32],
            vec![0, info(UNION, 2), 8, name("b"), 2, 0, name("c"), 1, 0],
            vec![name("outer"), info(STRUCT, 2), 12, name("a"), 1, 0, 0, 3, 32],
            vec![0, info(13, 0), 0],
            vec![name("f"), info(FUNC, 0), 5],
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        for word in [HEADER_BYTES as u32, 0, types.len() as u32, types.len() as u32, names.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(types);
        bytes.extend(names);
        bytes
    }

    #[test]
    fn fields_are_found_through_unnamed_and_named_structures() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.offset_of("outer", "a").unwrap(), 0);
        assert_eq!(btf.offset_of("outer", "c").unwrap(), 4);
        assert_eq!(btf.offset_of("outer", "b.y").unwrap(), 8);
        assert_eq!(btf.offset_of("inner", "y").unwrap(), 4);
        assert_eq!(btf.function("f").unwrap().number(), 6);
        for (structure, field) in [("outer", "y"), ("outer", "b.z"), ("oute", "a"), ("f", "a"), ("outer", "a.x")] {
            let error = btf.offset_of(structure, field).unwrap_err();
            assert!(matches!(&error, BpfError::Missing { what } if what.contains(field)), "{error}");
        }
        assert!(matches!(btf.function("inner"), Err(BpfError::Missing { .. })));
        assert!(matches!(btf.tracepoint("f"), Err(BpfError::Missing { .. })));
    }

    #[test]
    fn whatever_the_bytes_are_it_ends() {
        let whole = sample();
        for length in 0..whole.len() {
            if let Ok(btf) = Btf::parse(whole[..length].to_vec()) {
                let _ = btf.offset_of("outer", "b.y");
            }
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                if let Ok(btf) = Btf::parse(bytes) {
                    let _ = btf.offset_of("outer", "b.y");
                    let _ = btf.offset_of("outer", "c");
                }
            }
        }
    }
}
