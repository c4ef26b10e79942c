//! New images, and images of another size.

use std::io;

use super::super::host_file::HostFile;
use super::check;
use super::header::{Header, SIZE_AT};
use super::tables::Tables;
use super::{Qcow2, header, set_dirty};

/// 64 KiB, as QEMU's.
pub const CLUSTER_BITS: u32 = 16;
const LARGEST: u64 = 1 << 44;

/// Makes an empty image of a disk of `size` bytes, in a file that is empty, with what lies behind it: the name of the file,
/// as the image shall have it, and its format.
///
/// # Errors
/// A size that cannot be, a name that is too long; the system's.
pub fn create(file: &HostFile, size: u64, backing: Option<(String, String)>) -> io::Result<()> {
    if size == 0 || size > LARGEST || !size.is_multiple_of(512) {
        let sentence = format!("a disk of {size} bytes cannot be: give a multiple of 512, up to 16 TiB");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
    }
    if backing.as_ref().is_some_and(|(name, _)| name.len() > 1023 || name.is_empty()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name of a backing file has 1 to 1023 bytes"));
    }
    let cluster = 1_u64 << CLUSTER_BITS;
    // The header, the refcount table, its first block, and the L1 table.
    let mut header = Header {
        version: 3,
        cluster_bits: CLUSTER_BITS,
        size,
        l1_offset: 3 * cluster,
        l1_entries: 0,
        refcounts_offset: cluster,
        refcounts_clusters: 1,
        refcount_order: 4,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        autoclear: 0,
        zstd: false,
        backing: backing.map(|(name, format)| (name, Some(format))),
    };
    header.l1_entries = header.l1_wanted(size) as u32;
    let l1_clusters = (u64::from(header.l1_entries) * 8).div_ceil(cluster);
    file.set_length((3 + l1_clusters) * cluster)?;
    let counts: Vec<u8> = (0..3 + l1_clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
    file.set(2 * cluster, &counts)?;
    file.set(cluster, &(2 * cluster).to_be_bytes())?;
    // Last, so that what is not whole is no image.
    file.set(0, &header.first_cluster())?;
    file.flush()
}

impl Qcow2 {
    /// Makes the disk larger, or, if what lies beyond is given up, smaller. Nobody uses it meanwhile.
    ///
    /// # Errors
    /// As [`create`]; an image with snapshots is not made smaller.
    pub fn resize(&mut self, size: u64) -> io::Result<()> {
        if size == 0 || size > LARGEST || !size.is_multiple_of(512) {
            let sentence = format!("a disk of {size} bytes cannot be: give a multiple of 512, up to 16 TiB");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
        }
        let old = self.size;
        if size < old {
            if self.tables().header.snapshots > 0 {
                let sentence = "an image with snapshots cannot be made smaller: delete them first";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
            }
            // What would come back when it is made larger again is gone.
            super::Medium::write_zeroes(self, size, old - size, true)?;
        }
        let mut tables = self.changed_tables()?;
        let wanted = tables.header.l1_wanted(size) as usize;
        if wanted > tables.l1.len() {
            let mut table = tables.l1.clone();
            table.resize(wanted, 0);
            tables.move_l1(&self.file, table)?;
        }
        self.file.set(SIZE_AT, &size.to_be_bytes())?;
        tables.header.size = size;
        drop(tables);
        self.size = size;
        if size > old && self.backing.as_ref().is_some_and(|backing| backing.size() > old) {
            // What the backing file has there was no part of the disk.
            super::Medium::write_zeroes(self, old, size - old, true)?;
        }
        Ok(())
    }

    /// Whether all tables agree; with `repair`, refcounts and marks are made anew if they do not.
    ///
    /// # Errors
    /// The system's, and what cannot be repaired.
    pub fn check(file: &HostFile, repair: bool) -> io::Result<check::Report> {
        let header = Header::read(file)?;
        if header.refcount_order != 4 {
            let sentence = format!("its refcounts have {} bits: convert it", 1 << header.refcount_order);
            return Err(io::Error::new(io::ErrorKind::Unsupported, sentence));
        }
        let mut tables = Tables::read(file, header)?;
        let report = check::check(file, &mut tables)?;
        let is_dirty = tables.header.incompatible & header::DIRTY != 0;
        if repair && (report.errors > 0 || report.leaks > 0 || is_dirty) {
            set_dirty(file, &mut tables, true)?;
            check::repair(file, &mut tables)?;
            set_dirty(file, &mut tables, false)?;
        }
        Ok(report)
    }
}
