//! A small deterministic source of random numbers (splitmix64: Steele, Lea, Flood 2014).

#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn byte(&mut self) -> u8 {
        self.word() as u8
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound.max(1) as u64) as usize
    }

    /// True `percent` times out of a hundred.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.word().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    /// A 64-bit value of the kind that finds mistakes: small, near a power of two, all ones, or anything.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.word() & 0xff,
            1 => (self.word() & 0xff).wrapping_neg(),
            2 => (1_u64 << self.below(64)).wrapping_sub(self.word() & 1),
            3 => self.pick(&[0, 1, u64::MAX, 1 << 63, 0x7fff_ffff_ffff_ffff, 0x8000_0000, 0x7fff_ffff, 0xffff_ffff]),
            4 => self.word() as i32 as i64 as u64,
            5 => self.word() & 0xffff_ffff,
            _ => self.word(),
        }
    }
}
