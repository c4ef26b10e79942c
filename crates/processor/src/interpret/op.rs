//! An instruction made ready to run: its handler is chosen and its operands are taken apart once, when it is decoded, so
//! that running it needs no look at encodings. The decode cache holds these.

use iced_x86::{Code, CodeSize, Instruction, Mnemonic, OpKind, Register};
use x86::{CpuState, GuestFault, Gva, seg};

use super::{Flow, dispatch};
use crate::core::{Core, as_stack_fault};

/// What runs an instruction. While it runs, RIP is still that of the instruction; when it fails, nothing architectural
/// has changed (but for the finished iterations of a repeated string instruction).
pub type Run = fn(&mut Core<'_>, &Op) -> Result<Flow, GuestFault>;

/// Kinds of operand; constants and not an enum, because handlers take them as const parameters.
pub mod kind {
    pub const REGISTER: u8 = 0;
    pub const MEMORY: u8 = 1;
    pub const IMMEDIATE: u8 = 2;
    pub const SEGMENT: u8 = 3;
    pub const NONE: u8 = 4;
    /// As a const parameter: look at the operand.
    pub const ANY: u8 = 5;
}

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub kind: u8,
    /// The number of the register.
    pub index: u8,
    /// 8 for AH, CH, DH and BH.
    pub shift: u8,
    /// In bytes.
    pub size: u8,
}

impl Place {
    const NONE: Place = Place { kind: kind::NONE, index: 0, shift: 0, size: 0 };

    /// The place of a general register; `None` for all others.
    #[must_use]
    pub fn general(register: Register) -> Option<Place> {
        let number = register as u8;
        let within = |first: Register, last: Register| (first as u8..=last as u8).contains(&number);
        let (first, base, shift, size) = if within(Register::RAX, Register::R15) {
            (Register::RAX, 0, 0, 8)
        } else if within(Register::EAX, Register::R15D) {
            (Register::EAX, 0, 0, 4)
        } else if within(Register::AX, Register::R15W) {
            (Register::AX, 0, 0, 2)
        } else if within(Register::AL, Register::BL) {
            (Register::AL, 0, 0, 1)
        } else if within(Register::AH, Register::BH) {
            (Register::AH, 0, 8, 1)
        } else if within(Register::SPL, Register::R15L) {
            (Register::SPL, 4, 0, 1)
        } else {
            return None;
        };
        Some(Place { kind: kind::REGISTER, index: number - first as u8 + base, shift, size })
    }

    fn of(instruction: &Instruction, operand: u32) -> Place {
        if operand >= instruction.op_count() {
            return Place::NONE;
        }
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let register = instruction.op_register(operand);
                match (Place::general(register), segment_index(register)) {
                    (Some(place), _) => place,
                    (_, Some(index)) => Place { kind: kind::SEGMENT, index: index as u8, shift: 0, size: 2 },
                    _ => Place::NONE,
                }
            }
            OpKind::Memory => {
                let size = instruction.memory_size().size().min(255) as u8;
                Place { kind: kind::MEMORY, index: 0, shift: 0, size }
            }
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Place { kind: kind::IMMEDIATE, ..Place::NONE },
            _ => Place::NONE,
        }
    }
}

/// The index in [`CpuState::segments`].
#[must_use]
pub fn segment_index(register: Register) -> Option<usize> {
    Some(match register {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::DS => seg::DS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => return None,
    })
}

const NO_REGISTER: u8 = 0xff;

/// How the address of the memory operand is made.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    displacement: u64,
    /// Selects the bits of the address size.
    mask: u64,
    base: u8,
    index: u8,
    scale: u8,
    pub segment: u8,
    /// 64-bit code and addresses, and a segment whose base is not used.
    flat: bool,
    /// The access is through SS: its faults are #SS.
    stack: bool,
    long: bool,
}

