//! The soft TLB: small direct-mapped arrays that translated code probes in line and that the monitor fills after a walk.
//!
//! Contract: an entry whose tag matches promises that its page is mapped in the host at `page`, that it is RAM of
//! this guest, and that the guest's tables and the traces allow the access. Entries are only made by [`SoftTlb::fill`] from
//! a page that the processor holds, and are emptied before that page can be moved, traced or released
//! ([`crate::writers::Seats`]).
//!
//! There is a bank for each kind of access right, so that the probe needs no check of privilege: its displacement in
//! the translated code says which bank it reads.

use std::collections::HashSet;

use x86::{Gva, Mpn, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Ppn};

use crate::bytes::{self, PageRef};
use crate::devices::DevicePages;
use crate::guest::Held;
use crate::regions::Regions;
use crate::reverse::{Known, Reverse};
use crate::shadow::Shadow;

/// Entries of a bank; a power of two. 1024 entries reach 4 MiB, and are 32 KiB to probe and empty.
pub const ENTRIES: usize = 1024;

/// What stands for a tag in an entry that allows no such access: a page whose entry is another one. Translated code hits
/// whenever address and tag differ in the offset at most, so no constant would do for all entries.
#[inline]
fn never(page: u64) -> u64 {
    page ^ PAGE_SIZE
}

/// What the last word of an entry says of its page.
pub const GLOBAL: u64 = 1;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct TlbEntry {
    /// The page's address, when loads may use it.
    pub read: u64,
    /// The page's address, when stores may use it.
    pub write: u64,
    /// The host address of the page.
    pub page: u64,
    pub flags: u64,
}

impl TlbEntry {
    fn empty(place: usize) -> TlbEntry {
        let tag = never((place as u64) << PAGE_SHIFT);
        TlbEntry { read: tag, write: tag, page: 0, flags: 0 }
    }
}

/// Which rights a bank holds translations for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Bank {
    /// CPL 0-2, SMAP in force.
    Kernel = 0,
    /// CPL 3.
    User = 1,
    /// CPL 0-2 with RFLAGS.AC set, so that SMAP does not apply.
    KernelAc = 2,
}

#[derive(Debug)]
#[repr(C)]
pub struct TlbBank {
    pub entries: [TlbEntry; ENTRIES],
}

#[derive(Debug)]
#[repr(C, align(64))]
pub struct SoftTlb {
    pub banks: [TlbBank; 3],
    /// For each bank a bit for every [`GROUP`] entries that were filled since they were last emptied.
    pub dirty: [u64; 3],
    /// The generation of each bank's entries in the shadow.
    pub generations: [u64; 3],
    /// Whether the kernel's bank holds entries that are not global.
    has_local: bool,
    pub shadow: Shadow,
    /// What is no RAM.
    pub devices: DevicePages,
    /// For each bank, of which halves of the address space it was filled since the last [`SoftTlb::flush_all`]: what is kept
    /// of the kernel's pages need not be looked at for a user's page, nor the other way round.
    halves: [u8; 3],
    /// Regions of 2 MiB and of 1 GiB of which pieces of large pages are held.
    large: Regions,
    huge: Regions,
    pub fills: u64,
    pub flushes: u64,
    pub dropped: Dropped,
    /// The translations of pages that others have, too.
    reverse: Reverse,
    /// How often single pages, or many, were forgotten because they went elsewhere.
    pub forgotten: u64,
}

/// Single pages that were dropped, for whoever fills tables of his own beside this TLB. All other changes give an address
/// space another generation.
#[derive(Debug, Default)]
pub struct Dropped {
    /// Somebody wants to know.
    pub is_wanted: bool,
    /// Pages with the generation of their address space.
    pub pages: Vec<(u64, Gva)>,
    /// Too many to be listed.
    pub are_many: bool,
    /// Pages that went elsewhere, and the machine pages that they had.
    pub moved: Vec<(Ppn, Mpn)>,
    /// Of these there were too many.
    pub all_moved: bool,
}

