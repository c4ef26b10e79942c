//! The block device: a disk of 512-byte sectors in a file or in memory. Source: VIRTIO 1.2, 5.2 "Block Device".

use std::borrow::Cow;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use super::queue::Chain;
use super::{Answer, Backend};

const DEVICE_TYPE: u16 = 2;
/// A mass storage controller: what systems expect of a virtio disk.
const PCI_CLASS: u32 = 0x01_0000;
const SECTOR: u64 = 512;

/// 5.2.3 "Feature bits".
mod offered {
    pub const SEGMENTS: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const BLOCK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const QUEUES: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// 5.2.6 "Device Operation": types and statuses of requests.
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_SERIAL: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A request begins with its type, 4 bytes of nothing, and its first sector.
const HEADER_BYTES: u64 = 16;
const SERIAL_BYTES: usize = 20;
/// A segment of a discard or write zeroes: first sector, number of sectors, flags.
const SEGMENT_BYTES: u64 = 16;
const MAY_UNMAP: u32 = 1;
/// How many segments one such request may have, and how many sectors each: 16 MiB are written in a fraction of a second.
const MOST_SEGMENTS: u32 = 16;
const MOST_SECTORS: u32 = 32768;
/// Buffers of a request beside its header and status: two less than a queue has descriptors.
const MOST_BUFFERS: u32 = super::queue::MOST_ENTRIES as u32 - 2;
/// How much is copied at a time.
const PIECE: usize = 128 << 10;

/// Where a disk's bytes are.
#[derive(Debug)]
enum Medium {
    File(File),
    /// Gone with the machine.
    Memory(RwLock<Vec<u8>>),
}

/// A request that fails: with which status.
struct Failed(u8);

impl From<io::Error> for Failed {
    fn from(_: io::Error) -> Self {
        Failed(FAILED)
    }
}

/// What a disk is to its guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    pub read_only: bool,
    /// Up to 20 ASCII characters; the guest's system names the disk by it.
    pub serial: String,
    /// Queues, each with a thread of its own: one a processor.
    pub queues: u16,
}

#[derive(Debug)]
pub struct Block {
    medium: Medium,
    disk: Disk,
    sectors: u64,
    config: Vec<u8>,
}

impl Block {
    /// A disk in a raw file, locked as long as the machine is. What lies behind its last whole sector is no part of it.
    ///
    /// # Errors
    /// The system's, when the file cannot be opened, is none, or another machine has it: any at all for one that writes.
    pub fn open(path: &Path, disk: Disk) -> io::Result<Block> {
        let file = File::options().read(true).write(!disk.read_only).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // Two machines that write to one disk ruin it. Where the host's file system knows no locks, nobody can tell.
        let lock = if disk.read_only { file.try_lock_shared() } else { file.try_lock() };
        if matches!(lock, Err(TryLockError::WouldBlock)) {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another machine uses it"));
        }
        Ok(Block::new(Medium::File(file), metadata.len() / SECTOR, disk))
    }

    /// A disk in memory.
    #[must_use]
    pub fn in_memory(bytes: Vec<u8>, disk: Disk) -> Block {
        let sectors = bytes.len() as u64 / SECTOR;
        Block::new(Medium::Memory(RwLock::new(bytes)), sectors, disk)
    }

    fn new(medium: Medium, sectors: u64, mut disk: Disk) -> Block {
        disk.queues = disk.queues.clamp(1, 16);
        // 5.2.4 "Device configuration layout".
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &sectors.to_le_bytes());
        put(12, &MOST_BUFFERS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(34, &disk.queues.to_le_bytes());
        for at in [36, 48] {
            put(at, &MOST_SECTORS.to_le_bytes());
            put(at + 4, &MOST_SEGMENTS.to_le_bytes());
        }
        put(44, &1_u32.to_le_bytes());
        Block { medium, disk, sectors, config }
    }

