//! Datagrams of a guest, and its echo requests: each pair of ends has a socket of the host, which takes answers from nobody
//! else. Sources: RFC 768; RFC 792 and RFC 4443 for echoes; RFC 4787, 4.3 for how long a pair lasts.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Common;
use super::config::{DNS_PORT, RESOLVER, RESOLVER6};
use crate::network::checksum::Sum;
use crate::network::frame::{Cut, Frame, Payload};
use crate::network::packet::{self, ICMP, ICMP6, UDP};

/// How long a pair lasts without a word: RFC 4787, REQ-5, and less for one that is done with its answer.
const LASTS: Duration = Duration::from_secs(120);
const NAME_LASTS: Duration = Duration::from_secs(20);
/// The largest datagram.
const MOST_BYTES: usize = 65535;
/// Datagrams that are passed on in a turn.
const MOST_AT_ONCE: usize = 64;

/// Kinds of echo messages: request and answer.
const ECHO: [(u8, u8); 2] = [(8, 0), (128, 129)];

#[derive(Debug)]
enum Kind {
    Connected(UdpSocket),
    /// A port of the host's that leads to the guest, and who spoke to it.
    Forwarded(Arc<UdpSocket>, SocketAddr),
    /// Echo requests, with the identity that the guest gave them.
    Ping(UdpSocket, u16),
}

#[derive(Debug)]
pub struct Udp {
    pub guest: SocketAddr,
    /// The other end, as the guest knows it.
    pub remote: SocketAddr,
    kind: Kind,
    pub last: Instant,
}

impl Udp {
    /// A pair that the guest begins. `to` is where the host sends what is for `remote`.
    ///
    /// # Errors
    /// The system's.
    pub fn from_guest(guest: SocketAddr, remote: SocketAddr, to: SocketAddr) -> io::Result<Udp> {
        let any: SocketAddr =
            if to.is_ipv4() { ([0; 4], 0).into() } else { (std::net::Ipv6Addr::UNSPECIFIED, 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.set_nonblocking(true)?;
        socket.connect(to)?;
        Ok(Udp { guest, remote, kind: Kind::Connected(socket), last: Instant::now() })
    }

    pub fn forwarded(guest: SocketAddr, remote: SocketAddr, socket: Arc<UdpSocket>, peer: SocketAddr) -> Udp {
        Udp { guest, remote, kind: Kind::Forwarded(socket, peer), last: Instant::now() }
    }

    /// # Errors
    /// The system's: mostly that it lets nobody ping.
    pub fn ping(guest: SocketAddr, remote: SocketAddr) -> io::Result<Udp> {
        let socket = host::socket::ping(remote)?;
        Ok(Udp { guest, remote, kind: Kind::Ping(socket, guest.port()), last: Instant::now() })
    }

    /// Whether it is how somebody who spoke to a port of the host's knows the guest.
    pub fn is_of(&self, guest: SocketAddr, peer: SocketAddr) -> bool {
        self.guest == guest && matches!(&self.kind, Kind::Forwarded(_, known) if *known == peer)
    }

    /// A socket of its own, to be watched.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Connected(socket) | Kind::Ping(socket, _) => Some(socket.as_fd()),
            Kind::Forwarded(..) => None,
        }
    }

    pub fn end_of_life(&self) -> Instant {
        let is_name = self.remote.port() == DNS_PORT && [RESOLVER.into(), RESOLVER6.into()].contains(&self.remote.ip());
        self.last + if is_name { NAME_LASTS } else { LASTS }
    }

    /// Passes on what the guest says. What the host does not take is lost, as datagrams may be; the error says of an earlier
    /// one that nobody was there for it.
    pub fn say(&mut self, data: &[u8]) -> io::Result<usize> {
        self.last = Instant::now();
        match &self.kind {
            Kind::Connected(socket) | Kind::Ping(socket, _) => socket.send(data),
            Kind::Forwarded(socket, peer) => socket.send_to(data, peer),
        }
    }

