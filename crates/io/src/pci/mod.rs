//! The PCI bus: one host bridge, one bus with up to 31 more functions, and a window of addresses for their registers.
//!
//! The guest finds functions through configuration mechanism 1 (PCI Local Bus Specification 3.0, 3.2.2.3.2 "Software
//! Generation of Configuration Transactions"), ports 0xcf8 and 0xcfc. Firmware's work is done here: each BAR has an address
//! in the window from the start, and each INTA# an interrupt line; a guest may move the former.
//!
//! A register access: monitor -> platform -> bus -> [`Host`] -> [`Function`]. What is slow belongs to a thread of the
//! device's own: the host's lock is held meanwhile.

pub mod config;
pub mod hotplug;
pub mod interrupts;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::thread::JoinHandle;

use host::lock::RankedMutex;
use x86::Gpa;

use crate::bus::{AccessSize, MmioDevice, PortDevice, shared};
use crate::irq::Fabric;
use crate::timer::{EndRequest, SCI_LINE};
use crate::virtio;
use config::{Config, ConfigState, Identity, command, offset, status};
use hotplug::{Hotplug, HotplugState, Presence};
use interrupts::{InterruptState, Interrupts};

/// Ports 0xcf8 to 0xcff.
pub const CONFIG_PORTS: (u16, u16) = (0xcf8, 8);
/// Where the ports of [`hotplug`] begin among the host's own offsets.
pub const EVENT_OFFSET: u16 = 0x10;
pub const SLOTS_OFFSET: u16 = 0x20;
/// Where BARs can be: python/ringzero/machine/address_map.py and the DSDT tell the same.
pub const WINDOW: Gpa = Gpa(0xe000_0000);
pub const WINDOW_BYTES: u64 = 0x1000_0000;
/// The ISA lines that the bus's interrupts share, by turns; the DSDT's _PRT tells the same.
pub const LINES: [u8; 2] = [10, 11];

/// Slots of the bus, one function each.
const SLOTS: usize = 32;
/// Cards beside the bridge.
pub const MOST_CARDS: usize = SLOTS - 1;
/// Each function has this much of the window, whatever it needs.
pub const SLOT_BYTES: u64 = 0x10_0000;
/// CONFIG_ADDRESS: the mechanism is on; bus, device and function, register.
const ENABLE: u32 = 1 << 31;
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// The bridge itself: a host bridge that any system takes for one, of the vendor of virtual hardware.
const BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// A device on the bus. Its registers are in its BARs; offsets count from the BAR's start.
pub trait Function: Send {
    fn read(&mut self, bar: usize, offset: u64, size: AccessSize) -> u64;
    fn write(&mut self, bar: usize, offset: u64, size: AccessSize, value: u64);

    /// A register of its own in the configuration space, that is more than bits which keep what is written to them.
    fn read_config(&mut self, _config: &Config, _at: u8, _size: AccessSize) -> Option<u32> {
        None
    }

    /// The guest has written the configuration space.
    fn config_written(&mut self, _config: &Config, _at: u8, _size: AccessSize, _value: u32) {}

    /// What a saved machine keeps of the device itself.
    fn state(&self) -> FunctionState {
        FunctionState::Plain
    }

    fn restore(&mut self, _state: &FunctionState) {}

    /// The machine has ended: lets go of what others may want.
    fn end(&mut self) {}
}

/// What a saved machine keeps of a device, by its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FunctionState {
    /// It has no state of its own.
    Plain,
    Virtio(virtio::transport::State),
}

/// Where a function's MSI-X table is, and its array of pending bits.
#[derive(Clone, Copy, Debug)]
pub struct MsixPlace {
    pub bar: usize,
    pub table: u64,
    pub pending: u64,
    pub vectors: u16,
}

/// The number of the MSI-X capability (appendix H "Capability IDs").
const MSIX_CAPABILITY: u8 = 0x11;
/// No array of pending bits or table is longer than this: 256 vectors.
const MSIX_TABLE_BYTES: u64 = 0x1000;

