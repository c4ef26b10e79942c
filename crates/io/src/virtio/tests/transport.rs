//! Devices on the bus, with their threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use host::clock::Clock;
use host::lock::RankedMutex;
use memory::GuestMemory;
use x86::Gpa;

use super::{Driver, PLACE, RAM, Random, WRITE, memory, wait_until};
use crate::bus::AccessSize::{self, Byte, Dword, Qword, Word};
use crate::bus::{MmioDevice, PortDevice};
use crate::irq::{Fabric, Kick};
use crate::pci::{Host, SLOT_BYTES};
use crate::timer::TimerQueue;
use crate::virtio::entropy::Entropy;
use crate::virtio::queue::{Chain, Place};
use crate::virtio::service::Gate;
use crate::virtio::{Answer, Backend, feature, transport};

/// A bus with one device in slot 1.
pub struct Bench {
    pub host: Arc<RankedMutex<Host>>,
    fabric: Arc<Fabric>,
    pub memory: Arc<GuestMemory>,
    gate: Arc<Gate>,
}

pub const COMMON: u64 = 0;
pub const ISR: u64 = 0x1000;
pub const DEVICE: u64 = 0x2000;
pub const NOTIFY: u64 = 0x3000;

pub fn bench(backend: Arc<dyn Backend>) -> Bench {
    let timers = TimerQueue::new(Clock::manual(1_000_000_000), Arc::default());
    let kick: Kick = Arc::new(|_| {});
    let fabric = Fabric::new(1, 1_000_000_000, &timers, &kick, Arc::default());
    fabric.write_apic_page(0, Gpa(0xfee0_00f0), Dword, 0x1ff);
    let host = Host::new(Arc::clone(&fabric), Arc::new(|_| {}));
    let (memory, gate) = (memory(), Arc::default());
    let slot = host.lock().free_slot().unwrap();
    let card = transport::card(backend, Arc::clone(&memory), Arc::clone(&gate), &slot);
    host.lock().insert(&slot, card);
    let bench = Bench { host, fabric, memory, gate };
    bench.set_config(4, Word, 6);
    bench
}

impl Bench {
    fn select(&self, register: u8) -> u16 {
        let address = 1 << 31 | 1 << 11 | u32::from(register & !3);
        PortDevice::write(&mut *self.host.lock(), 0, Dword, address);
        4 + u16::from(register & 3)
    }

    fn config(&self, register: u8, size: AccessSize) -> u32 {
        let port = self.select(register);
        PortDevice::read(&mut *self.host.lock(), port, size) & size.mask() as u32
    }

    fn set_config(&self, register: u8, size: AccessSize, value: u32) {
        let port = self.select(register);
        PortDevice::write(&mut *self.host.lock(), port, size, value);
    }

    pub fn get(&self, offset: u64, size: AccessSize) -> u64 {
        MmioDevice::read(&mut *self.host.lock(), SLOT_BYTES + offset, size) & size.mask()
    }

    pub fn set(&self, offset: u64, size: AccessSize, value: u64) {
        MmioDevice::write(&mut *self.host.lock(), SLOT_BYTES + offset, size, value);
    }

    pub fn status(&self) -> u64 {
        self.get(COMMON + 0x14, Byte)
    }

    pub fn set_status(&self, value: u64) {
        self.set(COMMON + 0x14, Byte, value);
    }

    /// 3.1.1 "Driver Requirements: Device Initialization", with one queue at [`PLACE`].
    fn initialize(&self, features: u64) {
        self.initialize_queues(features, &[PLACE]);
    }

    /// The same, with queues from the first on at these places.
    pub fn initialize_queues(&self, features: u64, places: &[Place]) {
        self.set_status(0);
        wait_until(|| self.status() == 0);
        self.set_status(3);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.set(COMMON + 8, Dword, select);
            self.set(COMMON + 12, Dword, half);
        }
        self.set_status(11);
        for (number, place) in places.iter().enumerate() {
            self.set(COMMON + 0x16, Word, number as u64);
            self.set(COMMON + 0x18, Word, u64::from(place.entries));
            self.set(COMMON + 0x20, Qword, place.descriptors.0);
            self.set(COMMON + 0x28, Dword, place.driver.0);
            self.set(COMMON + 0x2c, Dword, 0);
            self.set(COMMON + 0x30, Qword, place.device.0);
            self.set(COMMON + 0x1c, Word, 1);
        }
        self.set(COMMON + 0x16, Word, 0);
        self.set_status(15);
    }

    /// What a saved machine would keep of the bus.
    pub fn saved(&self) -> crate::pci::HostState {
        let _closed = self.gate.close();
        self.host.lock().state()
    }

    /// Sends message 0 as interrupt 0x50 to processor 0, for queue 0.
    fn enable_messages(&self) {
        self.set(0x4000, Qword, 0xfee0_0000);
        self.set(0x4008, Qword, 0x50);
        let mut capability = self.config(0x34, Byte) as u8;
        while self.config(capability, Byte) != 0x11 {
            capability = self.config(capability + 1, Byte) as u8;
            assert_ne!(capability, 0, "no MSI-X");
        }
        self.set_config(capability + 2, Word, 1 << 15);
        self.set(COMMON + 0x1a, Word, 0);
    }
}

