//! A cable that leads out of this process: to a switch that joins machines of several processes ([`super::switch::server`]), or
//! to a tap. Frames go over it with `struct virtio_net_hdr` before each, and are checked when they arrive: who sends them is not
//! trusted.
//!
//! The card's transmit thread sends. A thread of the cable's own reads, and sends what had to wait.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use host::events::EventFd;
use host::lock::{Rank, RankedMutex};
use host::medium::Medium;
use host::socket::{Epoll, Event};

use super::frame::{Cut, Frame, HEADER_BYTES, MOST_BYTES};
use super::inbox::Inbox;
use super::{Wire, fit};

/// What epoll calls the thread's own alarm. What the cable is plugged into is called by how often that has changed.
const WAKE: u64 = 0;
/// Bytes that wait for room at the other end; frames are lost beyond it.
const MOST_WAITING: usize = 4 << 20;
/// What a frame takes beside its bytes, counted with them.
const OVERHEAD: usize = 256;
/// Frames that are read in a turn.
const TURN_FRAMES: usize = 64;
/// From so many bytes on a frame keeps the buffer that it was read into.
const LARGE: usize = MOST_BYTES / 2;

struct Plug {
    medium: Arc<Medium>,
    token: u64,
    /// There is no room in the inbox: nothing is read.
    is_paused: bool,
}

#[derive(Default)]
struct End {
    plug: Option<Plug>,
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    plugs: u64,
}

struct Shared {
    end: RankedMutex<End>,
    inbox: OnceLock<Arc<Inbox>>,
    epoll: Epoll,
    wake: EventFd,
    is_over: AtomicBool,
    lost: AtomicU64,
}

pub struct Cable {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Cable {
    /// A cable that is plugged into nothing yet.
    ///
    /// # Errors
    /// The system's, when it has no descriptors left.
    pub fn new() -> io::Result<Cable> {
        let (epoll, wake) = (Epoll::new()?, EventFd::new()?);
        epoll.watch_readable(wake.as_fd(), WAKE)?;
        let end = RankedMutex::new(Rank::Network, End::default());
        let (is_over, lost) = (AtomicBool::new(false), AtomicU64::new(0));
        let shared = Shared { end, inbox: OnceLock::new(), epoll, wake, is_over, lost };
        Ok(Cable { shared: Arc::new(shared), thread: Mutex::new(None) })
    }

    /// Plugs it in, instead of where it was before: what waits goes there.
    ///
    /// # Errors
    /// The system's, when it cannot be watched; `BrokenPipe` when the machine has ended.
    pub fn plug_into(&self, medium: Medium) -> io::Result<()> {
        let mut end = self.shared.end.lock();
        if self.shared.is_over.load(Ordering::SeqCst) {
            return Err(io::Error::new(ErrorKind::BrokenPipe, "the machine has ended"));
        }
        end.unplug(&self.shared.epoll);
        end.plugs += 1;
        let token = end.plugs;
        self.shared.epoll.watch_readable(medium.as_fd(), token)?;
        end.plug = Some(Plug { medium: Arc::new(medium), token, is_paused: false });
        end.rewatch(&self.shared.epoll);
        Ok(())
    }

    /// Whether it is plugged in, as far as is known.
    #[must_use]
    pub fn is_plugged_in(&self) -> bool {
        self.shared.end.lock().plug.is_some()
    }

    /// How many frames of the guest's were lost, because nobody was there or took them.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

impl End {
    fn unplug(&mut self, epoll: &Epoll) {
        if let Some(plug) = self.plug.take() {
            epoll.forget(plug.medium.as_fd());
        }
    }

    fn rewatch(&self, epoll: &Epoll) {
        if let Some(plug) = &self.plug {
            let _ = epoll.rewatch(plug.medium.as_fd(), plug.token, !plug.is_paused, !self.waiting.is_empty());
        }
    }

