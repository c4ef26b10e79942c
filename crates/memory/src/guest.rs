//! One guest's physical memory: a pmap over machine pages, read and written by guest physical address.
//!
//! Contract: a processor's thread may ask for pages and use what it gets until its instruction ends, and hold translations
//! that it asked for with [`GuestMemory::hold`] until it is asked to forget them ([`Seats`]). All others pin a page first
//! ([`GuestMemory::pin`]); [`GuestMemory::read`] and [`GuestMemory::write`] do so themselves. So whoever takes a page's content
//! elsewhere ([`crate::reclaim`]) knows when nobody uses the old place any more.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use x86::{Gpa, Mpn, PAGE_SHIFT, PAGE_SIZE, Ppn};

use crate::Error;
use crate::bytes::{PageMut, PageRef};
use crate::machine::{Machine, source_of};
use crate::pins::{Pin, Pins};
use crate::pmap::{Entry, Pmap, State};
use crate::pool::Pool;
use crate::swap::Store;
use crate::trace::CodeTraces;
use crate::writers::{Processors, Seats};

/// Called with a sentence when the guest's memory is lost.
pub type OnLoss = Box<dyn Fn(String) + Send + Sync>;

pub struct GuestMemory {
    machine: Machine,
    pmap: Pmap,
    pub(crate) pins: Pins,
    /// Pages whose code somebody holds in another form.
    pub code: CodeTraces,
    /// Which processors are in guest code, and what they are asked to forget.
    pub seats: Seats,
    pub counts: Counts,
    /// One at a time takes pages elsewhere.
    pub(crate) taking: Mutex<()>,
    /// Pages of the shared pool that are not used any more, for whoever counts them.
    pub(crate) given_back: Mutex<Vec<Mpn>>,
    /// Pages that have no machine page.
    pub(crate) swap: OnceLock<Store>,
    /// Held by a LOCKed instruction that no host instruction can do in one step.
    split: Mutex<()>,
    is_lost: AtomicBool,
    on_loss: OnceLock<OnLoss>,
}

/// What has become of pages, counted.
#[derive(Debug, Default)]
pub struct Counts {
    broken: AtomicU64,
    pub(crate) moved: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) brought_back: AtomicU64,
    pub(crate) used_while_ballooned: AtomicU64,
}

impl Counts {
    pub(crate) fn broken(&self) {
        self.broken.fetch_add(1, Ordering::Relaxed);
    }

    /// By name: pages that a store has broken, that were moved, that were in use when they were to be moved, that came back from
    /// the swap store, and that the guest used though its balloon had them.
    #[must_use]
    pub fn list(&self) -> [(&'static str, u64); 5] {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [
            ("memory.broken", load(&self.broken)),
            ("memory.moved", load(&self.moved)),
            ("memory.in_use", load(&self.refused)),
            ("memory.brought_back", load(&self.brought_back)),
            ("memory.used_while_ballooned", load(&self.used_while_ballooned)),
        ]
    }
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("GuestMemory").field("counts", &self.counts).finish_non_exhaustive()
    }
}

/// What a processor may hold of a page.
#[derive(Clone, Copy, Debug)]
pub struct Held<'a> {
    pub page: PageRef<'a>,
    pub mpn: Mpn,
    /// It may store there without a trap.
    pub may_store: bool,
}

impl Held<'_> {
    /// Whether the next store to the page, by whomever, makes the translation wrong.
    #[must_use]
    pub fn is_common(&self) -> bool {
        source_of(self.mpn) != 0
    }
}

/// A page that stays where it is, until this is dropped.
#[derive(Debug)]
pub struct Pinned<'a, Page> {
    page: Page,
    _pin: Pin<'a>,
}

impl<Page: Copy> Pinned<'_, Page> {
    #[must_use]
    pub fn page(&self) -> Page {
        self.page
    }
}

/// The pool is a little larger than the guest, so that a page can be moved while both copies exist.
const SPARE_PAGES: u64 = 64;
/// How often a page is looked for in the swap store.
const MOST_FAILURES: u32 = 3;
const SMALLEST: u64 = 1 << 20;
const LARGEST: u64 = 512 << 30;

pub(crate) const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

