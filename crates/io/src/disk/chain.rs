//! A disk in several files, each behind the one before it. Which they are is the operator's to say: an image names what lies
//! behind it, and is not believed.

use std::io;
use std::path::{Path, PathBuf};

use super::host_file::HostFile;
use super::qcow2::{self, Qcow2};
use super::raw::Raw;
use super::{Cache, Medium};

/// The longest chain: each file of one is open as long as the machine is.
const LONGEST: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    /// # Errors
    /// The names that there are.
    pub fn parse(name: &str) -> Result<Format, &'static str> {
        match name {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err("raw, qcow2"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub path: PathBuf,
    pub format: Format,
}

/// A file of a chain that cannot be used.
pub type Failure = (PathBuf, io::Error);

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, Failure> {
    result.map_err(|error| (path.to_path_buf(), error))
}

/// Opens a chain, its top first. What is behind is only read, and may be read by others; nothing that is behind is written
/// to by anybody.
///
/// # Errors
/// Which file, and why not.
pub fn open(links: &[Link], read_only: bool, cache: Cache) -> Result<Box<dyn Medium>, Failure> {
    let Some((top, behind)) = links.split_first() else {
        return Err((PathBuf::new(), io::Error::new(io::ErrorKind::InvalidInput, "no file was named")));
    };
    if links.len() > LONGEST {
        return at(&top.path, Err(io::Error::new(io::ErrorKind::InvalidInput, "its chain is too long")));
    }
    match top.format {
        Format::Raw if !behind.is_empty() => {
            at(&top.path, Err(io::Error::new(io::ErrorKind::InvalidInput, "a raw file has nothing behind it")))
        }
        Format::Raw => Ok(Box::new(at(&top.path, Raw::open(&top.path, read_only, cache))?)),
        Format::Qcow2 => Ok(Box::new(open_qcow2(links, read_only, cache, true)?)),
    }
}

/// As [`open`], of a chain whose top is a qcow2 image; what is right behind it can be written to if it shall not only be read.
///
/// # Errors
/// As [`open`].
pub fn open_qcow2(links: &[Link], read_only: bool, cache: Cache, reads_behind: bool) -> Result<Qcow2, Failure> {
    let Some((top, behind)) = links.split_first() else {
        return Err((PathBuf::new(), io::Error::new(io::ErrorKind::InvalidInput, "no file was named")));
    };
    let backing = match behind {
        [] => None,
        _ => Some(open(behind, reads_behind, cache)?),
    };
    at(&top.path, Qcow2::open(&top.path, read_only, cache, backing))
}

/// A disk over a chain that is only read: what is written goes to a file without a name, gone with the machine.
///
/// # Errors
/// As [`open`].
pub fn over(links: &[Link], cache: Cache) -> Result<Box<dyn Medium>, Failure> {
    let base = open(links, true, cache)?;
    let folder = std::env::temp_dir();
    let file = HostFile::own(at(&folder, host::nameless::nameless_file(&folder))?);
    // The image needs a name for what is behind it, and nobody reads it.
    at(&folder, qcow2::create(&file, base.size(), Some(("base".into(), "raw".into()))))?;
    Ok(Box::new(at(&folder, Qcow2::with_file(file, Some(base)))?))
}

/// How far something is: bytes done, of how many. False stops it.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// What is copied at a time, and how small a part of zeroes is left out.
const PIECE: u64 = 1 << 20;
const GRAIN: usize = 64 << 10;

pub(super) fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "stopped")
}

/// Copies a disk to one that is all zeroes and as large.
///
/// # Errors
/// Those of both; [`io::ErrorKind::Interrupted`] when it was stopped.
pub fn copy(from: &dyn Medium, to: &dyn Medium, progress: Progress<'_>) -> io::Result<()> {
    let size = from.size();
    let mut piece = vec![0; PIECE as usize];
    for at in (0..size).step_by(PIECE as usize) {
        let count = (size - at).min(PIECE);
        let piece = &mut piece[..count as usize];
        from.read(at, count, &super::Bytes::new(piece), 0)?;
        for (index, grain) in piece.chunks_mut(GRAIN).enumerate() {
            if grain.iter().any(|byte| *byte != 0) {
                let place = at + (index * GRAIN) as u64;
                to.write(place, grain.len() as u64, &super::Bytes::new(grain), 0)?;
            }
        }
        if !progress(at + count, size) {
            return Err(stopped());
        }
    }
    to.flush()
}
