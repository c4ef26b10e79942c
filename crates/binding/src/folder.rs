//! Folders that a guest mounts.

use std::path::PathBuf;
use std::sync::Arc;

use monitor::Error;
use monitor::fs::SharedFolder;
use pyo3::prelude::*;

use crate::enter::py_enter;
use crate::virtio::VirtioDevice;

/// A folder of the host that a guest mounts.
#[pyfunction]
#[pyo3(signature = (path, tag, *, read_only = false))]
pub fn shared_folder(py: Python<'_>, path: PathBuf, tag: &str, read_only: bool) -> PyResult<VirtioDevice> {
    let folder = py_enter(py, || SharedFolder::new(&path, tag, read_only).map_err(Error::from))?;
    Ok(VirtioDevice::new(Arc::new(folder)))
}
