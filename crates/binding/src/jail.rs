//! The jail of a process that runs one VM.

use pyo3::prelude::*;

use crate::enter::py_enter;

/// Puts this process into the jail.
#[pyfunction]
#[pyo3(signature = (*, network = false), text_signature = "(*, network=False)")]
pub fn enter_jail(py: Python<'_>, network: bool) -> PyResult<()> {
    Ok(py_enter(py, || monitor::enter_jail(network))?)
}
