//! The machine as one processor's instructions see it: ports, memory-mapped registers and the local APIC.

use host::sampler::Sampler;
use io::bus::AccessSize;
use io::platform::Platform;
use processor::Outside;
use processor::profile::Doing;
use x86::{Gpa, msr};

/// How often the processor went outside, by kind. It belongs to the processor's thread, so counting costs one add.
#[derive(Clone, Copy, Debug, Default)]
pub struct Visits {
    pub port_reads: u64,
    pub port_writes: u64,
    pub mmio_reads: u64,
    pub mmio_writes: u64,
    pub apic: u64,
}

/// One processor's view. What it does that concerns a processor (an EOI or a lower task priority that lets an interrupt
/// through, an interprocessor interrupt, itself included) comes back as a kick.
pub struct View<'a> {
    pub platform: &'a Platform,
    pub processor: usize,
    pub visits: &'a mut Visits,
    pub sampler: &'a Sampler,
}

impl View<'_> {
    /// Does something that the profile counts for itself.
    fn during<T>(&self, doing: Doing, action: impl FnOnce() -> T) -> T {
        let before = self.sampler.now(doing.word());
        let result = action();
        self.sampler.now(before);
        result
    }
}

fn width(size: u8) -> AccessSize {
    AccessSize::from_bytes(usize::from(size)).unwrap_or(AccessSize::Byte)
}

impl Outside for View<'_> {
    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        self.visits.port_reads += 1;
        self.during(Doing::Port, || self.platform.port_read(port, width(size)))
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.visits.port_writes += 1;
        self.during(Doing::Port, || self.platform.port_write(port, width(size), value));
    }

    fn mmio_read(&mut self, address: Gpa, size: u8) -> u64 {
        self.visits.mmio_reads += 1;
        self.during(Doing::Mmio, || self.platform.mmio_read(self.processor, address, width(size)))
    }

    fn mmio_write(&mut self, address: Gpa, size: u8, value: u64) {
        self.visits.mmio_writes += 1;
        self.during(Doing::Mmio, || self.platform.mmio_write(self.processor, address, width(size), value));
    }

    fn apic_read(&mut self, number: u32) -> Option<u64> {
        self.visits.apic += 1;
        self.during(Doing::Apic, || self.platform.msr_read(self.processor, number)).ok()
    }

    fn apic_write(&mut self, number: u32, value: u64) -> bool {
        self.visits.apic += 1;
        self.during(Doing::Apic, || self.platform.msr_write(self.processor, number, value)).is_ok()
    }

    fn task_priority(&self) -> u8 {
        self.platform.task_priority(self.processor)
    }

    fn set_task_priority(&mut self, value: u8) {
        self.during(Doing::Apic, || self.platform.set_task_priority(self.processor, value));
    }

    fn apic_id(&self) -> u32 {
        // The fabric gives APIC identifiers in the order of the processors.
        self.processor as u32
    }

    fn apic_enabled(&self) -> bool {
        const ENABLED: u64 = 1 << 11;
        self.platform.msr_read(self.processor, msr::APIC_BASE).is_ok_and(|base| base & ENABLED != 0)
    }
}
