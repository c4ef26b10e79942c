//! A switch between processes: each port is an end of a pair of sockets, over which frames come and go as a card has them,
//! `struct virtio_net_hdr` before each (docs/decisions/0026-frames-go-over-sockets.md). The processes at the other
//! ends run guests, and are not trusted: a frame here is bytes of a bounded number, of which both addresses are looked at and no
//! more. Who gets it checks what it says of itself.
//!
//! One thread a switch. What has arrived at all ports is looked at in turn, a bounded piece each; what a port has no room for
//! waits in its [`Backlog`], and is lost beyond that.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use host::events::EventFd;
use host::lock::{Rank, RankedMutex};
use host::medium::Medium;
use host::socket::{Epoll, Event};

use super::backlog::Backlog;
use super::table::{Route, Table};
use crate::network::Mac;
use crate::network::frame::{ETHERNET_BYTES, HEADER_BYTES, MOST_BYTES};

/// What epoll calls the thread's own alarm. A port is called by the address of its card, which has 48 bits.
const WAKE: u64 = u64::MAX;
/// Cards of a switch.
pub const MOST_PORTS: usize = 256;
/// What one port is heard for before the next one's turn.
const TURN_FRAMES: usize = 64;
const TURN_BYTES: usize = 1 << 20;
/// What a port may send to all others: so many frames a second, of which a large one counts as several, and as many at once.
const FLOODS: u32 = 20_000;
const FLOOD_BYTES: usize = 2048;

/// Frames and bytes of one port, seen from the switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// From the card.
    pub received_frames: u64,
    pub received_bytes: u64,
    /// To the card.
    pub sent_frames: u64,
    pub sent_bytes: u64,
    /// To the card, which took none.
    pub lost_frames: u64,
    /// From the card: no frames, or with the address of another card.
    pub refused_frames: u64,
    /// From the card to all others, more than it may.
    pub limited_frames: u64,
}

