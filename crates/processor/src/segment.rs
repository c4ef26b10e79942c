//! Segment descriptors: how they are found, checked and loaded. Intel SDM (2024-12) Vol. 3A 3.4.5 "Segment
//! Descriptors", 6.5 to 6.8 "Privilege-Level Checking", and the operation of MOV in Vol. 2B.

use memory::Access;
use x86::state::gpr;
use x86::{CpuState, GuestFault, Gva, Segment, cr0, seg, vector};

use crate::core::{Core, as_stack_fault};

/// Types of system descriptors (S = 0), SDM Vol. 3A Table 3-2. The names are those of long mode.
pub mod system_type {
    pub const LDT: u8 = 2;
    pub const TSS_AVAILABLE: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}

/// A fault whose error code names a selector.
#[must_use]
pub fn selector_fault(vector: u8, selector: u16) -> GuestFault {
    GuestFault::with_code(vector, u32::from(selector & !3))
}

#[must_use]
pub fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

#[must_use]
pub fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// The first eight bytes of a descriptor, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub address: Gva,
    pub raw: u64,
}

impl Descriptor {
    /// Finds a descriptor; a selector beyond its table is a fault of `kind` (#GP, or #TS in deliveries).
    pub fn fetch(core: &mut Core<'_>, selector: u16, kind: u8) -> Result<Descriptor, GuestFault> {
        Self::fetch_sized(core, selector, kind, 8)
    }

    fn fetch_sized(core: &mut Core<'_>, selector: u16, kind: u8, size: u32) -> Result<Descriptor, GuestFault> {
        let cpu = &core.vcpu.cpu;
        let (base, limit) = if selector & 4 == 0 {
            (cpu.gdtr.base, u32::from(cpu.gdtr.limit))
        } else if cpu.ldtr.is_present() {
            (cpu.ldtr.base, cpu.ldtr.limit)
        } else {
            return Err(selector_fault(kind, selector));
        };
        let offset = u32::from(selector & !7);
        if offset + size - 1 > limit {
            return Err(selector_fault(kind, selector));
        }
        let mut address = Gva(base).add(u64::from(offset));
        if !cpu.is_long_mode() {
            address = Gva(address.0 & 0xffff_ffff);
        }
        let raw = core.read_as(address, 8, Access::system(false))?;
        Ok(Descriptor { address, raw })
    }

    /// Finds an LDT, TSS or call gate descriptor: 16 bytes in long mode, of which the second half is given too.
    pub fn fetch_system(core: &mut Core<'_>, selector: u16, kind: u8) -> Result<(Descriptor, u64), GuestFault> {
        if !core.vcpu.cpu.is_long_mode() {
            return Ok((Self::fetch(core, selector, kind)?, 0));
        }
        let descriptor = Self::fetch_sized(core, selector, kind, 16)?;
        let high = core.read_as(descriptor.address.add(8), 8, Access::system(false))?;
        Ok((descriptor, high))
    }

    /// The type field: what it means depends on [`Descriptor::is_system`].
    #[must_use]
    pub fn kind(&self) -> u8 {
        (self.raw >> 40 & 0xf) as u8
    }

    #[must_use]
    pub fn is_system(&self) -> bool {
        self.raw & 1 << 44 == 0
    }

    #[must_use]
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }

    #[must_use]
    pub fn is_present(&self) -> bool {
        self.raw & 1 << 47 != 0
    }

    #[must_use]
    pub fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }

    #[must_use]
    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    #[must_use]
    pub fn is_writable_data(&self) -> bool {
        !self.is_system() && self.kind() & 0xa == 2
    }

    /// Data, or code that may be read.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        !self.is_system() && self.kind() & 0xa != 8
    }

    /// 64-bit code.
    #[must_use]
    pub fn is_long(&self) -> bool {
        self.raw & 1 << 53 != 0
    }

    #[must_use]
    pub fn is_big(&self) -> bool {
        self.raw & 1 << 54 != 0
    }

    #[must_use]
    pub fn base(&self) -> u64 {
        (self.raw >> 16 & 0xff_ffff) | (self.raw >> 32 & 0xff00_0000)
    }

    /// The limit in bytes.
    #[must_use]
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw & 1 << 55 == 0 { limit } else { limit << 12 | 0xfff }
    }

    /// What a segment register holds after loading this descriptor.
    #[must_use]
    pub fn segment(&self, selector: u16) -> Segment {
        // The load leaves the accessed bit set, in memory (see `touch`) and in the register.
        let accessed = u16::from(!self.is_system());
        let attributes = (self.raw >> 40) as u16 & 0xf0ff | accessed;
        Segment { base: self.base(), limit: self.limit(), selector, attributes }
    }

    /// Sets the accessed bit in the table. Tables whose bits are set already may be read-only, as Linux' GDT is.
    pub fn touch(&self, core: &mut Core<'_>) -> Result<(), GuestFault> {
        if self.is_system() || self.kind() & 1 != 0 {
            return Ok(());
        }
        let access_byte = (self.raw >> 40 & 0xff) | 1;
        core.write_as(self.address.add(5), 1, access_byte, Access::system(true))
    }
}

