//! The way from a back end to its driver, for devices that speak without being asked.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use host::lock::{Rank, RankedMutex};

use super::service::Shared;

/// One a device, as long as the device is there. It does nothing while there is no driver.
#[derive(Debug)]
pub struct Line {
    /// Of the driver that is on.
    service: RankedMutex<Weak<Shared>>,
    generation: AtomicU8,
}

impl Default for Line {
    fn default() -> Self {
        Line { service: RankedMutex::new(Rank::Waiting, Weak::new()), generation: AtomicU8::new(0) }
    }
}

impl Line {
    pub(super) fn set(&self, service: &Arc<Shared>) {
        *self.service.lock() = Arc::downgrade(service);
    }

    pub(super) fn clear(&self) {
        *self.service.lock() = Weak::new();
    }

    fn service(&self) -> Option<Arc<Shared>> {
        self.service.lock().upgrade()
    }

    /// Whether a driver is on, and has done nothing that breaks the device.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.service().is_some_and(|service| !service.is_broken())
    }

    /// The configuration has changed: tells the driver.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if let Some(service) = self.service() {
            service.tell_config();
        }
    }

    /// Which configuration it is: another number after each change, 2.5.1 "Device Requirements: Device Configuration Space".
    #[must_use]
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Has a queue looked at, as if the driver had notified.
    pub fn look_at(&self, queue: u16) {
        if let Some(service) = self.service() {
            service.look_at(queue);
        }
    }

    /// Serves a queue before it returns, in the caller's thread: one of the back end's own, that holds no lock.
    pub fn serve(&self, queue: u16) {
        if let Some(service) = self.service() {
            service.serve_here(queue);
        }
    }
}
