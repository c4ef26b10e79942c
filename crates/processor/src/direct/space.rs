//! One address space of the guest's as a process of the host: its page tables, filled on demand, are the shadow of the
//! guest's.
//!
//! Contract: before the process runs, [`Space::bring_up_to_date`] has been called since the VCPU last did anything else, and
//! every page that is mapped then is one that the guest's tables let user code reach, with rights that they and the traces
//! allow. It rests on the soft TLB's word: what the guest has invalidated is listed there page by page, or the address
//! space has got another generation, upon which everything is compared with the guest's tables again.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use host::clock::host_tsc;
use host::tracee::{Order, Rights, Tracee, USER};
use memory::machine::{page_of, source_of};
use memory::reach::{self, PAGES, REGION, Reached, Region};
use memory::tlb::Bank;
use memory::{GuestMemory, Paging};
use x86::{Gva, Mpn, PAGE_SIZE, Ppn};

use super::exact::Exact;
use super::scan::{self, Telling, Verdict};
use super::{Codes, MOST_WRITES};
use crate::core::Core;
use crate::vcpu::Vcpu;

/// Mappings at most: Linux gives a process 65,530.
const MOST_MAPPINGS: usize = 60_000;
/// So many an order makes at most: one in the middle of a mapping leaves its two ends.
const BY_ORDER: usize = 2;
/// Pages around a missing one that are mapped with it.
const DATA_AROUND: usize = 32;
/// Of a large page all is mapped: its pieces are neighbours in the pool, too.
const LARGE_AROUND: usize = PAGES;
const CODE_AROUND: usize = 8;

/// What a page is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    Data,
    Code,
}

/// What of a region is mapped.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) region: Region,
    /// The guest's entries that the mappings were made from, 0 where there is none.
    pub(super) entries: [u64; PAGES],
    pub(super) rights: [Option<Rights>; PAGES],
}

type Regions = HashMap<u64, Box<Held>>;

#[derive(Debug)]
pub struct Space {
    /// The guest physical address of the top-level table.
    pub root: u64,
    /// When it was last used, in turns of its owner.
    pub used: u64,
    pub tracee: Tracee,
    pub exact: Exact,
    pub(super) regions: Regions,
    /// Mappings that there are at most.
    mappings: usize,
    /// Pages that were ever mapped for this address space.
    pub filled: u64,
    /// Of the soft TLB: rounds and generation.
    pub(super) generation: (u64, u64),
    /// Where pages are mapped that others have, too.
    pub(super) common: HashMap<Ppn, Vec<Gva>>,
    orders: Vec<Order>,
}

/// The page and whether stores to it would be noticed by nobody who must.
fn may_store(core: &Core<'_>, ppn: Ppn) -> bool {
    core.memory.pmap().get(ppn).is_some_and(|it| !it.is_traced() && it.writers().has(core.vcpu.number))
}

pub(super) fn generation(vcpu: &Vcpu) -> (u64, u64) {
    (vcpu.tlb.shadow.rounds, vcpu.tlb.generations[Bank::User as usize])
}

impl Space {
    pub fn new(root: u64, memory: &GuestMemory, exact: Exact) -> io::Result<Space> {
        let tracee = Tracee::new(&memory.machine().files().collect::<Vec<_>>())?;
        let (regions, common, orders) = Default::default();
        Ok(Space { root, used: 0, tracee, exact, regions, mappings: 0, filled: 0, generation: (0, 0), common, orders })
    }

    pub fn is_gone(&mut self) -> bool {
        self.tracee.registers().is_err()
    }

    /// Empties it, for the same or for another address space.
    pub fn begin_anew(&mut self, root: u64) -> io::Result<()> {
        self.root = root;
        self.filled = 0;
        self.doubt();
        self.unmap_all();
        self.flush()?;
        self.exact.begin_anew();
        self.meet_demand().map(drop)
    }

    /// Leaves nothing mapped.
    pub fn unmap_all(&mut self) {
        self.regions.clear();
        self.common.clear();
        self.mappings = 0;
        self.orders.clear();
        let own = self.tracee.reserved();
        self.orders.push(Order::unmap(USER.start, own.start - USER.start));
        self.orders.push(Order::unmap(own.end, USER.end - own.end));
    }

