//! The file that kept translations are in: groups of records, one for each guest page and kind of code.
//!
//! ```text
//!     magic, version, place of the index, its tag
//!     groups, one behind the other
//!     index: of each group its key, place, size, hour of last use, and tag
//! ```
//!
//! Code read from this file is run, so nothing of it is believed before its tag is right: a BLAKE3 keyed hash with a secret
//! of the user's. The index is read and checked when the file is opened, a group when it is wanted; what was checked is a
//! copy that nobody else can change. A file of another version, or one that is damaged anywhere, gives fewer translations and
//! nothing else.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::fs::FileExt;

/// Which code a group holds: the page's number in virtual memory, all that a translation depends on besides bytes, and the
/// system that it is of, so that two kernels at one address do not share groups. 0 is code that any system may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupKey {
    pub page: u64,
    pub kind: u32,
    pub system: u32,
}

impl GroupKey {
    /// Bytes of a packed key.
    pub const SIZE: usize = 16;

    pub fn pack(self) -> [u8; GroupKey::SIZE] {
        let mut bytes = [0; GroupKey::SIZE];
        bytes[..8].copy_from_slice(&self.page.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.kind.to_le_bytes());
        bytes[12..].copy_from_slice(&self.system.to_le_bytes());
        bytes
    }

    pub fn unpack(bytes: &[u8]) -> Option<GroupKey> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let page = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
        Some(GroupKey { page, kind: word(8)?, system: word(12)? })
    }
}

/// What a file must be made for, and with.
#[derive(Clone)]
pub struct Seal {
    pub secret: [u8; 32],
    pub version: [u8; 32],
}

#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub key: GroupKey,
    /// The hour of the last use, since 1970.
    pub used: u32,
    pub size: u32,
    offset: u64,
    tag: [u8; 32],
}

const MAGIC: [u8; 16] = *b"ringzero code 2\n";
const HEADER: usize = 16 + 32 + 8 + 8 + 32;
const ENTRY: usize = GroupKey::SIZE + 4 + 4 + 8 + 32;
/// A larger index is none of ours.
const MOST_GROUPS: u64 = 1 << 18;

impl Seal {
    fn header(&self, index_at: u64, groups: u64) -> [u8; HEADER - 32] {
        let mut header = [0; HEADER - 32];
        header[..16].copy_from_slice(&MAGIC);
        header[16..48].copy_from_slice(&self.version);
        header[48..56].copy_from_slice(&index_at.to_le_bytes());
        header[56..64].copy_from_slice(&groups.to_le_bytes());
        header
    }

    fn index_tag(&self, header: &[u8], index: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(index).update(header).update(b"index");
        *hasher.finalize().as_bytes()
    }

    fn group_tag(&self, key: GroupKey, records: &[u8]) -> blake3::Hash {
        // The records first: their whole chunks are then hashed side by side.
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(records).update(&key.pack()).update(&self.version).update(b"group").finalize()
    }
}

impl Entry {
    fn pack(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[..GroupKey::SIZE].copy_from_slice(&self.key.pack());
        bytes[16..20].copy_from_slice(&self.used.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.offset.to_le_bytes());
        bytes[32..].copy_from_slice(&self.tag);
        bytes
    }

    fn unpack(bytes: &[u8]) -> Option<Entry> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let long = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Entry {
            key: GroupKey::unpack(bytes)?,
            used: word(16)?,
            size: word(20)?,
            offset: long(24)?,
            tag: bytes.get(32..64)?.try_into().ok()?,
        })
    }
}

#[derive(Debug)]
pub struct KeptFile {
    file: File,
    pub entries: Vec<Entry>,
    by_key: HashMap<GroupKey, u32>,
}

impl KeptFile {
    /// Reads the index. `None` when the file is not one that this seal made, whole.
    pub fn open(file: File, seal: &Seal) -> Option<KeptFile> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let (header, tag) = header.split_at(HEADER - 32);
        let index_at = u64::from_le_bytes(header[48..56].try_into().ok()?);
        let groups = u64::from_le_bytes(header[56..64].try_into().ok()?);
        if header != seal.header(index_at, groups) || groups > MOST_GROUPS {
            return None;
        }
        let mut index = vec![0; groups as usize * ENTRY];
        file.read_exact_at(&mut index, index_at).ok()?;
        if blake3::Hash::from(seal.index_tag(header, &index)) != *<&[u8; 32]>::try_from(tag).ok()? {
            return None;
        }
        let entries: Vec<_> = index.chunks_exact(ENTRY).map_while(Entry::unpack).collect();
        let by_key = entries.iter().enumerate().map(|(place, entry)| (entry.key, place as u32)).collect();
        Some(KeptFile { file, entries, by_key })
    }

    #[must_use]
    pub fn find(&self, key: GroupKey) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// Reads the records of a group; false, and none, when they are not what was written.
    #[must_use]
    pub fn read(&self, place: u32, seal: &Seal, records: &mut Vec<u8>) -> bool {
        let entry = &self.entries[place as usize];
        records.resize(entry.size as usize, 0);
        let good =
            self.file.read_exact_at(records, entry.offset).is_ok() && seal.group_tag(entry.key, records) == entry.tag;
        if !good {
            records.clear();
        }
        good
    }

    /// Bytes of all groups.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.entries.iter().map(|entry| u64::from(entry.size)).sum()
    }
}

/// Writes a whole file, group by group.
pub struct Writer<'a> {
    out: BufWriter<File>,
    at: u64,
    entries: Vec<Entry>,
    seal: &'a Seal,
}

impl<'a> Writer<'a> {
    pub fn new(file: File, seal: &'a Seal) -> io::Result<Writer<'a>> {
        let mut out = BufWriter::with_capacity(1 << 18, file);
        out.write_all(&[0; HEADER])?;
        Ok(Writer { out, at: HEADER as u64, entries: Vec::new(), seal })
    }

    pub fn add(&mut self, key: GroupKey, used: u32, records: &[u8]) -> io::Result<()> {
        let size = u32::try_from(records.len()).map_err(|_| io::Error::other("a group of 4 GiB"))?;
        let tag = self.seal.group_tag(key, records).into();
        self.out.write_all(records)?;
        self.entries.push(Entry { key, used, size, offset: self.at, tag });
        self.at += u64::from(size);
        Ok(())
    }

    /// Writes the index, and last of all the header that makes the file one.
    pub fn finish(mut self) -> io::Result<()> {
        let index: Vec<u8> = self.entries.iter().flat_map(Entry::pack).collect();
        self.out.write_all(&index)?;
        let header = self.seal.header(self.at, self.entries.len() as u64);
        let tag = self.seal.index_tag(&header, &index);
        self.out.rewind()?;
        self.out.write_all(&header)?;
        self.out.write_all(&tag)?;
        self.out.flush()
    }
}
