//! The class `Sharer`.

use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;

use monitor::Error;
use monitor::sharing::{MOST_PAGES, Newcomer, Statistics};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::enter::{descriptor, fit, py_enter};

/// Counts shared pages for the VMs of a host.
#[pyclass(frozen, module = "ringzero._core")]
pub struct Sharer {
    sharer: monitor::sharing::Sharer,
}

fn in_python<'py>(py: Python<'py>, known: &Statistics) -> PyResult<Bound<'py, PyDict>> {
    let result = PyDict::new(py);
    for (name, count) in [
        ("members", known.members),
        ("guest_pages", known.guest_pages),
        ("shared_pages", known.shared_pages),
        ("uses", known.uses),
        ("offered", known.offered),
        ("found", known.found),
        ("added", known.added),
        ("stale", known.stale),
        ("released", known.released),
        ("metadata_bytes", known.metadata_bytes),
    ] {
        result.set_item(name, count)?;
    }
    Ok(result)
}

#[pymethods]
impl Sharer {
    #[new]
    #[pyo3(signature = (pages = None), text_signature = "(pages=16777216)")]
    fn new(py: Python<'_>, pages: Option<&Bound<'_, PyAny>>) -> PyResult<Sharer> {
        let pages = pages.map_or(Ok(MOST_PAGES), |pages| fit(pages, "a number of pages"))?;
        Ok(Sharer { sharer: py_enter(py, || monitor::sharing::Sharer::start(pages).map_err(Error::Sharing))? })
    }

    #[pyo3(signature = (group, vm, socket, pages, pool = None))]
    fn join(
        &self,
        py: Python<'_>,
        group: String,
        vm: String,
        socket: &Bound<'_, PyAny>,
        pages: &Bound<'_, PyAny>,
        pool: Option<(u64, u64)>,
    ) -> PyResult<(Option<i32>, (u64, u64))> {
        let socket = UnixStream::from(descriptor(socket)?);
        let newcomer = Newcomer { group, name: vm, socket, pages: fit(pages, "a number of pages")?, pool };
        let (pool, identity) = py_enter(py, || self.sharer.join(newcomer).map_err(Error::Sharing))?;
        Ok((pool.map(IntoRawFd::into_raw_fd), identity))
    }

    fn recovered(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py_enter(py, || self.sharer.recovered().map_err(Error::Sharing))?)
    }

    fn report<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyDict>, Vec<String>)> {
        let report = py_enter(py, || self.sharer.report().map_err(Error::Sharing))?;
        let groups = PyDict::new(py);
        for (name, statistics) in &report.groups {
            groups.set_item(name, in_python(py, statistics)?)?;
        }
        Ok((groups, report.sentences))
    }

    fn audit(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        Ok(py_enter(py, || self.sharer.audit().map_err(Error::Sharing))?)
    }
}
