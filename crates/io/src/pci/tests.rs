//! The bus as a guest sees it, through its ports and its window.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use host::clock::Clock;
use host::lock::RankedMutex;

use super::config::Config;
use super::*;
use crate::irq::Kick;
use crate::irq::pic::PicPort;
use crate::timer::TimerQueue;
use AccessSize::{Byte, Dword, Qword, Word};

/// BAR, offset and value of each.
type Writes = Arc<Mutex<Vec<(usize, u64, u64)>>>;

/// Remembers what was written, and answers with the offset.
struct Echo(Writes);

impl Function for Echo {
    fn read(&mut self, _bar: usize, offset: u64, _size: AccessSize) -> u64 {
        offset
    }

    fn write(&mut self, bar: usize, offset: u64, _size: AccessSize, value: u64) {
        self.0.lock().unwrap().push((bar, offset, value));
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.lock().unwrap().push(DROPPED);
    }
}

/// What an [`Echo`] leaves behind.
const DROPPED: (usize, u64, u64) = (usize::MAX, 0, 0);

struct Bench {
    host: Arc<RankedMutex<Host>>,
    fabric: Arc<Fabric>,
    interrupts: Arc<Interrupts>,
    presence: Arc<Presence>,
    written: Writes,
    reasons: Arc<Mutex<Vec<&'static str>>>,
}

const ECHO: Identity =
    Identity { vendor: 0x1234, device: 0x5678, revision: 0, class: 0xff_0000, subsystem_vendor: 0, subsystem: 0 };
const MSIX: MsixPlace = MsixPlace { bar: 0, table: 0x1000, pending: 0x2000, vectors: 3 };

fn bench() -> Bench {
    let timers = TimerQueue::new(Clock::manual(1_000_000_000), Arc::default());
    let kick: Kick = Arc::new(|_| {});
    let fabric = Fabric::new(2, 1_000_000_000, &timers, &kick, Arc::default());
    fabric.set_up_as_firmware();
    let reasons = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&reasons);
    let host = Host::new(Arc::clone(&fabric), Arc::new(move |reason| told.lock().unwrap().push(reason)));
    let slot = host.lock().free_slot().unwrap();
    let written = Arc::default();
    let (card, interrupts) = echo(&slot, &written);
    let presence = host.lock().insert(&slot, card);
    Bench { host, fabric, interrupts, presence, written, reasons }
}

fn echo(slot: &Slot, written: &Writes) -> (Card, Arc<Interrupts>) {
    let mut config = Config::new(ECHO);
    config.add_memory_bar(0, 0x4000, slot.window);
    config.set_interrupt(slot.line);
    let interrupts = slot.interrupts(MSIX.vectors);
    let echo = Box::new(Echo(Arc::clone(written)));
    (Card::new(config, Arc::clone(&interrupts), Some(MSIX), echo), interrupts)
}

impl Bench {
    fn select(&self, slot: u32, register: u32) {
        PortDevice::write(&mut *self.host.lock(), 0, Dword, 1 << 31 | slot << 11 | register);
    }

    fn config(&self, slot: u32, register: u32, size: AccessSize) -> u32 {
        self.select(slot, register & !3);
        PortDevice::read(&mut *self.host.lock(), 4 + (register & 3) as u16, size) & size.mask() as u32
    }

    fn set_config(&self, slot: u32, register: u32, size: AccessSize, value: u32) {
        self.select(slot, register & !3);
        PortDevice::write(&mut *self.host.lock(), 4 + (register & 3) as u16, size, value);
    }

    fn load(&self, offset: u64, size: AccessSize) -> u64 {
        MmioDevice::read(&mut *self.host.lock(), SLOT_BYTES + offset, size)
    }

    fn store(&self, offset: u64, size: AccessSize, value: u64) {
        MmioDevice::write(&mut *self.host.lock(), SLOT_BYTES + offset, size, value);
    }

    /// Switches both local APICs on, without which they take nothing.
    fn enable_apics(&self) {
        for cpu in 0..2 {
            self.fabric.write_apic_page(cpu, Gpa(0xfee0_00f0), Dword, 0x1ff);
        }
    }

