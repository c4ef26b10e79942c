//! A device that is written in Python, as the dispatcher calls it.

use monitor::slow::SlowDevice;
use pyo3::intern;
use pyo3::prelude::*;

pub struct PythonDevice {
    name: String,
    /// Taken only by `drop`, which needs the GIL.
    device: Option<Py<PyAny>>,
}

impl PythonDevice {
    /// # Errors
    /// When it has no `read` or `write` to call.
    pub fn new(device: &Bound<'_, PyAny>) -> PyResult<PythonDevice> {
        for method in ["read", "write"] {
            if !device.getattr(method).is_ok_and(|found| found.is_callable()) {
                let message = format!("a port device must have a method '{method}'");
                return Err(pyo3::exceptions::PyTypeError::new_err(message));
            }
        }
        let name = device.get_type().name()?.to_string();
        Ok(PythonDevice { name, device: Some(device.clone().unbind()) })
    }

    /// Calls the device with the GIL, which is held for no longer than that.
    fn with<T>(&self, call: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<T>) -> Result<T, String> {
        let Some(device) = &self.device else { return Err("it is gone".into()) };
        Python::try_attach(|py| call(device.bind(py)).map_err(|error| sentence(&error, py)))
            .unwrap_or_else(|| Err("the interpreter has ended".into()))
    }
}

/// An exception in one line: type, message, and where it was raised.
fn sentence(error: &PyErr, py: Python<'_>) -> String {
    let kind = error.get_type(py).name().map_or_else(|_| "exception".into(), |name| name.to_string());
    let message = error.value(py).str().map_or_else(|_| String::new(), |text| text.to_string());
    let place = place(error, py).map_or_else(String::new, |(file, line)| format!(" ({file} line {line})"));
    format!("{kind}: {}{place}", message.replace('\n', " "))
}

/// File and line of the innermost frame.
fn place(error: &PyErr, py: Python<'_>) -> Option<(String, u32)> {
    let mut frame = error.traceback(py)?.into_any();
    loop {
        match frame.getattr("tb_next") {
            Ok(next) if !next.is_none() => frame = next,
            _ => break,
        }
    }
    let line = frame.getattr("tb_lineno").ok()?.extract().ok()?;
    let file: String =
        frame.getattr("tb_frame").ok()?.getattr("f_code").ok()?.getattr("co_filename").ok()?.extract().ok()?;
    Some((file, line))
}

impl SlowDevice for PythonDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn read(&mut self, offset: u16, size: u8) -> Result<u32, String> {
        let value = self.with(|device| {
            let py = device.py();
            device.call_method1(intern!(py, "read"), (offset, size))?.extract::<u64>()
        })?;
        match u32::try_from(value) {
            Ok(value) if u64::from(value) < 1 << (8 * size) => Ok(value),
            _ => Err(format!("read returned {value:#x}, which is more than {size} bytes hold")),
        }
    }

    fn write(&mut self, offset: u16, size: u8, value: u32) -> Result<(), String> {
        self.with(|device| {
            let py = device.py();
            device.call_method1(intern!(py, "write"), (offset, size, value)).map(drop)
        })
    }
}

impl Drop for PythonDevice {
    fn drop(&mut self) {
        let device = self.device.take();
        // Without an interpreter there is nobody left to give it back to.
        Python::try_attach(|_| drop(device));
    }
}
