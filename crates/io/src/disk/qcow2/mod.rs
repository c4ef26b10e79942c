//! A disk in a qcow2 image: clusters that are there when they are written, what is behind them in another file, compressed
//! clusters, snapshots. Source: QEMU 7.2, docs/interop/qcow2.txt.
//!
//! Requests are carried out side by side. [`Tables`] are locked for as long as they are looked at or changed, and not while
//! data is read or written; a cluster that is freed meanwhile is not used again before the next flush, which waits for all
//! that are under way.

mod check;
mod commit;
mod compressed;
mod create;
pub mod header;
mod snapshots;
mod tables;

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

pub use check::Report;
pub use create::create;
pub use snapshots::{Snapshot, read as snapshots_of};

use super::host_file::HostFile;
use super::{Buffers, Bytes, Cache, Medium, ZEROES};
use compressed::Unpacked;
use header::Header;
use tables::{COPIED, Place, Tables, ZERO};

/// What is written at once into new clusters.
const MOST_NEW: u64 = 4 << 20;

/// The image is not what it should be.
pub(crate) fn damaged(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the image is damaged: {what} (ringzero image check)"))
}

pub struct Qcow2 {
    file: HostFile,
    backing: Option<Box<dyn Medium>>,
    tables: Mutex<Tables>,
    /// Held by those who use clusters that they have found in the tables.
    users: RwLock<()>,
    unpacked: Unpacked,
    size: u64,
    cluster_bits: u32,
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Qcow2").field("file", &self.file).finish_non_exhaustive()
    }
}

/// Zeroes, as a request has them.
struct Zeroes;

