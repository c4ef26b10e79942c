//! Debug registers: Intel SDM (2024-12) Vol. 3A 19.2 "Debug Registers" and MOV DR in Vol. 2B.

use iced_x86::Register;
use x86::{GuestFault, cr4, dr6, dr7};

use super::control::number;
use super::{Outcome, supervisor};
use crate::core::Core;
use crate::interpret::{Flow, operand};

/// Bits of DR6 that software can change: B0-B3, BD, BS, BT.
const DR6_WRITABLE: u64 = 0xf | dr6::BD | dr6::BS | dr6::BT;
/// Bits of DR7 that exist: L0-G3, LE, GE, GD, and conditions and lengths. (RTM is not offered.)
const DR7_WRITABLE: u64 = 0xffff_03ff | dr7::GD;

/// The index that a debug register's name means, after all checks. DR4 and DR5 are old names of DR6 and DR7.
fn check(core: &Core<'_>, register: Register) -> Result<usize, GuestFault> {
    let cpu = &core.vcpu.cpu;
    let index = match number(register) {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return Err(GuestFault::UD),
        4 => 6,
        5 => 7,
        index @ 0..8 => index as usize,
        _ => return Err(GuestFault::UD),
    };
    supervisor(core)?;
    if cpu.dr[7] & dr7::GD != 0 {
        return Err(GuestFault::debug(dr6::BD));
    }
    Ok(index)
}

pub fn mov_from_debug(core: &mut Core<'_>, to: Register, from: Register) -> Outcome {
    let index = check(core, from)?;
    let value = core.vcpu.cpu.dr[index];
    operand::write_register(&mut core.vcpu.cpu, to, value);
    Ok(Flow::Next)
}

pub fn mov_to_debug(core: &mut Core<'_>, to: Register, from: Register) -> Outcome {
    let index = check(core, to)?;
    let value = operand::read_register(&core.vcpu.cpu, from);
    if index >= 6 && value >> 32 != 0 {
        return Err(GuestFault::GP0);
    }
    core.vcpu.cpu.dr[index] = match index {
        6 => value & DR6_WRITABLE | dr6::FIXED,
        7 => value & DR7_WRITABLE | dr7::FIXED,
        _ => value,
    };
    // Translated code has breakpoints built in.
    core.vcpu.stale.mode = true;
    Ok(Flow::Next)
}
