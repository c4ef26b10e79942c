//! Virtio devices (OASIS Virtual I/O Device (VIRTIO) Version 1.2): queues in the guest's memory, a transport by which the
//! guest finds and sets up the device, and back ends that do the work.
//!
//! A request: doorbell -> [`transport`] -> [`service`], a thread of the queue's own -> [`queue`] -> [`Backend`] -> used ring
//! -> interrupt. No processor waits for a back end, and no back end knows a transport.

pub mod balloon;
pub mod block;
pub mod console;
mod device;
pub mod entropy;
pub mod fs;
mod helpers;
pub mod line;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod requests;
pub mod service;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod transport;
pub mod vsock;

use std::borrow::Cow;
use std::sync::Arc;

use line::Line;
use queue::{Broken, Chain};
use requests::{Requests, Turn};

/// Features that belong to all devices, 6 "Reserved Feature Bits".
pub mod feature {
    pub const INDIRECT_DESCRIPTORS: u64 = 1 << 28;
    pub const EVENT_INDEX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Bits of the device status, 2.1 "Device Status Field".
pub mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
}

/// Asks for a machine's processors to be paused, and does not wait for it.
pub type Pause = Box<dyn Fn() + Send + Sync>;

/// What a device is and does. It is asked from several threads at once, one for each of its queues.
pub trait Backend: Send + Sync {
    /// Its number, 5 "Device Types".
    fn device_type(&self) -> u16;

    /// What it is to PCI: base class, subclass and programming interface.
    fn pci_class(&self) -> u32;

    /// Features of its own that it offers.
    fn features(&self) -> u64 {
        0
    }

    /// The number of its queues.
    fn queues(&self) -> u16 {
        1
    }

    /// Whether one thread serves all queues in turn: for a device that seldom has much to do.
    fn shares_thread(&self) -> bool {
        false
    }

    /// How many threads more may serve one of its queues while requests wait for something, 7 at most. Requests are done
    /// in any order then.
    fn helpers(&self) -> usize {
        0
    }

    /// Its configuration, as the guest reads it. Its length never changes.
    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&[])
    }

    /// The guest has written to the configuration, up to 8 bytes, wherever it liked.
    fn write_config(&self, _at: u64, _bytes: &[u8]) {}

    /// Gives the back end its way to the driver, once, before anything else.
    fn connect(&self, _line: &Arc<Line>) {}

    /// The driver has gone, or begins anew.
    fn reset(&self) {}

    /// Gives the back end a way to have its machine paused, before the machine starts.
    fn connect_pause(&self, _pause: Pause) {}

    /// What a saved machine keeps of it.
    fn state(&self) -> BackendState {
        BackendState::Plain
    }

    fn restore(&self, _state: &BackendState) {}

    /// The processors have ended, and the queues are still served: what the guest said last can still be carried out.
    fn finish(&self) {}

    /// The machine has ended: lets go of what others may want.
    fn end(&self) {}

    /// Carries a request of a queue out; `features` were negotiated.
    fn serve(&self, queue: u16, features: u64, chain: &Chain<'_>) -> Answer;

    /// Whether requests of a queue go together: it is then served by [`Backend::serve_together`], and not one by one.
    fn serves_together(&self, _queue: u16) -> bool {
        false
    }

    /// Takes requests of a queue, a bounded number, and finishes them.
    ///
    /// # Errors
    /// [`Broken`], as the queue says it.
    fn serve_together(&self, _queue: u16, _features: u64, _requests: &mut Requests<'_>) -> Result<Turn, Broken> {
        Ok(Turn::Empty)
    }
}

/// What a saved machine keeps of a back end, by its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendState {
    /// It has no state of its own.
    Plain,
    Balloon(balloon::State),
    Block(block::State),
    Console(console::State),
    Vsock(vsock::State),
    Fs(fs::State),
    Net(net::State),
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done: the number of bytes written, from the first that can be written on. A request that makes no sense is
    /// answered as the device's own rules say, or not at all: 0.
    Done(u32),
    /// It stays in its queue, and those behind it wait. When the queue is next looked at, it is served from its beginning.
    Kept,
}
