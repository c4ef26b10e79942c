//! Delivery of exceptions and interrupts through the IDT: Intel SDM (2024-12) Vol. 3A ch. 7 "Interrupt and Exception
//! Handling", and the operation of INT n in Vol. 2A. Long mode is complete; real mode and 32-bit protected mode without a
//! change of privilege are there for early boot code.

use memory::Access;
use x86::{CpuState, GuestFault, Gva, Segment, cr0, dr6, dr7, rflags, seg, vector};

use crate::core::Core;
use crate::engine::Exit;
use crate::profile::Doing;
use crate::real;
use crate::segment::{self, Descriptor, Stack, is_null, selector_fault, system_type};

/// IA32_DEBUGCTL bits that a debug exception clears: LBR and BTF.
const DEBUGCTL_CLEARED: u64 = 3;
/// Error code bits: the event came from outside the program; the index is one into the IDT.
const EXT: u32 = 1;
const IDT: u32 = 2;

/// Delivers a fault of the running instruction, or a trap after it, to the guest. Says why the engine must stop, if it must.
pub fn fault(core: &mut Core<'_>, fault: GuestFault) -> Option<Exit> {
    deliver(core, Event::of_fault(fault))
}

/// Delivers an interrupt of the platform. The caller has checked that it can be taken.
pub fn interrupt(core: &mut Core<'_>, vector: u8) -> Option<Exit> {
    deliver(core, Event { external: true, ..Event::plain(vector) })
}

/// Delivers a non-maskable interrupt, and blocks further ones until IRET.
pub fn nmi(core: &mut Core<'_>) -> Option<Exit> {
    core.vcpu.cpu.nmi_blocked = true;
    deliver(core, Event { external: true, ..Event::plain(vector::NMI) })
}

/// INT n, INT3 and INTO: the handler returns to `next_rip`, unless the delivery faults.
pub fn software(core: &mut Core<'_>, vector: u8, next_rip: u64) -> Option<Exit> {
    deliver(core, Event { check_dpl: true, return_to: Some(next_rip), ..Event::plain(vector) })
}

/// INT1: as `software`, without the check of privilege and with what else a debug exception does. It says nothing in DR6 but
/// what data breakpoints of a MOV SS before it have found: those are reported by the next debug exception, and this is one.
pub fn int1(core: &mut Core<'_>, next_rip: u64) -> Option<Exit> {
    let found = u64::from(std::mem::take(&mut core.vcpu.hits));
    enter_debug(&mut core.vcpu.cpu, &mut core.vcpu.stale.mode, found);
    deliver(core, Event { external: true, return_to: Some(next_rip), ..Event::plain(vector::DB) })
}

/// How an event combines with a fault in its delivery, SDM Vol. 3A Table 7-4 "Interrupt and Exception Classes".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(number: u8) -> Class {
    match number {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    error: Option<u32>,
    class: Class,
    /// Not of the program's own will: sets EXT in error codes of faults on the way.
    external: bool,
    /// The gate's DPL must admit the running code.
    check_dpl: bool,
    /// The RF that the handler's IRET restores is set, so that an instruction breakpoint does not fire twice.
    resume: bool,
    /// Where the handler returns to; else the current instruction.
    return_to: Option<u64>,
    fault: Option<GuestFault>,
}

impl Event {
    fn plain(vector: u8) -> Event {
        Event {
            vector,
            error: None,
            class: Class::Benign,
            external: false,
            check_dpl: false,
            resume: false,
            return_to: None,
            fault: None,
        }
    }

    fn of_fault(fault: GuestFault) -> Event {
        // Traps and instruction breakpoints leave RF as it is (SDM Vol. 3A 19.3.1.1); so does the abort #DF.
        let resume = match fault.vector {
            vector::DB => fault.dr6 & dr6::BD != 0,
            vector::NMI | vector::BP | vector::OF | vector::DF | vector::MC => false,
            _ => true,
        };
        Event {
            error: fault.error,
            class: class(fault.vector),
            external: true,
            resume,
            fault: Some(fault),
            ..Event::plain(fault.vector)
        }
    }

