//! Memory operands of which only some elements are touched: masked moves and gathers. An element that the mask leaves
//! out cannot fault: Intel SDM (2024-12) Vol. 2 "VMASKMOV", "MASKMOVDQU", "VPGATHERDD/VPGATHERDQ".

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};
use x86::{FpuArea, GuestFault, Gva, seg};

use super::exceptions;
use super::plan::Plan;
use crate::core::Core;
use crate::interpret::{Flow, operand};
use crate::native::{Operands, Slot};

/// The 32 bytes of a vector register; of an XMM register, too.
fn vector(area: &FpuArea, register: Register) -> [u8; 32] {
    let n = register.number() & 15;
    let mut value = [0; 32];
    value[..16].copy_from_slice(&area.bytes[FpuArea::XMM + 16 * n..][..16]);
    value[16..].copy_from_slice(&area.bytes[FpuArea::YMM_HIGH + 16 * n..][..16]);
    value
}

fn set_vector(area: &mut FpuArea, register: Register, value: &[u8; 32]) {
    let n = register.number() & 15;
    area.bytes[FpuArea::XMM + 16 * n..][..16].copy_from_slice(&value[..16]);
    area.bytes[FpuArea::YMM_HIGH + 16 * n..][..16].copy_from_slice(&value[16..]);
}

fn element_size(instruction: &Instruction) -> usize {
    match instruction.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        _ => 8,
    }
}

/// The elements of `size` bytes whose mask has its sign bit set, as offsets.
fn chosen(mask: [u8; 32], size: usize, total: usize) -> impl Iterator<Item = usize> {
    (0..total).step_by(size).filter(move |offset| mask[offset + size - 1] & 0x80 != 0)
}

