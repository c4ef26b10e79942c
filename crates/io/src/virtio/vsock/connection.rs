//! One stream between a program of the guest and a socket of the host: its credit, and what the guest is still to be told.
//! Source: VIRTIO 1.2, 5.10.6.3 "Buffer Space Management", 5.10.6.5 "Receive and Transmit", 5.10.6.6 "Stream Sockets".

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use host::events;

use super::packet::{Header, op, shutdown};

/// What the guest may send before the host's program has read it.
pub const ROOM: u32 = 256 << 10;
/// The most that one packet brings to the guest: what Linux gives a receive buffer is less.
pub const PIECE: usize = 64 << 10;

/// What the guest is to be told: a bit each, so that nothing can pile up.
mod tell {
    pub const REQUEST: u8 = 1;
    pub const RESPONSE: u8 = 2;
    pub const CREDIT: u8 = 4;
    pub const SHUTDOWN: u8 = 8;
    pub const RESET: u8 = 16;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest was asked, and has not answered.
    Asked,
    Open,
    /// The guest is done with it: what it sent is still on its way.
    Over,
}

/// What comes next from the host's side.
pub enum Next {
    /// A packet that is a header alone.
    Control(Header),
    /// The first bytes of the buffer are for the guest, behind this header.
    Data(Header, usize),
    /// Nothing for now.
    Nothing,
}

pub struct Connection {
    pub guest_port: u32,
    pub host_port: u32,
    socket: Arc<UnixStream>,
    stage: Stage,
    untold: u8,
    /// Whoever connected waits for a line that says so, as Firecracker's have it (docs/vsock.md there).
    greets: bool,
    /// From the guest, on the way to the socket.
    held: Vec<u8>,
    sent_of_held: usize,
    /// Bytes that came from the guest, and those of them that the socket has; what the guest knows of the latter.
    received: u32,
    forwarded: u32,
    told: u32,
    /// Bytes that went to the guest, and what it says of its own room.
    sent: u32,
    guest_room: u32,
    guest_forwarded: u32,
    /// [`shutdown`], as the guest has sent them.
    guest_done: u32,
    /// What the guest sends no more was told to the socket.
    told_end: bool,
    /// The host's program sends no more.
    has_ended: bool,
    /// It is gone.
    is_closed: bool,
    wants_read: bool,
    wants_write: bool,
    /// In the list of those that have something for the guest.
    pub is_queued: bool,
}

impl Connection {
    fn new(guest_port: u32, host_port: u32, socket: UnixStream, stage: Stage, untold: u8, greets: bool) -> Self {
        Connection {
            guest_port,
            host_port,
            socket: Arc::new(socket),
            stage,
            untold,
            greets,
            held: Vec::new(),
            sent_of_held: 0,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_room: 0,
            guest_forwarded: 0,
            guest_done: 0,
            told_end: false,
            has_ended: false,
            is_closed: false,
            wants_read: false,
            wants_write: false,
            is_queued: false,
        }
    }

    /// The host's program wants to reach the guest's.
    pub fn from_host(guest_port: u32, host_port: u32, socket: UnixStream) -> Connection {
        Connection::new(guest_port, host_port, socket, Stage::Asked, tell::REQUEST, true)
    }

    /// The guest's program has reached the host's.
    pub fn from_guest(request: &Header, socket: UnixStream) -> Connection {
        let (guest_port, host_port) = (request.source_port, request.target_port);
        let mut connection = Connection::new(guest_port, host_port, socket, Stage::Open, tell::RESPONSE, false);
        connection.take_credit(request);
        connection
    }

    pub fn take_credit(&mut self, header: &Header) {
        (self.guest_room, self.guest_forwarded) = (header.room, header.forwarded);
    }

    /// The guest has answered our request. False when it was not asked.
    pub fn answered(&mut self) -> bool {
        if self.stage != Stage::Asked || self.untold & tell::REQUEST != 0 {
            return false;
        }
        self.stage = Stage::Open;
        if self.greets {
            // Its first bytes: there is room for them in any socket that has a far end.
            let _ = events::send(self.socket.as_fd(), format!("OK {}\n", self.host_port).as_bytes());
        }
        true
    }

    /// Bytes of the guest's; false when it may not send them.
    pub fn take(&mut self, size: u32, fill: impl FnOnce(&mut [u8]) -> bool) -> bool {
        let unread = self.received.wrapping_sub(self.forwarded);
        if self.stage != Stage::Open || self.guest_done & shutdown::SEND != 0 || size > ROOM - unread.min(ROOM) {
            return false;
        }
        let start = self.held.len();
        self.held.resize(start + size as usize, 0);
        if !fill(&mut self.held[start..]) {
            self.held.truncate(start);
            return false;
        }
        self.received = self.received.wrapping_add(size);
        self.flush();
        true
    }

