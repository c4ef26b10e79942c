//! The tables of an image: where each cluster of the disk is (L1 and L2), and how often each cluster of the file is used
//! (refcounts). Source: QEMU 7.2, docs/interop/qcow2.txt, "Host cluster management", "Cluster mapping".
//!
//! What is in the file is always what is in memory: a change is written to the file first. So the end of the process loses
//! no table, whenever it comes. Two changes that belong together are in an order in which the end between them costs
//! space and nothing else: a cluster is counted before it is linked, and unlinked before it is not counted any more. For
//! the end of the host the image is marked dirty while it is written to, and its refcounts are made anew then.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;

use super::super::host_file::HostFile;
use super::damaged;
use super::header::{Header, L1_AT, REFCOUNTS_AT};

/// Entries of both levels.
pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
pub const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// L2 tables that are kept in memory: 64 describe 32 GiB with the usual clusters.
const MOST_L2: usize = 64;
const MOST_REFCOUNT_TABLE: usize = (8 << 20) / 8;

/// Where a cluster of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: what the backing file has, or zeroes.
    Hole,
    Zero,
    /// In the file, there; to write only if nobody else uses it.
    Data {
        at: u64,
        is_own: bool,
    },
    Compressed {
        at: u64,
        size: u64,
    },
}

#[derive(Debug)]
pub struct Tables {
    pub header: Header,
    pub l1: Vec<u64>,
    l2: HashMap<u64, Vec<u64>>,
    refcount_table: Vec<u64>,
    blocks: HashMap<usize, Vec<u16>>,
    /// No cluster before this one is free.
    first_free: u64,
    /// Clusters of the file, the last of which may be begun.
    pub end: u64,
    /// Clusters in which tables are.
    pub metadata: HashSet<u64>,
    /// Clusters that were freed since the last flush: what the file on the disk says of them is not known before it.
    pub quarantine: HashSet<u64>,
}

