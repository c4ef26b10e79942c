//! Hostile drivers: random accesses to a device's registers, rings and requests, for ever new seeds. A device may refuse
//! anything, and be found in need of a reset; it may not panic, hang, touch memory that it was not given, or stay broken
//! behind a reset.

mod machine;
mod requests;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::bus::AccessSize::{Byte, Dword, Qword, Word};
use crate::virtio::feature;
use machine::{CANARY, COMMON, Machine, NOTIFY, RAM};
pub use machine::{Kind, Random};

/// No device takes so long for anything, even on a host that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);
/// Entries of a queue as this driver sets it up.
const ENTRIES: u16 = 16;
/// Each queue has so much memory for its rings; buffers come behind.
const QUEUE_BYTES: u64 = 0x600;
const BUFFERS: u64 = 0x2_0000;

/// Panics of threads that serve devices.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// What a seed has shown to be wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub kind: Kind,
    pub seed: u64,
    pub what: String,
}

/// How many there were.
#[must_use]
pub fn panics() -> usize {
    PANICS.load(Ordering::SeqCst)
}

/// Counts panics of devices' threads from now on: a device hides them from its guest by design.
pub fn watch_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |information| {
            if std::thread::current().name().is_some_and(|name| name.starts_with("rz-")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            before(information);
        }));
    });
}

/// Where queue `number` of this driver is: descriptors, available ring, used ring.
fn place(number: u16) -> [u64; 3] {
    let base = 0x1000 + QUEUE_BYTES * u64::from(number);
    [base, base + 0x100, base + 0x200]
}

/// One seed: a device, on the PCI bus for odd ones and on none for even ones, and a driver that does `steps` things to it.
///
/// # Errors
/// [`Finding`], when the device did what it may not.
pub fn run(kind: Kind, seed: u64, steps: usize) -> Result<(), Finding> {
    let found = |what: &str| Finding { kind, seed, what: what.into() };
    let panics = PANICS.load(Ordering::SeqCst);
    let mut driver =
        Driver { machine: Machine::new(kind, !seed.is_multiple_of(2)), random: Random::new(seed), available: [0; 64] };
    driver.begin();
    for _ in 0..steps {
        driver.step();
    }
    if !driver.machine.is_canary_alive() {
        return Err(found("memory was changed that no buffer and no ring is in"));
    }
    // Whatever it did, the next driver finds the device, and finds it working.
    if !driver.reset() {
        return Err(found("a reset is not over"));
    }
    driver.begin();
    if driver.machine.get(COMMON + 0x14, Byte) & 0xf != 0xf {
        return Err(found("a device does not come back by a reset"));
    }
    if !driver.reset() {
        return Err(found("the last reset is not over"));
    }
    driver.machine.end();
    if PANICS.load(Ordering::SeqCst) != panics {
        return Err(found("a thread that serves the device has panicked"));
    }
    Ok(())
}

struct Driver {
    machine: Machine,
    random: Random,
    /// The available index of each queue, as this driver has written it last.
    available: [u16; 64],
}