    fn ext(&self) -> u32 {
        if self.external { EXT } else { 0 }
    }

    /// A fault that names this event's gate.
    fn gate_fault(&self, kind: u8) -> Refusal {
        GuestFault::with_code(kind, (u32::from(self.vector) * 8) | IDT | self.ext()).into()
    }

    /// Adds EXT to a fault that names a selector.
    fn external(&self, mut fault: GuestFault) -> GuestFault {
        if fault.vector != vector::PF {
            fault.error = fault.error.map(|code| code | self.ext());
        }
        fault
    }

    fn refuse(&self, kind: u8, selector: u16) -> Refusal {
        self.external(selector_fault(kind, selector)).into()
    }
}

/// Why an event could not be delivered.
enum Refusal {
    Fault(GuestFault),
    Unsupported(&'static str),
}

impl From<GuestFault> for Refusal {
    fn from(fault: GuestFault) -> Self {
        Refusal::Fault(fault)
    }
}

fn deliver(core: &mut Core<'_>, event: Event) -> Option<Exit> {
    let before = core.vcpu.sampler.now(Doing::Deliver.word());
    let exit = deliver_untold(core, event);
    core.vcpu.sampler.now(before);
    exit
}

fn deliver_untold(core: &mut Core<'_>, mut event: Event) -> Option<Exit> {
    loop {
        if let Some(fault) = event.fault {
            note_cause(core, &fault);
        }
        match attempt(core, &event) {
            Ok(()) => {
                core.vcpu.cpu.interrupt_shadow = false;
                return None;
            }
            Err(Refusal::Unsupported(what)) => return Some(Exit::Unsupported(what.to_owned())),
            Err(Refusal::Fault(second)) => {
                event = match (event.class, class(second.vector)) {
                    (Class::DoubleFault, Class::Contributory | Class::PageFault) => return Some(Exit::TripleFault),
                    // SDM Vol. 3A Table 7-5 "Conditions for Generating a Double Fault".
                    (Class::Contributory, Class::Contributory)
                    | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                        if let Some(address) = second.address {
                            core.vcpu.cpu.cr2 = address.0;
                        }
                        Event::of_fault(GuestFault::with_code(vector::DF, 0))
                    }
                    _ => Event::of_fault(second),
                };
            }
        }
    }
}

/// What a fault leaves in CR2 and the debug registers before its handler runs.
fn note_cause(core: &mut Core<'_>, fault: &GuestFault) {
    if let Some(address) = fault.address {
        core.vcpu.cpu.cr2 = address.0;
    }
    if fault.vector == vector::DB {
        enter_debug(&mut core.vcpu.cpu, &mut core.vcpu.stale.mode, fault.dr6);
    }
}

/// SDM Vol. 3A 19.2.3 "Debug Status Register (DR6)": the breakpoint bits are those of this exception, the others pile up.
fn enter_debug(cpu: &mut CpuState, mode_is_stale: &mut bool, cause: u64) {
    if cause != 0 {
        cpu.dr[6] = cpu.dr[6] & !0xf | cause | dr6::FIXED;
    }
    if cpu.dr[7] & dr7::GD != 0 {
        cpu.dr[7] &= !dr7::GD;
        *mode_is_stale = true;
    }
    cpu.debugctl &= !DEBUGCTL_CLEARED;
}

fn attempt(core: &mut Core<'_>, event: &Event) -> Result<(), Refusal> {
    let cpu = &core.vcpu.cpu;
    if cpu.cr0 & cr0::PE == 0 {
        let return_to = event.return_to.unwrap_or(cpu.rip);
        Ok(real::deliver(core, event.vector, return_to)?)
    } else if cpu.is_long_mode() {
        attempt_long(core, event)
    } else if cpu.rflags & rflags::VM != 0 {
        Err(Refusal::Unsupported("virtual-8086 mode is not supported"))
    } else {
        attempt_protected(core, event)
    }
}