pub(super) fn load(
    core: &mut Core<'_>,
    instruction: &Instruction,
    plan: &Plan,
    slot: Slot,
) -> Result<Flow, GuestFault> {
    let address = operand::linear_address(core, instruction)?;
    let size = element_size(instruction);
    let mask = vector(&core.vcpu.cpu.fpu, instruction.op1_register());
    let mut operands = Operands::new();
    for offset in chosen(mask, size, plan.size) {
        let value =
            core.read(address.add(offset as u64), size).map_err(|fault| operand::stack_fault(instruction, fault))?;
        operands.memory[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    let mut area = core.vcpu.cpu.fpu.clone();
    if !exceptions::run(core, plan, slot, &mut area, &mut operands)? {
        return Ok(Flow::Jump(core.vcpu.cpu.rip));
    }
    core.vcpu.cpu.fpu = area;
    Ok(Flow::Next)
}

pub(super) fn store(core: &mut Core<'_>, instruction: &Instruction, plan: &Plan) -> Result<Flow, GuestFault> {
    let address = operand::linear_address_for_write(core, instruction)?;
    let size = element_size(instruction);
    let mask = vector(&core.vcpu.cpu.fpu, instruction.op1_register());
    let value = vector(&core.vcpu.cpu.fpu, instruction.op2_register());
    let fault = |fault| operand::stack_fault(instruction, fault);
    for offset in chosen(mask, size, plan.size) {
        core.probe(address.add(offset as u64), size, true).map_err(fault)?;
    }
    for offset in chosen(mask, size, plan.size) {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&value[offset..offset + size]);
        core.write(address.add(offset as u64), size, u64::from_le_bytes(bytes)).map_err(fault)?;
    }
    Ok(Flow::Next)
}

/// MASKMOVDQU and MASKMOVQ: to DS:(R|E)DI or another segment.
pub(super) fn store_bytes(core: &mut Core<'_>, instruction: &Instruction, plan: &Plan) -> Result<Flow, GuestFault> {
    let mmx = instruction.mnemonic() == M::Maskmovq;
    let read = |area: &FpuArea, register: Register| {
        if !mmx {
            return vector(area, register);
        }
        // MMn is the low part of the n-th physical x87 register, which the area holds by distance from the top of stack.
        let top = usize::from(area.bytes[3] >> 3 & 7);
        let st = (register.number() & 7).wrapping_sub(top) & 7;
        let mut value = [0; 32];
        value[..8].copy_from_slice(&area.bytes[32 + 16 * st..][..8]);
        value
    };
    let value = read(&core.vcpu.cpu.fpu, instruction.op1_register());
    let mask = read(&core.vcpu.cpu.fpu, instruction.op2_register());
    let total = if mmx { 8 } else { 16 };
    let offset = core.vcpu.cpu.gpr[7];
    let (wrap, segment) = match instruction.op0_kind() {
        OpKind::MemorySegDI => (0xffff, operand::string_segment(instruction)),
        OpKind::MemorySegEDI => (0xffff_ffff, operand::string_segment(instruction)),
        _ => (u64::MAX, operand::string_segment(instruction)),
    };
    let fault = |fault| if segment == seg::SS { crate::core::as_stack_fault(fault) } else { fault };
    let mut places = [None; 16];
    for at in chosen(mask, 1, total) {
        let address = operand::linear(core, segment, offset.wrapping_add(at as u64) & wrap, 1, true)?;
        core.probe(address, 1, true).map_err(fault)?;
        places[at] = Some(address);
    }
    for (at, place) in places.iter().enumerate() {
        if let Some(address) = place {
            core.write(*address, 1, u64::from(value[at])).map_err(fault)?;
        }
    }
    if plan.class == super::plan::Class::Mmx {
        enter_mmx(&mut core.vcpu.cpu.fpu);
    }
    Ok(Flow::Next)
}

/// What every MMX instruction but EMMS does to the x87: top of stack 0, all registers valid (SDM Vol. 1 9.5.1).
pub(super) fn enter_mmx(area: &mut FpuArea) {
    reset_top(area);
    area.bytes[4] = 0xff;
}

pub(super) fn reset_top(area: &mut FpuArea) {
    let top = usize::from(area.bytes[3] >> 3 & 7);
    // The area's registers count from the top of stack, which moves.
    area.bytes[32..160].rotate_right(16 * top);
    area.bytes[3] &= !0x38;
}

/// Whether the x87 is as [`enter_mmx`] leaves it.
pub(super) fn is_mmx(area: &FpuArea) -> bool {
    area.bytes[3] & 0x38 == 0 && area.bytes[4] == 0xff
}

/// Bytes of (an index, an element) of a gather.
fn gather_sizes(mnemonic: M) -> (usize, usize) {
    match mnemonic {
        M::Vpgatherdd | M::Vgatherdps => (4, 4),
        M::Vpgatherdq | M::Vgatherdpd => (4, 8),
        M::Vpgatherqd | M::Vgatherqps => (8, 4),
        _ => (8, 8),
    }
}

fn word(bytes: &[u8; 32], offset: usize, size: usize) -> u64 {
    let mut value = [0; 8];
    value[..size].copy_from_slice(&bytes[offset..offset + size]);
    u64::from_le_bytes(value)
}

pub(super) fn gather(core: &mut Core<'_>, instruction: &Instruction) -> Result<Flow, GuestFault> {
    let (target, mask_register) = (instruction.op0_register(), instruction.op2_register());
    let index_register = instruction.memory_index();
    let numbers = [target.number(), mask_register.number(), index_register.number()];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(GuestFault::UD);
    }
    let (index_size, size) = gather_sizes(instruction.mnemonic());
    let capacity = |register: Register, size: usize| register.size() / size;
    let count = capacity(index_register, index_size).min(capacity(target, size));
    let indexes = vector(&core.vcpu.cpu.fpu, index_register);
    let base_register = instruction.memory_base();
    let base = operand::read_register(&core.vcpu.cpu, base_register);
    let narrow = base_register.size() == 4 || (base_register == Register::None && instruction.memory_displ_size() == 4);
    let narrow = narrow || !core.vcpu.cpu.is_code64();
    let segment = segment(instruction);
    for element in 0..count {
        let mut mask = vector(&core.vcpu.cpu.fpu, mask_register);
        let offset = element * size;
        if mask[offset + size - 1] & 0x80 != 0 {
            let index = word(&indexes, element * index_size, index_size);
            let index = if index_size == 4 { index as i32 as i64 as u64 } else { index };
            let scaled = index.wrapping_mul(u64::from(instruction.memory_index_scale()));
            let sum = base.wrapping_add(scaled).wrapping_add(instruction.memory_displacement64());
            let effective = if narrow { sum & 0xffff_ffff } else { sum };
            let address: Gva = operand::linear(core, segment, effective, size, false)?;
            let fault = |f| if segment == seg::SS { crate::core::as_stack_fault(f) } else { f };
            let value = core.read(address, size).map_err(fault)?;
            // A fault at a later element finds this one done: the instruction then goes on from there.
            let mut result = vector(&core.vcpu.cpu.fpu, target);
            result[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
            set_vector(&mut core.vcpu.cpu.fpu, target, &result);
            mask[offset..offset + size].fill(0);
            set_vector(&mut core.vcpu.cpu.fpu, mask_register, &mask);
        }
    }
    let mut result = vector(&core.vcpu.cpu.fpu, target);
    result[count * size..].fill(0);
    set_vector(&mut core.vcpu.cpu.fpu, target, &result);
    set_vector(&mut core.vcpu.cpu.fpu, mask_register, &[0; 32]);
    Ok(Flow::Next)
}

fn segment(instruction: &Instruction) -> usize {
    match instruction.memory_segment() {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}
