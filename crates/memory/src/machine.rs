//! Machine pages: the VM's own pool, and the files that it shares with others and can only read.
//!
//! An [`Mpn`] has a source in bits 39 to 32, and the page within it in the bits below. Source 0 is the pool of the VM. The
//! others are fixed when the machine is put together: the pool of its sharing group, and images.

use std::fs::File;

use host::map::{Map, Protection};
use x86::{Mpn, PAGE_SHIFT};

use crate::Error;
use crate::bytes::{PageMut, PageRef};
use crate::pool::Pool;

const SOURCE_SHIFT: u32 = 32;
const PAGE: u64 = (1 << SOURCE_SHIFT) - 1;

/// Sources besides the pool, at most.
pub const MOST_SOURCES: usize = 7;

/// A file of machine pages that others have, too.
#[derive(Debug)]
struct Source {
    file: File,
    map: Map,
}

#[derive(Debug)]
pub struct Machine {
    pub pool: Pool,
    sources: Vec<Source>,
}

/// Which source a machine page is of: 0 for the VM's own pool.
#[must_use]
pub fn source_of(mpn: Mpn) -> usize {
    (mpn.0 >> SOURCE_SHIFT) as usize
}

/// Which page of its source a machine page is.
#[must_use]
pub fn page_of(mpn: Mpn) -> u64 {
    mpn.0 & PAGE
}

impl Machine {
    #[must_use]
    pub fn new(pool: Pool) -> Machine {
        Machine { pool, sources: Vec::new() }
    }

    /// Adds a file of up to `pages` pages, which may grow to that; gives its source. The file must not shrink while the VM is
    /// there: it is one in memory, sealed or written by a process of ours.
    ///
    /// # Errors
    /// When the host does not map it, or there are too many.
    pub fn add_source(&mut self, file: File, pages: u64) -> Result<usize, Error> {
        if self.sources.len() == MOST_SOURCES || pages > PAGE {
            return Err(Error::Sources);
        }
        let map = Map::shared(&file, (pages << PAGE_SHIFT) as usize, Protection::Read)?;
        self.sources.push(Source { file, map });
        Ok(self.sources.len())
    }

    /// The machine page of a source.
    #[must_use]
    pub fn mpn(source: usize, page: u64) -> Mpn {
        Mpn((source as u64) << SOURCE_SHIFT | page & PAGE)
    }

    /// The files of all sources, in their order.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        std::iter::once(self.pool.file()).chain(self.sources.iter().map(|source| &source.file))
    }

    /// A machine page, to read.
    #[must_use]
    pub fn page(&self, mpn: Mpn) -> PageRef<'_> {
        match source_of(mpn) {
            0 => self.pool.page(mpn).to_read(),
            source => PageRef::in_map(&self.sources[source - 1].map, page_of(mpn)),
        }
    }

    /// A machine page of the VM's own.
    #[must_use]
    pub fn page_to_write(&self, mpn: Mpn) -> PageMut<'_> {
        assert_eq!(source_of(mpn), 0, "a store to a page of others");
        self.pool.page(mpn)
    }
}