impl Dropped {
    const MOST: usize = 512;

    /// Notes pages that went elsewhere.
    pub fn note_moved(&mut self, pages: &[(Ppn, Mpn)]) {
        if self.is_wanted && !self.all_moved {
            self.moved.extend_from_slice(pages);
            self.all_moved = self.moved.len() > 16 * Self::MOST;
        }
    }

    fn note(&mut self, generation: u64, page: Gva) {
        if self.pages.len() < Self::MOST {
            self.pages.push((generation, page));
        } else {
            self.are_many = true;
        }
    }
}

/// Entries that one dirty bit stands for.
pub const GROUP: usize = ENTRIES / 64;

const BANKS: [Bank; 3] = [Bank::Kernel, Bank::User, Bank::KernelAc];

const LARGE_SHIFT: u32 = 21;
const LARGE_SIZE: u64 = 1 << LARGE_SHIFT;
const LARGE_PAGES: usize = 1 << (LARGE_SHIFT - PAGE_SHIFT);
const HUGE_SHIFT: u32 = 30;

/// The bit of the half of the address space.
fn half(address: Gva) -> u8 {
    1 << (address.0 >> 63)
}

#[inline]
#[must_use]
pub fn index(address: Gva) -> usize {
    (address.0 >> PAGE_SHIFT) as usize & (ENTRIES - 1)
}

impl SoftTlb {
    #[must_use]
    pub fn new() -> SoftTlb {
        let bank = || TlbBank { entries: std::array::from_fn(TlbEntry::empty) };
        let mut shadow = Shadow::new();
        let (kernel, space) = (shadow.new_kernel_generation(), shadow.new_generation());
        SoftTlb {
            banks: [bank(), bank(), bank()],
            dirty: [0; 3],
            generations: [kernel, space, space],
            has_local: false,
            shadow,
            devices: DevicePages::default(),
            halves: [0; 3],
            large: Regions::new(LARGE_SHIFT),
            huge: Regions::new(HUGE_SHIFT),
            fills: 0,
            flushes: 0,
            dropped: Dropped::default(),
            reverse: Reverse::default(),
            forgotten: 0,
        }
    }

    /// Remembers that `address` leads to a page.
    pub fn fill(&mut self, bank: Bank, address: Gva, held: &Held<'_>, global: bool) {
        self.fills += 1;
        let tag = address.page().0;
        let entry = TlbEntry {
            read: tag,
            write: if held.may_store { tag } else { never(tag) },
            page: held.page.host_address(),
            flags: if global { GLOBAL } else { 0 },
        };
        if held.is_common() {
            let place = (bank, self.generations[bank as usize], address.page());
            if !self.reverse.note(entry.page, place) {
                self.flush_all();
                self.reverse.note(entry.page, (bank, self.generations[bank as usize], address.page()));
            }
        }
        self.halves[bank as usize] |= half(address);
        let place = index(address);
        self.dirty[bank as usize] |= 1 << (place / GROUP);
        self.banks[bank as usize].entries[place] = entry;
        if bank == Bank::Kernel && !global {
            // The kernel's generation outlives loads of CR3, and such an entry must not.
            self.has_local = true;
        } else {
            self.shadow.fill(bank, self.generations[bank as usize], &entry);
        }
    }

    /// Remembers that the guest maps `address` by a page of 2 MiB or 1 GiB, of which we hold pieces of 4 KiB.
    pub fn note_large(&mut self, address: Gva, page_size: u64) {
        if page_size > LARGE_SIZE {
            self.huge.insert(address);
        } else {
            self.large.insert(address);
        }
    }

    /// The host address for `size` bytes, when they lie in one page and the bank allows the access.
    #[inline]
    fn probe(&self, bank: Bank, address: Gva, size: usize, write: bool) -> Option<u64> {
        let entry = &self.banks[bank as usize].entries[index(address)];
        let tag = if write { entry.write } else { entry.read };
        let inside = (address.0 & PAGE_MASK) + size as u64 <= PAGE_SIZE;
        (tag == address.page().0 && inside).then(|| entry.page + (address.0 & PAGE_MASK))
    }