    /// Sends what waits, as far as there is room.
    fn flush(&mut self, epoll: &Epoll) {
        let Some(plug) = &self.plug else { return };
        while let Some(frame) = self.waiting.front() {
            match plug.medium.send(&[IoSlice::new(frame)]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // What the other end does not take at all is lost.
                Ok(()) | Err(_) => {
                    self.bytes -= frame.len() + OVERHEAD;
                    self.waiting.pop_front();
                }
            }
        }
        self.rewatch(epoll);
    }
}

impl Shared {
    fn run(&self, inbox: &Inbox) {
        let (mut events, mut buffer): (Vec<Event>, Vec<u8>) = (Vec::new(), Vec::new());
        while !self.is_over.load(Ordering::SeqCst) {
            if self.epoll.wait(&mut events, None).is_err() {
                return;
            }
            for event in &events {
                let mut end = self.end.lock();
                if event.token == WAKE {
                    self.wake.drain();
                    if let Some(plug) = end.plug.as_mut().filter(|plug| plug.is_paused)
                        && inbox.has_room()
                    {
                        plug.is_paused = false;
                        end.rewatch(&self.epoll);
                    }
                    continue;
                }
                if event.writable {
                    end.flush(&self.epoll);
                }
                let Some(plug) = end.plug.as_ref().filter(|plug| plug.token == event.token) else { continue };
                let medium = Arc::clone(&plug.medium);
                drop(end);
                let is_there = self.read(&medium, inbox, &mut buffer);
                let mut end = self.end.lock();
                let Some(plug) = end.plug.as_mut().filter(|plug| plug.token == event.token) else { continue };
                // A peer that has gone is told of for ever: what is not read then is lost.
                if !is_there || event.closed && !inbox.has_room() {
                    end.unplug(&self.epoll);
                } else if !inbox.has_room() {
                    plug.is_paused = true;
                    end.rewatch(&self.epoll);
                }
            }
        }
    }

    /// Reads some frames, as long as the guest takes them; false when the other end is gone.
    fn read(&self, medium: &Medium, inbox: &Inbox, buffer: &mut Vec<u8>) -> bool {
        let mut header = [0; HEADER_BYTES];
        for _ in 0..TURN_FRAMES {
            if !inbox.has_room() {
                return true;
            }
            buffer.clear();
            match medium.receive(&mut header, buffer, MOST_BYTES + 1) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
            let bytes = if buffer.len() < LARGE { buffer.clone() } else { std::mem::take(buffer) };
            if let Some(frame) = fit::checked(header, bytes) {
                // Where there is no driver, nobody misses it.
                let _ = inbox.offer(frame);
            }
        }
        true
    }
}

impl Wire for Cable {
    fn connect(&self, inbox: &Arc<Inbox>) {
        if self.shared.inbox.set(Arc::clone(inbox)).is_err() {
            return;
        }
        let (shared, inbox) = (Arc::clone(&self.shared), Arc::clone(inbox));
        // Without its thread a guest hears nothing.
        let started = thread::Builder::new().name("rz-cable".into()).spawn(move || shared.run(&inbox));
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = started.ok();
    }

    fn send(&self, frame: &mut Frame) {
        let headers = match frame.offload.cut {
            Cut::None => 0,
            _ => fit::parts(frame).map_or(0, |(_, payload)| payload as u16),
        };
        let header = frame.offload.to_bytes(headers, 1);
        let pieces = [IoSlice::new(&header), IoSlice::new(&frame.head), IoSlice::new(frame.tail())];
        let mut end = self.shared.end.lock();
        let is_lost = match &end.plug {
            None => true,
            Some(plug) if end.waiting.is_empty() => match plug.medium.send(&pieces) {
                Ok(()) => return,
                Err(error) => error.kind() != ErrorKind::WouldBlock,
            },
            Some(_) => end.bytes >= MOST_WAITING,
        };
        if is_lost {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let bytes = [&header, &frame.head[..], frame.tail()].concat();
        end.bytes += bytes.len() + OVERHEAD;
        end.waiting.push_back(bytes);
        if end.waiting.len() == 1 {
            end.rewatch(&self.shared.epoll);
        }
    }

    fn has_room(&self) {
        self.shared.wake.signal();
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn end(&self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It has told nobody of a panic but the standard error.
            let _ = thread.join();
        }
        self.shared.end.lock().unplug(&self.shared.epoll);
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
#[path = "cable_tests.rs"]
mod tests;
