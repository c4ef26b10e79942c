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

/// So often in a part of a second must a page be left to the translator to be hot, and at so many of the process's stops:
/// where most stops have other reasons, exactness makes those dearer.
const REFUSALS: u32 = 32;
const PART: u64 = 4;
const SHARE: u32 = 2;
/// Each time it was not worth it, so many more are needed, up to a bound.
const HARDER: u32 = 2;
const MOST_REFUSALS: u32 = 1 << 12;
/// What it costs, in parts of a second: each stop where CPUID is forbidden, and each before a telling instruction. More than a
/// part of the time is not worth it, which is looked at some times a second.
const DEAR_STOP: u64 = 50_000;
const TELLING_STOP: u64 = 60_000;
const MOST_COST: u64 = 32;
const LOOKS: u64 = 32;
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
    /// The count of all stops then.
    stops: u32,
    is_hopeless: bool,
}

/// Stops since it was last looked at what they cost.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    since: u64,
    /// Those that forbidden CPUID made dearer.
    dear: u64,
    told: u64,
}

/// The pages of one address space that run exactly, or may soon.
#[derive(Debug)]
pub struct Exact {
    pages: Vec<Page>,
    heats: HashMap<Ppn, Heat>,
    at_once: bool,
    needed: u32,
    /// Of the process, for whatever reason; it may go round.
    stops: u32,
    look: Look,
    /// What the host turned out not to do.
    has_no_breaks: bool,
    cannot_forbid_cpuid: bool,
}

impl Exact {
    /// Without regard to heat, if `at_once`: for tests.
    pub fn new(at_once: bool) -> Exact {
        Exact {
            pages: Vec::new(),
            heats: HashMap::new(),
            at_once,
            needed: Exact::needed_first(at_once),
            stops: 0,
            look: Look::default(),
            has_no_breaks: false,
            cannot_forbid_cpuid: false,
        }
    }

    /// Forgets everything: another address space begins.
    pub fn begin_anew(&mut self) {
        self.pages.clear();
        self.heats.clear();
        self.needed = Exact::needed_first(self.at_once);
    }

    fn needed_first(at_once: bool) -> u32 {
        if at_once { 1 } else { REFUSALS }
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
            *heat = Heat { since: now, refusals: 0, stops: self.stops, ..*heat };
        }
        heat.refusals = heat.refusals.saturating_add(1);
        let is_often = self.at_once || heat.refusals >= self.stops.wrapping_sub(heat.stops) / SHARE;
        heat.refusals >= self.needed && is_often && !heat.is_hopeless
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
        let stops = self.stops;
        self.heats.values_mut().for_each(|heat| (heat.refusals, heat.stops) = (0, stops));
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

    /// The process has stopped, perhaps before a telling instruction.
    pub fn has_stopped(&mut self, is_telling: bool, forbids_cpuid: bool) {
        self.stops = self.stops.wrapping_add(1);
        self.look.dear += u64::from(forbids_cpuid);
        self.look.told += u64::from(is_telling);
    }

    /// Whether these pages had better be left to the translator again. They come back later than they did.
    pub fn is_too_dear(&mut self, now: u64) -> bool {
        let second = host_tsc_hz();
        let Look { since, dear, told } = self.look;
        let passed = now.wrapping_sub(since);
        if passed < second / LOOKS {
            return false;
        }
        self.look = Look { since: now, ..Look::default() };
        let cost = dear * (second / DEAR_STOP) + told * (second / TELLING_STOP);
        let is_too_dear = !self.pages.is_empty() && cost > passed / MOST_COST;
        if is_too_dear {
            self.cool();
            self.needed = (self.needed * HARDER).min(MOST_REFUSALS);
        }
        is_too_dear
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
    fn a_page_that_few_stops_are_for_is_not_hot() {
        let (mut exact, ppn) = (exact([]), Ppn(5));
        for _ in 0..4 * REFUSALS {
            (0..3).for_each(|_| exact.has_stopped(false, false));
            assert!(!exact.is_hot(ppn, 1));
        }
    }

    #[test]
    fn what_was_not_worth_it_comes_back_later() {
        let (mut exact, ppn, look) = (exact([page(AT.0, &[], &[1])]), Ppn(5), host_tsc_hz() / LOOKS + 1);
        assert!((0..REFUSALS).any(|_| exact.is_hot(ppn, 1)));
        let stop = |exact: &mut Exact, times: u32, is_telling: bool, forbids_cpuid: bool| {
            (0..times).for_each(|_| exact.has_stopped(is_telling, forbids_cpuid));
        };
        stop(&mut exact, 1000, false, false);
        assert!(!exact.is_too_dear(look), "a breakpoint that nothing comes to costs next to nothing");
        stop(&mut exact, 1000, false, false);
        stop(&mut exact, 8, false, true);
        assert!(!exact.is_too_dear(2 * look), "the guest's clock");
        stop(&mut exact, 1000, false, true);
        assert!(!exact.is_too_dear(2 * look + 1), "too early to say");
        assert!(exact.is_too_dear(3 * look));
        assert!(!(0..2 * REFUSALS - 1).any(|_| exact.is_hot(ppn, 1)) && exact.is_hot(ppn, 1));
        stop(&mut exact, 1000, true, false);
        assert!(exact.is_too_dear(4 * look) && !exact.is_too_dear(5 * look));
    }
}
