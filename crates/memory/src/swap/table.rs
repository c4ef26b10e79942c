//! Which page is where: an entry for each slot, and the age of those in memory.

use std::io;
use std::num::NonZeroU64;

use x86::PAGE_SIZE;
use zstd_safe::{CCtx, DCtx};

use super::log::{Log, Place};
use super::store::Statistics;
use super::vault::{Blocks, Seal, Vault};
use super::{Full, Page, Slot};

/// Of 15,300 pages of a Debian guest, 98 % shrink enough, to 1,010 bytes each. Level 3 makes that 1,005, and with level -3 a
/// fifth of the pages does not shrink enough.
const LEVEL: i32 = 1;
/// Bytes to which a page must shrink to be worth its place in memory.
const WORTH_IT: usize = PAGE_SIZE as usize * 3 / 4;
/// No entry: the end of a list.
const NONE: u32 = u32::MAX;
/// Bits of a slot that number its entry: 1 TiB of pages. The others, up to 40, count who had the entry.
const NUMBER_BITS: u32 = 28;
const TENANTS: u16 = 1 << (40 - NUMBER_BITS);

fn slot_of(number: u32, tenant: u16) -> Slot {
    Slot(u64::from(tenant) << NUMBER_BITS | u64::from(number))
}

fn number_of(slot: Slot) -> usize {
    (slot.0 & ((1 << NUMBER_BITS) - 1)) as usize
}

#[derive(Clone, Copy, Debug)]
pub enum Where {
    Memory(Place),
    File(u32, Seal),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    place: Option<Where>,
    /// Counts the pages that had this entry, so that their slots are different ones: a processor that still has the slot of
    /// a page which another brought back, changed, and lost again, must not take the old content for the new.
    tenant: u16,
    /// Whether it is in the list by age: it is in memory, and not on its way to the file.
    listed: bool,
    /// The page put before it and the one put after it; of a free entry, `older` is the next that is free.
    older: u32,
    younger: u32,
}

/// A page on its way to the file.
#[derive(Debug)]
pub struct Leaving {
    pub slot: Slot,
    pub page: Page,
}

/// A compressed page.
#[derive(Debug)]
pub struct Packed {
    bytes: [u8; WORTH_IT],
    size: usize,
}

impl Packed {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.size]
    }
}

pub struct Table {
    log: Log,
    entries: Vec<Entry>,
    free: u32,
    oldest: u32,
    youngest: u32,
    blocks: Blocks,
    packer: Option<CCtx<'static>>,
    unpacker: Option<DCtx<'static>>,
    pub statistics: Statistics,
}

impl Table {
    pub fn new(compressed_bytes: u64, file_bytes: u64) -> io::Result<Table> {
        Ok(Table {
            log: Log::new(compressed_bytes)?,
            entries: Vec::new(),
            free: NONE,
            oldest: NONE,
            youngest: NONE,
            blocks: Blocks::new(file_bytes),
            packer: None,
            unpacker: None,
            statistics: Statistics::default(),
        })
    }

    /// Compresses a page; `None` when it does not get small enough.
    pub fn pack(&mut self, page: &Page) -> Option<Packed> {
        let packer = self.packer.get_or_insert_with(CCtx::create);
        let mut bytes = [0; WORTH_IT];
        // The room is as small as the page must get: an error says that it does not.
        let size = packer.compress(&mut bytes[..], page, LEVEL).ok()?;
        Some(Packed { bytes, size })
    }

    /// `None` when memory was damaged.
    pub fn unpack(&mut self, place: Place) -> Option<Page> {
        let unpacker = self.unpacker.get_or_insert_with(DCtx::create);
        let mut page = [0; PAGE_SIZE as usize];
        let size = unpacker.decompress(&mut page[..], self.log.bytes(place)).ok()?;
        (size == page.len()).then_some(page)
    }

    /// `None` when there is no memory left for it.
    pub fn put_into_memory(&mut self, packed: &[u8]) -> Option<Slot> {
        let number = self.next_number();
        let entries = &mut self.entries;
        let place = self.log.append(number, packed, |owner, place| moved(entries, owner, place))?;
        let slot = self.occupy(Where::Memory(place));
        self.list_as_youngest(number);
        Some(slot)
    }

    /// The entry that [`Table::occupy`] gives out next.
    fn next_number(&self) -> u32 {
        if self.free == NONE { self.entries.len() as u32 } else { self.free }
    }

    /// Gives out a slot.
    pub fn occupy(&mut self, place: Where) -> Slot {
        let number = self.next_number();
        if self.free == NONE {
            self.entries.push(Entry { place: None, tenant: 0, listed: false, older: NONE, younger: NONE });
        }
        let entry = &mut self.entries[number as usize];
        if self.free != NONE {
            self.free = entry.older;
        }
        entry.place = Some(place);
        let slot = slot_of(number, entry.tenant);
        self.count(place, 1);
        slot
    }

