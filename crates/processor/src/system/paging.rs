//! INVLPG and INVPCID: Intel SDM (2024-12) Vol. 2A and Vol. 3A 5.10.4 "Invalidation of TLBs and Paging-Structure Caches".

use iced_x86::Instruction;
use x86::{GuestFault, Gva, cr4};

use super::{Outcome, supervisor};
use crate::core::Core;
use crate::interpret::{Flow, operand};

pub fn invlpg(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    supervisor(core)?;
    // A non-canonical address, or one beyond its segment, invalidates nothing and does not fault.
    if let Ok(address) = operand::linear_address(core, instruction)
        && (address.is_canonical() || !core.vcpu.cpu.is_long_mode())
    {
        core.flush_page(address);
    }
    Ok(Flow::Next)
}

pub fn invpcid(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    supervisor(core)?;
    let kind = operand::read_register(&core.vcpu.cpu, instruction.op0_register());
    let place = operand::linear_address(core, instruction)?;
    let pcid = core.read(place, 8)?;
    let address = Gva(core.read(place.add(8), 8)?);
    let has_pcids = core.vcpu.cpu.cr4 & cr4::PCIDE != 0;
    if kind > 3 || (kind < 2 && !has_pcids && pcid != 0) || pcid >> 12 != 0 {
        return Err(GuestFault::GP0);
    }
    let current = !has_pcids || core.vcpu.cpu.cr3 & 0xfff == pcid;
    match kind {
        0 if !address.is_canonical() => return Err(GuestFault::GP0),
        0 if current => core.flush_page(address),
        1 if current => core.vcpu.flush_space(),
        // Of another space all goes, even where only one page has to.
        0 | 1 => core.vcpu.tlb.forget_pcid(pcid as u16),
        2 => core.vcpu.flush_all(),
        3 => core.vcpu.flush_local(),
        _ => {}
    }
    Ok(Flow::Next)
}
