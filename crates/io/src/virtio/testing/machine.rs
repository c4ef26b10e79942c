//! A machine of one device, as much of it as a driver needs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use host::clock::Clock;
use host::lock::RankedMutex;
use memory::GuestMemory;
use x86::Gpa;

use crate::bus::AccessSize::{self, Dword, Word};
use crate::bus::{MmioDevice, PortDevice};
use crate::disk::memory::Memory;
use crate::irq::{Fabric, Kick};
use crate::network::frame::Frame;
use crate::network::inbox::Inbox;
use crate::network::{Mac, Wire};
use crate::pci::{Host, SLOT_BYTES, WINDOW};
use crate::timer::TimerQueue;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, Disk};
use crate::virtio::console::{Console, PortKind};
use crate::virtio::entropy::Entropy;
use crate::virtio::fs::SharedFolder;
use crate::virtio::net::Net;
use crate::virtio::vsock::Vsock;
use crate::virtio::{Backend, mmio, transport};

pub const RAM: u64 = 1 << 20;
/// From here on no driver points to anything, so nothing may change.
pub const CANARY: u64 = 0xf_0000;
const CANARY_BYTE: u8 = 0x5a;
/// The page of each structure in the BAR.
pub const COMMON: u64 = 0;
pub const NOTIFY: u64 = 0x3000;

/// The devices there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Entropy,
    Balloon,
    Block,
    Network,
    Console,
    Vsock,
    Folder,
}

impl Kind {
    pub const ALL: [Kind; 7] =
        [Kind::Entropy, Kind::Balloon, Kind::Block, Kind::Network, Kind::Console, Kind::Vsock, Kind::Folder];
}

/// As many random numbers as wanted, the same for the same seed.
pub struct Random(u64);

impl Random {
    #[must_use]
    pub fn new(seed: u64) -> Random {
        // Far apart for seeds that are near, and never 0.
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.number() >> 16) % limit.max(1)
    }
}

/// A cable that brings back what was sent.
#[derive(Default)]
struct Echo(OnceLock<Arc<Inbox>>);

impl Wire for Echo {
    fn connect(&self, inbox: &Arc<Inbox>) {
        let _ = self.0.set(Arc::clone(inbox));
    }

    fn send(&self, frame: &mut Frame) {
        if let Some(inbox) = self.0.get() {
            inbox.offer(frame.clone());
        }
    }

    fn is_shared(&self) -> bool {
        true
    }
}

/// What the host's side of a device is driven by.
enum HostSide {
    Nothing,
    Balloon(Arc<Balloon>),
    Console(Arc<Console>),
    Vsock(Arc<Vsock>),
    Folder(PathBuf),
}

pub struct Machine {
    kind: Kind,
    host: Arc<RankedMutex<Host>>,
    /// Of a device that is on no bus.
    registers: Option<Arc<RankedMutex<mmio::Registers>>>,
    memory: Arc<GuestMemory>,
    side: HostSide,
    backend: Arc<dyn Backend>,
    streams: Vec<UnixStream>,
}

fn scratch() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("ringzero-fuzz-{}-{number}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    path
}

fn device(kind: Kind, memory: &Arc<GuestMemory>) -> (Arc<dyn Backend>, HostSide) {
    match kind {
        Kind::Entropy => (Arc::new(Entropy), HostSide::Nothing),
        Kind::Balloon => {
            let balloon = Arc::new(Balloon::new(memory.clone(), RAM >> 12));
            (balloon.clone(), HostSide::Balloon(balloon))
        }
        Kind::Block => {
            let disk = Disk { serial: "fuzz".into(), queues: 2, ..Disk::default() };
            (Arc::new(Block::new(Box::new(Memory::new(vec![0; 1 << 20])), disk)), HostSide::Nothing)
        }
        Kind::Network => {
            let mac = Mac([2, 0, 0, 0, 0, 1]);
            (Arc::new(Net::new(Arc::new(Echo::default()), mac, 1500)), HostSide::Nothing)
        }
        Kind::Console => {
            let kinds = vec![PortKind::Console, PortKind::Named("fuzz".into())];
            let console = Arc::new(Console::new(kinds).expect("a console of two ports"));
            (console.clone(), HostSide::Console(console))
        }
        Kind::Vsock => {
            let vsock = Arc::new(Vsock::new(3, None).expect("an address of guests"));
            (vsock.clone(), HostSide::Vsock(vsock))
        }
        Kind::Folder => {
            let path = scratch();
            std::fs::create_dir_all(path.join("a/b")).expect("a folder for tests");
            std::fs::write(path.join("a/file"), "content").expect("a file for tests");
            let folder = SharedFolder::new(&path, "fuzz", false).expect("a folder to share");
            (Arc::new(folder), HostSide::Folder(path))
        }
    }
}

