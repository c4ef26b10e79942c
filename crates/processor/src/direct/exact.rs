//! Pages that hold hot code and, besides, a few instructions that tell of the host: CoreMark's checksum beside the CPUIDs of
//! the C library, OPENSSL_cleanse beside those of libcrypto. Such a page is left to the translator until that was needed so
//! often that it must be hot; then it runs exactly: the process stops before each of these instructions, and the interpreter
//! runs it.
//!
//! A stop comes from a breakpoint of the processor's, of which there are four, or from CPUID, forbidden as a whole, which costs
//! more than the rest of an excursion ([`host::tracee`]). So the latter is for code that computes for long, and taken back when
//! it turns out not to be.
//!
//! Contract, with [`super::space`]: a page is mapped as code only after [`Exact::demand`] with it was met, and forgotten here
//! only after it was unmapped.

use std::collections::HashMap;
use std::sync::Arc;

use host::clock::host_tsc_hz;
use host::tracee::BREAKS;
use x86::{Gva, Ppn};

use super::scan::Telling;

/// So often in a part of a second must a page be left to the translator to be hot.
const REFUSALS: u32 = 32;
const PART: u64 = 4;
/// Each time it was not worth it, so many more are needed, up to a bound.
const HARDER: u32 = 2;
const MOST_REFUSALS: u32 = 1 << 12;
/// Stops before telling instructions that do not make exactness a bad idea.
const FEW: u32 = 16;
/// Pages whose heat is remembered.
const MOST_REMEMBERED: usize = 64;

/// What the process must do for the pages that it runs exactly.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Demand {
    pub breaks: Vec<u64>,
    pub forbids_cpuid: bool,
}

#[derive(Debug)]
struct Page {
    at: Gva,
    telling: Arc<Telling>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Heat {
    refusals: u32,
    since: u64,
    is_hopeless: bool,
}

/// The pages of one address space that run exactly, or may soon.
#[derive(Debug)]
pub struct Exact {
    pages: Vec<Page>,
    heats: HashMap<Ppn, Heat>,
    first_needed: u32,
    needed: u32,
    /// Stops before telling instructions since it was last not worth it.
    told: u32,
    /// What the host turned out not to do.
    has_no_breaks: bool,
    cannot_forbid_cpuid: bool,
}

impl Exact {
    /// Without regard to heat, if `at_once`: for tests.
    pub fn new(at_once: bool) -> Exact {
        let needed = if at_once { 1 } else { REFUSALS };
        Exact {
            pages: Vec::new(),
            heats: HashMap::new(),
            first_needed: needed,
            needed,
            told: 0,
            has_no_breaks: false,
            cannot_forbid_cpuid: false,
        }
    }

    /// Forgets everything: another address space begins.
    pub fn begin_anew(&mut self) {
        self.pages.clear();
        self.heats.clear();
        (self.needed, self.told) = (self.first_needed, 0);
    }

    /// A page was to be left to the translator; says whether it had better run exactly.
    pub fn is_hot(&mut self, ppn: Ppn, now: u64) -> bool {
        if self.has_no_breaks {
            return false;
        }
        if self.heats.len() >= MOST_REMEMBERED && !self.heats.contains_key(&ppn) {
            self.heats.clear();
        }
        let heat = self.heats.entry(ppn).or_default();
        if now.wrapping_sub(heat.since) > host_tsc_hz() / PART {
            *heat = Heat { since: now, refusals: 0, ..*heat };
        }
        heat.refusals = heat.refusals.saturating_add(1);
        heat.refusals >= self.needed && !heat.is_hopeless
    }

    /// A page cannot be run exactly, not even alone.
    pub fn give_up(&mut self, ppn: Ppn) {
        self.heats.entry(ppn).or_default().is_hopeless = true;
    }

    pub fn pages(&self) -> impl Iterator<Item = Gva> {
        self.pages.iter().map(|page| page.at)
    }

    /// Forgets the pages that are not mapped, or are mapped anew.
    pub fn keep(&mut self, is_kept: impl Fn(Gva) -> bool) {
        self.pages.retain(|page| is_kept(page.at));
    }

    /// A page that is about to be mapped.
    pub fn add(&mut self, at: Gva, telling: Arc<Telling>) {
        self.pages.push(Page { at, telling });
    }

    /// Forgets all pages, which are not mapped any more, and that they were hot.
    pub fn make_room(&mut self) {
        self.pages.clear();
        self.cool();
    }

    fn cool(&mut self) {
        self.heats.values_mut().for_each(|heat| heat.refusals = 0);
    }

