//! Queues and the transport, driven from the guest's side: a driver that writes its rings into guest memory.

mod balloon;
mod console;
mod fs;
mod helpers;
mod mmio;
mod net;
mod queue;
mod transport;
mod vsock;

use std::sync::Arc;
use std::time::{Duration, Instant};

use memory::GuestMemory;
use x86::Gpa;

use super::queue::Place;

const RAM: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(30);
const PLACE: Place = Place { entries: 8, descriptors: Gpa(0x1000), driver: Gpa(0x2000), device: Gpa(0x3000) };
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The guest's side of a queue.
struct Driver {
    memory: Arc<GuestMemory>,
    place: Place,
    available: u16,
}

impl Driver {
    fn new(memory: &Arc<GuestMemory>) -> Driver {
        Driver::at(memory, PLACE)
    }

    fn at(memory: &Arc<GuestMemory>, place: Place) -> Driver {
        Driver { memory: Arc::clone(memory), place, available: 0 }
    }

    fn descriptor(&self, table: Gpa, index: u16, address: u64, size: u32, flags: u16, next: u16) {
        let mut bytes = Vec::from(address.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write(table.add(16 * u64::from(index)), &bytes).unwrap();
    }

    fn set_16(&self, address: Gpa, value: u16) {
        self.memory.write(address, &value.to_le_bytes()).unwrap();
    }

    fn get_16(&self, address: Gpa) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(address, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % self.place.entries);
        self.set_16(self.place.driver.add(4 + 2 * slot), head);
        self.available = self.available.wrapping_add(1);
        self.set_16(self.place.driver.add(2), self.available);
    }

    fn used_index(&self) -> u16 {
        self.get_16(self.place.device.add(2))
    }

    /// Head and length of an entry of the used ring.
    fn used(&self, slot: u64) -> (u32, u32) {
        let mut bytes = [0; 8];
        self.memory.read(self.place.device.add(4 + 8 * slot), &mut bytes).unwrap();
        let [a, b, c, d, e, f, g, h] = bytes;
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
    }

    fn wait_for_used(&self, index: u16) {
        wait_until(|| self.used_index() == index);
    }
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < LONG, "nothing came");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(RAM).unwrap())
}

/// As many random numbers as wanted, the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Mostly something that might be right.
    fn address(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 => RAM - self.below(64),
            _ => self.below(RAM),
        }
    }
}
