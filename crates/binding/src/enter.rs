//! The one door from Python into the core: it lets the GIL go, maps errors, and keeps a panic of ours from tearing
//! through the interpreter.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(
    ringzero._core,
    CoreError,
    PyException,
    "The core refused or failed: the message is one sentence and says what to do."
);

/// Why a call into the core failed.
pub enum Failure {
    Refused(monitor::Error),
    /// Our own defect.
    Panicked,
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> PyErr {
        match failure {
            Failure::Refused(error) => CoreError::new_err(error.to_string()),
            Failure::Panicked => CoreError::new_err("ringzero has a defect: see the panic message on standard error"),
        }
    }
}

/// Runs `call` without the GIL, so that it may wait.
pub fn py_enter<T: Send>(
    py: Python<'_>,
    call: impl FnOnce() -> Result<T, monitor::Error> + Send,
) -> Result<T, Failure> {
    let result = py.detach(|| catch_unwind(AssertUnwindSafe(call)));
    result.map_err(|_| Failure::Panicked)?.map_err(Failure::Refused)
}

/// An integer argument as the type that the core wants; what does not fit is one sentence, like every other refusal.
pub fn fit<T: TryFrom<i128>>(value: &Bound<'_, PyAny>, what: &str) -> PyResult<T> {
    let number = value.extract::<i128>().or_else(|error| {
        // Too large even for this; a wrong type stays a TypeError.
        if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(value.py()) { Ok(i128::MAX) } else { Err(error) }
    })?;
    T::try_from(number).map_err(|_| CoreError::new_err(format!("{what} cannot be {value}")))
}

/// A copy of a descriptor of the caller's.
pub fn descriptor(value: &Bound<'_, PyAny>) -> PyResult<OwnedFd> {
    let number = fit(value, "a descriptor")?;
    monitor::sharing::duplicate(number).map_err(|error| CoreError::new_err(format!("descriptor {number}: {error}")))
}
