//! One port of a console: its socket, and what the driver is still to be told of it.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use host::events;

use crate::virtio::Answer;
use crate::virtio::queue::Chain;

/// How much is copied at a time.
const PIECE: usize = 16 << 10;

/// What the driver is to be told: one bit for each, so that nothing that a guest does can pile messages up.
pub(super) mod tell {
    pub const ADD: u8 = 1;
    pub const CONSOLE: u8 = 2;
    pub const NAME: u8 = 4;
    pub const OPEN: u8 = 8;
    pub const SIZE: u8 = 16;
}

/// 5.3.6.2 "Multiport Device Operation": events that a device may send.
const DEVICE_ADD: u16 = 1;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a port is to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A terminal of the guest's system: hvc0 is the first.
    Console,
    /// A file that a program opens.
    Named(String),
}

/// What a saved machine keeps of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortState {
    /// A program of the guest has it open.
    pub is_open: bool,
    /// The driver knows it.
    pub is_ready: bool,
    /// Messages that the driver has not got yet.
    pub untold: u8,
    /// Of the request at the head of its transmit queue, bytes that are sent.
    pub sent: u64,
    /// Rows and columns, when they were told.
    pub size: Option<(u16, u16)>,
}

pub(super) struct Port {
    kind: PortKind,
    socket: Option<Arc<UnixStream>>,
    /// The far end is gone; what it had sent may still be there.
    is_closed: bool,
    /// The far end sends no more.
    has_ended: bool,
    is_ready: bool,
    pub is_open: bool,
    untold: u8,
    sent: u64,
    size: Option<(u16, u16)>,
    /// A buffer waits for bytes, or bytes wait for room in the socket.
    wants_read: bool,
    wants_write: bool,
    /// One of those two is new: the thread of the sockets does not know yet.
    pub has_new_wish: bool,
}

impl Port {
    pub fn new(kind: PortKind) -> Port {
        Port {
            kind,
            socket: None,
            is_closed: false,
            has_ended: false,
            is_ready: false,
            is_open: false,
            untold: 0,
            sent: 0,
            size: None,
            wants_read: false,
            wants_write: false,
            has_new_wish: false,
        }
    }

    /// Gives the port its socket; false when it has one whose far end is there.
    pub fn join(&mut self, socket: UnixStream) -> bool {
        if self.is_joined() {
            return false;
        }
        self.part();
        self.socket = Some(Arc::new(socket));
        self.note_open();
        true
    }

    fn is_joined(&self) -> bool {
        self.socket.is_some() && !self.is_closed
    }

    /// Lets the socket go, with what may still be in it.
    pub fn part(&mut self) {
        self.socket = None;
        (self.is_closed, self.has_ended, self.wants_read, self.wants_write) = (false, false, false, false);
    }

    /// The driver is to be told whether somebody is at the other end.
    fn note_open(&mut self) {
        if self.is_ready {
            self.untold |= tell::OPEN;
        }
    }

    pub fn ask(&mut self, message: u8) {
        self.untold |= message;
    }

    /// The driver knows the port now, and wants to know what it is.
    pub fn greet(&mut self) {
        self.is_ready = true;
        self.untold |= match self.kind {
            PortKind::Console => tell::CONSOLE | if self.size.is_some() { tell::SIZE } else { 0 },
            PortKind::Named(_) => tell::NAME,
        };
        self.untold |= tell::OPEN;
    }

    pub fn size(&self) -> Option<(u16, u16)> {
        self.size
    }

    pub fn resize(&mut self, rows: u16, columns: u16) {
        self.size = Some((rows, columns));
        if self.is_ready && self.kind == PortKind::Console {
            self.untold |= tell::SIZE;
        }
    }

    /// The first message of those in `mask` that the driver has not got, which it now gets.
    pub fn next_message(&mut self, number: u32, mask: u8) -> Option<Vec<u8>> {
        let wanted = self.untold & mask;
        if wanted == 0 {
            return None;
        }
        // The lowest bit: they are in the order in which a driver wants them.
        let bit = wanted & wanted.wrapping_neg();
        self.untold &= !bit;
        let (event, value) = match bit {
            tell::ADD => (DEVICE_ADD, 1),
            tell::CONSOLE => (CONSOLE_PORT, 1),
            tell::NAME => (PORT_NAME, 1),
            tell::OPEN => (PORT_OPEN, u16::from(self.is_joined())),
            _ => (RESIZE, 0),
        };
        let mut message = Vec::from(number.to_le_bytes());
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        match (bit, &self.kind, self.size) {
            (tell::NAME, PortKind::Named(name), _) => message.extend(name.bytes()),
            (tell::SIZE, _, Some((rows, columns))) => {
                // As 5.3.6.2 has it, and Linux 6.1.192 and 6.12.117 read it; older ones take rows for columns.
                message.extend(columns.to_le_bytes());
                message.extend(rows.to_le_bytes());
            }
            _ => {}
        }
        Some(message)
    }