    /// Nothing that is mapped counts until it was compared with the guest's tables.
    pub fn doubt(&mut self) {
        self.generation = (u64::MAX, 0);
    }

    /// The guest has invalidated a page of the address space that had this generation.
    pub fn drop_page(&mut self, generation: u64, page: Gva) {
        if self.generation.1 != generation {
            return;
        }
        self.unmap(page);
        let is_part =
            |first: u64, held: &Held| held.region.large_size().is_some_and(|size| (first ^ page.0) & !(size - 1) == 0);
        self.unmap_regions(is_part);
    }

    /// Unmaps the regions that `is_stale` names, whole.
    fn unmap_regions(&mut self, is_stale: impl Fn(u64, &Held) -> bool) {
        self.regions.retain(|first, held| {
            let is_stale = is_stale(*first, held);
            if is_stale {
                self.orders.push(unmap_region(*first));
            }
            !is_stale
        });
    }

    fn unmap(&mut self, page: Gva) {
        let (first, index) = place(page);
        let Some(held) = self.regions.get_mut(&first) else { return };
        if held.rights[index].take().is_some() {
            held.entries[index] = 0;
            self.orders.push(Order::unmap(page.page().0, PAGE_SIZE));
        }
    }

    /// These pages went elsewhere, from the machine pages that they had.
    pub fn drop_moved(&mut self, moved: &[(Ppn, Mpn)]) {
        let (own, common): (Vec<_>, Vec<_>) = moved.iter().partition(|(_, mpn)| source_of(*mpn) == 0);
        for (ppn, _) in common {
            for page in self.common.remove(&ppn).unwrap_or_default() {
                self.unmap(page);
            }
        }
        if !own.is_empty() {
            let own: HashSet<Ppn> = own.into_iter().map(|(ppn, _)| ppn).collect();
            self.unmap_where(|_, ppn| own.contains(&ppn));
        }
    }

    /// Unmaps code of the pages that `is_stale` names.
    pub fn drop_code(&mut self, is_stale: impl Fn(Ppn) -> bool) {
        self.unmap_where(|rights, ppn| rights == Rights::Execute && is_stale(ppn));
    }

    fn unmap_where(&mut self, is_stale: impl Fn(Rights, Ppn) -> bool) {
        let mut stale = Vec::new();
        for (first, held) in &self.regions {
            for (index, rights) in held.rights.iter().enumerate() {
                if rights.is_some_and(|rights| is_stale(rights, held.region.reached(held.entries[index]).ppn)) {
                    stale.push(Gva(first + index as u64 * PAGE_SIZE));
                }
            }
        }
        stale.into_iter().for_each(|page| self.unmap(page));
    }

    /// Carries out what was found stale; compares everything with the guest's tables if they may have changed. Says whether it
    /// did.
    pub fn bring_up_to_date(&mut self, core: &Core<'_>) -> io::Result<bool> {
        let now = generation(core.vcpu);
        let is_doubtful = self.generation != now;
        if is_doubtful {
            self.compare(core);
        }
        self.generation = now;
        self.flush()?;
        if !self.exact.pages().all(|page| self.executes(page)) {
            let regions = &self.regions;
            self.exact.keep(|page| executes(regions, page));
            self.meet_demand()?;
        }
        Ok(is_doubtful)
    }

    /// Has the process stop where a page needs it to that is to run exactly, and is mapped next; false when it cannot. The page
    /// takes the place of others if it must: they have to be hot again first.
    fn begin_exact(&mut self, at: Gva, telling: &Arc<Telling>) -> io::Result<bool> {
        let regions = &self.regions;
        self.exact.keep(|page| page != at && executes(regions, page));
        self.exact.add(at, Arc::clone(telling));
        if self.exact.demand().is_none() {
            self.exact.keep(|page| page != at);
            self.unmap_exact()?;
            self.exact.make_room();
            self.exact.add(at, Arc::clone(telling));
            if self.exact.demand().is_none() {
                self.exact.make_room();
                self.meet_demand()?;
                return Ok(false);
            }
        }
        self.meet_demand()
    }