#[test]
fn a_driver_agrees_on_features_before_anything_else() {
    let bench = bench(Arc::new(Entropy));
    assert_eq!(bench.config(0, Dword), 0x1044_1af4);
    assert_eq!(bench.get(COMMON + 4, Dword), feature::INDIRECT_DESCRIPTORS | feature::EVENT_INDEX);
    bench.set(COMMON, Dword, 1);
    assert_eq!(bench.get(COMMON + 4, Dword), 1);
    bench.set(COMMON, Dword, 2);
    assert_eq!(bench.get(COMMON + 4, Dword), 0);
    for features in [0, feature::VERSION_1 | 1, feature::VERSION_1 | 1 << 40] {
        bench.initialize(features);
        assert_eq!(bench.status() & 8, 0, "features {features:#x} are not agreed on");
    }
    bench.initialize(feature::VERSION_1);
    assert_eq!(bench.status(), 15);
    bench.set(COMMON + 8, Dword, 0);
    bench.set(COMMON + 12, Dword, 1);
    assert_eq!(bench.get(COMMON + 12, Dword), 0, "too late");
    assert_eq!(bench.get(COMMON + 0x12, Word), 1, "one queue");
    bench.set(COMMON + 0x16, Word, 1);
    assert_eq!(bench.get(COMMON + 0x18, Word), 0, "and no second");
}

#[test]
fn entropy_comes_with_a_message_or_with_the_line() {
    for messages in [true, false] {
        let bench = bench(Arc::new(Entropy));
        bench.initialize(feature::VERSION_1);
        if messages {
            bench.enable_messages();
        }
        let mut driver = Driver::new(&bench.memory);
        driver.descriptor(PLACE.descriptors, 1, 0x8000, 64, WRITE, 0);
        driver.offer(1);
        bench.set(NOTIFY, Word, 0);
        driver.wait_for_used(1);
        assert_eq!(driver.used(0), (1, 64));
        let mut bytes = [0; 64];
        bench.memory.read(Gpa(0x8000), &mut bytes).unwrap();
        assert_ne!(bytes, [0; 64]);
        if messages {
            wait_until(|| bench.fabric.attention(0) != 0);
            assert_eq!(bench.fabric.acknowledge(0), Some(0x50));
        } else {
            wait_until(|| bench.config(6, Word) & 1 << 3 != 0);
            assert_eq!(bench.get(ISR, Byte), 1);
            assert_eq!(bench.get(ISR, Byte), 0, "reading clears it");
        }
    }
}

#[test]
fn a_broken_queue_stops_the_device_until_it_is_reset() {
    let bench = bench(Arc::new(Entropy));
    bench.initialize(feature::VERSION_1);
    let mut driver = Driver::new(&bench.memory);
    driver.offer(99);
    bench.set(NOTIFY, Word, 0);
    wait_until(|| bench.status() & 64 != 0);
    wait_until(|| bench.get(ISR, Byte) == 2);
    driver.set_16(PLACE.driver.add(2), 0);
    driver.available = 0;
    driver.descriptor(PLACE.descriptors, 1, 0x8000, 64, WRITE, 0);
    bench.initialize(feature::VERSION_1);
    driver.offer(1);
    bench.set(NOTIFY, Word, 0);
    driver.wait_for_used(1);
    // A queue where no memory is: the device says so at once.
    bench.set_status(0);
    wait_until(|| bench.status() == 0);
    bench.set(COMMON + 8, Dword, 1);
    bench.set(COMMON + 12, Dword, 1);
    bench.set_status(11);
    bench.set(COMMON + 0x20, Qword, RAM);
    bench.set(COMMON + 0x1c, Word, 1);
    bench.set_status(15);
    assert_eq!(bench.status(), 15 | 64);
}

/// Takes requests and answers each only when it is let.
#[derive(Default)]
struct Slow {
    begun: AtomicUsize,
    may_end: Mutex<bool>,
    changed: Condvar,
}

impl Backend for Slow {
    fn device_type(&self) -> u16 {
        2
    }

    fn pci_class(&self) -> u32 {
        0
    }

    fn serve(&self, _queue: u16, _features: u64, chain: &Chain<'_>) -> Answer {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let mut may_end = self.may_end.lock().unwrap();
        while !*may_end {
            may_end = self.changed.wait(may_end).unwrap();
        }
        Answer::Done(u32::from(chain.write(0, b"x")))
    }
}

