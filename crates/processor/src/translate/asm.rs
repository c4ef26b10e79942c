//! A small assembler for host code: just the forms that the translator emits around guest instructions.

/// A host register, by its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reg(pub u8);

pub const RAX: Reg = Reg(0);
pub const RCX: Reg = Reg(1);
pub const RDX: Reg = Reg(2);
pub const RBX: Reg = Reg(3);
/// The base register: it points into the VCPU.
pub const BASE: Reg = Reg(4);
pub const RBP: Reg = Reg(5);
pub const RSI: Reg = Reg(6);
pub const RDI: Reg = Reg(7);
/// The two scratch registers.
pub const T0: Reg = Reg(10);
pub const T1: Reg = Reg(11);
pub const R12: Reg = Reg(12);
pub const R13: Reg = Reg(13);
pub const R14: Reg = Reg(14);
pub const R15: Reg = Reg(15);

/// `[base + index * scale + disp]`; scale is a power of two given as its logarithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    pub base: Reg,
    pub index: Option<(Reg, u8)>,
    pub disp: i32,
}

impl Mem {
    #[must_use]
    pub fn base(base: Reg, disp: i32) -> Mem {
        Mem { base, index: None, disp }
    }

    /// A field of the VCPU.
    #[must_use]
    pub fn vcpu(disp: i32) -> Mem {
        Mem::base(BASE, disp)
    }

    #[must_use]
    pub fn indexed(base: Reg, index: Reg, scale: u8, disp: i32) -> Mem {
        Mem { base, index: Some((index, scale)), disp }
    }
}

/// Condition codes as in the low bits of Jcc.
pub mod cc {
    pub const B: u8 = 2;
    pub const Z: u8 = 4;
    pub const NZ: u8 = 5;
    pub const A: u8 = 7;
}

/// The eight classic operations, by their opcode extension.
#[derive(Clone, Copy, Debug)]
pub enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// A place in the code that is not known yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Label(u32);

/// Code is kept from machine to machine (see `kept`), so nothing in it may depend on where the host put anything: all that is
/// outside of it is reached by [`Asm::relative`] or from the base register, and there are no absolute addresses of the host.
#[derive(Debug, Default)]
pub struct Asm {
    pub code: Vec<u8>,
    /// Where the code will run.
    origin: u64,
    bound: Vec<Option<u32>>,
    uses: Vec<(u32, Label)>,
    /// Displacements to what is outside the code: where they are, and the target.
    externals: Vec<(u32, u64)>,
}

impl Asm {
    pub fn restart(&mut self, origin: u64) {
        self.code.clear();
        self.bound.clear();
        self.uses.clear();
        self.externals.clear();
        self.origin = origin;
    }

    #[must_use]
    pub fn origin(&self) -> u64 {
        self.origin
    }

    #[must_use]
    pub fn externals(&self) -> &[(u32, u64)] {
        &self.externals
    }

    #[must_use]
    pub fn position(&self) -> usize {
        self.code.len()
    }

    #[must_use]
    pub fn address(&self) -> u64 {
        self.origin + self.code.len() as u64
    }

    pub fn label(&mut self) -> Label {
        self.bound.push(None);
        Label(self.bound.len() as u32 - 1)
    }

    pub fn bind(&mut self, label: Label) {
        self.bound[label.0 as usize] = Some(self.code.len() as u32);
    }

    /// Fills in the jumps to labels. Every label that is used must be bound.
    pub fn finish(&mut self) {
        for (at, label) in self.uses.drain(..) {
            let target = self.bound[label.0 as usize].expect("a label that is used is bound");
            let relative = target as i32 - (at as i32 + 4);
            self.code[at as usize..at as usize + 4].copy_from_slice(&relative.to_le_bytes());
        }
    }

