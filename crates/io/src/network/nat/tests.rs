//! The network, from the guest's side: frames in, frames out.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::config::{GATEWAY, GUEST, Policy, RESOLVER, Service};
use super::segment::{ACK, FIN, PSH, RST, SYN, Say, Segment};
use super::*;
use crate::network::frame::{Cut, ETHERNET_BYTES, Payload};
use crate::network::packet::{ARP, Datagram, ICMP, Ip, TCP, UDP};

const CARD: Mac = Mac([2, 0, 0, 0, 0, 9]);
const LONG: Duration = Duration::from_secs(30);

struct Guest {
    nat: Nat,
    inbox: Arc<Inbox>,
}

fn config() -> Config {
    Config {
        policy: Policy { rules: Some(Vec::new()), names: true, host_loopback: true },
        resolvers: Vec::new(),
        has_ipv6: true,
        mtu: 1500,
        name: "test".into(),
        forwards: Vec::new(),
        services: Vec::new(),
    }
}

fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

impl Guest {
    fn new(config: Config) -> Guest {
        let nat = Nat::new(config, CARD).unwrap();
        let inbox = Inbox::new(0);
        nat.connect(&inbox);
        Guest { nat, inbox }
    }

    fn send_frame(&self, mut frame: Frame) {
        frame.join();
        self.nat.send(&mut frame);
        self.nat.flush();
    }

    fn ethernet(kind: u16) -> Vec<u8> {
        packet::ethernet(CARD, ROUTER, kind)
    }

    fn say(&self, say: Say, data: &[u8]) {
        let payload = (!data.is_empty()).then(|| Payload::new(data.to_vec()));
        self.send_frame(say.frame(Guest::ethernet(IPV4), payload, 65000));
    }

    fn send_datagram(&self, source: SocketAddr, target: SocketAddr, data: &[u8]) {
        self.send_frame(udp::datagram(Guest::ethernet(IPV4), source, target, data, 65535));
    }

