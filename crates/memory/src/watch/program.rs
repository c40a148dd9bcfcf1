//! What runs in the kernel: at each page of a file that becomes dirty, and at writes past the page cache.
//!
//! ```text
//!   files: (inode, device) ─▶ slot       ring: ◀─ page, slot, order        lost: records that did not fit
//! ```

use crate::bpf::{BpfError, Btf, Code, Condition, Hook, Link, Map, Operation, Program, Register, Ring, Size, helper};

/// In a record's order: everything may have changed, past the page cache.
pub(super) const DIRECT: u32 = 255;
/// Page (8 bytes), slot, order (4 each).
pub(super) const RECORD_BYTES: usize = 16;
/// Inode (8 bytes), device, zero (4 each).
pub(super) const KEY_BYTES: u32 = 16;

// The record and the key on the stack.
const PAGE_AT: i16 = -16;
const SLOT_AT: i16 = -8;
const ORDER_AT: i16 = -4;
const KEY_AT: i16 = -32;
const NUMBER_AT: i16 = -36;
/// Nobody waits for records.
const NO_WAKEUP: i32 = 1;

/// The tables that programs and we share.
pub(super) struct Tables<'a> {
    pub files: &'a Map,
    pub ring: &'a Ring,
    pub lost: &'a Map,
}

/// Loads and attaches all programs; they run until their links are dropped.
pub(super) fn attach(tables: &Tables<'_>) -> Result<Vec<Link>, BpfError> {
    let btf = Btf::of_kernel()?;
    let dirtied = ("writeback_dirty_folio", dirtied(&btf, tables)?);
    // From the beginning of a direct write to its end its file's content is in the air.
    let (begun, ended) = (("iomap_dio_rw_begin", direct(&btf, tables)?), ("iomap_dio_complete", direct(&btf, tables)?));
    let attach =
        |(name, code): (&str, Code)| Program::load(name, Hook::Tracepoint(btf.tracepoint(name)?), &code)?.attach();
    [dirtied, begun, ended].into_iter().map(attach).collect()
}

/// A folio (one page or several) was clean and no longer is. Arguments: folio, mapping.
fn dirtied(btf: &Btf, tables: &Tables<'_>) -> Result<Code, BpfError> {
    let mut code = Code::new();
    let (end, one_page) = (code.label(), code.label());
    let head = 1i32.checked_shl(btf.value_of("pageflags", "PG_head")?).filter(|mask| *mask > 0);
    let head = head.ok_or_else(|| BpfError::Missing { what: "flag of large folios among the first 31".to_owned() })?;
    code.load(Size::U64, Register::R6, Register::R1, 0)
        .load(Size::U64, Register::R7, Register::R1, 8)
        .jump_if_number(Register::R7, Condition::Equal, 0, end)
        .load(Size::U64, Register::R8, Register::R7, btf.offset_of("address_space", "host")?);
    let find = Find { btf, tables, end };
    find.slot(&mut code)?;
    code.load(Size::U64, Register::R1, Register::R6, btf.offset_of("folio", "index")?)
        .store(Size::U64, Register::R10, PAGE_AT, Register::R1)
        .store_number(Size::U32, Register::R10, ORDER_AT, 0)
        .load(Size::U64, Register::R1, Register::R6, btf.offset_of("folio", "flags")?)
        .operate_number(Operation::And, Register::R1, head)
        .jump_if_number(Register::R1, Condition::Equal, 0, one_page)
        // Kernel 6.6 and newer: its low byte.
        .load(Size::U64, Register::R1, Register::R6, btf.offset_of("folio", "_flags_1")?)
        .operate_number(Operation::And, Register::R1, 0xff)
        .store(Size::U32, Register::R10, ORDER_AT, Register::R1)
        .place(one_page);
    find.tell(&mut code);
    Ok(code)
}

/// Reading or writing past the page cache. First argument: the request (kiocb).
fn direct(btf: &Btf, tables: &Tables<'_>) -> Result<Code, BpfError> {
    let mut code = Code::new();
    let end = code.label();
    code.load(Size::U64, Register::R6, Register::R1, 0)
        .load(Size::U64, Register::R6, Register::R6, btf.offset_of("kiocb", "ki_filp")?)
        .load(Size::U64, Register::R8, Register::R6, btf.offset_of("file", "f_inode")?);
    let find = Find { btf, tables, end };
    find.slot(&mut code)?;
    code.store_number(Size::U64, Register::R10, PAGE_AT, 0).store_number(
        Size::U32,
        Register::R10,
        ORDER_AT,
        DIRECT.cast_signed(),
    );
    find.tell(&mut code);
    Ok(code)
}

/// What both have in common.
struct Find<'a> {
    btf: &'a Btf,
    tables: &'a Tables<'a>,
    end: crate::bpf::Label,
}

impl Find<'_> {
    /// Looks up the inode in R8; ends if it is not watched. Its slot is in the record then.
    fn slot(&self, code: &mut Code) -> Result<(), BpfError> {
        code.load(Size::U64, Register::R1, Register::R8, self.btf.offset_of("inode", "i_ino")?)
            .store(Size::U64, Register::R10, KEY_AT, Register::R1)
            .load(Size::U64, Register::R1, Register::R8, self.btf.offset_of("inode", "i_sb")?)
            .load(Size::U32, Register::R1, Register::R1, self.btf.offset_of("super_block", "s_dev")?)
            .store(Size::U32, Register::R10, KEY_AT + 8, Register::R1)
            .store_number(Size::U32, Register::R10, KEY_AT + 12, 0)
            .set_map(Register::R1, self.tables.files)
            .copy(Register::R2, Register::R10)
            .operate_number(Operation::Add, Register::R2, KEY_AT.into())
            .call(helper::MAP_LOOKUP_ELEM)
            .jump_if_number(Register::R0, Condition::Equal, 0, self.end)
            .load(Size::U32, Register::R1, Register::R0, 0)
            .store(Size::U32, Register::R10, SLOT_AT, Register::R1);
        Ok(())
    }

    /// Puts the record into the ring, or counts it as lost; the program's end.
    fn tell(&self, code: &mut Code) {
        code.set_map(Register::R1, self.tables.ring.map())
            .copy(Register::R2, Register::R10)
            .operate_number(Operation::Add, Register::R2, PAGE_AT.into())
            .set(Register::R3, RECORD_BYTES as i32)
            .set(Register::R4, NO_WAKEUP)
            .call(helper::RINGBUF_OUTPUT)
            .jump_if_number(Register::R0, Condition::Equal, 0, self.end)
            .store_number(Size::U32, Register::R10, NUMBER_AT, 0)
            .set_map(Register::R1, self.tables.lost)
            .copy(Register::R2, Register::R10)
            .operate_number(Operation::Add, Register::R2, NUMBER_AT.into())
            .call(helper::MAP_LOOKUP_ELEM)
            .jump_if_number(Register::R0, Condition::Equal, 0, self.end)
            .set(Register::R1, 1)
            .atomically(Operation::Add, Size::U64, Register::R0, 0, Register::R1)
            .place(self.end)
            .set(Register::R0, 0)
            .exit();
    }
}
