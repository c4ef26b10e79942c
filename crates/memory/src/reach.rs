//! What the guest's tables let its user code reach, looked at without touching them: no accessed or dirty bit is set, no
//! fault is found. Intel SDM (2024-12) Vol. 3A 5.10.2.2 "Caching Translations in TLBs" lets a processor remember any
//! translation whose accessed bits are set, so whoever fills a table of his own from this does what hardware may do.

use x86::paging::{ADDRESS, RESERVED_HIGH, entry};
use x86::{Gpa, Gva, PAGE_MASK, PAGE_SHIFT, Ppn};

use crate::{GuestMemory, Paging};

/// Bytes that a region covers: what one table of the lowest level maps.
pub const REGION: u64 = 1 << 21;
/// Pages of a region.
pub const PAGES: usize = 512;

/// What is below the upper levels of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Below {
    /// A table of entries for 4 KiB pages.
    Table(Ppn),
    /// A page of 2 MiB or 1 GiB: its entry, with the address of this region's first byte, and its size.
    Large(u64, u64),
}

/// The upper levels of the tables for one region, all present, accessed and open to user code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    below: Below,
    writable: bool,
    no_execute: bool,
}

/// One page that user code can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    pub ppn: Ppn,
    /// User code may store there, and the dirty bit is set.
    pub writable: bool,
    pub executable: bool,
}

const NEEDED: u64 = entry::PRESENT | entry::USER | entry::ACCESSED;

/// Looks at the upper levels for the region around `address`; `None` when user code cannot reach it without a walk.
#[must_use]
pub fn region(memory: &GuestMemory, paging: &Paging, address: Gva) -> Option<Region> {
    if !paging.enabled || !paging.no_execute {
        return None;
    }
    let mut table = paging.root;
    let (mut writable, mut no_execute) = (true, false);
    for level in (1..4_u32).rev() {
        let shift = PAGE_SHIFT + 9 * level;
        let value = memory.page(table.ppn())?.read_u64(((address.0 >> shift) & 0x1ff) * 8);
        if value & NEEDED != NEEDED || value & RESERVED_HIGH != 0 {
            return None;
        }
        if value & entry::LARGE != 0 {
            // Bits between the flags and the page's address are reserved, but for PAT in bit 12.
            let size = 1_u64 << shift;
            if level == 3 || value & (size - 1) & !0x1fff != 0 {
                return None;
            }
            let flags = value & !ADDRESS;
            let first = (value & ADDRESS & !(size - 1)) | (address.0 & (size - 1) & !(REGION - 1));
            return Some(Region { below: Below::Large(first | flags, size), writable, no_execute });
        }
        writable &= value & entry::WRITABLE != 0;
        no_execute |= value & entry::NX != 0;
        table = Gpa(value & ADDRESS & !PAGE_MASK);
    }
    Some(Region { below: Below::Table(table.ppn()), writable, no_execute })
}

impl Region {
    /// The entry behind each of `count` pages from `first` on, 0 for those that user code cannot reach without a walk.
    pub fn entries(&self, memory: &GuestMemory, first: usize, count: usize) -> impl Iterator<Item = u64> {
        let table = match self.below {
            Below::Table(ppn) => memory.page(ppn),
            Below::Large(..) => None,
        };
        (first..first + count).map(move |index| {
            let value = match self.below {
                Below::Large(entry, _) => entry.wrapping_add((index as u64) << PAGE_SHIFT),
                Below::Table(_) => table.map_or(0, |page| page.read_u64(index as u64 * 8)),
            };
            let is_reached = value & NEEDED == NEEDED && value & RESERVED_HIGH == 0;
            if is_reached { value } else { 0 }
        })
    }

    /// Bytes of the large page that the region is, or is part of; `None` where its pages have 4 KiB. An invalidation of one
    /// address of a large page is one of all (Intel SDM Vol. 3A 5.10.4.1).
    #[must_use]
    pub fn large_size(&self) -> Option<u64> {
        match self.below {
            Below::Table(_) => None,
            Below::Large(_, size) => Some(size),
        }
    }

    /// What an entry of [`Region::entries`] allows.
    #[must_use]
    pub fn reached(&self, value: u64) -> Reached {
        Reached {
            ppn: Gpa(value & ADDRESS & !PAGE_MASK).ppn(),
            writable: self.writable && value & entry::WRITABLE != 0 && value & entry::DIRTY != 0,
            executable: !self.no_execute && value & entry::NX == 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u64 = 0x1000;
    const FLAGS: u64 = entry::PRESENT | entry::USER | entry::ACCESSED | entry::WRITABLE;

    fn guest(lowest: &[u64]) -> (GuestMemory, Paging) {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let put = |at: u64, value: u64| memory.write(Gpa(at), &value.to_le_bytes()).unwrap();
        put(ROOT, 0x2000 | FLAGS);
        put(0x2000, 0x3000 | FLAGS);
        put(0x3000, 0x4000 | FLAGS);
        put(0x3008, 0x20_0000 | FLAGS | entry::DIRTY | entry::LARGE);
        put(0x3010, 0x4000 | FLAGS & !entry::ACCESSED);
        lowest.iter().enumerate().for_each(|(index, value)| put(0x4000 + 8 * index as u64, *value));
        let cpu = x86::CpuState {
            cr0: x86::cr0::PG | x86::cr0::PE,
            cr3: ROOT,
            efer: x86::efer::NXE,
            ..x86::CpuState::reset()
        };
        (memory, Paging::of(&cpu))
    }

    #[test]
    fn only_what_is_accessed_and_the_users_is_reached() {
        let page = 0x8000;
        let entries = [
            page | FLAGS | entry::DIRTY,
            page | FLAGS,
            page | FLAGS & !entry::WRITABLE | entry::DIRTY | entry::NX,
            page | FLAGS & !entry::ACCESSED,
            page | FLAGS & !entry::USER,
            page | FLAGS & !entry::PRESENT,
            page | FLAGS | 1 << 45,
        ];
        let (memory, paging) = guest(&entries);
        let region = region(&memory, &paging, Gva(0x1000)).unwrap();
        let found: Vec<u64> = region.entries(&memory, 0, entries.len()).collect();
        assert_eq!(found, [entries[0], entries[1], entries[2], 0, 0, 0, 0]);
        let rights = found[..3].iter().map(|value| region.reached(*value));
        let rights: Vec<(bool, bool)> = rights.map(|it| (it.writable, it.executable)).collect();
        assert_eq!(rights, [(true, true), (false, true), (false, false)]);
        assert_eq!(region.reached(found[0]).ppn, Ppn(8));
        let mut table = [0; 8];
        memory.read(Gpa(0x4018), &mut table).unwrap();
        assert_eq!(u64::from_le_bytes(table), entries[3], "nothing was changed");
    }

    #[test]
    fn large_pages_are_reached_in_pieces() {
        let (memory, paging) = guest(&[]);
        let region = region(&memory, &paging, Gva(REGION + 0x3456)).unwrap();
        assert_eq!(region.large_size(), Some(REGION));
        let piece = region.entries(&memory, 3, 1).next().unwrap();
        assert_eq!(region.reached(piece), Reached { ppn: Ppn(0x203), writable: true, executable: true });
    }

    #[test]
    fn upper_levels_must_be_accessed_too() {
        let (memory, paging) = guest(&[]);
        assert_eq!(region(&memory, &paging, Gva(2 * REGION)), None);
        assert_eq!(region(&memory, &paging, Gva(3 * REGION)), None);
        assert_eq!(region(&memory, &Paging { no_execute: false, ..paging }, Gva(0)), None);
    }
}
