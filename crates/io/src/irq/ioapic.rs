//! The I/O APIC: 24 pins, each with a redirection entry that says which message its line sends to the local APICs.
//! Source: Intel 82093AA (order number 290566-001); the EOI register: Intel ICH2 (290687) 8.5 "APIC Registers".

use super::message::{DeliveryMode, Message};

pub const PINS: usize = 24;
/// Version 0x20 has the EOI register, which Linux then uses for level interrupts that it ends early.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger mode, mask, destination. Delivery status and remote IRR
/// are read-only.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

#[derive(Clone, Copy, Debug)]
struct Pin {
    entry: u64,
    /// The line is asserted. Polarity is a matter of wiring: a line here is asserted or not.
    asserted: bool,
}

/// The registers. What it sends goes to a function that tells whether some local APIC took it.
#[derive(Clone, Debug)]
pub struct IoApic {
    id: u32,
    select: u32,
    pins: [Pin; PINS],
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    #[must_use]
    pub fn new() -> Self {
        IoApic { id: 0, select: 0, pins: [Pin { entry: MASKED, asserted: false }; PINS] }
    }

    /// Drive a pin.
    pub fn set_pin(&mut self, pin: usize, asserted: bool, send: &mut dyn FnMut(Message) -> bool) {
        let Some(pin) = self.pins.get_mut(pin) else { return };
        let rising = asserted && !pin.asserted;
        pin.asserted = asserted;
        if pin.entry & LEVEL != 0 {
            pin.send_level(send);
        } else if rising && pin.entry & MASKED == 0 {
            // An edge on a masked pin is ignored, 82093AA 3.2.4 "IOREDTBL", Interrupt Mask.
            send(pin.message());
        }
    }

    /// A local APIC has ended a level interrupt: pins with this vector may send again.
    pub fn end_of_interrupt(&mut self, vector: u8, send: &mut dyn FnMut(Message) -> bool) {
        for pin in &mut self.pins {
            if pin.entry & LEVEL != 0 && pin.entry as u8 == vector && pin.entry & REMOTE_IRR != 0 {
                pin.entry &= !REMOTE_IRR;
                pin.send_level(send);
            }
        }
    }

    /// Read the memory-mapped register at `offset`.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => self.select,
            0x10 => self.read_selected(),
            _ => 0,
        }
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            0 | 2 => self.id << 24,
            1 => VERSION,
            select => {
                let entry = self.pins.get(Self::pin_of(select)).map_or(0, |pin| pin.entry);
                (entry >> (32 * (select & 1))) as u32
            }
        }
    }

    /// The pin that a register from 0x10 on belongs to; past the last for others.
    fn pin_of(select: u32) -> usize {
        select.checked_sub(0x10).map_or(PINS, |register| register as usize / 2)
    }

    /// Write the memory-mapped register at `offset`.
    pub fn write(&mut self, offset: u64, value: u32, send: &mut dyn FnMut(Message) -> bool) {
        match offset {
            0x00 => self.select = value & 0xff,
            0x10 => self.write_selected(value, send),
            0x40 => self.end_of_interrupt(value as u8, send),
            _ => {}
        }
    }

    fn write_selected(&mut self, value: u32, send: &mut dyn FnMut(Message) -> bool) {
        if self.select == 0 {
            self.id = value >> 24 & 0xf;
            return;
        }
        let Some(pin) = self.pins.get_mut(Self::pin_of(self.select)) else { return };
        let shift = 32 * (self.select & 1);
        let changed = pin.entry & !(0xffff_ffff << shift) | u64::from(value) << shift;
        pin.entry = pin.entry & !WRITABLE | changed & WRITABLE;
        if pin.entry & LEVEL == 0 {
            // Linux ends a stuck level interrupt by making the pin an edge for a moment (__eoi_ioapic_pin).
            pin.entry &= !REMOTE_IRR;
        } else {
            pin.send_level(send);
        }
    }
}

impl Pin {
    fn message(&self) -> Message {
        let logical = self.entry & 1 << 11 != 0;
        let destination = (self.entry >> 56) as u32;
        Message {
            vector: self.entry as u8,
            mode: DeliveryMode::from_bits((self.entry >> 8) as u32),
            // Eight bits of ones address everybody, whatever the width of the receivers' own identifiers.
            destination: if destination == 0xff && !logical { u32::MAX } else { destination },
            logical,
            level: self.entry & LEVEL != 0,
        }
    }

