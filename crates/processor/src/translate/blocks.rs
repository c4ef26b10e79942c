//! The translated blocks: found by physical address, RIP and mode; dropped when the code they were made of is written.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use x86::{Gpa, PAGE_MASK, Ppn};

use super::lower::{Flags, MapEntry, Mode};

/// What makes a block the right one. The same code at another virtual address is another block, because RIP is built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub gpa: Gpa,
    pub rip: u64,
    pub mode: Mode,
}

impl Key {
    /// That of the block which begins at an offset of the same page.
    pub fn beside(&self, offset: u16) -> Key {
        let at = |address: u64| address & !PAGE_MASK | u64::from(offset);
        Key { gpa: Gpa(at(self.gpa.0)), rip: at(self.rip), mode: self.mode }
    }
}

#[derive(Debug)]
pub struct Block {
    pub key: Key,
    /// The page that the block's only instruction reaches into, if it does.
    pub second: Option<Ppn>,
    start: u64,
    size: u32,
    /// Where its part of the map begins, and how long it is.
    map: u64,
    map_size: u32,
    /// The number of its first site.
    first_site: u32,
    /// The next older block of the same page, and of the second page. When that is gone, so are all that follow it.
    next: [u32; 2],
}

/// Keys are addresses: a multiplication spreads them well, and nobody can choose them to collide but the guest, which
/// would only slow itself.
#[derive(Default)]
pub struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(29) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

type AddressMap<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// What a lookup wants to know, kept beside the key: most lookups look at no block.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub index: u32,
    pub is_single: bool,
    pub entry_host: u64,
    pub entry_slot: u64,
}

#[derive(Debug, Default)]
pub struct Blocks {
    /// In the order in which they were made, which is that of their numbers; the oldest go first.
    all: VecDeque<Block>,
    /// The number of the oldest.
    oldest: u32,
    /// The maps of all blocks, one behind the other, and how many entries went with their blocks.
    map: VecDeque<MapEntry>,
    map_gone: u64,
    by_key: AddressMap<Key, Known>,
    /// The newest block of each page.
    by_page: AddressMap<u64, u32>,
    pub dropped: u64,
}

/// A guest instruction found by an address in its host code.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    pub rip: u64,
    pub flags: Flags,
}

impl Blocks {
    pub fn find(&self, key: &Key) -> Option<Known> {
        self.by_key.get(key).copied()
    }

    /// The number that the next added block will have.
    pub fn next_index(&self) -> u32 {
        self.oldest.wrapping_add(self.all.len() as u32)
    }

    /// How many blocks there are, and entries in their maps.
    pub fn sizes(&self) -> (usize, usize) {
        (self.all.len(), self.map.len())
    }

    pub fn by_index(&mut self, index: u32) -> Option<&mut Block> {
        self.all.get_mut(index.wrapping_sub(self.oldest) as usize)
    }

    fn get(&self, index: u32) -> Option<&Block> {
        self.all.get(index.wrapping_sub(self.oldest) as usize)
    }

    /// Whether the block of that number still has its code.
    pub fn is_there(&self, index: u32) -> bool {
        self.get(index).is_some()
    }

    /// The host address of the oldest block.
    pub fn oldest_address(&self) -> Option<u64> {
        Some(self.all.front()?.start)
    }

    /// The key and second page of the oldest block.
    pub fn oldest(&self) -> Option<(Key, Option<Ppn>)> {
        self.all.front().map(|block| (block.key, block.second))
    }

    /// Gives the oldest block up, of which nothing is found any more, and its code; tells the number of the first site that
    /// is still wanted.
    pub fn pop_oldest(&mut self, next_site: u32) -> u32 {
        if let Some(block) = self.all.pop_front() {
            if self.by_key.get(&block.key).is_some_and(|known| known.index == self.oldest) {
                self.by_key.remove(&block.key);
            }
            self.map.drain(..block.map_size as usize);
            self.map_gone += u64::from(block.map_size);
            self.oldest = self.oldest.wrapping_add(1);
        }
        self.all.front().map_or(next_site, |block| block.first_site)
    }

    /// The RIP of an instruction, given relative to its block.
    pub fn rip(&self, block: u32, guest: u16) -> u64 {
        self.all[block.wrapping_sub(self.oldest) as usize].key.rip.wrapping_add(guest.into())
    }

