//! The pmap of one VM: Ppn -> where the page is, and its state. RAM is at 0 up to the hole below 4 GiB, and from 4 GiB on.
//!
//! An entry is one word, so that whoever changes it sees what others changed:
//!
//! ```text
//! 63..60  state          59 traced   58 being taken   57 being broken   56 sampled
//! 55..40  processors that may have a translation: one to store with where the page is private, any where it is read-only
//! 39..0   the machine page; of a swapped page, its slot
//! ```
//!
//! *Being taken*: somebody wants to put the page into another state, and has it as long as the bit stays. Whoever touches the
//! page clears it, which is all it takes to keep the page. *Being broken*: a store waits until no processor can read the
//! read-only page any more. *Sampled*: nobody has touched the page since the bit was set.

use std::sync::atomic::{AtomicU64, Ordering};

use x86::{Mpn, PAGE_SHIFT, Ppn};

use crate::writers::Processors;

/// First byte of the hole for devices below 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// First byte after the hole.
pub const HOLE_END: u64 = 1 << 32;

const STATE_SHIFT: u32 = 60;
const TRACED: u64 = 1 << 59;
const TAKEN: u64 = 1 << 58;
const BREAKING: u64 = 1 << 57;
const SAMPLED: u64 = 1 << 56;
const HOLDERS_SHIFT: u32 = 40;
const PAYLOAD: u64 = (1 << HOLDERS_SHIFT) - 1;

/// Where the content of a page of RAM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Nowhere: it is all zeroes, or was never touched.
    Zero = 0,
    /// In a machine page of the VM's own.
    Private = 1,
    /// In a page of the shared pool, which others have, too.
    Shared = 2,
    /// In a page of an image file, which others map, too.
    Image = 3,
    /// The guest's balloon has it: there is no content.
    Ballooned = 4,
    /// In the swap store, compressed in memory or encrypted in a file.
    Swapped = 5,
}

impl State {
    pub const ALL: [State; 6] =
        [State::Zero, State::Private, State::Shared, State::Image, State::Ballooned, State::Swapped];

    fn of(word: u64) -> State {
        Self::ALL.get((word >> STATE_SHIFT) as usize).copied().unwrap_or(State::Zero)
    }

    /// Whether the page is one that a store must not reach.
    #[must_use]
    pub fn is_read_only(self) -> bool {
        matches!(self, State::Shared | State::Image)
    }
}

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
    pub fn state(self) -> State {
        State::of(self.0)
    }

    /// Whether the page is in a machine page of the VM's own.
    #[must_use]
    pub fn is_private(self) -> bool {
        self.state() == State::Private
    }

    /// The machine page, where there is one.
    #[must_use]
    pub fn mpn(self) -> Option<Mpn> {
        matches!(self.state(), State::Private | State::Shared | State::Image).then_some(Mpn(self.0 & PAYLOAD))
    }

    /// The slot of a swapped page.
    #[must_use]
    pub fn slot(self) -> Option<u64> {
        (self.state() == State::Swapped).then_some(self.0 & PAYLOAD)
    }

    /// Whether a store must be seen by whoever traces the page.
    #[must_use]
    pub fn is_traced(self) -> bool {
        self.0 & TRACED != 0
    }

    /// Whether somebody may put the page into another state at any moment.
    #[must_use]
    pub fn is_taken(self) -> bool {
        self.0 & TAKEN != 0
    }

    #[must_use]
    pub fn is_breaking(self) -> bool {
        self.0 & BREAKING != 0
    }

    #[must_use]
    pub fn is_sampled(self) -> bool {
        self.0 & SAMPLED != 0
    }

    /// Processors that may have a translation: to store with, or, of a read-only page, any.
    #[must_use]
    pub fn holders(self) -> Processors {
        Processors((self.0 >> HOLDERS_SHIFT) as u16)
    }

    /// Processors that may have the right to store in a TLB.
    #[must_use]
    pub fn writers(self) -> Processors {
        if self.state().is_read_only() { Processors::default() } else { self.holders() }
    }

    /// As it is when the page is touched: whoever wanted to take it must let it go.
    #[must_use]
    pub fn touched(self) -> Entry {
        Entry(self.0 & !(TAKEN | SAMPLED))
    }

    #[must_use]
    pub fn with_holder(self, processor: usize) -> Entry {
        Entry(self.0 | u64::from(Processors::one(processor).0) << HOLDERS_SHIFT)
    }

    #[must_use]
    pub fn taken(self) -> Entry {
        Entry(self.0 | TAKEN)
    }

    #[must_use]
    pub fn breaking(self) -> Entry {
        Entry(self.touched().0 | BREAKING)
    }

    #[must_use]
    pub fn not_taken(self) -> Entry {
        Entry(self.0 & !TAKEN)
    }

    #[must_use]
    pub fn not_breaking(self) -> Entry {
        Entry(self.0 & !BREAKING)
    }

    #[must_use]
    pub fn sampled(self) -> Entry {
        Entry(self.0 | SAMPLED)
    }

    /// As [`Entry::moved`], by somebody whose doing counts as no touch.
    #[must_use]
    pub fn moved_unseen(self, state: State, payload: u64) -> Entry {
        Entry(self.moved(state, payload).0 | self.0 & SAMPLED)
    }

    /// In another state, with a machine page or a slot. Nobody holds it, and nobody wants it; it stays traced.
    #[must_use]
    pub fn moved(self, state: State, payload: u64) -> Entry {
        debug_assert!(payload <= PAYLOAD);
        Entry(self.0 & TRACED | (state as u64) << STATE_SHIFT | payload & PAYLOAD)
    }
}

