//! I/O VIRTUALIZATION: the buses, PCI among them, the interrupt controllers, the timers, the serial ports, and their
//! assembly.
//!
//! A port write: monitor -> [`platform`] -> [`bus`] -> device -> interrupt line -> [`irq`] -> kick of a processor.
#![forbid(unsafe_code)]

pub mod bus;
pub mod disk;
pub mod irq;
pub mod network;
pub mod pci;
pub mod platform;
pub mod scratch;
pub mod serial_service;
pub mod timer;
pub mod uart;
pub mod virtio;

pub use bus::{AccessSize, BusError, MmioDevice, PortDevice};
pub use irq::{Interrupt, Kick, attention};
pub use platform::{Config, Error, Platform};
pub use timer::EndRequest;
