//! Traces on pages that hold translated or decoded code: which 64-byte lines of a page somebody made code of, and which
//! of them were written since. A store to a traced page leaves the fast path and is reported here.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use x86::{PAGE_SIZE, Ppn};

const LINE_SHIFT: u64 = 6;

/// A store that hit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeWrite {
    pub ppn: Ppn,
}

#[derive(Debug, Default)]
pub struct CodeTraces {
    state: Mutex<State>,
    pending: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// A bit for each line that holds code.
    lines: HashMap<Ppn, u64>,
    written: Vec<CodeWrite>,
}

/// The bits of the lines that `size` bytes from `offset` touch.
fn mask(offset: u64, size: u64) -> u64 {
    let first = (offset & (PAGE_SIZE - 1)) >> LINE_SHIFT;
    let last = ((offset + size.max(1) - 1) >> LINE_SHIFT).min(63);
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

impl CodeTraces {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Notes code in `size` bytes from `offset` of a page; true when the page had none before.
    pub fn add(&self, ppn: Ppn, offset: u64, size: u64) -> bool {
        let mut state = self.state();
        let lines = state.lines.entry(ppn).or_insert(0);
        let first = *lines == 0;
        *lines |= mask(offset, size);
        first
    }

    /// Tells of a store to a traced page; true when it hit code, so that the page's code is now forgotten.
    pub fn written(&self, ppn: Ppn, offset: u64, size: u64) -> bool {
        let mut state = self.state();
        let hit = state.lines.get(&ppn).is_some_and(|lines| lines & mask(offset, size) != 0);
        if hit {
            state.lines.remove(&ppn);
            state.written.push(CodeWrite { ppn });
            self.pending.store(true, Ordering::Release);
        }
        hit
    }

    /// Forgets the code of all pages, because whoever held it dropped it; gives the pages.
    pub fn clear(&self) -> Vec<Ppn> {
        let mut state = self.state();
        state.written.clear();
        self.pending.store(false, Ordering::Release);
        state.lines.drain().map(|(ppn, _)| ppn).collect()
    }

    /// Whether stores hit code since the last [`CodeTraces::take`].
    #[inline]
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    pub fn take(&self) -> Vec<CodeWrite> {
        let mut state = self.state();
        self.pending.store(false, Ordering::Release);
        std::mem::take(&mut state.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stores_to_lines_with_code_count() {
        let traces = CodeTraces::default();
        assert!(traces.add(Ppn(5), 0x100, 16));
        assert!(!traces.add(Ppn(5), 0x200, 1));
        assert!(!traces.written(Ppn(5), 0x140, 8));
        assert!(!traces.is_pending());
        assert!(traces.written(Ppn(5), 0x0f8, 16));
        assert!(traces.is_pending());
        assert_eq!(traces.take(), [CodeWrite { ppn: Ppn(5) }]);
        assert!(!traces.written(Ppn(5), 0x100, 8), "the page is forgotten after the first hit");
    }

    #[test]
    fn masks_stay_inside_the_page() {
        assert_eq!(mask(0, 4096), u64::MAX);
        assert_eq!(mask(4095, 8), 1 << 63);
        assert_eq!(mask(64, 1), 2);
    }
}
