//! What the translator does for the host when the guest has nothing to do: it gives memory back.
//!
//! Most of what a boot translates never runs again. When a guest has been quiet for a while, its translations are dropped
//! once; those that it needs come back within milliseconds. A guest that needs them all is left alone, because the
//! amount that makes dropping worth while doubles each time. One that stays quiet for long, as a host with a hundred guests
//! has them, drops nearly everything, but not often.

use std::time::{Duration, Instant};

use super::Translator;
use crate::core::Core;
use crate::simd;

/// Code that was written since the last look does not count as quiet when it is more than this.
const STIR: u64 = 64 << 10;
/// The same for one that had next to nothing left, in a second: what it translates to keep its clock is no work.
const WAKES: u64 = 512 << 10;
const SECOND: Duration = Duration::from_secs(1);
/// How long a guest must have been quiet.
const QUIET: Duration = Duration::from_millis(1500);
/// How long it must have been quiet to drop nearly everything, how much code it may have then, and how soon it does so
/// again: what it needs now and then comes back, and takes twice as long to be dropped each time.
const LONG: Duration = Duration::from_secs(10);
const LITTLE: usize = 384 << 10;
const AGAIN: Duration = Duration::from_secs(30);
/// How much code makes the first drop worth while.
const WORTH: usize = 1 << 20;
/// Pages that were looked for in the guest's tables since the last look: a guest that is busy with code it had before.
const STIRRED_PAGES: u64 = 4096;

#[derive(Debug)]
pub struct Idle {
    since: Instant,
    looked: Instant,
    added: u64,
    fills: u64,
    worth: usize,
    has_rested: bool,
    slept: Instant,
    again: Duration,
}

impl Idle {
    pub fn new() -> Idle {
        host::map::keep_heap_small();
        Idle {
            since: Instant::now(),
            looked: Instant::now(),
            added: 0,
            fills: 0,
            worth: WORTH,
            has_rested: false,
            slept: Instant::now(),
            again: Duration::ZERO,
        }
    }
}

impl Translator {
    /// Called at every halt.
    pub(super) fn idle(&mut self, core: &mut Core<'_>) {
        let (used, added) = (self.cache.used(), self.cache.added());
        let fills = core.vcpu.tlb.fills;
        let stir = if self.recall.is_asleep { WAKES } else { STIR };
        if added - self.idle.added > stir || fills - self.idle.fills > STIRRED_PAGES {
            (self.idle.added, self.idle.fills) = (added, fills);
            self.idle.since = Instant::now();
            self.idle.has_rested = false;
            if std::mem::take(&mut self.recall.is_asleep) {
                self.idle.again = AGAIN;
            }
            return;
        }
        if self.recall.is_asleep && self.idle.looked.elapsed() >= SECOND {
            (self.idle.added, self.idle.fills, self.idle.looked) = (added, fills, Instant::now());
            // What was interpreted has become warm by now, or will not come again soon.
            self.decoder.clear();
        }
        let quiet = self.idle.since.elapsed();
        let sleeps = quiet >= LONG && used > LITTLE && self.idle.slept.elapsed() >= self.idle.again;
        if !sleeps && (self.idle.has_rested || quiet < QUIET) {
            return;
        }
        self.idle.has_rested = true;
        let drops = sleeps || used > self.idle.worth;
        if sleeps {
            self.idle.slept = Instant::now();
            self.idle.again = (2 * self.idle.again).max(AGAIN);
            self.recall.is_asleep = true;
            self.cold.forget();
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
        simd::plan::rest();
        host::map::trim_heap();
    }
}
