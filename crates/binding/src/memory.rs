//! What the class `Vm` says of the guest's memory, and does with it.

use std::fs::File;
use std::path::PathBuf;

use monitor::Gpa;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::enter::{descriptor, fit, py_enter};
use crate::vm::Vm;

#[pymethods]
impl Vm {
    fn map_image(&self, py: Python<'_>, fd: u32, runs: Vec<(u64, u64, u64)>) -> PyResult<()> {
        // Opened anew, to read only: nobody can store through what we map.
        let file = File::open(format!("/proc/self/fd/{fd}"))?;
        let runs: Vec<_> = runs.into_iter().map(|(address, page, count)| (Gpa(address), page, count)).collect();
        Ok(py_enter(py, || self.machine.map_image(file, &runs))?)
    }

    fn memory_counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = py_enter(py, || Ok(self.machine.page_counts()))?;
        let result = PyDict::new(py);
        for (name, pages) in [
            ("zero", counts.zero),
            ("private", counts.private),
            ("shared", counts.shared),
            ("image", counts.image),
            ("ballooned", counts.ballooned),
            ("compressed", counts.compressed),
            ("swapped", counts.swapped),
        ] {
            result.set_item(name, pages)?;
        }
        Ok(result)
    }

    fn memory_states<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let states = py_enter(py, || Ok(self.machine.page_states()))?;
        Ok(PyBytes::new(py, &states))
    }

    fn memory_scan<'py>(&self, py: Python<'py>, pages: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
        let pages = fit(pages, "a number of pages")?;
        let done = py_enter(py, || self.machine.scan(pages))?;
        let result = PyDict::new(py);
        result.set_item("scanned", done.scanned)?;
        result.set_item("shared", done.shared)?;
        result.set_item("zeroed", done.zeroed)?;
        result.set_item("different", done.different)?;
        result.set_item("ended", u64::from(done.has_ended))?;
        result.set_item("alone", u64::from(done.is_alone))?;
        Ok(result)
    }

    fn memory_sample(&self, py: Python<'_>, pages: &Bound<'_, PyAny>) -> PyResult<(u64, u64)> {
        let pages = fit(pages, "a number of pages")?;
        Ok(py_enter(py, || self.machine.sample(pages))?)
    }

    fn memory_evict(&self, py: Python<'_>, pages: &Bound<'_, PyAny>) -> PyResult<(u64, Option<String>)> {
        let pages = fit(pages, "a number of pages")?;
        let evicted = py_enter(py, || self.machine.evict(pages))?;
        Ok((evicted.pages, evicted.full.map(|full| full.to_string())))
    }

    fn memory_audit<'py>(&self, py: Python<'py>) -> PyResult<Vec<String>> {
        Ok(py_enter(py, || self.machine.audit())?.findings)
    }

    fn memory_trim(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(py_enter(py, || self.machine.trim())?)
    }

    fn memory_swap<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let known = py_enter(py, || Ok(self.machine.swap_statistics()))?;
        let result = PyDict::new(py);
        for (name, count) in [
            ("compressed", known.compressed),
            ("compressed_bytes", known.compressed_bytes),
            ("in_file", known.in_file),
            ("spills", known.spills),
            ("incompressible", known.incompressible),
            ("memory_loads", known.memory_loads),
            ("file_loads", known.file_loads),
            ("refused", known.refused),
            ("lost", known.lost),
        ] {
            result.set_item(name, count)?;
        }
        Ok(result)
    }

    #[pyo3(signature = (compressed_bytes, folder = None, file_bytes = None),
        text_signature = "($self, compressed_bytes, folder=None, file_bytes=0)")]
    fn set_swap(
        &self,
        py: Python<'_>,
        compressed_bytes: &Bound<'_, PyAny>,
        folder: Option<PathBuf>,
        file_bytes: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let compressed = fit(compressed_bytes, "a number of bytes")?;
        let bytes = file_bytes.map_or(Ok(0), |bytes| fit(bytes, "a number of bytes"))?;
        let file = folder.as_deref().map(|folder| (folder, bytes));
        Ok(py_enter(py, || self.machine.set_swap(compressed, file))?)
    }

    #[pyo3(signature = (socket, pool = None))]
    fn attach_sharer(
        &self,
        py: Python<'_>,
        socket: &Bound<'_, PyAny>,
        pool: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let socket = descriptor(socket)?;
        let pool = pool.map(descriptor).transpose()?;
        Ok(py_enter(py, || self.machine.attach_sharer(socket, pool))?)
    }

    fn shared_pool(&self, py: Python<'_>) -> PyResult<Option<(u64, u64)>> {
        Ok(py_enter(py, || self.machine.shared_pool())?)
    }
}
