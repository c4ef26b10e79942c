//! The sites of all blocks, numbered in the order in which they were made. The oldest go with their blocks.

use std::collections::VecDeque;

use super::lower::Site;

#[derive(Debug, Default)]
pub struct Sites {
    all: VecDeque<Site>,
    /// For a link: how far behind the jump's displacement the code is that the jump leads to while it is not linked.
    unlinked: VecDeque<u16>,
    /// The number of the oldest.
    oldest: u32,
}

impl Sites {
    /// The number that the next site will have.
    pub fn next_number(&self) -> u32 {
        self.oldest.wrapping_add(self.all.len() as u32)
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn push(&mut self, site: Site) {
        self.all.push_back(site);
        self.unlinked.push_back(0);
    }

    pub fn get(&self, number: u32) -> Option<Site> {
        self.all.get(number.wrapping_sub(self.oldest) as usize).copied()
    }

    /// The sites from a number on.
    pub fn since(&self, number: u32) -> impl ExactSizeIterator<Item = Site> {
        let first = (number.wrapping_sub(self.oldest) as usize).min(self.all.len());
        self.all.range(first..).copied()
    }

    pub fn set_unlinked(&mut self, number: u32, distance: u16) {
        self.unlinked[number.wrapping_sub(self.oldest) as usize] = distance;
    }

    /// The links of a range of numbers: where the displacement is, and what it is to [`Sites::set_unlinked`].
    pub fn links(&self, range: std::ops::Range<u32>) -> impl Iterator<Item = (u32, u16)> {
        let place = |number: u32| number.wrapping_sub(self.oldest) as usize;
        let range = place(range.start)..place(range.end);
        let both = self.all.range(range.clone()).zip(self.unlinked.range(range));
        both.filter_map(|(site, distance)| Some((site.displacement()?, *distance)))
    }

    /// Forgets those from a number on.
    pub fn truncate(&mut self, number: u32) {
        self.all.truncate(number.wrapping_sub(self.oldest) as usize);
        self.unlinked.truncate(self.all.len());
    }

    /// Forgets those before a number.
    pub fn forget_before(&mut self, number: u32) {
        let count = (number.wrapping_sub(self.oldest) as usize).min(self.all.len());
        self.all.drain(..count);
        self.unlinked.drain(..count);
        self.oldest = number;
    }

    pub fn clear(&mut self) {
        self.oldest = self.next_number();
        self.all.clear();
        self.unlinked.clear();
    }

    /// Gives the memory of what was cleared back.
    pub fn shrink(&mut self) {
        self.all.shrink_to_fit();
        self.unlinked.shrink_to_fit();
    }
}