/// Why a card cannot be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error(transparent)]
    Taken(#[from] super::Taken),
    #[error("the switch has {MOST_PORTS} machines already: use another one")]
    Full,
    #[error("the system has no place for another port of a switch: {0}")]
    System(#[from] io::Error),
}

struct Port {
    medium: Arc<Medium>,
    backlog: Backlog,
    counters: Counters,
    /// What it may send to all others just now, and since when.
    floods: u32,
    since: Instant,
}

impl Port {
    /// Sends a frame to the card, or has it wait.
    fn deliver(&mut self, from: Mac, header: &[u8], bytes: &[u8], epoll: &Epoll, token: u64) {
        if self.backlog.is_empty() {
            match self.medium.send(&[IoSlice::new(header), IoSlice::new(bytes)]) {
                Ok(()) => return self.count_sent(bytes.len()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let _ = epoll.rewatch(self.medium.as_fd(), token, true, true);
                }
                Err(_) => {
                    self.counters.lost_frames += 1;
                    return;
                }
            }
        }
        if !self.backlog.offer(from, &[header, bytes]) {
            self.counters.lost_frames += 1;
        }
    }

    fn count_sent(&mut self, bytes: usize) {
        self.counters.sent_frames += 1;
        self.counters.sent_bytes += bytes as u64;
    }

    /// The card takes frames again.
    fn flush(&mut self, epoll: &Epoll, token: u64) {
        let Port { medium, backlog, counters, .. } = self;
        backlog.drain(|frame| match medium.send(&[IoSlice::new(frame)]) {
            Ok(()) => {
                counters.sent_frames += 1;
                counters.sent_bytes += (frame.len() - HEADER_BYTES) as u64;
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(_) => {
                counters.lost_frames += 1;
                true
            }
        });
        if backlog.is_empty() {
            let _ = epoll.rewatch(medium.as_fd(), token, true, false);
        }
    }

    /// Whether it may send a frame of so many bytes to all others.
    fn may_flood(&mut self, bytes: usize) -> bool {
        let price = bytes.div_ceil(FLOOD_BYTES) as u32;
        if self.floods < price {
            let passed = self.since.elapsed().min(Duration::from_secs(1));
            let more = (passed.as_secs_f64() * f64::from(FLOODS)) as u32;
            if more > 0 {
                (self.floods, self.since) = ((self.floods + more).min(FLOODS), Instant::now());
            }
        }
        let may = self.floods >= price;
        self.floods -= if may { price } else { 0 };
        may
    }
}

fn token(card: Mac) -> u64 {
    let [a, b, c, d, e, f] = card.0;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

fn card(token: u64) -> Mac {
    let [_, _, a, b, c, d, e, f] = token.to_be_bytes();
    Mac([a, b, c, d, e, f])
}

#[derive(Default)]
struct Ports {
    table: Table,
    ports: BTreeMap<Mac, Port>,
}

struct Shared {
    ports: RankedMutex<Ports>,
    epoll: Epoll,
    wake: EventFd,
    is_over: AtomicBool,
}

pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// A switch without ports.
    ///
    /// # Errors
    /// The system's, when it has no thread or descriptor left.
    pub fn start() -> io::Result<Server> {
        let (epoll, wake) = (Epoll::new()?, EventFd::new()?);
        epoll.watch_readable(wake.as_fd(), WAKE)?;
        let ports = RankedMutex::new(Rank::Network, Ports::default());
        let shared = Arc::new(Shared { ports, epoll, wake, is_over: AtomicBool::new(false) });
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new().name("rz-switch".into()).spawn(move || own.run())?;
        Ok(Server { shared, thread: Some(thread) })
    }

    /// Plugs the card in whose cable ends in a socket.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn plug_in(&self, card: Mac, socket: OwnedFd) -> Result<(), Refused> {
        let medium = Arc::new(Medium::socket(socket)?);
        let mut ports = self.shared.ports.lock();
        // Who has just ended may come back before the thread knows.
        if ports.ports.get(&card).is_some_and(|port| port.medium.is_closed()) {
            ports.unplug(card, &self.shared.epoll);
        }
        if ports.ports.len() >= MOST_PORTS {
            return Err(Refused::Full);
        }
        if !ports.table.add(card) {
            return Err(super::Taken(card).into());
        }
        if let Err(error) = self.shared.epoll.watch_readable(medium.as_fd(), token(card)) {
            ports.table.remove(card);
            return Err(error.into());
        }
        let counters = Counters::default();
        let port = Port { medium, backlog: Backlog::default(), counters, floods: FLOODS, since: Instant::now() };
        ports.ports.insert(card, port);
        Ok(())
    }

    /// The cards that are plugged in.
    #[must_use]
    pub fn report(&self) -> Vec<(Mac, Counters)> {
        self.shared.ports.lock().ports.iter().map(|(card, port)| (*card, port.counters)).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            // It has told nobody of a panic but the standard error.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        let (mut events, mut buffer): (Vec<Event>, Vec<u8>) = (Vec::new(), Vec::with_capacity(MOST_BYTES + 1));
        while !self.is_over.load(Ordering::SeqCst) {
            if self.epoll.wait(&mut events, None).is_err() {
                return;
            }
            for event in &events {
                if event.token == WAKE {
                    self.wake.drain();
                } else {
                    // Locked anew for each, so that who wants to plug in has a turn, too.
                    self.ports.lock().turn(*event, &self.epoll, &mut buffer);
                }
            }
        }
    }
}

impl Ports {
    fn unplug(&mut self, card: Mac, epoll: &Epoll) {
        if let Some(port) = self.ports.remove(&card) {
            epoll.forget(port.medium.as_fd());
            self.table.remove(card);
        }
    }

    fn turn(&mut self, event: Event, epoll: &Epoll, buffer: &mut Vec<u8>) {
        let from = card(event.token);
        let Some(port) = self.ports.get_mut(&from) else { return };
        if event.writable {
            port.flush(epoll, event.token);
        }
        let medium = Arc::clone(&port.medium);
        let (mut header, mut bytes) = ([0; HEADER_BYTES], 0);
        for _ in 0..TURN_FRAMES {
            buffer.clear();
            match medium.receive(&mut header, buffer, MOST_BYTES + 1) {
                Ok(0) => return self.unplug(from, epoll),
                Ok(_) => self.forward(from, header, buffer, epoll),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return self.unplug(from, epoll),
            }
            bytes += buffer.len();
            if bytes >= TURN_BYTES {
                break;
            }
        }
    }

    fn forward(&mut self, from: Mac, header: [u8; HEADER_BYTES], bytes: &[u8], epoll: &Epoll) {
        let Ports { table, ports } = self;
        let Some(port) = ports.get_mut(&from) else { return };
        port.counters.received_frames += 1;
        port.counters.received_bytes += bytes.len() as u64;
        let route = match bytes.first_chunk::<ETHERNET_BYTES>() {
            Some([a, b, c, d, e, f, g, h, i, j, k, l, ..]) if bytes.len() <= MOST_BYTES => {
                table.route(Mac([*g, *h, *i, *j, *k, *l]), Mac([*a, *b, *c, *d, *e, *f]), from)
            }
            _ => Route::Refused,
        };
        match route {
            Route::Nowhere => {}
            Route::Refused => port.counters.refused_frames += 1,
            Route::Port(target) => {
                if let Some(port) = ports.get_mut(&target) {
                    port.deliver(from, &header, bytes, epoll, token(target));
                }
            }
            Route::Others if port.may_flood(bytes.len()) => {
                for (target, port) in ports.iter_mut().filter(|(target, _)| **target != from) {
                    port.deliver(from, &header, bytes, epoll, token(*target));
                }
            }
            Route::Others => port.counters.limited_frames += 1,
        }
    }
}
