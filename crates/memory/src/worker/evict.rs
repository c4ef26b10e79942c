//! Pages to the swap store, the last resort. The victims are random, as ESX chooses them, but for those that were touched
//! since they were marked.

use x86::Ppn;

use super::Worker;
use crate::bytes::PageMut;
use crate::guest::GuestMemory;
use crate::pmap::{Entry, State};
use crate::reclaim::BATCH;
use crate::swap::{Full, Slot};

/// Pages that are marked for each that is wanted.
const CHOICE: usize = 2;

/// What became of a wish for memory.
#[derive(Debug, Default)]
pub struct Evicted {
    pub pages: u64,
    /// Why there are not more.
    pub full: Option<Full>,
}

impl GuestMemory {
    /// Fills a machine page with what is in a slot; false when it is not to be had.
    pub(crate) fn bring_back(&self, slot: u64, page: PageMut<'_>) -> bool {
        let content = self.swap.get().and_then(|store| store.get(Slot(slot)).ok());
        content.is_some_and(|content| {
            page.write(0, &content);
            true
        })
    }

    pub(crate) fn free_slot(&self, slot: u64) {
        if let Some(store) = self.swap.get() {
            store.free(Slot(slot));
        }
    }
}

impl Worker {
    /// Puts up to `pages` private pages into the swap store, those that nobody has touched since the last call first.
    pub fn evict(&mut self, pages: usize) -> Evicted {
        let mut evicted = Evicted::default();
        if self.memory.swap.get().is_none() {
            return evicted;
        }
        let is_cold = |ppn: &Ppn| self.memory.pmap().get(*ppn).is_some_and(|it| it.is_private() && it.is_sampled());
        let mut victims: Vec<Ppn> = self.candidates.iter().copied().filter(is_cold).collect();
        victims.truncate(pages);
        let rest = self.random_pages(pages - victims.len());
        victims.extend(rest);
        for part in victims.chunks(BATCH) {
            if !self.put_away(part, &mut evicted) {
                break;
            }
        }
        let candidates = self.random_pages(CHOICE * pages);
        self.watch(&candidates);
        self.candidates = candidates;
        evicted
    }

    /// Up to so many private pages; fewer where most are elsewhere already.
    fn random_pages(&mut self, pages: usize) -> Vec<Ppn> {
        let mut chosen = std::collections::BTreeSet::new();
        for _ in 0..8 * pages {
            if chosen.len() == pages {
                break;
            }
            let ppn = self.any_page();
            if self.memory.pmap().get(ppn).is_some_and(Entry::is_private) {
                chosen.insert(ppn);
            }
        }
        chosen.into_iter().collect()
    }

    fn put_away(&self, pages: &[Ppn], evicted: &mut Evicted) -> bool {
        let Some(store) = self.memory.swap.get() else { return false };
        let mut taken = self.memory.take(pages.iter().copied(), Entry::is_private);
        for index in 0..pages.len() {
            let Some(content) = taken.page(index).map(|page| page.copy()) else { continue };
            match store.put(&content) {
                Ok(slot) if taken.commit(index, State::Swapped, slot.0) => evicted.pages += 1,
                Ok(slot) => store.free(slot),
                Err(full @ Full::Incompressible) => evicted.full = Some(full),
                Err(full) => {
                    evicted.full = Some(full);
                    return false;
                }
            }
        }
        true
    }
}
