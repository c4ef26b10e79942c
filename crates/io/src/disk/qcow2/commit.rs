//! What an image has is put into what lies behind it.

use std::io;
use std::sync::PoisonError;

use super::super::Bytes;
use super::super::chain::{Progress, stopped};
use super::Qcow2;
use super::tables::{COPIED, Place, ZERO};

const PIECE: u64 = 1 << 20;

impl Qcow2 {
    /// Puts all that this image has into its backing file, which must be open to be written to and as large, and empties the
    /// image when that is on the disk. Nobody uses either meanwhile.
    ///
    /// # Errors
    /// Those of both. The disk is what it was, whenever it stops.
    pub fn commit(&self, progress: Progress<'_>) -> io::Result<()> {
        let Some(backing) = &self.backing else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it has no backing file"));
        };
        if backing.size() < self.size {
            let sentence =
                format!("its backing file has {} bytes and it has {}: make that larger", backing.size(), self.size);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
        }
        if self.tables().header.snapshots > 0 {
            let sentence = "it has snapshots, which need what is behind them: delete them first";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
        }
        let mut piece = vec![0; PIECE as usize];
        let mut at = 0;
        while at < self.size {
            let (place, count) = self.find(at, (self.size - at).min(PIECE))?;
            let mut done = count;
            match place {
                Place::Hole => {}
                Place::Zero => backing.write_zeroes(at, count, true)?,
                Place::Data { .. } | Place::Compressed { .. } => {
                    let piece = &mut piece[..count as usize];
                    done = self.read_piece(place, at, count, &Bytes::new(piece), 0)?;
                    backing.write(at, done, &Bytes::new(piece), 0)?;
                }
            }
            at += done;
            if !progress(at, self.size) {
                return Err(stopped());
            }
        }
        backing.flush()?;
        self.empty()
    }

    /// Makes all clusters holes.
    fn empty(&self) -> io::Result<()> {
        let _alone = self.users.write().unwrap_or_else(PoisonError::into_inner);
        let mut tables = self.changed_tables()?;
        let all = self.size.div_ceil(self.cluster());
        let mut first = 0;
        while first < all {
            let old = tables.entries(&self.file, first..all)?;
            if old.iter().any(|entry| *entry != 0) {
                tables.set_entries(&self.file, first, &vec![0; old.len()])?;
                for entry in old.iter().filter(|entry| **entry & !(COPIED | ZERO) != 0) {
                    tables.release_entry(&self.file, *entry)?;
                }
            }
            first += old.len() as u64;
        }
        Ok(())
    }
}