/// A null segment. It carries a privilege level, because the stack segment's is the processor's.
#[must_use]
pub fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment { base: 0, limit: 0, selector, attributes: u16::from(dpl & 3) << 5 }
}

/// Loads ES, SS, DS, FS or GS (not CS) as MOV and POP do. The caller sets the interrupt shadow of SS loads.
pub fn load(core: &mut Core<'_>, register: usize, selector: u16) -> Result<(), GuestFault> {
    if core.vcpu.cpu.cr0 & cr0::PE == 0 {
        if let Some(segment) = core.vcpu.cpu.segments.get_mut(register) {
            segment.selector = selector;
            segment.base = u64::from(selector) << 4;
        }
        return Ok(());
    }
    let segment = if register == seg::SS { stack_segment(core, selector)? } else { data_segment(core, selector)? };
    set(core, register, segment);
    Ok(())
}

/// Puts a checked segment into a register.
pub fn set(core: &mut Core<'_>, register: usize, segment: Segment) {
    let hidden = |segment: &Segment| (segment.base, segment.limit, segment.attributes);
    let long = core.vcpu.cpu.is_code64();
    if let Some(place) = core.vcpu.cpu.segments.get_mut(register) {
        // Bases, limits and stack width matter to translated code outside 64-bit mode only.
        if !long && hidden(place) != hidden(&segment) {
            core.vcpu.stale.mode = true;
        }
        *place = segment;
    }
}

/// Puts a checked code segment into CS.
pub fn set_code(core: &mut Core<'_>, segment: Segment) {
    let width = |segment: &Segment| segment.attributes & (Segment::LONG | Segment::BIG);
    let old = &mut core.vcpu.cpu.segments[seg::CS];
    if width(old) != width(&segment) || (!segment.is_long() && (old.base, old.limit) != (segment.base, segment.limit)) {
        core.vcpu.stale.mode = true;
    }
    *old = segment;
}

fn stack_segment(core: &mut Core<'_>, selector: u16) -> Result<Segment, GuestFault> {
    let cpl = core.vcpu.cpu.cpl();
    if is_null(selector) {
        // Only 64-bit mode below CPL 3 has a null stack segment.
        let allowed = core.vcpu.cpu.is_code64() && cpl != 3 && rpl(selector) == cpl;
        return if allowed { Ok(null_segment(selector, cpl)) } else { Err(GuestFault::GP0) };
    }
    let descriptor = Descriptor::fetch(core, selector, vector::GP)?;
    if rpl(selector) != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
        return Err(selector_fault(vector::GP, selector));
    }
    if !descriptor.is_present() {
        return Err(selector_fault(vector::SS, selector));
    }
    descriptor.touch(core)?;
    Ok(descriptor.segment(selector))
}

fn data_segment(core: &mut Core<'_>, selector: u16) -> Result<Segment, GuestFault> {
    if is_null(selector) {
        // Intel processors clear the base too; Linux relies on that for FS and GS.
        return Ok(null_segment(selector, 0));
    }
    let cpl = core.vcpu.cpu.cpl();
    let descriptor = Descriptor::fetch(core, selector, vector::GP)?;
    let too_private = !descriptor.is_conforming() && descriptor.dpl() < cpl.max(rpl(selector));
    if !descriptor.is_readable() || too_private {
        return Err(selector_fault(vector::GP, selector));
    }
    if !descriptor.is_present() {
        return Err(selector_fault(vector::NP, selector));
    }
    descriptor.touch(core)?;
    Ok(descriptor.segment(selector))
}

