//! What runs here, and on what.

use monitor::Feature;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The names of the engines that this build has.
#[pyfunction]
pub fn engines() -> Vec<&'static str> {
    monitor::ENGINES.to_vec()
}

/// Makes what all machines of a process have in common.
#[pyfunction]
pub fn prepare(py: Python<'_>) {
    py.detach(monitor::prepare);
}

/// What `ringzero doctor` shows of the host processor.
#[pyfunction]
pub fn host_features(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let features = py.detach(monitor::host_features);
    let result = PyDict::new(py);
    for (name, feature) in features {
        match feature {
            Feature::Flag(flag) => result.set_item(name, flag)?,
            Feature::Number(number) => result.set_item(name, number)?,
            Feature::Text(text) => result.set_item(name, text)?,
        }
    }
    Ok(result)
}