/// What a function brings with it to the bus.
pub struct Card {
    pub config: Config,
    pub interrupts: Arc<Interrupts>,
    pub function: Box<dyn Function>,
    /// And where its MSI-X capability is.
    msix: Option<(u8, MsixPlace)>,
    presence: Arc<Presence>,
}

impl Card {
    /// Gives `function` its interrupts: INTA#, and MSI-X where there is a place for its table.
    #[must_use]
    pub fn new(mut config: Config, interrupts: Arc<Interrupts>, msix: Option<MsixPlace>, f: Box<dyn Function>) -> Self {
        let msix = msix.and_then(|place| {
            let mut body = [0; 10];
            body[..2].copy_from_slice(&place.vectors.saturating_sub(1).to_le_bytes());
            body[2..6].copy_from_slice(&(place.table as u32 | place.bar as u32).to_le_bytes());
            body[6..].copy_from_slice(&(place.pending as u32 | place.bar as u32).to_le_bytes());
            let control = (interrupts::ENABLED | interrupts::ALL_MASKED).to_le_bytes();
            Some((config.add_capability(MSIX_CAPABILITY, &body, &control)?, place))
        });
        Card { config, interrupts, function: f, msix, presence: Arc::default() }
    }

    fn read_config(&mut self, at: u8, size: AccessSize) -> u32 {
        if let Some(value) = self.function.read_config(&self.config, at, size) {
            return value;
        }
        let mut value = self.config.read(at, size);
        // The status register is the one word whose bits come from elsewhere.
        let status_byte = u32::from(offset::STATUS).wrapping_sub(u32::from(at));
        if status_byte < size.bytes() as u32 && self.interrupts.is_waiting() {
            value |= u32::from(status::INTERRUPT) << (8 * status_byte);
        }
        value
    }

    fn write_config(&mut self, at: u8, size: AccessSize, value: u32) {
        self.config.write(at, size, value);
        self.tell_interrupts();
        self.function.config_written(&self.config, at, size, value);
    }

    fn tell_interrupts(&self) {
        let msix = self.msix.map_or(0, |(capability, _)| self.config.read(capability + 2, AccessSize::Word) as u16);
        self.interrupts.set_control(msix, self.config.command() & command::INTERRUPT_DISABLE != 0);
    }

    /// Where in MSI-X's own registers an offset of a BAR is: (is the table, offset there).
    fn in_msix(&self, bar: usize, offset: u64) -> Option<(bool, u64)> {
        let (_, place) = self.msix.filter(|(_, place)| place.bar == bar)?;
        let within = |start: u64| offset.checked_sub(start).filter(|offset| *offset < MSIX_TABLE_BYTES);
        within(place.table).map(|at| (true, at)).or_else(|| within(place.pending).map(|at| (false, at)))
    }
}

/// What a saved machine keeps of each function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardState {
    pub slot: usize,
    pub config: ConfigState,
    pub interrupts: InterruptState,
    pub function: FunctionState,
}

/// What a saved machine keeps of the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostState {
    /// CONFIG_ADDRESS.
    pub address: u32,
    pub cards: Vec<CardState>,
    pub hotplug: HotplugState,
}

/// The host bridge, with the reset register of its chipset amidst its ports: the two share an address but not a width,
/// since 0xcf8 answers to whole doublewords only.
pub struct Host {
    fabric: Arc<Fabric>,
    slots: [Option<Card>; SLOTS],
    address: u32,
    reset: u8,
    end: EndRequest,
    hotplug: Hotplug,
    /// Threads that end the devices of ejected cards.
    leaving: Vec<JoinHandle<()>>,
    has_ended: bool,
}

/// The bridge is given nothing to do: it has no registers outside its configuration space.
struct Bridge;

impl Function for Bridge {
    fn read(&mut self, _bar: usize, _offset: u64, size: AccessSize) -> u64 {
        size.mask()
    }

