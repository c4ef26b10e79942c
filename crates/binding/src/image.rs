//! Images of disks while no machine uses them: made, looked at, copied, checked.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use monitor::Error;
use monitor::disk::chain::{self, Format, Link};
use monitor::disk::host_file::HostFile;
use monitor::disk::qcow2::header::{CORRUPT, DIRTY, Header};
use monitor::disk::qcow2::{self, Qcow2};
use monitor::disk::raw::Raw;
use monitor::disk::{Cache, Medium};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::disk::named;
use crate::enter::{fit, py_enter};

/// Files of a chain, the top first: name and format of each.
pub type Names = Vec<(PathBuf, String)>;

pub fn links(names: Names) -> PyResult<Vec<Link>> {
    let link = |(path, format): (PathBuf, String)| {
        Ok(Link { path, format: named(Format::parse(&format), "format", &format)? })
    };
    names.into_iter().map(link).collect()
}

pub fn failed((path, error): chain::Failure) -> Error {
    Error::Disk { path, error }
}

fn of<T>(path: &Path, result: std::io::Result<T>) -> Result<T, Error> {
    result.map_err(|error| failed((path.to_path_buf(), error)))
}

fn open_file(path: &Path, read_only: bool) -> Result<HostFile, Error> {
    of(path, HostFile::open(path, read_only, Cache::WriteBack))
}

/// The one image of a chain that is worked on.
fn open_image(links: &[Link], reads_behind: bool) -> Result<(PathBuf, Qcow2), Error> {
    let image = chain::open_qcow2(links, false, Cache::WriteBack, reads_behind).map_err(failed)?;
    Ok((links.first().map(|link| link.path.clone()).unwrap_or_default(), image))
}

/// Has Python's function called with how far something is; false when it raised, which it then shall be told of.
fn tell<'a>(function: &'a Option<Py<PyAny>>, raised: &'a mut Option<PyErr>) -> impl FnMut(u64, u64) -> bool + 'a {
    move |done, all| {
        let Some(function) = function else { return true };
        match Python::attach(|py| function.call1(py, (done, all))) {
            Ok(_) => true,
            Err(error) => {
                *raised = Some(error);
                false
            }
        }
    }
}

/// What a qcow2 image says of itself.
#[pyfunction]
pub fn image_info<'py>(py: Python<'py>, path: PathBuf) -> PyResult<Bound<'py, PyDict>> {
    let (header, snapshots) = py_enter(py, || {
        // Without a lock: a running machine's image may be looked at.
        let file = of(&path, std::fs::File::open(&path).map(HostFile::own))?;
        let header = of(&path, Header::read(&file))?;
        let (snapshots, _) = of(&path, qcow2::snapshots_of(&file, &header))?;
        Ok((header, snapshots))
    })?;
    let result = PyDict::new(py);
    result.set_item("size", header.size)?;
    result.set_item("version", header.version)?;
    result.set_item("cluster_size", header.cluster())?;
    result.set_item("is_dirty", header.incompatible & DIRTY != 0)?;
    result.set_item("is_corrupt", header.incompatible & CORRUPT != 0)?;
    let (name, format) = header.backing.map_or((None, None), |(name, format)| (Some(name), format));
    result.set_item("backing", name)?;
    result.set_item("backing_format", format)?;
    let list: Vec<_> = snapshots.into_iter().map(|one| (one.id, one.name, one.date, one.size)).collect();
    result.set_item("snapshots", list)?;
    Ok(result)
}

/// Makes a file that is not there yet.
fn make(path: &Path) -> Result<HostFile, Error> {
    of(path, OpenOptions::new().read(true).write(true).create_new(true).open(path)).map(|file| {
        drop(file);
    })?;
    open_file(path, false)
}

/// Makes an empty qcow2 image.
#[pyfunction]
#[pyo3(signature = (path, size, *, backing = None), text_signature = "(path, size, *, backing=None)")]
pub fn image_create(
    py: Python<'_>,
    path: PathBuf,
    size: &Bound<'_, PyAny>,
    backing: Option<(String, String)>,
) -> PyResult<()> {
    let size = fit(size, "the size of a disk")?;
    Ok(py_enter(py, || {
        let file = make(&path)?;
        of(&path, qcow2::create(&file, size, backing)).inspect_err(|_| {
            let _ = std::fs::remove_file(&path);
        })
    })?)
}

