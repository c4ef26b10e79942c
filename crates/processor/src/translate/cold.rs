//! Code that a quiet guest runs only now and then: it is interpreted, because a translation takes more memory than it is
//! worth there.

use super::blocks::Key;

/// How often a block is interpreted before it is translated. Half of what a guest without work runs comes less often than
/// this between two sleeps; a larger number saves little more, and costs time.
const MOST: u8 = 4;
/// Counts, by a hash of where a block begins; those that share one are translated sooner.
const COUNTS: usize = 1 << 13;
/// The longest instruction, Intel SDM (2024-12) Vol. 2A 2.3.11.
const LONGEST: u64 = 15;

/// How often blocks that have no translation came along.
#[derive(Debug, Default)]
pub struct Cold {
    counts: Vec<u8>,
    /// Where the instruction is that was interpreted last.
    last: u64,
}

impl Cold {
    /// All counts begin again.
    pub fn forget(&mut self) {
        self.counts = Vec::new();
    }

    /// Whether what begins at `key` has not come along often yet. The instructions behind the first of a block do not count:
    /// it is they when they follow the last one.
    pub fn is_cold(&mut self, key: &Key) -> bool {
        let distance = key.rip.wrapping_sub(self.last);
        self.last = key.rip;
        if (1..=LONGEST).contains(&distance) {
            return true;
        }
        if self.counts.is_empty() {
            self.counts.resize(COUNTS, 0);
        }
        // Fibonacci hashing: the upper bits of the product depend on all of the address.
        let slot = key.gpa.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - COUNTS.ilog2());
        let count = &mut self.counts[slot as usize];
        *count = count.saturating_add(1);
        *count <= MOST
    }
}

#[cfg(test)]
mod tests {
    use x86::Gpa;

    use super::super::lower::Mode;
    use super::*;

    fn key(rip: u64) -> Key {
        Key { gpa: Gpa(rip & 0xff_ffff), rip, mode: Mode(0) }
    }

    #[test]
    fn a_block_that_comes_often_is_warm_and_those_beside_it_are_not() {
        let mut cold = Cold::default();
        for _ in 0..MOST {
            assert!(cold.is_cold(&key(0x1000)));
            // The rest of the block.
            assert!(cold.is_cold(&key(0x1003)) && cold.is_cold(&key(0x100f)));
            assert!(cold.is_cold(&key(0x5000)));
        }
        assert!(!cold.is_cold(&key(0x1000)));
        assert!(cold.is_cold(&key(0x2000)));
        cold.forget();
        assert!(cold.is_cold(&key(0x1000)));
    }

    #[test]
    fn a_block_that_jumps_to_itself_becomes_warm() {
        let mut cold = Cold::default();
        assert_eq!((0..100).filter(|_| cold.is_cold(&key(0x1000))).count(), usize::from(MOST));
    }
}
