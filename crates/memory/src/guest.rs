//! One guest's physical memory: a pmap over a pool, read and written by guest physical address.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

use x86::{Gpa, Mpn, PAGE_SHIFT, PAGE_SIZE, Ppn};

use crate::Error;
use crate::bytes::PageRef;
use crate::pmap::Pmap;
use crate::pool::Pool;
use crate::trace::CodeTraces;
use crate::writers::{Processors, Seats};

#[derive(Debug)]
pub struct GuestMemory {
    pool: Pool,
    pmap: Pmap,
    /// Pages whose code somebody holds in another form.
    pub code: CodeTraces,
    /// Counts remappings: whoever keeps host addresses (a soft TLB) drops them when it changes.
    epoch: AtomicU64,
    /// Which processors are in guest code, and what they are asked to forget.
    pub seats: Seats,
    /// Held by a LOCKed instruction that no host instruction can do in one step.
    split: Mutex<()>,
}

/// The pool is a little larger than the guest, so that a page can be moved while both copies exist.
const SPARE_PAGES: u64 = 64;
const SMALLEST: u64 = 1 << 20;
const LARGEST: u64 = 512 << 30;

const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

impl GuestMemory {
    pub fn new(size: u64) -> Result<GuestMemory, Error> {
        if !size.is_multiple_of(PAGE_SIZE) || !(SMALLEST..=LARGEST).contains(&size) {
            return Err(Error::Size(size));
        }
        let pages = size >> PAGE_SHIFT;
        Ok(GuestMemory {
            pool: Pool::new(pages + SPARE_PAGES)?,
            pmap: Pmap::new(pages),
            code: CodeTraces::default(),
            epoch: AtomicU64::new(0),
            seats: Seats::default(),
            split: Mutex::default(),
        })
    }

    #[must_use]
    pub fn pmap(&self) -> &Pmap {
        &self.pmap
    }

    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    #[must_use]
    pub fn is_ram(&self, ppn: Ppn) -> bool {
        self.pmap.get(ppn).is_some()
    }

    /// The machine page behind a page of RAM, given on first touch. `None` when there is no RAM at `ppn`, or the pool is
    /// exhausted (which its size excludes).
    #[must_use]
    pub fn machine_page(&self, ppn: Ppn) -> Option<Mpn> {
        let entry = self.pmap.get(ppn)?;
        if let Some(mpn) = entry.mpn() {
            return Some(mpn);
        }
        let fresh = self.pool.allocate(self.pmap.home(ppn)?).ok()?;
        let winner = self.pmap.set_if_unbacked(ppn, fresh)?;
        if winner != fresh {
            // Another processor touched the page first. A failed release only loses one spare page.
            let _ = self.pool.release(fresh);
        }
        Some(winner)
    }

    #[must_use]
    pub fn page(&self, ppn: Ppn) -> Option<PageRef<'_>> {
        self.machine_page(ppn).map(|mpn| self.pool.page(mpn))
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
            self.page(ppn).ok_or(Error::PoolEmpty)?.read(offset, &mut buffer[range]);
            Ok(())
        })
    }

    /// Writes as a device or a loader does; code made of the written bytes is reported as stale. A page that nobody touched
    /// is zero: zeroes for all of it cost nothing.
    pub fn write(&self, address: Gpa, data: &[u8]) -> Result<(), Error> {
        self.pieces(address, data.len(), |ppn, offset, range| {
            let data = &data[range];
            if data == ZEROES && self.pmap.get(ppn).is_some_and(|entry| entry.mpn().is_none()) {
                return Ok(());
            }
            self.page(ppn).ok_or(Error::PoolEmpty)?.write(offset, data);
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

    /// Moves a page to another machine page. The caller has stopped every processor of the VM between two instructions;
    /// their TLBs must be emptied before they go on, as [`GuestMemory::epoch`] tells them.
    pub fn remap(&self, ppn: Ppn) -> Result<(), Error> {
        let old = self.machine_page(ppn).ok_or(Error::NotRam { address: ppn.gpa(), size: PAGE_SIZE })?;
        // Not one that is another page's own.
        let new = self.pool.allocate(Mpn(self.pmap.pages()))?;
        let mut content = [0; PAGE_SIZE as usize];
        self.pool.page(old).read(0, &mut content);
        self.pool.page(new).write(0, &content);
        self.pmap.replace(ppn, new);
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.pool.release(old)
    }

    #[inline]
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
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
        memory.remap(Ppn(3)).unwrap();
        assert_ne!(memory.machine_page(Ppn(3)).unwrap(), before);
        let mut bytes = [0; 4];
        memory.read(Gpa(0x3008), &mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
        assert_eq!(memory.epoch(), 1);
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
