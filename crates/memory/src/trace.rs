//! Traces on pages that hold translated or decoded code: which 64-byte lines of a page somebody made code of, who did, and
//! which of them were written since. A store to a traced page leaves the fast path and is reported here.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use x86::{PAGE_SIZE, Ppn};

use crate::pmap::Pmap;
use crate::writers::{MOST_PROCESSORS, Processors};

const LINE_SHIFT: u64 = 6;

/// A store that hit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeWrite {
    pub ppn: Ppn,
}

#[derive(Debug, Default)]
pub struct CodeTraces {
    state: Mutex<State>,
    /// How often a page was traced, and how often a store hit code.
    traced: AtomicU64,
    hits: AtomicU64,
    /// For each processor, whether stores hit code of its since it last asked.
    pending: [AtomicBool; MOST_PROCESSORS],
}

/// The code of one page.
#[derive(Debug, Default)]
struct Lines {
    /// A bit for each line that holds code.
    mask: u64,
    /// Processors that made something of it.
    holders: Processors,
}

#[derive(Debug, Default)]
struct State {
    lines: HashMap<Ppn, Lines>,
    written: [Vec<CodeWrite>; MOST_PROCESSORS],
}

/// The bits of the lines that `size` bytes from `offset` touch.
fn mask(offset: u64, size: u64) -> u64 {
    let first = (offset & (PAGE_SIZE - 1)) >> LINE_SHIFT;
    let last = ((offset + size.max(1) - 1) >> LINE_SHIFT).min(63);
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

// A page is traced in the pmap exactly while it has lines here: both change under the lock.
impl CodeTraces {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[inline]
    fn pending(&self, processor: usize) -> &AtomicBool {
        &self.pending[processor % MOST_PROCESSORS]
    }

    /// Notes code of a processor in `size` bytes from `offset` of a page, and traces the page; gives the processors that
    /// may still store to it without a trap.
    pub fn add(&self, pmap: &Pmap, processor: usize, ppn: Ppn, offset: u64, size: u64) -> Processors {
        let mut state = self.state();
        let lines = state.lines.entry(ppn).or_default();
        let first = lines.mask == 0;
        lines.mask |= mask(offset, size);
        lines.holders = lines.holders.with(processor);
        self.traced.fetch_add(u64::from(first), Ordering::Relaxed);
        if first { pmap.set_traced(ppn, true) } else { pmap.get(ppn).map_or(Processors::default(), |it| it.writers()) }
    }

    /// Tells of a store to a traced page that was just done; gives the processors whose code it hit. They have forgotten
    /// nothing yet, but the page's code is not traced any more.
    pub fn written(&self, pmap: &Pmap, ppn: Ppn, offset: u64, size: u64) -> Processors {
        let mut state = self.state();
        let hit = state.lines.get(&ppn).is_some_and(|lines| lines.mask & mask(offset, size) != 0);
        self.hits.fetch_add(u64::from(hit), Ordering::Relaxed);
        let Some(lines) = hit.then(|| state.lines.remove(&ppn)).flatten() else { return Processors::default() };
        for holder in lines.holders.iter() {
            state.written[holder].push(CodeWrite { ppn });
            self.pending(holder).store(true, Ordering::SeqCst);
        }
        pmap.set_traced(ppn, false);
        lines.holders
    }

    /// How often a page was traced, and how often a store hit code there.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.traced.load(Ordering::Relaxed), self.hits.load(Ordering::Relaxed))
    }

    /// Forgets all code of a processor, because it dropped it.
    pub fn clear(&self, pmap: &Pmap, processor: usize) {
        let mut state = self.state();
        state.written[processor % MOST_PROCESSORS].clear();
        self.pending(processor).store(false, Ordering::Release);
        state.lines.retain(|ppn, lines| {
            lines.holders = lines.holders.without(processor);
            if lines.holders.is_empty() {
                pmap.set_traced(*ppn, false);
            }
            !lines.holders.is_empty()
        });
    }

    /// Whether stores hit code of a processor since its last [`CodeTraces::take`].
    #[inline]
    #[must_use]
    pub fn is_pending(&self, processor: usize) -> bool {
        self.pending(processor).load(Ordering::Acquire)
    }

    pub fn take(&self, processor: usize) -> Vec<CodeWrite> {
        let mut state = self.state();
        self.pending(processor).store(false, Ordering::Release);
        std::mem::take(&mut state.written[processor % MOST_PROCESSORS])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pmap::State;

    fn traced(pmap: &Pmap, ppn: Ppn) -> bool {
        pmap.get(ppn).unwrap().is_traced()
    }

    #[test]
    fn only_stores_to_lines_with_code_count() {
        let (traces, pmap) = (CodeTraces::default(), Pmap::new(16));
        pmap.update(Ppn(5), |entry| entry.moved(State::Private, 5));
        assert!(pmap.grant_store(Ppn(5), 0));
        assert_eq!(traces.add(&pmap, 0, Ppn(5), 0x100, 16), Processors::one(0));
        assert!(traced(&pmap, Ppn(5)) && !pmap.grant_store(Ppn(5), 1));
        pmap.withdraw_store(Ppn(5), 0);
        assert!(traces.add(&pmap, 0, Ppn(5), 0x200, 1).is_empty());
        assert!(traces.written(&pmap, Ppn(5), 0x140, 8).is_empty());
        assert!(!traces.is_pending(0));
        assert_eq!(traces.written(&pmap, Ppn(5), 0x0f8, 16), Processors::one(0));
        assert!(traces.is_pending(0) && !traced(&pmap, Ppn(5)));
        assert_eq!(traces.take(0), [CodeWrite { ppn: Ppn(5) }]);
        assert!(traces.written(&pmap, Ppn(5), 0x100, 8).is_empty(), "the page is forgotten after the first hit");
    }

    #[test]
    fn every_processor_with_code_of_a_page_is_told_once() {
        let (traces, pmap) = (CodeTraces::default(), Pmap::new(16));
        traces.add(&pmap, 1, Ppn(5), 0, 8);
        traces.add(&pmap, 3, Ppn(5), 64, 8);
        traces.add(&pmap, 2, Ppn(6), 0, 8);
        assert_eq!(traces.written(&pmap, Ppn(5), 0, 1), Processors(0b1010));
        assert_eq!([0, 1, 2, 3].map(|number| traces.is_pending(number)), [false, true, false, true]);
        assert_eq!(traces.take(1), [CodeWrite { ppn: Ppn(5) }]);
        assert_eq!(traces.take(3), [CodeWrite { ppn: Ppn(5) }]);
        assert!(traces.take(3).is_empty());
    }

    #[test]
    fn what_one_processor_drops_others_keep() {
        let (traces, pmap) = (CodeTraces::default(), Pmap::new(16));
        traces.add(&pmap, 0, Ppn(5), 0, 8);
        traces.add(&pmap, 1, Ppn(5), 0, 8);
        traces.add(&pmap, 0, Ppn(6), 0, 8);
        traces.clear(&pmap, 0);
        assert!(traced(&pmap, Ppn(5)) && !traced(&pmap, Ppn(6)));
        assert_eq!(traces.written(&pmap, Ppn(5), 0, 8), Processors::one(1));
    }

    #[test]
    fn masks_stay_inside_the_page() {
        assert_eq!(mask(0, 4096), u64::MAX);
        assert_eq!(mask(4095, 8), 1 << 63);
        assert_eq!(mask(64, 1), 2);
    }
}
