//! Bytes of our own, far more addresses than memory, whose memory goes back to the system piece by piece.
//!
//! Contract: the range is private to this process and to this owner: references into it are made here only, and borrow the
//! arena, so a piece is never given back while somebody looks at it.

use std::io;
use std::ops::Range;

use crate::map::{Map, PAGE};

/// A range of zeroes that takes memory where it is written.
#[derive(Debug)]
pub struct Arena(Map);

impl Arena {
    /// # Errors
    /// The system's, when there are not that many addresses.
    pub fn new(size: usize) -> io::Result<Arena> {
        let map = Map::anonymous(size.next_multiple_of(PAGE).max(PAGE))?;
        // SAFETY: advice on a range that we own. With huge pages, giving a piece back would give nothing back.
        unsafe { libc::madvise(map.base().as_ptr().cast(), map.size(), libc::MADV_NOHUGEPAGE) };
        Ok(Arena(map))
    }

    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped readable as long as we live, always initialized (zeroes at first), and changed only through `&mut`.
        unsafe { std::slice::from_raw_parts(self.0.base().as_ptr(), self.0.size()) }
    }

    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.0.base().as_ptr(), self.0.size()) }
    }

    /// Returns the memory behind a range of whole pages to the system; it reads as zeroes afterwards.
    pub fn give_back(&mut self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.0.size(), "give_back outside the arena");
        assert!(range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE), "give_back of parts of pages");
        // SAFETY: inside the map (checked), which is private and which nobody borrows now.
        unsafe { libc::madvise(self.0.base().as_ptr().add(range.start).cast(), range.len(), libc::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_reads_as_zeroes_and_its_neighbours_stay() {
        let mut arena = Arena::new(1 << 40).unwrap();
        arena.bytes_mut()[..3 * PAGE].fill(7);
        arena.give_back(PAGE..2 * PAGE);
        let bytes = arena.bytes();
        assert!(bytes[..PAGE].iter().all(|byte| *byte == 7) && bytes[2 * PAGE..3 * PAGE].iter().all(|byte| *byte == 7));
        assert!(bytes[PAGE..2 * PAGE].iter().all(|byte| *byte == 0));
    }
}