    fn write(&mut self, _bar: usize, _offset: u64, _size: AccessSize, _value: u64) {}
}

/// A free slot of the bus, and what there is for whoever comes into it.
#[derive(Clone)]
pub struct Slot {
    number: usize,
    /// Its part of the window, [`SLOT_BYTES`] long.
    pub window: Gpa,
    /// The interrupt line of its INTA#.
    pub line: u8,
    fabric: Arc<Fabric>,
}

impl Slot {
    #[must_use]
    pub fn interrupts(&self, vectors: u16) -> Arc<Interrupts> {
        Interrupts::new(Arc::clone(&self.fabric), self.fabric.line(self.line), vectors)
    }
}

impl Host {
    /// A bus with nothing but its bridge, in slot 0.
    #[must_use]
    pub fn new(fabric: Arc<Fabric>, end: EndRequest) -> Arc<RankedMutex<Self>> {
        let hotplug = Hotplug::new(fabric.line(SCI_LINE));
        let (slots, leaving) = ([const { None }; SLOTS], Vec::new());
        let mut host = Host { fabric, slots, address: 0, reset: 0, end, hotplug, leaving, has_ended: false };
        if let Some(slot) = host.free_slot() {
            let card = Card::new(Config::new(BRIDGE), slot.interrupts(0), None, Box::new(Bridge));
            host.insert(&slot, card);
        }
        shared(host)
    }

    /// The first slot without a card; `None` when the bus is full, or its machine has ended.
    #[must_use]
    pub fn free_slot(&self) -> Option<Slot> {
        if self.has_ended {
            return None;
        }
        let number = self.slots.iter().position(Option::is_none)?;
        let window = WINDOW.add(number as u64 * SLOT_BYTES);
        let line = LINES[number % LINES.len()];
        Some(Slot { number, window, line, fabric: Arc::clone(&self.fabric) })
    }

    /// Puts a card into its slot, before the guest starts.
    pub fn insert(&mut self, slot: &Slot, card: Card) -> Arc<Presence> {
        let presence = Arc::clone(&card.presence);
        self.slots[slot.number] = Some(card);
        presence
    }

    /// Puts a card into its slot while the guest runs, and tells it.
    pub fn plug_in(&mut self, slot: &Slot, card: Card) -> Arc<Presence> {
        let presence = self.insert(slot, card);
        self.hotplug.inserted(slot.number);
        presence
    }

    /// Asks the guest for a card; false when it is gone already.
    pub fn want_back(&mut self, presence: &Arc<Presence>) -> bool {
        let is_it = |card: &Option<Card>| card.as_ref().is_some_and(|card| Arc::ptr_eq(&card.presence, presence));
        let Some(slot) = self.slots.iter().position(is_it) else { return false };
        self.hotplug.wanted(slot);
        true
    }

    /// The guest has put these slots out of use.
    fn eject(&mut self, slots: u32) {
        self.leaving.retain(|thread| !thread.is_finished());
        for slot in (0..SLOTS).filter(|slot| slots & 1 << slot != 0) {
            self.hotplug.gone(slot);
            if let Some(card) = self.slots[slot].take() {
                self.leaving.extend(hotplug::leave(card));
            }
        }
    }

    /// The card and register that CONFIG_ADDRESS selects, with `lane` the port's place in CONFIG_DATA.
    fn selected(&mut self, lane: u16) -> Option<(&mut Card, u8)> {
        let (bus, function) = (self.address >> 16 & 0xff, self.address >> 8 & 7);
        if self.address & ENABLE == 0 || bus != 0 || function != 0 {
            return None;
        }
        let card = self.slots[(self.address >> 11) as usize % SLOTS].as_mut()?;
        Some((card, self.address as u8 | (lane & 3) as u8))
    }

    /// The card, BAR and offset behind an address of the window.
    fn behind(&mut self, address: Gpa) -> Option<(&mut Card, usize, u64)> {
        self.slots.iter_mut().flatten().find_map(|card| {
            let (bar, offset) = card.config.find(address)?;
            Some((card, bar, offset))
        })
    }

