//! The search for equal pages. A page whose hash is what it was when the scan came by last is offered to whoever counts the
//! pages of the shared pool; if there is one that may be equal, the page is taken, compared in full, and becomes that one. A
//! page that changes all the time is never offered. Pages of zeroes need nobody else: they have no machine page at all.

use std::io;

use x86::Ppn;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Worker;
use crate::guest::ZEROES;
use crate::machine::{Machine, SHARED, page_of};
use crate::pmap::{Entry, State};
use crate::reclaim::BATCH;
use crate::swap::Page;

/// How far the scan is, and what it saw.
#[derive(Debug, Default)]
pub struct Progress {
    next: usize,
    /// Of each page, some bits of the hash that it had; 0 when it was not private.
    hashes: Vec<u32>,
}

/// What a scan has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Pages that were read.
    pub scanned: u64,
    /// Of these: pages that are shared now, pages that were zero, pages that a full comparison found different.
    pub shared: u64,
    pub zeroed: u64,
    pub different: u64,
    /// The scan has come to the end of memory, and begins anew next time.
    pub has_ended: bool,
    /// Nobody counts shared pages, or answers.
    pub is_alone: bool,
}

impl Worker {
    /// Reads up to `budget` pages from where the last scan ended.
    pub fn scan(&mut self, budget: usize) -> Scanned {
        let memory = std::sync::Arc::clone(&self.memory);
        let pmap = memory.pmap();
        let mut done = Scanned::default();
        self.scan.hashes.resize(pmap.pages() as usize, 0);
        self.release();
        let seed = self.common.as_ref().map_or(0, |common| common.seed());
        let mut zeroes = Vec::new();
        let mut offers = self.wanted_again(seed, &mut done);
        while done.scanned < budget as u64 {
            if self.scan.next >= self.scan.hashes.len() {
                (self.scan.next, done.has_ended) = (0, true);
                // What the pool got ahead of use, and nobody used for as long as a scan takes. A failure keeps it.
                let _ = memory.pool().trim();
                break;
            }
            let ppn = pmap.at(self.scan.next);
            let hash = &mut self.scan.hashes[self.scan.next];
            self.scan.next += 1;
            if !pmap.get(ppn).is_some_and(Entry::is_private) {
                *hash = 0;
                continue;
            }
            let Some(page) = memory.resident(ppn) else { continue };
            done.scanned += 1;
            let content = page.copy();
            if content == ZEROES {
                zeroes.push(ppn);
            } else {
                let now = xxh3_64_with_seed(&content, seed);
                if std::mem::replace(hash, now as u32 | 1) == now as u32 | 1 {
                    offers.push((ppn, now));
                }
            }
            if zeroes.len() == BATCH {
                done.zeroed += self.drop_zeroes(&std::mem::take(&mut zeroes));
            }
            if offers.len() >= BATCH {
                self.share(&std::mem::take(&mut offers), &mut done);
            }
        }
        done.zeroed += self.drop_zeroes(&zeroes);
        self.share(&offers, &mut done);
        done.is_alone = self.common.is_none();
        done
    }

    /// Pages that have an equal one by now, unless they have changed: they need not wait for the scan to come by.
    fn wanted_again(&mut self, seed: u64, done: &mut Scanned) -> Vec<(Ppn, u64)> {
        let again = self.common.as_mut().map(|common| common.take_again()).unwrap_or_default();
        let memory = &self.memory;
        let mut hash_of = |ppn: Ppn| {
            let page = memory.resident(ppn).filter(|_| pmap_is_private(memory, ppn))?;
            done.scanned += 1;
            let now = xxh3_64_with_seed(&page.copy(), seed);
            let before = self.scan.hashes.get(memory.pmap().index(ppn)?)?;
            (*before == now as u32 | 1).then_some((ppn, now))
        };
        again.into_iter().filter_map(&mut hash_of).collect()
    }

    fn drop_zeroes(&self, pages: &[Ppn]) -> u64 {
        let mut taken = self.memory.take(pages.iter().copied(), Entry::is_private);
        let mut is_zero = |index: &usize| {
            taken.page(*index).is_some_and(|page| page.copy() == ZEROES) && taken.commit(*index, State::Zero, 0)
        };
        (0..pages.len()).filter(|index| is_zero(index)).count() as u64
    }

    fn share(&mut self, offers: &[(Ppn, u64)], done: &mut Scanned) {
        let Some(common) = self.common.as_mut().filter(|_| !offers.is_empty()) else { return };
        let memory = &self.memory;
        let mut content = |ppn: Ppn| -> Option<Box<Page>> {
            pmap_is_private(memory, ppn).then(|| memory.resident(ppn).map(|page| Box::new(page.copy()))).flatten()
        };
        let answers = match common.offer(offers, &mut content) {
            Ok(answers) => answers,
            Err(error) => return self.lose_common(&error),
        };
        let found: Vec<(Ppn, u32)> =
            offers.iter().zip(answers).filter_map(|((ppn, _), answer)| Some((*ppn, answer?))).collect();
        let mut unused = Vec::new();
        {
            let mut taken = memory.take(found.iter().map(|(ppn, _)| *ppn), Entry::is_private);
            for (index, (_, number)) in found.iter().enumerate() {
                let shared = Machine::mpn(SHARED, u64::from(*number));
                let is_equal =
                    taken.page(index).is_some_and(|page| page.copy() == memory.machine().page(shared).copy());
                if is_equal && taken.commit(index, State::Shared, shared.0) {
                    done.shared += 1;
                } else {
                    unused.push(*number);
                    done.different += u64::from(!is_equal);
                }
            }
        }
        if let Some(Err(error)) = self.common.as_mut().map(|common| common.release(&unused)) {
            self.lose_common(&error);
        }
    }

    /// Tells whoever counts of the shared pages that stores have broken since.
    pub(super) fn release(&mut self) {
        let Some(common) = self.common.as_mut() else { return };
        let broken: Vec<u32> = self.memory.take_given_back().into_iter().map(|mpn| page_of(mpn) as u32).collect();
        if let Err(error) = common.release(&broken) {
            self.lose_common(&error);
        }
    }

    /// What the VM has stays as it is; somebody new is told of it.
    fn lose_common(&mut self, _error: &io::Error) {
        self.failed = self.common.take().or(self.failed.take());
    }
}

fn pmap_is_private(memory: &crate::GuestMemory, ppn: Ppn) -> bool {
    memory.pmap().get(ppn).is_some_and(Entry::is_private)
}