/// The return image of RFLAGS.
fn pushed_flags(cpu: &CpuState, event: &Event) -> u64 {
    if event.resume { cpu.rflags | rflags::RF } else { cpu.rflags }
}

/// RFLAGS in the handler.
fn handler_flags(cpu: &CpuState, gate_type: u8) -> u64 {
    let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
    // Types of interrupt gates are even, those of trap gates odd.
    if gate_type & 1 == 0 {
        cleared |= rflags::IF;
    }
    cpu.rflags & !cleared
}

/// The handler's code segment, checked; and the privilege level at which it runs.
fn handler_code(core: &mut Core<'_>, event: &Event, selector: u16) -> Result<(Descriptor, u8), Refusal> {
    if is_null(selector) {
        return Err(GuestFault::with_code(vector::GP, event.ext()).into());
    }
    let descriptor = Descriptor::fetch(core, selector, vector::GP).map_err(|fault| event.external(fault))?;
    let cpl = core.vcpu.cpu.cpl();
    if !descriptor.is_code() || descriptor.dpl() > cpl {
        return Err(event.refuse(vector::GP, selector));
    }
    if core.vcpu.cpu.is_long_mode() && (!descriptor.is_long() || descriptor.is_big()) {
        return Err(event.refuse(vector::GP, selector));
    }
    if !descriptor.is_present() {
        return Err(event.refuse(vector::NP, selector));
    }
    let level = if descriptor.is_conforming() { cpl } else { descriptor.dpl() };
    Ok((descriptor, level))
}

fn attempt_long(core: &mut Core<'_>, event: &Event) -> Result<(), Refusal> {
    let cpu = &core.vcpu.cpu;
    let (cpl, table) = (cpu.cpl(), cpu.idtr);
    let offset = u64::from(event.vector) * 16;
    if offset + 15 > u64::from(table.limit) {
        return Err(event.gate_fault(vector::GP));
    }
    let place = Gva(table.base).add(offset);
    let low = core.read_as(place, 8, Access::system(false))?;
    let high = core.read_as(place.add(8), 8, Access::system(false))?;
    let gate = Descriptor { address: place, raw: low };
    let is_gate = matches!(gate.kind(), system_type::INTERRUPT_GATE | system_type::TRAP_GATE);
    if !gate.is_system() || !is_gate || (event.check_dpl && gate.dpl() < cpl) {
        return Err(event.gate_fault(vector::GP));
    }
    if !gate.is_present() {
        return Err(event.gate_fault(vector::NP));
    }
    let selector = (low >> 16) as u16;
    let (code, level) = handler_code(core, event, selector)?;
    let entry = Gva(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32);

    let stack_slot = (low >> 32 & 7) as u8;
    let changes_level = level < cpl;
    let rsp = match (stack_slot, changes_level) {
        (0, false) => core.vcpu.cpu.gpr[x86::state::gpr::RSP],
        (0, true) => stack_from_tss(core, event, 4 + u64::from(level) * 8)?,
        (slot, _) => stack_from_tss(core, event, 36 + u64::from(slot - 1) * 8)?,
    };
    if !Gva(rsp).is_canonical() {
        return Err(event.external(GuestFault::SS0).into());
    }
    if !entry.is_canonical() {
        return Err(event.external(GuestFault::GP0).into());
    }

    let cpu = &core.vcpu.cpu;
    let image = [
        u64::from(cpu.segments[seg::SS].selector),
        cpu.gpr[x86::state::gpr::RSP],
        pushed_flags(cpu, event),
        u64::from(cpu.segments[seg::CS].selector),
        event.return_to.unwrap_or(cpu.rip),
        event.error.map_or(0, u64::from),
    ];
    let pushed = if event.error.is_some() { &image[..] } else { &image[..5] };
    let mut stack = Stack::fresh(rsp & !0xf, level);
    stack.push_all(core, pushed).map_err(|fault| event.external(fault))?;
    code.touch(core)?;

    let flags = handler_flags(&core.vcpu.cpu, gate.kind());
    segment::set_code(core, code.segment(selector & !3 | u16::from(level)));
    let cpu = &mut core.vcpu.cpu;
    if changes_level {
        cpu.segments[seg::SS] = segment::null_segment(u16::from(level), level);
    }
    stack.commit(cpu);
    cpu.rflags = flags;
    cpu.rip = entry.0;
    Ok(())
}

