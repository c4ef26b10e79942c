//! Who may use I/O ports: Intel SDM (2024-12) Vol. 1 20.5 "Protected-Mode I/O".

use memory::Access;
use x86::{GuestFault, Gva, cr0, rflags};

use super::tables::TSS_TYPES;
use crate::core::Core;

/// Where a TSS says at which offset its I/O permission bit map begins.
const MAP_BASE: u64 = 0x66;

/// #GP(0) unless the running code may access `size` ports from `port`.
pub fn check_io_permission(core: &mut Core<'_>, port: u16, size: u8) -> Result<(), GuestFault> {
    let cpu = &core.vcpu.cpu;
    let level = (cpu.rflags & rflags::IOPL) >> 12;
    if cpu.cr0 & cr0::PE == 0 || (u64::from(cpu.cpl()) <= level && cpu.rflags & rflags::VM == 0) {
        return Ok(());
    }
    let tss = cpu.tr;
    if !tss.is_present() || !TSS_TYPES.contains(&(tss.attributes & 0x1f)) || tss.limit < MAP_BASE as u32 + 1 {
        return Err(GuestFault::GP0);
    }
    let base = core.read_as(Gva(tss.base).add(MAP_BASE), 2, Access::system(false))?;
    let place = base + u64::from(port / 8);
    // The processor always reads two bytes, so that accesses across a byte of the map need no second look.
    if place + 1 > u64::from(tss.limit) {
        return Err(GuestFault::GP0);
    }
    let bits = core.read_as(Gva(tss.base).add(place), 2, Access::system(false))?;
    let wanted = ((1_u64 << size) - 1) << (port % 8);
    if bits & wanted == 0 { Ok(()) } else { Err(GuestFault::GP0) }
}
