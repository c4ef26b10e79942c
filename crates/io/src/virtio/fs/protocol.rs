//! The layout of requests and answers. Source: Linux 6.1, include/uapi/linux/fuse.h, protocol 7.31; names are of it, without
//! their FUSE_.

use host::folder::{Room, Status};

pub const MAJOR: u32 = 7;
pub const MINOR: u32 = 31;
/// `fuse_in_header`, `fuse_out_header`.
pub const IN_HEADER: usize = 40;
pub const OUT_HEADER: usize = 16;
/// `fuse_write_in`: the data come behind it.
pub const WRITE_IN: usize = 40;
/// Of a driver older than this there is none with virtio-fs.
pub const LEAST_MINOR: u32 = 27;

/// What the driver asks for.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
}

/// What driver and device agree on at the start: reads in parallel, writes of more than a page, folders with the status of
/// what is in them, requests of more than 32 pages; and that data are not believed to be the same when the time or size of
/// a file is another, because programs of the host change files, too.
pub const WANTED: u32 = 1 << 0 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 18 | MAX_PAGES;
pub const MAX_PAGES: u32 = 1 << 22;

/// Which fields of a SETATTR count.
pub mod set {
    pub const MODE: u32 = 1 << 0;
    pub const USER: u32 = 1 << 1;
    pub const GROUP: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ACCESSED: u32 = 1 << 4;
    pub const MODIFIED: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ACCESSED_NOW: u32 = 1 << 7;
    pub const MODIFIED_NOW: u32 = 1 << 8;
}

/// How long the driver may believe in a name, in seconds, before it asks again. A status it asks for whenever it needs one: a
/// file that a program of the host has made longer would be cut off where it ended.
const NAME_VALID: u64 = 1;
const STATUS_VALID: u64 = 0;

/// Files of this process's own user and group are root's in the guest, all others nobody's.
const ROOT: u32 = 0;
const NOBODY: u32 = 65534;

/// The arguments of a request, read from the front.
pub struct Arguments<'a>(pub &'a [u8]);

impl<'a> Arguments<'a> {
    pub fn u32(&mut self) -> Result<u32, i32> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(libc::EINVAL)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*bytes))
    }

    pub fn u64(&mut self) -> Result<u64, i32> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(libc::EINVAL)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*bytes))
    }

    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], i32> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(libc::EINVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// Leaves bytes out.
    pub fn skip(&mut self, count: usize) -> Result<(), i32> {
        self.0 = self.0.get(count..).ok_or(libc::EINVAL)?;
        Ok(())
    }

    /// A string that ends with a null byte.
    pub fn name(&mut self) -> Result<&'a std::ffi::OsStr, i32> {
        use std::os::unix::ffi::OsStrExt;
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(libc::EINVAL)?;
        let (name, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(std::ffi::OsStr::from_bytes(name))
    }
}

/// An answer, written from the front.
#[derive(Default)]
pub struct Reply(pub Vec<u8>);

impl Reply {
    pub fn u16(mut self, value: u16) -> Reply {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u32(mut self, value: u32) -> Reply {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Reply {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn zeroes(mut self, count: usize) -> Reply {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// `fuse_attr`.
    fn status(self, status: &Status, owner: (u32, u32)) -> Reply {
        let shown = |id: u32, own: u32| if id == own { ROOT } else { NOBODY };
        self.u64(status.inode)
            .u64(status.size)
            .u64(status.blocks)
            .u64(status.accessed.0.cast_unsigned())
            .u64(status.modified.0.cast_unsigned())
            .u64(status.changed.0.cast_unsigned())
            .u32(status.accessed.1)
            .u32(status.modified.1)
            .u32(status.changed.1)
            .u32(status.mode)
            .u32(status.links)
            .u32(shown(status.user, owner.0))
            .u32(shown(status.group, owner.1))
            .u32(0)
            .u32(status.block_size)
            .u32(0)
    }

    /// `fuse_entry_out`; node 0 is a name without one.
    pub fn entry(self, node: u64, status: &Status, owner: (u32, u32)) -> Reply {
        self.u64(node).u64(0).u64(NAME_VALID).u64(STATUS_VALID).u32(0).u32(0).status(status, owner)
    }

    /// `fuse_attr_out`.
    pub fn attributes(self, status: &Status, owner: (u32, u32)) -> Reply {
        self.u64(STATUS_VALID).u32(0).u32(0).status(status, owner)
    }

    /// `fuse_open_out`.
    pub fn opened(self, handle: u64) -> Reply {
        self.u64(handle).u32(0).u32(0)
    }

    /// `fuse_statfs_out`.
    pub fn room(self, room: &Room) -> Reply {
        let size = u32::try_from(room.block_size).unwrap_or(u32::MAX);
        self.u64(room.blocks)
            .u64(room.free)
            .u64(room.available)
            .u64(room.files)
            .u64(room.files_free)
            .u32(size)
            .u32(room.longest_name)
            .u32(size)
            .zeroes(28)
    }

    /// `fuse_init_out`, for requests of up to `pages` pages.
    pub fn init(self, minor: u32, readahead: u32, flags: u32, pages: u16) -> Reply {
        self.u32(MAJOR)
            .u32(minor)
            .u32(readahead)
            .u32(flags)
            // The driver's own choice of requests in the background.
            .u32(0)
            .u32(u32::from(pages) * x86::PAGE_SIZE as u32)
            .u32(1)
            .u16(pages)
            .zeroes(34)
    }

    /// `fuse_dirent`, or with an entry before it `fuse_direntplus`.
    pub fn listed(self, inode: u64, next: u64, kind: u8, name: &[u8]) -> Reply {
        let mut reply = self.u64(inode).u64(next).u32(name.len() as u32).u32(u32::from(kind));
        reply.0.extend(name);
        let padded = reply.0.len().next_multiple_of(8);
        reply.0.resize(padded, 0);
        reply
    }
}