impl Pmap {
    #[must_use]
    pub fn new(pages: u64) -> Pmap {
        let low_pages = pages.min(HOLE_START >> PAGE_SHIFT);
        Pmap { entries: (0..pages).map(|_| AtomicU64::new(0)).collect(), low_pages }
    }

    /// The place of a page among all pages of RAM; `None` where there is none.
    #[must_use]
    pub fn index(&self, ppn: Ppn) -> Option<usize> {
        let high = HOLE_END >> PAGE_SHIFT;
        if ppn.0 < self.low_pages {
            Some(ppn.0 as usize)
        } else if ppn.0 >= high && ppn.0 - high < self.entries.len() as u64 - self.low_pages {
            Some((ppn.0 - high + self.low_pages) as usize)
        } else {
            None
        }
    }

    /// The page at a place.
    #[must_use]
    pub fn at(&self, index: usize) -> Ppn {
        let index = index as u64;
        if index < self.low_pages { Ppn(index) } else { Ppn(index - self.low_pages + (HOLE_END >> PAGE_SHIFT)) }
    }

    /// The machine page that a page of RAM has when nothing speaks against it: all have the same order as here.
    #[must_use]
    pub fn home(&self, ppn: Ppn) -> Option<Mpn> {
        self.index(ppn).map(|index| Mpn(index as u64))
    }

    /// `None` when there is no RAM at this page.
    #[must_use]
    pub fn get(&self, ppn: Ppn) -> Option<Entry> {
        self.index(ppn).map(|index| Entry(self.entries[index].load(Ordering::SeqCst)))
    }

    /// Puts a new entry where `known` still stands; says whether it did.
    pub fn change(&self, ppn: Ppn, known: Entry, new: Entry) -> bool {
        self.index(ppn).is_some_and(|index| {
            self.entries[index].compare_exchange(known.0, new.0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        })
    }

    /// Changes an entry whatever it is by now; gives what was there.
    pub fn update(&self, ppn: Ppn, change: impl Fn(Entry) -> Entry) -> Option<Entry> {
        let entry = &self.entries[self.index(ppn)?];
        let old = entry.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |word| Some(change(Entry(word)).0));
        old.ok().map(Entry)
    }

    /// Gives a processor the right to store to a private page without a trap; false when the page is traced, or no such.
    pub fn grant_store(&self, ppn: Ppn, processor: usize) -> bool {
        loop {
            let Some(entry) = self.get(ppn) else { return false };
            if entry.is_traced() || entry.state() != State::Private {
                return false;
            }
            let new = entry.touched().with_holder(processor);
            if new == entry || self.change(ppn, entry, new) {
                return true;
            }
        }
    }

    /// Notes that no TLB of the processor's has the right to store any more. Only its own thread may say so.
    pub fn withdraw_store(&self, ppn: Ppn, processor: usize) {
        let bit = u64::from(Processors::one(processor).0) << HOLDERS_SHIFT;
        self.update(ppn, |entry| if entry.state().is_read_only() { entry } else { Entry(entry.0 & !bit) });
    }

    /// Traces stores to a page, or no longer; gives the processors that may still have the right to store without a trap.
    pub fn set_traced(&self, ppn: Ppn, traced: bool) -> Processors {
        let change = |entry: Entry| Entry(if traced { entry.0 | TRACED } else { entry.0 & !TRACED });
        self.update(ppn, change).map_or(Processors::default(), Entry::writers)
    }

    /// How many pages of RAM the guest was promised.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.entries.len() as u64
    }

    /// How many pages are in each state, in the order of [`State::ALL`].
    #[must_use]
    pub fn counts(&self) -> [u64; 6] {
        let mut counts = [0; 6];
        for entry in &self.entries {
            counts[State::of(entry.load(Ordering::Relaxed)) as usize] += 1;
        }
        counts
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_changes_its_state_keeps_its_trace_alone() {
        let pmap = Pmap::new(16);
        let change = |from: Entry, to: Entry| assert!(pmap.change(Ppn(3), from, to));
        change(pmap.get(Ppn(3)).unwrap(), pmap.get(Ppn(3)).unwrap().moved(State::Private, 7));
        assert!(pmap.grant_store(Ppn(3), 2));
        assert_eq!(pmap.set_traced(Ppn(3), true), Processors::one(2));
        assert!(!pmap.grant_store(Ppn(3), 1));
        let entry = pmap.get(Ppn(3)).unwrap();
        change(entry, entry.taken().moved(State::Shared, 9));
        let entry = pmap.get(Ppn(3)).unwrap();
        assert_eq!((entry.state(), entry.mpn(), entry.is_traced()), (State::Shared, Some(Mpn(9)), true));
        assert!(entry.holders().is_empty() && !entry.is_taken());
        assert_eq!(pmap.counts(), [15, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn who_may_store_keeps_a_page_that_somebody_wants() {
        let pmap = Pmap::new(16);
        let fresh = pmap.get(Ppn(3)).unwrap().moved(State::Private, 3);
        pmap.update(Ppn(3), |_| fresh.taken());
        let wanted = pmap.get(Ppn(3)).unwrap();
        assert!(pmap.grant_store(Ppn(3), 0));
        assert!(!pmap.change(Ppn(3), wanted, wanted.moved(State::Zero, 0)), "it was touched");
    }

    #[test]
    fn pages_have_places_above_the_hole_too() {
        let pmap = Pmap::new((4 << 30) >> PAGE_SHIFT);
        for index in [0, 1, 786_431, 786_432, 1_048_575] {
            assert_eq!(pmap.index(pmap.at(index)), Some(index));
        }
        assert_eq!(pmap.at(786_432), Ppn(HOLE_END >> PAGE_SHIFT));
    }
}
