//! Direct jumps between blocks of different pages. They are right only as long as the virtual addresses lead where they did,
//! and as long as the target's code is unchanged; so each can be undone.

use std::collections::HashMap;

use x86::Ppn;

use super::blocks::Blocks;
use crate::code_cache::CodeCache;

#[derive(Clone, Copy, Debug)]
struct Link {
    /// The block that jumps.
    source: u32,
    /// The address of the displacement.
    at: u64,
    /// Where the jump led before: the code that leaves to look for the target.
    unlinked: u64,
}

/// The links by the page of their target.
#[derive(Debug, Default)]
pub struct Links {
    by_target: HashMap<Ppn, Vec<Link>>,
}

fn undo(links: &[Link], blocks: &Blocks, cache: &mut CodeCache) {
    // Where a block was that is gone, there may be other code by now.
    for link in links.iter().filter(|link| blocks.is_there(link.source)) {
        cache.set_displacement(link.at, link.unlinked);
    }
}

impl Links {
    /// Remembers how the jump at `at` is now, before it is linked to code of `target`.
    pub fn note(&mut self, source: u32, target: Ppn, at: u64, cache: &CodeCache) {
        self.by_target.entry(target).or_default().push(Link { source, at, unlinked: cache.displacement_target(at) });
    }

    pub fn undo_page(&mut self, target: Ppn, blocks: &Blocks, cache: &mut CodeCache) {
        if let Some(links) = self.by_target.remove(&target) {
            undo(&links, blocks, cache);
        }
    }

    /// Undoes those to a page that lead to code which is gone, and forgets those that come from there.
    pub fn undo_gone(&mut self, target: Ppn, blocks: &Blocks, cache: &mut CodeCache, gone: impl Fn(u64) -> bool) {
        let Some(links) = self.by_target.get_mut(&target) else { return };
        links.retain(|link| {
            let is_there = blocks.is_there(link.source);
            let leads_there = is_there && gone(cache.displacement_target(link.at));
            if leads_there {
                cache.set_displacement(link.at, link.unlinked);
            }
            is_there && !leads_there
        });
        if links.is_empty() {
            self.by_target.remove(&target);
        }
    }

    pub fn undo_all(&mut self, blocks: &Blocks, cache: &mut CodeCache) {
        for (_, links) in self.by_target.drain() {
            undo(&links, blocks, cache);
        }
    }

    /// Forgets all links, because their code is gone.
    pub fn clear(&mut self) {
        self.by_target.clear();
    }
}
