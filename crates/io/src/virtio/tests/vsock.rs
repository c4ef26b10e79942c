//! The socket device, from the guest's side and from that of the sockets.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use host::passing;
use x86::Gpa;

use super::transport::{Bench, DEVICE, NOTIFY, bench};
use super::{Driver, LONG, Random, WRITE, wait_until};
use crate::bus::AccessSize::{Qword, Word};
use crate::pci::FunctionState;
use crate::virtio::queue::Place;
use crate::virtio::vsock::{State, Vsock, VsockError};
use crate::virtio::{BackendState, feature};

const CID: u64 = 7;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const HEADER: u32 = 44;
/// Room in a buffer of the driver's, with the header.
const SIZE: u32 = 1024;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A packet, as a guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    host_port: u32,
    guest_port: u32,
    op: u16,
    flags: u32,
    room: u32,
    forwarded: u32,
    data: Vec<u8>,
}

fn packet(guest_port: u32, host_port: u32, op: u16) -> Packet {
    Packet { host_port, guest_port, op, flags: 0, room: 4096, forwarded: 0, data: Vec::new() }
}

struct Guest {
    bench: Bench,
    vsock: Arc<Vsock>,
    queues: Vec<Driver>,
    seen: [u16; 3],
}

fn place(queue: usize) -> Place {
    let base = 0x1_0000 + 0x3000 * queue as u64;
    Place { entries: 8, descriptors: Gpa(base), driver: Gpa(base + 0x1000), device: Gpa(base + 0x2000) }
}

fn buffer(queue: usize, index: u16) -> u64 {
    0x4_0000 + 0x1_0000 * queue as u64 + u64::from(SIZE) * u64::from(index)
}

impl Guest {
    fn new() -> Guest {
        Guest::with(Vsock::new(CID, None).unwrap())
    }

    fn with(vsock: Vsock) -> Guest {
        let vsock = Arc::new(vsock);
        let bench = bench(vsock.clone());
        assert_eq!(bench.get(DEVICE, Qword), CID);
        let mut guest = Guest { bench, vsock, queues: Vec::new(), seen: [0; 3] };
        guest.begin();
        guest
    }

    fn begin(&mut self) {
        for queue in 0..3 {
            self.bench.memory.write(place(queue).driver, &[0; 4]).unwrap();
            self.bench.memory.write(place(queue).device, &[0; 4]).unwrap();
        }
        let places: Vec<Place> = (0..3).map(place).collect();
        self.bench.initialize_queues(feature::VERSION_1 | 1, &places);
        assert_eq!(self.bench.status(), 15);
        self.queues = places.into_iter().map(|place| Driver::at(&self.bench.memory, place)).collect();
        self.seen = [0; 3];
    }

    fn notify(&self, queue: usize) {
        self.bench.set(NOTIFY + 4 * queue as u64, Word, queue as u64);
    }

    fn offer(&mut self, queue: usize, size: u32) {
        let driver = &mut self.queues[queue];
        let index = driver.available % 8;
        driver.descriptor(place(queue).descriptors, index, buffer(queue, index), size, WRITE, 0);
        driver.offer(index);
        self.notify(queue);
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        let driver = &mut self.queues[TRANSMIT];
        let index = driver.available % 8;
        let at = buffer(TRANSMIT, index);
        self.bench.memory.write(Gpa(at), bytes).unwrap();
        driver.descriptor(place(TRANSMIT).descriptors, index, at, bytes.len() as u32, 0, 0);
        driver.offer(index);
        self.notify(TRANSMIT);
    }

    fn send(&mut self, packet: &Packet) {
        self.send_raw(&bytes(packet, CID, 2, 1, packet.data.len() as u32));
        let sent = self.queues[TRANSMIT].available;
        self.queues[TRANSMIT].wait_for_used(sent);
    }

    fn take_raw(&mut self, queue: usize) -> Vec<u8> {
        let seen = self.seen[queue];
        let driver = &self.queues[queue];
        wait_until(|| driver.used_index() != seen);
        let (head, size) = driver.used(u64::from(seen % 8));
        self.seen[queue] = seen.wrapping_add(1);
        let mut bytes = vec![0; size as usize];
        self.bench.memory.read(Gpa(buffer(queue, head as u16)), &mut bytes).unwrap();
        bytes
    }

