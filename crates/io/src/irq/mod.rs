//! Interrupts: from a device's line through the PIC and the I/O APIC to the local APICs, and out to the processors.
//!
//! A line is shared: it is asserted while any of its sources asserts it (COM1 and COM3 are both on line 4). ISA line n
//! is PIC line n and I/O APIC pin n, but for the timer: line 0 is pin 2, as the MADT's override says, because pin 0
//! belongs to the PIC's output.

pub mod ioapic;
pub mod lapic;
pub mod message;
pub mod pic;
pub mod ports;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use host::counters::Counters;
use host::lock::{Rank, RankedMutex};
use x86::{Gpa, GuestFault, msr};

use crate::bus::AccessSize;
use crate::timer::TimerQueue;
use ioapic::IoApic;
pub use lapic::attention;
use lapic::{Effect, Illegal, LocalApic, Shorthand};
use message::{DeliveryMode, Message};
use pic::{Pic, PicPort};

/// Called with a processor's number when there is something new for it to look at. It may be called from any thread and
/// with locks of this crate held, so it must not call back into the platform.
pub type Kick = Arc<dyn Fn(usize) + Send + Sync>;

const ISA_LINES: usize = 16;
/// Where the I/O APIC's registers are.
pub const IOAPIC_PAGE: Gpa = Gpa(0xfec0_0000);
/// The timer's I/O APIC pin, and the pin of the PIC's output.
const TIMER_PIN: usize = 2;
const PIC_PIN: usize = 0;

/// What a processor is to take next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// Be as after INIT; a processor that is not the bootstrap one then waits for [`Interrupt::Startup`].
    /// Confirm with [`Fabric::take_init`].
    Init,
    /// Start in real mode; [`Fabric::take_startup`] returns the vector: the address divided by 4096.
    Startup,
    /// Take the NMI, unless one is in progress. Confirm with [`Fabric::take_nmi`].
    Nmi,
    /// If interrupts are enabled, take the one whose vector [`Fabric::acknowledge`] returns.
    External,
}

/// All interrupt hardware of a VM.
pub struct Fabric {
    wiring: RankedMutex<Wiring>,
    cpus: Box<[Arc<LocalApic>]>,
    /// Where the next search for a "lowest priority" receiver begins, so that equals take turns.
    turn: AtomicUsize,
    counters: Arc<Counters>,
}

struct Wiring {
    /// For each line, the sources that assert it, one bit each.
    asserted: [u32; ISA_LINES],
    sources: [u32; ISA_LINES],
    pic: Pic,
    pic_output: bool,
    ioapic: IoApic,
}

/// The bit of the sources for which there is none of their own.
const SHARED_SOURCE: u32 = 1 << 31;

/// One source on an ISA line.
pub struct IrqLine {
    fabric: Arc<Fabric>,
    line: usize,
    source: u32,
}

impl IrqLine {
    /// Assert the line, or let it go. The caller keeps its own level, to not call for nothing.
    pub fn set(&self, level: bool) {
        self.fabric.set_line(self.line, self.source, level);
    }
}

impl Drop for IrqLine {
    /// A source that is gone asserts nothing, and another may have its bit.
    fn drop(&mut self) {
        self.set(false);
        let mut wiring = self.fabric.wiring.lock();
        if let Some(used) = wiring.sources.get_mut(self.line).filter(|_| self.source != SHARED_SOURCE) {
            *used &= !self.source;
        }
    }
}

impl Fabric {
    /// The interrupt hardware for `cpus` processors, whose APIC identifiers are their numbers.
    #[must_use]
    pub fn new(
        cpus: usize,
        apic_timer_hz: u64,
        timers: &Arc<TimerQueue>,
        kick: &Kick,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        let wiring = Wiring {
            asserted: [0; ISA_LINES],
            sources: [0; ISA_LINES],
            pic: Pic::new(),
            pic_output: false,
            ioapic: IoApic::new(),
        };
        Arc::new(Fabric {
            wiring: RankedMutex::new(Rank::Wiring, wiring),
            cpus: (0..cpus).map(|cpu| LocalApic::new(cpu, apic_timer_hz, timers, Arc::clone(kick))).collect(),
            turn: AtomicUsize::new(0),
            counters,
        })
    }