impl Address {
    #[must_use]
    pub fn of(instruction: &Instruction) -> Address {
        let long = instruction.code_size() == CodeSize::Code64;
        let register = |register: Register| Place::general(register).map_or(NO_REGISTER, |place| place.index);
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let bits = match (base, index) {
            (Register::RIP, _) => 64,
            (Register::EIP, _) => 32,
            (Register::None, Register::None) => match instruction.memory_displ_size() {
                2 => 16,
                8 => 64,
                _ => 32,
            },
            // A vector index (VSIB) says nothing of the address size without a base.
            (Register::None, index) if Place::general(index).is_none() => {
                if instruction.memory_displ_size() == 8 || long { 64 } else { 32 }
            }
            (Register::None, other) | (other, _) => 8 * other.size() as u32,
        };
        let prefix = instruction.segment_prefix();
        let wide = matches!(prefix, Register::FS | Register::GS);
        let stack_based = matches!(base, Register::BP | Register::EBP | Register::ESP | Register::RBP | Register::RSP);
        let segment = if long && !wide {
            if stack_based { seg::SS } else { seg::DS }
        } else {
            segment_index(instruction.memory_segment()).unwrap_or(seg::DS)
        };
        Address {
            displacement: instruction.memory_displacement64(),
            mask: u64::MAX >> (64 - bits.clamp(16, 64)),
            base: register(base),
            index: register(index),
            scale: instruction.memory_index_scale().trailing_zeros() as u8,
            segment: segment as u8,
            flat: long && !wide && bits == 64,
            stack: segment == seg::SS,
            long,
        }
    }

    #[inline(always)]
    fn sum(&self, cpu: &CpuState) -> u64 {
        let mut sum = self.displacement;
        if self.base != NO_REGISTER {
            sum = sum.wrapping_add(cpu.gpr[usize::from(self.base & 15)]);
        }
        if self.index != NO_REGISTER {
            sum = sum.wrapping_add(cpu.gpr[usize::from(self.index & 15)] << self.scale);
        }
        sum
    }

    /// The offset within the segment, of the address size.
    #[inline]
    #[must_use]
    pub fn effective(&self, cpu: &CpuState) -> u64 {
        self.sum(cpu) & self.mask
    }

    /// The linear address of an access of `size` bytes.
    #[inline(always)]
    pub fn linear(&self, core: &Core<'_>, size: usize, write: bool) -> Result<Gva, GuestFault> {
        let sum = self.sum(&core.vcpu.cpu);
        if self.flat { Ok(Gva(sum)) } else { self.through_segment(core, sum & self.mask, size, write) }
    }

    #[inline(never)]
    fn through_segment(&self, core: &Core<'_>, offset: u64, size: usize, write: bool) -> Result<Gva, GuestFault> {
        let segment = usize::from(self.segment);
        if self.long {
            let base = if segment >= seg::FS { core.vcpu.cpu.segments[segment].base } else { 0 };
            return Ok(Gva(base.wrapping_add(offset)));
        }
        legacy_linear(&core.vcpu.cpu, segment, offset, size, write)
    }

    /// As [`Address::linear`], of a place some bytes further, wrapping at the address size: where a bit string or the second
    /// part of a far pointer is.
    pub fn linear_at(&self, core: &Core<'_>, further: u64, size: usize, write: bool) -> Result<Gva, GuestFault> {
        let offset = self.sum(&core.vcpu.cpu).wrapping_add(further) & self.mask;
        if self.flat { Ok(Gva(offset)) } else { self.through_segment(core, offset, size, write) }
    }

    /// The address size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        (self.mask.count_ones() / 8) as usize
    }

    /// Turns the #GP(0) of a non-canonical address into #SS(0) when the access is through SS.
    #[cold]
    #[must_use]
    pub fn adjust(&self, fault: GuestFault) -> GuestFault {
        if self.stack { as_stack_fault(fault) } else { fault }
    }
}

/// Bits of the type field of a data or code segment, Intel SDM (2024-12) Vol. 3A 3.4.5.1.
mod segment_type {
    pub const CODE: u16 = 1 << 3;
    /// Data: expand-down. Code: conforming.
    pub const DOWN: u16 = 1 << 2;
    /// Data: writable. Code: readable.
    pub const ACCESS: u16 = 1 << 1;
}