/// Reads a stack pointer from the 64-bit TSS, SDM Vol. 3A Figure 9-11 "64-Bit TSS Format".
fn stack_from_tss(core: &mut Core<'_>, event: &Event, offset: u64) -> Result<u64, Refusal> {
    let tss: Segment = core.vcpu.cpu.tr;
    if offset + 7 > u64::from(tss.limit) {
        return Err(event.refuse(vector::TS, tss.selector));
    }
    Ok(core.read_as(Gva(tss.base).add(offset), 8, Access::system(false))?)
}

/// Reads RSP0-2 for a call gate that raises the privilege level to `level`.
pub(crate) fn stack_for_level(core: &mut Core<'_>, level: u8) -> Result<u64, GuestFault> {
    let tss = core.vcpu.cpu.tr;
    let offset = 4 + u64::from(level) * 8;
    if offset + 7 > u64::from(tss.limit) {
        return Err(selector_fault(vector::TS, tss.selector));
    }
    core.read_as(Gva(tss.base).add(offset), 8, Access::system(false))
}

/// 32-bit protected mode, handler at the same privilege level.
fn attempt_protected(core: &mut Core<'_>, event: &Event) -> Result<(), Refusal> {
    let cpu = &core.vcpu.cpu;
    let (cpl, table) = (cpu.cpl(), cpu.idtr);
    let offset = u64::from(event.vector) * 8;
    if offset + 7 > u64::from(table.limit) {
        return Err(event.gate_fault(vector::GP));
    }
    let place = Gva(table.base.wrapping_add(offset) & 0xffff_ffff);
    let raw = core.read_as(place, 8, Access::system(false))?;
    let gate = Descriptor { address: place, raw };
    // 286 gates push 16-bit words, 386 gates 32-bit ones; task gates are another matter.
    let size = match (gate.is_system(), gate.kind()) {
        (true, 6 | 7) => 2,
        (true, 14 | 15) => 4,
        (true, 5) => return Err(Refusal::Unsupported("task gates are not supported")),
        _ => return Err(event.gate_fault(vector::GP)),
    };
    if event.check_dpl && gate.dpl() < cpl {
        return Err(event.gate_fault(vector::GP));
    }
    if !gate.is_present() {
        return Err(event.gate_fault(vector::NP));
    }
    let selector = (raw >> 16) as u16;
    let (code, level) = handler_code(core, event, selector)?;
    if level != cpl {
        return Err(Refusal::Unsupported("an interrupt of 32-bit user code outside long mode is not supported yet"));
    }
    let entry = if size == 2 { raw & 0xffff } else { raw & 0xffff | raw >> 32 & 0xffff_0000 };
    let target = code.segment(selector & !3 | u16::from(level));
    if entry > u64::from(target.limit) {
        return Err(event.external(GuestFault::GP0).into());
    }
    let cpu = &core.vcpu.cpu;
    let image =
        [pushed_flags(cpu, event), u64::from(cpu.segments[seg::CS].selector), event.return_to.unwrap_or(cpu.rip)];
    let mut stack = Stack::current(core);
    for value in image.into_iter().chain(event.error.map(u64::from)) {
        stack.push(core, size, value).map_err(|fault| event.external(fault))?;
    }
    code.touch(core)?;
    let flags = handler_flags(&core.vcpu.cpu, gate.kind());
    segment::set_code(core, target);
    let cpu = &mut core.vcpu.cpu;
    stack.commit(cpu);
    cpu.rflags = flags;
    cpu.rip = entry;
    Ok(())
}