    /// Has the process stop where the pages need it to that run exactly; false, and none of them is mapped any more, where the
    /// host does not do that.
    fn meet_demand(&mut self) -> io::Result<bool> {
        let demand = self.exact.demand().unwrap_or_default();
        if self.tracee.break_at(&demand.breaks).is_err() {
            self.exact.cannot_break();
        } else if self.tracee.forbid_cpuid(demand.forbids_cpuid).is_err() {
            self.exact.cannot_forbid_cpuid();
        } else {
            return Ok(true);
        }
        self.unmap_exact()?;
        Ok(false)
    }

    /// Leaves the pages that run exactly to the translator again.
    pub fn unmap_exact(&mut self) -> io::Result<()> {
        let pages: Vec<Gva> = self.exact.pages().collect();
        pages.into_iter().for_each(|page| self.unmap(page));
        self.flush()
    }

    /// Unmaps whatever the guest's tables, or the traces, do not allow any more.
    fn compare(&mut self, core: &Core<'_>) {
        let paging = Paging::of(&core.vcpu.cpu);
        self.unmap_regions(|first, held| reach::region(core.memory, &paging, Gva(first)) != Some(held.region));
        for (first, held) in &mut self.regions {
            for (index, entry) in held.region.entries(core.memory, 0, PAGES).enumerate() {
                let Some(rights) = held.rights[index] else { continue };
                let is_right = entry == held.entries[index]
                    || same_but_for_dirty(entry, held.entries[index]) && rights != Rights::Write;
                let is_right = is_right && (rights != Rights::Write || may_store(core, held.region.reached(entry).ppn));
                if !is_right {
                    held.rights[index] = None;
                    held.entries[index] = 0;
                    self.orders.push(Order::unmap(first + index as u64 * PAGE_SIZE, PAGE_SIZE));
                }
            }
        }
    }

    /// Gives the orders to the process.
    fn flush(&mut self) -> io::Result<()> {
        if self.orders.is_empty() {
            return Ok(());
        }
        let orders = std::mem::take(&mut self.orders);
        self.mappings += BY_ORDER * orders.len();
        let result = orders.chunks(Tracee::most_orders()).try_for_each(|part| self.tracee.order(part));
        self.orders = orders;
        self.orders.clear();
        result
    }

    /// The mappings that there are: of neighbours with the same rights whose machine pages are neighbours the host makes one.
    fn count_mappings(&self, core: &Core<'_>) -> usize {
        let of_region = |held: &Held| {
            let mut last = None;
            let mut count = 0;
            for (rights, entry) in held.rights.iter().zip(held.entries) {
                let mpn = machine_page(core, held.region.reached(entry).ppn).map(|mpn| mpn.0);
                let here = rights.and_then(|rights| Some((rights, mpn?)));
                count += usize::from(here.is_some() && here != last);
                last = here.map(|(rights, mpn)| (rights, mpn + 1));
            }
            count
        };
        self.regions.values().map(|held| of_region(held)).sum()
    }

    /// Whether code on a page runs without a fault.
    pub fn executes(&self, address: Gva) -> bool {
        executes(&self.regions, address)
    }

