//! The class `Vsock`.

use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use monitor::Error;
use monitor::vsock::FIRST_GUEST_CID;
use pyo3::prelude::*;

use crate::enter::{fit, py_enter};
use crate::virtio::VirtioDevice;

/// Streams between programs of a guest and programs of the host.
#[pyclass(frozen, extends = VirtioDevice, module = "ringzero._core")]
pub struct Vsock {
    vsock: Arc<monitor::vsock::Vsock>,
}

#[pymethods]
impl Vsock {
    #[new]
    #[pyo3(signature = (*, cid = None, path = None), text_signature = "(*, cid=3, path=None)")]
    fn new(
        py: Python<'_>,
        cid: Option<&Bound<'_, PyAny>>,
        path: Option<PathBuf>,
    ) -> PyResult<PyClassInitializer<Vsock>> {
        let cid = cid.map_or(Ok(FIRST_GUEST_CID), |cid| fit(cid, "a guest's address"))?;
        let vsock = Arc::new(py_enter(py, || monitor::vsock::Vsock::new(cid, path).map_err(Error::from))?);
        let device = VirtioDevice::new(vsock.clone());
        Ok(PyClassInitializer::from(device).add_subclass(Vsock { vsock }))
    }

    fn connect(&self, py: Python<'_>, port: &Bound<'_, PyAny>) -> PyResult<i32> {
        let port = fit(port, "a port")?;
        let socket = py_enter(py, || Ok(self.vsock.connect_port(port)?))?;
        Ok(socket.into_raw_fd())
    }

    fn listen(&self, py: Python<'_>, port: &Bound<'_, PyAny>) -> PyResult<i32> {
        let port = fit(port, "a port")?;
        let socket = py_enter(py, || Ok(self.vsock.listen(port)?))?;
        Ok(socket.into_raw_fd())
    }
}