/// Takes data segments away that code at `cpl` may not have: what returns to an outer privilege level do. The base of a
/// segment that is null already stays, for 64-bit code keeps the thread pointer there.
pub fn drop_private_segments(cpu: &mut CpuState, cpl: u8) {
    for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let segment = &mut cpu.segments[register];
        if !segment.is_present() || is_null(segment.selector) {
            continue;
        }
        let conforming_code = segment.attributes & 0xc == 0xc;
        if segment.dpl() < cpl && !conforming_code {
            segment.selector = 0;
            segment.attributes = 0;
        }
    }
}

/// A stack pointer on its way: several pushes or pops of one instruction, which count only when all of them succeed.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    pub pointer: u64,
    mask: u64,
    segment: Option<Segment>,
    access: Access,
}

impl Stack {
    /// The stack of the running code.
    #[must_use]
    pub fn current(core: &Core<'_>) -> Stack {
        let cpu = &core.vcpu.cpu;
        let access = core.access(false);
        let rsp = cpu.gpr[gpr::RSP];
        if cpu.is_code64() {
            return Stack { pointer: rsp, mask: u64::MAX, segment: None, access };
        }
        let segment = cpu.segments[seg::SS];
        let mask = if segment.is_big() { 0xffff_ffff } else { 0xffff };
        Stack { pointer: rsp & mask, mask, segment: Some(segment), access }
    }

    /// A flat 64-bit stack that code at privilege level `cpl` is about to get.
    #[must_use]
    pub fn fresh(rsp: u64, cpl: u8) -> Stack {
        let access = Access { write: false, fetch: false, user: cpl == 3, implicit: cpl != 3 };
        Stack { pointer: rsp, mask: u64::MAX, segment: None, access }
    }

    fn linear(&self, offset: u64, size: usize) -> Result<Gva, GuestFault> {
        let Some(segment) = self.segment else { return Ok(Gva(offset)) };
        let last = offset + size as u64 - 1;
        let expands_down = segment.attributes & 0xc == 4;
        let limit = u64::from(segment.limit);
        let inside = if expands_down { offset > limit && last <= self.mask } else { last <= limit };
        if !inside || !segment.is_present() {
            return Err(GuestFault::SS0);
        }
        Ok(Gva(segment.base.wrapping_add(offset) & 0xffff_ffff))
    }

    pub fn push(&mut self, core: &mut Core<'_>, size: usize, value: u64) -> Result<(), GuestFault> {
        let pointer = self.pointer.wrapping_sub(size as u64) & self.mask;
        let address = self.linear(pointer, size)?;
        core.write_as(address, size, value, Access { write: true, ..self.access }).map_err(as_stack_fault)?;
        self.pointer = pointer;
        Ok(())
    }

    /// Pushes words of 8 bytes, one by one or, where nothing can come between, at once.
    pub fn push_all(&mut self, core: &mut Core<'_>, words: &[u64]) -> Result<(), GuestFault> {
        let pointer = self.pointer.wrapping_sub(8 * words.len() as u64);
        let mut frame = [[0; 8]; 6];
        if self.segment.is_none()
            && let Some(frame) = frame.get_mut(..words.len())
        {
            for (place, word) in frame.iter_mut().zip(words.iter().rev()) {
                *place = word.to_le_bytes();
            }
            if core.store_frame(Gva(pointer), frame.as_flattened(), self.access) {
                self.pointer = pointer;
                return Ok(());
            }
        }
        words.iter().try_for_each(|word| self.push(core, 8, *word))
    }

    pub fn pop(&mut self, core: &mut Core<'_>, size: usize) -> Result<u64, GuestFault> {
        let address = self.linear(self.pointer, size)?;
        let value = core.read_as(address, size, self.access).map_err(as_stack_fault)?;
        self.release(size as u64);
        Ok(value)
    }

    /// Moves the pointer up without reading.
    pub fn release(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes) & self.mask;
    }

    /// Makes the pointer the processor's.
    pub fn commit(&self, cpu: &mut CpuState) {
        let rsp = &mut cpu.gpr[gpr::RSP];
        // A write of ESP clears the upper half; a write of SP leaves all else alone.
        *rsp = if self.mask == 0xffff { *rsp & !0xffff | self.pointer } else { self.pointer };
    }
}