    /// The next packet from the device.
    fn next(&mut self) -> Packet {
        self.offer(RECEIVE, SIZE);
        let bytes = self.take_raw(RECEIVE);
        let four = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((four(0), four(8), four(28) & 0xffff), (2, CID as u32, 1), "from the host, to this guest, a stream");
        assert_eq!(four(24) as usize, bytes.len() - HEADER as usize);
        Packet {
            host_port: four(16),
            guest_port: four(20),
            op: (four(28) >> 16) as u16,
            flags: four(32),
            room: four(36),
            forwarded: four(40),
            data: bytes[HEADER as usize..].to_vec(),
        }
    }

    /// Nothing comes.
    fn hears_nothing(&mut self) {
        self.offer(RECEIVE, SIZE);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(self.queues[RECEIVE].used_index(), self.seen[RECEIVE]);
    }

    /// A stream from this process to port 1000 of the guest, and the port of ours.
    fn connected(&mut self) -> (UnixStream, u32) {
        let mut far = stream(self.vsock.connect_port(1000).unwrap());
        let request = self.next();
        assert_eq!((request.op, request.guest_port), (REQUEST, 1000));
        self.send(&packet(1000, request.host_port, RESPONSE));
        let expected = format!("OK {}\n", request.host_port);
        assert_eq!(read(&mut far, expected.len()), expected.as_bytes());
        (far, request.host_port)
    }
}

fn bytes(packet: &Packet, source: u64, target: u64, kind: u16, size: u32) -> Vec<u8> {
    let mut bytes = [source.to_le_bytes(), target.to_le_bytes()].concat();
    for word in [packet.guest_port, packet.host_port, size] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(kind.to_le_bytes());
    bytes.extend(packet.op.to_le_bytes());
    for word in [packet.flags, packet.room, packet.forwarded] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(&packet.data);
    bytes
}

fn stream(fd: OwnedFd) -> UnixStream {
    let stream = UnixStream::from(fd);
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

fn read(far: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    far.read_exact(&mut bytes).unwrap();
    bytes
}

fn rest(far: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    far.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Waits for who connects to a listener: the guest's port and the stream.
fn accepted(listener: &UnixStream) -> (u32, UnixStream) {
    let (mut from, mut files) = ([0; 4], Vec::new());
    wait_until(|| passing::receive(listener.as_fd(), &mut from, &mut files).is_ok());
    (u32::from_le_bytes(from), stream(files.pop().unwrap()))
}

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("ringzero-vsock-{name}-{}", std::process::id()))
}

#[test]
fn the_host_reaches_a_program_of_the_guest() {
    let mut guest = Guest::new();
    let (mut far, port) = guest.connected();
    far.write_all(b"to the guest").unwrap();
    let got = guest.next();
    assert_eq!((got.op, got.host_port, got.guest_port, &got.data[..]), (RW, port, 1000, &b"to the guest"[..]));
    guest.send(&Packet { data: b"to the host".into(), forwarded: 12, ..packet(1000, port, RW) });
    assert_eq!(read(&mut far, 11), b"to the host");
    // What was passed on is told with whatever comes next.
    guest.send(&Packet { forwarded: 12, ..packet(1000, port, CREDIT_REQUEST) });
    let credit = guest.next();
    assert_eq!((credit.op, credit.forwarded), (CREDIT_UPDATE, 11));
    assert!(credit.room >= 64 << 10);
    // The guest sends no more, then receives no more: the end, and the reset that it waits for.
    guest.send(&Packet { flags: 2, ..packet(1000, port, SHUTDOWN) });
    assert_eq!(rest(&mut far), b"");
    far.write_all(b"still").unwrap();
    assert_eq!(guest.next().data, b"still");
    guest.send(&Packet { flags: 1, ..packet(1000, port, SHUTDOWN) });
    assert_eq!(guest.next().op, RST);
    guest.hears_nothing();
}

#[test]
fn a_guest_that_refuses_ends_the_stream() {
    let mut guest = Guest::new();
    let mut far = stream(guest.vsock.connect_port(9).unwrap());
    let request = guest.next();
    guest.send(&packet(9, request.host_port, RST));
    assert_eq!(rest(&mut far), b"");
    // One that never answers is let alone by who goes away, and told so.
    let far = guest.vsock.connect_port(10).unwrap();
    let request = guest.next();
    drop(far);
    let reset = guest.next();
    assert_eq!((reset.op, reset.host_port, reset.guest_port), (RST, request.host_port, 10));
}