    /// Loads 1, 2, 4 or 8 bytes on a hit.
    #[inline]
    #[must_use]
    pub fn load(&self, bank: Bank, address: Gva, size: usize) -> Option<u64> {
        // SAFETY: a hit promises a mapped page, and the probe checked that the bytes lie inside it.
        self.probe(bank, address, size, false).map(|host| unsafe { bytes::load(host, size) })
    }

    /// Stores 1, 2, 4 or 8 bytes on a hit; says whether it did.
    #[inline]
    pub fn store(&self, bank: Bank, address: Gva, size: usize, value: u64) -> bool {
        match self.probe(bank, address, size, true) {
            // SAFETY: as in `load`, and the entry allows stores.
            Some(host) => unsafe { bytes::store(host, size, value) },
            None => return false,
        }
        true
    }

    /// Compares and exchanges atomically on a hit of bytes that one host instruction can exchange; gives back the old value.
    #[inline]
    #[must_use]
    pub fn compare_exchange(&self, bank: Bank, address: Gva, size: usize, expected: u64, new: u64) -> Option<u64> {
        let host = self.probe(bank, address, size, true).filter(|_| bytes::in_line(address.0, size))?;
        // SAFETY: as in `store`.
        Some(unsafe { bytes::compare_exchange(host, size, expected, new) })
    }

    /// As [`SoftTlb::compare_exchange`], of 16 bytes at a multiple of 16.
    #[must_use]
    pub fn compare_exchange16(&self, bank: Bank, address: Gva, expected: u128, new: u128) -> Option<u128> {
        let host = self.probe(bank, address, 16, true).filter(|host| host.is_multiple_of(16))?;
        // SAFETY: as in `store`, and aligned.
        Some(unsafe { bytes::compare_exchange16(host, expected, new) })
    }

    /// Copies `size` bytes, all in one page on either side, on a hit of both; says whether it did. It does not when a copy byte
    /// by byte, upwards or `down`, would read what it wrote.
    #[must_use]
    pub fn copy(&self, bank: Bank, to: Gva, from: Gva, size: usize, down: bool) -> bool {
        let (Some(to), Some(from)) = (self.probe(bank, to, size, true), self.probe(bank, from, size, false)) else {
            return false;
        };
        let ahead = if down { from.wrapping_sub(to) } else { to.wrapping_sub(from) };
        if (1..size as u64).contains(&ahead) {
            return false;
        }
        // SAFETY: both hits promise `size` mapped bytes, and the first that they may be written.
        unsafe { bytes::copy(to, from, size) };
        true
    }

    /// Stores bytes that lie in one page, on a hit; says whether it did.
    #[must_use]
    pub fn store_bytes(&self, bank: Bank, to: Gva, data: &[u8]) -> bool {
        let Some(to) = self.probe(bank, to, data.len(), true) else { return false };
        // SAFETY: as in `store`; our own bytes are no guest memory.
        unsafe { bytes::copy(to, data.as_ptr() as u64, data.len()) };
        true
    }

    /// Loads bytes that lie in one page, on a hit; says whether it did.
    #[must_use]
    pub fn load_bytes(&self, bank: Bank, from: Gva, buffer: &mut [u8]) -> bool {
        let Some(from) = self.probe(bank, from, buffer.len(), false) else { return false };
        // SAFETY: as in `load`; our own bytes are no guest memory.
        unsafe { bytes::copy(buffer.as_mut_ptr() as u64, from, buffer.len()) };
        true
    }

    /// Whether a load or store of one byte would hit.
    #[must_use]
    pub fn allows(&self, bank: Bank, address: Gva, write: bool) -> bool {
        self.probe(bank, address, 1, write).is_some()
    }

