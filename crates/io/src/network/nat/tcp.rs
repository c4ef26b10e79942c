//! One TCP connection of a guest, ended here and carried on by a socket of the host. Source: RFC 9293; sections below are of
//! it. docs/decisions/0024-tcp-ends-here.md says why it is written here, and what it leaves out.
//!
//! The cable to the guest loses nothing and keeps the order, so a segment that is missing was dropped by the guest itself:
//! what is sent is kept until it is acknowledged, and sent again when that takes too long; what comes out of order is not
//! kept.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use host::socket;

use super::Common;
use super::segment::{ACK, FIN, PSH, RST, SYN, Say, Segment};
use crate::network::frame::Payload;

/// The scale of the windows that we open.
const OUR_SCALE: u8 = 7;
/// What waits for a host that does not read, of one connection; and of one when all have much.
const MOST_PENDING: usize = 1 << 20;
const LITTLE_PENDING: usize = 16 << 10;
/// What is under way to the guest likewise.
const MOST_HELD: usize = 4 << 20;
const LITTLE_HELD: usize = 16 << 10;
/// Pieces that are under way to the guest, of one connection: a peer that speaks in single bytes makes each of them cost more
/// than it counts.
const MOST_SEGMENTS: usize = 512;
/// What all connections of a guest together may have of either, before each gets little.
const ENOUGH: usize = 32 << 20;
/// The largest IP packet, less its header and TCP's.
const MOST_SEGMENT: usize = 65535 - 60;
/// So much that has come is acknowledged at once, the rest when the guest has sent all that it had.
const ACKNOWLEDGED_AT_ONCE: u32 = 128 << 10;
/// 3.8.1 "Retransmission Timeout", on a cable without a length: at first, and at most; and how often.
const FIRST_PATIENCE: Duration = Duration::from_millis(300);
const MOST_PATIENCE: Duration = Duration::from_secs(30);
const MOST_TRIES: u32 = 30;
/// A guest that does not answer a new connection at all.
const MOST_CALLS: u32 = 8;
/// RFC 5681, 3.2 "Fast Retransmit/Fast Recovery".
const DUPLICATES: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest calls, and the host's socket is not connected yet.
    Connecting,
    /// The guest has been answered, and says nothing yet.
    Answered,
    /// The guest is called.
    Calling,
    Open,
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Lives,
    /// Over on both sides, in order.
    Done,
    /// Broken off: the host's peer is told so.
    Broken,
}

#[derive(Debug)]
pub struct Tcp {
    pub guest: SocketAddr,
    /// The other end, as the guest knows it.
    pub remote: SocketAddr,
    stream: TcpStream,
    stage: Stage,
    is_called: bool,
    /// Numbers of what goes to the guest: the first that is not acknowledged, and the next (3.3.1 "Key Connection State
    /// Variables", SND).
    first: u32,
    next: u32,
    held: VecDeque<(u32, Payload)>,
    /// How far the guest's window reaches, from `first` on.
    window: u32,
    scale: u8,
    maximum: u16,
    /// The host's socket has something, as far as we know.
    readable: bool,
    /// The host's peer has said all, and the guest was told (FIN).
    host_ended: bool,
    /// The next number from the guest (RCV.NXT).
    expected: u32,
    pending: VecDeque<u8>,
    guest_ended: bool,
    is_shut: bool,
    scales: bool,
    /// What has come since the guest was last told of it, and whether it is to be told in any case.
    untold: u32,
    tell: bool,
    /// The window that it was last told.
    told_window: usize,
    duplicates: u8,
    patience: Duration,
    tries: u32,
    deadline: Option<Instant>,
    pub last: Instant,
}

