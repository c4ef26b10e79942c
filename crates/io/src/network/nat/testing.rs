//! Hostile guests and hostile hosts: random frames into the network, and random bytes from beyond it, for ever new seeds. It
//! may lose anything; it may not panic, hang, grow without a bound, lose count, or give the guest a frame that is none.
//!
//! Nothing leaves this process: the policy lets nothing out, and who answers (two services, a name server, who speaks to ports
//! of the guest's) is a socket made here.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::config::{Config, GATEWAY, GATEWAY6, GUEST, Policy, RESOLVER, RESOLVER6, ROUTER, Service};
use super::segment::{ACK, FIN, PSH, RST, SYN, Say, Segment};
use super::{Nat, dhcp, udp};
use crate::network::fit::{self, Abilities};
use crate::network::frame::{ETHERNET_BYTES, Frame, HEADER_BYTES, Payload};
use crate::network::inbox::Inbox;
use crate::network::packet::{self, ARP, Datagram, FRAGMENT, ICMP, ICMP6, IPV4, IPV6, Ip, TCP, UDP};
use crate::network::{Mac, Wire};
use crate::virtio::testing::{Random, panics};

/// No seed takes so long, even on a host that has much else to do.
const PATIENCE: Duration = Duration::from_secs(60);
const CARD: Mac = Mac([2, 0, 0, 0, 0, 9]);
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd72, 0x7a65, 0x726f, 2, 0, 0, 0, 0x15);
const SERVICE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// Sockets beyond the network that are kept open.
const MOST_PEERS: usize = 24;
/// Connections that the guest remembers.
const MOST_KNOWN: usize = 24;

/// Runs one seed: `steps` things that a guest and its hosts do.
///
/// # Errors
/// What the network did that it may not.
pub fn run(seed: u64, steps: usize) -> Result<(), String> {
    let before = panics();
    let (done, told) = mpsc::channel();
    let thread = std::thread::Builder::new().name("rz-fuzz".into()).spawn(move || {
        let _ = done.send(Fuzz::new(seed).and_then(|fuzz| fuzz.run(steps)));
    });
    let thread = thread.map_err(|error| error.to_string())?;
    let result = match told.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => return Err("it does not come to an end".into()),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err("it has panicked".into()),
    };
    let _ = thread.join();
    if panics() != before {
        return Err("one of its threads has panicked".into());
    }
    result
}

/// A connection as the guest knows it.
#[derive(Clone, Copy)]
struct Known {
    own: SocketAddr,
    remote: SocketAddr,
    next: u32,
    expected: u32,
}

struct Fuzz {
    random: Random,
    nat: Nat,
    inbox: Arc<Inbox>,
    mtu: usize,
    known: VecDeque<Known>,
    /// Where connections to services come out, and those that have.
    services: [UnixStream; 2],
    streams: VecDeque<TcpStream>,
    resolver: UdpSocket,
    ports: [SocketAddr; 2],
    outside: UdpSocket,
}

fn here() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

impl Fuzz {
    fn new(seed: u64) -> Result<Fuzz, String> {
        Fuzz::made(seed).map_err(|error| format!("this host has no sockets left: {error}"))
    }

    fn made(seed: u64) -> std::io::Result<Fuzz> {
        let mut random = Random::new(seed);
        let (resolver, outside) = (UdpSocket::bind(here())?, UdpSocket::bind(here())?);
        resolver.set_nonblocking(true)?;
        outside.set_nonblocking(true)?;
        let (listener, datagrams) = (TcpListener::bind(here())?, UdpSocket::bind(here())?);
        let ports = [listener.local_addr()?, datagrams.local_addr()?];
        let ((first, theirs), (second, theirs6)) = (UnixStream::pair()?, UnixStream::pair()?);
        let service = |address: IpAddr, socket: UnixStream| Service {
            address: SocketAddr::new(address, 80),
            socket: socket.into(),
        };
        let mtu = [1280, 1500, 9000, 65520][random.below(4) as usize];
        let config = Config {
            policy: Policy { rules: Some(Vec::new()), names: true, host_loopback: false },
            resolvers: vec![resolver.local_addr()?],
            has_ipv6: random.below(4) != 0,
            mtu,
            name: "fuzz".into(),
            forwards: vec![super::Forward::Tcp(listener, 80), super::Forward::Udp(datagrams, 53)],
            services: vec![service([169, 254, 169, 254].into(), theirs), service(SERVICE6.into(), theirs6)],
        };
        let nat = Nat::new(config, CARD)?;
        let inbox = Inbox::new(0);
        nat.connect(&inbox);
        let services = [first, second];
        let (known, streams) = (VecDeque::new(), VecDeque::new());
        Ok(Fuzz { random, nat, inbox, mtu: usize::from(mtu), known, services, streams, resolver, ports, outside })
    }