    /// The place of `bytes` bytes from a sector on, all within the disk.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, Failed> {
        let end = sector.checked_add(bytes.div_ceil(SECTOR)).ok_or(Failed(FAILED))?;
        if end > self.sectors || !bytes.is_multiple_of(SECTOR) {
            return Err(Failed(FAILED));
        }
        Ok(sector * SECTOR)
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        match &self.medium {
            Medium::File(file) => file.read_exact_at(bytes, at),
            Medium::Memory(all) => {
                let all = all.read().unwrap_or_else(PoisonError::into_inner);
                let there = all.get(at as usize..).and_then(|rest| rest.get(..bytes.len()));
                bytes.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match &self.medium {
            Medium::File(file) => file.write_all_at(bytes, at),
            Medium::Memory(all) => {
                let mut all = all.write().unwrap_or_else(PoisonError::into_inner);
                let there = all.get_mut(at as usize..).and_then(|rest| rest.get_mut(..bytes.len()));
                there.ok_or(io::ErrorKind::WriteZero)?.copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Returns when all that was written before is on the host's disk, as far as the host knows.
    fn flush(&self) -> Result<(), Failed> {
        match &self.medium {
            Medium::File(file) if !self.disk.read_only => Ok(file.sync_data()?),
            _ => Ok(()),
        }
    }

    /// Reads `bytes` bytes of sectors to the chain's buffers.
    fn read(&self, sector: u64, chain: &Chain<'_>, bytes: u64) -> Result<(), Failed> {
        let start = self.place(sector, bytes)?;
        let mut piece = vec![0; PIECE.min(bytes as usize)];
        for at in (0..bytes).step_by(PIECE) {
            let piece = &mut piece[..(bytes - at).min(PIECE as u64) as usize];
            self.read_at(start + at, piece)?;
            if !chain.write(at, piece) {
                return Err(Failed(FAILED));
            }
        }
        Ok(())
    }

    fn write(&self, sector: u64, chain: &Chain<'_>) -> Result<(), Failed> {
        let bytes = chain.readable_bytes() - HEADER_BYTES;
        let start = self.place(sector, bytes)?;
        let mut piece = vec![0; PIECE.min(bytes as usize)];
        for at in (0..bytes).step_by(PIECE) {
            let piece = &mut piece[..(bytes - at).min(PIECE as u64) as usize];
            if !chain.read(HEADER_BYTES + at, piece) {
                return Err(Failed(FAILED));
            }
            self.write_at(start + at, piece)?;
        }
        Ok(())
    }

    /// Discard and write zeroes: 5.2.6.2 says which flags each may have. A discarded sector may read as anything; as zeroes
    /// here.
    fn clear(&self, chain: &Chain<'_>, known_flags: u32) -> Result<(), Failed> {
        let bytes = chain.readable_bytes() - HEADER_BYTES;
        if !bytes.is_multiple_of(SEGMENT_BYTES) || !(1..=u64::from(MOST_SEGMENTS)).contains(&(bytes / SEGMENT_BYTES)) {
            return Err(Failed(FAILED));
        }
        for at in (HEADER_BYTES..HEADER_BYTES + bytes).step_by(SEGMENT_BYTES as usize) {
            let (mut first, mut count, mut flags) = ([0; 8], [0; 4], [0; 4]);
            if !(chain.read(at, &mut first) && chain.read(at + 8, &mut count) && chain.read(at + 12, &mut flags)) {
                return Err(Failed(FAILED));
            }
            if u32::from_le_bytes(flags) & !known_flags != 0 {
                return Err(Failed(UNSUPPORTED));
            }
            let count = u32::from_le_bytes(count);
            if count > MOST_SECTORS {
                return Err(Failed(FAILED));
            }
            let bytes = u64::from(count) * SECTOR;
            let start = self.place(u64::from_le_bytes(first), bytes)?;
            let zeroes = vec![0; PIECE.min(bytes as usize)];
            for at in (0..bytes).step_by(PIECE) {
                self.write_at(start + at, &zeroes[..(bytes - at).min(PIECE as u64) as usize])?;
            }
        }
        Ok(())
    }

    /// Carries a request out, whose last byte that can be written is its status. Gives how many bytes before that it wrote.
    fn carry_out(&self, features: u64, chain: &Chain<'_>, room: u64) -> Result<u64, Failed> {
        let mut header = [0; HEADER_BYTES as usize];
        if !chain.read(0, &mut header) {
            return Err(Failed(FAILED));
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let kind = u32::from_le_bytes([a, b, c, d]);
        if self.disk.read_only && matches!(kind, WRITE | DISCARD | WRITE_ZEROES) {
            return Err(Failed(FAILED));
        }
        match kind {
            READ => return self.read(sector, chain, room).map(|()| room),
            WRITE => self.write(sector, chain)?,
            FLUSH => return self.flush().map(|()| 0),
            GET_SERIAL => {
                let mut serial = [0; SERIAL_BYTES];
                for (byte, letter) in serial.iter_mut().zip(self.disk.serial.bytes()) {
                    *byte = letter;
                }
                let size = room.min(SERIAL_BYTES as u64);
                return if chain.write(0, &serial[..size as usize]) { Ok(size) } else { Err(Failed(FAILED)) };
            }
            DISCARD if features & offered::DISCARD != 0 => self.clear(chain, 0)?,
            WRITE_ZEROES if features & offered::WRITE_ZEROES != 0 => self.clear(chain, MAY_UNMAP)?,
            _ => return Err(Failed(UNSUPPORTED)),
        }
        // 5.2.6.2: a driver that knows nothing of flushes takes it that what is done stays done.
        if features & offered::FLUSH == 0 {
            self.flush()?;
        }
        Ok(0)
    }
}

impl Backend for Block {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        let common = offered::SEGMENTS | offered::BLOCK_SIZE | offered::FLUSH | offered::QUEUES;
        common
            | match (&self.medium, self.disk.read_only) {
                (_, true) => offered::READ_ONLY,
                // A discard that gives nothing back to the host's file system is not worth a guest's time.
                (Medium::File(_), false) => offered::WRITE_ZEROES,
                (Medium::Memory(_), false) => offered::WRITE_ZEROES | offered::DISCARD,
            }
    }

    fn queues(&self) -> u16 {
        self.disk.queues
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.config)
    }

    fn end(&self) {
        if let Medium::File(file) = &self.medium {
            // Where there was no lock, there is none to let go.
            let _ = file.unlock();
        }
    }

    fn serve(&self, _queue: u16, features: u64, chain: &Chain<'_>) -> Answer {
        // Without room for the status, there is nobody to tell of anything.
        let Some(room) = chain.writable_bytes().checked_sub(1) else { return Answer::Done(0) };
        let (status, written) = match self.carry_out(features, chain, room) {
            Ok(written) => (OK, written),
            Err(Failed(status)) => (status, 0),
        };
        if !chain.write(room, &[status]) {
            return Answer::Done(0);
        }
        // 2.7.8.2: the length covers what was written from the first byte on.
        Answer::Done(if written == room { (room + 1) as u32 } else { written as u32 })
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
