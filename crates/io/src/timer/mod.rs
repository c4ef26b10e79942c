//! Timers: the interval timer, the ACPI timer and power control, and the thread that serves all deadlines.

pub mod acpi;
pub mod pit;
pub mod service;

pub use acpi::{AcpiPorts, EndRequest, FastControl, SCI_LINE};
pub use pit::Pit;
pub use service::{NEVER, Timer, TimerQueue, TimerTarget, TimerThread};