    fn run(mut self, steps: usize) -> Result<(), String> {
        for _ in 0..steps {
            match self.random.below(16) {
                0 => self.flood(),
                1..=3 => self.speak_from_outside(),
                4 | 5 => self.take_in()?,
                6 => self.nat.flush(),
                _ => self.send(),
            }
            if self.random.below(8) == 0 {
                self.audit()?;
            }
        }
        self.audit()?;
        // Whatever came before: the next guest finds a network.
        while self.inbox.take().is_some() {}
        self.send_frame(Frame::plain(discover()));
        let offers = |frame: &Frame| {
            with_ip(frame, |ip, data| Datagram::parse(ip, data).is_some_and(|said| said.target.port() == 68))
        };
        let is_offered = std::iter::from_fn(|| self.inbox.take()).any(|(frame, _)| offers(&frame) == Some(true));
        self.nat.end();
        if !is_offered {
            return Err("it gives nobody an address any more".into());
        }
        let counts = self.nat.shared.state.get().map(|state| state.lock().counts());
        if counts != Some((0, 0, 0)) {
            return Err(format!("connections are left behind its end: {counts:?}"));
        }
        Ok(())
    }

    fn audit(&self) -> Result<(), String> {
        let wrong = self.nat.shared.state.get().and_then(|state| state.lock().audit());
        wrong.map_or(Ok(()), |what| Err(format!("it has lost count: {what}")))
    }

    // ---- what comes out --------------------------------------------------------------------------------------------

    /// Takes some of the frames for the guest, and looks at them as a guest's driver gets them.
    fn take_in(&mut self) -> Result<(), String> {
        for _ in 0..self.random.below(40) {
            let Some((frame, tell)) = self.inbox.take() else { return Ok(()) };
            if tell {
                self.nat.has_room();
            }
            let bits = self.random.number();
            let has = |bit: u64| bits >> bit & 1 != 0;
            let abilities = Abilities { checksum: has(0), tcp4: has(1), tcp6: has(2), udp: has(3) };
            let (mut wrong, begins) = (None, frame.head[..frame.head.len().min(64)].to_vec());
            let most = self.mtu + ETHERNET_BYTES;
            self.learn(frame.clone());
            fit::fit(frame, abilities, |piece| wrong = wrong.or_else(|| judge(piece, abilities, most)));
            if let Some(what) = wrong {
                return Err(format!("the guest got a frame that is none: {what}: {begins:02x?}"));
            }
        }
        Ok(())
    }

    /// Remembers the numbers of a connection.
    fn learn(&mut self, mut frame: Frame) {
        frame.join();
        let heard = with_ip(&frame, |ip, data| {
            let segment = Segment::parse(ip, data).filter(|_| ip.protocol == TCP)?;
            let (own, remote) = (segment.target, segment.source);
            let expected = segment.number.wrapping_add(segment.span());
            Some(Known { own, remote, next: segment.acknowledged, expected })
        });
        let Some(Some(mut heard)) = heard else { return };
        if heard.next == 0 {
            heard.next = self.random.number() as u32;
        }
        self.known.retain(|known| (known.own, known.remote) != (heard.own, heard.remote));
        self.known.push_back(heard);
        if self.known.len() > MOST_KNOWN {
            self.known.pop_front();
        }
    }

    // ---- from the guest --------------------------------------------------------------------------------------------