impl GuestMemory {
    pub fn new(size: u64) -> Result<GuestMemory, Error> {
        if !size.is_multiple_of(PAGE_SIZE) || !(SMALLEST..=LARGEST).contains(&size) {
            return Err(Error::Size(size));
        }
        let pages = size >> PAGE_SHIFT;
        Ok(GuestMemory {
            machine: Machine::new(Pool::new(pages + SPARE_PAGES)?),
            pmap: Pmap::new(pages),
            pins: Pins::new(pages),
            code: CodeTraces::default(),
            seats: Seats::default(),
            counts: Counts::default(),
            taking: Mutex::default(),
            given_back: Mutex::default(),
            swap: OnceLock::new(),
            split: Mutex::default(),
            is_lost: AtomicBool::new(false),
            on_loss: OnceLock::new(),
        })
    }

    #[must_use]
    pub fn pmap(&self) -> &Pmap {
        &self.pmap
    }

    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Has `count` pages of RAM that nobody has touched begin as pages of a source.
    ///
    /// # Errors
    /// [`Error::NotRam`]; [`Error::Touched`]; [`Error::Source`] where the source has no such pages.
    pub fn map_image(&self, source: usize, first: Ppn, page: u64, count: u64) -> Result<(), Error> {
        for number in 0..count {
            let (ppn, mpn) = (Ppn(first.0.wrapping_add(number)), Machine::mpn(source, page + number));
            let entry = self.pmap.get(ppn).ok_or(Error::NotRam { address: ppn.gpa(), size: PAGE_SIZE })?;
            if source_of(mpn) == 0 || !self.machine.has(mpn) {
                return Err(Error::Source(source));
            }
            if entry.state() != State::Zero || !self.pmap.change(ppn, entry, entry.moved(State::Image, mpn.0)) {
                return Err(Error::Touched(ppn.gpa()));
            }
        }
        Ok(())
    }

    /// Gives the guest's pages a place to go when memory is short; false when there was one before.
    pub fn set_swap(&self, store: Store) -> bool {
        self.swap.set(store).is_ok()
    }

