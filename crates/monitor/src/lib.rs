//! THE HALL where processor, memory and I/O virtualization meet: the assembly of a machine and the run loop of its
//! processors.
#![forbid(unsafe_code)]

pub mod control;
mod error;
pub mod features;
pub mod hotplug;
pub mod kick;
mod memory;
pub mod outside;
pub mod registers;
pub mod run;
pub mod sharing;
pub mod slow;
pub mod trace;
pub mod vm;

use std::os::fd::OwnedFd;
use std::path::Path;

/// Makes what all machines of this process have in common, before it forks.
pub fn prepare() {
    processor::prepare();
}

/// Puts all threads of this process into the jail ([`host::jail`]), for ever.
///
/// # Errors
/// When the system has no such filters.
pub fn enter_jail(has_network: bool) -> Result<(), Error> {
    host::jail::enter(has_network).map_err(|error| Error::Host { what: "jail", error })
}

/// Serves a folder to a machine's process at the other end of a socket until that has gone, in a jail of its own.
///
/// # Errors
/// When there is no jail on this host, or what that process says makes no sense.
pub fn serve_folder(path: &Path, is_read_only: bool, socket: OwnedFd) -> Result<(), Error> {
    let failed = |error| Error::Host { what: "folder", error };
    io::virtio::fs::serve_folder(path, is_read_only, socket.into(), host::jail::enter_with_folder).map_err(failed)
}

#[cfg(test)]
mod tests;

pub use error::Error;
pub use features::{Feature, host_features};
pub use memory::PageCounts;
pub use vm::{ENGINES, Options, Region, RegionKind, Vm};

// For `binding`, which names no crate of ours but this one.
pub use host::clock::begin_to_measure;
pub use io::disk;
pub use io::virtio::Backend;
pub use io::virtio::fs;
pub use io::virtio::vsock;
pub use io::virtio::{block, console};
pub use x86::Gpa;

/// What a network card is, and what its cable may lead to.
pub mod network {
    pub use host::medium::Medium;
    pub use io::network::cable::Cable;
    pub use io::network::switch::{Switch, server};
    pub use io::network::{Mac, Wire, nat};
    pub use io::virtio::net::Net;
}
