//! What the translator does for the host when the guest has nothing to do: it gives memory back.
//!
//! Most of what a boot translates never runs again. When a guest has been quiet for a while, its translations are dropped
//! once; those that it needs come back within milliseconds. A guest that needs them all is left alone, because the
//! amount that makes dropping worth while doubles each time. One that stays quiet for long, as a host with a hundred guests
//! has them, drops nearly everything, but not often.

use std::time::{Duration, Instant};

use super::Translator;
use crate::core::Core;

/// Code that was written since the last look does not count as quiet when it is more than this.
const STIR: u64 = 64 << 10;
/// How long a guest must have been quiet.
const QUIET: Duration = Duration::from_millis(1500);
/// How long it must have been quiet to drop nearly everything, how often it does, and how much code it then keeps.
const LONG: Duration = Duration::from_secs(10);
const SELDOM: Duration = Duration::from_secs(60);
const LITTLE: usize = 512 << 10;
/// How much code makes the first drop worth while.
const WORTH: usize = 1 << 20;
/// Pages that were looked for in the guest's tables since the last look: a guest that is busy with code it had before.
const STIRRED_PAGES: u64 = 4096;

#[derive(Debug)]
pub struct Idle {
    since: Instant,
    added: u64,
    fills: u64,
    worth: usize,
    has_rested: bool,
    has_slept: bool,
    slept: Option<Instant>,
}

impl Idle {
    pub fn new() -> Idle {
        host::map::keep_heap_small();
        Idle {
            since: Instant::now(),
            added: 0,
            fills: 0,
            worth: WORTH,
            has_rested: false,
            has_slept: false,
            slept: None,
        }
    }
}

impl Translator {
    /// Called at every halt.
    pub(super) fn idle(&mut self, core: &mut Core<'_>) {
        let (used, added) = (self.cache.used(), self.cache.added());
        let fills = core.vcpu.tlb.fills;
        if added - self.idle.added > STIR || fills - self.idle.fills > STIRRED_PAGES {
            (self.idle.added, self.idle.fills) = (added, fills);
            self.idle.since = Instant::now();
            (self.idle.has_rested, self.idle.has_slept) = (false, false);
            return;
        }
        let quiet = self.idle.since.elapsed();
        let sleeps = !self.idle.has_slept
            && quiet >= LONG
            && used > LITTLE
            && self.idle.slept.is_none_or(|slept| slept.elapsed() >= SELDOM);
        if !sleeps && (self.idle.has_rested || quiet < QUIET) {
            return;
        }
        self.idle.has_rested = true;
        let drops = sleeps || used > self.idle.worth;
        if sleeps {
            (self.idle.has_slept, self.idle.slept) = (true, Some(Instant::now()));
        } else if drops {
            self.idle.worth = 2 * used;
        }
        if drops {
            self.clear(core);
            self.sites.shrink();
            self.blocks.shrink();
        }
        self.recall.rest();
        self.cache.rest();
        core.vcpu.tlb.shadow.rest();
        core.vcpu.jumps.rest();
        if let Some(direct) = &mut self.direct {
            direct.let_go();
        }
        host::map::trim_heap();
    }
}