    /// The driver has gone.
    pub fn reset(&mut self) {
        (self.is_ready, self.is_open, self.untold, self.sent) = (false, false, 0, 0);
        (self.wants_read, self.wants_write) = (false, false);
    }

    /// Sends what the guest sends; without anybody at the other end it is gone.
    pub fn transmit(&mut self, chain: &Chain<'_>) -> Answer {
        let size = chain.readable_bytes();
        let mut piece = [0; PIECE];
        while self.sent < size && self.is_joined() {
            let Some(socket) = &self.socket else { break };
            let piece = &mut piece[..(size - self.sent).min(PIECE as u64) as usize];
            if !chain.read(self.sent, piece) {
                break;
            }
            match events::send(socket.as_fd(), piece) {
                Ok(count) => self.sent += count as u64,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.has_new_wish |= !self.wants_write;
                    self.wants_write = true;
                    return Answer::Kept;
                }
                // Nobody reads. Whether the far end is gone as well, the thread of the sockets finds out.
                Err(_) => break,
            }
        }
        self.sent = 0;
        Answer::Done(0)
    }

    /// Fills a buffer of the driver's with what the other end has sent.
    pub fn receive(&mut self, chain: &Chain<'_>, is_open: bool) -> Answer {
        let Some(socket) = self.socket.clone().filter(|_| is_open && !self.has_ended && !self.wants_read) else {
            return Answer::Kept;
        };
        let room = chain.writable_bytes().min(PIECE as u64) as usize;
        if room == 0 {
            return Answer::Done(0);
        }
        let mut piece = [0; PIECE];
        loop {
            match events::receive(socket.as_fd(), &mut piece[..room]) {
                Ok(0) => self.has_ended = true,
                Ok(count) => {
                    // A stream socket that gives less than it could is empty.
                    if count < room {
                        self.want_read();
                    }
                    return Answer::Done(if chain.write(0, &piece[..count]) { count as u32 } else { 0 });
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.want_read(),
                Err(_) => self.has_ended = true,
            }
            if self.has_ended && self.is_closed {
                self.part();
            }
            return Answer::Kept;
        }
    }

    fn want_read(&mut self) {
        if self.is_closed {
            // That was the last of what it had sent.
            self.part();
        } else {
            self.wants_read = true;
            self.has_new_wish = true;
        }
    }

    /// The far end is gone.
    pub fn hang_up(&mut self) {
        self.is_closed = true;
        (self.wants_read, self.wants_write) = (false, false);
        self.note_open();
    }

    /// The socket, when there is something to wait for, and what.
    pub fn interest(&self) -> Option<(Arc<UnixStream>, bool, bool)> {
        let socket = self.socket.as_ref().filter(|_| !self.is_closed)?;
        Some((Arc::clone(socket), self.wants_read, self.wants_write))
    }

    /// The socket can be read, or written: what waits for that is served next.
    pub fn can_read(&mut self) -> bool {
        std::mem::take(&mut self.wants_read)
    }

    pub fn can_write(&mut self) -> bool {
        std::mem::take(&mut self.wants_write)
    }

    pub fn state(&self) -> PortState {
        let (is_open, is_ready) = (self.is_open, self.is_ready);
        PortState { is_open, is_ready, untold: self.untold, sent: self.sent, size: self.size }
    }

    pub fn restore(&mut self, state: &PortState) {
        (self.is_open, self.is_ready) = (state.is_open, state.is_ready);
        (self.sent, self.size) = (state.sent, state.size);
        self.untold = state.untold & (tell::ADD | tell::CONSOLE | tell::NAME | tell::OPEN | tell::SIZE);
        // Somebody else may be at the other end by now, or nobody.
        self.note_open();
    }
}
