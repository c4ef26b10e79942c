//! The store: how pages come in, move from memory to the file, and come back.
//!
//! One lock guards what is where, and is not held while the file is read or written. A page that is on its way to the file
//! stays readable in memory until it has arrived.

use std::fs::File;
use std::io;
use std::path::Path;

use host::lock::{Rank, RankedGuard, RankedMutex};
use host::nameless::nameless_file;

use super::table::{Leaving, Table, Where};
use super::vault::Vault;
use super::{Full, Lost, Page, Slot};

/// Pages that go to the file at once when memory is full.
const BATCH: u64 = 16;

/// What the store holds and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Pages compressed in memory.
    pub compressed: u64,
    /// Bytes of memory that these take.
    pub compressed_bytes: u64,
    /// Pages in the file.
    pub in_file: u64,
    /// Pages that went from memory to the file.
    pub spills: u64,
    /// Pages that did not compress, and went to the file at once.
    pub incompressible: u64,
    /// Pages that were read from memory.
    pub memory_loads: u64,
    /// Pages that were read from the file.
    pub file_loads: u64,
    /// Pages that were refused: nothing was left to put them into.
    pub refused: u64,
    /// Pages that did not come back whole.
    pub lost: u64,
}

impl Statistics {
    /// All pages that are in the store.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.compressed + self.in_file
    }
}

/// Pages of one VM that have no machine page.
pub struct Store {
    vault: Option<Vault>,
    table: RankedMutex<Table>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("vault", &self.vault).finish_non_exhaustive()
    }
}

impl Store {
    /// A store of at most `compressed_bytes` of memory, and `file_bytes` of a file that it makes in a folder.
    ///
    /// # Errors
    /// The system's: the file cannot be made, or there is no key for it.
    pub fn new(compressed_bytes: u64, file: Option<(&Path, u64)>) -> io::Result<Store> {
        let file = file.map(|(folder, bytes)| Ok::<_, io::Error>((nameless_file(folder)?, bytes))).transpose()?;
        Store::with_file(compressed_bytes, file)
    }

    /// The same with a file that is there: nobody else may read or write it.
    pub(super) fn with_file(compressed_bytes: u64, file: Option<(File, u64)>) -> io::Result<Store> {
        let table = Table::new(compressed_bytes, file.as_ref().map_or(0, |(_, bytes)| *bytes))?;
        let vault = file.map(|(file, _)| Vault::new(file)).transpose()?;
        Ok(Store { vault, table: RankedMutex::new(Rank::SwapStore, table) })
    }

    /// Takes a page in: compressed if it shrinks, else sealed in the file. When memory is full, the oldest pages make room.
    ///
    /// # Errors
    /// When there is no place for it, and none can be made.
    pub fn put(&self, page: &Page) -> Result<Slot, Full> {
        let result = self.take_in(page);
        if result.is_err() {
            self.table.lock().statistics.refused += 1;
        }
        result
    }

    fn take_in(&self, page: &Page) -> Result<Slot, Full> {
        loop {
            let mut table = self.table.lock();
            let Some(packed) = table.pack(page) else {
                let slot = self.put_into_file(table, page).map_err(|full| match full {
                    Full::NoFile => Full::Incompressible,
                    full => full,
                })?;
                self.table.lock().statistics.incompressible += 1;
                return Ok(slot);
            };
            if let Some(slot) = table.put_into_memory(packed.bytes()) {
                return Ok(slot);
            }
            drop(table);
            // Room that is made here may be another's before we are back; he put a page into it, so this ends.
            if self.spill(BATCH)? == 0 {
                return self.put_into_file(self.table.lock(), page);
            }
        }
    }

    fn put_into_file(&self, mut table: RankedGuard<'_, Table>, page: &Page) -> Result<Slot, Full> {
        let vault = self.vault.as_ref().ok_or(Full::NoFile)?;
        let (block, count) = table.take_block()?;
        drop(table);
        let mut sealed = *page;
        let written = vault.seal(&mut sealed, block, count).and_then(|seal| vault.write(block, &sealed).map(|()| seal));
        let mut table = self.table.lock();
        match written {
            Ok(seal) => Ok(table.occupy(Where::File(block, seal))),
            Err(error) => {
                table.give_back(vault, block);
                Err(Full::Host(error))
            }
        }
    }

    /// The page in a slot, which stays there until it is freed.
    ///
    /// # Errors
    /// When the slot holds none, or it is not what was put there.
    pub fn get(&self, slot: Slot) -> Result<Page, Lost> {
        let mut table = self.table.lock();
        let result = match table.place(slot).ok_or(Lost::Empty(slot))? {
            Where::Memory(place) => {
                table.statistics.memory_loads += 1;
                table.unpack(place).ok_or(Lost::Memory(slot))
            }
            Where::File(block, seal) => {
                table.statistics.file_loads += 1;
                let vault = self.vault.as_ref().ok_or(Lost::Empty(slot))?;
                drop(table);
                let result = vault.open(block, seal);
                if result.is_ok() {
                    return result;
                }
                table = self.table.lock();
                if table.place(slot).is_none() {
                    // Another thread freed the slot meanwhile, and the block is somebody else's by now.
                    return Err(Lost::Empty(slot));
                }
                result
            }
        };
        table.statistics.lost += u64::from(result.is_err());
        result
    }

    /// Frees a slot. One that holds nothing is let be.
    pub fn free(&self, slot: Slot) {
        let mut table = self.table.lock();
        match (table.vacate(slot), &self.vault) {
            (Some(Where::Memory(place)), _) => table.forget(place),
            (Some(Where::File(block, _)), Some(vault)) => table.give_back(vault, block),
            _ => {}
        }
    }

    /// Moves the oldest pages from memory to the file; gives how many, which is less when there are no more.
    ///
    /// # Errors
    /// When not even the first could be moved.
    pub fn spill(&self, pages: u64) -> Result<u64, Full> {
        let vault = self.vault.as_ref().ok_or(Full::NoFile)?;
        for done in 0..pages {
            match self.spill_one(vault) {
                Ok(true) => {}
                Err(full) if done == 0 => return Err(full),
                Ok(false) | Err(_) => return Ok(done),
            }
        }
        Ok(pages)
    }

    /// Says whether there was one.
    fn spill_one(&self, vault: &Vault) -> Result<bool, Full> {
        let mut table = self.table.lock();
        let Some(Leaving { slot, mut page }) = table.begin_to_leave() else { return Ok(false) };
        let taken = table.take_block();
        drop(table);
        let result = taken.and_then(|(block, count)| {
            let sealed = vault.seal(&mut page, block, count);
            let written = sealed.and_then(|seal| vault.write(block, &page).map(|()| seal));
            written.map(|seal| (block, seal)).map_err(|error| {
                self.table.lock().give_back(vault, block);
                Full::Host(error)
            })
        });
        let mut table = self.table.lock();
        if let Some(block) = table.end_to_leave(slot, result.as_ref().ok().copied()) {
            table.give_back(vault, block);
        }
        result.map(|_| true)
    }

    /// Gives back what the store needs only while it works.
    pub fn trim(&self) {
        self.table.lock().trim();
    }

    /// Whether a page is in the file, by the number of its slot.
    #[must_use]
    pub fn is_in_file(&self, slot: u64) -> bool {
        matches!(self.table.lock().place(Slot(slot)), Some(Where::File(..)))
    }

    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.table.lock().statistics()
    }
}
