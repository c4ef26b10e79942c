//! Direct jumps between blocks of different pages. They are right only as long as the virtual addresses lead where they did,
//! and as long as the target's code is unchanged; so each can be undone.

use std::collections::HashMap;

use x86::Ppn;

use crate::code_cache::CodeCache;

#[derive(Clone, Copy, Debug)]
struct Link {
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

fn undo(links: &[Link], cache: &mut CodeCache) {
    for link in links {
        cache.set_displacement(link.at, link.unlinked);
    }
}

impl Links {
    /// Remembers how the jump at `at` is now, before it is linked to code of `target`.
    pub fn note(&mut self, target: Ppn, at: u64, cache: &CodeCache) {
        self.by_target.entry(target).or_default().push(Link { at, unlinked: cache.displacement_target(at) });
    }

    pub fn undo_page(&mut self, target: Ppn, cache: &mut CodeCache) {
        if let Some(links) = self.by_target.remove(&target) {
            undo(&links, cache);
        }
    }

    pub fn undo_all(&mut self, cache: &mut CodeCache) {
        for (_, links) in self.by_target.drain() {
            undo(&links, cache);
        }
    }

    /// Forgets all links, because their code is gone.
    pub fn clear(&mut self) {
        self.by_target.clear();
    }
}
