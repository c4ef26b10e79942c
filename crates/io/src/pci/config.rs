//! The configuration space of one function: 256 bytes, of which the guest can change those bits that the mask says.
//! Source: PCI Local Bus Specification 3.0, chapter 6 "Configuration Space"; sections below are of it.

use crate::bus::AccessSize;
use x86::Gpa;

pub const CONFIG_BYTES: usize = 256;
/// A function has six registers for addresses; a 64-bit one takes two.
pub const BARS: usize = 6;

/// Offsets in the header, 6.1 "Configuration Space Organization".
pub mod offset {
    pub const VENDOR: u8 = 0x00;
    pub const COMMAND: u8 = 0x04;
    pub const STATUS: u8 = 0x06;
    pub const REVISION: u8 = 0x08;
    pub const BAR: u8 = 0x10;
    pub const SUBSYSTEM: u8 = 0x2c;
    pub const CAPABILITIES: u8 = 0x34;
    pub const INTERRUPT_LINE: u8 = 0x3c;
    pub const INTERRUPT_PIN: u8 = 0x3d;
    /// Where the first capability may be.
    pub const AFTER_HEADER: u8 = 0x40;
}

/// Bits of the command register, 6.2.2 "Device Control".
pub mod command {
    pub const MEMORY: u16 = 1 << 1;
    pub const BUS_MASTER: u16 = 1 << 2;
    pub const INTERRUPT_DISABLE: u16 = 1 << 10;
}

/// Bits of the status register, 6.2.3 "Device Status".
pub mod status {
    pub const INTERRUPT: u16 = 1 << 3;
    pub const CAPABILITIES: u16 = 1 << 4;
}

/// A 64-bit memory BAR, not prefetchable, 6.2.5.1 "Address Maps".
const MEMORY_64: u32 = 0b100;
const BAR_FLAGS: u64 = 0xf;

/// What a function says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass and programming interface: 0xBBSSPP.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The registers as a saved machine keeps them. The layout is given by whoever makes the function again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigState(pub [u8; CONFIG_BYTES]);

#[derive(Clone, Debug)]
pub struct Config {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    /// Size of the memory BAR that begins at each register; 0 where none does.
    sizes: [u64; BARS],
    /// Where the next capability's number is to be put, and where there is room for it.
    last_link: u8,
    free: u8,
}

