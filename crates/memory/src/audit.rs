//! The audit: every invariant of a guest's memory, derived again from scratch. For tests and operators; the machine stands
//! still meanwhile.

use std::collections::{HashMap, HashSet};

use x86::{Gva, Mpn, Ppn};

use crate::guest::GuestMemory;
use crate::machine::source_of;
use crate::pmap::{Entry, State};
use crate::tlb::{Bank, SoftTlb, TlbEntry};
use crate::walk::{Paging, peek};

/// Findings that are listed at most: what is broken is broken in many places.
const MOST_FINDINGS: usize = 100;

/// What an audit has found.
#[derive(Debug, Default)]
pub struct Audit {
    /// A sentence for each invariant that does not hold.
    pub findings: Vec<String>,
    /// Translations that were compared.
    pub translations: u64,
    /// Of these: where the guest has changed its tables since without saying so, as it may until it says so.
    pub stale: u64,
}

impl Audit {
    /// Notes an invariant that does not hold.
    pub fn find(&mut self, sentence: String) {
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(sentence);
        }
    }
}

impl GuestMemory {
    /// Compares the pmap with the pool and the swap store.
    pub fn audit(&self, audit: &mut Audit) {
        let pmap = self.pmap();
        let (mut pages, mut slots) = (HashMap::<Mpn, Ppn>::new(), HashMap::<u64, Ppn>::new());
        let entries = (0..pmap.pages() as usize).filter_map(|index| Some((pmap.at(index), pmap.get(pmap.at(index))?)));
        for (ppn, entry) in entries {
            if entry.is_taken() || entry.is_breaking() {
                audit.find(format!("page {ppn} is being moved, and nobody moves it"));
            }
            if let Some(mpn) = entry.mpn() {
                let is_own = source_of(mpn) == 0;
                if is_own != (entry.state() == State::Private) || !self.machine().has(mpn) {
                    audit.find(format!("page {ppn} is {:?} and has machine page {mpn}", entry.state()));
                }
                if is_own && !self.pool().is_given(mpn) {
                    audit.find(format!("page {ppn} has machine page {mpn}, which is free"));
                }
                if is_own && let Some(other) = pages.insert(mpn, ppn) {
                    audit.find(format!("pages {ppn} and {other} have one machine page, {mpn}"));
                }
            }
            if let Some(slot) = entry.slot()
                && let Some(other) = slots.insert(slot, ppn)
            {
                audit.find(format!("pages {ppn} and {other} have one slot of the swap store, {slot}"));
            }
        }
        if pages.len() as u64 != self.pool().in_use() {
            audit.find(format!("{} machine pages are given out, and {} are known", self.pool().in_use(), pages.len()));
        }
        let stored = self.swap().map_or(0, |store| store.statistics().pages());
        if stored != slots.len() as u64 {
            audit.find(format!("the swap store has {stored} pages, and {} are known", slots.len()));
        }
    }

    /// Compares a processor's translations with the guest's tables and the pmap. The processor has obeyed its requests.
    pub fn audit_translations(&self, tlb: &SoftTlb, number: usize, paging: &Paging, audit: &mut Audit) {
        let pmap = self.pmap();
        let own = (0..pmap.pages() as usize).filter_map(|index| pmap.get(pmap.at(index))?.mpn());
        let own: HashSet<u64> = own.map(|mpn| self.machine().page(mpn).host_address()).collect();
        for (bank, entry) in tlb.translations() {
            audit.translations += 1;
            let address = Gva(entry.read);
            if !own.contains(&entry.page) {
                audit
                    .find(format!("processor {number}: {address} leads to a machine page that is none of the guest's"));
                continue;
            }
            let Some(gpa) = peek(self, paging, address) else {
                audit.stale += 1;
                continue;
            };
            let Some(known) = pmap.get(gpa.ppn()) else {
                audit.stale += 1;
                continue;
            };
            let page = known.mpn().map(|mpn| self.machine().page(mpn).host_address());
            if page != Some(entry.page) {
                // The tables may have been changed; then the translation is of another page.
                audit.stale += 1;
                continue;
            }
            if let Some(sentence) = fault_of(&entry, known, number) {
                audit.find(format!("processor {number}, {bank:?}: {address} of page {} {sentence}", gpa.ppn()));
            }
        }
    }
}

/// What is wrong with a translation of a page with this entry.
fn fault_of(entry: &TlbEntry, known: Entry, number: usize) -> Option<&'static str> {
    let may_store = entry.write == entry.read;
    if known.state().is_read_only() {
        if may_store {
            return Some("can be stored to, and others have the page");
        }
        return (!known.holders().has(number)).then_some("is held by a processor that the pmap does not know of");
    }
    if may_store && known.is_traced() {
        return Some("can be stored to, and the page is traced");
    }
    (may_store && !known.writers().has(number))
        .then_some("can be stored to by a processor that the pmap does not know of")
}

impl SoftTlb {
    /// All translations of the current address space: in the TLB, and in the shadow behind it.
    fn translations(&self) -> impl Iterator<Item = (Bank, TlbEntry)> {
        let in_tlb = [Bank::Kernel, Bank::User, Bank::KernelAc].into_iter().flat_map(|bank| {
            let entries = self.banks[bank as usize].entries.iter();
            entries.filter(|entry| entry.page != 0).map(move |entry| (bank, *entry))
        });
        let behind = [Bank::Kernel, Bank::User, Bank::KernelAc].into_iter().flat_map(|bank| {
            let entries = self.shadow.entries(bank, self.generations[bank as usize]);
            entries.map(move |entry| (bank, entry))
        });
        in_tlb.chain(behind)
    }
}