impl Slow {
    fn let_go(&self) {
        *self.may_end.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

#[test]
fn a_reset_amid_a_request_is_over_when_the_request_is() {
    let slow = Arc::new(Slow::default());
    let bench = bench(slow.clone());
    bench.initialize(feature::VERSION_1);
    let mut driver = Driver::new(&bench.memory);
    driver.descriptor(PLACE.descriptors, 0, 0x8000, 1, WRITE, 0);
    driver.offer(0);
    driver.offer(0);
    bench.set(NOTIFY, Word, 0);
    wait_until(|| slow.begun.load(Ordering::SeqCst) == 1);
    bench.set_status(0);
    assert_ne!(bench.status(), 0, "the processor does not wait, but the driver must");
    bench.set_status(3);
    slow.let_go();
    wait_until(|| bench.status() == 0);
    assert_eq!(slow.begun.load(Ordering::SeqCst), 1, "the second was not begun any more");
    assert_eq!(driver.used_index(), 1);
}

#[test]
fn memory_stands_still_behind_a_closed_gate() {
    let slow = Arc::new(Slow::default());
    slow.let_go();
    let bench = bench(slow.clone());
    bench.initialize(feature::VERSION_1);
    let mut driver = Driver::new(&bench.memory);
    driver.descriptor(PLACE.descriptors, 0, 0x8000, 1, WRITE, 0);
    let closed = bench.gate.close();
    driver.offer(0);
    bench.set(NOTIFY, Word, 0);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!((slow.begun.load(Ordering::SeqCst), driver.used_index()), (0, 0));
    drop(closed);
    driver.wait_for_used(1);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let bench = bench(Arc::new(Entropy));
    bench.initialize(feature::VERSION_1 | feature::EVENT_INDEX);
    bench.enable_messages();
    let mut driver = Driver::new(&bench.memory);
    driver.descriptor(PLACE.descriptors, 0, 0x8000, 8, WRITE, 0);
    for index in 1..=11 {
        driver.offer(0);
        bench.set(NOTIFY, Word, 0);
        driver.wait_for_used(index);
    }
    let saved = bench.saved();
    let other = self::bench(Arc::new(Entropy));
    let mut all = vec![0; RAM as usize];
    bench.memory.read(Gpa(0), &mut all).unwrap();
    other.memory.write(Gpa(0), &all).unwrap();
    other.host.lock().restore(&saved);
    assert_eq!(other.status(), 15);
    driver.memory = Arc::clone(&other.memory);
    // Linux asks to be told of the next one.
    driver.set_16(PLACE.driver.add(4 + 2 * 8), 11);
    driver.offer(0);
    other.set(NOTIFY, Word, 0);
    driver.wait_for_used(12);
    wait_until(|| other.fabric.acknowledge(0) == Some(0x50));
}

#[test]
fn the_window_in_the_configuration_space_reaches_the_registers() {
    let bench = bench(Arc::new(Entropy));
    let mut capability = bench.config(0x34, Byte) as u8;
    while bench.config(capability, Byte) != 9 || bench.config(capability + 3, Byte) != 5 {
        capability = bench.config(capability + 1, Byte) as u8;
        assert_ne!(capability, 0, "no window");
    }
    bench.set_config(capability + 8, Dword, 0x12);
    bench.set_config(capability + 12, Dword, 2);
    assert_eq!(bench.config(capability + 16, Word), 1, "one queue");
    bench.set_config(capability + 8, Dword, 0x14);
    bench.set_config(capability + 12, Dword, 1);
    bench.set_config(capability + 16, Byte, 3);
    assert_eq!(bench.status(), 3);
    for (offset, length) in [(0x13, 2), (0x14, 3), (u32::MAX, 4), (0xffff_fffc, 4)] {
        bench.set_config(capability + 8, Dword, offset);
        bench.set_config(capability + 12, Dword, length);
        bench.set_config(capability + 16, Dword, u32::MAX);
        let _ = bench.config(capability + 16, Dword);
    }
}

#[test]
fn random_register_accesses_do_no_harm() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let bench = bench(Arc::new(Entropy));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // A guest's other processor writes into the rings meanwhile.
        scope.spawn(|| {
            let mut random = Random(0x1234_5678_9abc_def1);
            while !stop.load(Ordering::Relaxed) {
                let at = Gpa(0x1000 + (random.below(0x3000) & !1));
                bench.memory.write(at, &(random.below(16) as u16).to_le_bytes()).unwrap();
            }
        });
        for round in 0..4000 {
            if round % 40 == 0 {
                bench.initialize(feature::VERSION_1 | random.below(4) << 28);
            }
            let size = [Byte, Word, Dword, Qword][random.below(4) as usize];
            let offset = if random.below(2) == 0 { random.below(0x40) } else { random.below(0x8000) };
            match random.below(6) {
                0 => bench.set_config(
                    random.next() as u8,
                    if size == Qword { Dword } else { size },
                    random.next() as u32,
                ),
                1 => _ = bench.get(offset, size),
                2 | 3 => bench.set(NOTIFY, Word, 0),
                _ => bench.set(offset, size, random.address() & size.mask()),
            }
            // Whatever it did, the next driver must find the device.
            bench.set_config(0x10, Dword, 0xe000_0000 + SLOT_BYTES as u32);
            bench.set_config(0x14, Dword, 0);
            bench.set_config(4, Word, 6);
        }
        stop.store(true, Ordering::Relaxed);
    });
    bench.initialize(feature::VERSION_1);
    assert_eq!(bench.status() & 15, 15);
}
