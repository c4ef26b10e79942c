//! The console device: ports that carry bytes between programs of the guest and sockets of the host. The first ones can be
//! consoles (hvc0 and so on); the others have names (/dev/virtio-ports/NAME). Source: VIRTIO 1.2, 5.3 "Console Device";
//! sections below are of it.
//!
//! From the guest: queue -> socket, in the queues' thread. A full socket keeps the request in its queue. To the guest:
//! [`sockets`], a thread that waits for the sockets, fills the driver's buffers itself: a byte wakes one thread on its way.
//! It is read only as far as there are buffers, so back pressure reaches the sender.

mod port;
mod sockets;

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use host::events::EventFd;
use host::lock::{Rank, RankedMutex};

use super::line::Line;
use super::queue::Chain;
use super::{Answer, Backend, BackendState};
use port::{Port, tell};
pub use port::{PortKind, PortState};
use sockets::Sockets;

const DEVICE_TYPE: u16 = 3;
/// A simple communication controller, of no further kind.
const PCI_CLASS: u32 = 0x07_8000;
/// Each has two queues, each with an interrupt of its own.
pub const MOST_PORTS: usize = 31;
/// The name of a port is a file's in the guest.
const MOST_NAME: usize = 63;

/// 5.3.3 "Feature bits".
const SIZE: u64 = 1 << 0;
const MULTIPORT: u64 = 1 << 1;

/// 5.3.2 "Virtqueues": two for port 0, two for control messages, two for each other port. Within a pair the first is filled
/// by the device.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// 5.3.4 "Device configuration layout": columns and rows of port 0, the number of ports, and a field that is not offered.
const CONFIG_BYTES: usize = 12;

/// 5.3.6.2 "Multiport Device Operation": port, event, value; events that a driver may send.
const MESSAGE_BYTES: usize = 8;
const DEVICE_READY: u16 = 0;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;

/// Why a port's socket cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    #[error("a console has 1 to {MOST_PORTS} ports, not {0}")]
    Count(usize),
    #[error("a port cannot be named {0:?}: give up to {MOST_NAME} letters, digits, dots, dashes and underscores")]
    Name(String),
    #[error("two ports are named {0:?}: give each a name of its own")]
    Twice(String),
    #[error("there is no port {wanted}: this console has {count}, counted from 0")]
    NoPort { wanted: usize, count: usize },
    #[error("port {0} already has its socket: close that first")]
    Taken(usize),
    #[error("no socket for a port: {0}")]
    System(#[from] io::Error),
}

/// What a saved machine keeps of a console. Who is at the other ends of the sockets is the host's affair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub ports: Vec<PortState>,
}

pub struct Console {
    ports: Arc<Ports>,
    sockets: Mutex<Option<Sockets>>,
}

/// What the queues' thread and that of the sockets share.
struct Ports {
    list: Vec<RankedMutex<Port>>,
    line: OnceLock<Arc<Line>>,
    /// Rung when there is something new to wait for.
    doorbell: EventFd,
    /// The thread of the sockets, which looks for itself.
    waiter: OnceLock<ThreadId>,
}

fn receive_queue(port: usize) -> u16 {
    if port == 0 { 0 } else { 2 * port as u16 + 2 }
}

fn transmit_queue(port: usize) -> u16 {
    receive_queue(port) + 1
}

/// The port that a queue which is not for control messages belongs to.
fn port_of(queue: u16) -> usize {
    usize::from(if queue < CONTROL_RECEIVE { 0 } else { queue / 2 - 1 })
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    (1..=MOST_NAME).contains(&name.len()) && name.bytes().all(allowed) && name != "." && name != ".."
}

impl Console {
    /// A console with these ports, in the order in which the guest numbers them.
    ///
    /// # Errors
    /// [`ConsoleError`] for ports that no guest can have, and the system's when it has no descriptor left.
    pub fn new(kinds: Vec<PortKind>) -> Result<Console, ConsoleError> {
        if !(1..=MOST_PORTS).contains(&kinds.len()) {
            return Err(ConsoleError::Count(kinds.len()));
        }
        for (number, kind) in kinds.iter().enumerate() {
            let PortKind::Named(name) = kind else { continue };
            if !is_name(name) {
                return Err(ConsoleError::Name(name.clone()));
            }
            if kinds[..number].contains(kind) {
                return Err(ConsoleError::Twice(name.clone()));
            }
        }
        let list = kinds.into_iter().map(|kind| RankedMutex::new(Rank::Backend, Port::new(kind))).collect();
        let ports = Ports { list, line: OnceLock::new(), doorbell: EventFd::new()?, waiter: OnceLock::new() };
        Ok(Console { ports: Arc::new(ports), sockets: Mutex::new(None) })
    }

    /// Joins a stream socket to a port and returns its far end, which the caller owns. What a guest sends through a port
    /// without one is gone. A port whose far end was closed can be joined again.
    ///
    /// # Errors
    /// [`ConsoleError`], when there is no such port, it is joined, or the system gives no socket or thread.
    pub fn connect_port(&self, number: usize) -> Result<OwnedFd, ConsoleError> {
        let count = self.ports.list.len();
        let port = self.ports.list.get(number).ok_or(ConsoleError::NoPort { wanted: number, count })?;
        let (near, far) = UnixStream::pair()?;
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        if sockets.is_none() {
            *sockets = Some(Sockets::start(Arc::clone(&self.ports))?);
        }
        if !port.lock().join(near) {
            return Err(ConsoleError::Taken(number));
        }
        self.ports.look_at(CONTROL_RECEIVE);
        self.ports.look_at(receive_queue(number));
        self.ports.doorbell.signal();
        Ok(far.into())
    }