    fn one_of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.random.below(list.len() as u64) as usize]
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let size = self.random.below(most + 1);
        let start = self.random.number();
        (0..size).map(|at| (start >> (at % 57)) as u8 ^ at as u8).collect()
    }

    fn address(&mut self) -> SocketAddr {
        let ip: IpAddr = match self.random.below(9) {
            0 => GATEWAY.into(),
            1 => GATEWAY6.into(),
            2 | 3 => [169, 254, 169, 254].into(),
            4 => SERVICE6.into(),
            5 => RESOLVER.into(),
            6 => RESOLVER6.into(),
            7 => (self.random.number() as u32).to_be_bytes().into(),
            _ => (u128::from(self.random.number()) << 64 | u128::from(self.random.number())).to_be_bytes().into(),
        };
        let any = self.random.number() as u16;
        let port = self.one_of(&[80, 80, 53, 67, 547, 0, any]);
        SocketAddr::new(ip, port)
    }

    fn own(&mut self, like: SocketAddr) -> SocketAddr {
        let any = self.address().ip();
        let ip = match like {
            like if self.random.below(30) == 0 && any.is_ipv4() == like.is_ipv4() => any,
            SocketAddr::V4(_) => GUEST.into(),
            SocketAddr::V6(_) => GUEST6.into(),
        };
        let any = 1024 + self.random.below(64) as u16;
        SocketAddr::new(ip, self.one_of(&[80, 53, 68, 546, any]))
    }

    fn head(like: SocketAddr) -> Vec<u8> {
        packet::ethernet(CARD, ROUTER, if like.is_ipv4() { IPV4 } else { IPV6 })
    }

    /// A segment of a connection that there is, or of none, with numbers that are right, nearly right, or not at all.
    fn segment(&mut self) -> Frame {
        let which = self.random.below(self.known.len() as u64 + 2) as usize;
        let known = self.known.get(which).copied();
        let known = known.unwrap_or_else(|| {
            let remote = self.address();
            Known { own: self.own(remote), remote, next: self.random.number() as u32, expected: 0 }
        });
        let off = |random: &mut Random| match random.below(8) {
            0 => random.number() as u32,
            1 => random.below(3000) as u32,
            2 => (random.below(3000) as u32).wrapping_neg(),
            _ => 0,
        };
        let flags = match self.random.below(12) {
            0 => self.random.number() as u8,
            1 => SYN,
            2 => RST,
            3 => FIN | ACK,
            4 => SYN | ACK,
            _ if which >= self.known.len() => SYN,
            5..=7 => ACK,
            _ => ACK | PSH,
        };
        let most = self.one_of(&[0, 1, 100, 1460, 60_000]);
        let data = self.bytes(most);
        let say = Say {
            source: known.own,
            target: known.remote,
            number: known.next.wrapping_add(off(&mut self.random)),
            acknowledged: known.expected.wrapping_add(off(&mut self.random)),
            flags,
            window: self.random.number() as u16 >> self.random.below(16),
            maximum: (self.random.below(3) == 0).then(|| self.random.number() as u16),
            scale: Some(self.random.number() as u8).filter(|scale| scale & 1 == 0),
        };
        if let Some(known) = self.known.get_mut(which)
            && say.number == known.next
        {
            known.next = known.next.wrapping_add(data.len() as u32 + u32::from(flags & (SYN | FIN) != 0));
        }
        say.frame(Fuzz::head(known.remote), (!data.is_empty()).then(|| Payload::new(data)), 1 + self.mtu as u16 / 2)
    }

    fn datagram(&mut self) -> Frame {
        let target = self.address();
        let source = self.own(target);
        let most = self.one_of(&[20, 600, 3000, 65_000]);
        let mut data = self.bytes(most);
        if self.random.below(3) == 0 {
            // The beginning of a question for a name, or of an order for an address.
            let whole = discover();
            data.splice(..0, whole[ETHERNET_BYTES + 28..].iter().copied());
            data.truncate(40 + self.random.below(400) as usize);
        }
        data.truncate(65_000);
        udp::datagram(Fuzz::head(target), source, target, &data, self.mtu as u16)
    }

    fn message(&mut self) -> Frame {
        let target = self.address();
        let source = self.own(target);
        let protocol = if target.is_ipv4() { ICMP } else { ICMP6 };
        let mut data = self.bytes(200);
        if let Some(kind) = data.first_mut() {
            *kind = self.one_of(&[8, 128, 133, 135, 136, 3, *kind]);
        }
        let mut head = Fuzz::head(target);
        packet::add_ip(&mut head, source.ip(), target.ip(), protocol, data.len());
        head.extend(data);
        Frame::plain(head)
    }

    fn arp(&mut self) -> Frame {
        let mut head = packet::ethernet(CARD, Mac::BROADCAST, ARP);
        head.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        head.extend(self.bytes(40));
        Frame::plain(head)
    }

    /// A part of a packet of some number, which may fit to others.
    fn fragment(&mut self) -> Frame {
        let target = self.address();
        let source = self.own(target);
        let reach = self.one_of(&[4, 64, 8192]);
        let place = 8 * self.random.below(reach);
        let more = self.random.below(3) != 0;
        let mut data = self.bytes(1400);
        if more && self.random.below(8) != 0 {
            data.truncate(data.len() / 8 * 8);
        }
        let (protocol, number) = (self.one_of(&[TCP, UDP, ICMP]), self.random.below(24) as u8);
        let mut head = Fuzz::head(target);
        if target.is_ipv4() {
            packet::add_ip(&mut head, source.ip(), target.ip(), protocol, data.len());
            head[ETHERNET_BYTES + 5] = number;
            let word = (place / 8) as u16 | if more { packet::MORE_FRAGMENTS } else { 0 };
            head[ETHERNET_BYTES + 6..ETHERNET_BYTES + 8].copy_from_slice(&word.to_be_bytes());
        } else {
            packet::add_ip(&mut head, source.ip(), target.ip(), FRAGMENT, 8 + data.len());
            let [a, b] = (place as u16 | u16::from(more)).to_be_bytes();
            head.extend([protocol, 0, a, b, 0, 0, 0, number]);
        }
        head.extend(data);
        Frame::plain(head)
    }

    /// A packet of IPv6 behind a chain of extension headers that may lead anywhere.
    fn chain(&mut self) -> Frame {
        let target = SocketAddr::new(SERVICE6.into(), 80);
        let mut chain = Vec::new();
        let headers = 1 + self.random.below(8);
        for _ in 0..headers {
            let next = self.one_of(&[0, 43, FRAGMENT, 51, 60, TCP, UDP, ICMP6, 59]);
            chain.extend([next, self.random.below(3) as u8]);
            chain.extend(self.bytes(22));
        }
        let mut head = Fuzz::head(target);
        let first = self.one_of(&[0, 43, FRAGMENT, 51, 60]);
        packet::add_ip(&mut head, GUEST6.into(), target.ip(), first, chain.len());
        head.extend(chain);
        Frame::plain(head)
    }

    fn send(&mut self) {
        let mut frame = match self.random.below(16) {
            0..=7 => self.segment(),
            8..=10 => self.datagram(),
            11 => self.message(),
            12 => self.arp(),
            13 | 14 => self.fragment(),
            _ => self.chain(),
        };
        frame.join();
        let mut header = frame.offload.to_bytes(0, 0);
        let mut bytes = frame.head;
        if self.random.below(6) == 0 {
            for _ in 0..=self.random.below(3) {
                let at = self.random.below(bytes.len().min(80) as u64) as usize;
                bytes[at] = self.random.number() as u8;
            }
        }
        match self.random.below(30) {
            0 => bytes.truncate(self.random.below(bytes.len() as u64 + 1) as usize),
            1 => bytes.extend(self.bytes(40)),
            _ => {}
        }
        // What a header says may be a lie.
        if self.random.below(5) == 0 {
            header[self.random.below(HEADER_BYTES as u64) as usize] = self.random.number() as u8;
        }
        if let Some(frame) = fit::checked(header, bytes) {
            self.send_frame(frame);
        }
        if self.random.below(3) != 0 {
            self.nat.flush();
        }
    }

    fn send_frame(&self, mut frame: Frame) {
        self.nat.send(&mut frame);
    }

    /// Begins many connections that nobody goes on with.
    fn flood(&mut self) {
        let target = self.address();
        for _ in 0..self.random.below(200) {
            let source = SocketAddr::new(self.own(target).ip(), self.random.number() as u16);
            let (number, window) = (self.random.number() as u32, self.random.number() as u16);
            let (maximum, scale) = (Some(1460), Some(7));
            let say = Say { source, target, number, acknowledged: 0, flags: SYN, window, maximum, scale };
            self.send_frame(say.frame(Fuzz::head(target), None, 1460));
        }
    }

    // ---- from beyond -----------------------------------------------------------------------------------------------

    fn speak_from_outside(&mut self) {
        for socket in &self.services {
            let (mut byte, mut files) = ([0; 1], Vec::new());
            while matches!(host::passing::receive(socket.as_fd(), &mut byte, &mut files), Ok(1..)) {}
            self.streams.extend(files.into_iter().map(TcpStream::from));
        }
        if self.random.below(4) == 0
            && let Ok(stream) = TcpStream::connect_timeout(&self.ports[0], Duration::from_secs(5))
        {
            self.streams.push_back(stream);
        }
        while self.streams.len() > MOST_PEERS {
            self.streams.pop_front();
        }
        let most = self.one_of(&[1, 50, 3000, 200_000]);
        let data = self.bytes(most);
        let which = self.random.below(self.streams.len() as u64 + 1) as usize;
        if let Some(stream) = self.streams.get_mut(which) {
            let _ = stream.set_nonblocking(true);
            let mut buffer = [0; 4096];
            match self.random.below(10) {
                0 => _ = self.streams.remove(which),
                1 => _ = stream.shutdown(std::net::Shutdown::Write),
                2 | 3 => while matches!(stream.read(&mut buffer), Ok(1..)) {},
                _ => _ = stream.write(&data),
            }
        }
        let mut buffer = [0; 2048];
        while let Ok((_, peer)) = self.resolver.recv_from(&mut buffer) {
            let data = self.bytes(600);
            let _ = self.resolver.send_to(&data, peer);
        }
        while self.outside.recv_from(&mut buffer).is_ok() {}
        if self.random.below(4) == 0 {
            let _ = self.outside.send_to(&data[..data.len().min(9000)], self.ports[1]);
        }
    }
}

