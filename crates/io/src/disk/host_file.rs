//! A file of the host's in which a disk is, with its cache mode, and its lock.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use host::file::{self, Access};

use super::{Buffers, Cache, ZEROES, pieces};

#[derive(Debug)]
pub struct HostFile {
    file: File,
    /// The same file past the host's cache; what it refuses goes through `file`.
    direct: Option<File>,
    read_only: bool,
    cache: Cache,
}

impl HostFile {
    /// Opens a regular file and locks it as long as it is used: against those who write, or against all when we write. Where
    /// the host's file system knows no locks, nobody can tell.
    ///
    /// # Errors
    /// The system's, when it cannot be opened, is no file, is in use, or cannot be read past the cache although that is
    /// wanted.
    pub fn open(path: &Path, read_only: bool, cache: Cache) -> io::Result<HostFile> {
        let access = Access { write: !read_only, synchronous: cache == Cache::WriteThrough, direct: false };
        let file = file::open(path, access)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // Two machines that write to one disk ruin it.
        let lock = if read_only { file.try_lock_shared() } else { file.try_lock() };
        if matches!(lock, Err(TryLockError::WouldBlock)) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another machine uses it"));
        }
        let direct = match cache {
            Cache::None => Some(file::open(path, Access { direct: true, ..access })?),
            _ => None,
        };
        Ok(HostFile { file, direct, read_only, cache })
    }

    /// A file that nobody else knows.
    #[must_use]
    pub fn own(file: File) -> HostFile {
        HostFile { file, direct: None, read_only: false, cache: Cache::Unsafe }
    }

    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// # Errors
    /// The system's.
    pub fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// # Errors
    /// The system's.
    pub fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
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

    /// Reads from `at` on to the request's byte `to` and on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] past the end, and the system's.
    pub fn read(&self, at: u64, size: u64, into: &dyn Buffers, to: u64) -> io::Result<()> {
        self.either(|file| into.take_from(to, size, file, at))
    }

    /// Writes from `at` on, from the request's byte `from` and on.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, at: u64, size: u64, of: &dyn Buffers, from: u64) -> io::Result<()> {
        self.either(|file| of.put_into(from, size, file, at))
    }

    /// Reads bytes of our own, through the cache.
    ///
    /// # Errors
    /// As [`HostFile::read`].
    pub fn get(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)
    }

    /// Writes bytes of our own, through the cache.
    ///
    /// # Errors
    /// The system's.
    pub fn set(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    /// Makes bytes zeroes. With `may_unmap` their space goes back to the file system where it can.
    ///
    /// # Errors
    /// The system's.
    pub fn zero(&self, at: u64, size: u64, may_unmap: bool) -> io::Result<()> {
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

    /// Gives the space of bytes back to the file system, where it can; they stay as they are otherwise.
    ///
    /// # Errors
    /// The system's.
    pub fn punch(&self, at: u64, size: u64) -> io::Result<()> {
        match file::punch_hole(&self.file, at, size) {
            Err(error) if !file::is_refused(&error) => Err(error),
            _ => self.written(),
        }
    }

    fn written(&self) -> io::Result<()> {
        if self.cache == Cache::WriteThrough { self.file.sync_data() } else { Ok(()) }
    }

    /// Returns when all that was written is on the disk, as far as the cache mode has it so.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only || self.cache == Cache::Unsafe { Ok(()) } else { self.file.sync_data() }
    }

    pub fn unlock(&self) {
        // Where there was no lock, there is none to let go.
        let _ = self.file.unlock();
    }
}