impl Buffers for Zeroes {
    fn take_from(&self, _from: u64, _size: u64, _file: &std::fs::File, _at: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn put_into(&self, _from: u64, size: u64, file: &std::fs::File, at: u64) -> io::Result<()> {
        super::pieces(size, |done, count| std::os::unix::fs::FileExt::write_all_at(file, &ZEROES[..count], at + done))
    }

    fn set(&self, _from: u64, _bytes: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn get(&self, _from: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        Ok(())
    }
}

impl Qcow2 {
    /// Opens an image with what lies behind it: exactly if the image says that something does.
    ///
    /// # Errors
    /// A sentence about what is wrong with the image, or not supported; the system's.
    pub fn open(path: &Path, read_only: bool, cache: Cache, backing: Option<Box<dyn Medium>>) -> io::Result<Qcow2> {
        Qcow2::with_file(HostFile::open(path, read_only, cache)?, backing)
    }

    /// As [`Qcow2::open`], of a file that is open.
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub fn with_file(file: HostFile, backing: Option<Box<dyn Medium>>) -> io::Result<Qcow2> {
        let header = Header::read(&file)?;
        match (&header.backing, &backing) {
            (Some((name, _)), None) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("it has the backing file {name}, which was not given"),
                ));
            }
            (None, Some(_)) => return Err(io::Error::new(io::ErrorKind::InvalidInput, "it has no backing file")),
            _ => {}
        }
        let writes = !file.is_read_only();
        if writes && header.incompatible & header::CORRUPT != 0 {
            return Err(damaged("it is marked as corrupt".into()));
        }
        if writes && header.refcount_order != 4 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("its refcounts have {} bits: convert it", 1 << header.refcount_order),
            ));
        }
        let was_dirty = header.incompatible & header::DIRTY != 0;
        let (size, cluster_bits) = (header.size, header.cluster_bits);
        let mut tables = Tables::read(&file, header)?;
        if writes && was_dirty {
            // Whoever wrote to it came to a sudden end.
            check::repair(&file, &mut tables)?;
            set_dirty(&file, &mut tables, false)?;
        }
        Ok(Qcow2 {
            file,
            backing,
            tables: Mutex::new(tables),
            users: RwLock::new(()),
            unpacked: Unpacked::default(),
            size,
            cluster_bits,
        })
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The tables, to be changed.
    fn changed_tables(&self) -> io::Result<MutexGuard<'_, Tables>> {
        let mut tables = self.tables();
        if tables.header.incompatible & header::DIRTY == 0 {
            set_dirty(&self.file, &mut tables, true)?;
        }
        Ok(tables)
    }

    /// Where bytes are, and how many of them are there in a row.
    fn find(&self, at: u64, size: u64) -> io::Result<(Place, u64)> {
        let (first, last) = (at >> self.cluster_bits, (at + size - 1) >> self.cluster_bits);
        let mut tables = self.tables();
        let entries = tables.entries(&self.file, first..last + 1)?;
        let start = tables.place(entries[0])?;
        let mut count = 1;
        for entry in &entries[1..] {
            let place = tables.place(*entry)?;
            let goes_on = match (start, place) {
                (Place::Hole, Place::Hole) | (Place::Zero, Place::Zero) => true,
                (Place::Data { at, is_own }, Place::Data { at: next, is_own: other }) => {
                    next == at + count * self.cluster() && is_own == other
                }
                _ => false,
            };
            if !goes_on {
                break;
            }
            count += 1;
        }
        Ok((start, (count * self.cluster() - at % self.cluster()).min(size)))
    }

    fn read_piece(&self, place: Place, at: u64, size: u64, into: &dyn Buffers, to: u64) -> io::Result<u64> {
        let within = at % self.cluster();
        match place {
            Place::Data { at: start, .. } => self.file.read(start + within, size, into, to)?,
            Place::Zero => into.zero(to, size)?,
            Place::Compressed { at: start, size: packed } => {
                let header = self.tables().header.clone();
                let count = size.min(self.cluster() - within);
                let content = self.unpacked.get(&self.file, &header, start, packed)?;
                into.set(to, &content[within as usize..(within + count) as usize])?;
                return Ok(count);
            }
            Place::Hole => {
                // The backing file may be shorter than the disk.
                let there = self.backing.as_ref().map_or(0, |backing| backing.size().saturating_sub(at).min(size));
                if let (Some(backing), true) = (&self.backing, there > 0) {
                    backing.read(at, there, into, to)?;
                }
                into.zero(to + there, size - there)?;
            }
        }
        Ok(size)
    }

    /// Writes into clusters that are there and nobody else's, or into new ones; gives how many bytes were done.
    fn write_piece(&self, at: u64, size: u64, of: &dyn Buffers, from: u64) -> io::Result<u64> {
        let (place, count) = self.find(at, size)?;
        if let Place::Data { at: start, is_own: true } = place {
            let clusters =
                start >> self.cluster_bits..((start + at % self.cluster() + count - 1) >> self.cluster_bits) + 1;
            if clusters.into_iter().any(|cluster| self.tables().metadata.contains(&cluster)) {
                return Err(damaged(format!("data at {start:#x} would be where tables are")));
            }
            // Linked already: the mark is for what comes.
            self.file.write(start + at % self.cluster(), count, of, from)?;
            return Ok(count);
        }
        self.write_new(at, size.min(MOST_NEW), of, from)
    }

    /// Writes into new clusters, and puts them in the place of what was there. What somebody else has put there meanwhile
    /// stays: then less is done.
    fn write_new(&self, at: u64, size: u64, of: &dyn Buffers, from: u64) -> io::Result<u64> {
        let cluster = self.cluster();
        let first = at >> self.cluster_bits;
        let (old, host, count, is_fresh) = {
            let mut tables = self.changed_tables()?;
            let wanted = ((at + size - 1) >> self.cluster_bits) + 1;
            let entries = tables.entries(&self.file, first..wanted)?;
            let mut fitting = 0;
            for entry in &entries {
                if matches!(tables.place(*entry)?, Place::Data { is_own: true, .. }) {
                    break;
                }
                fitting += 1;
            }
            if fitting == 0 {
                return Ok(0);
            }
            let end = tables.end;
            let (host, count) = tables.reserve(&self.file, fitting)?;
            (entries[..count as usize].to_vec(), host, count, host >= end)
        };
        let result = self.fill_new(&old, first, host, at, size, of, from, is_fresh);
        let mut tables = self.tables();
        let size = match result {
            Ok(size) => size,
            Err(error) => {
                tables.unreserve(&self.file, host..host + count)?;
                return Err(error);
            }
        };
        // Somebody else may have been faster.
        let now = tables.entries(&self.file, first..first + count)?;
        let same = now.iter().zip(&old).take_while(|(now, old)| now == old).count() as u64;
        if same < count {
            tables.unreserve(&self.file, host + same..host + count)?;
        }
        if same == 0 {
            return Ok(0);
        }
        tables.count_reserved(&self.file, host..host + same)?;
        let entries: Vec<u64> = (host..host + same).map(|host| host << self.cluster_bits | COPIED).collect();
        tables.set_entries(&self.file, first, &entries)?;
        for entry in old.iter().take(same as usize).filter(|entry| **entry & !(COPIED | ZERO) != 0) {
            tables.release_entry(&self.file, *entry)?;
        }
        Ok(size.min(((first + same) * cluster).saturating_sub(at)))
    }

    /// Fills new clusters, from `host` on, with what a request writes, and with what was there around it.
    #[expect(clippy::too_many_arguments, reason = "what is written, where it is to the disk, and where in the file")]
    fn fill_new(
        &self,
        old: &[u64],
        first: u64,
        host: u64,
        at: u64,
        size: u64,
        of: &dyn Buffers,
        from: u64,
        is_fresh: bool,
    ) -> io::Result<u64> {
        let cluster = self.cluster();
        let (start, end) = (first * cluster, (first + old.len() as u64) * cluster);
        let size = size.min(end - at);
        let target = |place: u64| (host << self.cluster_bits) + (place - start);
        self.file.write(target(at), size, of, from)?;
        let tail = (at + size, end);
        for (low, high) in [(start, at), tail] {
            if low == high {
                continue;
            }
            let entry = old[((low >> self.cluster_bits) - first) as usize];
            let place = self.tables().place(entry)?;
            if is_fresh && (place == Place::Zero || place == Place::Hole && self.backing.is_none()) {
                continue;
            }
            let mut content = vec![0; (high - low) as usize];
            let bytes = Bytes::new(&mut content);
            // The disk may end within the cluster.
            let there = (high - low).min(self.size.saturating_sub(low));
            if there > 0 {
                self.read_piece(place, low, there, &bytes, 0)?;
            }
            self.file.set(target(low), &content)?;
        }
        Ok(size)
    }

    /// Makes whole clusters read as zeroes, or, for a discard, as anything.
    fn clear(&self, clusters: std::ops::Range<u64>, is_discard: bool, may_unmap: bool) -> io::Result<()> {
        let _using = self.users.read().unwrap_or_else(PoisonError::into_inner);
        let mut next = clusters.start;
        while next < clusters.end {
            let mut tables = self.changed_tables()?;
            let old = tables.entries(&self.file, next..clusters.end)?;
            let has_flag = tables.header.version > 2;
            let mut new = old.clone();
            let mut zeroed = Vec::new();
            for (index, entry) in new.iter_mut().enumerate() {
                let at = (next + index as u64) << self.cluster_bits;
                let is_backed = self.backing.as_ref().is_some_and(|backing| at < backing.size());
                *entry = match tables.place(*entry)? {
                    Place::Zero => *entry,
                    Place::Hole if is_discard || !is_backed => *entry,
                    Place::Data { at, is_own: true } if !may_unmap && !is_discard => {
                        zeroed.push(at);
                        *entry
                    }
                    // Of an old version, there is no way to say so but to write it.
                    _ if is_backed && !has_flag => {
                        zeroed.push(u64::MAX);
                        *entry
                    }
                    _ if is_backed => ZERO,
                    _ => 0,
                };
            }
            if new != old {
                tables.set_entries(&self.file, next, &new)?;
                for (was, _) in old.iter().zip(&new).filter(|(was, is)| was != is && **was & !(COPIED | ZERO) != 0) {
                    tables.release_entry(&self.file, *was)?;
                }
            }
            drop(tables);
            for at in zeroed.iter().filter(|at| **at != u64::MAX) {
                self.file.zero(*at, self.cluster(), false)?;
            }
            if !is_discard && zeroed.contains(&u64::MAX) {
                let end = (next + old.len() as u64) << self.cluster_bits;
                self.write_all(
                    next << self.cluster_bits,
                    end.min(self.size) - (next << self.cluster_bits),
                    &Zeroes,
                    0,
                )?;
            }
            next += old.len() as u64;
        }
        Ok(())
    }

    /// The caller is one of the users.
    fn write_all(&self, mut at: u64, size: u64, of: &dyn Buffers, mut from: u64) -> io::Result<()> {
        let end = at + size;
        while at < end {
            let done = self.write_piece(at, end - at, of, from)?;
            (at, from) = (at + done, from + done);
        }
        Ok(())
    }

    /// The whole clusters of a part of the disk; its last one counts as whole.
    fn whole(&self, at: u64, size: u64) -> std::ops::Range<u64> {
        let end = at + size;
        let last = if end >= self.size { end.div_ceil(self.cluster()) } else { end >> self.cluster_bits };
        at.div_ceil(self.cluster())..last
    }
}

