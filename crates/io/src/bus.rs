//! The two buses: I/O ports and memory-mapped registers. A device is found by table look-up; what nobody claims reads
//! as all ones and swallows writes, as on a PC.

use std::sync::Arc;

use host::lock::{Rank, RankedMutex};
use x86::Gpa;

/// How wide one access is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AccessSize {
    Byte = 1,
    Word = 2,
    Dword = 4,
    Qword = 8,
}

impl AccessSize {
    #[must_use]
    pub const fn bytes(self) -> usize {
        self as usize
    }

    /// A value with all bits of this width set: what an absent device answers.
    #[must_use]
    pub const fn mask(self) -> u64 {
        match self {
            AccessSize::Byte => 0xff,
            AccessSize::Word => 0xffff,
            AccessSize::Dword => 0xffff_ffff,
            AccessSize::Qword => u64::MAX,
        }
    }

    #[must_use]
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(AccessSize::Byte),
            2 => Some(AccessSize::Word),
            4 => Some(AccessSize::Dword),
            8 => Some(AccessSize::Qword),
            _ => None,
        }
    }
}

/// A device behind I/O ports. `offset` counts from the first port of the range that it was given; the bus sees to it
/// that an access lies within the range and is no wider than the range was claimed for.
pub trait PortDevice: Send {
    fn read(&mut self, offset: u16, size: AccessSize) -> u32;
    fn write(&mut self, offset: u16, size: AccessSize, value: u32);
}

/// A device behind memory-mapped registers. `offset` counts in bytes from the start of its range.
pub trait MmioDevice: Send {
    fn read(&mut self, offset: u64, size: AccessSize) -> u64;
    fn write(&mut self, offset: u64, size: AccessSize, value: u64);
}

pub type SharedPortDevice = Arc<RankedMutex<dyn PortDevice>>;
pub type SharedMmioDevice = Arc<RankedMutex<dyn MmioDevice>>;

/// Make a device ready for a bus.
#[must_use]
pub fn shared<D>(device: D) -> Arc<RankedMutex<D>> {
    Arc::new(RankedMutex::new(Rank::Device, device))
}

/// Why a range cannot be claimed: a defect of whoever assembles the machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    #[error("I/O ports {first:#x} to {last:#x} overlap another device, or are not ports")]
    Ports { first: u16, last: u32 },
    #[error("too many devices on the port bus")]
    TooManyDevices,
    #[error("memory-mapped registers at {first} overlap another device, or are no range")]
    Mmio { first: Gpa },
}

struct PortRange {
    first: u16,
    count: u16,
    /// The device's offset of the first port.
    base: u16,
    widest: AccessSize,
    device: SharedPortDevice,
}

/// The I/O ports. Filled before the machine starts, then only read, so a look-up needs no lock.
pub struct PortBus {
    /// For each port, 0 or one more than the index of its range.
    table: Box<[u8; 0x1_0000]>,
    ranges: Vec<PortRange>,
}

impl Default for PortBus {
    fn default() -> Self {
        Self::new()
    }
}

impl PortBus {
    #[must_use]
    pub fn new() -> Self {
        PortBus { table: Box::new([0; 0x1_0000]), ranges: Vec::new() }
    }

    /// Give `count` ports from `first` to a device. Accesses wider than `widest`, and those that reach past the range,
    /// come to it byte by byte, as a PC's bus controller splits them for an 8-bit device.
    ///
    /// # Errors
    /// [`BusError`] when a port is taken or does not exist.
    pub fn claim(
        &mut self,
        first: u16,
        count: u16,
        widest: AccessSize,
        device: SharedPortDevice,
    ) -> Result<(), BusError> {
        self.claim_part(first, count, 0, widest, device)
    }

    /// The same for a device with several ranges: this one begins at the device's offset `base`.
    ///
    /// # Errors
    /// [`BusError`] when a port is taken or does not exist.
    pub fn claim_part(
        &mut self,
        first: u16,
        count: u16,
        base: u16,
        widest: AccessSize,
        device: SharedPortDevice,
    ) -> Result<(), BusError> {
        let error = BusError::Ports { first, last: u32::from(first) + u32::from(count) };
        let start = usize::from(first);
        let index = u8::try_from(self.ranges.len() + 1).map_err(|_| BusError::TooManyDevices)?;
        let Some(ports) = self.table.get_mut(start..start + usize::from(count)) else { return Err(error) };
        if ports.is_empty() || ports.iter().any(|port| *port != 0) {
            return Err(error);
        }
        ports.fill(index);
        self.ranges.push(PortRange { first, count, base, widest, device });
        Ok(())
    }

