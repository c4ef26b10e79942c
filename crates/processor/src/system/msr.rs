//! Model-specific registers: Intel SDM (2024-12) Vol. 4 ch. 2. An MSR that is not here faults with #GP(0), as on hardware
//! that lacks it; Linux reads such ones with accessors that expect that.

use iced_x86::Instruction;
use x86::msr::misc_enable;
use x86::state::gpr;
use x86::{CpuState, GuestFault, Gva, cr0, cr4, efer, msr, seg};

use super::{Outcome, edx_eax, keys, set_edx_eax, supervisor};
use crate::core::Core;
use crate::interpret::{Flow, operand};

/// IA32_ARCH_CAPABILITIES, SDM Vol. 4 Table 2-2: this processor has none of the known leaks, so that guests spend no time
/// on closing them. (What leaks on the host is closed by the host and by the walls around the process.)
pub const ARCH_CAPABILITIES: u64 = arch::RDCL_NO
    | arch::IBRS_ALL
    | arch::SKIP_L1DFL_VMENTRY
    | arch::SSB_NO
    | arch::MDS_NO
    | arch::PSCHANGE_MC_NO
    | arch::TAA_NO
    | arch::SBDR_SSDP_NO
    | arch::FBSDP_NO
    | arch::PSDP_NO
    | arch::BHI_NO
    | arch::PBRSB_NO
    | arch::GDS_NO
    | arch::RFDS_NO
    | arch::ITS_NO;

mod arch {
    pub const RDCL_NO: u64 = 1 << 0;
    pub const IBRS_ALL: u64 = 1 << 1;
    pub const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    pub const SSB_NO: u64 = 1 << 4;
    pub const MDS_NO: u64 = 1 << 5;
    pub const PSCHANGE_MC_NO: u64 = 1 << 6;
    pub const TAA_NO: u64 = 1 << 8;
    pub const SBDR_SSDP_NO: u64 = 1 << 13;
    pub const FBSDP_NO: u64 = 1 << 14;
    pub const PSDP_NO: u64 = 1 << 15;
    pub const BHI_NO: u64 = 1 << 20;
    pub const PBRSB_NO: u64 = 1 << 24;
    pub const GDS_NO: u64 = 1 << 26;
    pub const RFDS_NO: u64 = 1 << 27;
    pub const ITS_NO: u64 = 1 << 62;
}

/// IA32_PLATFORM_ID: which microcode fits. None does.
const PLATFORM_ID: u32 = 0x17;
/// Microcode revision in the upper half, once CPUID ran.
const MICROCODE_REVISION: u64 = 1 << 32;
/// Locked with everything off, as firmware leaves it on machines without VMX.
const FEATURE_CONTROL_LOCKED: u64 = 1;
/// Eight variable ranges, fixed ranges, write-combining.
const MTRRCAP_VALUE: u64 = 8 | 1 << 8 | 1 << 10;
/// No bank of machine-check registers: nothing can break.
const MCG_CAP_VALUE: u64 = 0;
/// What can be written in IA32_MISC_ENABLE; branch trace and PEBS are unavailable, which reads as one. "Limit CPUID Maxval" and
/// "XD Bit Disable" show in CPUID and in EFER, the others have nothing to switch here.
const MISC_ENABLE_WRITABLE: u64 = misc_enable::FAST_STRINGS
    | misc_enable::THERMAL_CONTROL
    | misc_enable::PERFORMANCE_MONITORING
    | misc_enable::SPEEDSTEP
    | misc_enable::MONITOR
    | misc_enable::LIMIT_CPUID
    | misc_enable::NO_TPR_MESSAGES
    | misc_enable::XD_DISABLE;
const MISC_ENABLE_FIXED: u64 = misc_enable::BRANCH_TRACE_UNAVAILABLE | misc_enable::PEBS_UNAVAILABLE;
/// IBRS, STIBP, SSBD, BHI_DIS_S.
const SPEC_CTRL_WRITABLE: u64 = 7 | 1 << 10;
/// LBR and BTF.
const DEBUGCTL_WRITABLE: u64 = 3;
const EFER_WRITABLE: u64 = efer::SCE | efer::LME | efer::NXE;
/// Default type, fixed and all ranges enabled.
const DEF_TYPE_WRITABLE: u64 = 0xff | 3 << 10;
const PHYSICAL_MASK: u64 = (1 << x86::paging::PHYSICAL_BITS) - 1;

