//! Near branches. A target is checked before anything else changes, so that a fault is at the branch.

use x86::rflags::ZF;
use x86::state::gpr::RCX;
use x86::{GuestFault, Gva, seg};

use super::Flow;
use super::flags;
use super::op::{Op, get, kind, load, set};
use super::stack;
use super::transfer::general;
use crate::core::Core;

/// Checks a target: canonical in 64-bit code, within the code segment's limit otherwise.
#[inline]
pub fn checked(core: &Core<'_>, long: bool, target: u64) -> Result<u64, GuestFault> {
    let fine =
        if long { Gva(target).is_canonical() } else { target <= u64::from(core.vcpu.cpu.segments[seg::CS].limit) };
    if fine { Ok(target) } else { Err(GuestFault::GP0) }
}

#[inline(always)]
fn jump(core: &Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    Ok(Flow::Jump(checked(core, op.long, op.immediate)?))
}

pub fn jmp(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    jump(core, op)
}

pub fn jcc<const CC: u8>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    if flags::condition::<CC>(core.vcpu.cpu.rflags) { jump(core, op) } else { Ok(Flow::Next) }
}

/// JMP to a register's or memory's value.
pub fn jmp_indirect<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let target = load::<S, { kind::ANY }, 0>(core, op)?;
    Ok(Flow::Jump(checked(core, op.long, target)?))
}

pub fn call<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let target = checked(core, op.long, op.immediate)?;
    stack::push(core, S, op.next)?;
    Ok(Flow::Jump(target))
}

pub fn call_indirect<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let target = load::<S, { kind::ANY }, 0>(core, op)?;
    let target = checked(core, op.long, target)?;
    stack::push(core, S, op.next)?;
    Ok(Flow::Jump(target))
}

/// RET, with or without bytes to release.
pub fn ret<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let top = stack::pointer(&core.vcpu.cpu);
    let target = stack::read(core, top, S)?;
    let target = checked(core, op.long, target)?;
    stack::set_pointer(&mut core.vcpu.cpu, top.wrapping_add(S as u64).wrapping_add(op.immediate & 0xffff));
    Ok(Flow::Jump(target))
}

/// LOOP, LOOPE (`WANT` 1) and LOOPNE (`WANT` 0) with a count of `C` bytes; `WANT` 2 does not look at ZF.
pub fn loop_while<const WANT: u8, const C: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let count = get::<C>(core, general(RCX)).wrapping_sub(1);
    let zero = core.vcpu.cpu.rflags & ZF != 0;
    let rest = if C == 8 { count } else { count & ((1 << (8 * C as u32 % 64)) - 1) };
    let taken = rest != 0 && (WANT == 2 || zero == (WANT == 1));
    let flow = if taken { jump(core, op)? } else { Flow::Next };
    set::<C>(core, general(RCX), count);
    Ok(flow)
}

/// JCXZ, JECXZ, JRCXZ.
pub fn jump_if_count_zero<const C: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    if get::<C>(core, general(RCX)) == 0 { jump(core, op) } else { Ok(Flow::Next) }
}
