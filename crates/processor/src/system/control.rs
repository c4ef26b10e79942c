//! Control registers: Intel SDM (2024-12) Vol. 3A 2.5 "Control Registers", MOV CR in Vol. 2B, 5.10.4.1 "Operations
//! that Invalidate TLBs and Paging-Structure Caches", and 11.8.5 "Initializing IA-32e Mode".

use iced_x86::{Instruction, Register};
use x86::paging::PHYSICAL_BITS;
use x86::{GuestFault, cr0, cr4, efer};

use super::{Outcome, not_prevented, supervisor};
use crate::core::Core;
use crate::engine::Exit;
use crate::interpret::{Flow, operand};

/// Bits of CR0 that exist; writes of the others are ignored.
const CR0_KNOWN: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

/// Bits of CR4 for what CPUID offers; setting others faults.
pub const CR4_KNOWN: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP;

/// The bit of CR4 for each feature that is offered on request.
const CR4_REQUESTED: [(&str, u64); 2] = [("pku", cr4::PKE), ("pks", cr4::PKS)];

/// Changes of these bits make every cached translation void. Those of SMAP do because our TLB keeps rights, too.
const CR4_PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PKS;
const CR0_PAGING: u64 = cr0::PG | cr0::PE | cr0::WP;

/// In MOV to CR3 with PCIDs enabled: keep what the TLBs know of the new PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;
const CR3_PCID: u64 = 0xfff;
const CR3_RESERVED: u64 = (u64::MAX << PHYSICAL_BITS) & !CR3_NO_FLUSH;

/// The number in the name of a control or debug register.
pub(super) fn number(register: Register) -> u32 {
    let first = if register.is_cr() { Register::CR0 } else { Register::DR0 };
    register as u32 - first as u32
}

pub fn mov_from_control(core: &mut Core<'_>, to: Register, from: Register) -> Outcome {
    supervisor(core)?;
    let cpu = &core.vcpu.cpu;
    let value = match number(from) {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 => u64::from(core.vcpu.priority.value >> 4),
        _ => return Err(GuestFault::UD),
    };
    operand::write_register(&mut core.vcpu.cpu, to, value);
    Ok(Flow::Next)
}

pub fn mov_to_control(core: &mut Core<'_>, to: Register, from: Register) -> Outcome {
    supervisor(core)?;
    let value = operand::read_register(&core.vcpu.cpu, from);
    let exit = match number(to) {
        0 => set_cr0(core, value)?,
        2 => {
            core.vcpu.cpu.cr2 = value;
            None
        }
        3 => {
            set_cr3(core, value)?;
            None
        }
        4 => {
            set_cr4(core, value)?;
            None
        }
        8 if value > 0xf => return Err(GuestFault::GP0),
        8 => {
            core.set_cr8(value);
            None
        }
        _ => return Err(GuestFault::UD),
    };
    Ok(exit.map_or(Flow::Next, Flow::Exit))
}

/// Loads CR0 with all checks and effects. An [`Exit`] says that the guest chose a kind of paging that we do not have.
pub fn set_cr0(core: &mut Core<'_>, value: u64) -> Result<Option<Exit>, GuestFault> {
    let cpu = &mut core.vcpu.cpu;
    let new = value & CR0_KNOWN | cr0::ET;
    let has = |bit: u64| new & bit != 0;
    if value >> 32 != 0 || (has(cr0::PG) && !has(cr0::PE)) || (has(cr0::NW) && !has(cr0::CD)) {
        return Err(GuestFault::GP0);
    }
    let old = cpu.cr0;
    if has(cr0::PG) && old & cr0::PG == 0 {
        if cpu.efer & efer::LME == 0 {
            return Ok(Some(Exit::Unsupported("32-bit and PAE paging are not supported yet".to_owned())));
        }
        if cpu.cr4 & cr4::PAE == 0 || cpu.segments[x86::seg::CS].is_long() {
            return Err(GuestFault::GP0);
        }
    }
    if !has(cr0::PG) && old & cr0::PG != 0 && (cpu.is_code64() || cpu.cr4 & cr4::PCIDE != 0) {
        return Err(GuestFault::GP0);
    }
    cpu.cr0 = new;
    if has(cr0::PG) && cpu.efer & efer::LME != 0 {
        cpu.efer |= efer::LMA;
    } else {
        cpu.efer &= !efer::LMA;
    }
    if old != new {
        core.vcpu.stale.mode = true;
    }
    if (old ^ new) & CR0_PAGING != 0 {
        core.vcpu.flush_all();
    }
    Ok(None)
}

/// Loads CR3.
pub fn set_cr3(core: &mut Core<'_>, value: u64) -> Result<(), GuestFault> {
    let cpu = &mut core.vcpu.cpu;
    let has_pcids = cpu.cr4 & cr4::PCIDE != 0;
    if value & CR3_RESERVED != 0 || (value & CR3_NO_FLUSH != 0 && !has_pcids) {
        return Err(GuestFault::GP0);
    }
    let new = value & !CR3_NO_FLUSH;
    let keeps = value & CR3_NO_FLUSH != 0;
    let is_same = new == cpu.cr3;
    cpu.cr3 = new;
    match core.vcpu.pcid() {
        Some(_) if keeps && is_same => {}
        Some(pcid) => core.vcpu.switch_space(pcid, keeps),
        None => core.vcpu.flush_local(),
    }
    Ok(())
}

/// Loads CR4.
pub fn set_cr4(core: &mut Core<'_>, new: u64) -> Result<(), GuestFault> {
    let model = &core.vcpu.cpuid;
    let requested = CR4_REQUESTED.iter().filter(|(name, bit)| new & bit != 0 && model.has(name));
    let known = requested.fold(CR4_KNOWN, |known, (_, bit)| known | bit);
    let cpu = &mut core.vcpu.cpu;
    let old = cpu.cr4;
    let sets = |bit: u64| new & bit != 0 && old & bit == 0;
    if new & !known != 0
        || (new & cr4::PAE == 0 && cpu.is_long_mode())
        || (sets(cr4::PCIDE) && (!cpu.is_long_mode() || cpu.cr3 & CR3_PCID != 0))
    {
        return Err(GuestFault::GP0);
    }
    cpu.cr4 = new;
    if old != new {
        core.vcpu.stale.mode = true;
    }
    if (old ^ new) & CR4_PAGING != 0 {
        core.vcpu.flush_all();
    }
    Ok(())
}

pub fn clts(core: &mut Core<'_>) -> Outcome {
    supervisor(core)?;
    if core.vcpu.cpu.cr0 & cr0::TS != 0 {
        core.vcpu.cpu.cr0 &= !cr0::TS;
        core.vcpu.stale.mode = true;
    }
    Ok(Flow::Next)
}

pub fn smsw(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    not_prevented(core)?;
    let value = core.vcpu.cpu.cr0;
    operand::write(core, instruction, 0, value)?;
    Ok(Flow::Next)
}

/// LMSW changes PE, MP, EM and TS; it can set PE but not clear it.
pub fn lmsw(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    supervisor(core)?;
    let value = operand::read(core, instruction, 0)?;
    let old = core.vcpu.cpu.cr0;
    let changed = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
    let new = old & !changed | value & changed | old & cr0::PE;
    Ok(set_cr0(core, new)?.map_or(Flow::Next, Flow::Exit))
}
