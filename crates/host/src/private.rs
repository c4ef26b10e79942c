//! A folder for files that only this user can read or write, kept from run to run.
//!
//! The folder and every file in it must belong to this user and be closed to all others, and no symbolic link is followed at
//! the end of a name; anything else is refused. Names are looked up below the opened folder, so that nobody can put another
//! one in its place meanwhile.
//!
//! Contract of the unsafe code: geteuid takes nothing and cannot fail.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub struct PrivateFolder {
    folder: File,
}

fn refused(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, what.to_string())
}

fn check(file: &File) -> io::Result<fs::Metadata> {
    let status = file.metadata()?;
    // SAFETY: see the head of the file.
    if status.uid() != unsafe { libc::geteuid() } {
        return Err(refused("it belongs to another user"));
    }
    if status.mode() & 0o077 != 0 {
        return Err(refused("others may use it"));
    }
    Ok(status)
}

impl PrivateFolder {
    /// Opens the folder, and makes it where it is missing.
    pub fn open(path: &Path) -> io::Result<PrivateFolder> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let folder = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path)?;
        check(&folder)?;
        Ok(PrivateFolder { folder })
    }

    /// A name below the opened folder, wherever that is by now.
    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.folder.as_raw_fd()))
    }

    fn open_file(&self, name: &str, options: &mut OpenOptions) -> io::Result<File> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = options.custom_flags(flags).mode(0o600).open(self.path(name))?;
        if !check(&file)?.is_file() {
            return Err(refused("it is not a regular file"));
        }
        Ok(file)
    }

    /// Opens a file to read.
    pub fn read(&self, name: &str) -> io::Result<File> {
        self.open_file(name, OpenOptions::new().read(true))
    }

    /// Opens a file, empty, to write and read.
    pub fn create(&self, name: &str) -> io::Result<File> {
        let file = self.open_file(name, OpenOptions::new().read(true).write(true).create(true).truncate(false))?;
        file.set_len(0)?;
        Ok(file)
    }

    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    pub fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    /// Names and ages of all files.
    pub fn list(&self) -> io::Result<Vec<(String, Duration)>> {
        let mut list = Vec::new();
        for entry in fs::read_dir(self.path("."))? {
            let entry = entry?;
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            list.extend(entry.file_name().into_string().ok().map(|name| (name, age)));
        }
        Ok(list)
    }

    /// Keeps other processes that ask for the same out until the result is dropped. Waits no longer than `patience`.
    pub fn lock(&self, name: &str, patience: Duration) -> io::Result<File> {
        let file = self.open_file(name, OpenOptions::new().read(true).write(true).create(true).truncate(false))?;
        let began = Instant::now();
        while let Err(error) = file.try_lock() {
            if began.elapsed() >= patience {
                return Err(error.into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    /// A fresh place in the host's folder for temporary files.
    fn place(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("ringzero-private-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn folder_and_files_are_for_their_user_alone() {
        let path = place("modes");
        let folder = PrivateFolder::open(&path.join("a/b")).unwrap();
        folder.create("file").unwrap().write_all(b"1").unwrap();
        for name in ["a", "a/b", "a/b/file"] {
            assert_eq!(fs::metadata(path.join(name)).unwrap().mode() & 0o077, 0, "{name}");
        }
        assert!(folder.read("file").is_ok());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn what_others_may_use_is_refused() {
        let path = place("others");
        let folder = PrivateFolder::open(&path).unwrap();
        folder.create("file").unwrap();
        fs::set_permissions(path.join("file"), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(folder.read("file").is_err() && folder.create("file").is_err());
        fs::set_permissions(path.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(folder.read("file").is_ok());
        symlink(path.join("file"), path.join("link")).unwrap();
        assert!(folder.read("link").is_err() && folder.create("link").is_err(), "a symbolic link was followed");
        // Only root can give a file away.
        if chown(path.join("file"), Some(1), None).is_ok() {
            assert!(folder.read("file").is_err());
        }
        symlink(&path, path.join("folder")).unwrap();
        assert!(PrivateFolder::open(&path.join("folder")).is_err());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(PrivateFolder::open(&path).is_err());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn a_lock_keeps_others_out() {
        let path = place("lock");
        let folder = PrivateFolder::open(&path).unwrap();
        let held = folder.lock("lock", Duration::ZERO).unwrap();
        assert!(folder.lock("lock", Duration::from_millis(10)).is_err());
        drop(held);
        // Not at once: a child that another test is about to start holds a copy until it has called exec.
        assert!(folder.lock("lock", Duration::from_secs(10)).is_ok());
        fs::remove_dir_all(path).unwrap();
    }
}
