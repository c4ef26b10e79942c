//! Kept translations in and out: what another machine of this user translated is installed instead of translated again, and
//! what is translated here is kept for the next.

use std::collections::HashMap;
use std::sync::Arc;

use x86::{Gpa, PAGE_MASK, PAGE_SIZE, Ppn};

use super::block::Features;
use super::blocks::Key;
use super::kept::record::{Block, External, Record};
use super::kept::{GroupKey, Kept};
use super::lower::Site;
use super::{BLOCK_ROOM, Translator, frame};
use crate::core::Core;
use crate::cpuid;

/// What the translator knows of kept translations.
#[derive(Debug, Default)]
pub struct Recall {
    kept: Option<Arc<Kept>>,
    has_left: bool,
    /// Blocks had to make way since all were dropped.
    pub is_crowded: bool,
    pages: HashMap<Ppn, PageHistory>,
    /// The records of the group at work.
    records: Vec<u8>,
    externals: Vec<External>,
    sites: Vec<Site>,
    pub blocks: u64,
}

/// What became of a page's kept translations here.
#[derive(Debug, Default)]
struct PageHistory {
    /// Groups that were taken in, and nothing was dropped since.
    taken: Vec<u32>,
    /// How often code of the page was written.
    writes: u32,
    /// The number of writes after which the groups are looked at again. Doubles each time: a kernel that patches itself does
    /// so a few times, and code that modifies itself in a loop would take in its page each time round.
    again_at: u32,
}

/// Code of a page that was written more often is not kept: it will be something else the next time.
const MOST_WRITES: u32 = 64;

impl Recall {
    /// The page was written, and its blocks are gone: what is kept may be of use again.
    pub fn forget(&mut self, page: Ppn) {
        let page = self.pages.entry(page).or_default();
        page.writes = page.writes.saturating_add(1);
        if page.writes >= page.again_at {
            page.taken.clear();
            page.again_at = page.writes.saturating_mul(2);
        }
    }

    /// All blocks are gone.
    pub fn forget_all(&mut self) {
        self.pages.clear();
        self.is_crowded = false;
    }

    /// Whether the page's code stays as it is long enough for its translations to be of use to others.
    fn is_steady(&self, page: Ppn) -> bool {
        self.pages.get(&page).is_none_or(|page| page.writes <= MOST_WRITES)
    }
}

impl Translator {
    /// Takes translations from `kept`, and gives it what is new.
    pub fn keep(&mut self, kept: Arc<Kept>) {
        // One instruction at a time is another translation, and nobody needs that fast.
        if !self.options.single && kept.join(self.version()).is_some() {
            self.recall.kept = Some(kept);
        }
    }

