//! A disk in memory, gone with the machine.

use std::io;
use std::sync::{PoisonError, RwLock};

use super::{Buffers, Medium};

#[derive(Debug)]
pub struct Memory {
    bytes: RwLock<Vec<u8>>,
    size: u64,
}

impl Memory {
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Memory {
        Memory { size: bytes.len() as u64, bytes: RwLock::new(bytes) }
    }

    fn change(&self, at: u64, size: u64, action: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        let part = bytes.get_mut(at as usize..).and_then(|rest| rest.get_mut(..size as usize));
        action(part.ok_or(io::ErrorKind::UnexpectedEof)?)
    }
}

impl Medium for Memory {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: u64, size: u64, into: &dyn Buffers, to: u64) -> io::Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let part = bytes.get(at as usize..).and_then(|rest| rest.get(..size as usize));
        into.set(to, part.ok_or(io::ErrorKind::UnexpectedEof)?)
    }

    fn write(&self, at: u64, size: u64, of: &dyn Buffers, from: u64) -> io::Result<()> {
        self.change(at, size, |part| of.get(from, part))
    }

    fn write_zeroes(&self, at: u64, size: u64, _may_unmap: bool) -> io::Result<()> {
        self.change(at, size, |part| {
            part.fill(0);
            Ok(())
        })
    }

    fn discard(&self, at: u64, size: u64) -> io::Result<()> {
        self.write_zeroes(at, size, true)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
