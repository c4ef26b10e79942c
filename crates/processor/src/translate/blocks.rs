//! The translated blocks: found by physical address, RIP and mode; dropped when the code they were made of is written.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use x86::{Gpa, Ppn};

use super::lower::{Flags, MapEntry, Mode};

/// What makes a block the right one. The same code at another virtual address is another block, because RIP is built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub gpa: Gpa,
    pub rip: u64,
    pub mode: Mode,
}

#[derive(Debug)]
pub struct Block {
    pub key: Key,
    /// The page that the block's only instruction reaches into, if it does.
    pub second: Option<Ppn>,
    pub entry_host: u64,
    pub entry_slot: u64,
    start: u64,
    size: u32,
    map: Box<[MapEntry]>,
    /// How often a check of several accesses at once failed where a single one might not have.
    pub group_misses: u32,
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

#[derive(Debug, Default)]
pub struct Blocks {
    all: Vec<Block>,
    by_key: AddressMap<Key, u32>,
    by_page: AddressMap<u64, Vec<u32>>,
    pub dropped: u64,
}

/// A guest instruction found by an address in its host code.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    pub rip: u64,
    pub flags: Flags,
}

impl Blocks {
    pub fn find(&self, key: &Key) -> Option<&Block> {
        self.by_key.get(key).map(|index| &self.all[*index as usize])
    }

    /// The number that the next added block will have.
    pub fn next_index(&self) -> u32 {
        self.all.len() as u32
    }

    pub fn by_index(&mut self, index: u32) -> Option<&mut Block> {
        self.all.get_mut(index as usize)
    }

    /// The RIP of an instruction, given relative to its block.
    pub fn rip(&self, block: u32, guest: u16) -> u64 {
        self.all[block as usize].key.rip.wrapping_add(guest.into())
    }

    /// Adds a block. Blocks come in the order of their host addresses.
    pub fn add(
        &mut self,
        key: Key,
        second: Option<Ppn>,
        host: std::ops::Range<u64>,
        entries: (u64, u64),
        map: Vec<MapEntry>,
    ) -> &Block {
        let index = self.next_index();
        let (entry_host, entry_slot) = entries;
        let map = map.into_boxed_slice();
        let (start, size) = (host.start, (host.end - host.start) as u32);
        self.all.push(Block { key, second, entry_host, entry_slot, start, size, map, group_misses: 0 });
        self.by_key.insert(key, index);
        self.by_page.entry(key.gpa.ppn().0).or_default().push(index);
        if let Some(page) = second {
            self.by_page.entry(page.0).or_default().push(index);
        }
        &self.all[index as usize]
    }

    /// Forgets the blocks of a page and tells of each. Their host code stays until the code cache is cleared, but nothing
    /// leads to it once the jump caches have forgotten it: direct links stay inside a page.
    pub fn drop_page(&mut self, page: Ppn, mut forget: impl FnMut(Key)) {
        let Some(indices) = self.by_page.remove(&page.0) else { return };
        for index in &indices {
            let key = self.all[*index as usize].key;
            if self.by_key.get(&key) == Some(index) {
                self.by_key.remove(&key);
                forget(key);
            }
        }
        self.dropped += indices.len() as u64;
    }

    pub fn forget(&mut self, key: &Key) {
        self.by_key.remove(key);
    }

    pub fn clear(&mut self) {
        self.all.clear();
        self.by_key.clear();
        self.by_page.clear();
    }

    /// Gives back the memory of blocks that were cleared.
    pub fn shrink(&mut self) {
        self.all.shrink_to_fit();
        self.by_key.shrink_to_fit();
        self.by_page.shrink_to_fit();
    }

    /// The guest instruction that the host code at `address` belongs to.
    pub fn origin(&self, address: u64) -> Option<Origin> {
        let after = self.all.partition_point(|block| block.start <= address);
        let block = self.all.get(after.checked_sub(1)?)?;
        let offset = u32::try_from(address - block.start).ok().filter(|offset| *offset < block.size)?;
        let after = block.map.partition_point(|entry| entry.host <= offset);
        let entry = block.map.get(after.checked_sub(1)?)?;
        Some(Origin { rip: block.key.rip + u64::from(entry.guest), flags: entry.flags })
    }
}