/// The linear address of `segment:offset`, whatever the mode, with the checks of the mode.
pub fn linear(core: &Core<'_>, segment: usize, offset: u64, size: usize, write: bool) -> Result<Gva, GuestFault> {
    let cpu = &core.vcpu.cpu;
    if cpu.is_code64() {
        let base = if segment >= seg::FS { cpu.segments[segment].base } else { 0 };
        return Ok(Gva(base.wrapping_add(offset)));
    }
    legacy_linear(cpu, segment, offset, size, write)
}

/// Checks type and limit as Intel SDM (2024-12) Vol. 3A 6.3 "Limit Checking" and 6.4 "Type Checking" say.
fn legacy_linear(cpu: &CpuState, segment: usize, offset: u64, size: usize, write: bool) -> Result<Gva, GuestFault> {
    let which = &cpu.segments[segment];
    let fault = if segment == seg::SS { GuestFault::SS0 } else { GuestFault::GP0 };
    let protected = cpu.cr0 & x86::cr0::PE != 0;
    if protected && !which.is_present() {
        return Err(fault);
    }
    let attributes = which.attributes;
    let code = attributes & segment_type::CODE != 0;
    let allowed = if write {
        !code && attributes & segment_type::ACCESS != 0
    } else {
        !code || attributes & segment_type::ACCESS != 0
    };
    if protected && !allowed {
        return Err(fault);
    }
    let last = offset + size.max(1) as u64 - 1;
    let inside = if !code && attributes & segment_type::DOWN != 0 {
        let top = if which.is_big() { u64::from(u32::MAX) } else { 0xffff };
        offset > u64::from(which.limit) && last <= top
    } else {
        last <= u64::from(which.limit)
    };
    if !inside {
        return Err(fault);
    }
    Ok(Gva(which.base.wrapping_add(offset) & 0xffff_ffff))
}

/// An instruction made ready to run.
#[derive(Clone, Debug)]
pub struct Op {
    pub run: Run,
    /// RIP of the instruction.
    pub start: u64,
    /// RIP after the instruction.
    pub next: u64,
    /// The last immediate operand, sign-extended, or the target of a near branch.
    pub immediate: u64,
    pub address: Address,
    pub places: [Place; 4],
    /// Operand size in bytes where the first operand does not say it.
    pub size: u8,
    /// 64-bit code.
    pub long: bool,
    /// May change what the step loop looks at between instructions: flags beyond the arithmetic ones, mode, privilege,
    /// mappings, breakpoints.
    pub sensitive: bool,
    pub instruction: Instruction,
}

impl Op {
    /// Takes a decoded instruction apart. Its IP must be that at which it runs.
    #[must_use]
    pub fn new(instruction: &Instruction) -> Op {
        let places = [0, 1, 2, 3].map(|operand| Place::of(instruction, operand));
        let long = instruction.code_size() == CodeSize::Code64;
        let next = if long { instruction.next_ip() } else { u64::from(instruction.next_ip() as u32) };
        let mut op = Op {
            run: dispatch::invalid,
            start: instruction.ip(),
            next,
            immediate: immediate(instruction),
            address: Address::of(instruction),
            places,
            size: operand_size(instruction, &places),
            long,
            sensitive: false,
            instruction: *instruction,
        };
        dispatch::choose(&mut op);
        op
    }

    #[must_use]
    pub fn code(&self) -> Code {
        self.instruction.code()
    }

    #[must_use]
    pub fn mnemonic(&self) -> Mnemonic {
        self.instruction.mnemonic()
    }

    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.instruction.has_lock_prefix()
    }

    #[must_use]
    pub fn is_repeated(&self) -> bool {
        self.instruction.has_rep_prefix() || self.instruction.has_repne_prefix()
    }

    /// Whether the first operand is in memory.
    #[must_use]
    pub fn has_memory_destination(&self) -> bool {
        self.places[0].kind == kind::MEMORY
    }
}