    fn empty(&mut self, bank: Bank, keep: u64) {
        let mut dirty = std::mem::take(&mut self.dirty[bank as usize]);
        while dirty != 0 {
            let first = dirty.trailing_zeros() as usize * GROUP;
            let group = first..first + GROUP;
            for (entry, place) in self.banks[bank as usize].entries[group.clone()].iter_mut().zip(group) {
                if entry.flags & keep == 0 {
                    *entry = TlbEntry::empty(place);
                } else {
                    self.dirty[bank as usize] |= 1 << (first / GROUP);
                }
            }
            dirty &= dirty - 1;
        }
    }

    /// Empties the TLB of what is not global; the shadow keeps it, under its generation.
    fn empty_local(&mut self) {
        self.flushes += 1;
        self.devices.forget_local();
        self.empty(Bank::User, 0);
        self.empty(Bank::KernelAc, 0);
        if std::mem::take(&mut self.has_local) {
            self.empty(Bank::Kernel, GLOBAL);
        }
    }

    fn set_space(&mut self, generation: u64) {
        self.generations[Bank::User as usize] = generation;
        self.generations[Bank::KernelAc as usize] = generation;
    }

    /// Drops all that is not global, of all address spaces: what a load of CR3 does without PCIDs.
    pub fn flush_local(&mut self) {
        self.empty_local();
        self.shadow.forget_all_pcids();
        let fresh = self.shadow.new_generation();
        self.set_space(fresh);
    }

    /// Goes to another address space by its PCID; `keep` its translations, or drop them.
    pub fn switch_space(&mut self, pcid: u16, keep: bool) {
        self.empty_local();
        let generation = self.shadow.generation_of(pcid, keep);
        self.set_space(generation);
    }

    /// Forgets a PCID that is not the current one: INVPCID.
    pub fn forget_pcid(&mut self, pcid: u16) {
        self.shadow.forget_pcid(pcid);
    }

    /// Forgets all address spaces, and global translations, too.
    pub fn flush_all(&mut self) {
        self.flushes += 1;
        for bank in BANKS {
            self.empty(bank, 0);
        }
        self.devices.forget_all();
        self.forget_shadow();
        self.reverse.clear();
        self.large.clear();
        self.huge.clear();
        self.halves = [0; 3];
    }

    fn forget_shadow(&mut self) {
        self.shadow.forget_all_pcids();
        self.generations[Bank::Kernel as usize] = self.shadow.new_kernel_generation();
        let fresh = self.shadow.new_generation();
        self.set_space(fresh);
    }

    /// Drops what is known of one page: what INVLPG does. All pieces of a large page go together, since the guest names it by
    /// one of its addresses (Intel SDM Vol. 3A 5.10.4.1).
    pub fn flush_page(&mut self, address: Gva) {
        if self.huge.may_contain(address) {
            self.forget_shadow();
            self.drop_region(address, HUGE_SHIFT, 0..ENTRIES);
        } else if self.large.may_contain(address) {
            self.forget_shadow();
            // The pages of 2 MiB are neighbours in a bank.
            let first = index(address) & !(LARGE_PAGES - 1);
            self.drop_region(address, LARGE_SHIFT, first..first + LARGE_PAGES);
        }
        self.devices.forget_all();
        let page = address.page().0;
        if self.dropped.is_wanted {
            self.dropped.note(self.generations[Bank::User as usize], address.page());
        }
        for bank in BANKS {
            if self.halves[bank as usize] & half(address) == 0 {
                continue;
            }
            let entry = &mut self.banks[bank as usize].entries[index(address)];
            if entry.read == page {
                *entry = TlbEntry::empty(index(address));
            }
            self.shadow.drop_page(bank, self.generations[bank as usize], page);
        }
    }

    fn drop_region(&mut self, address: Gva, shift: u32, indices: std::ops::Range<usize>) {
        for bank in &mut self.banks {
            for (entry, place) in bank.entries[indices.clone()].iter_mut().zip(indices.clone()) {
                if entry.read >> shift == address.0 >> shift {
                    *entry = TlbEntry::empty(place);
                }
            }
        }
    }

