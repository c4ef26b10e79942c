//! The pmap of one VM: Ppn -> Mpn and the page's state. RAM is at 0 up to the hole below 4 GiB, and from 4 GiB on.
//!
//! An entry is one word: bit 63 says that the page has a machine page, bit 62 that writes to it are traced, bits 40 to 55
//! which processors may have the right to store to it in a TLB. Being one word, it decides between a processor that gets
//! the right and another that traces the page: whoever comes second sees the first.

use std::sync::atomic::{AtomicU64, Ordering};

use x86::{Mpn, PAGE_SHIFT, Ppn};

use crate::writers::Processors;

/// First byte of the hole for devices below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// First byte after the hole.
pub const HOLE_END: u64 = 1 << 32;

const BACKED: u64 = 1 << 63;
const TRACED: u64 = 1 << 62;
const WRITERS_SHIFT: u32 = 40;
const WRITERS: u64 = 0xffff << WRITERS_SHIFT;
const MPN: u64 = (1 << WRITERS_SHIFT) - 1;

#[derive(Debug)]
pub struct Pmap {
    entries: Box<[AtomicU64]>,
    low_pages: u64,
}

/// What the pmap knows of a page of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    #[must_use]
    pub fn mpn(self) -> Option<Mpn> {
        (self.0 & BACKED != 0).then_some(Mpn(self.0 & MPN))
    }

    /// Whether a store must be seen by whoever traces the page.
    #[must_use]
    pub fn is_traced(self) -> bool {
        self.0 & TRACED != 0
    }

    /// Processors that may have the right to store in a TLB.
    #[must_use]
    pub fn writers(self) -> Processors {
        Processors((self.0 >> WRITERS_SHIFT) as u16)
    }
}

impl Pmap {
    #[must_use]
    pub fn new(pages: u64) -> Pmap {
        let low_pages = pages.min(HOLE_START >> PAGE_SHIFT);
        Pmap { entries: (0..pages).map(|_| AtomicU64::new(0)).collect(), low_pages }
    }

    fn index(&self, ppn: Ppn) -> Option<usize> {
        let high = HOLE_END >> PAGE_SHIFT;
        if ppn.0 < self.low_pages {
            Some(ppn.0 as usize)
        } else if ppn.0 >= high && ppn.0 - high < self.entries.len() as u64 - self.low_pages {
            Some((ppn.0 - high + self.low_pages) as usize)
        } else {
            None
        }
    }

    /// The machine page that a page of RAM has when nothing speaks against it: all have the same order as here.
    #[must_use]
    pub fn home(&self, ppn: Ppn) -> Option<Mpn> {
        self.index(ppn).map(|index| Mpn(index as u64))
    }

    /// `None` when there is no RAM at this page.
    #[must_use]
    pub fn get(&self, ppn: Ppn) -> Option<Entry> {
        self.index(ppn).map(|index| Entry(self.entries[index].load(Ordering::Acquire)))
    }

    /// Gives a page without a machine page one; gives back the machine page that won when two raced.
    pub fn set_if_unbacked(&self, ppn: Ppn, mpn: Mpn) -> Option<Mpn> {
        let entry = &self.entries[self.index(ppn)?];
        let result = entry.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            (word & BACKED == 0).then_some(word | BACKED | mpn.0)
        });
        Some(match result {
            Ok(_) => mpn,
            Err(word) => Mpn(word & MPN),
        })
    }

    /// Points a page at another machine page; gives back the old one.
    pub fn replace(&self, ppn: Ppn, mpn: Mpn) -> Option<Mpn> {
        let entry = &self.entries[self.index(ppn)?];
        let old = entry
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| Some(word & (TRACED | WRITERS) | BACKED | mpn.0));
        old.ok().and_then(|word| Entry(word).mpn())
    }

    /// Gives a processor the right to store to a page without a trap; false when the page is traced.
    pub fn grant_store(&self, ppn: Ppn, processor: usize) -> bool {
        let Some(index) = self.index(ppn) else { return false };
        let entry = &self.entries[index];
        let known = Entry(entry.load(Ordering::Acquire));
        if known.is_traced() || known.writers().has(processor) {
            return !known.is_traced();
        }
        let bit = u64::from(Processors::one(processor).0) << WRITERS_SHIFT;
        !Entry(entry.fetch_or(bit, Ordering::SeqCst)).is_traced()
    }

    /// Notes that no TLB of the processor's has the right any more. Only its own thread may say so.
    pub fn withdraw_store(&self, ppn: Ppn, processor: usize) {
        if let Some(index) = self.index(ppn) {
            let bit = u64::from(Processors::one(processor).0) << WRITERS_SHIFT;
            self.entries[index].fetch_and(!bit, Ordering::SeqCst);
        }
    }

    /// Traces stores to a page, or no longer; gives the processors that may still have the right to store without a trap.
    pub fn set_traced(&self, ppn: Ppn, traced: bool) -> Processors {
        let Some(index) = self.index(ppn) else { return Processors::default() };
        let entry = &self.entries[index];
        let old =
            if traced { entry.fetch_or(TRACED, Ordering::SeqCst) } else { entry.fetch_and(!TRACED, Ordering::SeqCst) };
        Entry(old).writers()
    }

    /// How many pages of RAM the guest was promised.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.entries.len() as u64
    }

    /// (first page, number of pages) of each range of RAM.
    #[must_use]
    pub fn ranges(&self) -> Vec<(Ppn, u64)> {
        let high = self.pages() - self.low_pages;
        let mut ranges = vec![(Ppn(0), self.low_pages)];
        if high > 0 {
            ranges.push((Ppn(HOLE_END >> PAGE_SHIFT), high));
        }
        ranges
    }
}