/// Marks an image as being written to, or not any more.
fn set_dirty(file: &HostFile, tables: &mut Tables, is_dirty: bool) -> io::Result<()> {
    let header = &mut tables.header;
    if header.version < 3 {
        return Ok(());
    }
    let features = header.incompatible & !header::DIRTY | if is_dirty { header::DIRTY } else { 0 };
    if is_dirty && header.autoclear != 0 {
        // Whoever keeps more in the image than we know must see that it has changed.
        file.set(header::AUTOCLEAR_AT, &0_u64.to_be_bytes())?;
        header.autoclear = 0;
    }
    if !is_dirty {
        file.flush()?;
    }
    file.set(header::INCOMPATIBLE_AT, &features.to_be_bytes())?;
    file.flush()?;
    header.incompatible = features;
    Ok(())
}

impl Medium for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, mut at: u64, size: u64, into: &dyn Buffers, mut to: u64) -> io::Result<()> {
        let _using = self.users.read().unwrap_or_else(PoisonError::into_inner);
        let end = at + size;
        while at < end {
            let (place, count) = self.find(at, end - at)?;
            let done = self.read_piece(place, at, count, into, to)?;
            (at, to) = (at + done, to + done);
        }
        Ok(())
    }

    fn write(&self, at: u64, size: u64, of: &dyn Buffers, from: u64) -> io::Result<()> {
        let _using = self.users.read().unwrap_or_else(PoisonError::into_inner);
        self.write_all(at, size, of, from)
    }

    fn write_zeroes(&self, at: u64, size: u64, may_unmap: bool) -> io::Result<()> {
        let whole = self.whole(at, size);
        let (low, high) = (whole.start << self.cluster_bits, whole.end << self.cluster_bits);
        if whole.is_empty() {
            return self.write(at, size, &Zeroes, 0);
        }
        if low > at {
            self.write(at, low - at, &Zeroes, 0)?;
        }
        if at + size > high {
            self.write(high, at + size - high, &Zeroes, 0)?;
        }
        self.clear(whole, false, may_unmap)
    }

    fn discard(&self, at: u64, size: u64) -> io::Result<()> {
        let whole = self.whole(at, size);
        if whole.is_empty() { Ok(()) } else { self.clear(whole, true, true) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()?;
        if !self.tables().quarantine.is_empty() {
            // Nobody is at work any more who found a cluster before it was freed; and what frees it is on the disk.
            let _alone = self.users.write().unwrap_or_else(PoisonError::into_inner);
            self.file.flush()?;
            self.tables().end_quarantine();
        }
        Ok(())
    }

    fn close(&self) {
        let mut tables = self.tables();
        if tables.header.incompatible & header::DIRTY != 0 {
            // An image that stays dirty is repaired by who opens it next.
            let _ = set_dirty(&self.file, &mut tables, false);
        }
        drop(tables);
        self.file.unlock();
        if let Some(backing) = &self.backing {
            backing.close();
        }
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests;
