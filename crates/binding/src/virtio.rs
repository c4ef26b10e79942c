//! The class `VirtioDevice`.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use monitor::Backend;
use pyo3::prelude::*;

use crate::enter::CoreError;

/// A device that waits for its machine.
#[pyclass(frozen, subclass, module = "ringzero._core")]
pub struct VirtioDevice {
    /// Gone when a machine has it.
    backend: Mutex<Option<Arc<dyn Backend>>>,
    /// By which the machine knows it.
    pub known: Weak<dyn Backend>,
}

impl VirtioDevice {
    pub fn new(backend: Arc<dyn Backend>) -> VirtioDevice {
        let known = Arc::downgrade(&backend);
        VirtioDevice { backend: Mutex::new(Some(backend)), known }
    }

    /// Gives the device to a machine.
    pub fn take(&self) -> PyResult<Arc<dyn Backend>> {
        let backend = self.backend.lock().unwrap_or_else(PoisonError::into_inner).take();
        backend.ok_or_else(|| CoreError::new_err("a machine has this device already: make another one"))
    }
}
