//! Pushes and pops, frames, and flags on the stack. [`push`] and [`pop`] serve the other modules, too.

use x86::rflags::{AC, ARITHMETIC, CF, DF, FIXED, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM};
use x86::state::gpr::{RBP, RSP};
use x86::{CpuState, GuestFault, Gva, seg};

use super::Flow;
use super::op::{self, Op, get, kind, load, set, store};
use super::transfer::general;
use crate::core::{Core, as_stack_fault};

/// Selects the bits of the stack pointer that the mode uses.
#[must_use]
pub fn pointer_mask(cpu: &CpuState) -> u64 {
    if cpu.is_code64() {
        u64::MAX
    } else if cpu.segments[seg::SS].is_big() {
        0xffff_ffff
    } else {
        0xffff
    }
}

/// The stack pointer, cut to the bits that the mode uses.
#[inline]
#[must_use]
pub fn pointer(cpu: &CpuState) -> u64 {
    cpu.gpr[RSP] & pointer_mask(cpu)
}

/// Sets the bits of the stack pointer that the mode uses. In 32-bit modes the upper half becomes zero.
#[inline]
pub fn set_pointer(cpu: &mut CpuState, value: u64) {
    let mask = pointer_mask(cpu);
    cpu.gpr[RSP] = if mask == 0xffff { cpu.gpr[RSP] & !mask | value & mask } else { value & mask };
}

/// Where `size` bytes at `offset` of the stack segment are.
#[inline]
fn address(core: &Core<'_>, offset: u64, size: usize, write: bool) -> Result<Gva, GuestFault> {
    if core.vcpu.cpu.is_code64() { Ok(Gva(offset)) } else { op::linear(core, seg::SS, offset, size, write) }
}

/// Writes at an offset of the stack segment.
#[inline]
pub fn write(core: &mut Core<'_>, offset: u64, size: usize, value: u64) -> Result<(), GuestFault> {
    let at = address(core, offset, size, true)?;
    core.write(at, size, value).map_err(as_stack_fault)
}

/// Reads at an offset of the stack segment.
#[inline]
pub fn read(core: &mut Core<'_>, offset: u64, size: usize) -> Result<u64, GuestFault> {
    let at = address(core, offset, size, false)?;
    core.read(at, size).map_err(as_stack_fault)
}

/// Pushes 2, 4 or 8 bytes.
#[inline]
pub fn push(core: &mut Core<'_>, size: usize, value: u64) -> Result<(), GuestFault> {
    let top = pointer(&core.vcpu.cpu).wrapping_sub(size as u64) & pointer_mask(&core.vcpu.cpu);
    write(core, top, size, value)?;
    set_pointer(&mut core.vcpu.cpu, top);
    Ok(())
}

/// Pops 2, 4 or 8 bytes.
#[inline]
pub fn pop(core: &mut Core<'_>, size: usize) -> Result<u64, GuestFault> {
    let top = pointer(&core.vcpu.cpu);
    let value = read(core, top, size)?;
    set_pointer(&mut core.vcpu.cpu, top.wrapping_add(size as u64));
    Ok(value)
}

/// PUSH of a register, memory or immediate.
pub fn push_operand<const S: usize, const K: u8>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, K, 0>(core, op)?;
    push(core, S, value)?;
    Ok(Flow::Next)
}

/// PUSH of a segment register. With 32-bit operands Intel cores write 16 bits and leave the upper two bytes of the slot.
pub fn push_segment<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let selector = u64::from(core.vcpu.cpu.segments[usize::from(op.places[0].index)].selector);
    let top = pointer(&core.vcpu.cpu).wrapping_sub(S as u64) & pointer_mask(&core.vcpu.cpu);
    write(core, top, if S == 4 { 2 } else { S }, selector)?;
    set_pointer(&mut core.vcpu.cpu, top);
    Ok(Flow::Next)
}

/// POP into a register or memory. An address that uses the stack pointer uses the one after the pop.
pub fn pop_operand<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let before = core.vcpu.cpu.gpr[RSP];
    let value = pop(core, S)?;
    let result = store::<S, { kind::ANY }, 0>(core, op, value);
    if result.is_err() {
        core.vcpu.cpu.gpr[RSP] = before;
    }
    result.map(|()| Flow::Next)
}

