//! An assembler for programs of a few instructions (Documentation/bpf/standardization/instruction-set.rst).

use std::os::fd::AsRawFd;

use super::Map;

/// R0 has results; R1 to R5 have arguments and do not survive a call, R6 to R9 do; R10 is the stack's end (512 bytes
/// below it) and cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

/// How much a load or store moves, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Size {
    U32 = 0x00,
    U16 = 0x08,
    U8 = 0x10,
    U64 = 0x18,
}

/// Arithmetic on 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    Add = 0x00,
    Subtract = 0x10,
    Multiply = 0x20,
    Or = 0x40,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Modulo = 0x90,
    Xor = 0xa0,
    Set = 0xb0,
}

/// Comparisons, without sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Condition {
    Equal = 0x10,
    Greater = 0x20,
    GreaterOrEqual = 0x30,
    /// A bit is common to both.
    AnyOf = 0x40,
    NotEqual = 0x50,
    Less = 0xa0,
    LessOrEqual = 0xb0,
}

/// Numbers of the kernel's functions for programs (`enum bpf_func_id`).
pub mod helper {
    pub const MAP_LOOKUP_ELEM: i32 = 1;
    pub const MAP_UPDATE_ELEM: i32 = 2;
    pub const MAP_DELETE_ELEM: i32 = 3;
    pub const KTIME_GET_NS: i32 = 5;
    pub const GET_CURRENT_PID_TGID: i32 = 14;
    pub const PROBE_READ_KERNEL: i32 = 113;
    pub const SEQ_WRITE: i32 = 127;
    pub const RINGBUF_OUTPUT: i32 = 130;
}

/// A place to jump to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

#[derive(Debug, Clone, Copy, Default)]
struct Instruction {
    opcode: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A program being written, instruction by instruction. It begins with its context in R1.
#[derive(Debug, Default)]
pub struct Code {
    instructions: Vec<Instruction>,
    /// Where each label is, once it has been placed.
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

const LOAD: u8 = 0x61;
const STORE_NUMBER: u8 = 0x62;
const STORE: u8 = 0x63;
const ATOMIC: u8 = 0xc3;
const ARITHMETIC: u8 = 0x07;
const JUMP: u8 = 0x05;
/// The operand is a register and no number.
const BY_REGISTER: u8 = 0x08;

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    fn push(&mut self, opcode: u8, to: Register, from: Register, offset: i16, immediate: i32) -> &mut Self {
        let registers = (from as u8) << 4 | to as u8;
        self.instructions.push(Instruction { opcode, registers, offset, immediate });
        self
    }

    /// `to = from`.
    pub fn copy(&mut self, to: Register, from: Register) -> &mut Self {
        self.operate(Operation::Set, to, from)
    }

    /// `to = number`, extended by its sign.
    pub fn set(&mut self, to: Register, number: i32) -> &mut Self {
        self.operate_number(Operation::Set, to, number)
    }

    /// `to = number`.
    pub fn set_u64(&mut self, to: Register, number: u64) -> &mut Self {
        self.two(to, Register::R0, number as u32, (number >> 32) as u32)
    }

    /// `to = map`, for a helper's argument. A loaded program holds its maps.
    pub fn set_map(&mut self, to: Register, map: &Map) -> &mut Self {
        // BPF_PSEUDO_MAP_FD.
        self.two(to, Register::R1, map.fd().as_raw_fd().cast_unsigned(), 0)
    }

    fn two(&mut self, to: Register, from: Register, low: u32, high: u32) -> &mut Self {
        self.push(0x18, to, from, 0, low.cast_signed());
        self.push(0, Register::R0, Register::R0, 0, high.cast_signed())
    }

    /// `to = to operation by`.
    pub fn operate(&mut self, operation: Operation, to: Register, by: Register) -> &mut Self {
        self.push(ARITHMETIC | BY_REGISTER | operation as u8, to, by, 0, 0)
    }

    /// `to = to operation number`, extended by its sign.
    pub fn operate_number(&mut self, operation: Operation, to: Register, number: i32) -> &mut Self {
        self.push(ARITHMETIC | operation as u8, to, Register::R0, 0, number)
    }

    /// `to = *(from + offset)`.
    pub fn load(&mut self, size: Size, to: Register, from: Register, offset: i16) -> &mut Self {
        self.push(LOAD | size as u8, to, from, offset, 0)
    }

