//! Kept translations in and out: what another machine of this user translated is installed instead of translated again, and
//! what is translated here is kept for the next.

use std::collections::HashMap;
use std::sync::Arc;

use x86::{Gpa, PAGE_MASK, PAGE_SIZE, Ppn};

use super::block::Features;
use super::blocks::Key;
use super::kept::near::{Group, Near};
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
    /// The guest has nothing to do but to keep its clock: it translates the little that this needs. What is kept comes by
    /// pages, and would lie there unused.
    pub is_asleep: bool,
    /// How often code of a page was written.
    writes: HashMap<Ppn, u32>,
    near: Near,
    /// Offsets of blocks that are about to be taken in.
    wanted: Vec<u16>,
    externals: Vec<External>,
    sites: Vec<Site>,
    pub blocks: u64,
}

/// Code of a page that was written more often is not kept, and not looked for: it will be something else the next time.
const MOST_WRITES: u32 = 64;

impl Recall {
    /// The page was written, and its blocks are gone.
    pub fn forget(&mut self, page: Ppn) {
        let writes = self.writes.entry(page).or_default();
        *writes = writes.saturating_add(1);
    }

    /// All blocks are gone.
    pub fn forget_all(&mut self) {
        self.writes.clear();
        self.is_crowded = false;
    }

    /// Nothing was wanted for a while.
    pub fn rest(&mut self) {
        self.near.clear();
        if let Some(store) = self.kept.as_ref().and_then(|kept| kept.store()) {
            store.rest();
        }
    }

    /// Whether the page's code stays as it is long enough for its translations to be of use to others.
    fn is_steady(&self, page: Ppn) -> bool {
        self.writes.get(&page).is_none_or(|writes| *writes <= MOST_WRITES)
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
    fn group(&self, kept: &Kept, core: &Core<'_>, key: &Key) -> GroupKey {
        let Features { sse, avx, user: _, tsc_disabled, fsgsbase, syscall, is_alone } = self.features;
        let flags = [sse, avx, tsc_disabled, fsgsbase, syscall, is_alone, self.options.count_instructions];
        let flags = flags.iter().fold(0, |flags, flag| flags << 1 | u32::from(*flag));
        let first = || {
            let mut page = vec![0; PAGE_SIZE as usize];
            if let Some(memory) = core.memory.page(key.gpa.ppn()) {
                memory.read(0, &mut page);
            }
            page
        };
        // Programs are the same under every kernel.
        let system = if key.mode.is_user() { 0 } else { kept.system(first) };
        GroupKey { page: key.rip >> 12, kind: flags << 8 | u32::from(key.mode.0), system }
    }

    /// Installs the block of `key` if it is kept.
    pub(super) fn recall(&mut self, core: &mut Core<'_>, key: &Key) -> Option<(u64, u64)> {
        let kept = self.recall.kept.clone()?;
        let store = kept.store()?;
        if self.recall.is_asleep || !self.recall.is_steady(key.gpa.ppn()) {
            return None;
        }
        let group = self.group(&kept, core, key);
        let place = store.find(group)?;
        let mut near = std::mem::take(&mut self.recall.near);
        let known = near
            .find(place, key.gpa.offset() as u16, |records| store.read(group, place, records))
            .and_then(|group| self.take_in(core, key, group));
        self.recall.near = near;
        known
    }

    /// Installs the block of `key` from its group, and with it those of the page that it leads to: they are kept because they
    /// were wanted, and so most are wanted again.
    fn take_in(&mut self, core: &mut Core<'_>, key: &Key, group: &Group) -> Option<(u64, u64)> {
        let mut wanted = std::mem::take(&mut self.recall.wanted);
        wanted.clear();
        if group.is_new && !self.recall.is_crowded {
            wanted.extend(group.offsets());
        }
        wanted.push(key.gpa.offset() as u16);
        let first = self.sites.next_number();
        while let Some(offset) = wanted.pop() {
            let here = key.beside(offset);
            if self.blocks.find(&here).is_some() {
                continue;
            }
            let Some(page) = core.memory.page(key.gpa.ppn()) else { break };
            let is_of_page =
                |record: &Record<'_>| record.guest().all(|(part, bytes)| page.holds(part.offset.into(), bytes));
            let Some(record) = group.records_at(offset).find(is_of_page) else { continue };
            let sites = self.sites.next_number();
            // Where others have to make way, only what is wanted now is worth that. And where accesses are checked one by
            // one, blocks lead to blocks of another group.
            if self.install(core, here, &record).is_none() || self.recall.is_crowded || key.mode.is_apart() {
                break;
            }
            for site in self.sites.since(sites) {
                if let Site::Link { target, .. } = site {
                    let rip = here.rip.wrapping_add_signed(target.into());
                    if rip >> 12 == key.rip >> 12 {
                        wanted.push((rip & PAGE_MASK) as u16);
                    }
                }
            }
        }
        self.recall.wanted = wanted;
        self.link_inside_page(key, first);
        self.blocks.find(key).map(|known| (known.entry_host, known.entry_slot))
    }

    /// Makes a block of a record that was of its page a moment ago. `None` when there is no room.
    fn install(&mut self, core: &mut Core<'_>, key: Key, record: &Record<'_>) -> Option<()> {
        if record.code.len() > BLOCK_ROOM {
            return Some(());
        }
        self.make_room(core);
        for (part, bytes) in record.guest() {
            if !core.trace_code(Gpa(key.gpa.0 & !PAGE_MASK | u64::from(part.offset)), bytes) {
                // Another processor is at it.
                return Some(());
            }
        }
        let base = self.cache.range().start;
        let address = self.cache.next_address();
        let start = (address - base) as u32;
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
        for site in record.sites(self.blocks.next_index(), start) {
            let Some(site) = site else {
                self.sites.truncate(sites);
                return Some(());
            };
            let number = self.sites.next_number();
            put(site.at, number);
            self.sites.push(site.site);
            if let Some(at) = site.site.displacement() {
                // Behind the displacement begins what it is relative to.
                self.sites.set_unlinked(number, record.displacement(at.wrapping_sub(start)).wrapping_add(4) as u16);
            }
        }
        let address = self.cache.add(&self.asm.code)?;
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
            // No other block leads to one whose accesses are checked one by one before it knows the need.
            let target = Key { mode: beside.mode.of_code(), ..beside.beside((rip & PAGE_MASK) as u16) };
            let known = self.blocks.find(&target);
            if let Some(known) = known.filter(|known| known.is_single) {
                let entry = if flags_in_host { known.entry_host } else { known.entry_slot };
                self.cache.set_displacement(base + u64::from(at), entry);
            }
        }
    }

    /// Keeps the block that was just translated, whose code is in the assembler and whose sites begin at `first`.
    pub(super) fn note(&mut self, core: &Core<'_>, key: &Key, first: u32, insns: usize, entries: (u32, u32)) {
        let Some(kept) = self.recall.kept.clone() else { return };
        let Some(store) = kept.store() else { return };
        if !self.recall.is_steady(key.gpa.ppn()) {
            return;
        }
        let group = self.group(&kept, core, key);
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
    fn a_page_that_is_written_all_the_time_is_not_looked_at() {
        let (mut recall, page) = (Recall::default(), Ppn(7));
        let looks = (0..1000).filter(|_| {
            let is_steady = recall.is_steady(page);
            recall.forget(page);
            is_steady
        });
        assert_eq!(looks.count(), 65);
        assert!(recall.is_steady(Ppn(8)));
        recall.forget_all();
        assert!(recall.is_steady(page));
    }
}
