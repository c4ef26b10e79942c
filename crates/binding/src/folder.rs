//! Folders that a guest mounts.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use monitor::Error;
use monitor::fs::SharedFolder;
use monitor::sharing::duplicate;
use pyo3::prelude::*;

use crate::enter::py_enter;
use crate::virtio::VirtioDevice;

/// A folder of the host that a guest mounts.
#[pyfunction]
#[pyo3(signature = (path, tag, *, read_only = false, server = None))]
pub fn shared_folder(
    py: Python<'_>,
    path: PathBuf,
    tag: &str,
    read_only: bool,
    server: Option<i32>,
) -> PyResult<VirtioDevice> {
    let folder = py_enter(py, || match server {
        None => Ok(SharedFolder::new(&path, tag, read_only)?),
        Some(fd) => Ok(SharedFolder::elsewhere(&path, tag, descriptor(fd)?.into())?),
    })?;
    Ok(VirtioDevice::new(Arc::new(folder)))
}

fn descriptor(fd: i32) -> Result<OwnedFd, Error> {
    duplicate(fd).map_err(|error| Error::Host { what: "socket", error })
}

/// Serves a folder to another process.
#[pyfunction]
#[pyo3(signature = (path, socket, *, read_only = false))]
pub fn serve_folder(py: Python<'_>, path: PathBuf, socket: i32, read_only: bool) -> PyResult<()> {
    Ok(py_enter(py, || monitor::serve_folder(&path, read_only, descriptor(socket)?))?)
}