    /// Maps the page of `address` and those around it that the guest's tables allow, as data or as code; gives their number.
    pub fn fill(&mut self, core: &mut Core<'_>, address: Gva, want: Want, codes: &mut Codes) -> io::Result<u64> {
        let own = self.tracee.reserved();
        let (first, target) = place(address);
        if !USER.contains(&address.0) || (first..first + REGION).contains(&own.start) {
            return Ok(0);
        }
        let paging = Paging::of(&core.vcpu.cpu);
        let Some(region) = reach::region(core.memory, &paging, address) else { return Ok(0) };
        if self.mappings > MOST_MAPPINGS {
            self.mappings = self.count_mappings(core);
            if self.mappings > MOST_MAPPINGS / 4 * 3 {
                self.unmap_all();
            }
        }
        let around = match want {
            Want::Code => CODE_AROUND,
            Want::Data if region.large_size().is_some() => LARGE_AROUND,
            Want::Data => DATA_AROUND,
        };
        let window = target & !(around - 1);
        if self.regions.get(&first).is_some_and(|held| held.region != region) {
            self.unmap_regions(|other, _| other == first);
        }
        let entries: Vec<u64> = region.entries(core.memory, window, around).collect();
        if want == Want::Code {
            look_through(core, entries.iter().filter(|entry| **entry != 0).map(|entry| region.reached(*entry)), codes);
        }
        let mut chosen = Vec::with_capacity(around);
        let mut exact = None;
        for (index, entry) in (window..).zip(entries) {
            let page = first + index as u64 * PAGE_SIZE;
            let has = self.regions.get(&first).and_then(|held| held.rights[index]);
            // Code that is stored to stays code: until the store is noticed, then it goes.
            let stays = has == Some(Rights::Execute) || (has.is_some() && index != target);
            if entry == 0 || page < USER.start || stays {
                continue;
            }
            if let Some(rights) = self.rights_of(core, region, entry, want, codes)
                && Some(rights) != has
            {
                chosen.push((index, entry, rights));
            } else if want == Want::Code
                && index == target
                && let Some(telling) = self.runs_exactly(core, region.reached(entry), codes)
            {
                exact = Some((region.reached(entry).ppn, telling));
                chosen.push((index, entry, Rights::Execute));
            }
        }
        // Code was traced: rights may have been taken away, from pages that were chosen above among them.
        if generation(core.vcpu) != self.generation {
            self.bring_up_to_date(core)?;
            chosen.retain(|(_, entry, rights)| *rights != Rights::Write || may_store(core, region.reached(*entry).ppn));
        }
        if let Some((ppn, telling)) = exact {
            if self.begin_exact(address.page(), &telling)? {
                codes.exact.insert(ppn);
            } else {
                self.exact.give_up(ppn);
                chosen.retain(|(index, ..)| *index != target);
            }
        }
        self.map(core, first, region, &chosen)
    }

    /// What tells of the host on a page of code that is to be run exactly.
    fn runs_exactly(&mut self, core: &Core<'_>, reached: Reached, codes: &Codes) -> Option<Arc<Telling>> {
        let telling = codes.refused.get(&reached.ppn)?.as_ref()?;
        let may_run = reached.executable && core.memory.hold(reached.ppn, core.vcpu.number, false, false).is_some();
        (may_run && self.exact.is_hot(reached.ppn, host_tsc())).then(|| Arc::clone(telling))
    }

    /// What a page may be mapped for.
    fn rights_of(&self, core: &mut Core<'_>, region: Region, entry: u64, want: Want, codes: &Codes) -> Option<Rights> {
        let reached = region.reached(entry);
        if want == Want::Code {
            let is_code = reached.executable && codes.plain.contains(&reached.ppn);
            core.memory.hold(reached.ppn, core.vcpu.number, false, false)?;
            return is_code.then_some(Rights::Execute);
        }
        // Not RAM: whoever is there must be asked.
        let held = core.memory.hold(reached.ppn, core.vcpu.number, reached.writable, false)?;
        Some(if held.may_store { Rights::Write } else { Rights::Read })
    }

