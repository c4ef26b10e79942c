//! Where the bytes of a disk are. A [`Medium`] knows files and formats and nothing of virtio; a device hands it the
//! [`Buffers`] of a request and knows no format.

pub mod chain;
pub mod host_file;
pub mod limit;
pub mod memory;
pub mod qcow2;
pub mod raw;

use std::cell::RefCell;
use std::fs::File;
use std::io;

/// The bytes of one request, wherever they are: a medium moves them piece by piece, or copies them.
pub trait Buffers {
    /// Takes `size` bytes of the request, from its byte `from` on, out of a file at `at`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] when the file ends before, and the system's.
    fn take_from(&self, from: u64, size: u64, file: &File, at: u64) -> io::Result<()>;

    /// Puts `size` bytes of the request, from its byte `from` on, into a file at `at`.
    ///
    /// # Errors
    /// The system's.
    fn put_into(&self, from: u64, size: u64, file: &File, at: u64) -> io::Result<()>;

    /// Copies these bytes to the request's byte `from`.
    ///
    /// # Errors
    /// When the request has not so many.
    fn set(&self, from: u64, bytes: &[u8]) -> io::Result<()>;

    /// Copies from the request's byte `from`.
    ///
    /// # Errors
    /// When the request has not so many.
    fn get(&self, from: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Makes bytes of the request zeroes.
    ///
    /// # Errors
    /// When the request has not so many.
    fn zero(&self, from: u64, size: u64) -> io::Result<()> {
        pieces(size, |at, count| self.set(from + at, &ZEROES[..count]))
    }
}

/// A disk's bytes. It is used by several threads at once; requests that overlap may be done in any order. Whoever calls
/// keeps within the size.
pub trait Medium: Send + Sync {
    /// In bytes.
    fn size(&self) -> u64;

    /// Reads `size` bytes from `at` on to the request's byte `to` and on.
    ///
    /// # Errors
    /// The system's, and those of a damaged image.
    fn read(&self, at: u64, size: u64, into: &dyn Buffers, to: u64) -> io::Result<()>;

    /// Writes `size` bytes from `at` on, from the request's byte `from` and on.
    ///
    /// # Errors
    /// As [`Medium::read`]; what was written then is not known.
    fn write(&self, at: u64, size: u64, of: &dyn Buffers, from: u64) -> io::Result<()>;

    /// Makes bytes zeroes. With `may_unmap` their space may go back to the host.
    ///
    /// # Errors
    /// As [`Medium::write`].
    fn write_zeroes(&self, at: u64, size: u64, may_unmap: bool) -> io::Result<()>;

    /// The bytes are not needed any more: gives their space back to the host, where it can. They read as zeroes then, or as
    /// they were.
    ///
    /// # Errors
    /// As [`Medium::write`].
    fn discard(&self, at: u64, size: u64) -> io::Result<()>;

    /// Returns when all that was written before is on the host's disk, as far as the host knows and the operator wants it.
    ///
    /// # Errors
    /// The system's. What was written before may be lost then.
    fn flush(&self) -> io::Result<()>;

    /// What others may want is let go: locks. It is not used any more.
    fn close(&self) {}

    /// What is known of it, by name.
    fn stats(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// What the host may keep in its memory of what a guest has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Until the guest flushes: a flush is one of the host's file. What the guest saw flushed survives the host's end.
    #[default]
    WriteBack,
    /// Nothing: each write is on the host's disk before it is done.
    WriteThrough,
    /// Nothing of the data: the file is read and written past the host's cache. A flush is one, for what the disk itself
    /// keeps.
    None,
    /// As long as the host likes: flushes do nothing. What the guest saw flushed survives the end of the machine, and not the
    /// host's.
    Unsafe,
}

impl Cache {
    /// # Errors
    /// The names that there are.
    pub fn parse(name: &str) -> Result<Cache, &'static str> {
        match name {
            "writeback" => Ok(Cache::WriteBack),
            "writethrough" => Ok(Cache::WriteThrough),
            "none" => Ok(Cache::None),
            "unsafe" => Ok(Cache::Unsafe),
            _ => Err("writeback, writethrough, none, unsafe"),
        }
    }
}

pub(crate) static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Calls `each` with the start and the size of every piece of so many bytes, none larger than [`ZEROES`].
pub(crate) fn pieces(size: u64, mut each: impl FnMut(u64, usize) -> io::Result<()>) -> io::Result<()> {
    let most = ZEROES.len() as u64;
    let mut at = 0;
    while at < size {
        let count = (size - at).min(most);
        each(at, count as usize)?;
        at += count;
    }
    Ok(())
}

/// Bytes of ours as those of a request.
#[derive(Debug)]
pub struct Bytes<'a>(RefCell<&'a mut [u8]>);

impl<'a> Bytes<'a> {
    pub fn new(bytes: &'a mut [u8]) -> Bytes<'a> {
        Bytes(RefCell::new(bytes))
    }

    fn with<T>(&self, from: u64, size: u64, action: impl FnOnce(&mut [u8]) -> T) -> io::Result<T> {
        let mut bytes = self.0.borrow_mut();
        let start = usize::try_from(from).ok();
        let part = start.and_then(|start| bytes.get_mut(start..start.checked_add(usize::try_from(size).ok()?)?));
        part.map(action).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Buffers for Bytes<'_> {
    fn take_from(&self, from: u64, size: u64, file: &File, at: u64) -> io::Result<()> {
        self.with(from, size, |bytes| std::os::unix::fs::FileExt::read_exact_at(file, bytes, at))?
    }

    fn put_into(&self, from: u64, size: u64, file: &File, at: u64) -> io::Result<()> {
        self.with(from, size, |bytes| std::os::unix::fs::FileExt::write_all_at(file, bytes, at))?
    }

    fn set(&self, from: u64, bytes: &[u8]) -> io::Result<()> {
        self.with(from, bytes.len() as u64, |own| own.copy_from_slice(bytes))
    }

    fn get(&self, from: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.with(from, bytes.len() as u64, |own| bytes.copy_from_slice(own))
    }
}