impl Driver {
    /// False when it takes for ever.
    fn reset(&mut self) -> bool {
        self.machine.restore_bar();
        self.machine.set(COMMON + 0x14, Byte, 0);
        let begin = Instant::now();
        while self.machine.get(COMMON + 0x14, Byte) != 0 {
            if begin.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        true
    }

    /// Sets the device up as a driver should, with features as they come.
    fn begin(&mut self) {
        if !self.reset() {
            return;
        }
        let machine = &self.machine;
        machine.set(COMMON + 0x14, Byte, 3);
        let offered = machine.offered();
        let chosen = offered & self.random.number() | feature::VERSION_1;
        for (select, half) in [(0, chosen & 0xffff_ffff), (1, chosen >> 32)] {
            machine.set(COMMON + 8, Dword, select);
            machine.set(COMMON + 12, Dword, half);
        }
        machine.set(COMMON + 0x14, Byte, 11);
        for number in 0..machine.queues() {
            let rings = place(number);
            machine.set(COMMON + 0x16, Word, u64::from(number));
            machine.set(COMMON + 0x18, Word, u64::from(ENTRIES));
            for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(rings) {
                machine.set(COMMON + register, Qword, address);
            }
            machine.set(COMMON + 0x1c, Word, 1);
            for ring in &rings[1..] {
                machine.write(*ring, &[0; 4]);
            }
        }
        machine.set(COMMON + 0x14, Byte, 15);
        self.available = [0; 64];
    }

    fn step(&mut self) {
        // A device that is broken does nothing, which is soon seen.
        if self.machine.get(COMMON + 0x14, Byte) != 0xf && self.random.below(4) == 0 {
            self.begin();
        }
        match self.random.below(40) {
            0 => self.begin(),
            1 => self.register(),
            2 => self.jump(),
            3 => self.descriptor_anywhere(),
            4 => self.machine.save_and_restore(),
            5..=9 => self.machine.disturb(&mut self.random),
            10 => _ = self.reset(),
            _ => self.request(),
        }
    }

    fn queue(&mut self) -> u16 {
        self.random.below(u64::from(self.machine.queues()).max(1)) as u16
    }

    /// Any access to any register.
    fn register(&mut self) {
        let size = [Byte, Word, Dword, Qword][self.random.below(4) as usize];
        let offset = if self.random.below(2) == 0 { self.random.below(0x40) } else { self.random.below(0x8000) };
        let value = self.random.number() & size.mask();
        if !self.machine.is_on_bus() {
            let offset = offset % 0x240;
            match self.random.below(2) {
                0 => self.machine.get_raw(offset, size),
                _ if (0x80..0xb0).contains(&offset) => {}
                _ => self.machine.set_raw(offset, size, value),
            }
            return;
        }
        match self.random.below(3) {
            0 => _ = self.machine.get(offset, size),
            1 => self.machine.set_config(self.random.number() as u8, value as u32),
            // Not the places of queues: a driver that puts a ring into memory of its own may lose that.
            _ if (0x20..0x40).contains(&offset) => {}
            _ => self.machine.set(offset, size, value),
        }
        self.machine.restore_bar();
    }

    /// An index that was never reached.
    fn jump(&mut self) {
        let queue = self.queue();
        let to = self.random.number() as u16;
        self.machine.write(place(queue)[1] + 2, &to.to_le_bytes());
        self.available[usize::from(queue)] = to;
        self.notify(queue);
    }

    fn notify(&mut self, queue: u16) {
        self.machine.set(NOTIFY + 4 * u64::from(queue), Word, u64::from(queue));
    }

    fn descriptor(&mut self, at: u64, address: u64, size: u32, flags: u16, next: u16) {
        let mut bytes = Vec::from(address.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.machine.write(at, &bytes);
    }

    /// A buffer that lies where one may, or nowhere in memory at all: never where nothing may be written.
    fn buffer(&mut self) -> (u64, u32) {
        match self.random.below(60) {
            0 => (self.random.number() | RAM, self.random.number() as u32),
            1 => (BUFFERS + self.random.below(0x1000), u32::MAX - self.random.below(0x2000) as u32),
            2 => (u64::MAX - self.random.below(64), self.random.below(128) as u32 + 65),
            3 => (BUFFERS + self.random.below(0x1000), 0),
            _ => {
                let address = BUFFERS + self.random.below(CANARY - BUFFERS - 1);
                (address, self.random.below((CANARY - address).min(0x3000)) as u32)
            }
        }
    }

    /// A descriptor that may lead anywhere, and so in circles.
    fn descriptor_anywhere(&mut self) {
        let queue = self.queue();
        let index = self.random.below(u64::from(ENTRIES));
        let (address, size) = self.buffer();
        let (flags, next) = (self.random.number() as u16 & 7, self.random.below(20) as u16);
        self.descriptor(place(queue)[0] + 16 * index, address, size, flags, next);
        self.offer(queue, index as u16);
    }

    /// Requests of a queue that the device has not done.
    fn waiting(&self, queue: u16) -> u16 {
        self.available[usize::from(queue)].wrapping_sub(self.machine.read_16(place(queue)[2] + 2))
    }

    /// Makes `head` available, and tells of it.
    fn offer(&mut self, queue: u16, head: u16) {
        // More than the queue has room for is nonsense, and soon said.
        if self.waiting(queue) >= ENTRIES && self.random.below(50) != 0 {
            return;
        }
        let available = self.available[usize::from(queue)];
        let slot = u64::from(available % ENTRIES);
        self.machine.write(place(queue)[1] + 4 + 2 * slot, &head.to_le_bytes());
        self.available[usize::from(queue)] = available.wrapping_add(1);
        self.machine.write(place(queue)[1] + 2, &available.wrapping_add(1).to_le_bytes());
        self.notify(queue);
        // Mostly one after the other, so that each is seen as it was made; some wait for what never comes.
        if self.random.below(4) != 0 {
            let begin = Instant::now();
            while self.waiting(queue) != 0 && begin.elapsed() < Duration::from_micros(300) {
                std::thread::yield_now();
            }
        }
    }

    /// A request that may make sense: bytes for the device, then room for its answer, in some pieces.
    fn request(&mut self) {
        let queue = self.queue();
        let table = place(queue)[0];
        let bytes = requests::any(self.machine.kind(), queue, &mut self.random);
        let at = BUFFERS + self.random.below(0x8_0000);
        self.machine.write(at, &bytes);
        let first = self.random.below(8) as u16;
        let mut list = Vec::new();
        let split = self.random.below(bytes.len() as u64 + 1);
        for (start, end) in [(0, split), (split, bytes.len() as u64)] {
            if start < end {
                list.push((at + start, (end - start) as u32, 0));
            }
        }
        let answers = self.random.below(3);
        for _ in 0..answers {
            let (address, size) = self.buffer();
            list.push((address, size, 2));
        }
        if list.is_empty() {
            return;
        }
        let last = list.len() - 1;
        // In a table of its own now and then, in the middle of which the memory ends for others.
        let is_indirect = self.random.below(6) == 0;
        let (to, from) = if is_indirect { (at + 0x4000, 0) } else { (table, first) };
        for (index, (address, size, flags)) in list.into_iter().enumerate() {
            let number = from + index as u16;
            let more = if index < last { 1 } else { 0 };
            self.descriptor(to + 16 * u64::from(number % ENTRIES), address, size, flags | more, (number + 1) % ENTRIES);
        }
        if is_indirect {
            self.descriptor(table + 16 * u64::from(first), to, 16 * (last as u32 + 1), 4, 0);
        }
        self.offer(queue, first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test: panics are counted for all of the process.
    #[test]
    fn no_driver_harms_a_device_and_harm_would_be_found() {
        watch_panics();
        for kind in Kind::ALL {
            for seed in 1..=6 {
                assert_eq!(run(kind, seed, 150), Ok(()));
            }
        }
        let panics = PANICS.load(Ordering::SeqCst);
        let thread = std::thread::Builder::new().name("rz-test".into()).spawn(|| panic!("wanted")).unwrap();
        assert!(thread.join().is_err());
        assert_eq!(PANICS.load(Ordering::SeqCst), panics + 1);
        PANICS.fetch_sub(1, Ordering::SeqCst);
        let machine = Machine::new(Kind::Entropy, true);
        assert!(machine.is_canary_alive());
        machine.write(CANARY + 5, &[0]);
        assert!(!machine.is_canary_alive());
    }
}
