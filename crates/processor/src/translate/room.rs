//! Room for new translations: the oldest make way, some at a time.
//!
//! Code lies in a ring, and so do blocks, their maps and their sites, all in the order in which they were made. When one of
//! them is full, the oldest sixteenth of the blocks goes, and the direct jumps to them are undone. Nothing is moved, and
//! nobody waits for more than that.

use x86::Ppn;

use super::blocks::Key;
use super::lower::Site;
use super::{BLOCK_ROOM, Translator};
use crate::core::Core;

/// What the translations of a machine of 256 MiB may take.
pub const BUDGET: usize = 32 << 20;

/// How much there may be of each. A block of Debian's kernel has about 150 bytes of code, 4 sites and 3 places where it may
/// fault; with its entries in the tables that makes 450 bytes, so that for each byte of code there are two beside it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub code: usize,
    blocks: usize,
    sites: usize,
    map: usize,
}

impl Limits {
    /// Limits that keep within `budget` bytes together.
    pub fn of(budget: usize) -> Limits {
        let budget = if budget == 0 { BUDGET } else { budget };
        let blocks = (budget / 576).max(256);
        let code = (budget * 5 / 16).max(4 * BLOCK_ROOM).next_multiple_of(host::map::PAGE);
        Limits { code, blocks, sites: blocks * 5, map: blocks * 4 }
    }
}

impl Translator {
    /// Makes room for one more block.
    pub(super) fn make_room(&mut self, core: &mut Core<'_>) {
        while !self.has_room() {
            self.evict(core);
        }
    }

    fn has_room(&mut self) -> bool {
        let (blocks, map) = self.blocks.sizes();
        blocks < self.limits.blocks
            && self.sites.len() < self.limits.sites
            && map < self.limits.map
            && self.cache.make_room(BLOCK_ROOM, self.blocks.oldest_address())
    }

    /// Changes whenever code goes whose address or number somebody may still hold.
    pub(super) fn code_gone(&self) -> u64 {
        self.counters.clears + self.counters.evictions
    }

    /// Gives up the oldest blocks. Whatever holds addresses of code forgets them here: jump caches, links that are written
    /// down, and the jumps of sites with a [`Site::displacement`].
    fn evict(&mut self, core: &mut Core<'_>) {
        self.counters.evictions += 1;
        self.take_samples(core);
        // Whole pages of what is kept have no room from now on.
        self.recall.is_crowded = true;
        // Landings are part of blocks.
        core.vcpu.jumps.returns.clear(true);
        core.vcpu.jumps.returns.clear(false);
        let Some(first) = self.blocks.oldest_address() else { return };
        let (blocks, _) = self.blocks.sizes();
        let mut pages = Vec::new();
        for _ in 0..(blocks / 16).max(1) {
            let Some((key, second)) = self.blocks.oldest() else { break };
            core.vcpu.jumps.forget_block(key.rip, key.mode.of_code());
            pages.extend(second.into_iter().chain([key.gpa.ppn()]));
            let wanted = self.blocks.pop_oldest(self.sites.next_number());
            self.sites.forget_before(wanted);
        }
        let code = self.cache.code();
        let gone = match self.blocks.oldest_address() {
            Some(oldest) if oldest >= first => [first..oldest, first..first],
            Some(oldest) => [first..code.end, code.start..oldest],
            None => [code, first..first],
        };
        let is_gone = |address: u64| gone.iter().any(|range| range.contains(&address));
        pages.sort_unstable();
        pages.dedup();
        for page in pages {
            self.unlink(page, is_gone);
        }
    }

    /// Undoes the jumps to blocks of a page whose code is gone: those that are written down, and those of its own blocks.
    fn unlink(&mut self, page: Ppn, is_gone: impl Fn(u64) -> bool) {
        self.links.undo_gone(page, &self.blocks, &mut self.cache, &is_gone);
        let base = self.cache.range().start;
        for sites in self.blocks.sites_of_page(page, self.sites.next_number()) {
            for (at, distance) in self.sites.links(sites) {
                let at = base + u64::from(at);
                if is_gone(self.cache.displacement_target(at)) {
                    self.cache.set_displacement(at, at + u64::from(distance));
                }
            }
        }
    }

    /// Notes where the links among the sites from `first` on lead as long as they are none.
    pub(super) fn note_unlinked(&mut self, first: u32) {
        let base = self.cache.range().start;
        let count = self.sites.since(first).len() as u32;
        for number in (0..count).map(|index| first.wrapping_add(index)) {
            if let Some(at) = self.sites.get(number).and_then(Site::displacement) {
                let at = base + u64::from(at);
                let distance = self.cache.displacement_target(at).wrapping_sub(at);
                self.sites.set_unlinked(number, distance as u16);
            }
        }
    }

    /// Lets nothing lead to the blocks of a page any more.
    pub(super) fn drop_page(&mut self, core: &mut Core<'_>, page: Ppn) {
        let jumps = &mut core.vcpu.jumps;
        jumps.returns.clear(true);
        jumps.returns.clear(false);
        self.blocks.drop_page(page, |Key { rip, mode, .. }| {
            jumps.forget_block(rip, mode.of_code());
        });
        self.links.undo_page(page, &self.blocks, &mut self.cache);
        self.recall.forget(page);
        if let Some(direct) = &mut self.direct {
            direct.forget_code(page);
        }
    }
}
