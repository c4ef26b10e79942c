//! A machine's part in a sharing group: it is joined to the sharer, and to another one when that is gone.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};

use memory::machine::SHARED;
use memory::share::client::Client;

pub use host::passing::duplicate;
pub use memory::share::server::{Newcomer, Report, Sharer};
pub use memory::share::{Identity, MOST_PAGES, Statistics, identity};

use crate::Error;
use crate::vm::Vm;

impl Vm {
    /// Joins the machine to the sharer at the other end of a socket. The first time, before the start, with the pool of
    /// the group; later, when there is another sharer, the machine brings the pool along.
    ///
    /// # Errors
    /// [`Error::FromDevice`]; [`Error::NoPool`], [`Error::OtherPool`]; [`Error::Started`] for a pool that comes too late; the
    /// sharer's refusal.
    pub fn attach_sharer(&self, socket: OwnedFd, pool: Option<OwnedFd>) -> Result<(), Error> {
        self.not_from_device("attach_sharer")?;
        // Nobody gets or gives back shared pages meanwhile.
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = Arc::clone(&self.hall().memory);
        match (pool.map(File::from), memory.machine().source_file(SHARED)) {
            (Some(new), Some(known))
                if identity(&new).map_err(Error::Sharing)? == identity(known).map_err(Error::Sharing)? => {}
            (None, Some(_)) => {}
            (Some(_), Some(_)) => return Err(Error::OtherPool),
            (None, None) => return Err(Error::NoPool),
            (Some(new), None) => {
                drop(memory);
                // Processors that run have told the host already what there is to be mapped.
                let mut hall = self.hall.lock();
                let hall = Arc::get_mut(&mut hall).ok_or(Error::Started)?;
                hall.memory.machine().add_source(SHARED, new, u64::from(MOST_PAGES))?;
            }
        }
        let memory = Arc::clone(&self.hall().memory);
        let pool = memory.machine().source_file(SHARED).ok_or(Error::NoPool)?;
        let client = Client::new(UnixStream::from(socket), Some(pool), &memory.shared_pages());
        worker.attach(Box::new(client.map_err(Error::Sharing)?));
        Ok(())
    }

    /// Which file the pool of the sharing group is, when the machine has one.
    ///
    /// # Errors
    /// The host's.
    pub fn shared_pool(&self) -> Result<Option<Identity>, Error> {
        let memory = Arc::clone(&self.hall().memory);
        memory.machine().source_file(SHARED).map(identity).transpose().map_err(Error::Sharing)
    }
}