/// Where a register of PCI's structures is for a device that is on no bus (4.2.2 "MMIO Device Register Layout").
fn place_off_bus(offset: u64) -> Option<u64> {
    const PLACES: [(u64, u64); 14] = [
        (0x00, 0x014),
        (0x04, 0x010),
        (0x08, 0x024),
        (0x0c, 0x020),
        (0x14, 0x070),
        (0x16, 0x030),
        (0x18, 0x038),
        (0x1c, 0x044),
        (0x20, 0x080),
        (0x24, 0x084),
        (0x28, 0x090),
        (0x2c, 0x094),
        (0x30, 0x0a0),
        (0x34, 0x0a4),
    ];
    if offset >= NOTIFY {
        return Some(0x050);
    }
    PLACES.into_iter().find_map(|(here, there)| (offset == COMMON + here).then_some(there))
}

impl Machine {
    /// A machine with a device of this kind: on the PCI bus, or on none.
    pub fn new(kind: Kind, is_on_bus: bool) -> Machine {
        let timers = TimerQueue::new(Clock::manual(1_000_000_000), Arc::default());
        let kick: Kick = Arc::new(|_| {});
        let fabric = Fabric::new(1, 1_000_000_000, &timers, &kick, Arc::default());
        let host = Host::new(Arc::clone(&fabric), Arc::new(|_| {}));
        let memory = Arc::new(GuestMemory::new(RAM).expect("a megabyte"));
        // A balloon takes whole pages, whatever is in them: that is what it is for.
        if kind != Kind::Balloon {
            let canary = vec![CANARY_BYTE; (RAM - CANARY) as usize];
            memory.write(Gpa(CANARY), &canary).expect("memory that is there");
        }
        let (backend, side) = device(kind, &memory);
        let mut registers = None;
        if !is_on_bus {
            let (backend, memory) = (Arc::clone(&backend), Arc::clone(&memory));
            registers = Some(mmio::registers(0, backend, memory, Arc::default(), &fabric));
        } else {
            let mut bus = host.lock();
            let slot = bus.free_slot().expect("an empty bus");
            let card = transport::card(Arc::clone(&backend), Arc::clone(&memory), Arc::default(), &slot);
            bus.insert(&slot, card);
        }
        let machine = Machine { kind, host, registers, memory, side, backend, streams: Vec::new() };
        machine.restore_bar();
        machine
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn queues(&self) -> u16 {
        self.backend.queues()
    }

    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.set(COMMON, Dword, select);
            self.get(COMMON + 4, Dword)
        };
        half(0) | half(1) << 32
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        // What is not in memory is not written.
        let _ = self.memory.write(Gpa(at), bytes);
    }

    pub fn read_16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        let _ = self.memory.read(Gpa(at), &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub fn is_on_bus(&self) -> bool {
        self.registers.is_none()
    }

    /// Any register of a device that is on no bus.
    pub fn get_raw(&self, offset: u64, size: AccessSize) {
        if let Some(registers) = &self.registers {
            let _ = registers.lock().read(offset, size);
        }
    }

    pub fn set_raw(&self, offset: u64, size: AccessSize, value: u64) {
        if let Some(registers) = &self.registers {
            registers.lock().write(offset, size, value & size.mask());
        }
    }

    pub fn get(&self, offset: u64, size: AccessSize) -> u64 {
        if let Some(registers) = &self.registers {
            return place_off_bus(offset).map_or(0, |at| registers.lock().read(at, Dword)) & size.mask();
        }
        MmioDevice::read(&mut *self.host.lock(), SLOT_BYTES + offset, size) & size.mask()
    }

    pub fn set(&self, offset: u64, size: AccessSize, value: u64) {
        if self.registers.is_some() {
            if let Some(at) = place_off_bus(offset) {
                self.set_raw(at, Dword, value & size.mask());
                if size == AccessSize::Qword {
                    self.set_raw(at + 4, Dword, value >> 32);
                }
            }
            return;
        }
        MmioDevice::write(&mut *self.host.lock(), SLOT_BYTES + offset, size, value & size.mask());
    }

    fn write_config(&self, register: u8, size: AccessSize, value: u32) {
        let mut host = self.host.lock();
        PortDevice::write(&mut *host, 0, Dword, 1 << 31 | 1 << 11 | u32::from(register & !3));
        PortDevice::write(&mut *host, 4 + u16::from(register & 3), size, value);
    }

    pub fn set_config(&self, register: u8, value: u32) {
        self.write_config(register & !3, Dword, value);
    }

    /// Puts the registers back to where this driver looks for them.
    pub fn restore_bar(&self) {
        self.write_config(0x10, Dword, WINDOW.0 as u32 + SLOT_BYTES as u32);
        self.write_config(0x14, Dword, 0);
        self.write_config(4, Word, 6);
    }

    pub fn is_canary_alive(&self) -> bool {
        if self.kind == Kind::Balloon {
            return true;
        }
        let mut bytes = vec![0; (RAM - CANARY) as usize];
        self.memory.read(Gpa(CANARY), &mut bytes).is_ok() && bytes.iter().all(|byte| *byte == CANARY_BYTE)
    }

    pub fn save_and_restore(&self) {
        if let Some(registers) = &self.registers {
            let mut registers = registers.lock();
            let state = registers.state();
            registers.restore(&state);
            return;
        }
        let mut host = self.host.lock();
        let state = host.state();
        host.restore(&state);
        debug_assert_eq!(host.state().cards.len(), state.cards.len());
    }

    /// Does something from the host's side.
    pub fn disturb(&mut self, random: &mut Random) {
        let choice = random.below(6);
        let opened = match &self.side {
            HostSide::Nothing => None,
            HostSide::Balloon(balloon) => {
                balloon.set_target(random.below(300));
                balloon.ask();
                None
            }
            HostSide::Console(console) if choice < 2 => console.connect_port(choice as usize).ok(),
            HostSide::Console(console) => {
                let _ = console.resize(0, random.number() as u16, random.number() as u16);
                None
            }
            HostSide::Vsock(vsock) if choice == 0 => vsock.connect_port(random.below(4) as u32).ok(),
            HostSide::Vsock(vsock) if choice == 1 => vsock.listen(random.below(4) as u32).ok(),
            HostSide::Vsock(_) => None,
            HostSide::Folder(path) => {
                let _ = match choice {
                    0 => std::fs::rename(path.join("a"), path.join("c")),
                    1 => std::fs::rename(path.join("c"), path.join("a")),
                    2 => std::fs::remove_file(path.join("a/file")),
                    _ => std::fs::write(path.join("a/file"), "again"),
                };
                None
            }
        };
        if let Some(stream) = opened.map(UnixStream::from) {
            let _ = stream.set_nonblocking(true);
            self.streams.push(stream);
        }
        for stream in &mut self.streams {
            match random.below(4) {
                0 => _ = stream.write(&[7; 3000]),
                1 => _ = stream.read(&mut [0; 5000]),
                2 => _ = stream.shutdown(std::net::Shutdown::Write),
                _ => {}
            }
        }
        if random.below(3) == 0 && !self.streams.is_empty() {
            let gone = random.below(self.streams.len() as u64) as usize;
            self.streams.swap_remove(gone);
        }
        self.streams.truncate(8);
    }

    pub fn end(&self) {
        if let Some(registers) = &self.registers {
            registers.lock().end();
        }
        self.host.lock().end();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
        if let HostSide::Folder(path) = &self.side {
            let _ = std::fs::remove_dir_all(path);
        }
    }
}
