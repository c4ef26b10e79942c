//! Disks.

use std::path::PathBuf;
use std::sync::Arc;

use monitor::Error;
use monitor::disk::{Block, Disk};
use pyo3::prelude::*;

use crate::enter::{fit, py_enter};
use crate::virtio::VirtioDevice;

/// A disk in a raw file.
#[pyfunction]
#[pyo3(signature = (path, *, read_only = false, serial = String::new(), queues = None),
    text_signature = "(path, *, read_only=False, serial='', queues=1)")]
pub fn raw_disk(
    py: Python<'_>,
    path: PathBuf,
    read_only: bool,
    serial: String,
    queues: Option<&Bound<'_, PyAny>>,
) -> PyResult<VirtioDevice> {
    let queues = queues.map_or(Ok(1), |queues| fit(queues, "the number of queues"))?;
    let traits = Disk { read_only, serial, queues };
    let block = py_enter(py, || Block::open(&path, traits).map_err(|error| Error::Disk { path: path.clone(), error }))?;
    Ok(VirtioDevice::new(Arc::new(block)))
}
