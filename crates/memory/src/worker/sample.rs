//! Which pages are used, by samples: a page that was sampled loses its translations, and whoever touches it is noticed.
//! Source: C. Waldspurger, "Memory Resource Management in VMware ESX Server", OSDI 2002, 5.3 "Measuring Idle Memory".

use x86::{Mpn, Ppn};

use super::Worker;
use crate::pmap::Entry;
use crate::reclaim::BATCH;

impl Worker {
    /// Ends a period: gives how many of the sampled pages were touched in it, and how many were sampled. Begins the next with
    /// `pages` others.
    pub fn sample(&mut self, pages: usize) -> (u64, u64) {
        let memory = std::sync::Arc::clone(&self.memory);
        let old = std::mem::take(&mut self.sampled);
        let is_touched = |ppn: &Ppn| !memory.pmap().get(*ppn).is_some_and(Entry::is_sampled);
        let touched = old.iter().filter(|ppn| is_touched(ppn)).count();
        let mut fresh: Vec<Ppn> = (0..pages).map(|_| self.any_page()).collect();
        fresh.sort_unstable();
        fresh.dedup();
        self.watch(&fresh);
        self.sampled = fresh;
        (touched as u64, old.len() as u64)
    }

    /// Marks pages so that the next touch is noticed.
    pub(super) fn watch(&self, pages: &[Ppn]) {
        for part in pages.chunks(BATCH) {
            let mark = |ppn: &Ppn| Some((*ppn, self.memory.pmap().update(*ppn, Entry::sampled)?.mpn()?));
            let known: Vec<(Ppn, Mpn)> = part.iter().filter_map(mark).collect();
            self.memory.seats.forget(&known);
        }
    }
}