#[test]
fn who_asks_before_there_is_a_driver_is_heard_when_there_is() {
    let vsock = Arc::new(Vsock::new(CID, None).unwrap());
    let mut far = stream(vsock.connect_port(5).unwrap());
    let bench = bench(vsock.clone());
    let mut guest = Guest { bench, vsock, queues: Vec::new(), seen: [0; 3] };
    guest.begin();
    let request = guest.next();
    assert_eq!((request.op, request.guest_port), (REQUEST, 5));
    // But a driver that has heard and goes takes the connection along.
    guest.begin();
    assert_eq!(rest(&mut far), b"");
    guest.hears_nothing();
}

#[test]
fn a_guest_reaches_who_listens_and_nobody_else() {
    let mut guest = Guest::new();
    guest.send(&packet(2000, 52, REQUEST));
    let refused = guest.next();
    assert_eq!((refused.op, refused.host_port, refused.guest_port), (RST, 52, 2000));

    let listener = UnixStream::from(guest.vsock.listen(52).unwrap());
    assert!(matches!(guest.vsock.listen(52), Err(VsockError::Taken(52))));
    guest.send(&packet(2000, 52, REQUEST));
    assert_eq!(guest.next().op, RESPONSE);
    let (from, mut far) = accepted(&listener);
    assert_eq!(from, 2000);
    guest.send(&Packet { data: b"question".into(), ..packet(2000, 52, RW) });
    assert_eq!(read(&mut far, 8), b"question");
    far.write_all(b"answer").unwrap();
    drop(far);
    assert_eq!(guest.next().data, b"answer");
    let end = guest.next();
    assert_eq!((end.op, end.flags), (SHUTDOWN, 3));
    guest.send(&packet(2000, 52, RST));
    drop(listener);
    guest.send(&packet(2000, 52, REQUEST));
    assert_eq!(guest.next().op, RST, "whose listener is gone");
    assert!(guest.vsock.listen(52).is_ok(), "and leaves its port");
}

#[test]
fn sockets_by_name_are_as_firecrackers() {
    let path = path("name");
    let mut guest = Guest::with(Vsock::new(CID, Some(path.clone())).unwrap());
    assert!(matches!(Vsock::new(CID, Some(path.clone())), Err(VsockError::InUse(_))));
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    // In pieces, and with the first bytes for the guest right behind.
    client.write_all(b"CONN").unwrap();
    std::thread::sleep(Duration::from_millis(10));
    client.write_all(b"ECT 77\nhello").unwrap();
    let request = guest.next();
    assert_eq!((request.op, request.guest_port), (REQUEST, 77));
    guest.send(&packet(77, request.host_port, RESPONSE));
    assert_eq!(guest.next().data, b"hello");
    assert!(read(&mut client, 3).starts_with(b"OK "));
    for nonsense in [&b"CONNECT x\n"[..], b"connect 7\n", b"CONNECT 4294967296\n", &[b'1'; 100]] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        // Who is hung up on while he still talks may find that out at once.
        let _ = client.write_all(nonsense);
        let mut byte = [0];
        assert!(matches!(client.read(&mut byte), Ok(0) | Err(_)), "{nonsense:?}");
    }

    let name = path.with_file_name(format!("{}_9", path.file_name().unwrap().to_str().unwrap()));
    let listener = UnixListener::bind(&name).unwrap();
    guest.send(&packet(3000, 9, REQUEST));
    assert_eq!(guest.next().op, RESPONSE);
    let (mut far, _) = listener.accept().unwrap();
    guest.send(&Packet { data: b"out".into(), ..packet(3000, 9, RW) });
    assert_eq!(read(&mut far, 3), b"out");
    std::fs::remove_file(&name).unwrap();
    guest.bench.host.lock().end();
    assert!(!path.exists(), "the name goes with the machine");
    // One that a killed process has left is replaced.
    drop(UnixListener::bind(&path).unwrap());
    drop(Vsock::new(CID, Some(path)).unwrap());
}

