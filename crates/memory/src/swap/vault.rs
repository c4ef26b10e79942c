//! Pages sealed in a file. A block is one page, encrypted by AES-256-GCM (NIST SP 800-38D) with a key from the system's
//! randomness that is nowhere but in memory. What proves a block, its tag and the count that is its nonce, is in memory, too:
//! so a block that was damaged, exchanged for another, or set back to what it was before is found.
//!
//! The file has no name: it is gone with its last descriptor, however the process ends.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;

use aes_gcm::aead::{Nonce, Tag};
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit};
use host::random;
use x86::PAGE_SIZE;

use super::{Lost, Page};

/// Free blocks at the end of the file for which it is made shorter: 1 MiB.
const TAIL: usize = 256;

/// What proves a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// Which seal of its vault it is: no two are the same one.
    count: NonZeroU64,
    tag: Tag<Aes256Gcm>,
}

/// The file and its key. Needs no lock: who reads or writes a block has it for himself.
pub struct Vault {
    file: File,
    cipher: Aes256Gcm,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("file", &self.file).finish_non_exhaustive()
    }
}

/// The nonce of a seal. A count never comes again, and neither does a key.
fn nonce(count: NonZeroU64) -> Nonce<Aes256Gcm> {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&count.get().to_le_bytes());
    nonce.into()
}

impl Vault {
    pub fn new(file: File) -> io::Result<Vault> {
        let mut key = [0; 32];
        if !random::fill(&mut key) {
            return Err(io::Error::other("the system has no randomness for a key yet"));
        }
        Ok(Vault { file, cipher: Aes256Gcm::new(&key.into()) })
    }

    /// Encrypts a page for a block. Only what is longer than 64 GiB is ever refused.
    pub fn seal(&self, page: &mut Page, block: u32, count: NonZeroU64) -> io::Result<Seal> {
        let text = page.as_mut_slice().into();
        let tag = self.cipher.encrypt_inout_detached(&nonce(count), &block.to_le_bytes(), text);
        Ok(Seal { count, tag: tag.map_err(|_| io::Error::other("a page cannot be encrypted"))? })
    }

    pub fn write(&self, block: u32, sealed: &Page) -> io::Result<()> {
        self.file.write_all_at(sealed, u64::from(block) * PAGE_SIZE)
    }

    /// Reads a block, and proves that it is what was sealed for it.
    pub fn open(&self, block: u32, seal: Seal) -> Result<Page, Lost> {
        let mut page = [0; PAGE_SIZE as usize];
        self.file.read_exact_at(&mut page, u64::from(block) * PAGE_SIZE).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Lost::CutOff { block },
            _ => Lost::Host { block, error },
        })?;
        let text = page.as_mut_slice().into();
        let proved = self.cipher.decrypt_inout_detached(&nonce(seal.count), &block.to_le_bytes(), text, &seal.tag);
        proved.map_err(|_| Lost::Damaged { block })?;
        Ok(page)
    }

    /// Makes the file shorter. Where it cannot be, it only takes more of the disk.
    pub fn cut(&self, blocks: u32) {
        let _ = self.file.set_len(u64::from(blocks) * PAGE_SIZE);
    }
}

/// Which blocks of the file are given out.
#[derive(Debug)]
pub struct Blocks {
    limit: u32,
    /// Blocks from the beginning of the file up to the last one that is given out.
    end: u32,
    /// Those of them that are not.
    free: BTreeSet<u32>,
    /// Seals so far.
    count: u64,
}

impl Blocks {
    pub fn new(bytes: u64) -> Blocks {
        let limit = u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX);
        Blocks { limit, end: 0, free: BTreeSet::new(), count: 0 }
    }

    /// Gives out a block, the first that is free, and the count to seal it with.
    pub fn take(&mut self) -> Option<(u32, NonZeroU64)> {
        let block = match self.free.pop_first() {
            Some(block) => block,
            None if self.end < self.limit => {
                self.end += 1;
                self.end - 1
            }
            None => return None,
        };
        self.count += 1;
        Some((block, NonZeroU64::new(self.count)?))
    }

    /// Takes a block back; gives the length in blocks that the file may be cut to, when that is worth it.
    pub fn give_back(&mut self, block: u32) -> Option<u32> {
        self.free.insert(block);
        let tail = (0..self.end).rev().zip(self.free.iter().rev()).take_while(|(a, b)| a == *b).take(TAIL).count();
        let worth_it = tail == TAIL || self.free.len() == self.end as usize;
        worth_it.then(|| {
            while self.end > 0 && self.free.remove(&(self.end - 1)) {
                self.end -= 1;
            }
            self.end
        })
    }

    /// Bytes that the file may have.
    pub fn limit(&self) -> u64 {
        u64::from(self.limit) * PAGE_SIZE
    }
}