    /// Passes on what has come; false when there is more than there is room for. `nobody` is called when the host learns
    /// that nobody is at the other end.
    pub fn is_readable(&mut self, common: &mut Common, mut nobody: impl FnMut(&mut Common)) -> bool {
        let mut buffer = std::mem::take(&mut common.buffer);
        buffer.resize(MOST_BYTES, 0);
        let mut is_done = false;
        for _ in 0..MOST_AT_ONCE {
            if !common.has_room() {
                break;
            }
            let (Kind::Connected(socket) | Kind::Ping(socket, _)) = &self.kind else {
                is_done = true;
                break;
            };
            match socket.recv(&mut buffer) {
                Ok(count) => self.hear(&buffer[..count], common),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => nobody(common),
                // Nothing more, or nothing that concerns the guest.
                Err(_) => {
                    is_done = true;
                    break;
                }
            }
        }
        common.buffer = buffer;
        is_done
    }

    /// Gives the guest what its other end said.
    pub fn hear(&mut self, data: &[u8], common: &mut Common) {
        self.last = Instant::now();
        match self.kind {
            Kind::Ping(_, identity) => {
                if let Some(frame) = echo(self.remote, self.guest, identity, data, common) {
                    common.send(frame);
                }
            }
            _ => common.send_datagram(self.remote, self.guest, data),
        }
    }
}

/// An answer to an echo request, as the guest knows it.
fn echo(remote: SocketAddr, guest: SocketAddr, identity: u16, data: &[u8], common: &Common) -> Option<Frame> {
    let (protocol, at) = if remote.is_ipv4() { (ICMP, 0) } else { (ICMP6, 1) };
    if *data.first()? != ECHO[at].1 || data.len() < 8 {
        return None;
    }
    let mut data = data.to_vec();
    data[4..6].copy_from_slice(&identity.to_be_bytes());
    Some(message(remote.ip(), guest.ip(), protocol, data, common))
}

/// A frame with a message of ICMP, of either version. Its checksum is made here.
pub fn message(
    source: std::net::IpAddr,
    target: std::net::IpAddr,
    protocol: u8,
    mut data: Vec<u8>,
    common: &Common,
) -> Frame {
    data[2..4].copy_from_slice(&[0; 2]);
    let begun =
        if protocol == ICMP { Sum::default() } else { Sum::of_pseudo_header(source, target, ICMP6, data.len()) };
    let sum = begun.plus(&data).complement();
    data[2..4].copy_from_slice(&sum);
    let mut head = common.ethernet(target);
    packet::add_ip(&mut head, source, target, protocol, data.len());
    head.extend(data);
    Frame::plain(head)
}

/// An echo request of the guest's: its identity, or `None` when it is something else.
#[must_use]
pub fn echo_identity(protocol: u8, data: &[u8]) -> Option<u16> {
    let request = ECHO[usize::from(protocol == ICMP6)].0;
    (data.len() >= 8 && data[0] == request && data[1] == 0).then(|| u16::from_be_bytes([data[4], data[5]]))
}

/// The answer to an echo request, by whom it was for.
#[must_use]
pub fn answer_echo(protocol: u8, data: &[u8]) -> Vec<u8> {
    let mut answer = data.to_vec();
    answer[0] = ECHO[usize::from(protocol == ICMP6)].1;
    answer
}

/// A frame, or a datagram that the guest's card cuts into fragments.
pub fn datagram(head: Vec<u8>, source: SocketAddr, target: SocketAddr, data: &[u8], mtu: u16) -> Frame {
    let mut head = head;
    packet::add_ip(&mut head, source.ip(), target.ip(), UDP, 8 + data.len());
    let mut offload = packet::add_udp(&mut head, source, target, data.len());
    let room = usize::from(mtu) - if source.is_ipv4() { 20 } else { 48 };
    if 8 + data.len() > room {
        (offload.cut, offload.piece) = (Cut::Udp, (room / 8 * 8) as u16);
        if source.is_ipv4() {
            // It may be cut: "don't fragment" goes, and the packet gets a number that its fragments share.
            let ip = crate::network::frame::ETHERNET_BYTES;
            let number =
                (data.len() as u16) ^ target.port().rotate_left(3) ^ data.first().map_or(0, |byte| u16::from(*byte));
            head[ip + 4..ip + 6].copy_from_slice(&number.to_be_bytes());
            head[ip + 6..ip + 8].copy_from_slice(&[0; 2]);
            packet::finish_ipv4(&mut head);
        }
    }
    Frame { offload, head, tail: Some(Payload::new(data.to_vec())) }
}