#[test]
fn nobody_sends_more_than_there_is_room_for() {
    let mut guest = Guest::new();
    let (mut far, port) = guest.connected();
    // To the guest: 4096 bytes, until it says that it has read some.
    far.write_all(&[1; 6000]).unwrap();
    let mut got = 0;
    while got < 4096 {
        got += guest.next().data.len();
    }
    assert_eq!(got, 4096);
    guest.hears_nothing();
    guest.send(&Packet { forwarded: 3000, ..packet(1000, port, CREDIT_UPDATE) });
    // The buffer that heard nothing is filled now.
    let mut more = guest.take_raw(RECEIVE).len() - HEADER as usize;
    while more < 1904 {
        more += guest.next().data.len();
    }
    assert_eq!(more, 1904);

    // From the guest: what is not read is held, up to what was promised; then it is told as it is read.
    let chunk = vec![2; 900];
    let mut sent = 0;
    let begin = std::time::Instant::now();
    let rw = Packet { data: chunk, forwarded: 6000, ..packet(1000, port, RW) };
    let room = 256 << 10;
    // The socket's own buffer takes some on top of that.
    while sent + 900 <= room {
        guest.send(&rw);
        sent += 900;
        assert!(begin.elapsed() < LONG);
    }
    let mut read_back = 0;
    while read_back < sent {
        read_back += far.read(&mut vec![0; 65536]).unwrap();
    }
    let mut told = 0;
    while told < sent as u32 - 65536 {
        let update = guest.next();
        assert_eq!(update.op, CREDIT_UPDATE);
        told = update.forwarded;
    }

    // One who sends in spite of it is broken off with.
    let second = guest.connected();
    let rw = Packet { data: vec![3; 900], ..packet(1000, second.1, RW) };
    let mut broken = false;
    for _ in 0..2000 {
        guest.send(&rw);
        guest.offer(RECEIVE, SIZE);
        std::thread::yield_now();
        if guest.queues[RECEIVE].used_index() != guest.seen[RECEIVE] {
            let bytes = guest.take_raw(RECEIVE);
            if u16::from_le_bytes([bytes[30], bytes[31]]) == RST {
                broken = true;
                break;
            }
        }
        // Offered buffers that were not used stay offered.
        if guest.queues[RECEIVE].available.wrapping_sub(guest.queues[RECEIVE].used_index()) > 6 {
            let driver = &mut guest.queues[RECEIVE];
            driver.available = driver.available.wrapping_sub(1);
            driver.set_16(driver.place.driver.add(2), driver.available);
        }
    }
    assert!(broken);
}

#[test]
fn nonsense_is_refused_and_piles_nothing_up() {
    let mut guest = Guest::new();
    guest.send_raw(&[0; 20]);
    let good = packet(1, 2, REQUEST);
    // From somebody else, to somebody else, of another type.
    guest.send_raw(&bytes(&good, CID + 1, 2, 1, 0));
    guest.send_raw(&bytes(&good, CID, 3, 1, 0));
    assert_eq!(guest.next().op, RST);
    guest.send_raw(&bytes(&good, CID, 2, 2, 0));
    assert_eq!(guest.next().op, RST);
    for op in [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 0xffff] {
        guest.send(&packet(1, 2, op));
        assert_eq!(guest.next().op, RST, "op {op} for a connection that is not there");
    }
    guest.send(&packet(1, 2, RST));
    guest.hears_nothing();
    // A request for what is there already, and bytes that are not there.
    let (mut far, port) = guest.connected_after_silence();
    guest.send(&packet(1000, port, REQUEST));
    assert_eq!(guest.next().op, RST);
    assert_eq!(rest(&mut far), b"");
    let (_far, port) = guest.connected();
    guest.send_raw(&bytes(&packet(1000, port, RW), CID, 2, 1, u32::MAX));
    assert_eq!(guest.next().op, RST);
    // Refusals wait for buffers, and the packets that they answer with them.
    for _ in 0..72 {
        let free = |guest: &Guest| {
            let driver = &guest.queues[TRANSMIT];
            driver.available.wrapping_sub(driver.used_index()) < 8
        };
        let begin = std::time::Instant::now();
        while !free(&guest) && begin.elapsed() < Duration::from_millis(50) {
            std::thread::sleep(Duration::from_micros(100));
        }
        guest.send_raw(&bytes(&packet(1, 2, RW), CID, 2, 1, 0));
    }
    std::thread::sleep(Duration::from_millis(20));
    let driver = &guest.queues[TRANSMIT];
    assert_eq!(driver.available.wrapping_sub(driver.used_index()), 8);
    for _ in 0..72 {
        assert_eq!(guest.next().op, RST);
    }
    guest.hears_nothing();
}

impl Guest {
    /// [`Guest::connected`], when a buffer is on offer already.
    fn connected_after_silence(&mut self) -> (UnixStream, u32) {
        let mut far = stream(self.vsock.connect_port(1000).unwrap());
        let bytes = self.take_raw(RECEIVE);
        let port = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
        self.send(&packet(1000, port, RESPONSE));
        assert!(read(&mut far, format!("OK {port}\n").len()).starts_with(b"OK "));
        (far, port)
    }
}

