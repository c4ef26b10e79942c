//! The connections of one guest, and what becomes of each of its frames.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, mem};

use host::socket::{self, Epoll, Event};
use host::{passing, random};

use super::config::{Config, DNS_PORT, Forward, GATEWAY, GUEST, ROUTER6, Way};
use super::fragments::Fragments;
use super::segment::{ACK, RST, SYN, Say, Segment};
use super::tcp::{Fate, Tcp};
use super::udp::{self, Udp};
use super::{Common, FIRST_FLOW, dhcp, dhcp6, dns, neighbours};
use crate::network::frame::{ETHERNET_BYTES, Frame};
use crate::network::packet::{self, ARP, Datagram, ICMP, ICMP6, IPV4, IPV6, Ip, TCP, UDP};
use crate::network::{Mac, fit};

/// Connections of a guest, at most. Each has a descriptor of the host's, of which a process may have 1024 unless its user
/// allows more.
const MOST_TCP: usize = if cfg!(test) { 16 } else { 512 };
const MOST_UDP: usize = if cfg!(test) { 16 } else { 256 };
/// Of the TCP connections, those that the host took for ports of the guest's: whoever fills them keeps the guest from none of
/// its own.
const MOST_CALLED: usize = MOST_TCP / 4 * 3;
/// Connections that are taken from a listening socket at a time.
const MOST_ACCEPTED: usize = 64;

/// What names a connection: protocol, the guest's end, the other end.
type Name = (u8, SocketAddr, SocketAddr);

enum Flow {
    Tcp(Box<Tcp>),
    Udp(Udp),
}

pub struct State {
    common: Common,
    epoll: Arc<Epoll>,
    flows: HashMap<u64, Flow>,
    names: HashMap<Name, u64>,
    next_token: u64,
    tcp: usize,
    /// Of these, those that the host took.
    called: usize,
    fragments: Fragments,
    forwarded: Vec<Option<Arc<std::net::UdpSocket>>>,
    /// Connections that have something to say to the guest when it has sent all that it had.
    dirty: Vec<u64>,
    /// Those that wait for room.
    starved: Vec<u64>,
    /// When the thread wakes by itself.
    sleeps_until: Option<Instant>,
}

impl State {
    pub fn new(common: Common, epoll: Arc<Epoll>) -> State {
        let forwarded = common.config.forwards.iter().map(|forward| match forward {
            Forward::Udp(socket, _) => socket.try_clone().ok().map(Arc::new),
            Forward::Tcp(..) => None,
        });
        let forwarded = forwarded.collect();
        State {
            common,
            epoll,
            flows: HashMap::new(),
            names: HashMap::new(),
            next_token: FIRST_FLOW,
            tcp: 0,
            called: 0,
            fragments: Fragments::default(),
            forwarded,
            dirty: Vec::new(),
            starved: Vec::new(),
            sleeps_until: None,
        }
    }

