//! The header of an image, and what it may say. Source: QEMU 7.2, docs/interop/qcow2.txt, "Header" and "Header extensions".
//!
//! An image is not trusted: each value is checked before it is used, and what cannot be is an error.

use std::io;

use super::super::host_file::HostFile;
use super::damaged;

pub const MAGIC: [u8; 4] = *b"QFI\xfb";
const LENGTH_2: usize = 72;
const LENGTH_3: usize = 104;
/// The header's fields of version 3, as we write them.
const LENGTH: usize = 112;
/// Where the incompatible features are.
pub const INCOMPATIBLE_AT: u64 = 72;
pub const SIZE_AT: u64 = 24;
pub const L1_AT: u64 = 36;
pub const REFCOUNTS_AT: u64 = 48;
pub const SNAPSHOTS_AT: u64 = 60;
pub const AUTOCLEAR_AT: u64 = 88;

/// Incompatible features: whoever does not know one must not touch the image.
pub const DIRTY: u64 = 1;
pub const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const COMPRESSION: u64 = 8;
const EXTENDED_L2: u64 = 16;

const BACKING_FORMAT: u32 = 0xe279_2aca;
const MOST_BACKING_NAME: u32 = 1023;
/// 32 MiB of L1 table is what QEMU takes, too; and a refcount table of 8 MiB.
const MOST_L1: u32 = (32 << 20) / 8;
const MOST_REFCOUNT_BYTES: u64 = 8 << 20;
const MOST_SNAPSHOTS: u32 = 65536;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Of the disk, in bytes.
    pub size: u64,
    pub l1_offset: u64,
    pub l1_entries: u32,
    pub refcounts_offset: u64,
    pub refcounts_clusters: u32,
    pub refcount_order: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub autoclear: u64,
    pub zstd: bool,
    /// The name of the backing file, as the image has it, and its format, where the image says.
    pub backing: Option<(String, Option<String>)>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|part| part.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// # Errors
    /// A sentence about what is wrong with the image, or what of it is not supported; the system's.
    pub fn read(file: &HostFile) -> io::Result<Header> {
        let length = file.length()?;
        // The header and all its extensions are in the first cluster, whose size it says.
        let mut bytes = vec![0; length.min(64 << 10) as usize];
        file.get(0, &mut bytes)?;
        Header::parse(&bytes, length)
    }

    pub fn parse(bytes: &[u8], length: u64) -> io::Result<Header> {
        if bytes.len() < LENGTH_2 || bytes[..4] != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a qcow2 image"));
        }
        let version = u32_at(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(damaged(format!("it is of version {version}")));
        }
        let (incompatible, header_length) = match version {
            2 => (0, LENGTH_2),
            _ => (u64_at(bytes, INCOMPATIBLE_AT as usize), u32_at(bytes, 100) as usize),
        };
        if version == 3 && (header_length < LENGTH_3 || header_length > bytes.len()) {
            return Err(damaged(format!("its header has {header_length} bytes")));
        }
        for (feature, name) in [
            (EXTERNAL_DATA, "its data in another file"),
            (EXTENDED_L2, "subclusters"),
            (!(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2), "features that are not known"),
        ] {
            if incompatible & feature != 0 {
                return Err(io::Error::new(io::ErrorKind::Unsupported, format!("the image has {name}: not supported")));
            }
        }
        if u32_at(bytes, 32) != 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the image is encrypted: not supported"));
        }
        let compression = if incompatible & COMPRESSION != 0 { bytes.get(104).copied().unwrap_or(0) } else { 0 };
        if compression > 1 {
            return Err(damaged(format!("its clusters are compressed in way {compression}")));
        }
        let mut header = Header {
            version,
            cluster_bits: u32_at(bytes, 20),
            size: u64_at(bytes, SIZE_AT as usize),
            l1_offset: u64_at(bytes, L1_AT as usize + 4),
            l1_entries: u32_at(bytes, L1_AT as usize),
            refcounts_offset: u64_at(bytes, REFCOUNTS_AT as usize),
            refcounts_clusters: u32_at(bytes, REFCOUNTS_AT as usize + 8),
            refcount_order: if version == 2 { 4 } else { u32_at(bytes, 96) },
            snapshots: u32_at(bytes, SNAPSHOTS_AT as usize),
            snapshots_offset: u64_at(bytes, SNAPSHOTS_AT as usize + 4),
            incompatible,
            autoclear: if version == 2 { 0 } else { u64_at(bytes, AUTOCLEAR_AT as usize) },
            zstd: compression == 1,
            backing: None,
        };
        header.check(length)?;
        let first = &bytes[..bytes.len().min(1 << header.cluster_bits)];
        let format = backing_format(first, header_length)?;
        let (at, size) = (u64_at(bytes, 8), u32_at(bytes, 16));
        if at != 0 {
            let start = usize::try_from(at).ok();
            let end = start.and_then(|start| start.checked_add(size as usize));
            let name = start.zip(end).and_then(|(start, end)| first.get(start..end));
            let name = name.filter(|_| (1..=MOST_BACKING_NAME).contains(&size));
            let name = name.and_then(|name| std::str::from_utf8(name).ok()).filter(|name| !name.contains('\0'));
            let name = name.ok_or_else(|| damaged("the name of its backing file is none".into()))?;
            header.backing = Some((name.into(), format));
        }
        Ok(header)
    }

    /// Whether the tables can be where the header says.
    fn check(&self, length: u64) -> io::Result<()> {
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(damaged(format!("its clusters have 2 to the {} bytes", self.cluster_bits)));
        }
        if self.refcount_order > 6 {
            return Err(damaged(format!("its refcounts have 2 to the {} bits", self.refcount_order)));
        }
        if self.size > 1 << 56 || !self.size.is_multiple_of(512) {
            return Err(damaged(format!("its disk has {} bytes", self.size)));
        }
        if self.l1_entries > MOST_L1 || u64::from(self.l1_entries) < self.l1_wanted(self.size) {
            return Err(damaged(format!("its L1 table has {} entries", self.l1_entries)));
        }
        let table = u64::from(self.refcounts_clusters) << self.cluster_bits;
        if table > MOST_REFCOUNT_BYTES || table == 0 {
            return Err(damaged(format!("its refcount table has {} clusters", self.refcounts_clusters)));
        }
        if self.snapshots > MOST_SNAPSHOTS {
            return Err(damaged(format!("it has {} snapshots", self.snapshots)));
        }
        let l1 = u64::from(self.l1_entries) * 8;
        let list = if self.snapshots > 0 { 1 } else { 0 };
        for (what, at, size) in [
            ("L1 table", self.l1_offset, l1),
            ("refcount table", self.refcounts_offset, table),
            ("list of snapshots", self.snapshots_offset, list),
        ] {
            let is_inside = at.checked_add(size).is_some_and(|end| end <= length);
            if size > 0 && (at == 0 || !at.is_multiple_of(1 << self.cluster_bits) || !is_inside) {
                return Err(damaged(format!("its {what} is at {at:#x}, which cannot be")));
            }
        }
        Ok(())
    }

    #[must_use]
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / 8
    }

    /// How many entries the L1 table of a disk of this size needs.
    #[must_use]
    pub fn l1_wanted(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster() * self.l2_entries())
    }

    /// The first cluster of a new image, of version 3.
    #[must_use]
    pub fn first_cluster(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.cluster() as usize];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(4, &3_u32.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(SIZE_AT as usize, &self.size.to_be_bytes());
        put(L1_AT as usize, &self.l1_entries.to_be_bytes());
        put(L1_AT as usize + 4, &self.l1_offset.to_be_bytes());
        put(REFCOUNTS_AT as usize, &self.refcounts_offset.to_be_bytes());
        put(REFCOUNTS_AT as usize + 8, &self.refcounts_clusters.to_be_bytes());
        put(96, &self.refcount_order.to_be_bytes());
        put(100, &(LENGTH as u32).to_be_bytes());
        let mut at = LENGTH;
        if let Some((name, format)) = &self.backing {
            if let Some(format) = format {
                put(at, &BACKING_FORMAT.to_be_bytes());
                put(at + 4, &(format.len() as u32).to_be_bytes());
                put(at + 8, format.as_bytes());
                at += 8 + format.len().next_multiple_of(8);
            }
            // A type of 0, of no bytes, ends the list.
            at += 8;
            put(at, name.as_bytes());
            put(8, &(at as u64).to_be_bytes());
            put(16, &(name.len() as u32).to_be_bytes());
        }
        bytes
    }
}

/// Looks through the header's extensions for the format of the backing file.
fn backing_format(first: &[u8], header_length: usize) -> io::Result<Option<String>> {
    let mut at = header_length;
    loop {
        let (kind, size) = (u32_at(first, at), u32_at(first, at + 4) as usize);
        if kind == 0 || at + 8 > first.len() {
            return Ok(None);
        }
        let Some(data) = first.get(at + 8..at + 8 + size) else {
            return Err(damaged("an extension of its header is longer than the header".into()));
        };
        if kind == BACKING_FORMAT {
            let name = std::str::from_utf8(data).ok().filter(|name| name.len() < 16);
            let name = name.ok_or_else(|| damaged("the format of its backing file is no name".into()))?;
            return Ok(Some(name.into()));
        }
        at += 8 + size.next_multiple_of(8);
    }
}