#[test]
fn connections_are_bounded_and_those_of_the_dead_make_room() {
    let mut guest = Guest::new();
    let mut far = Vec::new();
    let full = loop {
        match guest.vsock.connect_port(1) {
            Ok(fd) => far.push(fd),
            Err(error) => break error,
        }
    };
    assert!(matches!(full, VsockError::Full), "after {}", far.len());
    let listener = guest.vsock.listen(4).unwrap();
    guest.send(&packet(2, 4, REQUEST));
    let mut ops: Vec<u16> = (0..far.len() + 1).map(|_| guest.next().op).collect();
    ops.sort_unstable();
    assert_eq!((ops.iter().filter(|op| **op == REQUEST).count(), ops.last()), (far.len(), Some(&RST)));
    far.clear();
    // The resets of those that nobody wants any more, and then there is room.
    wait_until(|| {
        guest.vsock.connect_port(1).is_ok() || {
            guest.offer(RECEIVE, SIZE);
            guest.take_raw(RECEIVE);
            false
        }
    });
    drop(listener);
}

#[test]
fn a_saved_guest_hears_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let (_far, _) = guest.connected();
    let saved = guest.bench.host.lock().state();
    let FunctionState::Virtio(device) = &saved.cards[1].function else { panic!("a virtio device") };
    assert_eq!(device.backend, BackendState::Vsock(State { guest_cid: CID, has_moved: false }));

    let mut second = Guest::new();
    let mut page = vec![0; super::RAM as usize];
    guest.bench.memory.read(Gpa(0), &mut page).unwrap();
    second.bench.memory.write(Gpa(0), &page).unwrap();
    second.bench.host.lock().restore(&saved);
    second.seen = guest.seen;
    for (driver, old) in second.queues.iter_mut().zip(&guest.queues) {
        driver.available = old.available;
    }
    let again = second.bench.host.lock().state();
    let FunctionState::Virtio(device) = &again.cards[1].function else { panic!("a virtio device") };
    assert_eq!(device.backend, BackendState::Vsock(State { guest_cid: CID, has_moved: true }));
    second.offer(EVENT, SIZE);
    assert_eq!(second.take_raw(EVENT), [0; 4]);
    // And new ones are made.
    let (mut far, port) = second.connected();
    second.send(&Packet { data: b"on".into(), ..packet(1000, port, RW) });
    assert_eq!(read(&mut far, 2), b"on");
}

#[test]
fn a_guest_that_sends_anything_at_all_harms_nobody() {
    let mut random = Random(0x7d0c_91b3);
    let mut guest = Guest::new();
    let listener = UnixStream::from(guest.vsock.listen(2).unwrap());
    let mut kept = Vec::new();
    for round in 0..3000 {
        let op = if random.below(3) == 0 { random.next() as u16 } else { random.below(9) as u16 };
        let packet = Packet {
            host_port: random.below(4) as u32,
            guest_port: random.below(4) as u32,
            op,
            flags: random.next() as u32 & 3,
            room: random.next() as u32,
            forwarded: random.next() as u32,
            data: vec![round as u8; random.below(900) as usize],
        };
        let size = if random.below(4) == 0 { random.next() as u32 } else { packet.data.len() as u32 };
        let begin = std::time::Instant::now();
        while {
            let driver = &guest.queues[TRANSMIT];
            driver.available.wrapping_sub(driver.used_index()) >= 8
        } {
            guest.offer(RECEIVE, SIZE);
            guest.take_raw(RECEIVE);
            assert!(begin.elapsed() < LONG);
        }
        guest.send_raw(&bytes(&packet, CID, 2, 1, size));
        let (mut from, mut files) = ([0; 4], Vec::new());
        if passing::receive(listener.as_fd(), &mut from, &mut files).is_ok() {
            kept.extend(files.into_iter().map(stream));
        }
        if random.below(10) == 0 {
            kept.truncate(2);
            for far in &kept {
                far.set_nonblocking(true).unwrap();
                let mut far = far;
                let _ = far.write(b"something");
            }
        }
    }
    assert_eq!(guest.bench.status() & 64, 0, "what is nonsense breaks no device");
}

#[test]
fn addresses_are_those_of_guests() {
    for cid in [0, 1, 2, 0xffff_ffff, 1 << 32] {
        assert!(matches!(Vsock::new(cid, None), Err(VsockError::Cid(_))), "{cid}");
    }
    assert!(matches!(Vsock::new(3, Some("/does/not/exist".into())), Err(VsockError::Path { .. })));
}
