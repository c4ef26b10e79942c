//! Operands of an instruction as the decoder gives it: for the modules whose handlers take the decoder's instruction.

use iced_x86::{Instruction, OpKind, Register};
use x86::{CpuState, GuestFault, Gva, seg};

use super::op::{self, Address, Place, segment_index};
use crate::core::Core;

/// The linear address of the memory operand; faults of segments are found here, others when it is used.
pub fn linear_address(core: &Core<'_>, instruction: &Instruction) -> Result<Gva, GuestFault> {
    Address::of(instruction).linear(core, instruction.memory_size().size(), false)
}

/// As [`linear_address`], for a store.
pub fn linear_address_for_write(core: &Core<'_>, instruction: &Instruction) -> Result<Gva, GuestFault> {
    Address::of(instruction).linear(core, instruction.memory_size().size(), true)
}

/// Whether the memory operand is through SS, so that #GP(0) of its address is #SS(0) instead.
#[must_use]
pub fn stack_fault(instruction: &Instruction, fault: GuestFault) -> GuestFault {
    Address::of(instruction).adjust(fault)
}

/// Size in bytes of a register or memory operand; 0 for others.
#[must_use]
pub fn size(instruction: &Instruction, operand: u32) -> usize {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        OpKind::Memory => instruction.memory_size().size(),
        _ => 0,
    }
}

/// Reads an operand: a general or segment register, memory of 1, 2, 4 or 8 bytes, or an immediate.
pub fn read(core: &mut Core<'_>, instruction: &Instruction, operand: u32) -> Result<u64, GuestFault> {
    match instruction.op_kind(operand) {
        OpKind::Register => Ok(read_register(&core.vcpu.cpu, instruction.op_register(operand))),
        OpKind::Memory => {
            let size = instruction.memory_size().size();
            let address = linear_address(core, instruction)?;
            match size {
                1 | 2 | 4 | 8 => core.read(address, size).map_err(|fault| stack_fault(instruction, fault)),
                _ => Err(GuestFault::UD),
            }
        }
        _ => Ok(instruction.try_immediate(operand).unwrap_or(0)),
    }
}

/// Writes an operand: a general register, or memory of 1, 2, 4 or 8 bytes.
pub fn write(core: &mut Core<'_>, instruction: &Instruction, operand: u32, value: u64) -> Result<(), GuestFault> {
    match instruction.op_kind(operand) {
        OpKind::Register => {
            write_register(&mut core.vcpu.cpu, instruction.op_register(operand), value);
            Ok(())
        }
        OpKind::Memory => {
            let size = instruction.memory_size().size();
            let address = linear_address_for_write(core, instruction)?;
            match size {
                1 | 2 | 4 | 8 => core.write(address, size, value).map_err(|fault| stack_fault(instruction, fault)),
                _ => Err(GuestFault::UD),
            }
        }
        _ => Err(GuestFault::UD),
    }
}

/// Reads a general register, or a segment register's selector; 0 for any other.
#[must_use]
pub fn read_register(cpu: &CpuState, register: Register) -> u64 {
    if let Some(place) = Place::general(register) {
        let value = cpu.gpr[usize::from(place.index & 15)] >> place.shift;
        return value & u64::MAX >> (64 - 8 * u32::from(place.size));
    }
    segment_index(register).map_or(0, |index| u64::from(cpu.segments[index].selector))
}

/// Writes a general register: 32-bit writes clear the upper half, narrower ones keep what they do not name.
pub fn write_register(cpu: &mut CpuState, register: Register, value: u64) {
    let Some(place) = Place::general(register) else { return };
    let whole = &mut cpu.gpr[usize::from(place.index & 15)];
    *whole = match place.size {
        8 => value,
        4 => value & 0xffff_ffff,
        2 => *whole & !0xffff | value & 0xffff,
        _ => *whole & !(0xff << place.shift) | (value & 0xff) << place.shift,
    };
}

/// The address size in bytes of a string instruction.
#[must_use]
pub fn string_address_size(instruction: &Instruction) -> usize {
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => return 4,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => return 8,
            _ => {}
        }
    }
    8
}

/// The segment of the source of a string instruction. In 64-bit code prefixes other than FS and GS do not count.
#[must_use]
pub fn string_segment(instruction: &Instruction) -> usize {
    segment_index(instruction.segment_prefix()).unwrap_or(seg::DS)
}

/// The linear address of `segment:offset`, with the checks of the mode, for an access of `size` bytes.
pub fn linear(core: &Core<'_>, segment: usize, offset: u64, size: usize, write: bool) -> Result<Gva, GuestFault> {
    op::linear(core, segment, offset, size, write)
}