    fn entry(&self, slot: Slot) -> Option<&Entry> {
        let entry = self.entries.get(number_of(slot))?;
        (slot_of(number_of(slot) as u32, entry.tenant) == slot).then_some(entry)
    }

    /// Takes a slot back; gives where its page was.
    pub fn vacate(&mut self, slot: Slot) -> Option<Where> {
        let place = self.place(slot)?;
        let number = number_of(slot);
        self.unlist(number as u32);
        let entry = &mut self.entries[number];
        entry.place = None;
        entry.tenant = (entry.tenant + 1) % TENANTS;
        entry.older = std::mem::replace(&mut self.free, number as u32);
        self.count(place, -1);
        Some(place)
    }

    /// `None` when the slot was freed.
    pub fn place(&self, slot: Slot) -> Option<Where> {
        self.entry(slot)?.place
    }

    /// Lets go of a page's bytes in memory.
    pub fn forget(&mut self, place: Place) {
        let entries = &mut self.entries;
        self.log.free(place, |owner, place| moved(entries, owner, place));
    }

    /// The oldest page in memory. It stays there, and in no list, until [`Table::end_to_leave`].
    pub fn begin_to_leave(&mut self) -> Option<Leaving> {
        while self.oldest != NONE {
            let number = self.oldest;
            self.unlist(number);
            let entry = self.entries[number as usize];
            if let Some(Where::Memory(place)) = entry.place
                && let Some(page) = self.unpack(place)
            {
                return Some(Leaving { slot: slot_of(number, entry.tenant), page });
            }
            // Damaged: who asks for it is told so; it does not go on to be sealed as if it were whole.
        }
        None
    }

    /// A page has arrived in the file, or (`None`) it has not and stays the oldest in memory. Gives the block back when the
    /// page was freed meanwhile.
    pub fn end_to_leave(&mut self, slot: Slot, arrived: Option<(u32, Seal)>) -> Option<u32> {
        let number = number_of(slot);
        let Some(Where::Memory(place)) = self.place(slot) else { return arrived.map(|(block, _)| block) };
        let Some((block, seal)) = arrived else {
            self.list_as_oldest(number as u32);
            return None;
        };
        let there = Where::File(block, seal);
        self.entries[number].place = Some(there);
        self.count(Where::Memory(place), -1);
        self.count(there, 1);
        self.statistics.spills += 1;
        self.forget(place);
        None
    }

    pub fn take_block(&mut self) -> Result<(u32, NonZeroU64), Full> {
        self.blocks.take().ok_or(Full::File(self.blocks.limit()))
    }

    pub fn give_back(&mut self, vault: &Vault, block: u32) {
        if let Some(length) = self.blocks.give_back(block) {
            vault.cut(length);
        }
    }

    pub fn trim(&mut self) {
        self.packer = None;
        self.unpacker = None;
    }

    pub fn statistics(&self) -> Statistics {
        Statistics { compressed_bytes: self.log.footprint(), ..self.statistics }
    }

    fn count(&mut self, place: Where, by: i64) {
        let counted = match place {
            Where::Memory(_) => &mut self.statistics.compressed,
            Where::File(..) => &mut self.statistics.in_file,
        };
        *counted = counted.wrapping_add_signed(by);
    }

    fn list_as_youngest(&mut self, slot: u32) {
        let older = std::mem::replace(&mut self.youngest, slot);
        self.link(older, slot);
        self.link(slot, NONE);
        self.entries[slot as usize].listed = true;
    }

    fn list_as_oldest(&mut self, slot: u32) {
        let younger = std::mem::replace(&mut self.oldest, slot);
        self.link(slot, younger);
        self.link(NONE, slot);
        self.entries[slot as usize].listed = true;
    }

    fn unlist(&mut self, slot: u32) {
        let Entry { listed: true, older, younger, .. } = self.entries[slot as usize] else { return };
        self.link(older, younger);
        self.entries[slot as usize].listed = false;
    }

    /// Makes two slots neighbours by age; the ends of the list are neighbours of none.
    fn link(&mut self, older: u32, younger: u32) {
        match self.entries.get_mut(older as usize) {
            Some(entry) => entry.younger = younger,
            None => self.oldest = younger,
        }
        match self.entries.get_mut(younger as usize) {
            Some(entry) => entry.older = older,
            None => self.youngest = older,
        }
    }
}

/// A record of the log has another place.
fn moved(entries: &mut [Entry], owner: u32, place: Place) {
    entries[owner as usize].place = Some(Where::Memory(place));
}