pub fn get_table(file: &HostFile, at: u64, entries: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; entries * 8];
    file.get(at, &mut bytes)?;
    let (list, _) = bytes.as_chunks::<8>();
    Ok(list.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

pub fn table_bytes(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

impl Tables {
    pub fn read(file: &HostFile, header: Header) -> io::Result<Tables> {
        let l1 = get_table(file, header.l1_offset, header.l1_entries as usize)?;
        let entries = (u64::from(header.refcounts_clusters) << header.cluster_bits) / 8;
        let refcount_table = get_table(file, header.refcounts_offset, entries as usize)?;
        let end = file.length()?.div_ceil(header.cluster());
        let mut tables = Tables {
            l1,
            l2: HashMap::new(),
            refcount_table,
            blocks: HashMap::new(),
            first_free: 1,
            end,
            metadata: HashSet::new(),
            quarantine: HashSet::new(),
            header,
        };
        tables.note_metadata();
        Ok(tables)
    }

    fn note_metadata(&mut self) {
        let bits = self.header.cluster_bits;
        let clusters = |at: u64, bytes: u64| at >> bits..(at + bytes).div_ceil(1 << bits);
        self.metadata = HashSet::from([0]);
        self.metadata.extend(clusters(self.header.l1_offset, self.l1.len() as u64 * 8));
        self.metadata.extend(clusters(self.header.refcounts_offset, self.refcount_table.len() as u64 * 8));
        let tables = self.l1.iter().chain(&self.refcount_table).map(|entry| entry & OFFSET);
        self.metadata.extend(tables.filter(|at| *at != 0).map(|at| at >> bits));
    }

    fn cluster(&self) -> u64 {
        self.header.cluster()
    }

    // ---- where clusters are ----------------------------------------------------------------------------------------

    /// A cluster-aligned place inside the file.
    fn checked(&self, what: &str, at: u64) -> io::Result<u64> {
        if at == 0 || !at.is_multiple_of(self.cluster()) || at >> self.header.cluster_bits >= self.end {
            return Err(damaged(format!("{what} would be at {at:#x}")));
        }
        Ok(at)
    }

    fn l2_table(&mut self, file: &HostFile, index: usize) -> io::Result<Option<(u64, &mut Vec<u64>)>> {
        let entry = self.l1.get(index).copied().ok_or_else(|| damaged(format!("there is no L2 table {index}")))?;
        if entry & OFFSET == 0 {
            return Ok(None);
        }
        let at = self.checked("an L2 table", entry & OFFSET)?;
        if !self.l2.contains_key(&at) {
            if self.l2.len() >= MOST_L2 {
                self.l2.clear();
            }
            let table = get_table(file, at, self.header.l2_entries() as usize)?;
            self.l2.insert(at, table);
        }
        Ok(self.l2.get_mut(&at).map(|table| (at, table)))
    }

    /// The L2 entries of clusters of the disk, as far as one table has them; at least one.
    pub fn entries(&mut self, file: &HostFile, clusters: Range<u64>) -> io::Result<Vec<u64>> {
        let per_table = self.header.l2_entries();
        let (index, first) = (clusters.start / per_table, (clusters.start % per_table) as usize);
        let count = (clusters.end - clusters.start).min(per_table - first as u64) as usize;
        Ok(match self.l2_table(file, index as usize)? {
            None => vec![0; count],
            Some((_, table)) => table[first..first + count].to_vec(),
        })
    }

    pub fn place(&self, entry: u64) -> io::Result<Place> {
        if entry & COMPRESSED != 0 {
            let shift = 62 - (self.header.cluster_bits - 8);
            let at = entry & ((1 << shift) - 1);
            let sectors = (entry & !(COMPRESSED | COPIED)) >> shift;
            let size = (sectors + 1) * 512 - at % 512;
            return Ok(Place::Compressed { at, size });
        }
        if self.header.version > 2 && entry & ZERO != 0 {
            return Ok(Place::Zero);
        }
        match entry & OFFSET {
            0 => Ok(Place::Hole),
            at => Ok(Place::Data { at: self.checked("a cluster", at)?, is_own: entry & COPIED != 0 }),
        }
    }

    /// Sets L2 entries of clusters of the disk, all of one table, which is made or made our own first.
    pub fn set_entries(&mut self, file: &HostFile, first: u64, entries: &[u64]) -> io::Result<()> {
        let per_table = self.header.l2_entries();
        let (index, slot) = ((first / per_table) as usize, (first % per_table) as usize);
        let entry = self.l1.get(index).copied().unwrap_or(0);
        if entry & COPIED == 0 {
            let content = match self.l2_table(file, index)? {
                Some((_, table)) => table.clone(),
                None => vec![0; per_table as usize],
            };
            let at = self.new_table(file, &table_bytes(&content))?;
            file.set(self.header.l1_offset + 8 * index as u64, &(at | COPIED).to_be_bytes())?;
            self.l1[index] = at | COPIED;
            self.l2.insert(at, content);
            if entry & OFFSET != 0 {
                self.release(file, entry & OFFSET, 1)?;
            }
        }
        let Some((at, table)) = self.l2_table(file, index)? else { return Err(damaged("an L2 table is gone".into())) };
        file.set(at + 8 * slot as u64, &table_bytes(entries))?;
        table[slot..slot + entries.len()].copy_from_slice(entries);
        Ok(())
    }

    /// A new cluster with a table in it.
    fn new_table(&mut self, file: &HostFile, bytes: &[u8]) -> io::Result<u64> {
        let (cluster, _) = self.reserve(file, 1)?;
        let at = cluster << self.header.cluster_bits;
        file.set(at, bytes)?;
        self.count_reserved(file, cluster..cluster + 1)?;
        self.metadata.insert(cluster);
        Ok(at)
    }

    // ---- how often clusters are used -------------------------------------------------------------------------------

    fn per_block(&self) -> u64 {
        self.cluster() / 2
    }

    /// The block of refcounts that a cluster's is in, if there is one.
    fn block(&mut self, file: &HostFile, index: usize) -> io::Result<Option<&mut Vec<u16>>> {
        let at = self.refcount_table.get(index).copied().unwrap_or(0);
        if at == 0 {
            return Ok(None);
        }
        if !self.blocks.contains_key(&index) {
            let at = self.checked("a block of refcounts", at)?;
            let mut bytes = vec![0; self.cluster() as usize];
            file.get(at, &mut bytes)?;
            let (list, _) = bytes.as_chunks::<2>();
            self.blocks.insert(index, list.iter().map(|count| u16::from_be_bytes(*count)).collect());
        }
        Ok(self.blocks.get_mut(&index))
    }

    pub fn refcount(&mut self, file: &HostFile, cluster: u64) -> io::Result<u16> {
        let per_block = self.per_block();
        let block = self.block(file, (cluster / per_block) as usize)?;
        Ok(block.map_or(0, |block| block[(cluster % per_block) as usize]))
    }

    /// Makes sure that there is a block for a cluster's refcount.
    fn provide_block(&mut self, file: &HostFile, index: usize) -> io::Result<()> {
        if index >= self.refcount_table.len() {
            self.grow_refcount_table(file, index)?;
        }
        if self.refcount_table[index] != 0 {
            return Ok(());
        }
        // It goes to the end of the file, and may have to count itself.
        let per_block = self.per_block();
        let cluster = self.end.max(index as u64 * per_block);
        self.extend(file, cluster + 1)?;
        let at = cluster << self.header.cluster_bits;
        let mut block = vec![0_u16; per_block as usize];
        let counts_itself = cluster / per_block == index as u64;
        if counts_itself {
            block[(cluster % per_block) as usize] = 1;
        }
        file.set(at, &block.iter().flat_map(|count| count.to_be_bytes()).collect::<Vec<_>>())?;
        file.set(self.header.refcounts_offset + 8 * index as u64, &at.to_be_bytes())?;
        self.refcount_table[index] = at;
        self.blocks.insert(index, block);
        self.metadata.insert(cluster);
        if !counts_itself {
            self.provide_block(file, (cluster / per_block) as usize)?;
            self.set_refcount(file, cluster, 1)?;
        }
        Ok(())
    }

    /// A larger refcount table, at the end of the file; twice as large, so that this is seldom done.
    fn grow_refcount_table(&mut self, file: &HostFile, index: usize) -> io::Result<()> {
        let wanted = (index + 1).max(self.refcount_table.len() * 2);
        let clusters = (wanted as u64 * 8).div_ceil(self.cluster());
        let entries = (clusters * self.cluster() / 8) as usize;
        if entries > MOST_REFCOUNT_TABLE {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the image has as many clusters as it can have"));
        }
        let (old, old_bytes) = (self.header.refcounts_offset, self.refcount_table.len() as u64 * 8);
        let first = self.end;
        self.extend(file, first + clusters)?;
        let at = first << self.header.cluster_bits;
        let mut table = self.refcount_table.clone();
        table.resize(entries, 0);
        file.set(at, &table_bytes(&table))?;
        let mut fields = Vec::from(at.to_be_bytes());
        fields.extend((clusters as u32).to_be_bytes());
        file.set(REFCOUNTS_AT, &fields)?;
        self.refcount_table = table;
        self.header.refcounts_offset = at;
        self.header.refcounts_clusters = clusters as u32;
        self.metadata.extend(first..first + clusters);
        for cluster in first..first + clusters {
            self.provide_block(file, (cluster / self.per_block()) as usize)?;
            self.set_refcount(file, cluster, 1)?;
        }
        self.release(file, old, old_bytes.div_ceil(self.cluster()))
    }

    /// Sets a refcount, in the file, too. Its block is there.
    pub fn set_refcount(&mut self, file: &HostFile, cluster: u64, count: u16) -> io::Result<()> {
        let per_block = self.per_block();
        let (index, slot) = ((cluster / per_block) as usize, (cluster % per_block) as usize);
        self.provide_block(file, index)?;
        file.set(self.refcount_table[index] + 2 * slot as u64, &count.to_be_bytes())?;
        if let Some(block) = self.blocks.get_mut(&index) {
            block[slot] = count;
        } else if let Some(block) = self.block(file, index)? {
            block[slot] = count;
        }
        Ok(())
    }

    /// Makes the file so many clusters long.
    fn extend(&mut self, file: &HostFile, end: u64) -> io::Result<()> {
        if end > self.end {
            if end > 1 << (55 - self.header.cluster_bits) {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "the image is as large as it can be"));
            }
            file.set_length(end << self.header.cluster_bits)?;
            self.end = end;
        }
        Ok(())
    }

    fn is_free(&mut self, file: &HostFile, cluster: u64) -> io::Result<bool> {
        let is_held = self.metadata.contains(&cluster) || self.quarantine.contains(&cluster);
        Ok(!is_held && self.refcount(file, cluster)? == 0)
    }

    /// Takes up to `most` free clusters in a row, of which only the memory knows yet: the first, and how many. Those behind
    /// the old end of the file are zeroes, and a row is all of one sort.
    pub fn reserve(&mut self, file: &HostFile, most: u64) -> io::Result<(u64, u64)> {
        let mut first = self.first_free;
        while !self.is_free(file, first)? {
            first += 1;
        }
        self.first_free = first;
        self.provide_block(file, (first / self.per_block()) as usize)?;
        if !self.is_free(file, first)? {
            // The block itself went there.
            return self.reserve(file, most);
        }
        let limit = if first < self.end { self.end } else { u64::MAX };
        let per_block = self.per_block();
        let mut count = 1;
        while count < most
            && first + count < limit
            && !(first + count).is_multiple_of(per_block)
            && self.is_free(file, first + count)?
        {
            count += 1;
        }
        self.extend(file, first + count)?;
        self.set_reserved(file, first..first + count, 1)?;
        self.first_free = first + count;
        Ok((first, count))
    }

    fn set_reserved(&mut self, file: &HostFile, clusters: Range<u64>, count: u16) -> io::Result<()> {
        let per_block = self.per_block();
        for cluster in clusters {
            if let Some(block) = self.block(file, (cluster / per_block) as usize)? {
                block[(cluster % per_block) as usize] = count;
            }
        }
        Ok(())
    }

    /// Gives reserved clusters back.
    pub fn unreserve(&mut self, file: &HostFile, clusters: Range<u64>) -> io::Result<()> {
        self.first_free = self.first_free.min(clusters.start);
        self.set_reserved(file, clusters, 0)
    }

    /// Has the file know of reserved clusters, which are in one block.
    pub fn count_reserved(&mut self, file: &HostFile, clusters: Range<u64>) -> io::Result<()> {
        let per_block = self.per_block();
        let at = self.refcount_table[(clusters.start / per_block) as usize] + 2 * (clusters.start % per_block);
        file.set(at, &1_u16.to_be_bytes().repeat((clusters.end - clusters.start) as usize))
    }

    /// Counts clusters once less; those that nobody uses any more are free after the next flush, and their space goes back
    /// to the host.
    pub fn release(&mut self, file: &HostFile, at: u64, clusters: u64) -> io::Result<()> {
        let first = at >> self.header.cluster_bits;
        for cluster in first..first + clusters {
            let count = self.refcount(file, cluster)?;
            if count == 0 {
                return Err(damaged(format!("the cluster at {at:#x} is used and not counted")));
            }
            self.set_refcount(file, cluster, count - 1)?;
            if count == 1 {
                self.metadata.remove(&cluster);
                self.l2.remove(&(cluster << self.header.cluster_bits));
                self.quarantine.insert(cluster);
                file.punch(cluster << self.header.cluster_bits, self.cluster())?;
            }
        }
        Ok(())
    }

    /// Counts what an L2 entry uses once less.
    pub fn release_entry(&mut self, file: &HostFile, entry: u64) -> io::Result<()> {
        if entry & COMPRESSED != 0 {
            let Place::Compressed { at, size } = self.place(entry)? else { return Ok(()) };
            let bits = self.header.cluster_bits;
            let (first, last) = (at >> bits, (at + size - 1) >> bits);
            return self.release(file, first << bits, last - first + 1);
        }
        match entry & OFFSET {
            0 => Ok(()),
            at => self.release(file, self.checked("a cluster", at)?, 1),
        }
    }

    /// What was freed is on the disk: it can be used again.
    pub fn end_quarantine(&mut self) {
        if let Some(first) = self.quarantine.iter().min() {
            self.first_free = self.first_free.min(*first);
        }
        self.quarantine.clear();
    }

    /// Puts the L1 table elsewhere: with other entries, or more of them.
    pub fn move_l1(&mut self, file: &HostFile, table: Vec<u64>) -> io::Result<()> {
        let (old, old_bytes) = (self.header.l1_offset, self.l1.len() as u64 * 8);
        let at = self.put_table(file, &table)?;
        let mut fields = Vec::from((table.len() as u32).to_be_bytes());
        fields.extend(at.to_be_bytes());
        file.set(L1_AT, &fields)?;
        self.header.l1_offset = at;
        self.header.l1_entries = table.len() as u32;
        self.l1 = table;
        self.release(file, old, old_bytes.div_ceil(self.cluster()).max(1))?;
        self.l2.clear();
        self.note_metadata();
        Ok(())
    }

    /// Writes a table to new clusters in a row, at the end of the file.
    pub fn put_table(&mut self, file: &HostFile, table: &[u64]) -> io::Result<u64> {
        self.put_bytes(file, &table_bytes(table))
    }

    pub fn put_bytes(&mut self, file: &HostFile, bytes: &[u8]) -> io::Result<u64> {
        let clusters = (bytes.len() as u64).div_ceil(self.cluster()).max(1);
        // Blocks that their refcounts need come first, so that they do not come between.
        let mut first = self.end;
        loop {
            let per_block = self.per_block();
            let blocks = first / per_block..=(first + clusters - 1) / per_block;
            for index in blocks {
                self.provide_block(file, index as usize)?;
            }
            if first == self.end {
                break;
            }
            first = self.end;
        }
        self.extend(file, first + clusters)?;
        let at = first << self.header.cluster_bits;
        file.set(at, bytes)?;
        for cluster in first..first + clusters {
            self.set_refcount(file, cluster, 1)?;
            self.metadata.insert(cluster);
        }
        Ok(at)
    }

    /// What is in memory of the file is read anew.
    pub fn forget(&mut self) {
        self.l2.clear();
        self.blocks.clear();
        self.first_free = 1;
    }
}

/// The place in the file that an entry names.
#[must_use]
pub fn offset(entry: u64) -> u64 {
    entry & OFFSET
}

/// For the check.
impl Tables {
    pub fn refcount_blocks(&self) -> usize {
        self.refcount_table.len()
    }

    /// The places of all blocks of refcounts.
    pub fn blocks_in_file(&self) -> impl Iterator<Item = u64> + '_ {
        self.refcount_table.iter().copied().filter(|at| *at != 0)
    }

    /// The clusters that a block counts, each with its count, by the file.
    pub fn counted(&self, file: &HostFile, index: usize) -> io::Result<Vec<(u64, u16)>> {
        let at = self.refcount_table[index];
        if at == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; self.cluster() as usize];
        file.get(self.checked("a block of refcounts", at)?, &mut bytes)?;
        let (list, _) = bytes.as_chunks::<2>();
        let first = index as u64 * self.per_block();
        let counts = list.iter().enumerate().map(|(slot, count)| (first + slot as u64, u16::from_be_bytes(*count)));
        Ok(counts.filter(|(_, count)| *count != 0).collect())
    }
}
