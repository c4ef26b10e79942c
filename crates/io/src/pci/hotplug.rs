//! Cards that come and go while the guest runs, as ACPI has it: general-purpose event 1 says that something is to be done,
//! and one register each which slots have a new card, and which the operator wants one back from. The guest's system puts a
//! card out of use and then ejects it. Source: ACPI Specification 6.5, 4.8.4.1 "General-Purpose Event Registers", 6.3
//! "Device Insertion, Removal, and Status Objects"; the rest is ours, and the DSDT
//! (python/ringzero/machine/firmware/hotplug.py) tells the guest.
//!
//! A slot whose card nobody wants back cannot be ejected: a guest that tries finds it where it was.

use std::sync::{Arc, Condvar};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use host::lock::{Rank, RankedMutex};

use super::Card;
use crate::bus::AccessSize;
use crate::irq::IrqLine;

/// Ports of general-purpose event block 0: 8 status bits, 8 enable bits.
pub const EVENT_PORTS: (u16, u16) = (0x610, 2);
/// Ports of the slots' registers, one bit a slot each.
pub const SLOT_PORTS: (u16, u16) = (0x620, 12);
/// The event whose handler is `\_GPE._E01`.
const EVENT: u8 = 1 << 1;

/// Offsets of the slots' registers. A one that is written to one of the first two says that its slot has been seen.
const INSERTED: u16 = 0;
const WANTED: u16 = 4;
const EJECT: u16 = 8;

/// What a saved machine keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HotplugState {
    pub status: u8,
    pub enable: u8,
    /// Slots with a card that the guest has not been told of.
    pub inserted: u32,
    /// Slots of which the guest has not been told that the operator wants the card back.
    pub wanted: u32,
    /// Slots whose card the operator wants back: these can be ejected.
    pub ejectable: u32,
}

/// The registers.
pub(super) struct Hotplug {
    state: HotplugState,
    sci: IrqLine,
    level: bool,
}

impl Hotplug {
    pub fn new(sci: IrqLine) -> Self {
        Hotplug { state: HotplugState::default(), sci, level: false }
    }

    /// A card has come into a slot while the guest runs.
    pub fn inserted(&mut self, slot: usize) {
        self.state.inserted |= 1 << slot;
        self.tell();
    }

    /// The operator wants the card of a slot back.
    pub fn wanted(&mut self, slot: usize) {
        self.state.wanted |= 1 << slot;
        self.state.ejectable |= 1 << slot;
        self.tell();
    }

    /// The card of a slot has gone.
    pub fn gone(&mut self, slot: usize) {
        for slots in [&mut self.state.inserted, &mut self.state.wanted, &mut self.state.ejectable] {
            *slots &= !(1 << slot);
        }
    }

    fn tell(&mut self) {
        self.state.status |= EVENT;
        self.follow();
    }

    fn follow(&mut self) {
        let level = self.state.status & self.state.enable != 0;
        if level != self.level {
            self.level = level;
            self.sci.set(level);
        }
    }

    /// Of the event block: status, then enable.
    pub fn read_event(&self, offset: u16) -> u8 {
        if offset == 0 { self.state.status } else { self.state.enable }
    }

    pub fn write_event(&mut self, offset: u16, value: u8) {
        match offset {
            0 => self.state.status &= !value,
            _ => self.state.enable = value,
        }
        self.follow();
    }

    pub fn read_slots(&self, offset: u16, size: AccessSize) -> u32 {
        match (offset, size) {
            (INSERTED, AccessSize::Dword) => self.state.inserted,
            (WANTED, AccessSize::Dword) => self.state.wanted,
            _ => 0,
        }
    }

    /// Gives the slots that the guest ejects, of those that it may.
    #[must_use]
    pub fn write_slots(&mut self, offset: u16, size: AccessSize, value: u32) -> u32 {
        match (offset, size) {
            (INSERTED, AccessSize::Dword) => self.state.inserted &= !value,
            (WANTED, AccessSize::Dword) => self.state.wanted &= !value,
            (EJECT, AccessSize::Dword) => return value & self.state.ejectable,
            _ => {}
        }
        0
    }

    pub fn state(&self) -> HotplugState {
        self.state
    }

    pub fn restore(&mut self, state: &HotplugState) {
        self.state = *state;
        self.follow();
    }
}

/// Whether a card is still there: one a card, whichever slot it is in.
#[derive(Debug)]
pub struct Presence {
    is_gone: RankedMutex<bool>,
    changed: Condvar,
}

impl Default for Presence {
    fn default() -> Self {
        Presence { is_gone: RankedMutex::new(Rank::Waiting, false), changed: Condvar::new() }
    }
}

impl Presence {
    #[must_use]
    pub fn is_gone(&self) -> bool {
        *self.is_gone.lock()
    }

    /// Waits until the card is gone and its device has let go of all it had; false when `timeout` passed first.
    #[must_use]
    pub fn wait_gone(&self, timeout: Duration) -> bool {
        let begin = Instant::now();
        let mut is_gone = self.is_gone.lock();
        while !*is_gone {
            let Some(left) = timeout.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) else { return false };
            is_gone = is_gone.wait(&self.changed, Some(left));
        }
        true
    }

    fn set_gone(&self) {
        *self.is_gone.lock() = true;
        self.changed.notify_all();
    }
}

/// A card on its way out. Dropping it ends its device, which waits for requests that are under way.
struct Leaving(Option<Card>);

impl Drop for Leaving {
    fn drop(&mut self) {
        let Some(mut card) = self.0.take() else { return };
        let presence = Arc::clone(&card.presence);
        card.function.end();
        drop(card);
        presence.set_gone();
    }
}

/// Ends a card's device in a thread of its own, for no processor waits for it. Without a thread to be had it does.
pub(super) fn leave(card: Card) -> Option<JoinHandle<()>> {
    let leaving = Leaving(Some(card));
    thread::Builder::new().name("rz-eject".into()).spawn(move || drop(leaving)).ok()
}