const FAULT: GuestFault = GuestFault::GP0;

pub fn rdmsr(core: &mut Core<'_>) -> Outcome {
    supervisor(core)?;
    let number = core.vcpu.cpu.gpr[gpr::RCX] as u32;
    let value = read(core, number)?;
    set_edx_eax(&mut core.vcpu.cpu, value);
    Ok(Flow::Next)
}

pub fn wrmsr(core: &mut Core<'_>) -> Outcome {
    supervisor(core)?;
    let number = core.vcpu.cpu.gpr[gpr::RCX] as u32;
    let value = edx_eax(&core.vcpu.cpu);
    write(core, number, value)?;
    Ok(Flow::Next)
}

/// RDTSC and RDTSCP.
pub fn rdtsc(core: &mut Core<'_>, with_aux: bool) -> Outcome {
    let cpu = &mut core.vcpu.cpu;
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl() > 0 && cpu.cr0 & cr0::PE != 0 {
        return Err(FAULT);
    }
    let now = guest_tsc(cpu);
    set_edx_eax(cpu, now);
    if with_aux {
        cpu.gpr[gpr::RCX] = cpu.tsc_aux & 0xffff_ffff;
    }
    Ok(Flow::Next)
}

pub fn rdpid(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    let value = core.vcpu.cpu.tsc_aux;
    operand::write_register(&mut core.vcpu.cpu, instruction.op0_register(), value);
    Ok(Flow::Next)
}

/// The guest's time stamp counter now, read in order: the guest may have asked for that, by RDTSCP or by LFENCE.
#[must_use]
pub fn guest_tsc(cpu: &CpuState) -> u64 {
    host::clock::host_tsc_in_order().wrapping_add(cpu.tsc_offset)
}

/// The index of a fixed-range MTRR.
fn fixed_range(number: u32) -> Option<usize> {
    Some(match number {
        msr::MTRR_FIX64K_00000 => 0,
        msr::MTRR_FIX16K_80000 => 1,
        msr::MTRR_FIX16K_A0000 => 2,
        msr::MTRR_FIX4K_C0000..=msr::MTRR_FIX4K_F8000 => (number - msr::MTRR_FIX4K_C0000) as usize + 3,
        _ => return None,
    })
}

/// Reads an MSR; #GP(0) when there is none of that number, or it cannot be read.
pub fn read(core: &mut Core<'_>, number: u32) -> Result<u64, GuestFault> {
    let cpu = &core.vcpu.cpu;
    let value = match number {
        msr::TSC => guest_tsc(cpu),
        msr::TSC_ADJUST => cpu.tsc_adjust,
        msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            return core.apic_read(number).ok_or(FAULT);
        }
        PLATFORM_ID | msr::MCG_STATUS => 0,
        msr::FEATURE_CONTROL => FEATURE_CONTROL_LOCKED,
        msr::SPEC_CTRL => cpu.spec_ctrl,
        msr::BIOS_SIGN_ID => MICROCODE_REVISION,
        msr::MTRRCAP => MTRRCAP_VALUE,
        msr::ARCH_CAPABILITIES => ARCH_CAPABILITIES,
        msr::SYSENTER_CS => cpu.sysenter_cs,
        msr::SYSENTER_ESP => cpu.sysenter_esp,
        msr::SYSENTER_EIP => cpu.sysenter_eip,
        msr::MCG_CAP => MCG_CAP_VALUE,
        msr::MISC_ENABLE => cpu.misc_enable | MISC_ENABLE_FIXED,
        msr::DEBUGCTL => cpu.debugctl,
        msr::MTRR_PHYSBASE0..=msr::MTRR_PHYSMASK7 => cpu.mtrr_variable[(number - msr::MTRR_PHYSBASE0) as usize],
        msr::PAT => cpu.pat,
        msr::MTRR_DEF_TYPE => cpu.mtrr_def_type,
        msr::EFER => cpu.efer,
        msr::STAR => cpu.star,
        msr::LSTAR => cpu.lstar,
        msr::CSTAR => cpu.cstar,
        msr::SFMASK => cpu.sfmask,
        msr::FS_BASE => cpu.segments[seg::FS].base,
        msr::GS_BASE => cpu.segments[seg::GS].base,
        msr::KERNEL_GS_BASE => cpu.kernel_gs_base,
        msr::TSC_AUX => cpu.tsc_aux,
        msr::XSS => cpu.xss,
        msr::PKRS if core.vcpu.cpuid.has("pks") => cpu.pkrs.into(),
        _ => return fixed_range(number).map(|index| cpu.mtrr_fixed[index]).ok_or(FAULT),
    };
    Ok(value)
}

