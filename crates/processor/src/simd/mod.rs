//! x87, MMX, SSE and AVX for the interpreter: the checks that come first, the memory operand, and the exceptions that
//! come of it are done here; the operation itself is the host's ([`crate::native`]).
//!
//! The guest's state is in `cpu.fpu` all the while. Instruction and operand pointers of the x87 (FIP, FDP, FOP) would be
//! ours, not the guest's, after an instruction ran on the host: they read as zero from then on.

mod exceptions;
pub mod features;
mod masked;
pub(crate) mod plan;

use iced_x86::{Instruction, Mnemonic as M};
use x86::registers::xcr0;
use x86::{FpuArea, GuestFault, Gva, cr0, cr4, rflags, vector};

use crate::core::Core;
use crate::engine::Exit;
use crate::interpret::{Flow, operand};
use crate::native::{self, BUFFER, Operands};
use crate::xsave;
use plan::{Class, Kind, Plan};

/// Runs `instruction` if it is one of x87, MMX, SSE, AVX or the XSAVE family.
pub fn execute(core: &mut Core<'_>, instruction: &Instruction) -> Option<Result<Flow, GuestFault>> {
    if let Some(result) = xsave::execute(core, instruction) {
        return Some(result);
    }
    match plan::find(instruction) {
        Ok(Some(plan)) => Some(run(core, instruction, &plan)),
        Ok(None) => None,
        Err(why) => Some(Ok(refused(&why))),
    }
}

fn refused(why: &std::io::Error) -> Flow {
    Flow::Exit(Exit::Unsupported(format!("the host gives no executable memory for SIMD instructions: {why}")))
}

/// Whether an unmasked x87 exception waits to be delivered.
#[must_use]
pub(crate) fn is_pending(area: &FpuArea) -> bool {
    let control = area.bytes[0];
    let status = area.bytes[2];
    status & !control & 0x3f != 0
}

/// #UD and #NM that come before anything else: Intel SDM (2024-12) Vol. 3A 14.1 and tables 15-2 and 15-3 in Vol. 1 for VEX.
fn check(core: &Core<'_>, plan: &Plan) -> Result<(), GuestFault> {
    let cpu = &core.vcpu.cpu;
    let emulated = cpu.cr0 & cr0::EM != 0;
    match plan.class {
        Class::X87 if plan.kind == Kind::Wait => {
            if cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
                return Err(GuestFault::NM);
            }
        }
        Class::X87 if emulated => return Err(GuestFault::NM),
        Class::X87 => {}
        Class::Mmx if emulated || (plan.xmm && cpu.cr4 & cr4::OSFXSR == 0) => return Err(GuestFault::UD),
        Class::Sse if emulated || cpu.cr4 & cr4::OSFXSR == 0 => return Err(GuestFault::UD),
        Class::Mmx | Class::Sse => {}
        Class::Avx => {
            let both = xcr0::SSE | xcr0::AVX;
            if cpu.cr4 & cr4::OSXSAVE == 0 || cpu.xcr0 & both != both || cpu.cr0 & cr0::PE == 0 {
                return Err(GuestFault::UD);
            }
        }
    }
    if plan.kind == Kind::Undefined {
        return Err(GuestFault::UD);
    }
    if plan.kind != Kind::Wait && cpu.cr0 & cr0::TS != 0 {
        return Err(GuestFault::NM);
    }
    if (plan.waits || plan.class == Class::Mmx) && is_pending(&cpu.fpu) {
        return Err(GuestFault::plain(vector::MF));
    }
    Ok(())
}

fn run(core: &mut Core<'_>, instruction: &Instruction, plan: &Plan) -> Result<Flow, GuestFault> {
    check(core, plan)?;
    match plan.kind {
        Kind::Wait => Ok(Flow::Next),
        Kind::Undefined => Err(GuestFault::UD),
        Kind::Native(slot) => run_native(core, instruction, plan, slot),
        Kind::MaskedLoad(slot) => masked::load(core, instruction, plan, slot),
        Kind::MaskedStore => masked::store(core, instruction, plan),
        Kind::MaskedBytes => masked::store_bytes(core, instruction, plan),
        Kind::Gather => masked::gather(core, instruction),
    }
}

