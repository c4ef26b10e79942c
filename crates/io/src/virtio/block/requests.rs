//! What each request does, 5.2.6 "Device Operation".

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use super::{Block, FAILED, MOST_DISCARDED, MOST_SEGMENTS, MOST_ZEROED, SECTOR, UNSUPPORTED, count, offered};
use crate::disk::Buffers;
use crate::virtio::queue::Chain;

/// Types of requests.
pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_SERIAL: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// A request begins with its type, 4 bytes of nothing, and its first sector.
const HEADER_BYTES: u64 = 16;
const SERIAL_BYTES: usize = 20;
/// A segment of a discard or write zeroes: first sector, number of sectors, flags.
const SEGMENT_BYTES: u64 = 16;
pub const MAY_UNMAP: u32 = 1;

/// A request that fails.
pub enum Failed {
    /// It makes no sense: with which status.
    Guest(u8),
    /// The host cannot do it.
    Host(io::Error),
    /// What was written before may be lost.
    Flush,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Failed::Host(error)
    }
}

/// What a request's buffers are to its medium: those that the driver will read, or those that it wrote.
struct Data<'a, 'm>(&'a Chain<'m>);

impl Buffers for Data<'_, '_> {
    fn take_from(&self, from: u64, size: u64, file: &File, at: u64) -> io::Result<()> {
        self.0.take_from(from, size, file, at)
    }

    fn put_into(&self, from: u64, size: u64, file: &File, at: u64) -> io::Result<()> {
        self.0.put_into(HEADER_BYTES + from, size, file, at)
    }

    fn set(&self, from: u64, bytes: &[u8]) -> io::Result<()> {
        if self.0.write(from, bytes) { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    fn get(&self, from: u64, bytes: &mut [u8]) -> io::Result<()> {
        if self.0.read(HEADER_BYTES + from, bytes) { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

impl Block {
    /// The place of `bytes` bytes from a sector on, all within the disk.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, Failed> {
        let end = sector.checked_add(bytes.div_ceil(SECTOR)).ok_or(Failed::Guest(FAILED))?;
        if end > self.sectors || !bytes.is_multiple_of(SECTOR) {
            return Err(Failed::Guest(FAILED));
        }
        Ok(sector * SECTOR)
    }

    fn read(&self, sector: u64, chain: &Chain<'_>, bytes: u64) -> Result<(), Failed> {
        let start = self.place(sector, bytes)?;
        self.medium.read(start, bytes, &Data(chain), 0)?;
        count(&self.counts.reads, 1);
        count(&self.counts.bytes_read, bytes);
        Ok(())
    }

    fn write(&self, sector: u64, chain: &Chain<'_>) -> Result<(), Failed> {
        let bytes = chain.readable_bytes() - HEADER_BYTES;
        let start = self.place(sector, bytes)?;
        self.medium.write(start, bytes, &Data(chain), 0)?;
        count(&self.counts.writes, 1);
        count(&self.counts.bytes_written, bytes);
        Ok(())
    }

    fn flush(&self) -> Result<(), Failed> {
        if self.medium.flush().is_err() {
            self.lost.store(true, Ordering::SeqCst);
        }
        count(&self.counts.flushes, 1);
        if self.lost.load(Ordering::SeqCst) { Err(Failed::Flush) } else { Ok(()) }
    }

    /// Discard and write zeroes: 5.2.6.2 says which flags each may have. A discarded sector may read as anything.
    fn clear(&self, chain: &Chain<'_>, is_discard: bool) -> Result<(), Failed> {
        let bytes = chain.readable_bytes() - HEADER_BYTES;
        if !bytes.is_multiple_of(SEGMENT_BYTES) || !(1..=u64::from(MOST_SEGMENTS)).contains(&(bytes / SEGMENT_BYTES)) {
            return Err(Failed::Guest(FAILED));
        }
        let (known_flags, most) = if is_discard { (0, MOST_DISCARDED) } else { (MAY_UNMAP, MOST_ZEROED) };
        for at in (HEADER_BYTES..HEADER_BYTES + bytes).step_by(SEGMENT_BYTES as usize) {
            let (mut first, mut length, mut flags) = ([0; 8], [0; 4], [0; 4]);
            if !(chain.read(at, &mut first) && chain.read(at + 8, &mut length) && chain.read(at + 12, &mut flags)) {
                return Err(Failed::Guest(FAILED));
            }
            let (length, flags) = (u32::from_le_bytes(length), u32::from_le_bytes(flags));
            if flags & !known_flags != 0 {
                return Err(Failed::Guest(UNSUPPORTED));
            }
            if length > most {
                return Err(Failed::Guest(FAILED));
            }
            let bytes = u64::from(length) * SECTOR;
            let start = self.place(u64::from_le_bytes(first), bytes)?;
            if bytes == 0 {
                continue;
            }
            if is_discard {
                self.medium.discard(start, bytes)?;
            } else {
                self.medium.write_zeroes(start, bytes, flags & MAY_UNMAP != 0)?;
            }
        }
        count(&self.counts.discards, u64::from(is_discard));
        Ok(())
    }

    /// Carries a request out, whose last byte that can be written is its status. Gives how many bytes before that it wrote.
    pub fn carry_out(&self, features: u64, chain: &Chain<'_>, room: u64) -> Result<u64, Failed> {
        let mut header = [0; HEADER_BYTES as usize];
        if !chain.read(0, &mut header) {
            return Err(Failed::Guest(FAILED));
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let kind = u32::from_le_bytes([a, b, c, d]);
        if self.disk.read_only && matches!(kind, WRITE | DISCARD | WRITE_ZEROES) {
            return Err(Failed::Guest(FAILED));
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
                return if chain.write(0, &serial[..size as usize]) { Ok(size) } else { Err(Failed::Guest(FAILED)) };
            }
            DISCARD if features & offered::DISCARD != 0 => self.clear(chain, true)?,
            WRITE_ZEROES if features & offered::WRITE_ZEROES != 0 => self.clear(chain, false)?,
            _ => return Err(Failed::Guest(UNSUPPORTED)),
        }
        // 5.2.6.2: a driver that knows nothing of flushes takes it that what is done stays done.
        if features & offered::FLUSH == 0 {
            self.flush()?;
        }
        Ok(0)
    }
}
