//! Fast system calls and the bases of FS and GS: Intel SDM (2024-12) Vol. 2, SYSCALL, SYSRET, SYSENTER, SYSEXIT,
//! SWAPGS, RDFSBASE and WRFSBASE.

use iced_x86::{Instruction, Register};
use x86::state::gpr;
use x86::{GuestFault, Gva, Segment, cr0, cr4, efer, rflags, seg};

use super::{Outcome, long_code, supervisor};
use crate::core::Core;
use crate::far::next_rip;
use crate::interpret::{Flow, operand};
use crate::segment;

/// RFLAGS that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

fn set_segments(core: &mut Core<'_>, code: Segment, stack: Segment) {
    segment::set_code(core, code);
    core.vcpu.cpu.segments[seg::SS] = stack;
}

pub fn syscall(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    let next = next_rip(core, instruction);
    let cpu = &mut core.vcpu.cpu;
    // On Intel processors SYSCALL exists in 64-bit mode only.
    if !cpu.is_code64() || cpu.efer & efer::SCE == 0 {
        return Err(GuestFault::UD);
    }
    cpu.gpr[gpr::RCX] = next;
    cpu.gpr[gpr::R11] = cpu.rflags & !rflags::RF;
    cpu.rflags = cpu.rflags & !(cpu.sfmask | rflags::RF) | rflags::FIXED;
    cpu.rip = cpu.lstar;
    let selector = (cpu.star >> 32) as u16;
    set_segments(core, Segment::flat_code64(selector & !3, 0), Segment::flat_data((selector & !3).wrapping_add(8), 0));
    Ok(Flow::Done)
}

pub fn sysret(core: &mut Core<'_>, to_long: bool) -> Outcome {
    let cpu = &mut core.vcpu.cpu;
    if !cpu.is_code64() || cpu.efer & efer::SCE == 0 {
        return Err(GuestFault::UD);
    }
    let target = cpu.gpr[gpr::RCX];
    if cpu.cpl() != 0 || (to_long && !Gva(target).is_canonical()) {
        return Err(GuestFault::GP0);
    }
    cpu.rflags = cpu.gpr[gpr::R11] & SYSRET_FLAGS | rflags::FIXED;
    let selector = (cpu.star >> 48) as u16;
    let stack = Segment::flat_data(selector.wrapping_add(8) | 3, 3);
    if to_long {
        cpu.rip = target;
        set_segments(core, Segment::flat_code64(selector.wrapping_add(16) | 3, 3), stack);
    } else {
        cpu.rip = target & 0xffff_ffff;
        set_segments(core, Segment::flat_code32(selector | 3, 3), stack);
    }
    Ok(Flow::Done)
}

pub fn sysenter(core: &mut Core<'_>) -> Outcome {
    let cpu = &mut core.vcpu.cpu;
    let selector = cpu.sysenter_cs as u16 & !3;
    if cpu.cr0 & cr0::PE == 0 || selector == 0 {
        return Err(GuestFault::GP0);
    }
    cpu.rflags &= !(rflags::VM | rflags::IF);
    let long = cpu.is_long_mode();
    let width = if long { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[gpr::RSP] = cpu.sysenter_esp & width;
    cpu.rip = cpu.sysenter_eip & width;
    let code = if long { Segment::flat_code64(selector, 0) } else { Segment::flat_code32(selector, 0) };
    set_segments(core, code, Segment::flat_data(selector.wrapping_add(8), 0));
    Ok(Flow::Done)
}

pub fn sysexit(core: &mut Core<'_>, to_long: bool) -> Outcome {
    let cpu = &mut core.vcpu.cpu;
    let selector = cpu.sysenter_cs as u16 & !3;
    if cpu.cr0 & cr0::PE == 0 || selector == 0 || cpu.cpl() != 0 {
        return Err(GuestFault::GP0);
    }
    let (rip, rsp) = (cpu.gpr[gpr::RDX], cpu.gpr[gpr::RCX]);
    if to_long {
        if !Gva(rip).is_canonical() || !Gva(rsp).is_canonical() {
            return Err(GuestFault::GP0);
        }
        (cpu.rip, cpu.gpr[gpr::RSP]) = (rip, rsp);
        let code = Segment::flat_code64(selector.wrapping_add(32) | 3, 3);
        set_segments(core, code, Segment::flat_data(selector.wrapping_add(40) | 3, 3));
    } else {
        (cpu.rip, cpu.gpr[gpr::RSP]) = (rip & 0xffff_ffff, rsp & 0xffff_ffff);
        let code = Segment::flat_code32(selector.wrapping_add(16) | 3, 3);
        set_segments(core, code, Segment::flat_data(selector.wrapping_add(24) | 3, 3));
    }
    Ok(Flow::Done)
}

pub fn swapgs(core: &mut Core<'_>) -> Outcome {
    long_code(core)?;
    supervisor(core)?;
    let cpu = &mut core.vcpu.cpu;
    std::mem::swap(&mut cpu.segments[seg::GS].base, &mut cpu.kernel_gs_base);
    Ok(Flow::Next)
}

fn bases_enabled(core: &Core<'_>) -> Result<(), GuestFault> {
    long_code(core)?;
    if core.vcpu.cpu.cr4 & cr4::FSGSBASE == 0 { Err(GuestFault::UD) } else { Ok(()) }
}

pub fn read_base(core: &mut Core<'_>, instruction: &Instruction, index: usize) -> Outcome {
    bases_enabled(core)?;
    let base = core.vcpu.cpu.segments[index].base;
    operand::write_register(&mut core.vcpu.cpu, instruction.op0_register(), base);
    Ok(Flow::Next)
}

pub fn write_base(core: &mut Core<'_>, instruction: &Instruction, index: usize) -> Outcome {
    bases_enabled(core)?;
    let register: Register = instruction.op0_register();
    let base = operand::read_register(&core.vcpu.cpu, register);
    if !Gva(base).is_canonical() {
        return Err(GuestFault::GP0);
    }
    core.vcpu.cpu.segments[index].base = base;
    Ok(Flow::Next)
}
