//! The class `Console`.

use std::os::fd::IntoRawFd;
use std::sync::Arc;

use monitor::Error;
use monitor::console::PortKind;
use pyo3::prelude::*;

use crate::enter::{fit, py_enter};
use crate::virtio::VirtioDevice;

/// A console with several ports.
#[pyclass(frozen, extends = VirtioDevice, module = "ringzero._core")]
pub struct Console {
    console: Arc<monitor::console::Console>,
}

#[pymethods]
impl Console {
    #[new]
    #[pyo3(signature = (names, *, consoles = None), text_signature = "(names, *, consoles=0)")]
    fn new(
        py: Python<'_>,
        names: Vec<String>,
        consoles: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyClassInitializer<Console>> {
        let consoles: u8 = consoles.map_or(Ok(0), |count| fit(count, "a number of consoles"))?;
        let mut kinds = vec![PortKind::Console; usize::from(consoles)];
        kinds.extend(names.into_iter().map(PortKind::Named));
        let console = py_enter(py, || monitor::console::Console::new(kinds).map_err(Error::from))?;
        let console = Arc::new(console);
        let device = VirtioDevice::new(console.clone());
        Ok(PyClassInitializer::from(device).add_subclass(Console { console }))
    }

    fn port(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<i32> {
        let index = fit(index, "a port")?;
        let socket = py_enter(py, || Ok(self.console.connect_port(index)?))?;
        Ok(socket.into_raw_fd())
    }

    fn is_open(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<bool> {
        let index = fit(index, "a port")?;
        Ok(py_enter(py, || Ok(self.console.is_open(index)))?)
    }

    fn resize(
        &self,
        py: Python<'_>,
        index: &Bound<'_, PyAny>,
        rows: &Bound<'_, PyAny>,
        columns: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (index, rows, columns) = (fit(index, "a port")?, fit(rows, "rows")?, fit(columns, "columns")?);
        Ok(py_enter(py, || Ok(self.console.resize(index, rows, columns)?))?)
    }
}
