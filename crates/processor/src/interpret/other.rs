//! Instructions that other modules implement, and the few that fit nowhere else.

use iced_x86::{Mnemonic, OpKind};
use x86::GuestFault;
use x86::rflags::CF;

use super::Flow;
use super::flags;
use super::op::{Op, get, set};
use crate::core::Core;
use crate::{simd, system};

/// Whether the instruction works on vector or x87 registers, so that it cannot change mode, mappings or privilege.
#[must_use]
pub fn is_simd(op: &Op) -> bool {
    (0..op.instruction.op_count()).any(|operand| {
        op.instruction.op_kind(operand) == OpKind::Register && {
            let register = op.instruction.op_register(operand);
            register.is_vector_register() || register.is_mm() || register.is_st()
        }
    })
}

/// Asks the modules whose instruction it may be.
pub fn run(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let instruction = &op.instruction;
    let outcome = if op.sensitive {
        system::execute(core, instruction).or_else(|| simd::execute(core, instruction))
    } else {
        simd::execute(core, instruction)
    };
    outcome.unwrap_or(Err(GuestFault::UD))
}

/// RDRAND and RDSEED: the host's randomness, so that they never run dry.
pub fn random<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let mut bytes = [0; 8];
    let filled = host::random::fill(&mut bytes);
    let value = if filled { u64::from_le_bytes(bytes) } else { 0 };
    set::<S>(core, op.places[0], value);
    flags::set(core, flags::when(filled, CF));
    Ok(Flow::Next)
}

/// The random instructions exist when CPUID says so, which is when the host has them.
#[must_use]
pub fn is_offered(mnemonic: Mnemonic) -> bool {
    match mnemonic {
        Mnemonic::Rdrand => std::arch::is_x86_feature_detected!("rdrand"),
        Mnemonic::Rdseed => std::arch::is_x86_feature_detected!("rdseed"),
        _ => true,
    }
}

/// POP into a segment register, which loads it as MOV does. The pop is undone when the load faults.
pub fn pop_segment<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    use x86::seg;
    use x86::state::gpr::RSP;
    let before = core.vcpu.cpu.gpr[RSP];
    let top = super::stack::pointer(&core.vcpu.cpu);
    // Only the selector is read: Intel SDM (2024-12) Vol. 2B "POP".
    let selector = super::stack::read(core, top, S)? as u16;
    super::stack::set_pointer(&mut core.vcpu.cpu, top.wrapping_add(S as u64));
    let after = core.vcpu.cpu.gpr[RSP];
    core.vcpu.cpu.gpr[RSP] = before;
    let register = usize::from(op.places[0].index);
    crate::segment::load(core, register, selector)?;
    core.vcpu.cpu.gpr[RSP] = after;
    if register == seg::SS {
        core.vcpu.cpu.interrupt_shadow = true;
    }
    Ok(Flow::Next)
}

/// MOVDIRI: a plain store here.
pub fn store_direct<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = get::<S>(core, op.places[1]);
    super::op::store_memory::<S>(core, op, value)?;
    Ok(Flow::Next)
}