    /// Sends what is held, as far as the socket takes it.
    pub fn flush(&mut self) {
        while self.sent_of_held < self.held.len() && !self.is_closed {
            match events::send(self.socket.as_fd(), &self.held[self.sent_of_held..]) {
                Ok(count) => self.sent_of_held += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wants_write = true;
                    break;
                }
                Err(_) => self.close(),
            }
        }
        if self.is_closed {
            self.sent_of_held = self.held.len();
        }
        let left = (self.held.len() - self.sent_of_held) as u32;
        if left == 0 {
            self.held = Vec::new();
            self.sent_of_held = 0;
        } else if self.sent_of_held > ROOM as usize / 2 {
            self.held.drain(..self.sent_of_held);
            self.sent_of_held = 0;
        }
        self.forwarded = self.received.wrapping_sub(left);
        if self.stage == Stage::Open && self.forwarded.wrapping_sub(self.told) >= ROOM / 4 {
            self.untold |= tell::CREDIT;
        }
        if left == 0 {
            self.pass_end_on();
        }
    }

    /// Tells the socket, behind the last byte, that the guest sends no more; and the guest, that all is done.
    fn pass_end_on(&mut self) {
        if self.guest_done & shutdown::SEND != 0 && !self.told_end {
            self.told_end = true;
            let _ = self.socket.shutdown(std::net::Shutdown::Write);
        }
        if self.guest_done == shutdown::BOTH && self.stage == Stage::Open {
            self.stage = Stage::Over;
            self.untold = tell::RESET;
        }
    }

    pub fn ask_for_credit(&mut self) {
        self.untold |= tell::CREDIT;
    }

    pub fn shut_down(&mut self, flags: u32) {
        self.guest_done |= flags & shutdown::BOTH;
        if self.held.is_empty() {
            self.pass_end_on();
        }
    }

    /// The guest has broken it off: nothing goes there any more.
    pub fn was_reset(&mut self) {
        (self.stage, self.untold) = (Stage::Over, 0);
        self.guest_done = shutdown::BOTH;
        self.flush();
    }

    /// We break it off.
    pub fn reset(&mut self) {
        (self.stage, self.untold) = (Stage::Over, tell::RESET);
        self.guest_done = shutdown::BOTH;
        self.flush();
    }

    /// The host's program is gone.
    fn close(&mut self) {
        (self.is_closed, self.wants_write, self.wants_read) = (true, false, false);
    }

    /// The guest has been told all, and nothing is on its way: there is no such connection any more.
    pub fn is_over(&self) -> bool {
        self.stage == Stage::Over && self.untold == 0 && self.held.is_empty()
    }

    /// The host's program is gone, and the guest was told: it may take its time, but not another's place.
    pub fn is_dispensable(&self) -> bool {
        self.is_closed && self.has_ended && self.untold == 0
    }

    /// The guest does not even know that it was asked.
    pub fn is_unheard_of(&self) -> bool {
        self.untold & tell::REQUEST != 0
    }

    /// Whether there may be something for the guest.
    pub fn has_something(&self) -> bool {
        let is_readable = self.stage == Stage::Open && !self.has_ended && !self.wants_read && self.credit() > 0;
        self.untold != 0 || is_readable
    }

    /// How much the guest has room for.
    fn credit(&self) -> usize {
        if self.guest_done & shutdown::RECEIVE != 0 {
            return 0;
        }
        let on_its_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_room.saturating_sub(on_its_way) as usize
    }

    fn header(&self, op: u16) -> Header {
        Header {
            source_port: self.host_port,
            target_port: self.guest_port,
            op,
            room: ROOM,
            forwarded: self.forwarded,
            ..Header::default()
        }
    }

    /// What the guest gets next; bytes are put into `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Next {
        for (bit, op) in [
            (tell::RESET, op::RST),
            (tell::REQUEST, op::REQUEST),
            (tell::RESPONSE, op::RESPONSE),
            (tell::CREDIT, op::CREDIT_UPDATE),
        ] {
            if self.untold & bit != 0 {
                return self.told(bit, op, 0);
            }
        }
        let size = self.credit().min(buffer.len());
        if self.stage == Stage::Open && !self.has_ended && !self.wants_read && size > 0 {
            match events::receive(self.socket.as_fd(), &mut buffer[..size]) {
                Ok(0) => self.end(),
                Ok(count) => {
                    // A stream socket that gives less than it could is empty, or at its end.
                    self.wants_read = count < size && !self.is_closed;
                    self.sent = self.sent.wrapping_add(count as u32);
                    self.told = self.forwarded;
                    self.untold &= !tell::CREDIT;
                    return Next::Data(Header { size: count as u32, ..self.header(op::RW) }, count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock && !self.is_closed => self.wants_read = true,
                Err(_) => self.end(),
            }
        }
        if self.untold & tell::SHUTDOWN != 0 {
            let flags = if self.is_closed { shutdown::BOTH } else { shutdown::SEND };
            return self.told(tell::SHUTDOWN, op::SHUTDOWN, flags);
        }
        Next::Nothing
    }

    fn told(&mut self, bit: u8, op: u16, flags: u32) -> Next {
        self.untold &= !bit;
        self.told = self.forwarded;
        Next::Control(Header { flags, ..self.header(op) })
    }

    /// The host's program sends no more.
    fn end(&mut self) {
        self.has_ended = true;
        self.untold |= tell::SHUTDOWN;
    }

    /// The socket, when there is something to wait for, and what.
    pub fn interest(&self) -> Option<(Arc<UnixStream>, bool, bool)> {
        (!self.is_closed).then(|| (Arc::clone(&self.socket), self.wants_read, self.wants_write))
    }

    /// What the socket says.
    pub fn woken(&mut self, readable: bool, writable: bool, closed: bool) {
        if readable {
            self.wants_read = false;
        }
        if writable {
            self.wants_write = false;
        }
        if closed {
            self.close();
            if self.stage == Stage::Asked {
                // Nobody waits for the answer any more.
                self.reset();
            } else if self.has_ended {
                self.untold |= if self.stage == Stage::Open { tell::SHUTDOWN } else { 0 };
            }
        }
        self.flush();
    }
}
