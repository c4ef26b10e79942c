//! Files on a disk that have no name: nobody else opens them, and they are gone with their last descriptor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::random;

/// Makes a file without a name in a folder, to be read and written by its owner only.
///
/// # Errors
/// The system's: no such folder, not ours to write in, a file system that is read-only.
pub fn nameless_file(folder: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    // O_EXCL here: it can never be given a name.
    match options.clone().custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(folder) {
        // Not every file system can. EISDIR is what a kernel says that does not know the flag.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {}
        result => return result,
    }
    named_for_a_moment(&mut options, folder)
}

fn named_for_a_moment(options: &mut OpenOptions, folder: &Path) -> io::Result<File> {
    let mut name = [0; 8];
    if !random::fill(&mut name) {
        return Err(io::Error::other("the system has no randomness for a name yet"));
    }
    let path = folder.join(format!(".ringzero-{:016x}", u64::from_le_bytes(name)));
    let file = options.create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn it_has_no_name_and_is_its_owners_only() {
        let folder = std::env::temp_dir().join(format!("ringzero-nameless-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let files = [nameless_file(&folder), named_for_a_moment(&mut options, &folder)];
        let left = std::fs::read_dir(&folder).unwrap().count();
        std::fs::remove_dir(&folder).unwrap();
        assert_eq!(left, 0);
        for file in files.map(Result::unwrap) {
            let found = file.metadata().unwrap();
            assert_eq!((found.nlink(), found.mode() & 0o777), (0, 0o600));
            file.write_all_at(b"here", 4096).unwrap();
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, 4096).unwrap();
            assert_eq!(&bytes, b"here");
        }
        assert!(nameless_file(&folder).is_err(), "the folder is gone");
    }
}
