//! The machine-page pool: 4 KiB pages of one memfd, given out on demand. A page costs the host nothing until it is about to
//! be given out, and nothing again after it is released.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use host::map::{Map, Protection, memfd, punch_hole};
use x86::{Mpn, PAGE_SHIFT};

use crate::Error;
use crate::bytes::PageMut;

/// Pages that get their memory together, as a power of two: a page is given out because it is about to be used, most often
/// with its neighbours, and one system call for many costs a third of their faults.
const BLOCK: u64 = 16;
/// Blocks that get it at once where the block before them has it: somebody is going through memory from end to end.
const IN_A_ROW: u64 = 4;

/// A bit for each of many things, set and cleared by any thread.
#[derive(Debug)]
struct Bits(Box<[AtomicU64]>);

impl Bits {
    fn new(count: u64) -> Bits {
        Bits((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn place(&self, number: u64) -> (&AtomicU64, u64) {
        (&self.0[(number / 64) as usize], 1 << (number % 64))
    }

    fn has(&self, number: u64) -> bool {
        let (word, bit) = self.place(number);
        word.load(Ordering::Relaxed) & bit != 0
    }

    /// Says whether the bit was clear.
    fn set(&self, number: u64) -> bool {
        let (word, bit) = self.place(number);
        word.fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    fn clear(&self, number: u64) {
        let (word, bit) = self.place(number);
        word.fetch_and(!bit, Ordering::AcqRel);
    }
}

#[derive(Debug)]
pub struct Pool {
    file: File,
    map: Map,
    capacity: u64,
    /// Pages that are given out.
    given: Bits,
    /// Blocks that have memory behind them, or are about to.
    ready: Bits,
    in_use: AtomicU64,
}

impl Pool {
    pub fn new(capacity: u64) -> Result<Pool, Error> {
        let size = capacity << PAGE_SHIFT;
        let file = memfd(c"ringzero-pool", size)?;
        let map = Map::shared(&file, size as usize, Protection::ReadWrite)?;
        let (given, ready) = (Bits::new(capacity), Bits::new(capacity.div_ceil(BLOCK)));
        Ok(Pool { file, map, capacity, given, ready, in_use: AtomicU64::new(0) })
    }

    /// Gives out a page of zeroes: this one if it is free, else the next that is. Pages that are neighbours for the guest are
    /// best neighbours here, too: then one mapping of the host covers many of them.
    pub fn allocate(&self, near: Mpn) -> Result<Mpn, Error> {
        let mut after = (near.0..self.capacity).chain(0..near.0.min(self.capacity));
        let page = after.find(|page| !self.given.has(*page) && self.given.set(*page));
        let page = page.ok_or(Error::PoolEmpty)?;
        self.prepare(page);
        self.in_use.fetch_add(1, Ordering::Relaxed);
        Ok(Mpn(page))
    }

    /// Gets memory for a page that is given out, and for those around it. Who overtakes this finds pages that fault.
    fn prepare(&self, page: u64) {
        let block = page / BLOCK;
        if self.ready.has(block) {
            return;
        }
        let count = if block > 0 && self.ready.has(block - 1) { IN_A_ROW } else { 1 };
        let end = (block + count).min(self.capacity.div_ceil(BLOCK));
        for block in block..end {
            self.ready.set(block);
        }
        let (start, end) = (block * BLOCK, (end * BLOCK).min(self.capacity));
        self.map.populate((start << PAGE_SHIFT) as usize, ((end - start) << PAGE_SHIFT) as usize, true);
    }

    /// Takes pages back and returns their memory to the system. Nothing may refer to them any more.
    pub fn release(&self, mut pages: Vec<Mpn>) -> Result<(), Error> {
        pages.sort_unstable();
        for run in pages.chunk_by(|one, next| one.0 + 1 == next.0) {
            punch_hole(&self.file, run[0].0 << PAGE_SHIFT, (run.len() as u64) << PAGE_SHIFT)?;
            for page in run {
                self.given.clear(page.0);
            }
            self.in_use.fetch_sub(run.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Returns memory to the system that was got for pages nobody asked for since; gives how many pages that was.
    pub fn trim(&self) -> Result<u64, Error> {
        let mut trimmed = 0;
        for block in 0..self.capacity.div_ceil(BLOCK) {
            if !self.ready.has(block) {
                continue;
            }
            let pages = block * BLOCK..((block + 1) * BLOCK).min(self.capacity);
            // Nobody is given a page meanwhile that is about to lose its memory, and its content with it.
            let free: Vec<u64> = pages.filter(|page| self.given.set(*page)).collect();
            if free.is_empty() {
                continue;
            }
            self.ready.clear(block);
            let result: Result<(), Error> = free.chunk_by(|one, next| one + 1 == *next).try_for_each(|run| {
                Ok(punch_hole(&self.file, run[0] << PAGE_SHIFT, (run.len() as u64) << PAGE_SHIFT)?)
            });
            free.iter().for_each(|page| self.given.clear(*page));
            result?;
            trimmed += free.len() as u64;
        }
        Ok(trimmed)
    }

    /// The file whose pages these are: machine page n is at n times 4096.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    #[must_use]
    pub fn page(&self, mpn: Mpn) -> PageMut<'_> {
        PageMut::in_map(&self.map, mpn.0)
    }

    #[must_use]
    pub fn has(&self, mpn: Mpn) -> bool {
        mpn.0 < self.capacity
    }

    /// Whether a page is given out.
    #[must_use]
    pub fn is_given(&self, mpn: Mpn) -> bool {
        self.has(mpn) && self.given.has(mpn.0)
    }

    /// How many pages are given out.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        self.in_use.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_stay_neighbours_and_every_page_is_given_once() {
        let pool = Pool::new(100).unwrap();
        assert_eq!(pool.allocate(Mpn(40)).unwrap(), Mpn(40));
        assert_eq!(pool.allocate(Mpn(39)).unwrap(), Mpn(39));
        assert_eq!(pool.allocate(Mpn(39)).unwrap(), Mpn(41), "the next that is free");
        let mut given: Vec<u64> = (0..97).map(|_| pool.allocate(Mpn(99)).unwrap().0).collect();
        assert!(pool.allocate(Mpn(0)).is_err() && pool.in_use() == 100);
        given.sort_unstable();
        given.dedup();
        assert_eq!(given.len(), 97);
        pool.page(Mpn(7)).write(0, b"old");
        pool.release(vec![Mpn(7)]).unwrap();
        assert_eq!(pool.allocate(Mpn(50)).unwrap(), Mpn(7));
        let mut bytes = [1; 3];
        pool.page(Mpn(7)).read(0, &mut bytes);
        assert_eq!(bytes, [0; 3], "a page that came back reads as zeroes");
    }
}
