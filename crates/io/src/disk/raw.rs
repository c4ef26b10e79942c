//! A disk in a raw file: byte for byte what the guest sees.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use host::file::{self, Access};

use super::{Buffers, Cache, Medium, ZEROES, pieces};

/// What lies behind the last whole sector of a file is no part of the disk.
const SECTOR: u64 = 512;

#[derive(Debug)]
pub struct Raw {
    file: File,
    /// The same file past the host's cache; what it refuses goes through `file`.
    direct: Option<File>,
    read_only: bool,
    cache: Cache,
    size: u64,
}

/// Opens a regular file and locks it as long as it is used: for others that write, or for all when we write. Where the
/// host's file system knows no locks, nobody can tell.
///
/// # Errors
/// The system's, when it cannot be opened, is no file, or is in use.
pub(crate) fn open_locked(path: &Path, access: Access) -> io::Result<File> {
    let file = file::open(path, access)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    // Two machines that write to one disk ruin it.
    let lock = if access.write { file.try_lock() } else { file.try_lock_shared() };
    if matches!(lock, Err(TryLockError::WouldBlock)) {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another machine uses it"));
    }
    Ok(file)
}

impl Raw {
    /// A raw file, locked as long as the machine is.
    ///
    /// # Errors
    /// As [`open_locked`]; and when its file system cannot be read past the cache although that is wanted.
    pub fn open(path: &Path, read_only: bool, cache: Cache) -> io::Result<Raw> {
        let access = Access { write: !read_only, synchronous: cache == Cache::WriteThrough, direct: false };
        let file = open_locked(path, access)?;
        let direct = match cache {
            Cache::None => Some(file::open(path, Access { direct: true, ..access })?),
            _ => None,
        };
        let size = file.metadata()?.len() / SECTOR * SECTOR;
        Ok(Raw { file, direct, read_only, cache, size })
    }

    /// Does it past the cache if that is wanted and the file takes it so, and through it otherwise.
    fn either(&self, action: impl Fn(&File) -> io::Result<()>) -> io::Result<()> {
        match &self.direct {
            Some(direct) => match action(direct) {
                Err(error) if file::is_refused(&error) => action(&self.file),
                result => result,
            },
            None => action(&self.file),
        }
    }

    fn written(&self) -> io::Result<()> {
        if self.cache == Cache::WriteThrough { self.file.sync_data() } else { Ok(()) }
    }
}

impl Medium for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: u64, size: u64, into: &dyn Buffers, to: u64) -> io::Result<()> {
        self.either(|file| into.take_from(to, size, file, at))
    }

    fn write(&self, at: u64, size: u64, of: &dyn Buffers, from: u64) -> io::Result<()> {
        self.either(|file| of.put_into(from, size, file, at))
    }

    fn write_zeroes(&self, at: u64, size: u64, may_unmap: bool) -> io::Result<()> {
        let result = match may_unmap {
            true => file::punch_hole(&self.file, at, size),
            false => file::zero_range(&self.file, at, size),
        };
        match result {
            Err(error) if file::is_refused(&error) => {
                pieces(size, |done, count| self.file.write_all_at(&ZEROES[..count], at + done))?;
            }
            result => result?,
        }
        self.written()
    }

    fn discard(&self, at: u64, size: u64) -> io::Result<()> {
        match file::punch_hole(&self.file, at, size) {
            // It stays as it is, where the file system gives nothing back.
            Err(error) if !file::is_refused(&error) => Err(error),
            _ => self.written(),
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only || self.cache == Cache::Unsafe { Ok(()) } else { self.file.sync_data() }
    }

    fn close(&self) {
        // Where there was no lock, there is none to let go.
        let _ = self.file.unlock();
    }
}
