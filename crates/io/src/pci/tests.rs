//! The bus as a guest sees it, through its ports and its window.

use std::sync::{Arc, Mutex};

use host::clock::Clock;
use host::lock::RankedMutex;

use super::config::Config;
use super::*;
use crate::irq::Kick;
use crate::irq::pic::PicPort;
use crate::timer::TimerQueue;
use AccessSize::{Byte, Dword, Qword, Word};

/// Remembers what was written, and answers with the offset.
struct Echo(Arc<Mutex<Vec<(usize, u64, u64)>>>);

impl Function for Echo {
    fn read(&mut self, _bar: usize, offset: u64, _size: AccessSize) -> u64 {
        offset
    }

    fn write(&mut self, bar: usize, offset: u64, _size: AccessSize, value: u64) {
        self.0.lock().unwrap().push((bar, offset, value));
    }
}

struct Bench {
    host: Arc<RankedMutex<Host>>,
    fabric: Arc<Fabric>,
    interrupts: Arc<Interrupts>,
    written: Arc<Mutex<Vec<(usize, u64, u64)>>>,
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
    let mut config = Config::new(ECHO);
    config.add_memory_bar(0, 0x4000, slot.window);
    config.set_interrupt(slot.line);
    let interrupts = slot.interrupts(MSIX.vectors);
    let written = Arc::new(Mutex::new(Vec::new()));
    let echo = Box::new(Echo(Arc::clone(&written)));
    host.lock().insert(&slot, Card::new(config, Arc::clone(&interrupts), Some(MSIX), echo));
    Bench { host, fabric, interrupts, written, reasons }
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