fn canonical(value: u64) -> Result<u64, GuestFault> {
    if Gva(value).is_canonical() { Ok(value) } else { Err(FAULT) }
}

fn only(value: u64, allowed: u64) -> Result<u64, GuestFault> {
    if value & !allowed == 0 { Ok(value) } else { Err(FAULT) }
}

/// UC, WC, WT, WP, WB: SDM Vol. 3A Table 13-8 "Memory Types That Can Be Encoded in MTRRs".
fn is_memory_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

fn memory_types(value: u64) -> Result<u64, GuestFault> {
    if value.to_le_bytes().into_iter().all(is_memory_type) { Ok(value) } else { Err(FAULT) }
}

/// The PAT knows UC- (7), too: SDM Vol. 3A Table 13-10.
fn pat_types(value: u64) -> Result<u64, GuestFault> {
    let is_type = |byte: u8| is_memory_type(byte) || byte == 7;
    if value.to_le_bytes().into_iter().all(is_type) { Ok(value) } else { Err(FAULT) }
}

fn variable_range(number: u32, value: u64) -> Result<u64, GuestFault> {
    let is_mask = number & 1 == 1;
    let low = if is_mask { 1 << 11 } else { 0xff };
    only(value, PHYSICAL_MASK & !0xfff | low)?;
    if is_mask || is_memory_type(value as u8) { Ok(value) } else { Err(FAULT) }
}

/// Writes an MSR; #GP(0) when there is none of that number, it cannot be written, or not with that value.
pub fn write(core: &mut Core<'_>, number: u32, value: u64) -> Result<(), GuestFault> {
    let cpu = &mut core.vcpu.cpu;
    match number {
        msr::TSC => {
            let change = value.wrapping_sub(guest_tsc(cpu));
            shift_tsc(core, change);
        }
        msr::TSC_ADJUST => {
            let change = value.wrapping_sub(cpu.tsc_adjust);
            shift_tsc(core, change);
        }
        msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
            return if core.apic_write(number, value) { Ok(()) } else { Err(FAULT) };
        }
        msr::SPEC_CTRL => cpu.spec_ctrl = only(value, SPEC_CTRL_WRITABLE)?,
        // An indirect branch prediction barrier: predictions of the guest's branches do not exist.
        msr::PRED_CMD => {
            only(value, 1)?;
        }
        // Linux writes zero before it asks for the revision by CPUID; updates do not come this way.
        msr::BIOS_SIGN_ID => {}
        msr::SYSENTER_CS => cpu.sysenter_cs = value,
        msr::SYSENTER_ESP => cpu.sysenter_esp = canonical(value)?,
        msr::SYSENTER_EIP => cpu.sysenter_eip = canonical(value)?,
        msr::MCG_STATUS => {
            only(value, 0)?;
        }
        msr::MISC_ENABLE => cpu.misc_enable = only(value, MISC_ENABLE_WRITABLE | MISC_ENABLE_FIXED)?,
        msr::DEBUGCTL => cpu.debugctl = only(value, DEBUGCTL_WRITABLE)?,
        msr::MTRR_PHYSBASE0..=msr::MTRR_PHYSMASK7 => {
            cpu.mtrr_variable[(number - msr::MTRR_PHYSBASE0) as usize] = variable_range(number, value)?;
        }
        msr::PAT => cpu.pat = pat_types(value)?,
        msr::MTRR_DEF_TYPE => {
            only(value, DEF_TYPE_WRITABLE)?;
            if !is_memory_type(value as u8) {
                return Err(FAULT);
            }
            cpu.mtrr_def_type = value;
        }
        msr::EFER => return set_efer(core, value),
        msr::STAR => cpu.star = value,
        msr::LSTAR => cpu.lstar = canonical(value)?,
        msr::CSTAR => cpu.cstar = canonical(value)?,
        msr::SFMASK => cpu.sfmask = value,
        msr::FS_BASE => cpu.segments[seg::FS].base = canonical(value)?,
        msr::GS_BASE => cpu.segments[seg::GS].base = canonical(value)?,
        msr::KERNEL_GS_BASE => cpu.kernel_gs_base = canonical(value)?,
        msr::TSC_AUX => cpu.tsc_aux = only(value, 0xffff_ffff)?,
        // XSAVES has no supervisor components to save.
        msr::XSS => cpu.xss = only(value, 0)?,
        msr::PKRS if core.vcpu.cpuid.has("pks") => keys::set_pkrs(core, only(value, 0xffff_ffff)? as u32),
        _ => match fixed_range(number) {
            Some(index) => cpu.mtrr_fixed[index] = memory_types(value)?,
            None => return Err(FAULT),
        },
    }
    Ok(())
}

