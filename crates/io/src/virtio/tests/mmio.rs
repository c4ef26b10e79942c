//! A device on no bus, with its threads.

use std::sync::Arc;

use host::clock::Clock;
use host::lock::RankedMutex;
use memory::GuestMemory;
use x86::Gpa;

use super::{Driver, PLACE, WRITE, memory, wait_until};
use crate::bus::AccessSize::{Byte, Dword, Qword, Word};
use crate::bus::MmioDevice;
use crate::disk::memory::Memory;
use crate::irq::pic::PicPort;
use crate::irq::{Fabric, Kick};
use crate::timer::TimerQueue;
use crate::virtio::block::{Block, Disk};
use crate::virtio::entropy::Entropy;
use crate::virtio::mmio::{Registers, registers};
use crate::virtio::{Backend, feature};

struct Bench {
    registers: Arc<RankedMutex<Registers>>,
    fabric: Arc<Fabric>,
    memory: Arc<GuestMemory>,
}

fn bench(backend: Arc<dyn Backend>) -> Bench {
    let timers = TimerQueue::new(Clock::manual(1_000_000_000), Arc::default());
    let kick: Kick = Arc::new(|_| {});
    let fabric = Fabric::new(1, 1_000_000_000, &timers, &kick, Arc::default());
    fabric.set_up_as_firmware();
    let memory = memory();
    Bench { registers: registers(0, backend, Arc::clone(&memory), Arc::default(), &fabric), fabric, memory }
}

impl Bench {
    fn get(&self, at: u64) -> u64 {
        self.registers.lock().read(at, Dword)
    }

    fn set(&self, at: u64, value: u64) {
        self.registers.lock().write(at, Dword, value);
    }

    fn is_line_asserted(&self) -> bool {
        self.fabric.write_pic(PicPort::SlaveCommand, 0x0a);
        self.fabric.read_pic(PicPort::SlaveCommand) & 1 << 2 != 0
    }

    /// 3.1.1 "Driver Requirements: Device Initialization" with queue 0 at [`PLACE`].
    fn initialize(&self) {
        self.set(0x70, 0);
        wait_until(|| self.get(0x70) == 0);
        self.set(0x70, 3);
        self.set(0x24, 1);
        self.set(0x20, feature::VERSION_1 >> 32);
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11);
        self.set(0x30, 0);
        assert_eq!(self.get(0x44), 0);
        self.set(0x38, u64::from(PLACE.entries));
        for (register, address) in [(0x80, PLACE.descriptors), (0x90, PLACE.driver), (0xa0, PLACE.device)] {
            self.set(register, address.0);
            self.set(register + 4, 0);
        }
        self.set(0x44, 1);
        assert_eq!(self.get(0x44), 1);
        self.set(0x70, 15);
    }
}

#[test]
fn a_driver_finds_what_is_there() {
    let bench = bench(Arc::new(Entropy));
    assert_eq!([0, 4, 8].map(|at| bench.get(at)), [0x7472_6976, 2, 4]);
    bench.set(0x14, 1);
    assert_eq!(bench.get(0x10), 1, "version 1");
    bench.set(0x30, 1);
    assert_eq!(bench.get(0x34), 0, "no second queue");
    bench.set(0x30, 0x1_0000);
    assert_eq!(bench.get(0x34), 0, "nor does its number wrap to the first");
    bench.set(0x30, 0);
    assert_eq!(bench.get(0x34), 256);
    assert_eq!(bench.get(0xb0), 0xffff_ffff, "no shared memory");
    for size in [Byte, Word, Qword] {
        assert_eq!(bench.registers.lock().read(0, size), 0, "registers are read as doublewords only");
    }
    let block = Block::new(Box::new(Memory::new(vec![0; 1 << 20])), Disk::default());
    let bench = self::bench(Arc::new(block));
    assert_eq!(bench.registers.lock().read(0x100, Qword), 2048, "sectors");
    assert_eq!(bench.registers.lock().read(0x100, Byte), 0);
}

#[test]
fn entropy_comes_and_the_line_tells_until_it_is_acknowledged() {
    let bench = bench(Arc::new(Entropy));
    bench.initialize();
    assert_eq!(bench.get(0x70), 15);
    let mut driver = Driver::new(&bench.memory);
    driver.descriptor(PLACE.descriptors, 1, 0x8000, 64, WRITE, 0);
    driver.offer(1);
    bench.set(0x50, 0);
    driver.wait_for_used(1);
    assert_eq!(driver.used(0), (1, 64));
    wait_until(|| bench.get(0x60) == 1);
    assert!(bench.is_line_asserted());
    bench.set(0x64, 2);
    assert!(bench.is_line_asserted(), "another cause");
    bench.set(0x64, 1);
    assert!(!bench.is_line_asserted());
    assert_eq!(bench.get(0x60), 0);

    // A saved machine goes on where it was.
    let saved = bench.registers.lock().state();
    let other = self::bench(Arc::new(Entropy));
    let mut bytes = vec![0; 0x1_0000];
    bench.memory.read(Gpa(0), &mut bytes).unwrap();
    other.memory.write(Gpa(0), &bytes).unwrap();
    other.registers.lock().restore(&saved);
    let mut driver = Driver { memory: Arc::clone(&other.memory), ..driver };
    driver.descriptor(PLACE.descriptors, 2, 0x9000, 16, WRITE, 0);
    driver.offer(2);
    other.set(0x50, 0);
    driver.wait_for_used(2);
    assert_eq!(driver.used(1), (2, 16));
}

#[test]
fn a_queue_is_taken_back_before_it_is_used_and_not_after() {
    let bench = bench(Arc::new(Entropy));
    bench.initialize();
    bench.set(0x44, 0);
    assert_eq!(bench.get(0x44), 1, "the driver is on");
    bench.set(0x70, 0);
    wait_until(|| bench.get(0x70) == 0);
    bench.set(0x44, 1);
    bench.set(0x44, 0);
    assert_eq!(bench.get(0x44), 0);
}
