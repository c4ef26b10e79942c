//! The soft TLB: small direct-mapped arrays that translated code probes in line and that the monitor fills after a walk.
//!
//! Contract: an entry whose tag matches promises that its page is mapped in the host at `page`, that it is RAM of
//! this guest, and that the guest's tables and the traces allow the access. Entries are only made by [`SoftTlb::fill`] from
//! a [`PageRef`], and are emptied before that page can be moved, traced or released ([`GuestMemory::epoch`]).
//!
//! There is a bank for each kind of access right, so that the probe needs no check of privilege: its displacement in
//! the translated code says which bank it reads.

use x86::{Gva, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE};

use crate::bytes::{self, PageRef};

/// Entries of a bank; a power of two. 1024 entries reach 4 MiB, and are 32 KiB to probe and empty.
pub const ENTRIES: usize = 1024;

/// A tag that no page-aligned address equals.
pub const EMPTY: u64 = 1;

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
    const EMPTY: TlbEntry = TlbEntry { read: EMPTY, write: EMPTY, page: 0, flags: 0 };
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
    /// Whether a bank holds entries that are not global, or any at all, since it was last emptied.
    has_local: [bool; 3],
    has_any: [bool; 3],
    /// Regions of 2 MiB and of 1 GiB, by the low bits of their numbers, of which pieces of large pages are held.
    large: u64,
    huge: u64,
    pub fills: u64,
    pub flushes: u64,
}

const LARGE_SHIFT: u32 = 21;
const LARGE_SIZE: u64 = 1 << LARGE_SHIFT;
const LARGE_PAGES: usize = 1 << (LARGE_SHIFT - PAGE_SHIFT);
const HUGE_SHIFT: u32 = 30;

/// The bit that stands for the region of `1 << shift` bytes around `address`, and for every 64th other.
fn region_bit(address: Gva, shift: u32) -> u64 {
    1 << (address.0 >> shift & 63)
}

#[inline]
#[must_use]
pub fn index(address: Gva) -> usize {
    (address.0 >> PAGE_SHIFT) as usize & (ENTRIES - 1)
}

impl SoftTlb {
    #[must_use]
    pub fn new() -> SoftTlb {
        let bank = || TlbBank { entries: [TlbEntry::EMPTY; ENTRIES] };
        SoftTlb {
            banks: [bank(), bank(), bank()],
            has_local: [false; 3],
            has_any: [false; 3],
            large: 0,
            huge: 0,
            fills: 0,
            flushes: 0,
        }
    }

    /// Remembers that `address` leads to `page`.
    pub fn fill(&mut self, bank: Bank, address: Gva, page: PageRef<'_>, writable: bool, global: bool) {
        self.fills += 1;
        self.has_any[bank as usize] = true;
        self.has_local[bank as usize] |= !global;
        let tag = address.page().0;
        self.banks[bank as usize].entries[index(address)] = TlbEntry {
            read: tag,
            write: if writable { tag } else { EMPTY },
            page: page.host_address(),
            flags: if global { GLOBAL } else { 0 },
        };
    }

    /// Remembers that the guest maps `address` by a page of 2 MiB or 1 GiB, of which we hold pieces of 4 KiB.
    pub fn note_large(&mut self, address: Gva, page_size: u64) {
        if page_size > LARGE_SIZE {
            self.huge |= region_bit(address, HUGE_SHIFT);
        } else {
            self.large |= region_bit(address, LARGE_SHIFT);
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

    /// Compares and exchanges atomically on a hit; gives back the old value.
    #[inline]
    #[must_use]
    pub fn compare_exchange(&self, bank: Bank, address: Gva, size: usize, expected: u64, new: u64) -> Option<u64> {
        let host = self.probe(bank, address, size, true)?;
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

    /// Whether a load or store of one byte would hit.
    #[must_use]
    pub fn allows(&self, bank: Bank, address: Gva, write: bool) -> bool {
        self.probe(bank, address, 1, write).is_some()
    }

    fn empty(&mut self, bank: usize, keep: u64) {
        for entry in &mut self.banks[bank].entries {
            if entry.flags & keep == 0 {
                *entry = TlbEntry::EMPTY;
            }
        }
        self.has_local[bank] = false;
        self.has_any[bank] &= keep != 0;
    }

    /// Drops all that is not global: what a load of CR3 does.
    pub fn flush_local(&mut self) {
        self.flushes += 1;
        for bank in 0..3 {
            if self.has_local[bank] {
                self.empty(bank, GLOBAL);
            }
        }
    }

    pub fn flush_all(&mut self) {
        self.flushes += 1;
        for bank in 0..3 {
            if self.has_any[bank] {
                self.empty(bank, 0);
            }
        }
        (self.large, self.huge) = (0, 0);
    }

    /// Drops what is known of one page: what INVLPG does. All pieces of a large page go together, since the guest names it by
    /// one of its addresses (Intel SDM Vol. 3A 5.10.4.1).
    pub fn flush_page(&mut self, address: Gva) {
        if self.huge & region_bit(address, HUGE_SHIFT) != 0 {
            self.drop_region(address, HUGE_SHIFT, 0..ENTRIES);
        } else if self.large & region_bit(address, LARGE_SHIFT) != 0 {
            // The pages of 2 MiB are neighbours in a bank.
            let first = index(address) & !(LARGE_PAGES - 1);
            self.drop_region(address, LARGE_SHIFT, first..first + LARGE_PAGES);
        }
        for bank in &mut self.banks {
            let entry = &mut bank.entries[index(address)];
            if entry.read == address.page().0 {
                *entry = TlbEntry::EMPTY;
            }
        }
    }

    fn drop_region(&mut self, address: Gva, shift: u32, indices: std::ops::Range<usize>) {
        for bank in &mut self.banks {
            for entry in &mut bank.entries[indices.clone()] {
                if entry.read != EMPTY && entry.read >> shift == address.0 >> shift {
                    *entry = TlbEntry::EMPTY;
                }
            }
        }
    }

    /// Takes the right to store to a page away from every entry that leads to it.
    pub fn protect(&mut self, page: PageRef<'_>) {
        for bank in &mut self.banks {
            for entry in &mut bank.entries {
                if entry.write != EMPTY && entry.page == page.host_address() {
                    entry.write = EMPTY;
                }
            }
        }
    }
}

impl Default for SoftTlb {
    fn default() -> Self {
        Self::new()
    }
}