/// `a` comes before `b`, 3.4 "Sequence Numbers".
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Tcp {
    fn new(guest: SocketAddr, remote: SocketAddr, stream: TcpStream, stage: Stage, number: u32) -> Tcp {
        Tcp {
            guest,
            remote,
            stream,
            stage,
            is_called: stage == Stage::Calling,
            first: number,
            next: number,
            held: VecDeque::new(),
            window: 0,
            scale: 0,
            maximum: 536,
            readable: false,
            host_ended: false,
            expected: 0,
            pending: VecDeque::new(),
            guest_ended: false,
            is_shut: false,
            scales: false,
            untold: 0,
            tell: false,
            told_window: 0,
            duplicates: 0,
            patience: FIRST_PATIENCE,
            tries: 0,
            deadline: None,
            last: Instant::now(),
        }
    }

    /// The guest calls: `syn` is answered when the host's socket is connected.
    pub fn from_guest(syn: &Segment<'_>, stream: TcpStream, number: u32, common: &Common) -> Tcp {
        let mut tcp = Tcp::new(syn.source, syn.target, stream, Stage::Connecting, number);
        tcp.agree(syn, common);
        tcp
    }

    /// A connection that the host took for the guest: the guest is called.
    pub fn to_guest(guest: SocketAddr, remote: SocketAddr, stream: TcpStream, number: u32, common: &mut Common) -> Tcp {
        let mut tcp = Tcp::new(guest, remote, stream, Stage::Calling, number);
        tcp.scales = true;
        tcp.next = number.wrapping_add(1);
        tcp.call(common);
        tcp.arm(common);
        tcp
    }

    pub fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether one side has not answered the other yet.
    pub fn is_half_open(&self) -> bool {
        self.stage != Stage::Open
    }

    /// Whether the host took it for the guest.
    pub fn is_called(&self) -> bool {
        self.is_called
    }

    /// Bytes that are held, and that wait; `None` where what is held does not follow each other up to what comes next.
    #[cfg(any(test, feature = "testing"))]
    pub fn measure(&self) -> Option<(usize, usize)> {
        let mut next = self.first;
        for (number, payload) in &self.held {
            if *number != next {
                return None;
            }
            next = next.wrapping_add(payload.len() as u32);
        }
        let is_right = self.held.is_empty() || next == self.next || next.wrapping_add(1) == self.next;
        let held = self.held.iter().map(|(_, payload)| payload.len()).sum();
        (is_right && self.held.len() <= MOST_SEGMENTS && self.pending.len() <= MOST_PENDING)
            .then_some((held, self.pending.len()))
    }

    /// Ends the host's side.
    pub fn end(self, fate: Fate, common: &mut Common) {
        common.pending -= self.pending.len();
        common.held -= self.held.iter().map(|(_, payload)| payload.len()).sum::<usize>();
        if fate == Fate::Broken {
            socket::reset(self.stream);
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// What a SYN of the guest's says.
    fn agree(&mut self, syn: &Segment<'_>, common: &Common) {
        self.expected = syn.number.wrapping_add(1);
        self.maximum = syn.maximum.min(common.maximum(self.guest));
        self.scales = syn.scale.is_some();
        self.scale = syn.scale.unwrap_or(0);
        // 3.3.1, and RFC 7323, 2.2: the window in a SYN is not scaled.
        self.window = u32::from(syn.window);
    }

    // ---- to the guest ----------------------------------------------------------------------------------------------

    /// The window that is open to the guest now.
    fn room(&self, common: &Common) -> usize {
        let most = if common.pending > ENOUGH { LITTLE_PENDING } else { MOST_PENDING };
        let most = if self.scales { most } else { most.min(65535) };
        most.saturating_sub(self.pending.len())
    }

    fn say(&mut self, common: &Common, number: u32, flags: u8, data: Option<Payload>) {
        let room = self.room(common);
        let is_syn = flags & SYN != 0;
        let window = if self.scales && !is_syn { room >> OUR_SCALE } else { room };
        let say = Say {
            source: self.remote,
            target: self.guest,
            number,
            acknowledged: if flags & ACK != 0 { self.expected } else { 0 },
            flags,
            window: window.min(65535) as u16,
            maximum: is_syn.then(|| common.maximum(self.guest)),
            scale: self.scales.then_some(OUR_SCALE),
        };
        let frame = say.frame(common.ethernet(self.guest.ip()), data, self.maximum);
        common.send(frame);
        if flags & ACK != 0 {
            (self.untold, self.tell, self.told_window) = (0, false, room);
        }
    }

    fn acknowledge(&mut self, common: &Common) {
        self.say(common, self.next, ACK, None);
    }

    /// Says the first words of the connection, for the first time or again.
    fn call(&mut self, common: &Common) {
        let flags = if self.stage == Stage::Calling { SYN } else { SYN | ACK };
        self.say(common, self.first, flags, None);
    }

    fn refuse(&mut self, common: &Common) -> Fate {
        let flags = if self.stage == Stage::Calling { RST } else { RST | ACK };
        self.say(common, self.next, flags, None);
        Fate::Broken
    }

    fn arm(&mut self, common: &mut Common) {
        let deadline = Instant::now() + self.patience;
        self.deadline = Some(deadline);
        common.wake_at(deadline);
    }

    /// Says again what the guest has not acknowledged, from the first on.
    fn say_again(&mut self, common: &mut Common) {
        match self.stage {
            Stage::Answered | Stage::Calling => self.call(common),
            _ => match self.held.front().cloned() {
                Some((number, payload)) => {
                    common.again += 1;
                    self.say(common, number, ACK | PSH, Some(payload));
                }
                None if self.host_ended => self.say(common, self.next.wrapping_sub(1), FIN | ACK, None),
                None => {}
            },
        }
        self.arm(common);
    }

    /// The deadline has passed.
    pub fn is_late(&mut self, common: &mut Common) -> Fate {
        self.deadline = None;
        if self.first == self.next {
            return Fate::Lives;
        }
        // A guest that does not take its frames at all, one that is paused say, has lost none.
        if common.inbox.is_empty() {
            self.tries += 1;
            self.patience = (self.patience * 2).min(MOST_PATIENCE);
        }
        if self.tries > if self.stage == Stage::Calling { MOST_CALLS } else { MOST_TRIES } {
            return self.refuse(common);
        }
        self.say_again(common);
        Fate::Lives
    }

    /// Passes on what the host's socket has, as far as the guest's window and our own measure reach.
    pub fn pump(&mut self, common: &mut Common) -> Fate {
        if self.stage != Stage::Open {
            return Fate::Lives;
        }
        let whole = MOST_SEGMENT / usize::from(self.maximum) * usize::from(self.maximum);
        while self.readable && !self.host_ended {
            let under_way = self.next.wrapping_sub(self.first) as usize;
            let most = if common.held > ENOUGH { LITTLE_HELD } else { MOST_HELD };
            let room = (self.window as usize).min(most).saturating_sub(under_way);
            // 3.8.6.2.1 "Sender's Algorithm": no small piece where a larger one can be sent soon.
            let is_small = room < usize::from(self.maximum) && under_way > 0;
            if room == 0 || is_small || self.held.len() >= MOST_SEGMENTS {
                break;
            }
            if !common.has_room() {
                return Fate::Lives;
            }
            let mut bytes = Vec::new();
            match socket::receive_into(self.stream.as_fd(), &mut bytes, room.min(whole)) {
                Ok(0) => {
                    self.host_ended = true;
                    let number = self.next;
                    self.next = number.wrapping_add(1);
                    self.say(common, number, FIN | ACK, None);
                }
                Ok(count) => {
                    if count < bytes.capacity() / 2 {
                        bytes.shrink_to_fit();
                    }
                    let (payload, number) = (Payload::new(bytes), self.next);
                    self.next = number.wrapping_add(count as u32);
                    self.held.push_back((number, payload.clone()));
                    common.held += count;
                    self.say(common, number, ACK | PSH, Some(payload));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.refuse(common),
            }
            if self.deadline.is_none() && self.first != self.next {
                self.arm(common);
            }
        }
        self.over()
    }

    // ---- from the host ---------------------------------------------------------------------------------------------

    /// The host's socket can be written again, is connected, or could not be.
    pub fn is_writable(&mut self, common: &mut Common) -> Fate {
        if self.stage == Stage::Connecting {
            if !matches!(self.stream.take_error(), Ok(None)) {
                return self.refuse(common);
            }
            let _ = self.stream.set_nodelay(true);
            self.stage = Stage::Answered;
            self.next = self.first.wrapping_add(1);
            self.call(common);
            self.arm(common);
            return Fate::Lives;
        }
        if self.pending.is_empty() {
            return Fate::Lives;
        }
        while !self.pending.is_empty() {
            match self.stream.write(self.pending.as_slices().0) {
                Ok(count) => {
                    self.pending.drain(..count);
                    common.pending -= count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.refuse(common),
            }
        }
        if self.pending.is_empty() {
            self.pending = VecDeque::new();
        }
        self.shut();
        // 3.8.6.2.2 "Receiver's Algorithm": the window is opened again by a large piece.
        if self.told_window < MOST_PENDING / 4 && self.room(common) > self.told_window + MOST_PENDING / 4 {
            self.acknowledge(common);
        }
        self.over()
    }

    pub fn is_readable(&mut self, common: &mut Common) -> Fate {
        self.readable = true;
        self.pump(common)
    }

    fn shut(&mut self) {
        if self.guest_ended && self.pending.is_empty() && !self.is_shut {
            self.is_shut = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    fn over(&self) -> Fate {
        if self.is_shut && self.host_ended && self.first == self.next { Fate::Done } else { Fate::Lives }
    }

    // ---- from the guest --------------------------------------------------------------------------------------------

    /// Takes a segment of the guest's: 3.10.7 "SEGMENT ARRIVES".
    pub fn take(&mut self, segment: &Segment<'_>, common: &mut Common) -> Fate {
        self.last = Instant::now();
        if segment.has(RST) {
            // 3.10.7.4: only one that belongs here ends it.
            let is_answer = self.stage == Stage::Calling && segment.has(ACK) && segment.acknowledged == self.next;
            let belongs = segment.number == self.expected && self.stage != Stage::Calling;
            return if is_answer || belongs { Fate::Broken } else { Fate::Lives };
        }
        match self.stage {
            // It says it again because the host takes its time.
            Stage::Connecting => return Fate::Lives,
            Stage::Calling => {
                if !segment.has(SYN | ACK) || segment.acknowledged != self.next {
                    return Fate::Lives;
                }
                self.first = self.next;
                self.agree(segment, common);
                self.open();
                self.acknowledge(common);
                return self.is_readable(common);
            }
            Stage::Answered | Stage::Open if segment.has(SYN) => {
                if self.stage == Stage::Answered {
                    self.call(common);
                } else {
                    self.acknowledge(common);
                }
                return Fate::Lives;
            }
            Stage::Answered | Stage::Open => {}
        }
        if !segment.has(ACK) || before(self.next, segment.acknowledged) {
            self.acknowledge(common);
            return Fate::Lives;
        }
        if self.stage == Stage::Answered {
            if segment.acknowledged != self.next {
                return Fate::Lives;
            }
            self.first = self.next;
            self.open();
            // The host may have said something first.
            self.readable = true;
        }
        self.take_acknowledgement(segment, common);
        match self.take_data(segment, common) {
            Fate::Lives => {}
            end => return end,
        }
        if self.untold >= ACKNOWLEDGED_AT_ONCE {
            self.acknowledge(common);
        }
        self.over()
    }

    fn open(&mut self) {
        self.stage = Stage::Open;
        (self.deadline, self.patience, self.tries) = (None, FIRST_PATIENCE, 0);
    }

    fn take_acknowledgement(&mut self, segment: &Segment<'_>, common: &mut Common) {
        let window = u32::from(segment.window) << self.scale;
        let new = segment.acknowledged.wrapping_sub(self.first);
        if new != 0 && !before(segment.acknowledged, self.first) {
            self.first = segment.acknowledged;
            while let Some((number, payload)) = self.held.front() {
                let done = self.first.wrapping_sub(*number) as i32;
                if done <= 0 {
                    break;
                }
                let done = (done as usize).min(payload.len());
                common.held -= done;
                if done == payload.len() {
                    self.held.pop_front();
                } else {
                    let rest = (self.first, payload.without(done));
                    self.held[0] = rest;
                }
            }
            (self.duplicates, self.tries, self.patience, self.deadline) = (0, 0, FIRST_PATIENCE, None);
            if self.first != self.next {
                self.arm(common);
            }
        } else if new == 0 && segment.span() == 0 && window == self.window && self.first != self.next {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == DUPLICATES {
                self.say_again(common);
            }
        }
        if !before(segment.acknowledged, self.first) {
            self.window = window;
        }
    }

    fn take_data(&mut self, segment: &Segment<'_>, common: &mut Common) -> Fate {
        if segment.span() == 0 {
            // One that tells nothing new, from before what we have, asks whether we are there (RFC 9293, 3.8.4).
            self.tell |= segment.number != self.expected;
            return Fate::Lives;
        }
        self.tell = true;
        let known = self.expected.wrapping_sub(segment.number);
        if (known as i32) < 0 || known > segment.span() {
            // From behind a gap, or nothing but what we have.
            self.acknowledge(common);
            return Fate::Lives;
        }
        let fresh = segment.data.get(known as usize..).unwrap_or(&[]);
        let fresh = &fresh[..fresh.len().min(self.room(common))];
        if !fresh.is_empty() && !self.guest_ended {
            let mut left = fresh;
            while self.pending.is_empty() && !left.is_empty() {
                match self.stream.write(left) {
                    Ok(count) => left = &left[count..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return self.refuse(common),
                }
            }
            self.pending.extend(left);
            common.pending += left.len();
            self.expected = self.expected.wrapping_add(fresh.len() as u32);
            self.untold += fresh.len() as u32;
        }
        let end = segment.number.wrapping_add(segment.data.len() as u32);
        if segment.has(FIN) && end == self.expected && !self.guest_ended {
            self.expected = end.wrapping_add(1);
            self.guest_ended = true;
            self.shut();
        }
        Fate::Lives
    }

    /// The guest has sent all that it had for now: it is told what has come, if nothing said so meanwhile.
    pub fn flush(&mut self, common: &mut Common) -> Fate {
        let fate = self.pump(common);
        if fate == Fate::Lives && (self.tell || self.untold > 0) {
            self.acknowledge(common);
        }
        fate
    }
}
