//! Files below one folder, by name and never outside of it: what a shared folder is served with.
//!
//! Names are resolved by the kernel with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS (openat2(2)), to the folder that a name is in;
//! the name itself is one component, and is never followed if it is a symbolic link. So whatever links and `..` there are,
//! and whoever moves things about meanwhile, nothing but what is below the folder is reached.
//!
//! Contract of the unsafe code: every descriptor is borrowed from a live owner for the whole call; names are strings that end
//! with a null byte and live through it; buffers are passed with their own length; a new descriptor is nobody else's.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// A folder that names are looked up in.
#[derive(Debug)]
pub struct Folder(OwnedFd);

/// What is known of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub device: u64,
    pub inode: u64,
    /// When it was made: an inode's number may be another file's later. 0 where the file system does not know.
    pub born: (i64, u32),
    pub mode: u32,
    pub links: u32,
    pub user: u32,
    pub group: u32,
    pub size: u64,
    pub blocks: u64,
    pub block_size: u32,
    pub accessed: (i64, u32),
    pub modified: (i64, u32),
    pub changed: (i64, u32),
}

/// A time to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    Keep,
    Now,
    At(i64, u32),
}

/// What there is of a file system, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    pub block_size: u64,
    pub blocks: u64,
    pub free: u64,
    pub available: u64,
    pub files: u64,
    pub files_free: u64,
    pub longest_name: u32,
}

/// One name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: OsString,
    pub inode: u64,
    /// Where the next one is, for [`list`].
    pub next: u64,
    /// DT_REG and so on.
    pub kind: u8,
}

fn text(name: &OsStr) -> io::Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// One component, which names something in the folder.
fn component(name: &OsStr) -> io::Result<CString> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    text(name)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn open_at(folder: libc::c_int, name: &CString, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: all zeroes asks for nothing special.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: see the head of the file.
    let fd = unsafe { libc::syscall(libc::SYS_openat2, folder, name.as_ptr(), &raw const how, size_of_val(&how)) };
    check(fd as libc::c_int)?;
    // SAFETY: see the head of the file.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn status_at(folder: libc::c_int, name: &CString, flags: i32) -> io::Result<Status> {
    // SAFETY: all zeroes is a status of nothing.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME;
    // SAFETY: see the head of the file.
    check(unsafe { libc::statx(folder, name.as_ptr(), flags | libc::AT_SYMLINK_NOFOLLOW, mask, &raw mut found) })?;
    let time = |stamp: libc::statx_timestamp| (stamp.tv_sec, stamp.tv_nsec);
    Ok(Status {
        device: u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor),
        inode: found.stx_ino,
        born: if found.stx_mask & libc::STATX_BTIME != 0 { time(found.stx_btime) } else { (0, 0) },
        mode: u32::from(found.stx_mode),
        links: found.stx_nlink,
        user: found.stx_uid,
        group: found.stx_gid,
        size: found.stx_size,
        blocks: found.stx_blocks,
        block_size: found.stx_blksize,
        accessed: time(found.stx_atime),
        modified: time(found.stx_mtime),
        changed: time(found.stx_ctime),
    })
}

fn stamp(time: Time) -> libc::timespec {
    let (tv_sec, tv_nsec) = match time {
        Time::Keep => (0, libc::UTIME_OMIT),
        Time::Now => (0, libc::UTIME_NOW),
        Time::At(seconds, nanoseconds) => (seconds, libc::c_long::from(nanoseconds.min(999_999_999))),
    };
    libc::timespec { tv_sec, tv_nsec }
}