/// A guest's first word, in its frame.
fn discover() -> Vec<u8> {
    let mut message = vec![0; 236];
    message[..3].copy_from_slice(&[1, 1, 6]);
    message.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    let (source, target) = (SocketAddr::from(([0; 4], dhcp::CLIENT_PORT)), ([255; 4], dhcp::SERVER_PORT).into());
    let mut frame = udp::datagram(packet::ethernet(CARD, Mac::BROADCAST, IPV4), source, target, &message, 1500);
    std::mem::take(frame.join())
}

/// What a frame carries, for `what`; `None` for one that carries no IP packet.
fn with_ip<T>(frame: &Frame, what: impl FnOnce(&Ip, &[u8]) -> T) -> Option<T> {
    let mut frame = frame.clone();
    let bytes = &frame.join()[ETHERNET_BYTES..];
    let ip = Ip::parse(bytes, bytes.len())?;
    Some(what(&ip, &bytes[ip.header..ip.header + ip.length]))
}

/// What is wrong with a frame that a guest's driver gets.
fn judge(mut frame: Frame, abilities: Abilities, most: usize) -> Option<&'static str> {
    use crate::network::frame::Cut;
    let is_cut_later = frame.offload.cut != Cut::None;
    if !is_cut_later && frame.len() > most {
        return Some("it is larger than the medium");
    }
    if frame.offload.checksum.is_some() && !abilities.checksum {
        return Some("its checksum is not finished");
    }
    if is_cut_later && fit::parts(&frame).is_none() {
        return Some("it cannot be cut as it says");
    }
    fit::finish_checksum(&mut frame);
    let bytes = frame.join();
    let kind = packet::ether_type(bytes)?;
    if kind == ARP {
        return (bytes.len() != ETHERNET_BYTES + 28).then_some("an ARP packet of another size");
    }
    let bytes = &bytes[ETHERNET_BYTES..];
    let Some(ip) = Ip::parse(bytes, bytes.len()) else { return Some("it is no IP packet") };
    if ip.header + ip.length != bytes.len() || (kind == IPV4) != ip.source.is_ipv4() {
        return Some("its length or its version is another's");
    }
    let data = &bytes[ip.header..];
    let begun = match ip.protocol {
        _ if ip.is_fragment => return None,
        ICMP => crate::network::checksum::Sum::default(),
        protocol => crate::network::checksum::Sum::of_pseudo_header(ip.source, ip.target, protocol, data.len()),
    };
    (begun.plus(data).partial() != [0xff; 2]).then_some("its checksum is wrong")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_guests_nor_hosts_harm_the_network() {
        crate::virtio::testing::watch_panics();
        for seed in 1..=12 {
            assert_eq!(run(seed, 400), Ok(()), "seed {seed}");
        }
    }

    #[test]
    fn a_frame_that_is_none_is_found() {
        let abilities = Abilities { checksum: true, tcp4: true, tcp6: true, udp: true };
        let frame = |bytes: Vec<u8>| judge(Frame::plain(bytes), abilities, 1514);
        let whole = discover();
        assert_eq!(frame(whole.clone()), Some("its checksum is wrong"), "nobody has finished it");
        assert_eq!(frame(whole[..whole.len() - 1].to_vec()), Some("it is no IP packet"));
        let mut long = whole.clone();
        long.extend([0; 4]);
        assert_eq!(frame(long), Some("its length or its version is another's"));
        assert_eq!(frame(vec![8; 1515]), Some("it is larger than the medium"));
    }
}