    /// Send for an asserted level pin, unless it has sent and not been ended.
    fn send_level(&mut self, send: &mut dyn FnMut(Message) -> bool) {
        if self.asserted && self.entry & (MASKED | REMOTE_IRR) == 0 && send(self.message()) {
            self.entry |= REMOTE_IRR;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        ioapic: IoApic,
        sent: Vec<Message>,
    }

    impl Bench {
        fn new() -> Self {
            Bench { ioapic: IoApic::new(), sent: Vec::new() }
        }

        fn write(&mut self, register: u32, value: u32) {
            let sent = &mut self.sent;
            let mut send = |message| {
                sent.push(message);
                true
            };
            self.ioapic.write(0, register, &mut send);
            self.ioapic.write(0x10, value, &mut send);
        }

        fn read(&mut self, register: u32) -> u32 {
            self.ioapic.write(0, register, &mut |_| unreachable!());
            self.ioapic.read(0x10)
        }

        fn pin(&mut self, pin: usize, asserted: bool) {
            let sent = &mut self.sent;
            self.ioapic.set_pin(pin, asserted, &mut |message| {
                sent.push(message);
                true
            });
        }

        fn end(&mut self, vector: u8) {
            let sent = &mut self.sent;
            self.ioapic.end_of_interrupt(vector, &mut |message| {
                sent.push(message);
                true
            });
        }
    }

    #[test]
    fn registers_as_linux_finds_them() {
        let mut bench = Bench::new();
        assert_eq!(bench.read(1), 0x0017_0020);
        bench.write(0, 0x0500_0000);
        assert_eq!(bench.read(0), 0x0500_0000);
        assert_eq!(bench.read(0x10), 0x1_0000, "masked after reset");
        assert_eq!(bench.read(0x40), 0, "past the last pin");
        bench.write(0x3f, 0xab00_0000);
        assert_eq!(bench.read(0x3f), 0xab00_0000);
        bench.write(0xff, 1);
    }

    #[test]
    fn an_edge_sends_once_and_not_when_masked() {
        let mut bench = Bench::new();
        bench.pin(4, true);
        bench.pin(4, false);
        bench.write(0x19, 0x0100_0000);
        bench.write(0x18, 0x0000_0824 | 1 << 8);
        assert!(bench.sent.is_empty());
        bench.pin(4, true);
        bench.pin(4, true);
        let expected =
            Message { vector: 0x24, mode: DeliveryMode::LowestPriority, destination: 1, logical: true, level: false };
        assert_eq!(bench.sent, [expected]);
    }

    #[test]
    fn a_level_sends_until_it_falls() {
        let mut bench = Bench::new();
        bench.write(0x10 + 18, 0x8031);
        bench.pin(9, true);
        bench.pin(9, true);
        assert_eq!(bench.sent.len(), 1);
        assert_eq!(bench.read(0x10 + 18), 0xc031, "remote IRR");
        bench.end(0x32);
        assert_eq!(bench.sent.len(), 1, "another vector");
        bench.end(0x31);
        assert_eq!(bench.sent.len(), 2, "still asserted: sent again");
        bench.pin(9, false);
        bench.ioapic.write(0x40, 0x31, &mut |_| unreachable!());
        assert_eq!(bench.read(0x10 + 18), 0x8031);
    }

    #[test]
    fn a_level_that_nobody_takes_is_offered_again() {
        let mut bench = Bench::new();
        bench.write(0x10 + 18, 0x8031);
        bench.ioapic.set_pin(9, true, &mut |_| false);
        assert_eq!(bench.read(0x10 + 18), 0x8031);
        bench.write(0x10 + 18, 0x8031);
        assert_eq!(bench.sent.len(), 1);
    }

    #[test]
    fn a_stuck_level_is_freed_by_an_edge_entry() {
        let mut bench = Bench::new();
        bench.write(0x10 + 18, 0x8031);
        bench.pin(9, true);
        bench.write(0x10 + 18, 0x1_0031);
        bench.write(0x10 + 18, 0x8031);
        assert_eq!(bench.sent.len(), 2);
    }

    #[test]
    fn all_ones_is_everybody() {
        let mut bench = Bench::new();
        bench.write(0x11, 0xff00_0000);
        bench.write(0x10, 0x0040);
        bench.pin(0, true);
        assert_eq!(bench.sent[0].destination, u32::MAX);
    }
}
