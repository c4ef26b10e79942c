//! A store to a page that others have, too: the VM gets a copy of its own first, and every processor forgets the common one
//! before the store is done.

use x86::{Mpn, Ppn};

use crate::guest::GuestMemory;
use crate::pmap::{Entry, State};

/// How often who finds a page being broken looks before it lets others run.
const LOOKS: u32 = 100;

impl GuestMemory {
    /// Gives a read-only page a machine page of its own, with the same content. Its translations are gone when this returns, but
    /// for those of `by`, who has been asked to forget them. False when the pool is exhausted, which its size excludes.
    pub(crate) fn break_page(&self, by: Option<usize>, ppn: Ppn, known: Entry) -> bool {
        let Some(common) = known.mpn().filter(|_| !known.is_breaking()) else {
            self.wait_for_break(by, ppn);
            return true;
        };
        if !self.pmap().change(ppn, known, known.breaking()) {
            // Somebody else has changed it: the caller looks again.
            return true;
        }
        let Some(own) = self.copy_of(ppn, common) else {
            self.pmap().update(ppn, Entry::not_breaking);
            return false;
        };
        // From here on nobody gets a translation of the common page; those who have one lose it before anybody can store.
        self.seats.forget_translations(by, known.holders(), ppn, common);
        self.give_back_by(common, || {
            self.pmap().update(ppn, |entry| entry.moved(State::Private, own.0));
        });
        self.counts.broken();
        true
    }

    fn copy_of(&self, ppn: Ppn, common: Mpn) -> Option<Mpn> {
        let pool = &self.machine().pool;
        let own = pool.allocate(self.pmap().home(ppn)?).ok()?;
        pool.page(own).write(0, &self.machine().page(common).copy());
        Some(own)
    }

    /// Returns when a page is not being broken any more.
    pub(crate) fn wait_for_break(&self, by: Option<usize>, ppn: Ppn) {
        let wait = || {
            let mut looks = 0;
            while self.pmap().get(ppn).is_some_and(Entry::is_breaking) {
                looks += 1;
                if looks < LOOKS { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        };
        match by {
            Some(number) => self.seats.aside(number, wait),
            None => wait(),
        }
    }
}