    /// What firmware leaves behind: the PIC reaches the bootstrap processor, and the interrupts of ACPI (line 9) and of the
    /// PCI bus (10 and 11) are levels.
    pub fn set_up_as_firmware(&self) {
        if let Some(bootstrap) = self.cpus.first() {
            bootstrap.set_virtual_wire();
        }
        self.write_pic(PicPort::SlaveElcr, 0b1110);
    }

    /// A new source on an ISA line (0-15; others are wired to nothing).
    #[must_use]
    pub fn line(self: &Arc<Self>, line: u8) -> IrqLine {
        let line = usize::from(line);
        let mut wiring = self.wiring.lock();
        let source = match wiring.sources.get_mut(line) {
            Some(used) => {
                // A 32nd source and those behind it share the last bit; on the fullest line are 16 slots of the PCI bus.
                let source = 1 << used.trailing_ones().min(31);
                *used |= source;
                source
            }
            None => 0,
        };
        drop(wiring);
        IrqLine { fabric: Arc::clone(self), line, source }
    }

    fn set_line(&self, line: usize, source: u32, level: bool) {
        let mut wiring = self.wiring.lock();
        let Some(asserted) = wiring.asserted.get_mut(line) else { return };
        let before = *asserted != 0;
        *asserted = if level { *asserted | source } else { *asserted & !source };
        let after = *asserted != 0;
        if before == after {
            return;
        }
        wiring.pic.set_line(line as u8, after);
        self.follow_pic(&mut wiring);
        // Line 2 is inside the PIC; pin 2 is the timer's.
        match line {
            0 => self.set_pin(&mut wiring, TIMER_PIN, after),
            2 => {}
            line => self.set_pin(&mut wiring, line, after),
        }
    }

    fn set_pin(&self, wiring: &mut Wiring, pin: usize, level: bool) {
        wiring.ioapic.set_pin(pin, level, &mut |message| self.deliver(&message, None, Shorthand::Destination));
    }

    /// The PIC's output goes to everybody's LINT0 and to a pin of the I/O APIC.
    fn follow_pic(&self, wiring: &mut Wiring) {
        let output = wiring.pic.output();
        if output != wiring.pic_output {
            wiring.pic_output = output;
            self.cpus.iter().for_each(|cpu| cpu.set_lint0(output));
            self.set_pin(wiring, PIC_PIN, output);
        }
    }

    // ---- messages --------------------------------------------------------------------------------------------------

    /// A message from a device that signals its interrupts by writes.
    pub fn send(&self, message: &Message) {
        self.deliver(message, None, Shorthand::Destination);
    }

    /// Hand a message to those whom it is for. `from` is the sending processor. False if nobody took it.
    fn deliver(&self, message: &Message, from: Option<usize>, shorthand: Shorthand) -> bool {
        let sender = from.unwrap_or(usize::MAX);
        match shorthand {
            Shorthand::Oneself => return self.cpus.get(sender).is_some_and(|cpu| cpu.accept(message)),
            Shorthand::All | Shorthand::Others => {
                let mut taken = false;
                for (number, cpu) in self.cpus.iter().enumerate() {
                    if shorthand == Shorthand::All || number != sender {
                        taken |= cpu.accept(message);
                    }
                }
                return taken;
            }
            Shorthand::Destination => {}
        }
        if !message.logical && message.destination != u32::MAX {
            // The usual case: one processor by its identifier, which is its number.
            return self.cpus.get(message.destination as usize).is_some_and(|cpu| cpu.accept(message));
        }
        if message.mode == DeliveryMode::LowestPriority {
            return self.least_busy(message).is_some_and(|cpu| cpu.accept(message));
        }
        let mut taken = false;
        for cpu in &self.cpus {
            if cpu.matches(message.destination, message.logical) {
                taken |= cpu.accept(message);
            }
        }
        taken
    }