    pub fn byte(&mut self, byte: u8) {
        self.code.push(byte);
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    pub fn dword(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn rex(&mut self, wide: bool, reg: u8, index: u8, base: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 {
            self.byte(rex);
        }
    }

    /// ModRM, SIB and displacement of a memory operand; REX is the caller's.
    pub fn modrm_mem(&mut self, reg: u8, mem: Mem) {
        let reg = (reg & 7) << 3;
        let base = mem.base.0 & 7;
        let small = i8::try_from(mem.disp).ok();
        let mode = match small {
            Some(0) if base != 5 => 0,
            Some(_) => 0x40,
            None => 0x80,
        };
        match mem.index {
            Some((index, scale)) => {
                self.byte(mode | reg | 4);
                self.byte(scale << 6 | (index.0 & 7) << 3 | base);
            }
            None if base == 4 => {
                self.byte(mode | reg | 4);
                self.byte(0x24);
            }
            None => self.byte(mode | reg | base),
        }
        match mode {
            0 => {}
            0x40 => self.byte(mem.disp as u8),
            _ => self.dword(mem.disp as u32),
        }
    }

    fn op_mem(&mut self, wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        self.rex(wide, reg, mem.index.map_or(0, |(index, _)| index.0), mem.base.0);
        self.bytes(opcode);
        self.modrm_mem(reg, mem);
    }

    fn op_reg(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: Reg) {
        self.rex(wide, reg, 0, rm.0);
        self.bytes(opcode);
        self.byte(0xc0 | (reg & 7) << 3 | rm.0 & 7);
    }

    pub fn mov(&mut self, to: Reg, from: Reg) {
        self.op_reg(true, &[0x8b], to.0, from);
    }

    pub fn mov32(&mut self, to: Reg, from: Reg) {
        self.op_reg(false, &[0x8b], to.0, from);
    }

    pub fn load(&mut self, to: Reg, from: Mem) {
        self.op_mem(true, &[0x8b], to.0, from);
    }

    pub fn load32(&mut self, to: Reg, from: Mem) {
        self.op_mem(false, &[0x8b], to.0, from);
    }

    pub fn store(&mut self, to: Mem, from: Reg) {
        self.op_mem(true, &[0x89], from.0, to);
    }

    pub fn lea(&mut self, to: Reg, from: Mem) {
        self.op_mem(true, &[0x8d], to.0, from);
    }

    pub fn mov_imm(&mut self, to: Reg, value: u64) {
        if value <= u64::from(u32::MAX) {
            self.rex(false, 0, 0, to.0);
            self.byte(0xb8 | to.0 & 7);
            self.dword(value as u32);
        } else if i32::try_from(value as i64).is_ok() {
            self.op_reg(true, &[0xc7], 0, to);
            self.dword(value as u32);
        } else {
            self.rex(true, 0, 0, to.0);
            self.byte(0xb8 | to.0 & 7);
            self.bytes(&value.to_le_bytes());
        }
    }

    /// Stores a sign-extended 32-bit immediate as 8 bytes.
    pub fn store_imm(&mut self, to: Mem, value: i32) {
        self.op_mem(true, &[0xc7], 0, to);
        self.dword(value as u32);
    }

    pub fn store_imm32(&mut self, to: Mem, value: u32) {
        self.op_mem(false, &[0xc7], 0, to);
        self.dword(value);
    }

    pub fn alu_imm(&mut self, operation: Alu, to: Reg, value: i32) {
        self.alu_imm_sized(true, operation, to, value);
    }

    pub fn alu_imm32(&mut self, operation: Alu, to: Reg, value: i32) {
        self.alu_imm_sized(false, operation, to, value);
    }

    fn alu_imm_sized(&mut self, wide: bool, operation: Alu, to: Reg, value: i32) {
        if let Ok(small) = i8::try_from(value) {
            self.op_reg(wide, &[0x83], operation as u8, to);
            self.byte(small as u8);
        } else {
            self.op_reg(wide, &[0x81], operation as u8, to);
            self.dword(value as u32);
        }
    }

    pub fn alu_mem_imm(&mut self, operation: Alu, to: Mem, value: i32) {
        self.op_mem(true, &[0x81], operation as u8, to);
        self.dword(value as u32);
    }

    pub fn alu_load(&mut self, operation: Alu, to: Reg, from: Mem) {
        self.op_mem(true, &[(operation as u8) << 3 | 3], to.0, from);
    }

    pub fn alu(&mut self, operation: Alu, to: Reg, from: Reg) {
        self.op_reg(true, &[(operation as u8) << 3 | 3], to.0, from);
    }

    pub fn multiply32(&mut self, to: Reg, from: Reg, by: u32) {
        self.op_reg(false, &[0x69], to.0, from);
        self.dword(by);
    }

    pub fn cmp_byte_mem(&mut self, mem: Mem, value: u8) {
        self.op_mem(false, &[0x80], 7, mem);
        self.byte(value);
    }

    /// `cmp word [mem], value`
    pub fn cmp_word_mem(&mut self, mem: Mem, value: i8) {
        self.byte(0x66);
        self.op_mem(false, &[0x83], 7, mem);
        self.byte(value as u8);
    }

    /// `test byte [mem], value`
    pub fn test_byte_mem(&mut self, mem: Mem, value: u8) {
        self.op_mem(false, &[0xf6], 0, mem);
        self.byte(value);
    }

    pub fn shr(&mut self, to: Reg, count: u8) {
        self.op_reg(true, &[0xc1], 5, to);
        self.byte(count);
    }

    pub fn shl(&mut self, to: Reg, count: u8) {
        self.op_reg(true, &[0xc1], 4, to);
        self.byte(count);
    }

    pub fn sar(&mut self, to: Reg, count: u8) {
        self.op_reg(true, &[0xc1], 7, to);
        self.byte(count);
    }

    pub fn op_reg_raw(&mut self, wide: bool, opcode: &[u8], reg: Reg, rm: Reg) {
        self.op_reg(wide, opcode, reg.0, rm);
    }

    pub fn push(&mut self, reg: Reg) {
        self.rex(false, 0, 0, reg.0);
        self.byte(0x50 | reg.0 & 7);
    }

    /// Adds one to a word in memory.
    pub fn increment(&mut self, mem: Mem) {
        self.op_mem(true, &[0xff], 0, mem);
    }

    pub fn pop(&mut self, reg: Reg) {
        self.rex(false, 0, 0, reg.0);
        self.byte(0x58 | reg.0 & 7);
    }

    /// Pops into memory. With RSP as base the address is computed after RSP is incremented.
    pub fn pop_mem(&mut self, to: Mem) {
        self.op_mem(false, &[0x8f], 0, to);
    }

    /// BT of 32 bits with a constant.
    pub fn bit_test_mem32(&mut self, mem: Mem, bit: u8) {
        self.op_mem(false, &[0x0f, 0xba], 4, mem);
        self.byte(bit);
    }

    pub fn jmp_reg(&mut self, to: Reg) {
        self.op_reg(false, &[0xff], 4, to);
    }

    pub fn jmp_mem(&mut self, to: Mem) {
        self.op_mem(false, &[0xff], 4, to);
    }

    pub fn op_mem_raw(&mut self, wide: bool, opcode: &[u8], extension: u8, mem: Mem) {
        self.op_mem(wide, opcode, extension, mem);
    }

    /// The address of a place in the code.
    pub fn lea_label(&mut self, to: Reg, label: Label) {
        self.rex(true, to.0, 0, 0);
        self.bytes(&[0x8d, (to.0 & 7) << 3 | 5]);
        self.use_label(label);
    }

    pub fn jcc_address(&mut self, condition: u8, target: u64) {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.relative(target);
    }

    pub fn jcc(&mut self, condition: u8, to: Label) {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.use_label(to);
    }

    pub fn jmp(&mut self, to: Label) {
        self.byte(0xe9);
        self.use_label(to);
    }

    fn use_label(&mut self, label: Label) {
        self.uses.push((self.code.len() as u32, label));
        self.dword(0);
    }

    pub fn call_address(&mut self, target: u64) {
        self.byte(0xe8);
        self.relative(target);
    }

    pub fn jmp_address(&mut self, target: u64) {
        self.byte(0xe9);
        self.relative(target);
    }

    /// A 32-bit displacement to an absolute address, relative to the end of these four bytes.
    pub fn relative(&mut self, target: u64) {
        if !(self.origin..=self.address()).contains(&target) {
            self.externals.push((self.code.len() as u32, target));
        }
        let relative = target.wrapping_sub(self.address() + 4) as i64;
        let relative = i32::try_from(relative).expect("the code cache is smaller than 2 GiB");
        self.dword(relative as u32);
    }
}
