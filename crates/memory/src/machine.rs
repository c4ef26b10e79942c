//! Machine pages: the VM's own pool, and the files that it shares with others and can only read.
//!
//! An [`Mpn`] has a source in bits 39 to 32, and the page within it in the bits below. Source 0 is the pool of the VM. The
//! others are there before the guest starts: the pool of its sharing group, and images.

use std::fs::File;
use std::sync::OnceLock;

use host::map::{Map, Protection};
use x86::{Mpn, PAGE_SHIFT};

use crate::Error;
use crate::bytes::{PageMut, PageRef};
use crate::pool::Pool;

const SOURCE_SHIFT: u32 = 32;
const PAGE: u64 = (1 << SOURCE_SHIFT) - 1;

/// Sources besides the pool, at most.
pub const MOST_SOURCES: usize = 7;
/// The source that is the pool of the sharing group.
pub const SHARED: usize = 1;
/// The first source that is an image.
pub const FIRST_IMAGE: usize = 2;

/// A file of machine pages that others have, too.
#[derive(Debug)]
struct Source {
    file: File,
    map: Map,
}

#[derive(Debug)]
pub struct Machine {
    pub pool: Pool,
    sources: [OnceLock<Source>; MOST_SOURCES],
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
        Machine { pool, sources: Default::default() }
    }

    /// Adds a file of up to `pages` pages, which may grow to that, as a source that is none yet. The file must not shrink while
    /// the VM is there: it is one in memory, sealed or written by a process of ours.
    ///
    /// # Errors
    /// When the host does not map it, or there is such a source already.
    pub fn add_source(&self, source: usize, file: File, pages: u64) -> Result<(), Error> {
        let place = source.checked_sub(1).and_then(|place| self.sources.get(place));
        let place = place.filter(|place| pages <= PAGE && place.get().is_none()).ok_or(Error::Source(source))?;
        let map = Map::shared(&file, (pages << PAGE_SHIFT) as usize, Protection::Read)?;
        place.set(Source { file, map }).map_err(|_| Error::Source(source))
    }

    /// Whether a source is there.
    #[must_use]
    pub fn has_source(&self, source: usize) -> bool {
        self.source(source).is_some()
    }

    /// A source for another image; `None` when all are taken.
    #[must_use]
    pub fn free_source(&self) -> Option<usize> {
        (FIRST_IMAGE..=MOST_SOURCES).find(|source| !self.has_source(*source))
    }

    /// The file of a source.
    #[must_use]
    pub fn source_file(&self, source: usize) -> Option<&File> {
        self.source(source).map(|source| &source.file)
    }

    fn source(&self, source: usize) -> Option<&Source> {
        self.sources.get(source.checked_sub(1)?)?.get()
    }

    /// The machine page of a source.
    #[must_use]
    pub fn mpn(source: usize, page: u64) -> Mpn {
        Mpn((source as u64) << SOURCE_SHIFT | page & PAGE)
    }

    /// Whether there is such a machine page.
    #[must_use]
    pub fn has(&self, mpn: Mpn) -> bool {
        match source_of(mpn) {
            0 => self.pool.has(mpn),
            source => self.source(source).is_some_and(|source| page_of(mpn) < (source.map.size() >> PAGE_SHIFT) as u64),
        }
    }

    /// The files of all sources, in their order; the pool's stands for those that are not there, of which there are no pages.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        let last = (1..=MOST_SOURCES).rev().find(|source| self.has_source(*source)).unwrap_or(0);
        (0..=last).map(|source| self.source(source).map_or(self.pool.file(), |source| &source.file))
    }

    /// A machine page, to read.
    #[must_use]
    pub fn page(&self, mpn: Mpn) -> PageRef<'_> {
        match source_of(mpn) {
            0 => self.pool.page(mpn).to_read(),
            source => match self.source(source) {
                Some(source) => PageRef::in_map(&source.map, page_of(mpn)),
                None => panic!("a machine page of a source that is not there: {mpn}"),
            },
        }
    }

    /// A machine page of the VM's own.
    #[must_use]
    pub fn page_to_write(&self, mpn: Mpn) -> PageMut<'_> {
        assert_eq!(source_of(mpn), 0, "a store to a page of others");
        self.pool.page(mpn)
    }
}
