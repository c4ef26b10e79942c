//! The boundary between the Python package and its Rust core: parse, call, convert, and nothing else. What the calls
//! mean is told in `python/ringzero/_core.pyi`.
#![deny(unsafe_code)]

mod console;
mod device;
mod disk;
mod enter;
mod features;
mod folder;
mod image;
mod jail;
mod memory;
mod network;
mod sharer;
mod switch;
mod virtio;
mod vm;
mod vsock;

/// The core of ringzero; see `_core.pyi`.
#[pyo3::pymodule(name = "_core")]
mod core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::console::Console;
    #[pymodule_export]
    use crate::disk::Disk;
    #[pymodule_export]
    use crate::enter::CoreError;
    #[pymodule_export]
    use crate::features::{engines, host_features, prepare};
    #[pymodule_export]
    use crate::folder::{serve_folder, shared_folder};
    #[pymodule_export]
    use crate::image::{
        image_check, image_commit, image_convert, image_create, image_info, image_resize, image_snapshot,
    };
    #[pymodule_export]
    use crate::jail::enter_jail;
    #[pymodule_export]
    use crate::network::{NetworkCard, Switch, nat_card};
    #[pymodule_export]
    use crate::sharer::Sharer;
    #[pymodule_export]
    use crate::switch::{HostSwitch, cable_card, tap_card};
    #[pymodule_export]
    use crate::virtio::VirtioDevice;
    #[pymodule_export]
    use crate::vm::Vm;
    #[pymodule_export]
    use crate::vsock::Vsock;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        monitor::begin_to_measure();
        // Threads that want the interpreter while it goes away are ended by it in the middle of what they do. Exit
        // handlers run before that, while everything still works.
        let stop_all = wrap_pyfunction!(crate::vm::stop_all, module)?;
        module.py().import("atexit")?.call_method1("register", (stop_all,))?;
        Ok(())
    }
}
