//! Disks: the class `Disk`.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use monitor::block::{self, Block, OnError};
use monitor::disk::limit::Rates;
use monitor::disk::{Cache, chain};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::enter::{CoreError, fit, py_enter};
use crate::image::{Names, failed, links};
use crate::virtio::VirtioDevice;

/// An open disk: the device of one machine, and what can be asked of it and set while that runs.
#[pyclass(frozen, extends = VirtioDevice, module = "ringzero._core")]
pub struct Disk {
    /// As long as its machine is there, or this waits for one.
    block: Weak<Block>,
}

fn rate(value: Option<&Bound<'_, PyAny>>, what: &str) -> PyResult<u64> {
    value.map_or(Ok(0), |value| fit(value, what))
}

/// One of some names, or what else there is.
pub fn named<T>(result: Result<T, &str>, what: &str, name: &str) -> PyResult<T> {
    result.map_err(|known| CoreError::new_err(format!("there is no {what} '{name}': choose one of {known}")))
}

#[pymethods]
impl Disk {
    #[new]
    #[pyo3(signature = (path, *, format = "raw", behind = Names::new(), is_temporary = false, read_only = false, serial = String::new(), queues = None, cache = "writeback",
            on_error = "auto", iops = None, bps = None),
        text_signature = "(path, *, format='raw', behind=(), is_temporary=False, read_only=False, serial='', queues=1, cache='writeback', on_error='auto', iops=0, \
            bps=0)")]
    #[expect(clippy::too_many_arguments, reason = "they are Python's keyword arguments")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        format: &str,
        behind: Names,
        is_temporary: bool,
        read_only: bool,
        serial: String,
        queues: Option<&Bound<'_, PyAny>>,
        cache: &str,
        on_error: &str,
        iops: Option<&Bound<'_, PyAny>>,
        bps: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Disk>> {
        let queues = queues.map_or(Ok(1), |queues| fit(queues, "the number of queues"))?;
        let rates = Rates { operations: rate(iops, "operations a second")?, bytes: rate(bps, "bytes a second")? };
        let on_error = named(OnError::parse(on_error), "way with errors", on_error)?;
        let cache = named(Cache::parse(cache), "cache mode", cache)?;
        let traits = block::Disk { read_only, serial, queues, rates, on_error };
        let mut names = vec![(path, format.to_string())];
        names.extend(behind);
        let links = links(names)?;
        let block = py_enter(py, || {
            let medium = if is_temporary { chain::over(&links, cache) } else { chain::open(&links, read_only, cache) };
            Ok(Arc::new(Block::new(medium.map_err(failed)?, traits)))
        })?;
        let disk = Disk { block: Arc::downgrade(&block) };
        Ok(PyClassInitializer::from(VirtioDevice::new(block)).add_subclass(disk))
    }

    fn trouble(&self, py: Python<'_>) -> PyResult<Option<String>> {
        Ok(py_enter(py, || Ok(self.block.upgrade().and_then(|block| block.trouble())))?)
    }

    fn retry(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py_enter(py, || {
            if let Some(block) = self.block.upgrade() {
                block.retry();
            }
            Ok(())
        })?)
    }

    #[pyo3(signature = (*, iops = None, bps = None), text_signature = "($self, *, iops=0, bps=0)")]
    fn limit(&self, py: Python<'_>, iops: Option<&Bound<'_, PyAny>>, bps: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let rates = Rates { operations: rate(iops, "operations a second")?, bytes: rate(bps, "bytes a second")? };
        Ok(py_enter(py, || {
            if let Some(block) = self.block.upgrade() {
                block.set_rates(rates);
            }
            Ok(())
        })?)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py_enter(py, || Ok(self.block.upgrade().map(|block| block.stats()).unwrap_or_default()))?;
        let result = PyDict::new(py);
        for (name, value) in stats {
            result.set_item(name, value)?;
        }
        Ok(result)
    }
}