    /// Maps pages of one region, neighbours that are neighbours in the pool, too, together.
    fn map(&mut self, core: &Core<'_>, first: u64, region: Region, chosen: &[(usize, u64, Rights)]) -> io::Result<u64> {
        if chosen.is_empty() {
            self.flush()?;
            return Ok(0);
        }
        let held = self
            .regions
            .entry(first)
            .or_insert_with(|| Box::new(Held { region, entries: [0; PAGES], rights: [None; PAGES] }));
        let mut runs: Vec<(u64, u64, Rights, Mpn)> = Vec::new();
        let mut count = 0;
        for (index, entry, rights) in chosen {
            let ppn = region.reached(*entry).ppn;
            let Some(mpn) = machine_page(core, ppn) else { continue };
            let page = first + *index as u64 * PAGE_SIZE;
            if source_of(mpn) != 0 {
                let places = self.common.entry(ppn).or_default();
                if !places.contains(&Gva(page)) {
                    places.push(Gva(page));
                }
            }
            (held.entries[*index], held.rights[*index]) = (*entry, Some(*rights));
            count += 1;
            match runs.last_mut() {
                Some((at, size, same, from))
                    if at == &(page - *size) && same == rights && from.0 + *size / PAGE_SIZE == mpn.0 =>
                {
                    *size += PAGE_SIZE;
                }
                _ => runs.push((page, PAGE_SIZE, *rights, mpn)),
            }
        }
        self.orders.extend(
            runs.into_iter().map(|(at, size, rights, from)| {
                Order::map(at, size, rights, source_of(from), page_of(from) * PAGE_SIZE)
            }),
        );
        self.flush()?;
        self.filled += count;
        Ok(count)
    }
}

/// The machine page that a page has now; to look is no touch.
fn machine_page(core: &Core<'_>, ppn: Ppn) -> Option<Mpn> {
    core.memory.pmap().get(ppn)?.mpn()
}

fn executes(regions: &Regions, address: Gva) -> bool {
    let (first, index) = place(address);
    regions.get(&first).is_some_and(|held| held.rights[index] == Some(Rights::Execute))
}

/// The first address of the region around an address, and which of its pages the address is in.
fn place(address: Gva) -> (u64, usize) {
    (address.0 & !(REGION - 1), (address.0 % REGION / PAGE_SIZE) as usize)
}

/// Leaves nothing mapped in a region. The last one, where stacks begin, reaches beyond what a process may name.
fn unmap_region(first: u64) -> Order {
    Order::unmap(first, REGION.min(USER.end - first))
}

/// Whether two entries differ in the dirty bit alone.
fn same_but_for_dirty(one: u64, other: u64) -> bool {
    (one ^ other) & !x86::paging::entry::DIRTY == 0
}

/// Has stores to pages of code watched and looks through them, once.
fn look_through(core: &mut Core<'_>, pages: impl Iterator<Item = Reached>, codes: &mut Codes) {
    let is_known = |ppn: &Ppn| codes.plain.contains(ppn) || codes.refused.contains_key(ppn);
    let fresh = pages.filter(|it| it.executable && core.memory.is_ram(it.ppn)).map(|it| it.ppn);
    let fresh: Vec<Ppn> = fresh.filter(|ppn| !is_known(ppn)).collect();
    // Those that are refused are watched, too, so that they are looked at again when they have changed.
    core.trace_pages(fresh.iter().copied());
    let mut code = [0; PAGE_SIZE as usize];
    for ppn in fresh {
        let Some(page) = core.memory.page(ppn) else { continue };
        page.read(0, &mut code);
        let is_stable = codes.writes.get(&ppn).is_none_or(|writes| *writes < MOST_WRITES);
        let verdict = if is_stable { scan::judge(&code, core.vcpu.cpu.tsc_offset == 0) } else { Verdict::Unclear };
        let telling = match verdict {
            Verdict::Plain => {
                codes.plain.insert(ppn);
                continue;
            }
            Verdict::Telling(telling) => Some(Arc::new(telling)),
            Verdict::Unclear => None,
        };
        codes.refused.insert(ppn, telling);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_unmapped_as_far_as_a_process_reaches() {
        assert_eq!(unmap_region(0x40_0000), Order::unmap(0x40_0000, REGION));
        assert_eq!(unmap_region(0x7fff_ffe0_0000), Order::unmap(0x7fff_ffe0_0000, REGION - PAGE_SIZE));
        let file = host::map::memfd(c"test", PAGE_SIZE).unwrap();
        match Tracee::new(&[&file]) {
            Ok(mut tracee) => tracee.order(&[unmap_region(0), unmap_region(0x7fff_ffe0_0000)]).unwrap(),
            Err(error) => eprintln!("skipped: the host allows no tracee: {error}"),
        }
    }
}
