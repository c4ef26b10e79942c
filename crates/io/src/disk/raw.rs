//! A disk in a raw file: byte for byte what the guest sees.

use std::io;
use std::path::Path;

use super::host_file::HostFile;
use super::{Buffers, Cache, Medium};

/// What lies behind the last whole sector of a file is no part of the disk.
const SECTOR: u64 = 512;

#[derive(Debug)]
pub struct Raw {
    file: HostFile,
    size: u64,
}

impl Raw {
    /// A raw file, locked as long as the machine is.
    ///
    /// # Errors
    /// As [`HostFile::open`].
    pub fn open(path: &Path, read_only: bool, cache: Cache) -> io::Result<Raw> {
        let file = HostFile::open(path, read_only, cache)?;
        let size = file.length()? / SECTOR * SECTOR;
        Ok(Raw { file, size })
    }
}

impl Medium for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: u64, size: u64, into: &dyn Buffers, to: u64) -> io::Result<()> {
        self.file.read(at, size, into, to)
    }

    fn write(&self, at: u64, size: u64, of: &dyn Buffers, from: u64) -> io::Result<()> {
        self.file.write(at, size, of, from)
    }

    fn write_zeroes(&self, at: u64, size: u64, may_unmap: bool) -> io::Result<()> {
        self.file.zero(at, size, may_unmap)
    }

    fn discard(&self, at: u64, size: u64) -> io::Result<()> {
        self.file.punch(at, size)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn close(&self) {
        self.file.unlock();
    }
}
