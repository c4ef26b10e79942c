//! Taking pages back: how a page gets another state, or another machine page, while the guest runs.
//!
//! Whoever wants a page marks it as being taken, and asks all processors to forget it. When they have, nobody can reach its
//! content any more without touching the pmap, which takes the mark away. So the content stands still as long as the mark is
//! there, can be compared or copied, and the page be changed in one step that fails if it was touched. A guest that uses a
//! page keeps it; a processor never waits for one who takes.

use std::collections::BTreeMap;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use x86::{Mpn, Ppn};

use crate::Error;
use crate::bytes::PageRef;
use crate::guest::GuestMemory;
use crate::machine::{SHARED, page_of, source_of};
use crate::pmap::{Entry, State};

/// Pages that are taken together: as many as processors find worth looking for one by one.
pub const BATCH: usize = 256;
/// How long a device's copy may take that somebody waits for.
const PATIENCE: Duration = Duration::from_millis(100);
/// How often a page is tried that was in use.
const TRIES: usize = 20;

/// Pages that are being taken. Those that were not changed are let go when this is dropped; what the others had goes back.
pub struct Taken<'a> {
    memory: &'a GuestMemory,
    /// What stood there, with the mark; `None` when the page could not be marked, or has been dealt with.
    pages: Vec<(Ppn, Option<Entry>)>,
    /// Machine pages that nobody uses any more.
    left: Vec<Mpn>,
    slots: Vec<u64>,
    _alone: MutexGuard<'a, ()>,
}

impl GuestMemory {
    /// Marks pages and asks all processors to forget them; returns when they have. Pages that are pinned, and such as `wants`
    /// does not name, are left out. Not for processors' threads.
    pub fn take(&self, pages: impl IntoIterator<Item = Ppn>, wants: impl Fn(Entry) -> bool) -> Taken<'_> {
        let alone = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let mark = |ppn: Ppn| {
            let entry = self.pmap().get(ppn)?;
            if entry.is_breaking() || entry.is_taken() || !wants(entry) {
                return None;
            }
            let taken = entry.taken();
            self.pmap().change(ppn, entry, taken).then_some(taken)
        };
        let pages: Vec<_> = pages.into_iter().map(|ppn| (ppn, mark(ppn))).collect();
        let known = pages.iter().filter_map(|(ppn, entry)| Some((*ppn, entry.as_ref()?.mpn()?)));
        let known: Vec<(Ppn, Mpn)> = known.collect();
        if !known.is_empty() {
            self.seats.forget(&known);
        }
        Taken { memory: self, pages, left: Vec::new(), slots: Vec::new(), _alone: alone }
    }

    /// The guest's balloon has these pages: it will not use them, and their memory goes back to the system. Gives how many
    /// there were that it had not before; numbers beyond RAM are none.
    pub fn balloon(&self, pages: &[Ppn]) -> usize {
        self.empty(pages, State::Ballooned)
    }

    /// The guest does not want the content of these pages any more; gives how many had some.
    pub fn discard(&self, pages: &[Ppn]) -> usize {
        self.empty(pages, State::Zero)
    }

    fn empty(&self, pages: &[Ppn], to: State) -> usize {
        let count = |part: &[Ppn]| {
            let mut emptied = 0;
            let mut rest = part.to_vec();
            for _ in 0..TRIES {
                let mut taken = self.take(rest.iter().copied(), |entry| entry.state() != to);
                emptied += (0..rest.len()).filter(|index| taken.commit(*index, to, 0)).count();
                drop(taken);
                // What is in use for a moment is tried again; the guest has promised.
                rest.retain(|ppn| self.pmap().get(*ppn).is_some_and(|entry| entry.state() != to));
                if rest.is_empty() {
                    break;
                }
            }
            emptied
        };
        pages.chunks(16 * BATCH).map(count).sum()
    }

    /// The guest's balloon gives pages back to the guest; gives how many it had.
    pub fn unballoon(&self, pages: &[Ppn]) -> usize {
        let give = |ppn: &&Ppn| {
            let Some(entry) = self.pmap().get(**ppn) else { return false };
            entry.state() == State::Ballooned && self.pmap().change(**ppn, entry, entry.moved(State::Zero, 0))
        };
        pages.iter().filter(give).count()
    }

    /// Moves a page to another machine page of the VM's own; false when it is in use all the time.
    ///
    /// # Errors
    /// [`Error::NotRam`]; [`Error::PoolEmpty`].
    pub fn remap(&self, ppn: Ppn) -> Result<bool, Error> {
        self.machine_page(ppn).ok_or(Error::NotRam { address: ppn.gpa(), size: x86::PAGE_SIZE })?;
        for _ in 0..TRIES {
            let mut taken = self.take([ppn], |entry| entry.mpn().is_some());
            let Some(page) = taken.page(0) else { continue };
            // Not one that is another page's own.
            let new = self.pool().allocate(Mpn(self.pmap().pages()))?;
            self.pool().page(new).write(0, &page.copy());
            if taken.commit(0, State::Private, new.0) {
                return Ok(true);
            }
            self.pool().release(vec![new])?;
        }
        Ok(false)
    }

    /// A page of another source is not used any more by the VM after `change`; those who have it in hand may read it for a while.
    /// Who counts what the VM has of the pool ([`GuestMemory::shared_pages`]) sees both or neither. Nobody counts the users of the
    /// pages of an image.
    pub(crate) fn give_back_by(&self, mpn: Mpn, change: impl FnOnce()) {
        let mut given_back = self.given_back.lock().unwrap_or_else(PoisonError::into_inner);
        change();
        if source_of(mpn) == SHARED {
            given_back.push(mpn);
        }
    }

    /// Pages of the shared pool that the VM has, those that it has still to give back among them, and how often: never less than
    /// it will give back.
    #[must_use]
    pub fn shared_pages(&self) -> Vec<(u32, u32)> {
        let _alone = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        // As long as this is held, no page becomes one that waits here.
        let waiting = self.given_back.lock().unwrap_or_else(PoisonError::into_inner);
        let pmap = self.pmap();
        let in_use = (0..pmap.pages() as usize).filter_map(|index| pmap.get(pmap.at(index))?.mpn());
        let mut counts = BTreeMap::<u32, u32>::new();
        for mpn in in_use.filter(|mpn| source_of(*mpn) == SHARED).chain(waiting.iter().copied()) {
            *counts.entry(page_of(mpn) as u32).or_default() += 1;
        }
        counts.into_iter().collect()
    }

    /// The pages of the shared pool that the VM does not use any more, and nobody has in hand. Not for processors' threads.
    pub fn take_given_back(&self) -> Vec<Mpn> {
        let _alone = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let list = std::mem::take(&mut *self.given_back.lock().unwrap_or_else(PoisonError::into_inner));
        if !list.is_empty() {
            self.seats.forget(&[]);
            if !self.pins.wait(PATIENCE) {
                // Later, then.
                self.given_back.lock().unwrap_or_else(PoisonError::into_inner).extend(list);
                return Vec::new();
            }
        }
        list
    }
}