    #[cfg(any(test, feature = "testing"))]
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.tcp, self.flows.len() - self.tcp, self.names.len())
    }

    /// What does not hold of what should always.
    #[cfg(any(test, feature = "testing"))]
    pub fn audit(&self) -> Option<&'static str> {
        let (mut tcp, mut called, mut held, mut pending) = (0, 0, 0, 0);
        for flow in self.flows.values() {
            if let Flow::Tcp(flow) = flow {
                let Some((held_here, pending_here)) = flow.measure() else {
                    return Some("one connection's own numbers");
                };
                (tcp, called) = (tcp + 1, called + usize::from(flow.is_called()));
                (held, pending) = (held + held_here, pending + pending_here);
            }
        }
        let others = self.flows.len() - tcp;
        let (common, room) = (&self.common, self.flows.len());
        [
            (tcp == self.tcp && tcp <= MOST_TCP, "the number of TCP connections"),
            (called == self.called && called <= MOST_CALLED, "the number of those that the host took"),
            (others <= MOST_UDP, "the number of others"),
            (self.names.len() == room, "a name for each, and for no other"),
            (self.names.values().all(|token| self.flows.contains_key(token)), "names of those that there are"),
            (held == common.held, "what is under way to the guest"),
            (pending == common.pending, "what waits for hosts"),
            (held <= 48 << 20 && pending <= 48 << 20, "bounds of what waits"),
            (self.starved.len() <= MOST_TCP + MOST_UDP, "each waits for room once"),
            (self.dirty.len() <= MOST_TCP, "each has something to say once"),
            (self.fragments.bytes() <= 2 << 20, "a bound for fragments"),
        ]
        .into_iter()
        .find_map(|(holds, what)| (!holds).then_some(what))
    }

    // ---- time ------------------------------------------------------------------------------------------------------

    /// Looks after those whose time has come, and says how long there is nothing to do.
    pub fn before_sleep(&mut self) -> Option<Duration> {
        let now = Instant::now();
        if self.common.alarm.is_some_and(|alarm| alarm <= now) {
            self.common.alarm = None;
            let tokens: Vec<u64> = self.flows.keys().copied().collect();
            for token in tokens {
                match self.flows.get(&token) {
                    Some(Flow::Tcp(tcp)) => match tcp.deadline() {
                        Some(deadline) if deadline <= now => self.with_tcp(token, Tcp::is_late),
                        Some(deadline) => self.common.wake_at(deadline),
                        None => {}
                    },
                    Some(Flow::Udp(udp)) if udp.end_of_life() <= now => self.remove(token, Fate::Done),
                    Some(Flow::Udp(udp)) => self.common.wake_at(udp.end_of_life()),
                    None => {}
                }
            }
        }
        self.sleeps_until = self.common.alarm;
        self.sleeps_until.map(|until| until.saturating_duration_since(now))
    }

    /// Whether the thread sleeps for too long.
    pub fn is_early(&self) -> bool {
        self.common.alarm.is_some_and(|alarm| self.sleeps_until.is_none_or(|until| alarm < until))
    }

    /// There is room for the guest again.
    pub fn feed(&mut self) {
        for token in mem::take(&mut self.starved) {
            self.pump(token);
        }
    }

    /// The guest has sent all that it had.
    pub fn flush(&mut self) {
        for token in mem::take(&mut self.dirty) {
            self.with_tcp(token, Tcp::flush);
        }
    }

    pub fn end(&mut self) {
        for token in self.flows.keys().copied().collect::<Vec<_>>() {
            self.remove(token, Fate::Done);
        }
        // The host's ports are free again.
        self.common.config.forwards.clear();
        self.common.config.services.clear();
        self.forwarded.clear();
    }

    // ---- connections -----------------------------------------------------------------------------------------------

    fn with_tcp(&mut self, token: u64, what: impl FnOnce(&mut Tcp, &mut Common) -> Fate) {
        let Some(Flow::Tcp(tcp)) = self.flows.get_mut(&token) else { return };
        let fate = what(tcp, &mut self.common);
        if fate != Fate::Lives {
            self.remove(token, fate);
        } else if mem::take(&mut self.common.is_starved) {
            self.starve(token);
        }
    }

    fn pump(&mut self, token: u64) {
        match self.flows.get_mut(&token) {
            Some(Flow::Tcp(_)) => self.with_tcp(token, Tcp::pump),
            Some(Flow::Udp(udp)) => {
                let (guest, remote) = (udp.guest, udp.remote);
                let is_done = udp.is_readable(&mut self.common, |common| nobody(guest, remote, common));
                self.common.is_starved = false;
                if !is_done {
                    self.starve(token);
                }
            }
            None => {}
        }
    }

    fn remove(&mut self, token: u64, fate: Fate) {
        match self.flows.remove(&token) {
            Some(Flow::Tcp(tcp)) => {
                self.names.remove(&(TCP, tcp.guest, tcp.remote));
                self.tcp -= 1;
                self.called -= usize::from(tcp.is_called());
                tcp.end(fate, &mut self.common);
            }
            Some(Flow::Udp(udp)) => {
                self.names.retain(|_, known| *known != token);
                drop(udp);
            }
            None => {}
        }
    }

    fn add(&mut self, name: Name, flow: Flow) -> io::Result<u64> {
        let token = self.next_token;
        match &flow {
            Flow::Tcp(tcp) => self.epoll.watch_changes(tcp.fd(), token)?,
            Flow::Udp(udp) => {
                if let Some(fd) = udp.fd() {
                    self.epoll.watch_changes(fd, token)?;
                }
                self.common.wake_at(udp.end_of_life());
            }
        }
        self.next_token += 1;
        if let Flow::Tcp(tcp) = &flow {
            self.tcp += 1;
            self.called += usize::from(tcp.is_called());
        }
        self.names.insert(name, token);
        self.flows.insert(token, flow);
        Ok(token)
    }

    /// Makes room for one more connection: the one that has been silent for longest goes, if it may.
    fn make_room(&mut self, is_tcp: bool) -> bool {
        let (count, most) = if is_tcp { (self.tcp, MOST_TCP) } else { (self.flows.len() - self.tcp, MOST_UDP) };
        if count < most {
            return true;
        }
        let oldest = self.flows.iter().filter_map(|(token, flow)| match flow {
            // Those that somebody began and the other has not answered are what a flood is made of.
            Flow::Tcp(tcp) if is_tcp && tcp.is_half_open() => Some((tcp.last, *token)),
            Flow::Udp(udp) if !is_tcp => Some((udp.last, *token)),
            _ => None,
        });
        let Some((_, token)) = oldest.min() else { return false };
        self.remove(token, Fate::Broken);
        true
    }

    /// Gives up the oldest of those connections that the host took and the guest has not answered; false when it has answered
    /// all.
    fn forget_called(&mut self) -> bool {
        let oldest = self.flows.iter().filter_map(|(token, flow)| match flow {
            Flow::Tcp(tcp) if tcp.is_called() && tcp.is_half_open() => Some((tcp.last, *token)),
            _ => None,
        });
        let Some((_, token)) = oldest.min() else { return false };
        self.remove(token, Fate::Broken);
        true
    }

    /// There is no room for what a connection has for the guest.
    fn starve(&mut self, token: u64) {
        if !self.starved.contains(&token) {
            self.starved.push(token);
        }
    }

    /// A socket of a connection has changed.
    pub fn socket_ready(&mut self, event: Event) {
        let token = event.token;
        match self.flows.get(&token) {
            Some(Flow::Tcp(_)) => {
                if event.writable {
                    self.with_tcp(token, Tcp::is_writable);
                }
                if event.readable {
                    self.with_tcp(token, Tcp::is_readable);
                }
            }
            Some(Flow::Udp(_)) if event.readable => self.pump(token),
            _ => {}
        }
    }

    // ---- from the host ---------------------------------------------------------------------------------------------

    /// Somebody on the host, or beyond, wants something of a port that leads to the guest.
    pub fn listener_ready(&mut self, index: u64) {
        let index = index as usize;
        for _ in 0..MOST_ACCEPTED {
            let went_on = match self.common.config.forwards.get(index) {
                Some(Forward::Tcp(listener, port)) => match listener.accept() {
                    Ok((stream, peer)) => {
                        let port = *port;
                        self.accepted(stream, peer, port);
                        true
                    }
                    Err(_) => false,
                },
                Some(Forward::Udp(..)) => self.hear(index),
                None => false,
            };
            if !went_on {
                return;
            }
        }
    }

    /// What the guest shall take a peer for: one that is on this host is at the gateway. Its port is as it is, unless that is
    /// taken.
    fn seen(&self, protocol: u8, guest: SocketAddr, peer: SocketAddr) -> SocketAddr {
        let ip = match peer.ip() {
            IpAddr::V4(ip) if !ip.is_loopback() && !Config::is_guests(ip.into()) => ip,
            _ => GATEWAY,
        };
        let mut port = peer.port();
        while port == 0 || self.names.contains_key(&(protocol, guest, SocketAddr::new(ip.into(), port))) {
            port = port.wrapping_add(1);
        }
        SocketAddr::new(ip.into(), port)
    }

    fn accepted(&mut self, stream: std::net::TcpStream, peer: SocketAddr, port: u16) {
        let is_full = self.called >= MOST_CALLED && !self.forget_called();
        if stream.set_nonblocking(true).is_err() || is_full || !self.make_room(true) {
            return;
        }
        let _ = stream.set_nodelay(true);
        let guest = SocketAddr::new(GUEST.into(), port);
        let remote = self.seen(TCP, guest, peer);
        let tcp = Tcp::to_guest(guest, remote, stream, first_number(), &mut self.common);
        // Without a place in the kernel's list it ends at once, and its peer sees that.
        let _ = self.add((TCP, guest, remote), Flow::Tcp(Box::new(tcp)));
    }

    /// A datagram for a port that leads to the guest.
    fn hear(&mut self, index: usize) -> bool {
        let Some(Forward::Udp(socket, port)) = self.common.config.forwards.get(index) else { return false };
        let mut buffer = mem::take(&mut self.common.buffer);
        buffer.resize(65535, 0);
        let heard = socket.recv_from(&mut buffer);
        let guest = SocketAddr::new(GUEST.into(), *port);
        let is_more = heard.is_ok();
        if let Ok((count, peer)) = heard {
            let known = self.flows.iter().find(|(_, flow)| match flow {
                Flow::Udp(udp) => udp.is_of(guest, peer),
                Flow::Tcp(_) => false,
            });
            let token = known.map(|(token, _)| *token).or_else(|| {
                let socket = Arc::clone(self.forwarded.get(index)?.as_ref()?);
                let remote = self.seen(UDP, guest, peer);
                if !self.make_room(false) {
                    return None;
                }
                self.add((UDP, guest, remote), Flow::Udp(Udp::forwarded(guest, remote, socket, peer))).ok()
            });
            if let Some(Flow::Udp(udp)) = token.and_then(|token| self.flows.get_mut(&token)) {
                udp.hear(&buffer[..count], &mut self.common);
            }
        }
        self.common.buffer = buffer;
        is_more
    }

    // ---- from the guest --------------------------------------------------------------------------------------------

    /// Carries a frame of the guest's out.
    pub fn take(&mut self, frame: &mut Frame) {
        let Some(kind) = packet::ether_type(&frame.head) else { return };
        let card = Mac(packet::take(&frame.head, 6));
        if card.is_group() {
            return;
        }
        match kind {
            ARP => {
                self.common.guest = card;
                if let Some(reply) = neighbours::answer_arp(&frame.head, &self.common) {
                    self.common.send(reply);
                }
            }
            IPV4 | IPV6 => {
                let bytes = &frame.head[ETHERNET_BYTES..];
                let Some(ip) = Ip::parse(bytes, bytes.len()) else { return };
                if ip.source.is_ipv4() != (kind == IPV4) {
                    return;
                }
                self.common.guest = card;
                if ip.is_fragment {
                    // A checksum that is not finished cannot be in a fragment.
                    let data = &bytes[ip.header..ip.header + ip.length];
                    if let Some(whole) = self.fragments.take(&ip, data) {
                        self.take_packet(&ip, &whole, &[]);
                    }
                    return;
                }
                // What is passed on as it is must be right.
                if matches!(ip.protocol, ICMP | ICMP6) {
                    fit::finish_checksum(frame);
                }
                let bytes = &frame.head[ETHERNET_BYTES..];
                self.take_packet(&ip, &bytes[ip.header..ip.header + ip.length], bytes);
            }
            _ => {}
        }
    }

    /// `packet` is all of it, header included, where it did not come in fragments.
    fn take_packet(&mut self, ip: &Ip, data: &[u8], packet: &[u8]) {
        if ip.protocol == UDP
            && let Some(datagram) = Datagram::parse(ip, data)
        {
            match datagram.target.port() {
                dhcp::SERVER_PORT if ip.source.is_ipv4() => return self.lease(&datagram),
                dhcp6::SERVER_PORT if ip.source.is_ipv6() => return self.inform(&datagram),
                _ => {}
            }
        }
        if ip.protocol == ICMP6
            && ip.target.is_ipv6()
            && let Some(reply) = neighbours::answer_icmp6(ip.source, data, &self.common)
        {
            return self.common.send(reply);
        }
        // Who sends with another's address gets nothing, and nobody else does.
        if !Config::is_guests(ip.source) || ip.source.is_ipv6() && !self.common.config.has_ipv6 {
            return;
        }
        match ip.protocol {
            TCP => {
                if let Some(segment) = Segment::parse(ip, data) {
                    self.take_segment(&segment);
                }
            }
            UDP => {
                if let Some(datagram) = Datagram::parse(ip, data) {
                    self.take_datagram(&datagram, packet);
                }
            }
            ICMP | ICMP6 => self.take_echo(ip, data),
            _ => {}
        }
    }

    fn lease(&mut self, message: &Datagram<'_>) {
        let config = &self.common.config;
        if let Some(reply) = dhcp::answer(message.data, &config.name, config.mtu, config.policy.names) {
            // RFC 2131, 4.1: to the address that it gets, or to all; its card takes either.
            let source = SocketAddr::new(GATEWAY.into(), dhcp::SERVER_PORT);
            let target = if message.source.ip().is_unspecified() { [255; 4].into() } else { message.source.ip() };
            self.common.send_datagram(source, SocketAddr::new(target, dhcp::CLIENT_PORT), &reply);
        }
    }

    /// Tells a guest what it asks for over IPv6.
    fn inform(&mut self, message: &Datagram<'_>) {
        let config = &self.common.config;
        // RFC 8415, 18.4: from its own address on this link, and answered there.
        let is_near = matches!(message.source.ip(), IpAddr::V6(address) if address.is_unicast_link_local());
        if config.has_ipv6
            && is_near
            && let Some(reply) = dhcp6::answer(message.data, config.policy.names)
        {
            let source = SocketAddr::new(ROUTER6.into(), dhcp6::SERVER_PORT);
            self.common.send_datagram(source, message.source, &reply);
        }
    }

    fn take_segment(&mut self, segment: &Segment<'_>) {
        let name = (TCP, segment.source, segment.target);
        if let Some(token) = self.names.get(&name).copied() {
            self.with_tcp(token, |tcp, common| tcp.take(segment, common));
            if self.dirty.last() != Some(&token) && !self.dirty.contains(&token) {
                self.dirty.push(token);
            }
            return;
        }
        if segment.has(RST) {
            return;
        }
        let stream = if segment.has(SYN) && !segment.has(ACK) && self.make_room(true) {
            self.connect(self.common.config.way(segment.target))
        } else {
            Err(io::ErrorKind::ConnectionRefused.into())
        };
        let begun = stream.and_then(|(stream, is_connected)| {
            let tcp = Tcp::from_guest(segment, stream, first_number(), &self.common);
            let token = self.add(name, Flow::Tcp(Box::new(tcp)))?;
            if is_connected {
                self.with_tcp(token, Tcp::is_writable);
            }
            Ok(())
        });
        if begun.is_err() {
            // 3.5.2 "Reset Generation" of RFC 9293.
            let (number, acknowledged, flags) = if segment.has(ACK) {
                (segment.acknowledged, 0, RST)
            } else {
                (0, segment.number.wrapping_add(segment.span()), RST | ACK)
            };
            let (source, target) = (segment.target, segment.source);
            let say = Say { source, target, number, acknowledged, flags, window: 0, maximum: None, scale: None };
            self.common.send(say.frame(self.common.ethernet(target.ip()), None, u16::MAX));
        }
    }

    /// A stream to where a connection of the guest's leads, and whether it is connected already.
    fn connect(&self, way: Way) -> io::Result<(std::net::TcpStream, bool)> {
        match way {
            Way::To(target) => Ok((socket::connect(target)?, false)),
            Way::Service(index) => {
                let service = self.common.config.services.get(index).ok_or(io::ErrorKind::NotFound)?;
                let (ours, theirs) = UnixStream::pair()?;
                ours.set_nonblocking(true)?;
                passing::send_all(service.socket.as_fd(), &[1], Some(theirs.as_fd()))?;
                // A stream is a stream: what is asked of it here is the same for both kinds.
                Ok((std::net::TcpStream::from(OwnedFd::from(ours)), true))
            }
            Way::Refused => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    fn take_datagram(&mut self, datagram: &Datagram<'_>, packet: &[u8]) {
        let (guest, remote) = (datagram.source, datagram.target);
        let name = (UDP, guest, remote);
        if Config::is_resolver(remote.ip())
            && remote.port() == DNS_PORT
            && self.common.config.policy.names
            && let Some(answer) = dns::answer(datagram.data, self.common.config.has_ipv6)
        {
            return self.common.send_datagram(remote, guest, &answer);
        }
        let known = self.names.get(&name).copied();
        let token = known.or_else(|| {
            let Way::To(target) = self.common.config.way(remote) else { return None };
            if !self.make_room(false) {
                return None;
            }
            self.add(name, Flow::Udp(Udp::from_guest(guest, remote, target).ok()?)).ok()
        });
        match token.and_then(|token| self.flows.get_mut(&token)) {
            Some(Flow::Udp(udp)) => {
                if matches!(udp.say(datagram.data), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused) {
                    nobody(guest, remote, &mut self.common);
                }
            }
            _ if !remote.ip().is_multicast() && remote.ip() != IpAddr::from([255; 4]) && !packet.is_empty() => {
                unreachable(packet, guest, remote, true, &mut self.common);
            }
            _ => {}
        }
    }

    fn take_echo(&mut self, ip: &Ip, data: &[u8]) {
        let Some(identity) = udp::echo_identity(ip.protocol, data) else { return };
        if Config::is_gateway(ip.target) || Config::is_resolver(ip.target) {
            let answer = udp::answer_echo(ip.protocol, data);
            return self.common.send(udp::message(ip.target, ip.source, ip.protocol, answer, &self.common));
        }
        if !self.common.config.may_ping(ip.target) {
            return;
        }
        let (guest, remote) = (SocketAddr::new(ip.source, identity), SocketAddr::new(ip.target, 0));
        let name = (ip.protocol, guest, remote);
        let token = self.names.get(&name).copied().or_else(|| {
            if !self.make_room(false) {
                return None;
            }
            self.add(name, Flow::Udp(Udp::ping(guest, remote).ok()?)).ok()
        });
        if let Some(Flow::Udp(udp)) = token.and_then(|token| self.flows.get_mut(&token)) {
            let _ = udp.say(data);
        }
    }
}

/// RFC 9293, 3.4.1: nobody can guess it.
fn first_number() -> u32 {
    let mut bytes = [0; 4];
    // A host that has none before its own boot is over is no host that runs us.
    let _ = random::fill(&mut bytes);
    u32::from_ne_bytes(bytes)
}

/// Tells the guest that nobody is at the other end.
fn nobody(guest: SocketAddr, remote: SocketAddr, common: &mut Common) {
    let mut packet = Vec::new();
    packet::add_ip(&mut packet, guest.ip(), remote.ip(), UDP, 8);
    let _ = packet::add_udp(&mut packet, guest, remote, 0);
    unreachable(&packet, guest, remote, false, common);
}

/// Tells the guest that a packet of its goes nowhere: because nobody is there, or because it must not. RFC 792, RFC 4443, 3.1.
fn unreachable(packet: &[u8], guest: SocketAddr, remote: SocketAddr, is_forbidden: bool, common: &mut Common) {
    let (protocol, kind, code) = match (guest.is_ipv4(), is_forbidden) {
        (true, true) => (ICMP, 3, 13),
        (true, false) => (ICMP, 3, 3),
        (false, true) => (ICMP6, 1, 1),
        (false, false) => (ICMP6, 1, 4),
    };
    let mut data = vec![kind, code, 0, 0, 0, 0, 0, 0];
    data.extend(&packet[..packet.len().min(256)]);
    let source = if is_forbidden && remote.is_ipv4() { GATEWAY.into() } else { remote.ip() };
    let frame = udp::message(source, guest.ip(), protocol, data, common);
    common.send(frame);
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("flows", &self.flows.len()).finish_non_exhaustive()
    }
}