    /// Whether a program of the guest has this port open, or the guest's system has it for a console.
    #[must_use]
    pub fn is_open(&self, number: usize) -> bool {
        self.ports.list.get(number).is_some_and(|port| port.lock().is_open)
    }

    /// Tells the guest the size of the window that a port which is a console is shown in.
    ///
    /// # Errors
    /// [`ConsoleError::NoPort`].
    pub fn resize(&self, number: usize, rows: u16, columns: u16) -> Result<(), ConsoleError> {
        let count = self.ports.list.len();
        let port = self.ports.list.get(number).ok_or(ConsoleError::NoPort { wanted: number, count })?;
        port.lock().resize(rows, columns);
        // A driver of one port looks at the configuration, one of several takes messages.
        if let (0, Some(line)) = (number, self.ports.line.get()) {
            line.config_changed();
        }
        self.ports.look_at(CONTROL_RECEIVE);
        Ok(())
    }

    /// Stops the thread of the sockets, and waits for it.
    fn stop(&self) {
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(sockets);
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Ports {
    fn look_at(&self, queue: u16) {
        if let Some(line) = self.line.get() {
            line.look_at(queue);
        }
    }

    /// A message of the driver's. One that makes no sense, or is about a port that is not there, is none.
    fn control(&self, chain: &Chain<'_>) {
        let mut message = [0; MESSAGE_BYTES];
        if !chain.read(0, &mut message) {
            return;
        }
        let [a, b, c, d, e, f, g, h] = message;
        let port = u32::from_le_bytes([a, b, c, d]) as usize;
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        match (event, self.list.get(port)) {
            (DEVICE_READY, _) if value == 1 => self.list.iter().for_each(|port| port.lock().ask(tell::ADD)),
            (PORT_READY, Some(port)) if value == 1 => port.lock().greet(),
            (PORT_OPEN, Some(entry)) => {
                entry.lock().is_open = value == 1;
                self.look_at(receive_queue(port));
            }
            _ => {}
        }
        self.look_at(CONTROL_RECEIVE);
    }

    /// The next message to the driver: all ports are added before anything else is said of one.
    fn next_message(&self, chain: &Chain<'_>) -> Answer {
        let next = |mask: u8| {
            let mut ports = self.list.iter().enumerate();
            ports.find_map(|(number, port)| port.lock().next_message(number as u32, mask))
        };
        match next(tell::ADD).or_else(|| next(u8::MAX)) {
            None => Answer::Kept,
            // A driver whose buffers hold no message gets none.
            Some(message) => Answer::Done(if chain.write(0, &message) { message.len() as u32 } else { 0 }),
        }
    }
}

impl Backend for Console {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        SIZE | MULTIPORT
    }

    fn queues(&self) -> u16 {
        2 * self.ports.list.len() as u16 + 2
    }

    fn shares_thread(&self) -> bool {
        true
    }

    fn config(&self) -> Cow<'_, [u8]> {
        let (rows, columns) = self.ports.list.first().and_then(|port| port.lock().size()).unwrap_or_default();
        let mut config = [0; CONFIG_BYTES];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&(self.ports.list.len() as u32).to_le_bytes());
        Cow::Owned(config.into())
    }

    fn connect(&self, line: &Arc<Line>) {
        let _ = self.ports.line.set(Arc::clone(line));
    }

    fn reset(&self) {
        self.ports.list.iter().for_each(|port| port.lock().reset());
    }

    fn state(&self) -> BackendState {
        BackendState::Console(State { ports: self.ports.list.iter().map(|port| port.lock().state()).collect() })
    }

    fn restore(&self, state: &BackendState) {
        let BackendState::Console(state) = state else { return };
        for (port, saved) in self.ports.list.iter().zip(&state.ports) {
            port.lock().restore(saved);
        }
    }

    fn finish(&self) {
        if let Some(line) = self.ports.line.get() {
            (0..self.ports.list.len()).for_each(|number| line.serve(transmit_queue(number)));
        }
    }

    fn end(&self) {
        self.stop();
        self.ports.list.iter().for_each(|port| port.lock().part());
    }

    fn serve(&self, queue: u16, features: u64, chain: &Chain<'_>) -> Answer {
        let Some(port) = self.ports.list.get(port_of(queue)) else { return Answer::Done(0) };
        match queue {
            CONTROL_RECEIVE => self.ports.next_message(chain),
            CONTROL_TRANSMIT => {
                self.ports.control(chain);
                Answer::Done(0)
            }
            _ => {
                let mut port = port.lock();
                // 5.3.5: without several ports there is one, which is open.
                let is_open = port.is_open || features & MULTIPORT == 0;
                let answer = if queue & 1 == 1 { port.transmit(chain) } else { port.receive(chain, is_open) };
                if std::mem::take(&mut port.has_new_wish) && self.ports.waiter.get() != Some(&thread::current().id()) {
                    self.ports.doorbell.signal();
                }
                answer
            }
        }
    }
}