impl Taken<'_> {
    /// A page's content, which stands still unless [`Taken::commit`] says otherwise. `None` when it could not be taken, or
    /// has no machine page.
    #[must_use]
    pub fn page(&self, index: usize) -> Option<PageRef<'_>> {
        let (ppn, entry) = self.pages.get(index)?;
        let entry = (*entry)?;
        (self.memory.pmap().get(*ppn) == Some(entry)).then_some(())?;
        entry.mpn().map(|mpn| self.memory.machine().page(mpn))
    }

    /// Puts a page into another state; false, and nothing, when somebody has touched it or is at work on it.
    pub fn commit(&mut self, index: usize, state: State, payload: u64) -> bool {
        let Some((ppn, place)) = self.pages.get_mut(index) else { return false };
        let (ppn, Some(entry)) = (*ppn, *place) else { return false };
        let pmap = self.memory.pmap();
        let is_pinned = pmap.index(ppn).is_none_or(|place| self.memory.pins.is_pinned(place));
        // Tracing, and a look at what is sampled, are no touch.
        let mut is_done = false;
        if !is_pinned {
            let result =
                pmap.update(ppn, |now| if is_same(now, entry) { now.moved_unseen(state, payload) } else { now });
            is_done = result.is_some_and(|now| is_same(now, entry));
        }
        if !is_done {
            self.memory.counts.refused.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        *place = None;
        self.memory.counts.moved.fetch_add(1, Ordering::Relaxed);
        match (entry.mpn(), entry.slot()) {
            (Some(mpn), _) => self.left.push(mpn),
            (_, Some(slot)) => self.slots.push(slot),
            _ => {}
        }
        true
    }
}

/// Whether a page is taken as it was.
fn is_same(now: Entry, taken: Entry) -> bool {
    now.is_taken() && (now.state(), now.mpn(), now.slot()) == (taken.state(), taken.mpn(), taken.slot())
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for (ppn, entry) in &self.pages {
            if entry.is_some() {
                self.memory.pmap().update(*ppn, Entry::not_taken);
            }
        }
        let left = std::mem::take(&mut self.left);
        let (own, others): (Vec<Mpn>, Vec<Mpn>) = left.into_iter().partition(|mpn| source_of(*mpn) == 0);
        // A failed release only keeps memory that nobody uses.
        let _ = self.memory.pool().release(own);
        others.into_iter().for_each(|mpn| self.memory.give_back_by(mpn, || ()));
        self.slots.iter().for_each(|slot| self.memory.free_slot(*slot));
    }
}