/// Where the memory operand is, if there is one; alignment checked.
fn address(core: &Core<'_>, instruction: &Instruction, plan: &Plan) -> Result<Gva, GuestFault> {
    let address = if plan.writes {
        operand::linear_address_for_write(core, instruction)?
    } else {
        operand::linear_address(core, instruction)?
    };
    if address.0 & (plan.alignment - 1) != 0 {
        return Err(GuestFault::GP0);
    }
    Ok(address)
}

fn run_native(
    core: &mut Core<'_>,
    instruction: &Instruction,
    plan: &Plan,
    slot: native::Slot,
) -> Result<Flow, GuestFault> {
    let mut operands = Operands::new();
    let mut place = Gva(0);
    if plan.size > 0 {
        place = address(core, instruction, plan)?;
        if plan.reads {
            let buffer = &mut operands.memory[..plan.size];
            core.read_bytes(place, buffer).map_err(|fault| operand::stack_fault(instruction, fault))?;
        } else {
            operands.memory.fill(exceptions::UNTOUCHED);
        }
    }
    let cpu = &core.vcpu.cpu;
    let register = plan.register.full_register().number() & 15;
    operands.register = cpu.gpr[register];
    operands.implicit = [cpu.gpr[0], cpu.gpr[1], cpu.gpr[2]];
    operands.rflags = rflags::FIXED | cpu.rflags & rflags::ARITHMETIC;
    let mut area = cpu.fpu.clone();
    let done = exceptions::run(core, plan, slot, &mut area, &mut operands)?;
    if !done {
        // The slot was overtaken by a new arena: the next attempt makes it again.
        return Ok(Flow::Jump(core.vcpu.cpu.rip));
    }
    let stores = plan.writes && plan.size > 0 && !exceptions::is_suppressed(plan, &core.vcpu.cpu.fpu, &area, &operands);
    if stores && let Err(fault) = write(core, place, &operands.memory[..plan.size.min(BUFFER)]) {
        // Seen on the processor: VCVTPS2PH has set its flags before the store faults, and an MMX store the top of stack, but
        // not the tags.
        exceptions::keep_flags(&mut core.vcpu.cpu.fpu, &area);
        if plan.class == Class::Mmx {
            masked::reset_top(&mut core.vcpu.cpu.fpu);
        }
        return Err(operand::stack_fault(instruction, fault));
    }
    let cpu = &mut core.vcpu.cpu;
    if plan.class == Class::X87 && !matches!(instruction.mnemonic(), M::Fldenv | M::Frstor) {
        hide_pointers(&cpu.fpu, &mut area);
    }
    cpu.fpu = area;
    if plan.register_written {
        cpu.gpr[register] = operands.register;
    }
    if plan.implicit {
        cpu.gpr[..3].copy_from_slice(&operands.implicit);
    }
    if plan.flags {
        cpu.rflags = cpu.rflags & !rflags::ARITHMETIC | operands.rflags & rflags::ARITHMETIC;
    }
    Ok(Flow::Next)
}

/// All bytes or, with a fault, none.
fn write(core: &mut Core<'_>, address: Gva, data: &[u8]) -> Result<(), GuestFault> {
    match *data {
        [a] => core.write(address, 1, u64::from(a)),
        [a, b] => core.write(address, 2, u64::from(u16::from_le_bytes([a, b]))),
        [a, b, c, d] => core.write(address, 4, u64::from(u32::from_le_bytes([a, b, c, d]))),
        [a, b, c, d, e, f, g, h] => core.write(address, 8, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ => core.write_bytes(address, data),
    }
}

/// FOP, FIP and FDP in the legacy area.
const POINTERS: std::ops::Range<usize> = 6..24;

/// After an x87 instruction: the pointers are the guest's old ones if it did not set them, else zero. (FLDENV and FRSTOR
/// set them to values of the guest.)
fn hide_pointers(before: &FpuArea, after: &mut FpuArea) {
    if before.bytes[POINTERS] != after.bytes[POINTERS] {
        after.bytes[POINTERS].fill(0);
    }
}

#[cfg(test)]
mod tests;