impl Config {
    /// A type 0 header without BARs, interrupt or capabilities.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut config = Config {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            sizes: [0; BARS],
            last_link: offset::CAPABILITIES,
            free: offset::AFTER_HEADER,
        };
        config.put(offset::VENDOR, u32::from(identity.device) << 16 | u32::from(identity.vendor));
        config.put(offset::REVISION, identity.class << 8 | u32::from(identity.revision));
        config.put(offset::SUBSYSTEM, u32::from(identity.subsystem) << 16 | u32::from(identity.subsystem_vendor));
        let writable = command::MEMORY | command::BUS_MASTER | command::INTERRUPT_DISABLE;
        config.writable[usize::from(offset::COMMAND)..][..2].copy_from_slice(&writable.to_le_bytes());
        config
    }

    fn put(&mut self, at: u8, value: u32) {
        if let Some(place) = self.bytes.get_mut(usize::from(at)..).and_then(|rest| rest.get_mut(..4)) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Gives the function a 64-bit memory BAR of `size` bytes, a power of two from 16 on, in registers `bar` and
    /// `bar + 1`, and puts it where firmware would.
    pub fn add_memory_bar(&mut self, bar: usize, size: u64, address: Gpa) {
        debug_assert!(size.is_power_of_two() && size > BAR_FLAGS && bar + 1 < BARS && address.0 & (size - 1) == 0);
        let at = usize::from(offset::BAR) + 4 * bar;
        self.sizes[bar] = size;
        self.bytes[at..at + 8].copy_from_slice(&(address.0 | u64::from(MEMORY_64)).to_le_bytes());
        // The bits below the size are hard-wired: so the guest learns it, by writing ones and reading them back.
        self.writable[at..at + 8].copy_from_slice(&(!(size - 1) & !BAR_FLAGS).to_le_bytes());
    }

    /// Says which interrupt line the function's INTA# is routed to. The guest may write the number; it changes nothing.
    pub fn set_interrupt(&mut self, line: u8) {
        self.bytes[usize::from(offset::INTERRUPT_LINE)] = line;
        self.writable[usize::from(offset::INTERRUPT_LINE)] = 0xff;
        self.bytes[usize::from(offset::INTERRUPT_PIN)] = 1;
    }

    /// Appends a capability, 6.7 "Capabilities List": its number and what follows the link, with the bits of the latter
    /// that the guest can change. Gives its offset; `None` when the configuration space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u8> {
        let at = usize::from(self.free);
        let end = at + 2 + body.len();
        self.bytes.get_mut(at + 2..end)?.copy_from_slice(body);
        self.bytes[at] = id;
        for (mask, bits) in self.writable[at + 2..end].iter_mut().zip(writable) {
            *mask = *bits;
        }
        self.bytes[usize::from(self.last_link)] = at as u8;
        self.last_link = at as u8 + 1;
        self.bytes[usize::from(offset::STATUS)] |= status::CAPABILITIES as u8;
        self.free = u8::try_from(end.next_multiple_of(4)).unwrap_or(u8::MAX);
        Some(at as u8)
    }

    #[must_use]
    pub fn read(&self, at: u8, size: AccessSize) -> u32 {
        let mut value = [0; 4];
        for (byte, place) in value.iter_mut().zip(usize::from(at)..CONFIG_BYTES).take(size.bytes()) {
            *byte = self.bytes[place];
        }
        u32::from_le_bytes(value)
    }

    pub fn write(&mut self, at: u8, size: AccessSize, value: u32) {
        for (byte, place) in value.to_le_bytes().into_iter().zip(usize::from(at)..CONFIG_BYTES).take(size.bytes()) {
            let mask = self.writable[place];
            self.bytes[place] = self.bytes[place] & !mask | byte & mask;
        }
    }

    #[must_use]
    pub fn command(&self) -> u16 {
        self.read(offset::COMMAND, AccessSize::Word) as u16
    }

    /// The BAR that an address lies in, and the offset there. None while the function does not decode memory.
    #[must_use]
    pub fn find(&self, address: Gpa) -> Option<(usize, u64)> {
        if self.command() & command::MEMORY == 0 {
            return None;
        }
        self.sizes.iter().enumerate().find_map(|(bar, size)| {
            let offset = address.0.checked_sub(self.bar(bar)?.0)?;
            (offset < *size).then_some((bar, offset))
        })
    }

    /// Where a BAR is, if there is one.
    #[must_use]
    pub fn bar(&self, bar: usize) -> Option<Gpa> {
        self.sizes.get(bar).filter(|size| **size != 0)?;
        let at = usize::from(offset::BAR) + 4 * bar;
        let bytes = self.bytes.get(at..at + 8)?.try_into().ok()?;
        Some(Gpa(u64::from_le_bytes(bytes) & !BAR_FLAGS))
    }

    #[must_use]
    pub fn state(&self) -> ConfigState {
        ConfigState(self.bytes)
    }

    /// Takes over what the guest had written; what it cannot write stays as it is, whatever the state says.
    pub fn restore(&mut self, state: &ConfigState) {
        for ((byte, mask), saved) in self.bytes.iter_mut().zip(&self.writable).zip(&state.0) {
            *byte = *byte & !mask | saved & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use AccessSize::{Byte, Dword, Word};

    fn config() -> Config {
        let mut config = Config::new(Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: 0x00ff_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        config.add_memory_bar(0, 0x8000, Gpa(0xe000_8000));
        config
    }

    #[test]
    fn a_guest_learns_the_size_of_a_bar_and_moves_it() {
        let mut config = config();
        assert_eq!(config.read(0x10, Dword), 0xe000_8004);
        assert_eq!(config.find(Gpa(0xe000_8010)), None, "memory is not decoded after reset");
        config.write(0x10, Dword, u32::MAX);
        config.write(0x14, Dword, u32::MAX);
        assert_eq!((config.read(0x10, Dword), config.read(0x14, Dword)), (0xffff_8004, u32::MAX));
        config.write(0x10, Dword, 0xe123_4567);
        config.write(0x14, Dword, 0);
        config.write(4, Word, 0xffff);
        assert_eq!(config.command(), command::MEMORY | command::BUS_MASTER | command::INTERRUPT_DISABLE);
        assert_eq!(config.bar(0), Some(Gpa(0xe123_0000)));
        assert_eq!(config.find(Gpa(0xe123_7fff)), Some((0, 0x7fff)));
        assert_eq!(config.find(Gpa(0xe123_8000)), None);
        assert_eq!(config.find(Gpa(0xe122_ffff)), None);
        assert_eq!((config.bar(1), config.bar(2), config.bar(9)), (None, None, None));
    }

    #[test]
    fn capabilities_are_linked_and_end_where_there_is_no_room() {
        let mut config = config();
        assert_eq!(config.read(offset::STATUS, Word) & 1 << 4, 0);
        let first = config.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        let second = config.add_capability(0x09, &[7; 3], &[]).unwrap();
        assert_eq!(u32::from(first), config.read(0x34, Byte));
        assert_eq!(config.read(first, Word), u32::from(second) << 8 | 0x11);
        assert_eq!(config.read(second, Word), 0x09);
        config.write(first + 2, Dword, u32::MAX);
        assert_eq!(config.read(first + 2, Dword), 0xc000, "only what may be written");
        assert!(config.add_capability(0x09, &[0; 200], &[]).is_none());
        assert_eq!(config.read(0xfe, Dword), 0);
    }

    #[test]
    fn identity_cannot_be_changed_and_state_comes_back() {
        let mut config = config();
        config.set_interrupt(10);
        for at in (0..=0xfc).step_by(4) {
            config.write(at, Dword, u32::MAX);
        }
        assert_eq!(config.read(0, Dword), 0x1044_1af4);
        assert_eq!(config.read(8, Dword), 0xff00_0001);
        assert_eq!(config.read(0x3c, Word), 0x1ff);
        let saved = config.state();
        let mut other = self::config();
        other.set_interrupt(11);
        other.restore(&saved);
        assert_eq!(other.state(), saved);
        other.restore(&ConfigState([0xaa; CONFIG_BYTES]));
        assert_eq!(other.read(0, Dword), 0x1044_1af4, "a damaged state changes no more than a guest can");
    }
}