/// PUSHA: eight registers, with the stack pointer as it was.
pub fn push_all<const S: usize>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let mask = pointer_mask(&core.vcpu.cpu);
    let top = pointer(&core.vcpu.cpu);
    let bottom = top.wrapping_sub(8 * S as u64) & mask;
    for offset in [bottom, top.wrapping_sub(S as u64) & mask] {
        let at = address(core, offset, S, true)?;
        core.probe(at, S, true)?;
    }
    for index in 0..8 {
        let at = top.wrapping_sub((index as u64 + 1) * S as u64) & mask;
        let value = get::<S>(core, general(index));
        write(core, at, S, value)?;
    }
    set_pointer(&mut core.vcpu.cpu, bottom);
    Ok(Flow::Next)
}

/// POPA: the stack pointer's slot is skipped.
pub fn pop_all<const S: usize>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let mask = pointer_mask(&core.vcpu.cpu);
    let top = pointer(&core.vcpu.cpu);
    let mut values = [0; 8];
    for (index, value) in values.iter_mut().rev().enumerate() {
        *value = read(core, top.wrapping_add((index * S) as u64) & mask, S)?;
    }
    for (index, value) in values.into_iter().enumerate() {
        if index != RSP {
            set::<S>(core, general(index), value);
        }
    }
    set_pointer(&mut core.vcpu.cpu, top.wrapping_add(8 * S as u64));
    Ok(Flow::Next)
}

/// ENTER: Intel SDM (2024-12) Vol. 2A "ENTER".
pub fn enter<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let mask = pointer_mask(&core.vcpu.cpu);
    let room = u64::from(op.instruction.immediate16());
    let level = u64::from(op.instruction.immediate8_2nd() & 31);
    let size = S as u64;
    let old_frame = get::<S>(core, general(RBP));
    let mut top = pointer(&core.vcpu.cpu).wrapping_sub(size) & mask;
    let frame = top;
    // Memory below the stack pointer is nobody's, so writing it before a later fault changes nothing that counts.
    write(core, top, S, old_frame)?;
    if level > 0 {
        let mut outer = core.vcpu.cpu.gpr[RBP];
        for _ in 1..level {
            outer = outer.wrapping_sub(size);
            let value = read(core, outer & mask, S)?;
            top = top.wrapping_sub(size) & mask;
            write(core, top, S, value)?;
        }
        top = top.wrapping_sub(size) & mask;
        write(core, top, S, frame)?;
    }
    top = top.wrapping_sub(room) & mask;
    let end = address(core, top, S, true)?;
    core.probe(end, S, true).map_err(as_stack_fault)?;
    set::<S>(core, general(RBP), frame);
    set_pointer(&mut core.vcpu.cpu, top);
    Ok(Flow::Next)
}

/// LEAVE.
pub fn leave<const S: usize>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let frame = core.vcpu.cpu.gpr[RBP] & pointer_mask(&core.vcpu.cpu);
    let value = read(core, frame, S)?;
    set_pointer(&mut core.vcpu.cpu, frame.wrapping_add(S as u64));
    set::<S>(core, general(RBP), value);
    Ok(Flow::Next)
}

/// PUSHF: RF and VM read as zero.
pub fn push_flags<const S: usize>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let value = core.vcpu.cpu.rflags & !(RF | VM) | FIXED;
    push(core, S, value)?;
    Ok(Flow::Next)
}

/// POPF: IOPL changes at CPL 0 only, IF only when CPL is at most IOPL, silently; RF becomes zero, VM, VIF and VIP stay.
/// Intel SDM (2024-12) Vol. 2B "POPF", table 4-16.
pub fn pop_flags<const S: usize>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let value = pop(core, S)?;
    let cpu = &mut core.vcpu.cpu;
    let mut writable = ARITHMETIC | TF | DF | NT;
    if S != 2 {
        writable |= AC | ID | RF;
    }
    if cpu.cpl() == 0 {
        writable |= IOPL;
    }
    if u64::from(cpu.cpl()) <= cpu.rflags >> 12 & 3 {
        writable |= IF;
    }
    debug_assert_eq!(writable & (VM | VIF | VIP), 0);
    cpu.rflags = cpu.rflags & !writable | value & writable & !RF | FIXED;
    Ok(Flow::Next)
}

/// SALC, an undocumented byte that 32-bit code may meet: AL becomes all of CF.
pub fn set_al_from_carry(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let value = 0_u64.wrapping_sub(core.vcpu.cpu.rflags & CF);
    set::<1>(core, general(0), value);
    Ok(Flow::Next)
}
