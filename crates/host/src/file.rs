//! What files can do beside the standard library's: transfers between a file and runs of mapped memory, holes, and files
//! that are read and written past the system's cache.
//!
//! Contract of the unsafe code: plain system calls on open descriptors; [`read_runs`] and [`write_runs`] leave to their
//! caller that what they are given is mapped.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes that are mapped one after the other. Nobody has references to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Run {
    pub address: *mut u8,
    pub size: usize,
}

// A `struct iovec`: the system reads a list of ours as a list of its own.
const _: () = assert!(
    size_of::<Run>() == size_of::<libc::iovec>()
        && std::mem::offset_of!(Run, address) == std::mem::offset_of!(libc::iovec, iov_base)
        && std::mem::offset_of!(Run, size) == std::mem::offset_of!(libc::iovec, iov_len)
);

/// The longest list that the system takes at a time (UIO_MAXIOV).
pub const MOST_RUNS: usize = 1024;

/// How a file is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    pub write: bool,
    /// Past the system's cache. What is not aligned as the file's disk wants it is refused (EINVAL).
    pub direct: bool,
    /// What is written is on the disk when the call returns.
    pub synchronous: bool,
}

/// Opens a file that is there.
///
/// # Errors
/// The system's.
pub fn open(path: &Path, access: Access) -> io::Result<File> {
    let direct = if access.direct { libc::O_DIRECT } else { 0 };
    let synchronous = if access.synchronous { libc::O_DSYNC } else { 0 };
    OpenOptions::new().read(true).write(access.write).custom_flags(direct | synchronous).open(path)
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads from `at` on into runs of memory, in one call; gives the number of bytes, which may be less than they have room
/// for.
///
/// # Errors
/// The system's.
///
/// # Safety
/// All runs are mapped and writable, and stay so until this returns.
pub unsafe fn read_runs(file: &File, at: u64, runs: &[Run]) -> io::Result<usize> {
    let count = runs.len().min(MOST_RUNS) as i32;
    // SAFETY: by the caller's promise; a run is an iovec (above).
    check(unsafe { libc::preadv(file.as_raw_fd(), runs.as_ptr().cast(), count, at.cast_signed()) })
}

/// Writes runs of memory from `at` on, in one call; gives the number of bytes, which may be less than they have.
///
/// # Errors
/// The system's.
///
/// # Safety
/// All runs are mapped, and stay so until this returns.
pub unsafe fn write_runs(file: &File, at: u64, runs: &[Run]) -> io::Result<usize> {
    let count = runs.len().min(MOST_RUNS) as i32;
    // SAFETY: by the caller's promise; a run is an iovec (above).
    check(unsafe { libc::pwritev(file.as_raw_fd(), runs.as_ptr().cast(), count, at.cast_signed()) })
}

fn fallocate(file: &File, mode: i32, at: u64, size: u64) -> io::Result<()> {
    // SAFETY: see the head of the file.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, at.cast_signed(), size.cast_signed()) } as isize).map(drop)
}

/// Gives the space of a part of a file back to the file system; it reads as zeroes then.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] where the file system cannot; the system's other ones.
pub fn punch_hole(file: &File, at: u64, size: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, size)
}

/// Makes a part of a file zeroes, and keeps its space.
///
/// # Errors
/// As [`punch_hole`].
pub fn zero_range(file: &File, at: u64, size: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, at, size)
}

/// Whether the file system or the operator's quota has no room for what was to be written, or the file may not grow.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}

/// Whether the call was one that the file cannot do in this way: alignment, or a way that its file system does not have.
#[must_use]
pub fn is_refused(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn runs_are_read_and_written_and_a_hole_gives_space_back() {
        let path = std::env::temp_dir().join(format!("ringzero-file-{}", std::process::id()));
        std::fs::write(&path, vec![7; 1 << 16]).unwrap();
        let file = open(&path, Access { write: true, ..Access::default() }).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (mut first, mut second) = ([1_u8; 3], [2_u8; 5]);
        let run = |bytes: &mut [u8]| Run { address: bytes.as_mut_ptr(), size: bytes.len() };
        let runs = [run(&mut first), run(&mut second)];
        // SAFETY: both arrays live on.
        unsafe {
            assert_eq!(write_runs(&file, 100, &runs).unwrap(), 8);
            assert_eq!(read_runs(&file, 101, &runs).unwrap(), 8);
            assert_eq!(read_runs(&file, (1 << 16) - 2, &runs).unwrap(), 2, "no more is there");
            assert!(read_runs(&file, u64::MAX, &runs).is_err());
        }
        let full = file.metadata().unwrap().blocks();
        punch_hole(&file, 0, 1 << 15).unwrap();
        assert!(file.metadata().unwrap().blocks() < full);
        assert_eq!(file.metadata().unwrap().len(), 1 << 16);
    }
}
