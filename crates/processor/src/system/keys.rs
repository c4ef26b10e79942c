//! Protection keys: RDPKRU and WRPKRU, Intel SDM (2024-12) Vol. 2B, and IA32_PKRS. Our TLB keeps rights, and so forgets them
//! where hardware looks at the registers each time.

use x86::state::gpr;
use x86::{GuestFault, cr4};

use super::{Outcome, edx_eax, set_edx_eax};
use crate::core::Core;
use crate::interpret::Flow;

pub fn rdpkru(core: &mut Core<'_>) -> Outcome {
    let cpu = &mut core.vcpu.cpu;
    if cpu.cr4 & cr4::PKE == 0 {
        return Err(GuestFault::UD);
    }
    if cpu.gpr[gpr::RCX] as u32 != 0 {
        return Err(GuestFault::GP0);
    }
    let value = cpu.pkru;
    set_edx_eax(cpu, value.into());
    Ok(Flow::Next)
}

pub fn wrpkru(core: &mut Core<'_>) -> Outcome {
    let cpu = &core.vcpu.cpu;
    if cpu.cr4 & cr4::PKE == 0 {
        return Err(GuestFault::UD);
    }
    let value = edx_eax(cpu);
    if cpu.gpr[gpr::RCX] as u32 != 0 || value >> 32 != 0 {
        return Err(GuestFault::GP0);
    }
    set_pkru(core, value as u32);
    Ok(Flow::Next)
}

/// Loads PKRU, as XRSTOR does whether CR4 enables it or not.
pub fn set_pkru(core: &mut Core<'_>, value: u32) {
    let old = std::mem::replace(&mut core.vcpu.cpu.pkru, value);
    rights_change(core, old != value && core.vcpu.cpu.cr4 & cr4::PKE != 0);
}

pub fn set_pkrs(core: &mut Core<'_>, value: u32) {
    let old = std::mem::replace(&mut core.vcpu.cpu.pkrs, value);
    rights_change(core, old != value && core.vcpu.cpu.cr4 & cr4::PKS != 0);
}

/// Where code is does not depend on keys: only what is known of data goes.
fn rights_change(core: &mut Core<'_>, is_felt: bool) {
    if is_felt {
        core.vcpu.tlb.flush_all();
    }
}