    #[inline]
    fn range(&self, port: u16) -> Option<&PortRange> {
        let index = self.table[usize::from(port)];
        self.ranges.get(usize::from(index).wrapping_sub(1))
    }

    /// Whether the range's device takes this access in one piece.
    #[inline]
    fn whole(range: &PortRange, offset: u16, size: AccessSize) -> bool {
        size <= range.widest && usize::from(offset) + size.bytes() <= usize::from(range.count)
    }

    #[inline]
    pub fn read(&self, port: u16, size: AccessSize) -> u32 {
        if size == AccessSize::Byte && self.table[usize::from(port)] == 0 {
            // Systems read such ports for the time that it takes.
            return 0xff;
        }
        if let Some(range) = self.range(port) {
            let offset = port - range.first;
            if Self::whole(range, offset, size) {
                return range.device.lock().read(range.base + offset, size) & size.mask() as u32;
            }
        }
        self.read_in_bytes(port, size)
    }

    #[cold]
    fn read_in_bytes(&self, port: u16, size: AccessSize) -> u32 {
        let mut value = 0;
        for byte in 0..size.bytes().min(4) as u16 {
            // Past port 0xffff there is nothing: a PC's address lines would wrap or leave the I/O space.
            let part = match port.checked_add(byte).and_then(|port| Some((port, self.range(port)?))) {
                Some((port, range)) => {
                    range.device.lock().read(range.base + (port - range.first), AccessSize::Byte) & 0xff
                }
                None => 0xff,
            };
            value |= part << (8 * byte);
        }
        value
    }

    #[inline]
    pub fn write(&self, port: u16, size: AccessSize, value: u32) {
        if let Some(range) = self.range(port) {
            let offset = port - range.first;
            if Self::whole(range, offset, size) {
                range.device.lock().write(range.base + offset, size, value & size.mask() as u32);
                return;
            }
        }
        self.write_in_bytes(port, size, value);
    }

    #[cold]
    fn write_in_bytes(&self, port: u16, size: AccessSize, value: u32) {
        for byte in 0..size.bytes().min(4) as u16 {
            let Some(port) = port.checked_add(byte) else { return };
            if let Some(range) = self.range(port) {
                let part = value >> (8 * byte) & 0xff;
                range.device.lock().write(range.base + (port - range.first), AccessSize::Byte, part);
            }
        }
    }
}

struct MmioRange {
    first: Gpa,
    size: u64,
    device: SharedMmioDevice,
}

/// The memory-mapped registers: a few ranges, sorted by address.
#[derive(Default)]
pub struct MmioBus {
    ranges: Vec<MmioRange>,
}

impl MmioBus {
    /// Give `size` bytes from `first` to a device.
    ///
    /// # Errors
    /// [`BusError::Mmio`] when the range is empty, wraps or overlaps another.
    pub fn claim(&mut self, first: Gpa, size: u64, device: SharedMmioDevice) -> Result<(), BusError> {
        let end = first.0.checked_add(size).filter(|end| *end > first.0).ok_or(BusError::Mmio { first })?;
        if self.ranges.iter().any(|range| range.first.0 < end && first.0 < range.first.0 + range.size) {
            return Err(BusError::Mmio { first });
        }
        let at = self.ranges.partition_point(|range| range.first < first);
        self.ranges.insert(at, MmioRange { first, size, device });
        Ok(())
    }

