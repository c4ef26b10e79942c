//! Snapshots inside an image: what the disk was, and what of it is not what it is now. Source: QEMU 7.2,
//! docs/interop/qcow2.txt, "Snapshots".

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use super::super::host_file::HostFile;
use super::header::{Header, SNAPSHOTS_AT};
use super::tables::{COPIED, Tables, get_table, offset, table_bytes};
use super::{Qcow2, check, damaged};

/// Bytes of an entry before its extra data.
const ENTRY: usize = 40;
/// Size of the machine's state, of the disk; and that is all of the extra data that we write.
const EXTRA: usize = 16;
const MOST_BYTES: usize = 64 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: String,
    pub name: String,
    /// Seconds since 1970.
    pub date: u64,
    /// Of the disk, in bytes.
    pub size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    /// The entry as it is, but for the place of its table.
    raw: Vec<u8>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    let part = bytes.get(at..at + N).and_then(|part| part.try_into().ok());
    part.ok_or_else(|| damaged("the list of snapshots is longer than it can be".into()))
}

/// The snapshots of an image, and how many bytes their list has.
pub fn read(file: &HostFile, header: &Header) -> io::Result<(Vec<Snapshot>, u64)> {
    if header.snapshots == 0 {
        return Ok((Vec::new(), 0));
    }
    let there = file.length()?.saturating_sub(header.snapshots_offset).min(MOST_BYTES as u64);
    let mut bytes = vec![0; there as usize];
    file.get(header.snapshots_offset, &mut bytes)?;
    let mut list = Vec::new();
    let mut at = 0;
    for _ in 0..header.snapshots {
        let extra = u32::from_be_bytes(number(&bytes, at + 36)?) as usize;
        let id_size = usize::from(u16::from_be_bytes(number(&bytes, at + 12)?));
        let name_size = usize::from(u16::from_be_bytes(number(&bytes, at + 14)?));
        if extra > 1024 {
            return Err(damaged(format!("a snapshot has {extra} bytes more than it should")));
        }
        let words = at + ENTRY + extra;
        let end = (words + id_size + name_size).next_multiple_of(8);
        let raw = bytes.get(at..end).ok_or_else(|| damaged("the list of snapshots ends too soon".into()))?.to_vec();
        let text = |from: usize, size: usize| String::from_utf8_lossy(&bytes[from..from + size]).into_owned();
        let size = if extra >= EXTRA { u64::from_be_bytes(number(&bytes, at + ENTRY + 8)?) } else { header.size };
        let (l1_offset, l1_entries) =
            (u64::from_be_bytes(number(&bytes, at)?), u32::from_be_bytes(number(&bytes, at + 8)?));
        let table = u64::from(l1_entries) * 8;
        if !l1_offset.is_multiple_of(header.cluster())
            || l1_offset.checked_add(table).is_none_or(|end| end > file.length().unwrap_or(0))
            || table > 32 << 20
            || u64::from(l1_entries) < header.l1_wanted(size)
        {
            return Err(damaged(format!("the L1 table of snapshot {} is at {l1_offset:#x}", text(words, id_size))));
        }
        list.push(Snapshot {
            id: text(words, id_size),
            name: text(words + id_size, name_size),
            date: u64::from(u32::from_be_bytes(number(&bytes, at + 16)?)),
            size,
            l1_offset,
            l1_entries,
            raw,
        });
        at = end;
    }
    Ok((list, at as u64))
}

fn entry(l1_offset: u64, l1_entries: u32, id: &str, name: &str, size: u64) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut bytes = Vec::new();
    bytes.extend(l1_offset.to_be_bytes());
    bytes.extend(l1_entries.to_be_bytes());
    bytes.extend((id.len() as u16).to_be_bytes());
    bytes.extend((name.len() as u16).to_be_bytes());
    bytes.extend((now.as_secs() as u32).to_be_bytes());
    bytes.extend(now.subsec_nanos().to_be_bytes());
    // The machine's clock and the size of its state: there is none.
    bytes.extend([0; 12]);
    bytes.extend((EXTRA as u32).to_be_bytes());
    bytes.extend(0_u64.to_be_bytes());
    bytes.extend(size.to_be_bytes());
    bytes.extend(id.as_bytes());
    bytes.extend(name.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn no_such(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("it has no snapshot {name:?}"))
}

/// Puts the list of snapshots elsewhere, and then lets the old one go.
fn replace(file: &HostFile, tables: &mut Tables, list: &[Vec<u8>], old_bytes: u64) -> io::Result<()> {
    let (old, cluster) = (tables.header.snapshots_offset, tables.header.cluster());
    let had_any = tables.header.snapshots > 0;
    let at = if list.is_empty() { 0 } else { tables.put_bytes(file, &list.concat())? };
    let mut fields = Vec::from((list.len() as u32).to_be_bytes());
    fields.extend(at.to_be_bytes());
    file.flush()?;
    file.set(SNAPSHOTS_AT, &fields)?;
    tables.header.snapshots = list.len() as u32;
    tables.header.snapshots_offset = at;
    if had_any { tables.release(file, old, old_bytes.div_ceil(cluster)) } else { Ok(()) }
}

