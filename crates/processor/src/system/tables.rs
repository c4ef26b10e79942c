//! Descriptor-table registers and questions about selectors: Intel SDM (2024-12) Vol. 2, LGDT, SGDT, LLDT, LTR, SLDT,
//! STR, VERR, LAR, LSL, ARPL and LDS.

use iced_x86::{Code, Instruction, Mnemonic};
use memory::Access;
use x86::{DescriptorTable, GuestFault, Gva, rflags, seg, vector};

use super::{Outcome, not_prevented, protected, supervisor};
use crate::core::Core;
use crate::interpret::{Flow, operand};
use crate::segment::{self, Descriptor, is_null, rpl, selector_fault, system_type};

/// Types of 386 and 64-bit TSSs with S = 0, available and busy.
pub(super) const TSS_TYPES: [u16; 2] = [system_type::TSS_AVAILABLE as u16, system_type::TSS_BUSY as u16];

pub fn load_table(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    supervisor(core)?;
    let place = operand::linear_address(core, instruction)?;
    let long = core.vcpu.cpu.is_code64();
    let limit = core.read(place, 2)? as u16;
    let mut base = core.read(place.add(2), if long { 8 } else { 4 })?;
    if matches!(instruction.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0x00ff_ffff;
    }
    if long && !Gva(base).is_canonical() {
        return Err(GuestFault::GP0);
    }
    let table = DescriptorTable { base, limit };
    if instruction.mnemonic() == Mnemonic::Lgdt {
        core.vcpu.cpu.gdtr = table;
    } else {
        core.vcpu.cpu.idtr = table;
    }
    Ok(Flow::Next)
}

pub fn store_table(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    not_prevented(core)?;
    let place = operand::linear_address(core, instruction)?;
    let cpu = &core.vcpu.cpu;
    let table = if instruction.mnemonic() == Mnemonic::Sgdt { cpu.gdtr } else { cpu.idtr };
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    let size = if cpu.is_code64() { 10 } else { 6 };
    core.write_bytes(place, &image[..size])?;
    Ok(Flow::Next)
}

pub fn store_selector(core: &mut Core<'_>, instruction: &Instruction, selector: u16) -> Outcome {
    protected(core)?;
    not_prevented(core)?;
    operand::write(core, instruction, 0, u64::from(selector))?;
    Ok(Flow::Next)
}

/// The descriptor that LLDT or LTR loads, with its whole base.
fn system_descriptor(core: &mut Core<'_>, selector: u16, kinds: &[u8]) -> Result<(Descriptor, u64), GuestFault> {
    let refused = selector_fault(vector::GP, selector);
    if selector & 4 != 0 {
        return Err(refused);
    }
    let (descriptor, high) = Descriptor::fetch_system(core, selector, vector::GP)?;
    let base = descriptor.base() | high << 32;
    // Long mode: bits of a second type field must be zero, so that the upper half is no descriptor of its own.
    if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) || high >> 40 & 0x1f != 0 {
        return Err(refused);
    }
    if !descriptor.is_present() {
        return Err(selector_fault(vector::NP, selector));
    }
    if !Gva(base).is_canonical() {
        return Err(refused);
    }
    Ok((descriptor, base))
}

pub fn lldt(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    protected(core)?;
    supervisor(core)?;
    let selector = operand::read(core, instruction, 0)? as u16;
    if is_null(selector) {
        core.vcpu.cpu.ldtr = segment::null_segment(selector, 0);
        return Ok(Flow::Next);
    }
    let (descriptor, base) = system_descriptor(core, selector, &[system_type::LDT])?;
    let mut table = descriptor.segment(selector);
    table.base = base;
    core.vcpu.cpu.ldtr = table;
    Ok(Flow::Next)
}