    /// Drops the translations of a page that others have, too, by its host address.
    pub fn forget_common(&mut self, page: u64) {
        self.forgotten += 1;
        match self.reverse.take(page) {
            Known::Places(places) => {
                for (bank, generation, address) in places {
                    let entry = &mut self.banks[bank as usize].entries[index(address)];
                    if entry.page == page {
                        *entry = TlbEntry::empty(index(address));
                    }
                    self.shadow.drop_page(bank, generation, address.0);
                }
            }
            Known::TooMany => self.forget_pages(&HashSet::from([page])),
        }
    }

    /// Drops the translations of any pages, by their host addresses: all that the shadow has go with them.
    pub fn forget_pages(&mut self, pages: &HashSet<u64>) {
        self.forgotten += pages.len() as u64;
        // They are neighbours, most often, and most entries are of other pages.
        let range = pages.iter().min().copied().unwrap_or(0)..=pages.iter().max().copied().unwrap_or(0);
        for bank in &mut self.banks {
            for (place, entry) in bank.entries.iter_mut().enumerate() {
                if range.contains(&entry.page) && pages.contains(&entry.page) {
                    *entry = TlbEntry::empty(place);
                }
            }
        }
        self.forget_shadow();
    }

    /// Pages that others have, too, of which there are translations.
    #[must_use]
    pub fn common_pages(&self) -> usize {
        self.reverse.pages()
    }

    /// Takes the right to store to pages away from every entry that leads to one of them.
    pub fn protect<'a>(&mut self, pages: impl Iterator<Item = PageRef<'a>>) {
        let pages: Vec<u64> = pages.map(PageRef::host_address).collect();
        for bank in &mut self.banks {
            for entry in &mut bank.entries {
                if entry.write == entry.read && pages.contains(&entry.page) {
                    entry.write = never(entry.read);
                }
            }
        }
        self.forget_shadow();
    }
}

impl Default for SoftTlb {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_address_space_knows_nothing_however_often_the_generations_go_round() {
        let mut tlb = SoftTlb::new();
        let pages: Vec<u64> = (0..4).map(|page| 0x5e_2000 + (page << PAGE_SHIFT)).collect();
        let knows = |tlb: &SoftTlb| pages.iter().any(|page| tlb.shadow.holds(Bank::User, tlb.generations[1], *page));
        let fill = |tlb: &mut SoftTlb| {
            for page in &pages {
                let entry = TlbEntry { read: *page, write: *page, page: 0x7000, flags: 0 };
                let generation = tlb.generations[Bank::User as usize];
                tlb.shadow.fill(Bank::User, generation, &entry);
            }
        };
        let mut lives = [(0, 0); 4];
        tlb.forget_shadow();
        for step in 0..300_000 {
            // Three processes take turns; now and then one is replaced by a new one.
            let pcid = 1 + step % 3;
            tlb.switch_space(pcid as u16, step % 10 != 0);
            let now = (tlb.shadow.rounds, tlb.generations[Bank::User as usize]);
            if std::mem::replace(&mut lives[pcid], now) != now {
                assert!(!knows(&tlb), "step {step}: {now:?} was somebody else's");
            }
            fill(&mut tlb);
        }
        assert!(tlb.shadow.rounds > 0);
    }

    #[test]
    fn a_page_among_small_ones_is_dropped_alone_however_many_large_ones_there_are() {
        let mut tlb = SoftTlb::new();
        let direct = |number: u64| Gva(0xffff_8880_0000_0000 + (number << LARGE_SHIFT));
        (0..512).for_each(|number| tlb.note_large(direct(number), LARGE_SIZE));
        let before = tlb.generations;
        for page in 0..64 {
            tlb.flush_page(Gva(0x7f12_3456_7000 + (page << PAGE_SHIFT)));
        }
        assert_eq!(tlb.generations, before);
        tlb.flush_page(direct(7).add(0x5000));
        assert_ne!(tlb.generations, before);
    }
}