    /// What the process must do for all pages; `None` when it cannot.
    pub fn demand(&self) -> Option<Demand> {
        let addresses = |page: &Page, starts: &[u16]| -> Vec<u64> {
            starts.iter().map(|start| page.at.0 + u64::from(*start)).collect()
        };
        let mut breaks: Vec<u64> = self.pages.iter().flat_map(|page| addresses(page, &page.telling.others)).collect();
        // CPUIDs take breakpoints if there are enough for all, and if it is known where they begin.
        let cpuids: Option<Vec<u64>> = self
            .pages
            .iter()
            .flat_map(|page| page.telling.cpuids.iter().map(|start| Some(page.at.0 + u64::from((*start)?))))
            .collect();
        let cpuids = cpuids.filter(|cpuids| breaks.len() + cpuids.len() <= BREAKS);
        let forbids_cpuid = cpuids.is_none();
        breaks.extend(cpuids.unwrap_or_default());
        let is_possible = breaks.len() <= BREAKS && !(forbids_cpuid && self.cannot_forbid_cpuid);
        is_possible.then_some(Demand { breaks, forbids_cpuid })
    }

    pub fn cannot_break(&mut self) {
        self.has_no_breaks = true;
    }

    pub fn cannot_forbid_cpuid(&mut self) {
        self.cannot_forbid_cpuid = true;
    }

    /// The process has stopped before a telling instruction, most likely.
    pub fn has_told(&mut self) {
        self.told = self.told.saturating_add(1);
    }

    /// Direct execution was not worth it, perhaps because of these pages; says whether they had better go. They come back
    /// later than they did.
    pub fn is_to_blame(&mut self, forbids_cpuid: bool) -> bool {
        let is_to_blame = !self.pages.is_empty() && (forbids_cpuid || self.told > FEW);
        self.told = 0;
        if is_to_blame {
            self.cool();
            self.needed = (self.needed * HARDER).min(MOST_REFUSALS);
        }
        is_to_blame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Gva = Gva(0x40_3000);

    fn page(at: u64, cpuids: &[Option<u16>], others: &[u16]) -> Page {
        Page { at: Gva(at), telling: Arc::new(Telling { cpuids: cpuids.to_vec(), others: others.to_vec() }) }
    }

    fn exact(pages: impl Into<Vec<Page>>) -> Exact {
        Exact { pages: pages.into(), ..Exact::new(false) }
    }

    #[test]
    fn breakpoints_are_enough_for_four() {
        let two = exact([page(AT.0, &[Some(8)], &[0x20]), page(0x7000, &[Some(0xff0)], &[1])]);
        let breaks = vec![0x40_3020, 0x7001, 0x40_3008, 0x7ff0];
        assert_eq!(two.demand(), Some(Demand { breaks, forbids_cpuid: false }));
    }

    #[test]
    fn more_cpuids_are_forbidden_and_more_others_impossible() {
        let mut many = exact([page(AT.0, &[Some(8); 9], &[0x20])]);
        let demand = Demand { breaks: vec![0x40_3020], forbids_cpuid: true };
        assert_eq!(many.demand(), Some(demand));
        assert_eq!(exact([page(AT.0, &[None], &[])]).demand(), Some(Demand { breaks: vec![], forbids_cpuid: true }));
        assert_eq!(exact([page(AT.0, &[], &[1, 2, 3, 4, 5])]).demand(), None);
        many.cannot_forbid_cpuid();
        assert_eq!(many.demand(), None);
        many.keep(|at| at != AT);
        assert_eq!(many.demand(), Some(Demand::default()));
    }

    #[test]
    fn a_page_is_hot_when_it_is_refused_often_in_a_short_time() {
        let (mut exact, ppn, second) = (exact([]), Ppn(5), host_tsc_hz());
        let mut slow = (0..1000).map(|round| round * second / 100);
        assert!(!slow.any(|now| exact.is_hot(ppn, now)), "the first page of a loop that runs now and then");
        let late = 100 * second;
        assert!(!(1..REFUSALS).any(|_| exact.is_hot(ppn, late)) && exact.is_hot(ppn, late));
        assert!(!exact.is_hot(Ppn(6), late), "another page");
        exact.give_up(ppn);
        assert!(!exact.is_hot(ppn, late));
    }

    #[test]
    fn what_was_not_worth_it_comes_back_later() {
        let (mut exact, ppn) = (exact([page(AT.0, &[], &[1])]), Ppn(5));
        assert!((0..REFUSALS).any(|_| exact.is_hot(ppn, 1)));
        assert!(!exact.is_to_blame(false), "a breakpoint that nothing comes to costs next to nothing");
        assert!(exact.is_to_blame(true));
        assert!(!(0..2 * REFUSALS - 1).any(|_| exact.is_hot(ppn, 1)) && exact.is_hot(ppn, 1));
        (0..=FEW).for_each(|_| exact.has_told());
        assert!(exact.is_to_blame(false) && !exact.is_to_blame(false));
    }
}