impl Folder {
    /// The folder that all else is below of. The operator names it: this name is followed wherever it leads.
    ///
    /// # Errors
    /// The system's, when there is no such folder.
    pub fn open(path: &Path) -> io::Result<Folder> {
        let name = text(path.as_os_str())?;
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        // SAFETY: see the head of the file.
        let fd = unsafe { libc::open(name.as_ptr(), flags) };
        check(fd)?;
        // SAFETY: see the head of the file.
        Ok(Folder(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// A folder below this one, or itself by an empty path.
    ///
    /// # Errors
    /// The system's; one on whose way there is a symbolic link is not found.
    pub fn below(&self, path: &Path) -> io::Result<Folder> {
        let path = if path.as_os_str().is_empty() { OsStr::new(".") } else { path.as_os_str() };
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        Ok(Folder(open_at(self.0.as_raw_fd(), &text(path)?, flags, 0)?))
    }

    /// # Errors
    /// The system's.
    pub fn status(&self) -> io::Result<Status> {
        status_at(self.0.as_raw_fd(), &CString::default(), libc::AT_EMPTY_PATH)
    }

    /// # Errors
    /// The system's, when there is nothing of this name.
    pub fn status_of(&self, name: &OsStr) -> io::Result<Status> {
        status_at(self.0.as_raw_fd(), &component(name)?, 0)
    }

    /// Opens what is there, to list it.
    ///
    /// # Errors
    /// The system's.
    pub fn open_itself(&self) -> io::Result<File> {
        Ok(open_at(self.0.as_raw_fd(), &text(OsStr::new("."))?, libc::O_RDONLY | libc::O_DIRECTORY, 0)?.into())
    }

    /// Opens or makes a regular file; `flags` as for open(2). What is something else is refused: opening it might do more
    /// than open it, or wait for somebody.
    ///
    /// # Errors
    /// The system's.
    pub fn open_file(&self, name: &OsStr, flags: i32, mode: u32) -> io::Result<File> {
        let is_regular = |status: &Status| status.mode & libc::S_IFMT == libc::S_IFREG;
        let refused = || io::Error::from_raw_os_error(libc::EPERM);
        if flags & libc::O_EXCL == 0 && !is_regular(&self.status_of(name)?) {
            return Err(refused());
        }
        let safe = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = File::from(open_at(self.0.as_raw_fd(), &component(name)?, flags | safe, mode)?);
        if is_regular(&status(&file)?) { Ok(file) } else { Err(refused()) }
    }

    /// # Errors
    /// The system's.
    pub fn make_folder(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        // SAFETY: see the head of the file.
        check(unsafe { libc::mkdirat(self.0.as_raw_fd(), component(name)?.as_ptr(), mode) })
    }

    /// Makes a FIFO or a socket's name, and nothing that has a device behind it.
    ///
    /// # Errors
    /// The system's; EPERM for anything else.
    pub fn make_node(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        if !matches!(mode & libc::S_IFMT, libc::S_IFIFO | libc::S_IFSOCK) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        // SAFETY: see the head of the file.
        check(unsafe { libc::mknodat(self.0.as_raw_fd(), component(name)?.as_ptr(), mode, 0) })
    }

    /// # Errors
    /// The system's.
    pub fn make_link(&self, name: &OsStr, target: &OsStr) -> io::Result<()> {
        let target = text(target)?;
        // SAFETY: see the head of the file.
        check(unsafe { libc::symlinkat(target.as_ptr(), self.0.as_raw_fd(), component(name)?.as_ptr()) })
    }

    /// What a symbolic link says.
    ///
    /// # Errors
    /// The system's.
    pub fn read_link(&self, name: &OsStr) -> io::Result<OsString> {
        let name = component(name)?;
        let mut bytes = vec![0_u8; libc::PATH_MAX as usize];
        // SAFETY: see the head of the file.
        let count =
            unsafe { libc::readlinkat(self.0.as_raw_fd(), name.as_ptr(), bytes.as_mut_ptr().cast(), bytes.len()) };
        bytes.truncate(usize::try_from(count).map_err(|_| io::Error::last_os_error())?);
        Ok(OsString::from_vec(bytes))
    }

    /// Gives a file another name, in a folder that may be another.
    ///
    /// # Errors
    /// The system's.
    pub fn link(&self, name: &OsStr, to: &Folder, new: &OsStr) -> io::Result<()> {
        let (name, new) = (component(name)?, component(new)?);
        // SAFETY: see the head of the file.
        check(unsafe { libc::linkat(self.0.as_raw_fd(), name.as_ptr(), to.0.as_raw_fd(), new.as_ptr(), 0) })
    }

    /// Moves a file; `flags` as for renameat2(2).
    ///
    /// # Errors
    /// The system's.
    pub fn rename(&self, name: &OsStr, to: &Folder, new: &OsStr, flags: u32) -> io::Result<()> {
        let (name, new) = (component(name)?, component(new)?);
        let (from, to) = (self.0.as_raw_fd(), to.0.as_raw_fd());
        // SAFETY: see the head of the file.
        check(unsafe { libc::renameat2(from, name.as_ptr(), to, new.as_ptr(), flags) })
    }

    /// # Errors
    /// The system's.
    pub fn remove(&self, name: &OsStr, is_folder: bool) -> io::Result<()> {
        let flags = if is_folder { libc::AT_REMOVEDIR } else { 0 };
        // SAFETY: see the head of the file.
        check(unsafe { libc::unlinkat(self.0.as_raw_fd(), component(name)?.as_ptr(), flags) })
    }

    /// Sets the permissions of a file, or with an empty name of the folder itself.
    ///
    /// # Errors
    /// The system's.
    pub fn set_mode(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        // By a name, the system would follow a link; what is held cannot become one (proc_pid_fd(5)).
        let held;
        let fd = if name.is_empty() {
            self.0.as_raw_fd()
        } else {
            held = open_at(self.0.as_raw_fd(), &component(name)?, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
            held.as_raw_fd()
        };
        let path = text(OsStr::new(&format!("/proc/self/fd/{fd}")))?;
        // SAFETY: see the head of the file.
        check(unsafe { libc::chmod(path.as_ptr(), mode) })
    }

    /// Sets when a file, or with an empty name the folder itself, was used and changed.
    ///
    /// # Errors
    /// The system's.
    pub fn set_times(&self, name: &OsStr, accessed: Time, modified: Time) -> io::Result<()> {
        let times = [stamp(accessed), stamp(modified)];
        let name = if name.is_empty() { text(OsStr::new("."))? } else { component(name)? };
        let flags = libc::AT_SYMLINK_NOFOLLOW;
        // SAFETY: see the head of the file; two times are passed, as it wants them.
        check(unsafe { libc::utimensat(self.0.as_raw_fd(), name.as_ptr(), times.as_ptr(), flags) })
    }

    /// What there is of the file system that the folder is in.
    ///
    /// # Errors
    /// The system's.
    pub fn room(&self) -> io::Result<Room> {
        // SAFETY: all zeroes is an answer that says nothing.
        let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: see the head of the file.
        check(unsafe { libc::fstatvfs(self.0.as_raw_fd(), &raw mut found) })?;
        Ok(Room {
            block_size: found.f_frsize,
            blocks: found.f_blocks,
            free: found.f_bfree,
            available: found.f_bavail,
            files: found.f_files,
            files_free: found.f_ffree,
            longest_name: found.f_namemax as u32,
        })
    }
}

/// # Errors
/// The system's.
pub fn status(file: &File) -> io::Result<Status> {
    status_at(file.as_raw_fd(), &CString::default(), libc::AT_EMPTY_PATH)
}

/// # Errors
/// The system's.
pub fn set_mode(file: &File, mode: u32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::fchmod(file.as_raw_fd(), mode) })
}

/// Names of an open folder from `offset` on, some of them; none at its end.
///
/// # Errors
/// The system's.
pub fn list(folder: &File, offset: u64) -> io::Result<Vec<Entry>> {
    /// Inode, next offset, length, kind, before the name (getdents64(2)).
    const HEADER: usize = 19;
    seek(folder, offset.cast_signed(), libc::SEEK_SET)?;
    let mut bytes = vec![0_u8; 32 << 10];
    // SAFETY: see the head of the file.
    let count = unsafe { libc::syscall(libc::SYS_getdents64, folder.as_raw_fd(), bytes.as_mut_ptr(), bytes.len()) };
    bytes.truncate(usize::try_from(count).map_err(|_| io::Error::last_os_error())?);
    let mut entries = Vec::new();
    let mut rest = &bytes[..];
    while let Some((&[a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, kind], _)) =
        rest.split_first_chunk::<HEADER>()
    {
        let length = usize::from(u16::from_le_bytes([q, r])).clamp(HEADER, rest.len());
        let name = rest[HEADER..length].split(|byte| *byte == 0).next().unwrap_or_default();
        entries.push(Entry {
            name: OsStr::from_bytes(name).into(),
            inode: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            next: u64::from_le_bytes([i, j, k, l, m, n, o, p]),
            kind,
        });
        rest = &rest[length..];
    }
    Ok(entries)
}

/// lseek(2), for what the standard library has no name for.
///
/// # Errors
/// The system's.
pub fn seek(file: &File, offset: i64, whence: i32) -> io::Result<u64> {
    // SAFETY: no memory is passed.
    let place = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(place).map_err(|_| io::Error::last_os_error())
}

/// fallocate(2).
///
/// # Errors
/// The system's.
pub fn allocate(file: &File, mode: i32, offset: i64, size: i64) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, size) })
}

