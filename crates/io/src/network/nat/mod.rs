//! A network of the guest's own, with a way out: the guest's connections end here, and are carried on by ordinary sockets of
//! the host (network address translation without any right). docs/networks.md has the operator's view.
//!
//! A frame of the guest's is carried out on the card's transmit thread; what comes from sockets, on a thread of the
//! network's own, which sleeps in epoll. Both hold [`State`] while they work.

pub mod config;
mod dhcp;
mod dhcp6;
mod dns;
mod fragments;
mod neighbours;
mod segment;
mod state;
mod tcp;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod udp;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use host::events::EventFd;
use host::lock::{Rank, RankedMutex};
use host::socket::{Epoll, Event};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use self::config::{Config, Forward, ROUTER};
use self::state::State;
use super::frame::Frame;
use super::inbox::Inbox;
use super::packet::{self, IPV4, IPV6};
use super::{Mac, Wire};

/// What epoll calls the thread's own alarm; the host's listening sockets come behind it, and then connections.
const WAKE: u64 = 0;
const FIRST_LISTENER: u64 = 1;
const FIRST_FLOW: u64 = 1 << 16;

/// What all connections of a guest share.
struct Common {
    config: Config,
    inbox: Arc<Inbox>,
    /// Where frames for the guest go: to the card that was last heard of.
    guest: Mac,
    /// Bytes on their way to the guest, kept until it says that it has them, and bytes for hosts that do not read.
    held: usize,
    pending: usize,
    /// Segments that were sent again.
    again: u64,
    /// The next time at which a connection wants to be looked at.
    alarm: Option<Instant>,
    /// Somebody had more for the guest than there was room for.
    is_starved: bool,
    buffer: Vec<u8>,
}

impl Common {
    /// The beginning of a frame to the guest.
    fn ethernet(&self, target: IpAddr) -> Vec<u8> {
        let kind = if target.is_ipv4() { IPV4 } else { IPV6 };
        let card = match target {
            IpAddr::V6(address) if address.is_multicast() => {
                let [.., a, b, c, d] = address.octets();
                Mac([0x33, 0x33, a, b, c, d])
            }
            _ => self.guest,
        };
        packet::ethernet(ROUTER, card, kind)
    }

    /// The most that a TCP segment to or from an address may carry, 3.7.1 of RFC 9293.
    fn maximum(&self, guest: SocketAddr) -> u16 {
        self.config.mtu - if guest.is_ipv4() { 40 } else { 60 }
    }

    fn send(&self, frame: Frame) {
        // Where there is no room for it, the guest takes nothing, and misses nothing.
        let _ = self.inbox.offer(frame);
    }

    fn send_datagram(&self, source: SocketAddr, target: SocketAddr, data: &[u8]) {
        let room = 65535 - if source.is_ipv4() { 28 } else { 8 };
        if data.len() <= room {
            self.send(udp::datagram(self.ethernet(target.ip()), source, target, data, self.config.mtu));
        }
    }

    fn has_room(&mut self) -> bool {
        let has_room = self.inbox.has_room();
        self.is_starved |= !has_room;
        has_room
    }

    fn wake_at(&mut self, moment: Instant) {
        self.alarm = Some(self.alarm.map_or(moment, |alarm| alarm.min(moment)));
    }
}

struct Shared {
    /// There from when the card is connected.
    state: OnceLock<RankedMutex<State>>,
    epoll: Arc<Epoll>,
    wake: EventFd,
    stopping: AtomicBool,
    starved: AtomicBool,
}

pub struct Nat {
    shared: Arc<Shared>,
    config: Mutex<Option<Config>>,
    guest: Mac,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Nat {
    /// A network for a guest with this card.
    ///
    /// # Errors
    /// The system's, when it has no descriptors left.
    pub fn new(config: Config, guest: Mac) -> io::Result<Nat> {
        let (epoll, wake) = (Arc::new(Epoll::new()?), EventFd::new()?);
        epoll.watch_readable(wake.as_fd(), WAKE)?;
        for (forward, token) in config.forwards.iter().zip(FIRST_LISTENER..FIRST_FLOW) {
            match forward {
                Forward::Tcp(listener, _) => {
                    listener.set_nonblocking(true)?;
                    epoll.watch_readable(listener.as_fd(), token)?;
                }
                Forward::Udp(socket, _) => {
                    socket.set_nonblocking(true)?;
                    epoll.watch_readable(socket.as_fd(), token)?;
                }
            }
        }
        for service in &config.services {
            // Who takes no connections keeps nobody waiting: the guest's is refused.
            UnixStream::from(service.socket.try_clone()?).set_nonblocking(true)?;
        }
        let (stopping, starved) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { state: OnceLock::new(), epoll, wake, stopping, starved });
        Ok(Nat { shared, config: Mutex::new(Some(config)), guest, thread: Mutex::new(None) })
    }
}

impl Shared {
    fn run(&self) {
        let Some(state) = self.state.get() else { return };
        let mut events: Vec<Event> = Vec::new();
        while !self.stopping.load(Ordering::SeqCst) {
            let timeout = state.lock().before_sleep();
            if self.epoll.wait(&mut events, timeout).is_err() {
                return;
            }
            let mut state = state.lock();
            for event in &events {
                match event.token {
                    WAKE => {
                        self.wake.drain();
                    }
                    listener @ FIRST_LISTENER..FIRST_FLOW => state.listener_ready(listener - FIRST_LISTENER),
                    _ => state.socket_ready(*event),
                }
            }
            if self.starved.swap(false, Ordering::SeqCst) {
                state.feed();
            }
            state.flush();
        }
        state.lock().end();
    }
}

impl Wire for Nat {
    fn connect(&self, inbox: &Arc<Inbox>) {
        let Some(config) = self.config.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let common = Common {
            config,
            inbox: Arc::clone(inbox),
            guest: self.guest,
            held: 0,
            pending: 0,
            again: 0,
            alarm: None,
            is_starved: false,
            buffer: Vec::new(),
        };
        let state = State::new(common, Arc::clone(&self.shared.epoll));
        if self.shared.state.set(RankedMutex::new(Rank::Network, state)).is_err() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        // Without its thread a guest sends and hears nothing.
        let started = thread::Builder::new().name("rz-nat".into()).spawn(move || shared.run());
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = started.ok();
    }

    fn send(&self, frame: &mut Frame) {
        if let Some(state) = self.shared.state.get() {
            state.lock().take(frame);
        }
    }

    fn flush(&self) {
        let Some(state) = self.shared.state.get() else { return };
        let mut state = state.lock();
        state.flush();
        if state.is_early() {
            drop(state);
            self.shared.wake.signal();
        }
    }

    fn has_room(&self) {
        self.shared.starved.store(true, Ordering::SeqCst);
        self.shared.wake.signal();
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn end(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It has told nobody of a panic but the standard error.
            let _ = thread.join();
        }
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        self.end();
    }
}
