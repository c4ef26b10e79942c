//! Devices that come to a machine while it runs, and go.

use std::sync::{Arc, Weak};
use std::time::Duration;

use host::lock::{Rank, RankedMutex};
use io::pci::hotplug::Presence;
use io::virtio::Backend;

use crate::control::Control;
use crate::{Error, Vm};

/// A device, and its card.
type Known = (Weak<dyn Backend>, Arc<Presence>);

/// The devices that can be asked for back.
pub(crate) struct Plugged(RankedMutex<Vec<Known>>);

impl Default for Plugged {
    fn default() -> Self {
        Plugged(RankedMutex::new(Rank::Waiting, Vec::new()))
    }
}

impl Plugged {
    pub fn add(&self, device: &Arc<dyn Backend>, presence: Arc<Presence>) {
        let mut list = self.0.lock();
        list.retain(|(_, presence)| !presence.is_gone());
        list.push((Arc::downgrade(device), presence));
    }

    fn find(&self, device: &Weak<dyn Backend>) -> Result<Arc<Presence>, Error> {
        let list = self.0.lock();
        let found = list.iter().find(|(known, _)| Weak::ptr_eq(known, device));
        Ok(Arc::clone(&found.ok_or(Error::NoDevice)?.1))
    }
}

/// Gives a device a way to have its machine paused.
pub(crate) fn connect_pause(device: &dyn Backend, control: &Arc<Control>) {
    let paused = Arc::clone(control);
    device.connect_pause(Box::new(move || {
        let control = Arc::clone(&paused);
        // A thread of its own: whoever asks may be waited for by those who wait for the machine to stand still.
        let _ = std::thread::Builder::new().name("rz-pause".into()).spawn(move || control.pause());
    }));
}

impl Vm {
    /// Puts a device on the bus of a machine that has started, and tells the guest.
    ///
    /// # Errors
    /// [`Error::NotStarted`], [`Error::Ended`]; [`Error::Platform`] when the bus is full.
    pub fn attach(&self, device: &Arc<dyn Backend>) -> Result<(), Error> {
        self.control.check_alive()?;
        let hall = self.hall();
        connect_pause(device.as_ref(), &self.control);
        let plugged = hall.platform.plug_in(Arc::clone(device), Arc::clone(&hall.memory));
        let presence = plugged.or_else(|error| self.control.check_alive().and(Err(error.into())))?;
        self.plugged.add(device, presence);
        Ok(())
    }

    /// Asks the guest for a device, whether it came while it ran or was there from the start. Whoever asks again tells the
    /// guest again.
    ///
    /// # Errors
    /// [`Error::NoDevice`], [`Error::NotStarted`], [`Error::Ended`].
    pub fn want_back(&self, device: &Weak<dyn Backend>) -> Result<Arc<Presence>, Error> {
        let presence = self.plugged.find(device)?;
        self.control.check_alive()?;
        // If it went in this moment, that will be seen.
        let _ = self.hall().platform.want_back(&presence);
        Ok(presence)
    }

    /// Waits until the guest has let a device go, and nothing of it is in use any more; false when `timeout` passed first.
    ///
    /// # Errors
    /// [`Error::FromDevice`]; [`Error::Ended`] when the machine ended instead.
    pub fn wait_gone(&self, presence: &Presence, timeout: Duration) -> Result<bool, Error> {
        self.not_from_device("detach")?;
        let is_gone = presence.wait_gone(timeout);
        if !is_gone {
            self.control.check_alive()?;
        }
        Ok(is_gone)
    }
}