/// What the refcounts and the marks must be after the tables were changed.
fn recount(file: &HostFile, tables: &mut Tables) -> io::Result<()> {
    tables.forget();
    check::repair(file, tables)
}

impl Qcow2 {
    /// # Errors
    /// Those of a damaged image.
    pub fn snapshots(&self) -> io::Result<Vec<Snapshot>> {
        Ok(read(&self.file, &self.tables().header)?.0)
    }

    /// Keeps the disk as it is now. Nobody uses it meanwhile.
    ///
    /// # Errors
    /// A name that is taken; those of a damaged image, and the system's.
    pub fn take_snapshot(&self, name: &str) -> io::Result<()> {
        let mut tables = self.changed_tables()?;
        let (list, old_bytes) = read(&self.file, &tables.header)?;
        if name.is_empty() || name.len() > 255 || list.iter().any(|one| one.name == name || one.id == name) {
            let sentence = format!("a snapshot cannot have the name {name:?}, or there is one of this name already");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
        }
        // Every cluster is used by one more from now on: counted first, then named.
        let l1 = tables.l1.clone();
        let plain: Vec<u64> = l1.iter().map(|entry| entry & !COPIED).collect();
        let at = tables.put_table(&self.file, &plain)?;
        for index in 0..l1.len() {
            let table = offset(l1[index]);
            if table == 0 {
                continue;
            }
            let entries = get_table(&self.file, table, tables.header.l2_entries() as usize)?;
            for entry in &entries {
                tables.count_entry(&self.file, *entry)?;
            }
            let unmarked: Vec<u64> = entries.iter().map(|entry| entry & !COPIED).collect();
            self.file.set(table, &table_bytes(&unmarked))?;
            tables.count(&self.file, table)?;
            self.file.set(tables.header.l1_offset + 8 * index as u64, &plain[index].to_be_bytes())?;
            tables.l1[index] = plain[index];
        }
        tables.forget();
        let id = list.iter().filter_map(|one| one.id.parse::<u64>().ok()).max().unwrap_or(0) + 1;
        let mut entries: Vec<Vec<u8>> = list.into_iter().map(|one| one.raw).collect();
        entries.push(entry(at, l1.len() as u32, &id.to_string(), name, self.size));
        replace(&self.file, &mut tables, &entries, old_bytes)
    }

    /// Forgets a snapshot. Nobody uses the disk meanwhile.
    ///
    /// # Errors
    /// As [`Qcow2::take_snapshot`].
    pub fn delete_snapshot(&self, name: &str) -> io::Result<()> {
        let mut tables = self.changed_tables()?;
        let (mut list, old_bytes) = read(&self.file, &tables.header)?;
        let at = list.iter().position(|one| one.name == name || one.id == name).ok_or_else(|| no_such(name))?;
        list.remove(at);
        let entries: Vec<Vec<u8>> = list.into_iter().map(|one| one.raw).collect();
        replace(&self.file, &mut tables, &entries, old_bytes)?;
        // What only it used is not counted any more.
        recount(&self.file, &mut tables)
    }

    /// Makes the disk what it was; what it is now is gone. Nobody uses it meanwhile.
    ///
    /// # Errors
    /// As [`Qcow2::take_snapshot`]; a disk that had another size.
    pub fn apply_snapshot(&self, name: &str) -> io::Result<()> {
        let mut tables = self.changed_tables()?;
        let (list, _) = read(&self.file, &tables.header)?;
        let one = list.iter().find(|one| one.name == name || one.id == name).ok_or_else(|| no_such(name))?;
        if one.size != self.size {
            let sentence = format!("the disk had {} bytes then: make it so large first", one.size);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
        }
        let mut table = get_table(&self.file, one.l1_offset, one.l1_entries as usize)?;
        table.resize(table.len().max(tables.l1.len()), 0);
        let table: Vec<u64> = table.iter().map(|entry| entry & !COPIED).collect();
        // A table of its own, with the snapshot's content; then everything is counted anew.
        tables.move_l1(&self.file, table)?;
        recount(&self.file, &mut tables)
    }
}

/// Counting by entries, for a snapshot that is taken.
impl Tables {
    fn count(&mut self, file: &HostFile, at: u64) -> io::Result<()> {
        let cluster = at >> self.header.cluster_bits;
        let more = self.refcount(file, cluster)?.checked_add(1);
        self.set_refcount(file, cluster, more.ok_or_else(|| io::Error::other("a cluster is used too often"))?)
    }

    fn count_entry(&mut self, file: &HostFile, entry: u64) -> io::Result<()> {
        if let super::Place::Compressed { at, size } = self.place(entry)? {
            let bits = self.header.cluster_bits;
            for cluster in at >> bits..((at + size - 1) >> bits) + 1 {
                self.count(file, cluster << bits)?;
            }
            return Ok(());
        }
        if offset(entry) == 0 { Ok(()) } else { self.count(file, offset(entry)) }
    }
}