    #[must_use]
    pub fn state(&self) -> HostState {
        let cards = self.slots.iter().enumerate().filter_map(|(slot, card)| {
            let card = card.as_ref()?;
            let (config, interrupts) = (card.config.state(), card.interrupts.state());
            Some(CardState { slot, config, interrupts, function: card.function.state() })
        });
        HostState { address: self.address, cards: cards.collect(), hotplug: self.hotplug.state() }
    }

    /// Takes over a state of a bus with the same cards.
    pub fn restore(&mut self, state: &HostState) {
        self.address = state.address & ADDRESS_BITS;
        self.hotplug.restore(&state.hotplug);
        for saved in &state.cards {
            if let Some(card) = self.slots.get_mut(saved.slot).and_then(Option::as_mut) {
                card.config.restore(&saved.config);
                card.function.restore(&saved.function);
                card.interrupts.restore(&saved.interrupts);
                card.tell_interrupts();
            }
        }
    }
}

impl Host {
    /// The machine has ended: no device does anything any more, or keeps what others may want.
    ///
    /// What is given must still be waited for, with the bus unlocked: the threads of cards that are on their way out.
    pub fn end(&mut self) -> Vec<JoinHandle<()>> {
        self.has_ended = true;
        self.slots.iter_mut().flatten().for_each(|card| card.function.end());
        std::mem::take(&mut self.leaving)
    }
}

impl PortDevice for Host {
    fn read(&mut self, offset: u16, size: AccessSize) -> u32 {
        match (offset, size) {
            (0, AccessSize::Dword) => self.address,
            (1, AccessSize::Byte) => u32::from(self.reset),
            (SLOTS_OFFSET.., _) => self.hotplug.read_slots(offset - SLOTS_OFFSET, size),
            (EVENT_OFFSET.., _) => u32::from(self.hotplug.read_event(offset - EVENT_OFFSET)),
            (4.., _) => self.selected(offset).map_or(u32::MAX, |(card, at)| card.read_config(at, size)),
            _ => u32::MAX,
        }
    }

    fn write(&mut self, offset: u16, size: AccessSize, value: u32) {
        match (offset, size) {
            (0, AccessSize::Dword) => self.address = value & ADDRESS_BITS,
            (1, AccessSize::Byte) => {
                // Intel ICH9 (316972) 13.7.5 "RST_CNT", RST_CPU: the reset comes when the bit rises.
                let rises = value & 4 != 0 && self.reset & 4 == 0;
                self.reset = value as u8 & 0xe;
                if rises {
                    (self.end)("reboot");
                }
            }
            (SLOTS_OFFSET.., _) => {
                let ejected = self.hotplug.write_slots(offset - SLOTS_OFFSET, size, value);
                self.eject(ejected);
            }
            (EVENT_OFFSET.., _) => self.hotplug.write_event(offset - EVENT_OFFSET, value as u8),
            (4.., _) => {
                if let Some((card, at)) = self.selected(offset) {
                    card.write_config(at, size, value);
                }
            }
            _ => {}
        }
    }
}

impl MmioDevice for Host {
    fn read(&mut self, offset: u64, size: AccessSize) -> u64 {
        let Some((card, bar, offset)) = self.behind(WINDOW.add(offset)) else { return size.mask() };
        match card.in_msix(bar, offset) {
            Some((true, at)) => card.interrupts.read_table(at, size),
            Some((false, at)) => card.interrupts.read_pending(at, size),
            None => card.function.read(bar, offset, size),
        }
    }

    fn write(&mut self, offset: u64, size: AccessSize, value: u64) {
        let Some((card, bar, offset)) = self.behind(WINDOW.add(offset)) else { return };
        match card.in_msix(bar, offset) {
            Some((true, at)) => card.interrupts.write_table(at, size, value),
            Some((false, _)) => {}
            None => card.function.write(bar, offset, size, value),
        }
    }
}
