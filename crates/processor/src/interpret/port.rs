//! IN and OUT. The string forms are in `string.rs`.

use x86::state::gpr::{RAX, RDX};
use x86::{GuestFault, cr0};

use super::Flow;
use super::op::{Op, get, kind, set};
use super::transfer::general;
use crate::core::Core;

/// Whether the running code may use `size` ports from `port`, by IOPL and the permission bitmap of the TSS.
pub fn check(core: &mut Core<'_>, port: u16, size: u8) -> Result<(), GuestFault> {
    core.check_port(port, size);
    let cpu = &core.vcpu.cpu;
    if cpu.cr0 & cr0::PE == 0 || u64::from(cpu.cpl()) <= cpu.rflags >> 12 & 3 {
        return Ok(());
    }
    crate::system::check_io_permission(core, port, size)
}

fn port(core: &Core<'_>, op: &Op, operand: usize) -> u16 {
    if op.places[operand].kind == kind::IMMEDIATE { op.immediate as u8 as u16 } else { core.vcpu.cpu.gpr[RDX] as u16 }
}

pub fn input<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let port = port(core, op, 1);
    check(core, port, S as u8)?;
    let value = core.outside.port_read(port, S as u8);
    set::<S>(core, general(RAX), u64::from(value));
    Ok(Flow::Next)
}

pub fn output<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let port = port(core, op, 0);
    check(core, port, S as u8)?;
    let value = get::<S>(core, general(RAX));
    core.outside.port_write(port, S as u8, value as u32);
    Ok(Flow::Next)
}
