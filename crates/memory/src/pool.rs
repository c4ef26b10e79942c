//! The machine-page pool: 4 KiB pages of one memfd, given out on demand. A page costs the host nothing until it is about to
//! be given out, and nothing again after it is released.

use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use host::map::{Map, Protection, memfd, punch_hole};
use x86::{Mpn, PAGE_SHIFT, PAGE_SIZE};

use crate::Error;
use crate::bytes::PageRef;

/// Pages that get their memory at once: pages are given out because they are about to be used, and one system call for many
/// costs a third of their faults. More would only be memory that a small guest never uses.
const AT_ONCE: u64 = 64;

#[derive(Debug)]
pub struct Pool {
    file: File,
    map: Map,
    capacity: u64,
    /// Pages below this were given out at least once.
    next: AtomicU64,
    /// Pages below this have memory behind them, or are about to.
    ready: AtomicU64,
    /// Pages that came back; they read as zeroes.
    free: Mutex<Vec<Mpn>>,
    in_use: AtomicU64,
}

impl Pool {
    pub fn new(capacity: u64) -> Result<Pool, Error> {
        let size = capacity << PAGE_SHIFT;
        let file = memfd(c"ringzero-pool", size)?;
        let map = Map::shared(&file, size as usize, Protection::ReadWrite)?;
        Ok(Pool {
            file,
            map,
            capacity,
            next: AtomicU64::new(0),
            ready: AtomicU64::new(0),
            free: Mutex::default(),
            in_use: AtomicU64::new(0),
        })
    }

    /// Gives out a page of zeroes.
    pub fn allocate(&self) -> Result<Mpn, Error> {
        let recycled = self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        let mpn = match recycled {
            Some(mpn) => mpn,
            None => {
                let next = self.next.fetch_add(1, Ordering::Relaxed);
                if next >= self.capacity {
                    self.next.fetch_sub(1, Ordering::Relaxed);
                    return Err(Error::PoolEmpty);
                }
                self.prepare(next);
                Mpn(next)
            }
        };
        self.in_use.fetch_add(1, Ordering::Relaxed);
        Ok(mpn)
    }

    /// Gets memory for a page that is given out for the first time and those that come next. Who overtakes this finds pages
    /// that fault.
    fn prepare(&self, page: u64) {
        let ready = self.ready.load(Ordering::Relaxed);
        let end = (page + AT_ONCE).min(self.capacity);
        if page >= ready && self.ready.compare_exchange(ready, end, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.map.populate((page << PAGE_SHIFT) as usize, ((end - page) << PAGE_SHIFT) as usize, true);
        }
    }

    /// Takes a page back and returns its memory to the system. Nothing may refer to it any more.
    pub fn release(&self, mpn: Mpn) -> Result<(), Error> {
        punch_hole(&self.file, mpn.0 << PAGE_SHIFT, PAGE_SIZE)?;
        self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(mpn);
        self.in_use.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }

    /// The file whose pages these are: machine page n is at n times 4096.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    #[must_use]
    pub fn page(&self, mpn: Mpn) -> PageRef<'_> {
        PageRef::in_map(&self.map, mpn)
    }

    /// How many pages are given out.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        self.in_use.load(Ordering::Relaxed)
    }
}
