//! All connections of a guest, and who comes next.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use host::{local, passing};

use super::HOST_CID;
use super::connection::{Connection, Next, PIECE};
use super::packet::{HEADER_BYTES, Header, STREAM, op};
use crate::virtio::Answer;
use crate::virtio::queue::Chain;

/// Connections of a guest, at any time; a guest that wants more is refused.
pub const MOST_CONNECTIONS: usize = 512;
/// Refusals that wait for a buffer: then the guest's packets wait, too.
const MOST_REFUSALS: usize = 64;
/// The host's own ports begin here, above those that programs choose.
const FIRST_HOST_PORT: u32 = 1 << 30;

#[derive(Default)]
pub struct Table {
    pub guest_cid: u64,
    /// Where the sockets of programs are that the guest can reach: this and `_PORT`.
    pub path: Option<PathBuf>,
    pub connections: BTreeMap<u64, Connection>,
    /// By the ports of guest and host. A connection that is over may linger, without a place here.
    by_ports: HashMap<(u32, u32), u64>,
    /// Those that have something for the guest, in the order in which they get their turn.
    ready: VecDeque<u64>,
    refusals: VecDeque<Header>,
    /// A packet of the guest's waits until there is room for refusals.
    is_held_back: bool,
    /// Who in this process listens: each connection's socket is passed through one of these.
    listeners: BTreeMap<u32, UnixStream>,
    next_number: u64,
    next_port: u32,
    /// A connection has something new to wait for.
    pub has_new_wish: bool,
}

impl Table {
    pub fn new(guest_cid: u64, path: Option<PathBuf>) -> Table {
        Table { guest_cid, path, next_port: FIRST_HOST_PORT, ..Table::default() }
    }

    /// The driver has gone. Who was not introduced to it waits for the next.
    pub fn reset(&mut self) {
        self.connections.retain(|_, connection| connection.is_unheard_of());
        let kept = &self.connections;
        self.by_ports.retain(|_, number| kept.contains_key(number));
        self.ready.retain(|number| kept.contains_key(number));
        self.refusals.clear();
    }