    /// The MSI-X capability's place.
    fn msix(&self) -> u32 {
        self.config(1, 0x34, Byte)
    }

    fn is_line_asserted(&self, line: u8) -> bool {
        self.fabric.write_pic(PicPort::SlaveCommand, 0x0a);
        self.fabric.read_pic(PicPort::SlaveCommand) & 1 << (line - 8) != 0
    }
}

#[test]
fn the_guest_finds_what_is_there_and_nothing_else() {
    let bench = bench();
    assert_eq!(bench.config(0, 0, Dword), 0x0008_1b36);
    assert_eq!(bench.config(0, 10, Word), 0x0600, "a host bridge");
    assert_eq!(bench.config(0, 0x34, Byte), 0);
    assert_eq!((bench.config(1, 0, Word), bench.config(1, 2, Word)), (0x1234, 0x5678));
    assert_eq!(bench.config(1, 3, Byte), 0x56);
    assert_eq!(bench.config(2, 0, Dword), u32::MAX);
    for address in [1 << 11, 1 << 31 | 1 << 11 | 1 << 8, 1 << 31 | 1 << 16 | 1 << 11] {
        PortDevice::write(&mut *bench.host.lock(), 0, Dword, address);
        let mut host = bench.host.lock();
        assert_eq!(PortDevice::read(&mut *host, 4, Dword), u32::MAX, "off, function 1, bus 1");
        PortDevice::write(&mut *host, 4, Dword, 0);
    }
}

#[test]
fn the_reset_register_and_its_neighbour() {
    let bench = bench();
    let mut host = bench.host.lock();
    PortDevice::write(&mut *host, 0, Dword, 0x8000_0604);
    assert_eq!(PortDevice::read(&mut *host, 0, Dword), 0x8000_0604);
    assert_eq!(PortDevice::read(&mut *host, 0, Word), u32::MAX);
    PortDevice::write(&mut *host, 1, Byte, 2);
    assert!(bench.reasons.lock().unwrap().is_empty());
    PortDevice::write(&mut *host, 1, Byte, 6);
    assert_eq!(*bench.reasons.lock().unwrap(), ["reboot"]);
    assert_eq!(PortDevice::read(&mut *host, 1, Byte), 6);
    assert_eq!(PortDevice::read(&mut *host, 0, Dword), 0x8000_0604, "not a part of the address");
}

#[test]
fn registers_follow_their_bar() {
    let bench = bench();
    assert_eq!(bench.load(8, Dword), 0xffff_ffff, "memory is off");
    bench.set_config(1, 4, Word, 2);
    assert_eq!(bench.load(8, Dword), 8);
    bench.store(0x3ff8, Word, 7);
    assert_eq!(*bench.written.lock().unwrap(), [(0, 0x3ff8, 7)]);
    bench.set_config(1, 0x10, Dword, 0xef00_0000);
    assert_eq!(bench.load(8, Dword), 0xffff_ffff);
    let at = 0xef00_0000 - WINDOW.0;
    assert_eq!(MmioDevice::read(&mut *bench.host.lock(), at + 12, Dword), 12);
    // Above 4 GiB nothing of it can be reached, and nothing must happen.
    bench.set_config(1, 0x14, Dword, 7);
    assert_eq!(MmioDevice::read(&mut *bench.host.lock(), at + 12, Dword), 0xffff_ffff);
}