/// Loads EFER. LMA is read-only: writes of it are ignored, as SDM Vol. 4 has it.
pub fn set_efer(core: &mut Core<'_>, value: u64) -> Result<(), GuestFault> {
    let cpu = &mut core.vcpu.cpu;
    only(value, EFER_WRITABLE | efer::LMA)?;
    let old = cpu.efer;
    let new = value & EFER_WRITABLE | old & efer::LMA;
    if (old ^ new) & efer::LME != 0 && cpu.cr0 & cr0::PG != 0 {
        return Err(FAULT);
    }
    // With the feature hidden its enable bit is reserved.
    if new & !old & efer::NXE != 0 && cpu.misc_enable & misc_enable::XD_DISABLE != 0 {
        return Err(FAULT);
    }
    cpu.efer = new;
    if old != new {
        core.vcpu.stale.mode = true;
    }
    if (old ^ new) & efer::NXE != 0 {
        core.vcpu.flush_all();
    }
    Ok(())
}

/// Moves the counter by `change`. IA32_TSC_ADJUST is the sum of all such moves (SDM Vol. 3B 19.17.3 "Time-Stamp Counter
/// Adjustment").
fn shift_tsc(core: &mut Core<'_>, change: u64) {
    let cpu = &mut core.vcpu.cpu;
    cpu.tsc_offset = cpu.tsc_offset.wrapping_add(change);
    cpu.tsc_adjust = cpu.tsc_adjust.wrapping_add(change);
    // Deadlines of the local APIC's timer are values of this counter: the run loop tells the APIC how far it moved.
    core.vcpu.attention.raise();
}

/// What firmware leaves behind in the MTRRs: enabled, all memory write-back except the legacy video and ROM area. A kernel
/// that is entered without firmware needs it; Linux switches PAT off when it finds the MTRRs disabled.
pub fn set_firmware_memory_types(cpu: &mut CpuState) {
    const WRITE_BACK: u64 = 6;
    const ENABLED: u64 = 1 << 11;
    const FIXED_ENABLED: u64 = 1 << 10;
    cpu.mtrr_def_type = ENABLED | FIXED_ENABLED | WRITE_BACK;
    for (index, range) in cpu.mtrr_fixed.iter_mut().enumerate() {
        *range = if index < 2 { 0x0606_0606_0606_0606 } else { 0 };
    }
    // The hole below 4 GiB, 1 GiB of devices at 0xc000_0000, is uncacheable.
    cpu.mtrr_variable[0] = 0xc000_0000;
    cpu.mtrr_variable[1] = PHYSICAL_MASK & !0x3fff_ffff | 1 << 11;
}