fn operand_size(instruction: &Instruction, places: &[Place; 4]) -> u8 {
    let first = places[0];
    if first.kind == kind::REGISTER || (first.kind == kind::MEMORY && first.size != 0) {
        return first.size;
    }
    let pushed = instruction.stack_pointer_increment().unsigned_abs();
    if matches!(pushed, 2 | 4 | 8) { pushed as u8 } else { instruction.memory_size().size().min(255) as u8 }
}

fn immediate(instruction: &Instruction) -> u64 {
    let mut value = 0;
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                value = instruction.near_branch_target();
            }
            _ => {
                if let Ok(constant) = instruction.try_immediate(operand) {
                    value = constant;
                }
            }
        }
    }
    value
}

/// Selects the low `S` bytes.
#[must_use]
pub const fn ones<const S: usize>() -> u64 {
    u64::MAX >> (64 - 8 * S)
}

/// Reads a general register.
#[inline(always)]
#[must_use]
pub fn get<const S: usize>(core: &Core<'_>, place: Place) -> u64 {
    let whole = core.vcpu.cpu.gpr[usize::from(place.index & 15)];
    if S == 1 { whole >> (place.shift & 15) & 0xff } else { whole & ones::<S>() }
}

/// Writes a general register: 32-bit writes clear the upper half, narrower ones keep what they do not name.
#[inline(always)]
pub fn set<const S: usize>(core: &mut Core<'_>, place: Place, value: u64) {
    let whole = &mut core.vcpu.cpu.gpr[usize::from(place.index & 15)];
    *whole = match S {
        8 => value,
        4 => value & 0xffff_ffff,
        2 => *whole & !0xffff | value & 0xffff,
        _ => {
            let shift = place.shift & 15;
            *whole & !(0xff << shift) | (value & 0xff) << shift
        }
    };
}

/// Reads the memory operand.
#[inline(always)]
pub fn load_memory<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<u64, GuestFault> {
    let address = op.address.linear(core, S, false)?;
    core.read(address, S).map_err(|fault| op.address.adjust(fault))
}

/// Writes the memory operand.
#[inline(always)]
pub fn store_memory<const S: usize>(core: &mut Core<'_>, op: &Op, value: u64) -> Result<(), GuestFault> {
    let address = op.address.linear(core, S, true)?;
    core.write(address, S, value).map_err(|fault| op.address.adjust(fault))
}

/// Reads operand `N`, of kind `K`, as `S` bytes.
#[inline(always)]
pub fn load<const S: usize, const K: u8, const N: usize>(core: &mut Core<'_>, op: &Op) -> Result<u64, GuestFault> {
    let place = op.places[N];
    match if K == kind::ANY { place.kind } else { K } {
        kind::REGISTER => Ok(get::<S>(core, place)),
        kind::MEMORY => load_memory::<S>(core, op),
        _ => Ok(op.immediate & ones::<S>()),
    }
}

/// Writes operand `N`, a general register or memory.
#[inline(always)]
pub fn store<const S: usize, const K: u8, const N: usize>(
    core: &mut Core<'_>,
    op: &Op,
    value: u64,
) -> Result<(), GuestFault> {
    let place = op.places[N];
    match if K == kind::ANY { place.kind } else { K } {
        kind::REGISTER => {
            set::<S>(core, place, value);
            Ok(())
        }
        _ => store_memory::<S>(core, op, value),
    }
}

/// Replaces the first operand by what `change` makes of it, and gives back the old value; in one atomic step when the
/// instruction is LOCKed. `change` may run more than once.
#[inline(always)]
pub fn modify<const S: usize, const K: u8>(
    core: &mut Core<'_>,
    op: &Op,
    change: impl Fn(u64) -> u64,
) -> Result<u64, GuestFault> {
    let place = op.places[0];
    if (if K == kind::ANY { place.kind } else { K }) == kind::REGISTER {
        let old = get::<S>(core, place);
        set::<S>(core, place, change(old));
        return Ok(old);
    }
    let address = op.address.linear(core, S, true)?;
    let result = if op.is_locked() {
        core.update(address, S, change)
    } else {
        core.read_for_write(address, S).and_then(|old| core.write(address, S, change(old)).map(|()| old))
    };
    result.map_err(|fault| op.address.adjust(fault))
}
