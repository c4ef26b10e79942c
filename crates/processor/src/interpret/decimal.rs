//! Decimal adjustments, in 16- and 32-bit code only: Intel SDM (2024-12) Vol. 2A "AAA" to "AAS", "DAA", "DAS".

use x86::GuestFault;
use x86::rflags::{AF, CF};
use x86::state::gpr::RAX;

use super::Flow;
use super::flags::{self, when};
use super::op::{Op, set};
use super::transfer::general;
use crate::core::Core;

/// DAA, and DAS when `SUBTRACT`.
pub fn adjust_packed<const SUBTRACT: bool>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let old = core.vcpu.cpu.gpr[RAX] as u8;
    let rflags = core.vcpu.cpu.rflags;
    let apply = |value: u8, by: u8| if SUBTRACT { value.overflowing_sub(by) } else { value.overflowing_add(by) };
    let (mut al, mut carry, mut half) = (old, false, false);
    if old & 0xf > 9 || rflags & AF != 0 {
        let out;
        (al, out) = apply(al, 6);
        carry = SUBTRACT && (rflags & CF != 0 || out);
        half = true;
    }
    if old > 0x99 || rflags & CF != 0 {
        al = apply(al, 0x60).0;
        carry = true;
    }
    set::<1>(core, general(RAX), u64::from(al));
    flags::set(core, flags::result::<1>(u64::from(al)) | when(half, AF) | when(carry, CF));
    Ok(Flow::Next)
}

/// AAA, and AAS when `SUBTRACT`.
pub fn adjust_unpacked<const SUBTRACT: bool>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let mut ax = core.vcpu.cpu.gpr[RAX] as u16;
    let adjust = ax & 0xf > 9 || core.vcpu.cpu.rflags & AF != 0;
    if adjust {
        ax = if SUBTRACT { ax.wrapping_sub(0x106) } else { ax.wrapping_add(0x106) };
    }
    ax &= 0xff0f;
    set::<2>(core, general(RAX), u64::from(ax));
    let rest = flags::result::<1>(u64::from(ax & 0xff));
    flags::set(core, rest | when(adjust, AF | CF));
    Ok(Flow::Next)
}

/// AAM: #DE for base 0.
pub fn split(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let base = op.immediate as u8;
    let al = core.vcpu.cpu.gpr[RAX] as u8;
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(GuestFault::DE);
    };
    set::<2>(core, general(RAX), u64::from(high) << 8 | u64::from(low));
    flags::set(core, flags::result::<1>(u64::from(low)));
    Ok(Flow::Next)
}

/// AAD.
pub fn join(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let ax = core.vcpu.cpu.gpr[RAX];
    let al = (ax & 0xff).wrapping_add((ax >> 8 & 0xff).wrapping_mul(op.immediate & 0xff)) & 0xff;
    set::<2>(core, general(RAX), al);
    flags::set(core, flags::result::<1>(al));
    Ok(Flow::Next)
}