    /// The device and offset of an access that lies wholly in one range.
    fn find(&self, address: Gpa, size: AccessSize) -> Option<(&MmioRange, u64)> {
        let after = self.ranges.partition_point(|range| range.first <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let offset = address.0 - range.first.0;
        (offset < range.size && range.size - offset >= size.bytes() as u64).then_some((range, offset))
    }

    #[must_use]
    pub fn read(&self, address: Gpa, size: AccessSize) -> u64 {
        match self.find(address, size) {
            Some((range, offset)) => range.device.lock().read(offset, size) & size.mask(),
            None => size.mask(),
        }
    }

    pub fn write(&self, address: Gpa, size: AccessSize, value: u64) {
        if let Some((range, offset)) = self.find(address, size) {
            range.device.lock().write(offset, size, value & size.mask());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what it was asked, and answers with the offset in every byte.
    #[derive(Default)]
    struct Probe(Vec<(u64, AccessSize, Option<u64>)>);

    impl PortDevice for Probe {
        fn read(&mut self, offset: u16, size: AccessSize) -> u32 {
            self.0.push((u64::from(offset), size, None));
            (u32::from(offset) + 1) * 0x0101_0101
        }

        fn write(&mut self, offset: u16, size: AccessSize, value: u32) {
            self.0.push((u64::from(offset), size, Some(u64::from(value))));
        }
    }

    impl MmioDevice for Probe {
        fn read(&mut self, offset: u64, size: AccessSize) -> u64 {
            self.0.push((offset, size, None));
            u64::MAX - offset
        }

        fn write(&mut self, offset: u64, size: AccessSize, value: u64) {
            self.0.push((offset, size, Some(value)));
        }
    }

    use AccessSize::{Byte, Dword, Qword, Word};

    #[test]
    fn absent_ports_read_as_ones() {
        let bus = PortBus::new();
        assert_eq!(bus.read(0x1234, Byte), 0xff);
        assert_eq!(bus.read(0x1234, Word), 0xffff);
        assert_eq!(bus.read(0xffff, Dword), 0xffff_ffff);
        bus.write(0xffff, Dword, 1);
    }

    #[test]
    fn a_byte_device_gets_wide_accesses_in_bytes() {
        let mut bus = PortBus::new();
        let (left, right) = (shared(Probe::default()), shared(Probe::default()));
        bus.claim(0x100, 2, Byte, left.clone()).unwrap();
        bus.claim(0x102, 1, Dword, right.clone()).unwrap();
        assert_eq!(bus.read(0x100, Dword), 0xff01_0201);
        bus.write(0x101, Word, 0xaabb);
        assert_eq!(left.lock().0, [(0, Byte, None), (1, Byte, None), (1, Byte, Some(0xbb))]);
        assert_eq!(right.lock().0, [(0, Byte, None), (0, Byte, Some(0xaa))]);
    }

    #[test]
    fn a_wide_device_gets_wide_accesses_whole() {
        let mut bus = PortBus::new();
        let device = shared(Probe::default());
        bus.claim(0xfffc, 4, Dword, device.clone()).unwrap();
        assert_eq!(bus.read(0xfffc, Dword), 0x0101_0101);
        assert_eq!(bus.read(0xfffe, Word), 0x0303);
        // Reaches past the last port: split, and what is past it reads as ones.
        assert_eq!(bus.read(0xffff, Word), 0xff04);
        assert_eq!(device.lock().0, [(0, Dword, None), (2, Word, None), (3, Byte, None)]);
    }

    #[test]
    fn claims_must_not_overlap() {
        let mut bus = PortBus::new();
        let device = shared(Probe::default());
        bus.claim(0x60, 1, Byte, device.clone()).unwrap();
        assert!(bus.claim(0x5f, 2, Byte, device.clone()).is_err());
        assert!(bus.claim(0xffff, 2, Byte, device.clone()).is_err());
        assert!(bus.claim(0x70, 0, Byte, device).is_err());
    }

    #[test]
    fn mmio_finds_its_range_and_nothing_else() {
        let mut bus = MmioBus::default();
        let device = shared(Probe::default());
        bus.claim(Gpa(0xfec0_0000), 0x1000, device.clone()).unwrap();
        bus.claim(Gpa(0x1000), 0x10, shared(Probe::default())).unwrap();
        assert!(bus.claim(Gpa(0xfec0_0fff), 1, device.clone()).is_err());
        assert!(bus.claim(Gpa(u64::MAX), 2, device.clone()).is_err());
        assert_eq!(bus.read(Gpa(0xfec0_0010), Dword), 0xffff_ffef);
        assert_eq!(bus.read(Gpa(0xfec0_0ffc), Qword), u64::MAX, "straddles the end: nobody answers");
        assert_eq!(bus.read(Gpa(0x1010), Byte), 0xff);
        bus.write(Gpa(0xfec0_0000), Byte, 0x1ff);
        assert_eq!(device.lock().0, [(0x10, Dword, None), (0, Byte, Some(0xff))]);
    }
}
