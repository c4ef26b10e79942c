//! Which regions of the guest's address space have large pages: a filter that may say yes too often, but seldom does, because
//! the answer yes costs all that is known of smaller pages, too.

use x86::Gva;

/// Bits of the filter: a kernel maps some hundred regions of 2 MiB for each GiB of its memory.
const BITS: u32 = 15;
const WORDS: usize = 1 << (BITS - 6);

#[derive(Debug)]
pub struct Regions {
    /// A region has `1 << shift` bytes.
    shift: u32,
    bits: Box<[u64; WORDS]>,
    is_empty: bool,
}

impl Regions {
    pub fn new(shift: u32) -> Regions {
        Regions { shift, bits: Box::new([0; WORDS]), is_empty: true }
    }

    /// Regions that systems use together are neighbours, or differ by powers of two: one multiplication would lay rows of them
    /// over each other.
    fn place(&self, address: Gva) -> (usize, u64) {
        let mixed = (address.0 >> self.shift).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let hash = (mixed ^ mixed >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS);
        ((hash >> 6) as usize, 1 << (hash & 63))
    }

    pub fn insert(&mut self, address: Gva) {
        let (word, bit) = self.place(address);
        self.bits[word] |= bit;
        self.is_empty = false;
    }

    /// Whether the region around an address may have been inserted.
    #[must_use]
    pub fn may_contain(&self, address: Gva) -> bool {
        let (word, bit) = self.place(address);
        !self.is_empty && self.bits[word] & bit != 0
    }

    pub fn clear(&mut self) {
        if !self.is_empty {
            self.bits.fill(0);
            self.is_empty = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gigabyte_of_large_pages_leaves_most_others_alone() {
        let mut regions = Regions::new(21);
        let direct = |number: u64| Gva(0xffff_8880_0000_0000 + (number << 21));
        (0..512).for_each(|number| regions.insert(direct(number)));
        assert!((0..512).all(|number| regions.may_contain(direct(number).add(0x1f_f000))));
        for others in [0x7f00_0000_0000, 0xffff_c900_0000_0000, 0x40_0000_u64] {
            let wrong = (0..4096).filter(|number| regions.may_contain(Gva(others + (number << 21)))).count();
            assert!(wrong < 128, "{wrong} of 4096 regions from {others:#x}");
        }
        regions.clear();
        assert!(!regions.may_contain(direct(0)));
    }
}
