//! The shadow behind the soft TLB: Gva -> host page for many more pages than the TLB holds, of several address spaces.
//!
//! A direct-mapped table for each bank. The tag of an entry is the page's address with the generation of its address space
//! in the low twelve bits, so that a load of CR3 empties nothing: it changes the generation that is looked for. With PCIDs
//! an address space has the same generation when the guest comes back to it, and finds its entries again. Translated
//! code looks here by itself when the TLB misses; see `processor::translate::refill`.

use host::map::zero_and_let_go;

use crate::tlb::{Bank, TlbEntry};

/// Entries of a bank; a power of two. They reach 128 MiB; the memory is only used as they are.
pub const ENTRIES: usize = 32768;

/// How far the places of one address space are from those of the next. Processes that were forked have the same addresses,
/// and would displace each other's entries all the time.
pub const STRIDE: u64 = 2533;

/// Generations are 1 to 4095: the low bits of a tag.
const LAST_GENERATION: u64 = 4095;

/// Words of an entry: page address and generation, the TLB's tag for stores, host page, flags.
pub type Entry = [u64; 4];

#[derive(Debug)]
pub struct Shadow {
    tables: [Box<[Entry]>; 3],
    /// The last generation of an address space, and the last of the kernel's.
    last: u64,
    last_of_kernel: u64,
    /// The generation of each PCID, 0 when nothing of it is remembered.
    by_pcid: Box<[u16]>,
    /// Whether any PCID is remembered.
    has_pcids: bool,
    /// How often the generations of address spaces went round, so that all their entries were dropped.
    pub rounds: u64,
    /// Entries that had to make way for others, though some may have been stale.
    pub evictions: u64,
}

fn index(page: u64, generation: u64) -> usize {
    ((page >> x86::PAGE_SHIFT) + generation * STRIDE) as usize & (ENTRIES - 1)
}

impl Shadow {
    #[must_use]
    pub fn new() -> Shadow {
        let table = || vec![[0; 4]; ENTRIES].into_boxed_slice();
        Shadow {
            tables: [table(), table(), table()],
            last: 0,
            last_of_kernel: 0,
            by_pcid: vec![0; 4096].into_boxed_slice(),
            has_pcids: false,
            rounds: 0,
            evictions: 0,
        }
    }

    /// A generation that no entry of an address space has. What had one before must not be used with it any more: the numbers
    /// go round, and another address space will get the same.
    pub fn new_generation(&mut self) -> u64 {
        if self.last == LAST_GENERATION {
            for bank in [Bank::User, Bank::KernelAc] {
                self.tables[bank as usize].fill([0; 4]);
            }
            self.by_pcid.fill(0);
            self.last = 0;
            self.rounds += 1;
        }
        self.last += 1;
        self.last
    }

    /// A generation that no entry of the kernel's bank has. They are counted apart: the kernel's outlives loads of CR3, and so
    /// must not begin anew because those of address spaces do, nor make them.
    pub fn new_kernel_generation(&mut self) -> u64 {
        if self.last_of_kernel == LAST_GENERATION {
            self.tables[Bank::Kernel as usize].fill([0; 4]);
            self.last_of_kernel = 0;
        }
        self.last_of_kernel += 1;
        self.last_of_kernel
    }

    /// The generation of a PCID: a new one unless `keep` and something of it is remembered.
    pub fn generation_of(&mut self, pcid: u16, keep: bool) -> u64 {
        let known = u64::from(self.by_pcid[usize::from(pcid)]);
        if keep && known != 0 {
            return known;
        }
        let fresh = self.new_generation();
        self.by_pcid[usize::from(pcid)] = fresh as u16;
        self.has_pcids = true;
        fresh
    }

    pub fn forget_pcid(&mut self, pcid: u16) {
        self.by_pcid[usize::from(pcid)] = 0;
    }

    pub fn forget_all_pcids(&mut self) {
        if std::mem::take(&mut self.has_pcids) {
            self.by_pcid.fill(0);
        }
    }

    pub fn fill(&mut self, bank: Bank, generation: u64, entry: &TlbEntry) {
        let place = &mut self.tables[bank as usize][index(entry.read, generation)];
        let tag = entry.read | generation;
        self.evictions += u64::from(place[0] != 0 && place[0] != tag);
        *place = [tag, entry.write, entry.page, entry.flags];
    }

    /// Drops one page of one address space.
    pub fn drop_page(&mut self, bank: Bank, generation: u64, page: u64) {
        let place = &mut self.tables[bank as usize][index(page, generation)];
        if place[0] == page | generation {
            *place = [0; 4];
        }
    }

    /// Whether a page of an address space is remembered.
    #[cfg(test)]
    pub fn holds(&self, bank: Bank, generation: u64, page: u64) -> bool {
        self.tables[bank as usize][index(page, generation)][0] == page | generation
    }

    /// Forgets everything, and gives the memory back until it is used. Generations go on.
    pub fn rest(&mut self) {
        self.tables.iter_mut().for_each(|table| zero_and_let_go(table));
    }

    /// The translations of a bank that have a generation.
    pub fn entries(&self, bank: Bank, generation: u64) -> impl Iterator<Item = TlbEntry> {
        let entries = self.tables[bank as usize].iter().filter(move |entry| entry[0] & LAST_GENERATION == generation);
        entries.map(|entry| TlbEntry {
            read: entry[0] & !LAST_GENERATION,
            write: entry[1],
            page: entry[2],
            flags: entry[3],
        })
    }

    /// The host address of a bank's table, for translated code.
    #[must_use]
    pub fn table_address(&self, bank: Bank) -> u64 {
        self.tables[bank as usize].as_ptr() as u64
    }
}

impl Default for Shadow {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_page_of_two_address_spaces_has_two_places() {
        let mut shadow = Shadow::new();
        let (one, other) = (shadow.new_generation(), shadow.new_generation());
        let entry = |page| TlbEntry { read: 0x7fff_1000, write: 0x7fff_1000, page, flags: 0 };
        shadow.fill(Bank::User, one, &entry(0xa000));
        shadow.fill(Bank::User, other, &entry(0xb000));
        for (generation, page) in [(one, 0xa000), (other, 0xb000)] {
            let place = index(0x7fff_1000, generation);
            assert_eq!(shadow.tables[Bank::User as usize][place], [0x7fff_1000 | generation, 0x7fff_1000, page, 0]);
        }
        shadow.drop_page(Bank::User, one, 0x7fff_1000);
        assert_eq!(shadow.tables[Bank::User as usize][index(0x7fff_1000, one)], [0; 4]);
        assert_ne!(shadow.tables[Bank::User as usize][index(0x7fff_1000, other)], [0; 4]);
    }
}
