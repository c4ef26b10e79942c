//! The socket device: streams between programs of the guest and programs of the host, without a network. Source: VIRTIO 1.2,
//! 5.10 "Socket Device"; sections below are of it.
//!
//! On the host's side each stream is a Unix socket. Who runs the machine connects and listens within its own process
//! ([`Vsock::connect_port`], [`Vsock::listen`]); others do it by name, with the convention of Firecracker (its docs/vsock.md):
//! they connect to the socket with the device's name and say `CONNECT PORT`, and a guest that connects to a port reaches who
//! listens on that name with `_PORT` behind it.
//!
//! From the guest: queue -> [`connection`] -> socket, in the queues' thread; what a slow reader leaves is held, as much as the
//! guest was promised room for. To the guest: [`sockets`], a thread that waits for the sockets, fills the driver's buffers
//! itself, each connection in its turn and no further than the guest has room.

mod connection;
mod packet;
mod sockets;
mod table;

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use host::events::EventFd;
use host::local;
use host::lock::{Rank, RankedMutex};

use super::line::Line;
use super::queue::Chain;
use super::{Answer, Backend, BackendState};
use sockets::Sockets;
use table::{MOST_CONNECTIONS, Table};

const DEVICE_TYPE: u16 = 19;
/// A communication controller of no further kind.
const PCI_CLASS: u32 = 0x07_8000;

/// 5.10.2 "Virtqueues".
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

/// 5.10.3 "Feature bits".
const STREAM_SOCKETS: u64 = 1 << 0;

/// 5.10.4 "Device configuration layout": 0 to 2 and all ones are not for guests. The host is 2.
const HOST_CID: u64 = 2;
pub const FIRST_GUEST_CID: u64 = 3;
const LAST_GUEST_CID: u64 = 0xffff_fffe;

/// 5.10.6.7 "Device Events": all connections are gone, and the guest's address may be another.
const TRANSPORT_RESET: u32 = 0;

#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    #[error("a guest cannot have the address {0}: give a number from {FIRST_GUEST_CID} to {LAST_GUEST_CID}")]
    Cid(u64),
    #[error("the guest has {MOST_CONNECTIONS} connections already")]
    Full,
    #[error("somebody listens on port {0} already")]
    Taken(u32),
    #[error("another machine has the socket {}", .0.display())]
    InUse(PathBuf),
    #[error("the socket {} cannot be made: {error}", .path.display())]
    Path { path: PathBuf, error: io::Error },
    #[error("no socket for a guest: {0}")]
    System(#[from] io::Error),
}

/// What a saved machine keeps. Its connections are not among it: programs of one host are at their other ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub guest_cid: u64,
    /// The guest has not been told yet that its connections are gone.
    pub has_moved: bool,
}

pub struct Vsock {
    shared: Arc<Shared>,
    sockets: Mutex<Option<Sockets>>,
    /// Ours by name, until the thread takes it over.
    listener: Mutex<Option<UnixListener>>,
    path: Option<PathBuf>,
}

/// What the queues' thread and that of the sockets share.
struct Shared {
    table: RankedMutex<Table>,
    line: OnceLock<Arc<Line>>,
    /// Rung when there is something new to wait for.
    doorbell: EventFd,
    /// The thread of the sockets, which looks for itself.
    waiter: OnceLock<ThreadId>,
    has_moved: AtomicBool,
}