    /// Asks the guest's program behind a port for a connection. False when there are too many.
    pub fn connect(&mut self, guest_port: u32, socket: UnixStream) -> bool {
        if !self.has_room() {
            return false;
        }
        let host_port = loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&(guest_port, port)) {
                break port;
            }
        };
        self.add(Connection::from_host(guest_port, host_port, socket));
        true
    }

    /// False when the port is taken.
    pub fn listen(&mut self, port: u32, socket: UnixStream) -> bool {
        if let Some(before) = self.listeners.get(&port) {
            // One whose listener has gone is free.
            if !is_gone(before) {
                return false;
            }
        }
        self.listeners.insert(port, socket);
        true
    }

    fn has_room(&mut self) -> bool {
        if self.connections.len() >= MOST_CONNECTIONS {
            let dispensable = |connection: &Connection| connection.is_dispensable();
            let over: Vec<u64> =
                self.connections.iter().filter(|(_, one)| dispensable(one)).map(|(number, _)| *number).collect();
            over.into_iter().for_each(|number| self.remove(number));
        }
        self.connections.len() < MOST_CONNECTIONS
    }

    fn add(&mut self, connection: Connection) {
        let number = self.next_number;
        self.next_number += 1;
        self.by_ports.insert((connection.guest_port, connection.host_port), number);
        self.connections.insert(number, connection);
        self.settle(number);
        self.has_new_wish = true;
    }

    fn remove(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number) {
            self.unname(number, &(connection.guest_port, connection.host_port));
        }
    }

    fn unname(&mut self, number: u64, ports: &(u32, u32)) {
        if self.by_ports.get(ports) == Some(&number) {
            self.by_ports.remove(ports);
        }
    }

    /// After anything that was done to a connection: it is given its turn, or is no more.
    pub fn settle(&mut self, number: u64) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if connection.is_over() {
            self.remove(number);
        } else if connection.has_something() && !connection.is_queued {
            connection.is_queued = true;
            self.ready.push_back(number);
        }
    }

    /// The next packet for the guest.
    pub fn fill(&mut self, chain: &Chain<'_>) -> Answer {
        let Some(room) = chain.writable_bytes().checked_sub(HEADER_BYTES as u64) else {
            // A buffer that holds no packet gets none.
            return Answer::Done(0);
        };
        if let Some(header) = self.refusals.pop_front() {
            return self.put(chain, header, &[]);
        }
        let mut buffer = vec![0; room.min(PIECE as u64) as usize];
        for _ in 0..self.ready.len() {
            let Some(number) = self.ready.pop_front() else { break };
            let Some(connection) = self.connections.get_mut(&number) else { continue };
            connection.is_queued = false;
            let next = connection.next(&mut buffer);
            self.has_new_wish = true;
            self.settle(number);
            match next {
                Next::Control(header) => return self.put(chain, header, &[]),
                Next::Data(header, size) => return self.put(chain, header, &buffer[..size]),
                Next::Nothing => {}
            }
        }
        Answer::Kept
    }

    fn put(&self, chain: &Chain<'_>, header: Header, bytes: &[u8]) -> Answer {
        let header = Header { source_cid: HOST_CID, target_cid: self.guest_cid, kind: STREAM, ..header };
        let done = chain.write(0, &header.bytes()) && chain.write(HEADER_BYTES as u64, bytes);
        Answer::Done(if done { (HEADER_BYTES + bytes.len()) as u32 } else { 0 })
    }

    /// Whether there may be something for the guest.
    pub fn has_something(&self) -> bool {
        !self.ready.is_empty() || !self.refusals.is_empty()
    }

    /// Whether the guest's packets, which were held back, need not be any more: once.
    pub fn lets_go_on(&mut self) -> bool {
        self.refusals.len() < MOST_REFUSALS && std::mem::take(&mut self.is_held_back)
    }

    /// A packet of the guest's.
    pub fn take(&mut self, chain: &Chain<'_>) -> Answer {
        // 5.10.6.1.1: what is answered needs a buffer, so there is no taking without giving.
        if self.refusals.len() >= MOST_REFUSALS {
            self.is_held_back = true;
            return Answer::Kept;
        }
        let Some(header) = Header::read(chain).filter(|header| header.source_cid == self.guest_cid) else {
            return Answer::Done(0);
        };
        let ports = (header.source_port, header.target_port);
        let number = self.by_ports.get(&ports).copied();
        if header.target_cid != HOST_CID || header.kind != STREAM {
            self.refuse(&header);
        } else if let Some(number) = number {
            self.receive(number, &header, chain);
        } else if header.op == op::REQUEST {
            match self.reach(&header) {
                Some(socket) => self.add(Connection::from_guest(&header, socket)),
                None => self.refuse(&header),
            }
        } else {
            self.refuse(&header);
        }
        Answer::Done(0)
    }

    /// 5.10.6.4.1: who is not there, or not for this, answers with a reset; but not to one.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            let (source_port, target_port) = (header.target_port, header.source_port);
            self.refusals.push_back(Header { source_port, target_port, op: op::RST, ..Header::default() });
        }
    }

    /// A packet for a connection that is there.
    fn receive(&mut self, number: u64, header: &Header, chain: &Chain<'_>) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        connection.take_credit(header);
        let is_right = match header.op {
            op::RESPONSE => connection.answered(),
            op::RW => {
                let is_whole = chain.readable_bytes() >= HEADER_BYTES as u64 + u64::from(header.size);
                is_whole && connection.take(header.size, |bytes| chain.read(HEADER_BYTES as u64, bytes))
            }
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST => {
                connection.ask_for_credit();
                true
            }
            op::SHUTDOWN => {
                connection.shut_down(header.flags);
                true
            }
            op::RST => {
                connection.was_reset();
                true
            }
            _ => false,
        };
        if !is_right {
            connection.reset();
        }
        if header.op == op::RST {
            // What is still on its way lingers; the ports are free.
            self.unname(number, &(header.source_port, header.target_port));
        }
        self.has_new_wish = true;
        self.settle(number);
    }

    /// The socket of the host's program that a guest wants to reach.
    fn reach(&mut self, request: &Header) -> Option<UnixStream> {
        if !self.has_room() {
            return None;
        }
        let port = request.target_port;
        if let Some(listener) = self.listeners.get(&port) {
            let (near, far) = UnixStream::pair().ok()?;
            let from = request.source_port.to_le_bytes();
            return match passing::send_all(listener.as_fd(), &from, Some(far.as_fd())) {
                Ok(()) => Some(near),
                Err(error) => {
                    // One that has more connections than it takes refuses some; one that is gone is none.
                    if error.kind() != std::io::ErrorKind::WouldBlock {
                        self.listeners.remove(&port);
                    }
                    None
                }
            };
        }
        let mut name = self.path.clone()?.into_os_string();
        name.push(format!("_{port}"));
        local::connect_at_once(name.as_ref()).ok()
    }
}

/// Whether the far end of a pair was closed.
fn is_gone(socket: &UnixStream) -> bool {
    let mut watches = [host::events::Watch::new(socket.as_fd(), false, false)];
    host::events::poll(&mut watches, Some(std::time::Duration::ZERO)).is_ok() && watches[0].closed
}