    /// Adds a block. Blocks come in the order of their host addresses, which go round.
    pub fn add(
        &mut self,
        key: Key,
        second: Option<Ppn>,
        host: std::ops::Range<u64>,
        entries: (u64, u64),
        map: &[MapEntry],
        first_site: u32,
    ) {
        let index = self.next_index();
        let (entry_host, entry_slot) = entries;
        let (start, size) = (host.start, (host.end - host.start) as u32);
        let next = [
            self.by_page.insert(key.gpa.ppn().0, index),
            // Two neighbours in virtual memory may be the same page.
            second.filter(|page| *page != key.gpa.ppn()).and_then(|page| self.by_page.insert(page.0, index)),
        ];
        // A block that is gone ends a list.
        let gone = self.oldest.wrapping_sub(1);
        self.all.push_back(Block {
            key,
            second,
            start,
            size,
            map: self.map_gone + self.map.len() as u64,
            map_size: map.len() as u32,
            first_site,
            next: next.map(|next| next.unwrap_or(gone)),
        });
        self.map.extend(map);
        self.by_key.insert(key, Known { index, is_single: second.is_none(), entry_host, entry_slot });
    }

    /// The numbers of the sites of each block of a page, up to `next_site`.
    pub fn sites_of_page(&self, page: Ppn, next_site: u32) -> impl Iterator<Item = std::ops::Range<u32>> {
        let mut index = self.by_page.get(&page.0).copied();
        std::iter::from_fn(move || {
            let here = index?;
            let block = self.get(here)?;
            index = Some(block.next[usize::from(block.key.gpa.ppn() != page)]);
            let end = self.get(here.wrapping_add(1)).map_or(next_site, |next| next.first_site);
            Some(block.first_site..end)
        })
    }

    /// Forgets the blocks of a page and tells of each. Their host code stays until the code cache is cleared, but nothing
    /// leads to it once the jump caches have forgotten it: direct links stay inside a page.
    pub fn drop_page(&mut self, page: Ppn, mut forget: impl FnMut(Key)) {
        let Some(mut index) = self.by_page.remove(&page.0) else { return };
        while let Some(block) = self.all.get(index.wrapping_sub(self.oldest) as usize) {
            let key = block.key;
            if self.by_key.get(&key).is_some_and(|known| known.index == index) {
                self.by_key.remove(&key);
                forget(key);
            }
            self.dropped += 1;
            index = block.next[usize::from(key.gpa.ppn() != page)];
        }
    }

    pub fn forget(&mut self, key: &Key) {
        self.by_key.remove(key);
    }

    pub fn clear(&mut self) {
        self.oldest = self.next_index();
        self.all.clear();
        self.map_gone += self.map.len() as u64;
        self.map.clear();
        self.by_key.clear();
        self.by_page.clear();
    }

    /// Gives back the memory of blocks that were cleared.
    pub fn shrink(&mut self) {
        self.all.shrink_to_fit();
        self.map.shrink_to_fit();
        self.by_key.shrink_to_fit();
        self.by_page.shrink_to_fit();
    }

    /// The block whose host code is at `address`.
    pub fn holder(&self, address: u64) -> Option<&Block> {
        // The order of addresses, with what is below the oldest block behind what is above it.
        let oldest = self.all.front()?.start;
        let place = |address: u64| address.wrapping_sub(oldest);
        let after = self.all.partition_point(|block| place(block.start) <= place(address));
        let block = self.all.get(after.checked_sub(1)?)?;
        address.checked_sub(block.start).is_some_and(|offset| offset < u64::from(block.size)).then_some(block)
    }

    /// The guest instruction that the host code at `address` belongs to.
    pub fn origin(&self, address: u64) -> Option<Origin> {
        let block = self.holder(address)?;
        let offset = (address - block.start) as u32;
        let first = (block.map - self.map_gone) as usize;
        let map = self.map.range(first..first + block.map_size as usize);
        let entry = map.take_while(|entry| entry.host <= offset).last()?;
        Some(Origin { rip: block.key.rip + u64::from(entry.guest), flags: entry.flags })
    }
}
