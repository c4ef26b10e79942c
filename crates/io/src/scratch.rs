//! Memory-mapped registers that keep what is written to them and do nothing else: for tests of how instructions access a
//! device. No PC has them; a machine gets them when it is asked to.

use crate::bus::{AccessSize, MmioDevice};

/// Enough for any test, and little enough for any host.
pub const MOST_SCRATCH_BYTES: u64 = 1 << 20;

pub struct Scratch(Box<[u8]>);

impl Scratch {
    /// `size` bytes of zeros; `None` when that is none or too many.
    #[must_use]
    pub fn new(size: u64) -> Option<Scratch> {
        let size = Some(size).filter(|size| (1..=MOST_SCRATCH_BYTES).contains(size))?;
        Some(Scratch(vec![0; usize::try_from(size).ok()?].into()))
    }

    /// The bytes of an access. The bus sees to it that they are there.
    fn place(&mut self, offset: u64, size: AccessSize) -> Option<&mut [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.0.get_mut(start..)?.get_mut(..size.bytes())
    }
}

impl MmioDevice for Scratch {
    fn read(&mut self, offset: u64, size: AccessSize) -> u64 {
        let mut value = [0; 8];
        if let Some(bytes) = self.place(offset, size) {
            value[..bytes.len()].copy_from_slice(bytes);
        }
        u64::from_le_bytes(value)
    }

    fn write(&mut self, offset: u64, size: AccessSize, value: u64) {
        if let Some(bytes) = self.place(offset, size) {
            let value = value.to_le_bytes();
            bytes.copy_from_slice(&value[..bytes.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_bytes_at_every_width() {
        let mut scratch = Scratch::new(16).unwrap();
        scratch.write(3, AccessSize::Qword, 0x8877_6655_4433_2211);
        scratch.write(4, AccessSize::Byte, 0xaa);
        assert_eq!(scratch.read(0, AccessSize::Qword), 0x5544_33aa_1100_0000);
        assert_eq!(scratch.read(4, AccessSize::Word), 0x33aa);
        assert_eq!(scratch.read(12, AccessSize::Dword), 0);
        scratch.write(12, AccessSize::Qword, u64::MAX);
        assert_eq!(scratch.read(12, AccessSize::Dword), 0, "not even a part of what lies beyond");
        assert_eq!(scratch.read(u64::MAX, AccessSize::Byte), 0);
    }

    #[test]
    fn has_a_sensible_size() {
        assert!(Scratch::new(0).is_none() && Scratch::new(MOST_SCRATCH_BYTES + 1).is_none());
        assert!(Scratch::new(MOST_SCRATCH_BYTES).is_some());
    }
}