    /// `*(at + offset) = from`.
    pub fn store(&mut self, size: Size, at: Register, offset: i16, from: Register) -> &mut Self {
        self.push(STORE | size as u8, at, from, offset, 0)
    }

    /// `*(at + offset) = number`.
    pub fn store_number(&mut self, size: Size, at: Register, offset: i16, number: i32) -> &mut Self {
        self.push(STORE_NUMBER | size as u8, at, Register::R0, offset, number)
    }

    /// `*(at + offset) = *(at + offset) operation by` in one step: [`Operation`] Add, Or, And, Xor; 4 or 8 bytes.
    pub fn atomically(
        &mut self,
        operation: Operation,
        size: Size,
        at: Register,
        offset: i16,
        by: Register,
    ) -> &mut Self {
        self.push(ATOMIC | size as u8, at, by, offset, operation as i32)
    }

    /// Calls one of the kernel's functions, see [`helper`].
    pub fn call(&mut self, function: i32) -> &mut Self {
        self.push(0x85, Register::R0, Register::R0, 0, function)
    }

    /// Ends with R0 as the result.
    pub fn exit(&mut self) -> &mut Self {
        self.push(0x95, Register::R0, Register::R0, 0, 0)
    }

    /// A label to jump to, to be placed once.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Places a label here.
    pub fn place(&mut self, label: Label) -> &mut Self {
        if let Some(place) = self.labels.get_mut(label.0) {
            *place = Some(self.instructions.len());
        }
        self
    }

    /// Goes on at a label.
    pub fn jump(&mut self, to: Label) -> &mut Self {
        self.jumps.push((self.instructions.len(), to));
        self.push(JUMP, Register::R0, Register::R0, 0, 0)
    }

    /// Goes on at a label if `left condition right`.
    pub fn jump_if(&mut self, left: Register, condition: Condition, right: Register, to: Label) -> &mut Self {
        self.jumps.push((self.instructions.len(), to));
        self.push(JUMP | BY_REGISTER | condition as u8, left, right, 0, 0)
    }

    /// Goes on at a label if `left condition right`, the number extended by its sign.
    pub fn jump_if_number(&mut self, left: Register, condition: Condition, right: i32, to: Label) -> &mut Self {
        self.jumps.push((self.instructions.len(), to));
        self.push(JUMP | condition as u8, left, Register::R0, 0, right)
    }

    /// The instructions, 8 bytes each, in the machine's order.
    pub(super) fn assemble(&self) -> Result<Vec<u8>, &'static str> {
        let mut instructions = self.instructions.clone();
        for (at, label) in &self.jumps {
            let to = self.labels.get(label.0).copied().flatten().ok_or("a label was not placed")?;
            let distance = to as i64 - *at as i64 - 1;
            instructions[*at].offset = i16::try_from(distance).map_err(|_| "a jump is too far")?;
        }
        let mut bytes = Vec::with_capacity(instructions.len() * 8);
        for i in instructions {
            // Two registers in a byte: which is the lower one depends on the machine's order.
            let registers = if cfg!(target_endian = "big") { i.registers.rotate_left(4) } else { i.registers };
            bytes.extend([i.opcode, registers]);
            bytes.extend(i.offset.to_ne_bytes());
            bytes.extend(i.immediate.to_ne_bytes());
        }
        Ok(bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_behind_and_ahead() {
        let mut code = Code::new();
        let (again, end) = (code.label(), code.label());
        code.set(Register::R0, 3)
            .place(again)
            .operate_number(Operation::Subtract, Register::R0, 1)
            .jump_if_number(Register::R0, Condition::Equal, 0, end)
            .jump(again)
            .place(end)
            .exit();
        let bytes = code.assemble().unwrap();
        let offset = |n: usize| i16::from_ne_bytes([bytes[n * 8 + 2], bytes[n * 8 + 3]]);
        assert_eq!((offset(2), offset(3)), (1, -3));
        assert_eq!((bytes[8], bytes[16], bytes[24], bytes[32]), (0x17, 0x15, 0x05, 0x95));
    }

    #[test]
    fn a_label_that_is_nowhere_is_an_error() {
        let mut code = Code::new();
        let nowhere = code.label();
        code.jump(nowhere).exit();
        assert_eq!(code.assemble(), Err("a label was not placed"));
    }
}