    /// The next frame, which comes at last.
    fn receive(&self) -> Frame {
        let begin = Instant::now();
        loop {
            if let Some((mut frame, tell)) = self.inbox.take() {
                if tell {
                    self.nat.has_room();
                }
                frame.join();
                assert_eq!(frame.target(), Some(CARD));
                return frame;
            }
            assert!(begin.elapsed() < LONG, "nothing came");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn counts(&self) -> (usize, usize, usize) {
        self.nat.shared.state.get().unwrap().lock().counts()
    }
}

/// What a frame says as a TCP segment.
fn with_segment<T>(frame: &Frame, what: impl FnOnce(&Segment<'_>) -> T) -> T {
    let bytes = &frame.head[ETHERNET_BYTES..];
    let ip = Ip::parse(bytes, bytes.len()).unwrap();
    assert_eq!(ip.protocol, TCP);
    what(&Segment::parse(&ip, &bytes[ip.header..]).unwrap())
}

/// A connection, from the guest's side.
struct Connection<'a> {
    guest: &'a Guest,
    own: SocketAddr,
    remote: SocketAddr,
    next: u32,
    expected: u32,
}

impl<'a> Connection<'a> {
    fn begin(guest: &'a Guest, port: u16, remote: SocketAddr) -> Connection<'a> {
        let mut connection = Connection { guest, own: at(GUEST, port), remote, next: 1000, expected: 0 };
        connection.say(SYN, &[]);
        connection.next += 1;
        connection
    }

    fn open(guest: &'a Guest, port: u16, remote: SocketAddr) -> Connection<'a> {
        let mut connection = Connection::begin(guest, port, remote);
        let number = with_segment(&guest.receive(), |segment| {
            assert!(segment.has(SYN | ACK) && segment.acknowledged == 1001, "{segment:?}");
            assert_eq!((segment.maximum, segment.scale), (1460, Some(7)));
            segment.number
        });
        connection.expected = number.wrapping_add(1);
        connection.say(ACK, &[]);
        connection
    }

    fn say(&self, flags: u8, data: &[u8]) {
        let is_syn = flags & SYN != 0;
        let say = Say {
            source: self.own,
            target: self.remote,
            number: self.next,
            acknowledged: self.expected,
            flags,
            window: 0x1000,
            maximum: is_syn.then_some(1460),
            scale: Some(4),
        };
        self.guest.say(say, data);
    }

    fn send(&mut self, data: &[u8]) {
        self.say(ACK | PSH, data);
        self.next = self.next.wrapping_add(data.len() as u32);
    }

    /// Takes what comes until there are so many bytes, and acknowledges it.
    fn take(&mut self, count: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        while taken.len() < count {
            let frame = self.guest.receive();
            with_segment(&frame, |segment| {
                if !segment.data.is_empty() && segment.number == self.expected {
                    assert_eq!(frame.offload.cut == Cut::Tcp4, segment.data.len() > 1460);
                    taken.extend(segment.data);
                    self.expected = self.expected.wrapping_add(segment.data.len() as u32);
                    self.say(ACK, &[]);
                }
            });
        }
        taken
    }

    /// Waits for a segment with these flags.
    fn wait_for(&self, flags: u8) {
        while !with_segment(&self.guest.receive(), |segment| segment.has(flags)) {}
    }
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, at(GATEWAY, port))
}

fn read(mut stream: &TcpStream, count: usize) -> Vec<u8> {
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_connection_carries_bytes_both_ways_and_ends_in_order() {
    let guest = Guest::new(config());
    let (listener, remote) = listener();
    let mut connection = Connection::open(&guest, 4000, remote);
    let (mut peer, _) = listener.accept().unwrap();
    connection.send(b"hello");
    assert_eq!(read(&peer, 5), b"hello");
    // More than a window, which is 64 KiB here.
    let data: Vec<u8> = (0..1_000_000_u32).map(|number| ((number * 7) >> 3) as u8).collect();
    let sent = data.clone();
    let sender = std::thread::spawn(move || {
        peer.write_all(&sent).unwrap();
        peer
    });
    assert!(connection.take(data.len()) == data);
    let mut peer = sender.join().unwrap();
    for piece in data.chunks(50_000) {
        connection.send(piece);
    }
    assert!(read(&peer, data.len()) == data);
    connection.say(FIN | ACK, &[]);
    connection.next += 1;
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    peer.write_all(b"bye").unwrap();
    assert_eq!(connection.take(3), b"bye");
    drop(peer);
    connection.wait_for(FIN | ACK);
    connection.expected = connection.expected.wrapping_add(1);
    connection.say(ACK, &[]);
    assert_eq!(guest.counts(), (0, 0, 0));
    // Nobody knows it any more.
    connection.say(ACK, b"more");
    connection.wait_for(RST);
}

#[test]
fn what_a_guest_loses_is_sent_again_and_what_it_repeats_counts_once() {
    let guest = Guest::new(config());
    let (listener, remote) = listener();
    let mut connection = Connection::open(&guest, 4000, remote);
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(b"twice").unwrap();
    connection.wait_for(PSH);
    assert_eq!(connection.take(5), b"twice");
    // Data from before, from behind a gap, and both at once with something new.
    connection.send(b"abc");
    connection.next -= 3;
    connection.send(b"abcdef");
    connection.next += 100;
    connection.say(ACK | PSH, b"gap");
    connection.next -= 100;
    connection.send(b"ghi");
    assert_eq!(read(&peer, 9), b"abcdefghi");
    // Three times the same: the first that is missing is sent at once.
    peer.write_all(b"again").unwrap();
    connection.wait_for(PSH);
    for _ in 0..3 {
        connection.say(ACK, &[]);
    }
    assert_eq!(connection.take(5), b"again");
}

#[test]
fn a_host_that_does_not_read_closes_the_window() {
    let guest = Guest::new(config());
    let (listener, remote) = listener();
    let mut connection = Connection::open(&guest, 4000, remote);
    let (mut peer, _) = listener.accept().unwrap();
    let piece = vec![7; 60_000];
    let mut sent = 0_usize;
    // The kernel's own buffers are filled first.
    loop {
        connection.send(&piece);
        let mut last = None;
        while last.is_none_or(|(acknowledged, _)| acknowledged != connection.next) {
            last = Some(with_segment(&guest.receive(), |segment| (segment.acknowledged, segment.window)));
            if last.unwrap().1 < 1000 {
                break;
            }
        }
        let (acknowledged, window) = last.unwrap();
        sent += piece.len() - connection.next.wrapping_sub(acknowledged) as usize;
        connection.next = acknowledged;
        if usize::from(window) << 7 < piece.len() {
            break;
        }
        assert!(sent < 64 << 20, "no end to what it takes");
    }
    peer.set_read_timeout(Some(LONG)).unwrap();
    let mut got = 0;
    let mut buffer = vec![0; 1 << 20];
    while got < sent {
        got += peer.read(&mut buffer).unwrap();
    }
    assert_eq!(got, sent);
    connection.send(b"x");
    assert_eq!(read(&peer, 1), b"x");
}

#[test]
fn broken_connections_are_broken_on_both_sides() {
    let guest = Guest::new(config());
    let (listener, remote) = listener();
    let connection = Connection::open(&guest, 4000, remote);
    let (mut peer, _) = listener.accept().unwrap();
    // One that does not belong here ends nothing.
    let mut forged = Connection { next: connection.next + 5, ..connection };
    forged.say(RST, &[]);
    assert_eq!(guest.counts().0, 1);
    forged.next -= 5;
    forged.say(RST, &[]);
    assert_eq!(guest.counts(), (0, 0, 0));
    assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    drop(listener);
    Connection::begin(&guest, 4001, remote).wait_for(RST | ACK);
    // What the policy forbids is as if nobody were there.
    Connection::begin(&guest, 4002, at([192, 0, 2, 1], 80)).wait_for(RST | ACK);
    Connection::begin(&guest, 4003, at([127, 0, 0, 1], remote.port())).wait_for(RST | ACK);
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn ports_of_the_host_lead_to_the_guest() {
    let (listener, datagrams) = (TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let (outside, outside_udp) = (listener.local_addr().unwrap(), datagrams.local_addr().unwrap());
    let forwards = vec![Forward::Tcp(listener, 80), Forward::Udp(datagrams, 53)];
    let guest = Guest::new(Config { forwards, ..config() });
    let mut peer = TcpStream::connect(outside).unwrap();
    let (number, remote) = with_segment(&guest.receive(), |segment| {
        assert!(segment.has(SYN) && !segment.has(ACK) && segment.target == at(GUEST, 80));
        (segment.number, segment.source)
    });
    assert_eq!(remote, at(GATEWAY, peer.local_addr().unwrap().port()));
    let mut connection =
        Connection { guest: &guest, own: at(GUEST, 80), remote, next: 5, expected: number.wrapping_add(1) };
    connection.say(SYN | ACK, &[]);
    connection.next += 1;
    peer.write_all(b"request").unwrap();
    assert_eq!(connection.take(7), b"request");
    connection.send(b"answer");
    assert_eq!(read(&peer, 6), b"answer");
    drop(peer);

    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(LONG)).unwrap();
    peer.send_to(b"question", outside_udp).unwrap();
    let own = at(GUEST, 53);
    let remote = loop {
        let frame = guest.receive();
        let bytes = &frame.head[ETHERNET_BYTES..];
        let ip = Ip::parse(bytes, bytes.len()).unwrap();
        if ip.protocol == UDP {
            let datagram = Datagram::parse(&ip, &bytes[ip.header..]).unwrap();
            assert_eq!((datagram.target, datagram.data), (own, &b"question"[..]));
            break datagram.source;
        }
    };
    guest.send_datagram(own, remote, b"reply");
    let mut buffer = [0; 16];
    assert_eq!(peer.recv_from(&mut buffer).unwrap(), (5, outside_udp));
    // When the machine has ended, the ports are free.
    guest.nat.end();
    TcpListener::bind(outside).unwrap();
}

#[test]
fn datagrams_go_out_and_their_answers_come_back() {
    let guest = Guest::new(config());
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(LONG)).unwrap();
    let (own, remote) = (at(GUEST, 5000), at(GATEWAY, peer.local_addr().unwrap().port()));
    let mut buffer = vec![0; 65535];
    for size in [0, 1, 1472, 1473, 9000, 60_000] {
        let data: Vec<u8> = (0..size).map(|number| number as u8).collect();
        guest.send_datagram(own, remote, &data);
        let (count, from) = peer.recv_from(&mut buffer).unwrap();
        assert!(buffer[..count] == data);
        peer.send_to(&data, from).unwrap();
        let frame = guest.receive();
        assert_eq!(frame.offload.cut == Cut::Udp, size > 1472);
        let bytes = &frame.head[ETHERNET_BYTES..];
        let ip = Ip::parse(bytes, bytes.len()).unwrap();
        let datagram = Datagram::parse(&ip, &bytes[ip.header..]).unwrap();
        assert_eq!((datagram.source, datagram.target), (remote, own));
        assert!(datagram.data == data);
    }
    assert_eq!(guest.counts().1, 1);
    // Nobody there: the guest is told.
    drop(peer);
    guest.send_datagram(own, remote, b"?");
    let frame = guest.receive();
    let bytes = &frame.head[ETHERNET_BYTES..];
    assert_eq!((Ip::parse(bytes, bytes.len()).unwrap().protocol, bytes[20], bytes[21]), (ICMP, 3, 3));
    guest.send_datagram(own, at([192, 0, 2, 1], 9), b"?");
    assert_eq!(guest.receive().head[ETHERNET_BYTES + 20..][..2], [3, 13]);
}

#[test]
fn fragments_are_put_together() {
    let guest = Guest::new(config());
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(LONG)).unwrap();
    let remote = at(GATEWAY, peer.local_addr().unwrap().port());
    let data: Vec<u8> = (0..4000).map(|number| number as u8).collect();
    let mut whole = udp::datagram(Guest::ethernet(IPV4), at(GUEST, 5000), remote, &data, 1500);
    assert_eq!(whole.offload.cut, Cut::Udp);
    whole.join();
    crate::network::fit::fit(whole, crate::network::fit::Abilities::default(), |piece| guest.send_frame(piece));
    let mut buffer = vec![0; 5000];
    assert_eq!(peer.recv(&mut buffer).unwrap(), 4000);
    assert!(buffer[..4000] == data);
}

#[test]
fn the_gateway_is_found_answers_and_gives_an_address() {
    let guest = Guest::new(config());
    for (asked, answers) in [(GATEWAY, true), (RESOLVER, true), (GUEST, false), ([10, 0, 2, 99].into(), false)] {
        let mut request = Guest::ethernet(ARP);
        request.extend([0, 1, 8, 0, 6, 4, 0, 1]);
        request.extend(CARD.0);
        request.extend(GUEST.octets());
        request.extend([0; 6]);
        request.extend(asked.octets());
        guest.send_frame(Frame::plain(request));
        if answers {
            let reply = guest.receive();
            assert_eq!(reply.head[ETHERNET_BYTES..][..8], [0, 1, 8, 0, 6, 4, 0, 2]);
            assert_eq!(reply.head[ETHERNET_BYTES + 8..][..6], ROUTER.0);
            assert_eq!(reply.head[ETHERNET_BYTES + 14..][..4], asked.octets());
        }
        assert!(guest.inbox.is_empty());
    }
    let mut echo = Guest::ethernet(IPV4);
    packet::add_ip(&mut echo, GUEST.into(), GATEWAY.into(), ICMP, 12);
    echo.extend([8, 0, 0, 0, 1, 2, 0, 1]);
    echo.extend(b"ping");
    guest.send_frame(Frame::plain(echo));
    let answer = guest.receive();
    let message = &answer.head[ETHERNET_BYTES + 20..];
    assert_eq!((message[0], &message[4..]), (0, &b"\x01\x02\x00\x01ping"[..]));
    assert_eq!(crate::network::checksum::Sum::default().plus(message).partial(), [0xff; 2]);
}

#[test]
fn connections_to_a_service_are_given_away() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let address = at([169, 254, 169, 254], 80);
    let services = vec![Service { address, socket: theirs.into() }];
    let guest = Guest::new(Config { services, ..config() });
    let mut connection = Connection::open(&guest, 4000, address);
    let (mut byte, mut files) = ([0; 1], Vec::new());
    assert_eq!(host::passing::receive(ours.as_fd(), &mut byte, &mut files).unwrap(), 1);
    let stream = TcpStream::from(files.pop().unwrap());
    connection.send(b"GET /");
    assert_eq!(read(&stream, 5), b"GET /");
    (&stream).write_all(b"data").unwrap();
    assert_eq!(connection.take(4), b"data");
    Connection::begin(&guest, 4001, at([169, 254, 169, 254], 81)).wait_for(RST | ACK);
}

#[test]
fn a_service_that_takes_no_connections_keeps_nobody_waiting() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // What it does not take fills its socket: from then on it is as if nobody were there.
    theirs.set_nonblocking(true).unwrap();
    while (&theirs).write(&[0; 4096]).is_ok() {}
    theirs.set_nonblocking(false).unwrap();
    let address = at([169, 254, 169, 254], 80);
    let guest = Guest::new(Config { services: vec![Service { address, socket: theirs.into() }], ..config() });
    Connection::begin(&guest, 4000, address).wait_for(RST | ACK);
    drop(ours);
    Connection::begin(&guest, 4001, address).wait_for(RST | ACK);
}

#[test]
fn floods_find_bounded_tables() {
    let guest = Guest::new(config());
    let (_listener, remote) = listener();
    for port in 1..2000 {
        let _ = Connection::begin(&guest, port, remote);
        guest.send_datagram(at(GUEST, port), remote, b"flood");
        let (tcp, udp, names) = guest.counts();
        assert!(tcp <= 16 && udp <= 16 && names == tcp + udp, "{tcp} {udp} {names}");
    }
    // From addresses that are not the guest's.
    let before = guest.counts();
    for source in [at([8, 8, 8, 8], 1), at(GATEWAY, 1), at([127, 0, 0, 1], 1), at([10, 0, 2, 255], 1)] {
        guest.send_datagram(source, remote, b"?");
    }
    assert_eq!(guest.counts(), before);
}

#[test]
fn no_frame_does_harm() {
    // Nothing can be reached, so that no frame finds its way to the host.
    let policy = Policy { rules: Some(Vec::new()), names: true, host_loopback: false };
    let guest = Guest::new(Config { policy, ..config() });
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let say = Say {
        source: at(GUEST, 4000),
        target: at([192, 0, 2, 1], 80),
        number: 1,
        acknowledged: 2,
        flags: SYN,
        window: 100,
        maximum: Some(1460),
        scale: Some(7),
    };
    let mut seeds = vec![say.frame(Guest::ethernet(IPV4), Some(Payload::new(vec![1; 100])), 65000)];
    seeds.push(udp::datagram(Guest::ethernet(IPV4), at(GUEST, 68), at([255; 4], 67), &[1; 300], 1500));
    seeds.push(udp::datagram(
        Guest::ethernet(IPV4),
        at(GUEST, 68),
        at(RESOLVER, 53),
        b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x04host",
        1500,
    ));
    let mut arp = Guest::ethernet(ARP);
    arp.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend([0; 20]);
    seeds.push(Frame::plain(arp));
    let mut solicitation = Guest::ethernet(IPV6);
    packet::add_ip(&mut solicitation, "fe80::9".parse().unwrap(), "ff02::2".parse().unwrap(), packet::ICMP6, 24);
    solicitation.extend([135; 24]);
    seeds.push(Frame::plain(solicitation));
    for frame in &mut seeds {
        frame.join();
    }
    for _ in 0..200_000 {
        let mut frame = seeds[next() as usize % seeds.len()].clone();
        for _ in 0..next() % 8 {
            let at = next() as usize % frame.head.len();
            frame.head[at] = next() as u8;
        }
        if next() % 4 == 0 {
            frame.head.truncate(next() as usize % (frame.head.len() + 1));
        }
        if next() % 4 == 0 {
            let bytes: [u8; 16] = std::array::from_fn(|_| next() as u8);
            let header = *bytes.first_chunk().unwrap();
            frame.offload = crate::network::frame::Offload::parse(header, frame.head.len()).unwrap_or_default();
        }
        if frame.head.len() >= ETHERNET_BYTES {
            guest.nat.send(&mut frame);
        }
        while guest.inbox.take().is_some() {}
    }
    guest.nat.flush();
    assert_eq!(guest.counts().0, 0);
}

#[test]
fn a_peer_that_speaks_in_single_bytes_is_waited_for() {
    let guest = Guest::new(config());
    let (listener, remote) = listener();
    let mut connection = Connection::open(&guest, 4000, remote);
    let (mut peer, _) = listener.accept().unwrap();
    peer.set_nodelay(true).unwrap();
    // Nothing is acknowledged, though the window would let much more come.
    for number in 0..700_u32 {
        peer.write_all(&[number as u8]).unwrap();
        let begin = Instant::now();
        while number < 500 && begin.elapsed() < LONG {
            let next = connection.expected.wrapping_add(number);
            let is_here = with_segment(&guest.receive(), |segment| segment.number == next && segment.data.len() == 1);
            if is_here {
                break;
            }
        }
        std::thread::sleep(Duration::from_micros(if number < 500 { 0 } else { 50 }));
    }
    assert_eq!(guest.nat.shared.state.get().unwrap().lock().audit(), None);
    let expected: Vec<u8> = (500..700_u32).map(|number| number as u8).collect();
    connection.expected = connection.expected.wrapping_add(500);
    connection.say(ACK, &[]);
    assert_eq!(connection.take(200), expected);
}

#[test]
fn who_fills_the_guests_ports_keeps_it_from_none_of_its_own() {
    let (forwarded, remote) = (TcpListener::bind("127.0.0.1:0").unwrap(), listener());
    let outside = forwarded.local_addr().unwrap();
    let guest = Guest::new(Config { forwards: vec![Forward::Tcp(forwarded, 80)], ..config() });
    // The guest answers none of these: the newest are kept.
    let callers: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(outside).unwrap()).collect();
    let begin = Instant::now();
    let is_over = |peer: &TcpStream| {
        peer.set_nonblocking(true).unwrap();
        // The error is told once; from then on it is just over.
        !peer.peek(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    };
    while callers.iter().filter(|peer| is_over(peer)).count() != 28 {
        assert!(begin.elapsed() < LONG, "{:?}", guest.counts());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(guest.counts().0, 12);
    while guest.inbox.take().is_some() {}
    let (listener, remote) = remote;
    let _first = Connection::open(&guest, 4000, remote);
    let _ = listener.accept().unwrap();
    assert_eq!(guest.counts().0, 13);
    assert!(guest.nat.shared.state.get().unwrap().lock().audit().is_none());
}

#[test]
fn a_guest_may_ask_for_the_name_server_over_ipv6() {
    let guest = Guest::new(config());
    let own: std::net::Ipv6Addr = "fe80::15".parse().unwrap();
    let all: std::net::Ipv6Addr = "ff02::1:2".parse().unwrap();
    let ask = |from: SocketAddr, to: SocketAddr, question: &[u8]| {
        guest.send_frame(udp::datagram(Guest::ethernet(packet::IPV6), from, to, question, 1500));
    };
    ask(at(own, 546), at(all, 547), &[11, 1, 2, 3]);
    let frame = guest.receive();
    let bytes = &frame.head[ETHERNET_BYTES..];
    let ip = Ip::parse(bytes, bytes.len()).unwrap();
    let said = Datagram::parse(&ip, &bytes[ip.header..]).unwrap();
    assert_eq!((said.target, said.data[..4].to_vec()), (at(own, 546), vec![7, 1, 2, 3]));
    assert!(said.data.ends_with(&super::config::RESOLVER6.octets()));
    // From elsewhere, and a question of IPv4's over IPv6: no answer, and no frame that is none.
    ask(at("2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap(), 546), at(all, 547), &[11, 1, 2, 3]);
    ask(at(own, 68), at(all, 67), &[1; 300]);
    assert!(guest.inbox.is_empty());
}

#[test]
fn a_guest_that_takes_nothing_is_noted_once() {
    let guest = Guest::new(config());
    let (listener, remote) = listener();
    let connection = Connection::open(&guest, 4000, remote);
    let (mut peer, _) = listener.accept().unwrap();
    let mut echo = Guest::ethernet(IPV4);
    packet::add_ip(&mut echo, GUEST.into(), GATEWAY.into(), ICMP, 60_000);
    echo.extend([8, 0, 0, 0, 1, 2, 0, 1]);
    echo.resize(ETHERNET_BYTES + 20 + 60_000, 0);
    while guest.inbox.has_room() {
        guest.send_frame(Frame::plain(echo.clone()));
    }
    peer.write_all(b"words").unwrap();
    for _ in 0..200 {
        connection.say(ACK, &[]);
        std::thread::sleep(Duration::from_micros(100));
    }
    assert_eq!(guest.nat.shared.state.get().unwrap().lock().audit(), None);
    while guest.receive().head[ETHERNET_BYTES + 9] != TCP {}
}