#[test]
fn messages_go_where_the_table_says_and_wait_while_masked() {
    let bench = bench();
    bench.enable_apics();
    bench.set_config(1, 4, Word, 6);
    let control = bench.msix() + 2;
    assert_eq!(bench.config(1, control, Word), 2, "three vectors");
    assert_eq!(bench.config(1, control + 2, Dword), 0x1000);
    assert_eq!(bench.config(1, control + 6, Dword), 0x2000);
    assert_eq!(bench.load(0x100c, Dword), 1, "masked after reset");
    // Vector 1: to processor 1, interrupt 0x41, fixed, an edge.
    bench.store(0x1010, Qword, 0xfee0_1000);
    bench.store(0x1018, Dword, 0x41);
    assert_eq!(bench.load(0x1010, Qword), 0xfee0_1000);
    bench.set_config(1, control, Word, 1 << 15);
    bench.interrupts.raise(1, 0);
    assert_eq!(bench.fabric.attention(1), 0);
    assert_eq!(bench.load(0x2000, Qword), 1 << 1, "pending");
    bench.store(0x101c, Dword, 0);
    assert_eq!(bench.fabric.acknowledge(1), Some(0x41));
    assert_eq!(bench.load(0x2000, Byte), 0);
    bench.fabric.write_apic_page(1, Gpa(0xfee0_00b0), Dword, 0);
    // The same with the mask of the whole function.
    bench.set_config(1, control, Word, 3 << 14);
    bench.interrupts.raise(1, 0);
    assert_eq!(bench.fabric.attention(1), 0);
    bench.set_config(1, control, Word, 1 << 15);
    assert_eq!(bench.fabric.acknowledge(1), Some(0x41));
    bench.interrupts.raise(3, 1);
    bench.interrupts.raise(0xffff, 1);
    assert_eq!(bench.fabric.attention(0), 0, "no such vector");
    assert!(!bench.is_line_asserted(11), "and not by the line either");
}

#[test]
fn without_messages_the_line_tells_until_the_cause_is_read() {
    let bench = bench();
    assert_eq!(bench.config(1, 0x3c, Word), 0x010b, "INTA#, line 11");
    bench.interrupts.raise(0, 1);
    assert!(bench.is_line_asserted(11));
    assert_eq!(bench.config(1, 6, Word) & 1 << 3, 1 << 3);
    assert_eq!(bench.config(1, 4, Dword) & 1 << 19, 1 << 19);
    bench.set_config(1, 4, Word, 1 << 10);
    assert!(!bench.is_line_asserted(11), "disabled");
    bench.set_config(1, 4, Word, 0);
    assert!(bench.is_line_asserted(11));
    bench.interrupts.raise(0, 2);
    assert_eq!(bench.interrupts.take_causes(), 3);
    assert!(!bench.is_line_asserted(11));
    assert_eq!(bench.config(1, 6, Word) & 1 << 3, 0);
}

#[test]
fn odd_accesses_to_the_table_do_no_harm() {
    let bench = bench();
    bench.set_config(1, 4, Word, 2);
    for offset in (0x1000..0x3000).step_by(3) {
        for size in [Byte, Word, Dword, Qword] {
            bench.store(offset, size, u64::MAX);
            let _ = bench.load(offset, size);
        }
    }
    let saved = bench.host.lock().state();
    let other = self::bench();
    other.host.lock().restore(&saved);
    assert_eq!(other.host.lock().state(), saved);
}

const FOREVER: Duration = Duration::from_secs(60);

impl Bench {
    fn port(&self, offset: u16, size: AccessSize) -> u32 {
        PortDevice::read(&mut *self.host.lock(), offset, size)
    }

    fn set_port(&self, offset: u16, size: AccessSize, value: u32) {
        PortDevice::write(&mut *self.host.lock(), offset, size, value);
    }

    fn plug_in(&self) -> Arc<Presence> {
        let slot = self.host.lock().free_slot().unwrap();
        let (card, _) = echo(&slot, &self.written);
        self.host.lock().plug_in(&slot, card)
    }
}