pub fn ltr(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    protected(core)?;
    supervisor(core)?;
    let selector = operand::read(core, instruction, 0)? as u16;
    if is_null(selector) {
        return Err(GuestFault::GP0);
    }
    let kinds: &[u8] =
        if core.vcpu.cpu.is_long_mode() { &[system_type::TSS_AVAILABLE] } else { &[1, system_type::TSS_AVAILABLE] };
    let (descriptor, base) = system_descriptor(core, selector, kinds)?;
    // Marks the TSS busy.
    let access_byte = (descriptor.raw >> 40 & 0xff) | 2;
    core.write_as(descriptor.address.add(5), 1, access_byte, Access::system(true))?;
    let mut task = descriptor.segment(selector);
    task.base = base;
    task.attributes |= 2;
    core.vcpu.cpu.tr = task;
    Ok(Flow::Next)
}

/// The descriptor that VERR, VERW, LAR or LSL asks about, when the running code may see it at all.
fn visible(core: &mut Core<'_>, selector: u16) -> Result<Option<Descriptor>, GuestFault> {
    if is_null(selector) {
        return Ok(None);
    }
    let descriptor = match Descriptor::fetch(core, selector, vector::GP) {
        Ok(descriptor) => descriptor,
        Err(fault) if fault.vector == vector::PF => return Err(fault),
        // Beyond its table: the answer is no.
        Err(_) => return Ok(None),
    };
    let hidden = !descriptor.is_conforming() && descriptor.dpl() < core.vcpu.cpu.cpl().max(rpl(selector));
    Ok((!hidden).then_some(descriptor))
}

fn set_zero_flag(core: &mut Core<'_>, on: bool) {
    let flags = &mut core.vcpu.cpu.rflags;
    *flags = if on { *flags | rflags::ZF } else { *flags & !rflags::ZF };
}

pub fn verify(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    protected(core)?;
    let selector = operand::read(core, instruction, 0)? as u16;
    let for_write = instruction.mnemonic() == Mnemonic::Verw;
    let answer = visible(core, selector)?
        .is_some_and(|found| if for_write { found.is_writable_data() } else { found.is_readable() });
    set_zero_flag(core, answer);
    Ok(Flow::Next)
}

/// LAR and LSL.
pub fn load_attributes(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    protected(core)?;
    let selector = operand::read(core, instruction, 1)? as u16;
    let for_limit = instruction.mnemonic() == Mnemonic::Lsl;
    let long = core.vcpu.cpu.is_long_mode();
    // Which system descriptors answer: SDM Vol. 2A, tables of LAR and LSL.
    let answers = |kind: u8| match kind {
        2 | 9 | 11 => true,
        1 | 3 => !long,
        12 => !for_limit,
        4 | 5 => !for_limit && !long,
        _ => false,
    };
    let found = visible(core, selector)?.filter(|found| !found.is_system() || answers(found.kind()));
    if let Some(found) = found {
        let value = if for_limit { u64::from(found.limit()) } else { found.raw >> 32 & 0x00f0_ff00 };
        operand::write(core, instruction, 0, value)?;
    }
    set_zero_flag(core, found.is_some());
    Ok(Flow::Next)
}

/// ARPL exists outside 64-bit mode only.
pub fn arpl(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    protected(core)?;
    let (to, from) = (operand::read(core, instruction, 0)?, operand::read(core, instruction, 1)?);
    let raises = to & 3 < from & 3;
    if raises {
        operand::write(core, instruction, 0, to & !3 | from & 3)?;
    }
    set_zero_flag(core, raises);
    Ok(Flow::Next)
}

/// LDS, LES, LSS, LFS and LGS.
pub fn load_far_pointer(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    let register = match instruction.mnemonic() {
        Mnemonic::Les => seg::ES,
        Mnemonic::Lss => seg::SS,
        Mnemonic::Lds => seg::DS,
        Mnemonic::Lfs => seg::FS,
        _ => seg::GS,
    };
    let to = instruction.op0_register();
    let size = to.size();
    let place = operand::linear_address(core, instruction)?;
    let offset = core.read(place, size)?;
    let selector = core.read(place.add(size as u64), 2)? as u16;
    segment::load(core, register, selector)?;
    operand::write_register(&mut core.vcpu.cpu, to, offset);
    // Unlike MOV and POP, LSS loads the stack pointer too and needs no interrupt shadow.
    Ok(Flow::Next)
}