/// Copies a disk into a file that is not there yet.
#[pyfunction]
#[pyo3(signature = (source, path, format, *, progress = None), text_signature = "(source, path, format, *, progress=None)")]
pub fn image_convert(
    py: Python<'_>,
    source: Names,
    path: PathBuf,
    format: &str,
    progress: Option<Py<PyAny>>,
) -> PyResult<()> {
    let (links, format) = (links(source)?, named(Format::parse(format), "format", format)?);
    let mut raised = None;
    let result = py_enter(py, || {
        let from = chain::open(&links, true, Cache::WriteBack).map_err(failed)?;
        let file = make(&path)?;
        let made = match format {
            Format::Raw => file.set_length(from.size()),
            Format::Qcow2 => qcow2::create(&file, from.size(), None),
        };
        drop(file);
        let copied = made.and_then(|()| {
            let to: Box<dyn Medium> = match format {
                Format::Raw => Box::new(Raw::open(&path, false, Cache::WriteBack)?),
                Format::Qcow2 => Box::new(Qcow2::open(&path, false, Cache::WriteBack, None)?),
            };
            chain::copy(&*from, &*to, &mut tell(&progress, &mut raised))
        });
        of(&path, copied).inspect_err(|_| {
            let _ = std::fs::remove_file(&path);
        })
    });
    match raised {
        Some(error) => Err(error),
        None => Ok(result?),
    }
}

/// Whether the tables of an image agree.
#[pyfunction]
#[pyo3(signature = (path, *, repair = false), text_signature = "(path, *, repair=False)")]
pub fn image_check<'py>(py: Python<'py>, path: PathBuf, repair: bool) -> PyResult<Bound<'py, PyDict>> {
    let report = py_enter(py, || of(&path, Qcow2::check(&open_file(&path, !repair)?, repair)))?;
    let result = PyDict::new(py);
    result.set_item("used", report.used)?;
    result.set_item("leaks", report.leaks)?;
    result.set_item("errors", report.errors)?;
    result.set_item("sentences", report.sentences)?;
    Ok(result)
}

/// Makes the disk of a qcow2 image larger or smaller.
#[pyfunction]
pub fn image_resize(py: Python<'_>, image: Names, size: &Bound<'_, PyAny>) -> PyResult<()> {
    let (links, size) = (links(image)?, fit(size, "the size of a disk")?);
    Ok(py_enter(py, || {
        let (path, mut image) = open_image(&links, true)?;
        of(&path, image.resize(size))
    })?)
}

/// Takes, applies or deletes a snapshot in a qcow2 image.
#[pyfunction]
pub fn image_snapshot(py: Python<'_>, image: Names, action: &str, name: &str) -> PyResult<()> {
    let links = links(image)?;
    let action: fn(&Qcow2, &str) -> std::io::Result<()> = match action {
        "create" => Qcow2::take_snapshot,
        "apply" => Qcow2::apply_snapshot,
        "delete" => Qcow2::delete_snapshot,
        other => return named(Err("create, apply, delete"), "action", other),
    };
    Ok(py_enter(py, || {
        let (path, image) = open_image(&links, true)?;
        of(&path, action(&image, name))
    })?)
}

/// Puts what a qcow2 image has into what lies behind it.
#[pyfunction]
#[pyo3(signature = (image, *, progress = None), text_signature = "(image, *, progress=None)")]
pub fn image_commit(py: Python<'_>, image: Names, progress: Option<Py<PyAny>>) -> PyResult<()> {
    let links = links(image)?;
    let mut raised = None;
    let result = py_enter(py, || {
        let (path, image) = open_image(&links, false)?;
        of(&path, image.commit(&mut tell(&progress, &mut raised)))
    });
    match raised {
        Some(error) => Err(error),
        None => Ok(result?),
    }
}