#[test]
fn a_card_comes_while_the_guest_runs_and_goes_when_it_is_ejected() {
    let bench = bench();
    bench.set_port(EVENT_OFFSET + 1, Byte, 2);
    assert!(!bench.is_line_asserted(9));
    let presence = bench.plug_in();
    assert!(bench.is_line_asserted(9), "the system is told");
    assert_eq!(bench.port(EVENT_OFFSET, Byte), 2);
    bench.set_port(EVENT_OFFSET, Byte, 2);
    assert!(!bench.is_line_asserted(9));
    assert_eq!((bench.port(SLOTS_OFFSET, Dword), bench.port(SLOTS_OFFSET + 4, Dword)), (1 << 2, 0));
    bench.set_port(SLOTS_OFFSET, Dword, 1 << 2);
    assert_eq!(bench.port(SLOTS_OFFSET, Dword), 0, "seen");
    assert_eq!(bench.config(2, 0, Word), 0x1234);

    bench.set_port(SLOTS_OFFSET + 8, Dword, u32::MAX);
    assert_eq!(bench.config(2, 0, Word), 0x1234, "nobody wants it back, so it stays");
    assert_eq!(bench.config(1, 0, Word), 0x1234);
    assert!(!presence.is_gone());

    assert!(bench.host.lock().want_back(&presence));
    assert!(bench.is_line_asserted(9));
    assert_eq!((bench.port(SLOTS_OFFSET, Dword), bench.port(SLOTS_OFFSET + 4, Dword)), (0, 1 << 2));
    assert!(!presence.wait_gone(Duration::ZERO), "only wanted");
    bench.set_port(SLOTS_OFFSET + 4, Dword, u32::MAX);
    bench.set_port(SLOTS_OFFSET + 8, Dword, 1 << 2);
    assert!(presence.wait_gone(FOREVER));
    assert_eq!(bench.config(2, 0, Dword), u32::MAX);
    assert_eq!(*bench.written.lock().unwrap(), [DROPPED], "the device has let go of all it had");
    assert!(!bench.host.lock().want_back(&presence));

    // The slot is free for another card, which the order for the first has nothing to do with.
    let second = bench.plug_in();
    bench.set_port(SLOTS_OFFSET + 8, Dword, 1 << 2);
    assert!(!second.is_gone());
    assert_eq!(bench.config(2, 0, Word), 0x1234);
}

#[test]
fn a_card_that_was_there_from_the_start_can_be_wanted_back() {
    let bench = bench();
    bench.interrupts.raise(0, 1);
    assert!(bench.is_line_asserted(11));
    assert!(bench.host.lock().want_back(&bench.presence));
    bench.set_port(SLOTS_OFFSET + 8, Dword, 1 << 1);
    assert!(bench.presence.wait_gone(FOREVER));
    let Bench { interrupts, fabric, host, .. } = bench;
    drop(interrupts);
    fabric.write_pic(PicPort::SlaveCommand, 0x0a);
    assert_eq!(fabric.read_pic(PicPort::SlaveCommand) & 1 << 3, 0, "a card that is gone asserts no line");
    assert_eq!(host.lock().free_slot().unwrap().line, 11);
}

#[test]
fn sources_on_a_line_are_used_again() {
    let bench = bench();
    let mut lines = Vec::new();
    for _ in 0..100 {
        lines.clear();
        lines.extend((0..8).map(|_| bench.fabric.line(11)));
        lines[7].set(true);
        lines[6].set(true);
        assert!(bench.is_line_asserted(11));
        lines[6].set(false);
        assert!(bench.is_line_asserted(11), "two sources, each with a bit of its own");
        lines[7].set(false);
        assert!(!bench.is_line_asserted(11));
    }
}

#[test]
fn the_bus_takes_no_more_cards_than_it_has_slots_and_none_after_its_end() {
    let bench = bench();
    for _ in 2..SLOTS {
        let _ = bench.plug_in();
    }
    assert!(bench.host.lock().free_slot().is_none());
    assert!(bench.host.lock().want_back(&bench.presence));
    bench.set_port(SLOTS_OFFSET + 8, Dword, u32::MAX);
    assert!(bench.presence.wait_gone(FOREVER));
    assert!(bench.host.lock().free_slot().is_some());
    bench.host.lock().end().into_iter().for_each(|thread| thread.join().unwrap());
    assert!(bench.host.lock().free_slot().is_none());
}

#[test]
fn odd_accesses_to_the_slots_do_no_harm_and_a_saved_order_stands() {
    let bench = bench();
    assert!(bench.host.lock().want_back(&bench.presence));
    for offset in EVENT_OFFSET..SLOTS_OFFSET + 12 {
        for size in [Byte, Word] {
            let _ = bench.port(offset, size);
            bench.set_port(offset, size, u32::MAX);
        }
    }
    assert!(!bench.presence.is_gone());
    let saved = bench.host.lock().state();
    assert_eq!(saved.hotplug.ejectable, 1 << 1);
    let other = self::bench();
    other.host.lock().restore(&saved);
    assert_eq!(other.host.lock().state(), saved);
    other.set_port(SLOTS_OFFSET + 8, Dword, 1 << 1);
    assert!(other.presence.wait_gone(FOREVER));
}
