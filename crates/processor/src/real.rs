//! Real-address mode: far transfers and interrupts without descriptors. Intel SDM (2024-12) Vol. 3B, chapter "8086 Emulation",
//! "Real-Address Mode", and the operation sections of JMP, CALL, RET, INT n and IRET in Vol. 2.

use memory::Access;
use x86::{CpuState, GuestFault, Gva, Segment, rflags, seg};

use crate::core::Core;
use crate::segment::{self, Stack};

/// What CS becomes: limit and attributes stay, as protected mode or reset left them.
fn code(core: &Core<'_>, selector: u16, offset: u64) -> Result<Segment, GuestFault> {
    let old = core.vcpu.cpu.segments[seg::CS];
    if offset > u64::from(old.limit) {
        return Err(GuestFault::GP0);
    }
    Ok(Segment { base: u64::from(selector) << 4, selector, ..old })
}

/// JMP to another segment.
pub fn jump(core: &mut Core<'_>, selector: u16, offset: u64) -> Result<(), GuestFault> {
    let target = code(core, selector, offset)?;
    segment::set_code(core, target);
    core.vcpu.cpu.rip = offset;
    Ok(())
}

/// Pushes words of `size` bytes, the first one first, then goes to another segment.
fn push_and_jump(
    core: &mut Core<'_>,
    words: &[u64],
    size: usize,
    selector: u16,
    offset: u64,
) -> Result<(), GuestFault> {
    let target = code(core, selector, offset)?;
    let mut stack = Stack::current(core);
    for word in words {
        stack.push(core, size, *word)?;
    }
    segment::set_code(core, target);
    stack.commit(&mut core.vcpu.cpu);
    core.vcpu.cpu.rip = offset;
    Ok(())
}

/// CALL of another segment; `size` is that of the pushed words.
pub fn call(core: &mut Core<'_>, selector: u16, offset: u64, size: usize, return_to: u64) -> Result<(), GuestFault> {
    let from = u64::from(core.vcpu.cpu.segments[seg::CS].selector);
    push_and_jump(core, &[from, return_to], size, selector, offset)
}

/// RET to another segment, which releases so many bytes of parameters.
pub fn ret(core: &mut Core<'_>, size: usize, parameters: u64) -> Result<(), GuestFault> {
    let mut stack = Stack::current(core);
    let offset = stack.pop(core, size)?;
    let selector = stack.pop(core, size)? as u16;
    stack.release(parameters);
    jump(core, selector, offset)?;
    stack.commit(&mut core.vcpu.cpu);
    Ok(())
}

/// IRET; `flags` says what becomes of the image of RFLAGS.
pub fn iret(core: &mut Core<'_>, size: usize, flags: impl FnOnce(&CpuState, u64) -> u64) -> Result<(), GuestFault> {
    let mut stack = Stack::current(core);
    let offset = stack.pop(core, size)?;
    let selector = stack.pop(core, size)? as u16;
    let image = stack.pop(core, size)?;
    jump(core, selector, offset)?;
    let cpu = &mut core.vcpu.cpu;
    stack.commit(cpu);
    cpu.rflags = flags(cpu, image);
    Ok(())
}

/// Delivers an interrupt or exception through the table of far pointers at IDTR. There are no error codes.
pub fn deliver(core: &mut Core<'_>, vector: u8, return_to: u64) -> Result<(), GuestFault> {
    let table = core.vcpu.cpu.idtr;
    let entry = u64::from(vector) * 4;
    if entry + 3 > u64::from(table.limit) {
        return Err(GuestFault::GP0);
    }
    let place = Gva(table.base.wrapping_add(entry) & 0xffff_ffff);
    let pointer = core.read_as(place, 4, Access::system(false))?;
    let cpu = &core.vcpu.cpu;
    let words = [cpu.rflags, u64::from(cpu.segments[seg::CS].selector), return_to];
    push_and_jump(core, &words, 2, (pointer >> 16) as u16, pointer & 0xffff)?;
    core.vcpu.cpu.rflags &= !(rflags::IF | rflags::TF | rflags::RF | rflags::AC);
    Ok(())
}