    #[must_use]
    pub fn swap(&self) -> Option<&Store> {
        self.swap.get()
    }

    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.machine.pool
    }

    #[must_use]
    pub fn is_ram(&self, ppn: Ppn) -> bool {
        self.pmap.get(ppn).is_some()
    }

    /// Says what is done when content is lost. The first call counts.
    pub fn set_on_loss(&self, action: OnLoss) {
        let _ = self.on_loss.set(action);
    }

    /// Content of the guest's cannot be had any more: it must not run on, nor anything that it orders be done.
    pub(crate) fn lose(&self, sentence: String) {
        if !self.is_lost.swap(true, Ordering::SeqCst)
            && let Some(action) = self.on_loss.get()
        {
            action(sentence);
        }
    }

    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::SeqCst)
    }

    /// The entry of a page that has a machine page: it gets one if it had none. Whoever wanted to take it lets it go. `None`
    /// when there is no RAM at `ppn`, or the pool is exhausted (which its size excludes).
    fn touch(&self, ppn: Ppn) -> Option<Entry> {
        let mut failures = 0;
        loop {
            let entry = self.pmap.get(ppn)?;
            if entry.mpn().is_some() {
                let touched = entry.touched();
                if touched == entry {
                    return Some(entry);
                }
                if self.pmap.change(ppn, entry, touched) {
                    return Some(touched);
                }
                continue;
            }
            let fresh = self.machine.pool.allocate(self.pmap.home(ppn)?).ok()?;
            let is_filled = match entry.slot() {
                Some(slot) => self.bring_back(slot, self.machine.pool.page(fresh)),
                None => true,
            };
            let backed = entry.moved(State::Private, fresh.0);
            if is_filled && self.pmap.change(ppn, entry, backed) {
                self.note_backed(entry);
                return Some(backed);
            }
            // Another processor touched the page first. A failed release only loses a spare page.
            let _ = self.machine.pool.release(vec![fresh]);
            // A slot that cannot be read may have been freed meanwhile, by whoever brought the page back.
            failures += u32::from(!is_filled);
            if failures > MOST_FAILURES {
                self.lose(format!("the guest's page at {} cannot be brought back from the swap store", ppn.gpa()));
                return None;
            }
        }
    }

    /// A page without a machine page has got one.
    fn note_backed(&self, before: Entry) {
        match before.state() {
            State::Ballooned => self.counts.used_while_ballooned.fetch_add(1, Ordering::Relaxed),
            State::Swapped => self.counts.brought_back.fetch_add(1, Ordering::Relaxed),
            _ => return,
        };
        if let Some(slot) = before.slot() {
            self.free_slot(slot);
        }
    }

    /// The machine page behind a page of RAM, given on first touch.
    #[must_use]
    pub fn machine_page(&self, ppn: Ppn) -> Option<Mpn> {
        self.touch(ppn)?.mpn()
    }

    /// A page, to read.
    #[must_use]
    pub fn page(&self, ppn: Ppn) -> Option<PageRef<'_>> {
        self.machine_page(ppn).map(|mpn| self.machine.page(mpn))
    }

    /// A page as far as it is in memory; looking at it counts as no touch.
    #[must_use]
    pub fn resident(&self, ppn: Ppn) -> Option<PageRef<'_>> {
        self.pmap.get(ppn)?.mpn().map(|mpn| self.machine.page(mpn))
    }

    /// A page, to write, by a processor or somebody else. A processor looks at its requests afterwards ([`Seats::is_asked`]), before
    /// it uses its TLB.
    #[must_use]
    pub fn page_to_write(&self, ppn: Ppn, by: Option<usize>) -> Option<PageMut<'_>> {
        loop {
            let entry = self.touch(ppn)?;
            if entry.state() == State::Private {
                return entry.mpn().map(|mpn| self.machine.page_to_write(mpn));
            }
            if !self.break_page(by, ppn, entry) {
                return None;
            }
        }
    }

    /// A page of which a processor is about to hold a translation: to load, and to store if it may and `wants_store`; for a
    /// store that is to be done now (`is_store`) the page is made the VM's own. The processor looks at its requests afterwards.
    #[must_use]
    pub fn hold(&self, ppn: Ppn, processor: usize, wants_store: bool, is_store: bool) -> Option<Held<'_>> {
        loop {
            let entry = self.touch(ppn)?;
            let mpn = entry.mpn()?;
            if entry.state() == State::Private {
                let may_store = wants_store && self.pmap.grant_store(ppn, processor);
                return Some(Held { page: self.machine.page(mpn), mpn, may_store });
            } else if entry.is_breaking() || is_store {
                if !self.break_page(Some(processor), ppn, entry) {
                    return None;
                }
            } else if entry.holders().has(processor) || self.pmap.change(ppn, entry, entry.with_holder(processor)) {
                return Some(Held { page: self.machine.page(mpn), mpn, may_store: false });
            }
        }
    }

    /// Pins a page that somebody outside the processors is about to read.
    #[must_use]
    pub fn pin(&self, ppn: Ppn) -> Option<Pinned<'_, PageRef<'_>>> {
        let pin = self.pins.pin(self.pmap.index(ppn)?);
        Some(Pinned { page: self.page(ppn)?, _pin: pin })
    }

    /// Pins a page that somebody outside the processors is about to write.
    #[must_use]
    pub fn pin_to_write(&self, ppn: Ppn) -> Option<Pinned<'_, PageMut<'_>>> {
        let pin = self.pins.pin(self.pmap.index(ppn)?);
        Some(Pinned { page: self.page_to_write(ppn, None)?, _pin: pin })
    }

    /// Calls `each` with every page piece of a range: (page, offset in page, range within the buffer).
    fn pieces(
        &self,
        address: Gpa,
        size: usize,
        mut each: impl FnMut(Ppn, u64, std::ops::Range<usize>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let not_ram = || Error::NotRam { address, size: size as u64 };
        let end = address.0.checked_add(size as u64).ok_or_else(not_ram)?;
        let pages = Gpa(address.0).ppn().0..end.div_ceil(PAGE_SIZE);
        if !pages.clone().all(|page| self.is_ram(Ppn(page))) {
            return Err(not_ram());
        }
        let mut done = 0;
        while done < size {
            let at = address.add(done as u64);
            let count = (PAGE_SIZE - at.offset()).min((size - done) as u64) as usize;
            each(at.ppn(), at.offset(), done..done + count)?;
            done += count;
        }
        Ok(())
    }

    pub fn read(&self, address: Gpa, buffer: &mut [u8]) -> Result<(), Error> {
        self.pieces(address, buffer.len(), |ppn, offset, range| {
            self.pin(ppn).ok_or(Error::PoolEmpty)?.page().read(offset, &mut buffer[range]);
            Ok(())
        })
    }

    /// Writes as a device or a loader does; code made of the written bytes is reported as stale. A page that nobody touched
    /// is zero: zeroes for all of it cost nothing.
    pub fn write(&self, address: Gpa, data: &[u8]) -> Result<(), Error> {
        self.pieces(address, data.len(), |ppn, offset, range| {
            let data = &data[range];
            if data == ZEROES && self.pmap.get(ppn).is_some_and(|entry| entry.state() == State::Zero) {
                return Ok(());
            }
            self.pin_to_write(ppn).ok_or(Error::PoolEmpty)?.page().write(offset, data);
            self.note_store(ppn, offset, data.len() as u64, None);
            Ok(())
        })
    }

    /// Tells the code trace of a store that went past the TLB and was just done, by a processor (`by`) or a device.
    pub fn note_store(&self, ppn: Ppn, offset: u64, size: u64, by: Option<usize>) {
        // Whoever makes code of the page traces it, then reads it; we wrote it, and look at the trace now. Without the
        // fence each could miss the other.
        fence(Ordering::SeqCst);
        if !self.pmap.get(ppn).is_some_and(|entry| entry.is_traced()) {
            return;
        }
        let hit = self.code.written(&self.pmap, ppn, offset, size);
        self.seats.kick(by.map_or(hit, |number| hit.without(number)));
    }

    /// Traces stores to `size` bytes of code for a processor; gives the processors that may still store to the page
    /// without a trap. They must be asked to stop before the code is read for good; see [`Seats::ask`].
    pub fn trace_code(&self, processor: usize, ppn: Ppn, offset: u64, size: u64) -> Processors {
        self.code.add(&self.pmap, processor, ppn, offset, size)
    }

    /// Forgets all code traces of a processor.
    pub fn untrace_all(&self, processor: usize) {
        self.code.clear(&self.pmap, processor);
    }

    /// The lock of LOCKed instructions that no host instruction can do in one step.
    pub fn split_lock(&self) -> MutexGuard<'_, ()> {
        self.split.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_on_first_touch_and_reads_as_zero() {
        let memory = GuestMemory::new(16 << 20).unwrap();
        assert_eq!(memory.pool().in_use(), 0);
        let mut bytes = [0xff; 6];
        memory.read(Gpa(0x1ffd), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 6]);
        assert_eq!(memory.pool().in_use(), 2);
    }

    #[test]
    fn zeroes_cost_a_page_only_where_something_was() {
        let memory = GuestMemory::new(16 << 20).unwrap();
        memory.write(Gpa(0x1800), &[0; 3 * 4096]).unwrap();
        assert_eq!(memory.pool().in_use(), 2, "the two that are written in part");
        memory.write(Gpa(0x2000), &[7; 4096]).unwrap();
        memory.write(Gpa(0x2000), &[0; 4096]).unwrap();
        let mut bytes = [1; 4096];
        memory.read(Gpa(0x2000), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4096]);
    }

    #[test]
    fn a_range_is_written_whole_or_not_at_all() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let end = Gpa((1 << 20) - 2);
        assert!(matches!(memory.write(end, &[1, 2, 3]), Err(Error::NotRam { .. })));
        let mut bytes = [9; 2];
        memory.read(end, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0]);
        assert!(memory.write(Gpa(u64::MAX), &[1, 2]).is_err());
    }

    #[test]
    fn a_moved_page_keeps_its_content_and_changes_its_machine_page() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(Gpa(0x3008), b"here").unwrap();
        let before = memory.machine_page(Ppn(3)).unwrap();
        assert!(memory.remap(Ppn(3)).unwrap());
        assert_ne!(memory.machine_page(Ppn(3)).unwrap(), before);
        let mut bytes = [0; 4];
        memory.read(Gpa(0x3008), &mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
    }

    #[test]
    fn ram_above_the_hole_starts_at_4_gib() {
        let memory = GuestMemory::new(4 << 30).unwrap();
        assert!(memory.is_ram(Gpa(0xbfff_f000).ppn()));
        assert!(!memory.is_ram(Gpa(0xc000_0000).ppn()));
        assert!(memory.is_ram(Gpa(1 << 32).ppn()));
        assert!(!memory.is_ram(Gpa((1 << 32) + (1 << 30)).ppn()));
    }
}