    /// What a kept translation must have been made by and for: this build of the translator with these stubs and this
    /// layout of the VCPU, on a processor with the same features.
    fn version(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(env!("RINGZERO_BUILD").as_bytes());
        hasher.update(&self.cache.kept());
        for word in frame::layout().into_iter().chain(cpuid::host_features()) {
            hasher.update(&word.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// The group of a block's translation.
    fn group(&self, key: &Key) -> GroupKey {
        let Features { sse, avx, user: _, tsc_disabled, fsgsbase, syscall, is_alone } = self.features;
        let flags = [sse, avx, tsc_disabled, fsgsbase, syscall, is_alone, self.options.count_instructions];
        let flags = flags.iter().fold(0, |flags, flag| flags << 1 | u32::from(*flag));
        GroupKey { page: key.rip >> 12, kind: flags << 8 | u32::from(key.mode.0) }
    }

    /// Installs the kept translations of the page of `key`; true when the block itself is among them.
    pub(super) fn recall(&mut self, core: &mut Core<'_>, key: &Key) -> Option<(u64, u64)> {
        let kept = self.recall.kept.clone()?;
        let store = kept.store()?;
        let group = self.group(key);
        let place = store.find(group)?;
        let history = self.recall.pages.entry(key.gpa.ppn()).or_default();
        if history.taken.contains(&place) {
            return None;
        }
        history.taken.push(place);
        let mut page = [0; PAGE_SIZE as usize];
        core.memory.page(key.gpa.ppn())?.read(0, &mut page);
        let mut records = std::mem::take(&mut self.recall.records);
        store.read(group, place, &mut records);
        let (mut rest, first) = (&records[..], self.sites.next_number());
        while let Some(record) = Record::take(&mut rest) {
            if record.is_of(&page) && self.install(core, key, &record, &page).is_none() {
                break;
            }
        }
        self.recall.records = records;
        self.link_inside_page(key, first);
        self.blocks.find(key).map(|known| (known.entry_host, known.entry_slot))
    }

    /// Makes a block of a record whose guest code is in the page of `beside`, which held `page` a moment ago. `None` when there
    /// is no room.
    fn install(
        &mut self,
        core: &mut Core<'_>,
        beside: &Key,
        record: &Record<'_>,
        page: &[u8; PAGE_SIZE as usize],
    ) -> Option<()> {
        let offset = u64::from(record.offset());
        let gpa = Gpa(beside.gpa.0 & !PAGE_MASK | offset);
        let key = Key { gpa, rip: beside.rip & !PAGE_MASK | offset, mode: beside.mode };
        if self.blocks.find(&key).is_some() {
            return Some(());
        }
        if record.code.len() > BLOCK_ROOM {
            return Some(());
        }
        self.make_room(core);
        for part in record.parts() {
            let code = &page[usize::from(part.offset)..][..usize::from(part.size)];
            if !core.trace_code(Gpa(gpa.0 & !PAGE_MASK | u64::from(part.offset)), code) {
                // Another processor is at it.
                return Some(());
            }
        }
        let base = self.cache.range().start;
        let address = self.cache.next_address();
        let code = &mut self.asm.code;
        code.clear();
        code.extend_from_slice(record.code);
        let mut put = |at: u32, value: u32| {
            code[at as usize..at as usize + 4].copy_from_slice(&value.to_le_bytes());
        };
        for external in record.externals() {
            let after = address + u64::from(external.at) + 4;
            put(external.at, (base + u64::from(external.target)).wrapping_sub(after) as u32);
        }
        let sites = self.sites.next_number();
        for site in record.sites(self.blocks.next_index(), (address - base) as u32) {
            let Some(site) = site else {
                self.sites.truncate(sites);
                return Some(());
            };
            put(site.at, self.sites.next_number());
            self.sites.push(site.site);
        }
        let address = self.cache.add(&self.asm.code)?;
        self.note_unlinked(sites);
        let map = &mut self.scratch.map;
        map.clear();
        map.extend(record.map());
        let entries = (address + u64::from(record.entry_host), address + u64::from(record.entry_slot));
        self.blocks.add(key, None, address..address + record.code.len() as u64, entries, &self.scratch.map, sites);
        self.recall.blocks += 1;
        self.counters.recalled_instructions += u64::from(record.insns);
        Some(())
    }

    /// Links the direct jumps among the sites from `first` on whose targets are known, in the page of `beside`.
    fn link_inside_page(&mut self, beside: &Key, first: u32) {
        let base = self.cache.range().start;
        for site in self.sites.since(first) {
            let Site::Link { block, at, target, flags_in_host } = site else { continue };
            let rip = self.blocks.rip(block, 0).wrapping_add_signed(target.into());
            if rip >> 12 != beside.rip >> 12 {
                continue;
            }
            let gpa = Gpa(beside.gpa.0 & !PAGE_MASK | rip & PAGE_MASK);
            let known = self.blocks.find(&Key { gpa, rip, mode: beside.mode.of_code() });
            if let Some(known) = known.filter(|known| known.is_single) {
                let entry = if flags_in_host { known.entry_host } else { known.entry_slot };
                self.cache.set_displacement(base + u64::from(at), entry);
            }
        }
    }

    /// Keeps the block that was just translated, whose code is in the assembler and whose sites begin at `first`.
    pub(super) fn note(&mut self, key: &Key, first: u32, insns: usize, entries: (u32, u32)) {
        let Some(store) = self.recall.kept.as_ref().and_then(|kept| kept.store()) else { return };
        if !self.recall.is_steady(key.gpa.ppn()) {
            return;
        }
        let group = self.group(key);
        if self.recall.is_crowded && store.find(group).is_some() {
            return;
        }
        let base = self.cache.range().start;
        let start = (self.asm.origin() - base) as u32;
        self.recall.sites.clear();
        self.recall.sites.extend(self.sites.since(first));
        self.recall.externals.clear();
        self.recall.externals.extend(
            self.asm.externals().iter().map(|(at, target)| External { at: *at, target: (target - base) as u32 }),
        );
        let mut page = [0; PAGE_SIZE as usize];
        // What was translated, and not what other processors have made of it since.
        let mut bytes = &self.bytes[..];
        for part in &self.parts {
            let (these, rest) = bytes.split_at(part.size.into());
            page[usize::from(part.offset)..][..these.len()].copy_from_slice(these);
            bytes = rest;
        }
        let block = Block {
            parts: &self.parts,
            page: &page,
            insns: insns as u16,
            entry_host: entries.0,
            entry_slot: entries.1,
            start,
            code: &self.asm.code,
            externals: &self.recall.externals,
            sites: &self.recall.sites,
            site_uses: &self.scratch.site_uses,
            map: &self.scratch.map,
        };
        store.note(group, &block);
    }

    /// The machine has ended.
    pub(super) fn leave_kept(&mut self) {
        if let Some(kept) = &self.recall.kept
            && !std::mem::replace(&mut self.recall.has_left, true)
        {
            kept.leave();
        }
    }

    pub(super) fn recall_counters(&self, counters: &mut Vec<(&'static str, u64)>) {
        use std::sync::atomic::Ordering::Relaxed;
        let store = self.recall.kept.as_ref().and_then(|kept| kept.store());
        let of_store = |count: fn(&super::kept::Store) -> u64| store.map_or(0, count);
        counters.extend([
            ("kept.blocks", self.recall.blocks),
            ("kept.instructions", self.counters.recalled_instructions),
            ("kept.groups", of_store(|store| store.groups_read.load(Relaxed))),
            ("kept.groups_refused", of_store(|store| store.groups_refused.load(Relaxed))),
            ("kept.noted", of_store(|store| store.blocks_noted.load(Relaxed))),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_written_all_the_time_is_looked_at_again_ever_more_seldom() {
        let (mut recall, page) = (Recall::default(), Ppn(7));
        let mut looks = 0;
        for _ in 0..1000 {
            let history = recall.pages.entry(page).or_default();
            if history.taken.is_empty() {
                history.taken.push(1);
                looks += 1;
            }
            recall.forget(page);
        }
        assert_eq!(looks, 11, "at the first, and behind writes 1, 2, 4 ... 512");
        assert!(!recall.is_steady(page) && recall.is_steady(Ppn(8)));
        recall.forget_all();
        assert!(recall.is_steady(page));
    }
}