/// Our own socket. One that nobody listens on any more, because its process was killed, is replaced.
fn bind(path: &Path) -> Result<UnixListener, VsockError> {
    let failed = |error| VsockError::Path { path: path.into(), error };
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let answer = local::connect_at_once(path).map(drop).map_err(|error| error.kind());
            if answer != Err(io::ErrorKind::ConnectionRefused) {
                return Err(VsockError::InUse(path.into()));
            }
            std::fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path)
        }
        bound => bound,
    };
    let listener = listener.map_err(failed)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Vsock {
    /// The device of a guest with this address. With a path, programs of the host reach the guest by that name.
    ///
    /// # Errors
    /// [`VsockError`] for an address or a path that cannot be.
    pub fn new(guest_cid: u64, path: Option<PathBuf>) -> Result<Vsock, VsockError> {
        if !(FIRST_GUEST_CID..=LAST_GUEST_CID).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        let listener = path.as_deref().map(bind).transpose()?;
        let shared = Shared {
            table: RankedMutex::new(Rank::Backend, Table::new(guest_cid, path.clone())),
            line: OnceLock::new(),
            doorbell: EventFd::new()?,
            waiter: OnceLock::new(),
            has_moved: AtomicBool::new(false),
        };
        Ok(Vsock { shared: Arc::new(shared), sockets: Mutex::new(None), listener: Mutex::new(listener), path })
    }

    /// Asks for a connection to a port of the guest, and gives our end of it. Its first bytes are `OK PORT` and the end of a
    /// line, when a program of the guest has taken it; when it refuses, the stream ends without. A guest that has no driver
    /// yet is asked when it has.
    ///
    /// # Errors
    /// [`VsockError::Full`], and the system's when it gives no socket or thread.
    pub fn connect_port(&self, port: u32) -> Result<OwnedFd, VsockError> {
        let (near, far) = UnixStream::pair()?;
        self.wait_for_sockets()?;
        if !self.shared.table.lock().connect(port, near) {
            return Err(VsockError::Full);
        }
        self.shared.doorbell.signal();
        if let Some(line) = self.shared.line.get() {
            line.look_at(RECEIVE);
        }
        Ok(far.into())
    }

    /// Takes the guest's connections to a port: what is returned brings the port of the guest's program, 4 bytes, and the
    /// socket with each.
    ///
    /// # Errors
    /// [`VsockError::Taken`], and the system's when it gives no socket or thread.
    pub fn listen(&self, port: u32) -> Result<OwnedFd, VsockError> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        self.wait_for_sockets()?;
        if !self.shared.table.lock().listen(port, near) {
            return Err(VsockError::Taken(port));
        }
        Ok(far.into())
    }

    /// Has the thread of the sockets run.
    fn wait_for_sockets(&self) -> io::Result<()> {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        if sockets.is_none() {
            let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
            *sockets = Some(Sockets::start(Arc::clone(&self.shared), listener)?);
        }
        Ok(())
    }

    fn stop(&self) {
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(sockets);
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(listener);
        if let Some(path) = &self.path {
            // A jailed process removes no files: then whoever started it does.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Backend for Vsock {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        STREAM_SOCKETS
    }

    fn queues(&self) -> u16 {
        3
    }

    fn shares_thread(&self) -> bool {
        true
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.shared.table.lock().guest_cid.to_le_bytes().into())
    }

    fn connect(&self, line: &Arc<Line>) {
        let _ = self.shared.line.set(Arc::clone(line));
        if self.path.is_some() {
            // Without a thread nobody hears who connects; the device serves its own process all the same.
            let _ = self.wait_for_sockets();
        }
    }

    fn reset(&self) {
        self.shared.table.lock().reset();
        self.shared.has_moved.store(false, Ordering::SeqCst);
        self.shared.doorbell.signal();
    }

    fn state(&self) -> BackendState {
        let has_moved = self.shared.has_moved.load(Ordering::SeqCst);
        BackendState::Vsock(State { guest_cid: self.shared.table.lock().guest_cid, has_moved })
    }

    fn restore(&self, state: &BackendState) {
        // The address is the one that this device was given: the guest asks for it when it is told.
        if matches!(state, BackendState::Vsock(_)) {
            self.shared.has_moved.store(true, Ordering::SeqCst);
        }
    }

    fn finish(&self) {
        if let Some(line) = self.shared.line.get() {
            line.serve(TRANSMIT);
        }
    }

    fn end(&self) {
        self.stop();
        let mut table = self.shared.table.lock();
        // All far ends read what was sent, and then the end; what a slow reader left no room for is gone.
        *table = Table::new(table.guest_cid, None);
    }

    fn serve(&self, queue: u16, _features: u64, chain: &Chain<'_>) -> Answer {
        if queue == EVENT {
            return if self.shared.has_moved.swap(false, Ordering::SeqCst) {
                Answer::Done(if chain.write(0, &TRANSPORT_RESET.to_le_bytes()) { 4 } else { 0 })
            } else {
                Answer::Kept
            };
        }
        let mut table = self.shared.table.lock();
        let answer = if queue == RECEIVE { table.fill(chain) } else { table.take(chain) };
        let has_new_wish = std::mem::take(&mut table.has_new_wish);
        // What was taken may have an answer; what was told may have made room for refusals.
        let other = match queue {
            TRANSMIT => table.has_something().then_some(RECEIVE),
            _ => table.lets_go_on().then_some(TRANSMIT),
        };
        drop(table);
        if let (Some(line), Some(other)) = (self.shared.line.get(), other) {
            line.look_at(other);
        }
        if has_new_wish && self.shared.waiter.get() != Some(&thread::current().id()) {
            if self.wait_for_sockets().is_err() {
                return answer;
            }
            self.shared.doorbell.signal();
        }
        answer
    }
}