/// How many descriptors this process may have.
#[must_use]
pub fn most_descriptors() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 256, rlim_max: 0 };
    // SAFETY: the structure lives through the call. It fails for no reason that could be here, and then changes nothing.
    let _ = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}

/// Who this process is, for files: user and group.
#[must_use]
pub fn owner() -> (u32, u32) {
    // SAFETY: no memory is passed.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("ringzero-folder-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        path
    }

    #[test]
    fn nothing_leads_out_of_a_folder() {
        let outside = scratch("outside");
        std::fs::write(outside.join("secret"), "x").unwrap();
        let inside = scratch("inside");
        std::fs::create_dir(inside.join("real")).unwrap();
        symlink(&outside, inside.join("link")).unwrap();
        symlink(outside.join("secret"), inside.join("file")).unwrap();
        symlink("real", inside.join("own")).unwrap();
        let folder = Folder::open(&inside).unwrap();
        for path in ["link", "..", "real/../..", "/", "own", "link/secret"] {
            assert!(folder.below(path.as_ref()).is_err(), "{path}");
        }
        folder.below("real".as_ref()).unwrap();
        folder.below("".as_ref()).unwrap();
        for name in ["..", ".", "", "real/..", "a/b", "file", "link"] {
            assert!(folder.open_file(name.as_ref(), libc::O_RDONLY, 0).is_err(), "{name}");
        }
        assert_eq!(folder.status_of("file".as_ref()).unwrap().mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(folder.read_link("own".as_ref()).unwrap(), "real");
        // Permissions of a link are not those of what it names.
        assert!(folder.set_mode("file".as_ref(), 0o600).is_err());
        folder.set_times("file".as_ref(), Time::Now, Time::At(5, 0)).unwrap();
        assert_ne!(std::fs::metadata(outside.join("secret")).unwrap().modified().unwrap(), std::time::UNIX_EPOCH);
        assert_eq!(folder.status_of("file".as_ref()).unwrap().modified, (5, 0));
        // A FIFO is not waited for, and a device not made.
        folder.make_node("pipe".as_ref(), libc::S_IFIFO | 0o600).unwrap();
        assert_eq!(folder.open_file("pipe".as_ref(), libc::O_RDONLY, 0).unwrap_err().raw_os_error(), Some(libc::EPERM));
        let device = folder.make_node("null".as_ref(), libc::S_IFCHR | 0o600).unwrap_err();
        assert_eq!(device.raw_os_error(), Some(libc::EPERM));
        std::fs::remove_dir_all(outside).unwrap();
        std::fs::remove_dir_all(inside).unwrap();
    }

    #[test]
    fn names_are_made_moved_listed_and_removed() {
        let path = scratch("names");
        let root = Folder::open(&path).unwrap();
        root.make_folder("a".as_ref(), 0o755).unwrap();
        let below = root.below("a".as_ref()).unwrap();
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        below.open_file("one".as_ref(), flags, 0o600).unwrap().write_all(b"content").unwrap();
        below.link("one".as_ref(), &root, "two".as_ref()).unwrap();
        assert_eq!(root.status_of("two".as_ref()).unwrap().links, 2);
        root.rename("two".as_ref(), &below, "three".as_ref(), 0).unwrap();
        let taken = root.rename("a".as_ref(), &below, "three".as_ref(), libc::RENAME_NOREPLACE);
        assert!(taken.is_err());
        let mut text = String::new();
        below.open_file("three".as_ref(), libc::O_RDONLY, 0).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        let mut names = Vec::new();
        let (open, mut at) = (below.open_itself().unwrap(), 0);
        loop {
            let entries = list(&open, at).unwrap();
            let Some(last) = entries.last() else { break };
            at = last.next;
            names.extend(entries.into_iter().map(|entry| entry.name.into_string().unwrap()));
        }
        names.sort();
        assert_eq!(names, [".", "..", "one", "three"]);
        below.set_mode("one".as_ref(), 0o640).unwrap();
        assert_eq!(below.status_of("one".as_ref()).unwrap().mode & 0o777, 0o640);
        below.remove("one".as_ref(), false).unwrap();
        assert!(root.remove("a".as_ref(), true).is_err(), "not empty");
        assert!(root.room().unwrap().blocks > 0 && most_descriptors() > 0);
        std::fs::remove_dir_all(path).unwrap();
    }
}