    fn least_busy(&self, message: &Message) -> Option<&LocalApic> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.cpus.len().max(1);
        let (before, from) = self.cpus.split_at_checked(turn)?;
        from.iter()
            .chain(before)
            .filter(|cpu| cpu.matches(message.destination, message.logical))
            .filter_map(|cpu| Some((cpu.arbitration_priority()? & 0xf0, cpu)))
            .min_by_key(|(priority, _)| *priority)
            .map(|(_, cpu)| &**cpu)
    }

    fn carry_out(&self, cpu: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Kept => self.counters.interrupts_ipi.add(1),
            Effect::EndOfLevel(vector) => {
                let mut wiring = self.wiring.lock();
                wiring
                    .ioapic
                    .end_of_interrupt(vector, &mut |message| self.deliver(&message, None, Shorthand::Destination));
            }
            Effect::Send(message, shorthand) => {
                self.counters.interrupts_ipi.add(1);
                self.deliver(&message, Some(cpu), shorthand);
            }
        }
    }

    // ---- the processors' side ----------------------------------------------------------------------------------------

    /// What waits for a processor: bits of [`attention`], 0 for nothing. One atomic load.
    #[inline]
    #[must_use]
    pub fn attention(&self, cpu: usize) -> u32 {
        self.cpus.get(cpu).map_or(0, |cpu| cpu.attention())
    }

    /// The same as a choice: the first in the order of priority.
    #[inline]
    #[must_use]
    pub fn pending(&self, cpu: usize) -> Option<Interrupt> {
        match self.attention(cpu) {
            0 => None,
            word if word & attention::INIT != 0 => Some(Interrupt::Init),
            word if word & attention::STARTUP != 0 => Some(Interrupt::Startup),
            word if word & attention::NMI != 0 => Some(Interrupt::Nmi),
            _ => Some(Interrupt::External),
        }
    }

    /// The processor's acknowledge cycle: the vector of the interrupt that it takes now. None if there is none left,
    /// because the line fell or another processor was faster.
    #[must_use]
    pub fn acknowledge(&self, cpu: usize) -> Option<u8> {
        let apic = self.cpus.get(cpu)?;
        if apic.attention() & attention::PIC != 0 {
            self.counters.interrupts_pic.add(1);
            let mut wiring = self.wiring.lock();
            apic.take_pic();
            let vector = wiring.pic.acknowledge();
            // INTR falls with the acknowledgement, and rises again if there is more: an edge for those who look for one.
            if wiring.pic.output() && wiring.pic_output {
                wiring.pic_output = false;
                self.cpus.iter().for_each(|cpu| cpu.set_lint0(false));
                self.set_pin(&mut wiring, PIC_PIN, false);
            }
            self.follow_pic(&mut wiring);
            return Some(vector);
        }
        let vector = apic.acknowledge();
        if vector.is_some() {
            self.counters.interrupts_apic.add(1);
        }
        vector
    }

    /// Take the NMI; false if there is none any more.
    #[must_use]
    pub fn take_nmi(&self, cpu: usize) -> bool {
        self.cpus.get(cpu).is_some_and(|cpu| cpu.take_nmi())
    }

    /// The processor handles an NMI still, and keeps one of those that came meanwhile for later.
    pub fn merge_nmis(&self, cpu: usize) {
        if let Some(cpu) = self.cpus.get(cpu) {
            cpu.merge_nmis();
        }
    }

    /// Take the INIT: the local APIC resets itself, the caller resets the processor.
    #[must_use]
    pub fn take_init(&self, cpu: usize) -> bool {
        self.cpus.get(cpu).is_some_and(|cpu| cpu.take_init())
    }

    /// Take the start-up message: the caller starts the processor at vector * 4096.
    #[must_use]
    pub fn take_startup(&self, cpu: usize) -> Option<u8> {
        self.cpus.get(cpu)?.take_startup()
    }

    // ---- registers ---------------------------------------------------------------------------------------------------

    /// The local APIC whose page this address is, as `cpu` sees it.
    #[inline]
    fn at(&self, cpu: usize, address: Gpa) -> Option<&LocalApic> {
        self.cpus.get(cpu).filter(|cpu| cpu.is_at(address)).map(|cpu| &**cpu)
    }

    /// Read the local APIC's page; None if it is not there.
    #[must_use]
    pub fn read_apic_page(&self, cpu: usize, address: Gpa, size: AccessSize) -> Option<u64> {
        Some(self.at(cpu, address)?.read_page(address.offset(), size))
    }

    /// Write the local APIC's page; false if it is not there.
    pub fn write_apic_page(&self, cpu: usize, address: Gpa, size: AccessSize, value: u64) -> bool {
        let Some(apic) = self.at(cpu, address) else { return false };
        let effect = apic.write_page(address.offset(), size, value);
        self.carry_out(cpu, effect);
        true
    }

    /// Read IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// #GP(0) for others, and as the mode of the APIC demands.
    pub fn read_msr(&self, cpu: usize, number: u32) -> Result<u64, GuestFault> {
        let apic = self.cpus.get(cpu).ok_or(GuestFault::GP0)?;
        match number {
            msr::APIC_BASE => Ok(apic.base()),
            msr::TSC_DEADLINE => Ok(apic.tsc_deadline()),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => apic.read_x2apic((number & 0xff) as u8).map_err(general_protection),
            _ => Err(GuestFault::GP0),
        }
    }

    /// Write IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register. Physical addresses have `address_bits` bits.
    ///
    /// # Errors
    /// #GP(0) for others, for reserved bits, and as the mode of the APIC demands.
    pub fn write_msr(&self, cpu: usize, number: u32, value: u64, address_bits: u32) -> Result<(), GuestFault> {
        let apic = self.cpus.get(cpu).ok_or(GuestFault::GP0)?;
        match number {
            msr::APIC_BASE => apic.set_base(value, address_bits).map_err(general_protection)?,
            msr::TSC_DEADLINE => apic.set_tsc_deadline(value),
            msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                let effect = apic.write_x2apic((number & 0xff) as u8, value).map_err(general_protection)?;
                self.carry_out(cpu, effect);
            }
            _ => return Err(GuestFault::GP0),
        }
        Ok(())
    }

    /// The guest has moved this processor's TSC: it reads the clock's plus `ahead` (wrapping).
    pub fn set_tsc_ahead(&self, cpu: usize, ahead: u64) {
        if let Some(cpu) = self.cpus.get(cpu) {
            cpu.set_tsc_ahead(ahead);
        }
    }

    /// The task priority of a processor. One atomic load.
    #[inline]
    #[must_use]
    pub fn task_priority(&self, cpu: usize) -> u8 {
        self.cpus.get(cpu).map_or(0, |cpu| cpu.task_priority())
    }

    pub fn set_task_priority(&self, cpu: usize, value: u8) {
        if let Some(cpu) = self.cpus.get(cpu) {
            cpu.set_task_priority(value);
        }
    }

    #[must_use]
    pub fn read_pic(&self, port: PicPort) -> u8 {
        let mut wiring = self.wiring.lock();
        let value = wiring.pic.read(port);
        self.follow_pic(&mut wiring);
        value
    }

    pub fn write_pic(&self, port: PicPort, value: u8) {
        let mut wiring = self.wiring.lock();
        wiring.pic.write(port, value);
        self.follow_pic(&mut wiring);
    }

    #[must_use]
    pub fn read_ioapic(&self, offset: u64) -> u32 {
        self.wiring.lock().ioapic.read(offset)
    }

    pub fn write_ioapic(&self, offset: u64, value: u32) {
        let mut wiring = self.wiring.lock();
        wiring.ioapic.write(offset, value, &mut |message| self.deliver(&message, None, Shorthand::Destination));
    }
}

fn general_protection(_: Illegal) -> GuestFault {
    GuestFault::GP0
}
