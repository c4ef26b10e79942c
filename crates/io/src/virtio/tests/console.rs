//! The console, from the guest's side and from that of the sockets.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use host::events;
use std::os::fd::AsFd;
use x86::Gpa;

use super::transport::{Bench, DEVICE, NOTIFY, bench};
use super::{Driver, LONG, WRITE, wait_until};
use crate::bus::AccessSize::{Dword, Word};
use crate::pci::FunctionState;
use crate::virtio::console::{Console, ConsoleError, PortKind};
use crate::virtio::queue::Place;
use crate::virtio::{BackendState, feature};

const MULTIPORT: u64 = 1 << 1;
const FEATURES: u64 = feature::VERSION_1 | MULTIPORT | 1;
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;
/// Of port 1.
const RECEIVE: usize = 4;
const TRANSMIT: usize = 5;
const SIZE: u32 = 256;

/// A driver of a console with port 0 for a terminal and port 1 with a name.
struct Guest {
    bench: Bench,
    console: Arc<Console>,
    queues: Vec<Driver>,
    /// Used entries of each queue that were looked at.
    seen: Vec<u16>,
}

fn place(queue: usize) -> Place {
    let base = 0x1_0000 + 0x3000 * queue as u64;
    Place { entries: 8, descriptors: Gpa(base), driver: Gpa(base + 0x1000), device: Gpa(base + 0x2000) }
}

/// Where the buffer behind a descriptor of a queue is.
fn buffer(queue: usize, index: u16) -> u64 {
    0x4_0000 + 0x1000 * queue as u64 + u64::from(SIZE) * u64::from(index)
}

fn ports() -> Vec<PortKind> {
    vec![PortKind::Console, PortKind::Named("org.example.talk".into())]
}

impl Guest {
    fn new() -> Guest {
        let console = Arc::new(Console::new(ports()).unwrap());
        let mut guest = Guest { bench: bench(console.clone()), console, queues: Vec::new(), seen: Vec::new() };
        guest.begin(FEATURES);
        guest
    }

    fn begin(&mut self, features: u64) {
        for queue in 0..6 {
            self.bench.memory.write(place(queue).driver, &[0; 4]).unwrap();
            self.bench.memory.write(place(queue).device, &[0; 4]).unwrap();
        }
        let places: Vec<Place> = (0..6).map(place).collect();
        self.bench.initialize_queues(features, &places);
        assert_eq!(self.bench.status(), 15);
        self.queues = places.into_iter().map(|place| Driver::at(&self.bench.memory, place)).collect();
        self.seen = vec![0; 6];
    }

    fn notify(&self, queue: usize) {
        self.bench.set(NOTIFY + 4 * queue as u64, Word, queue as u64);
    }

    /// Gives the device a buffer to fill.
    fn offer(&mut self, queue: usize) {
        let driver = &mut self.queues[queue];
        let index = driver.available % 8;
        driver.descriptor(place(queue).descriptors, index, buffer(queue, index), SIZE, WRITE, 0);
        driver.offer(index);
        self.notify(queue);
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let driver = &mut self.queues[queue];
        let index = driver.available % 8;
        self.bench.memory.write(Gpa(buffer(queue, index)), bytes).unwrap();
        driver.descriptor(place(queue).descriptors, index, buffer(queue, index), bytes.len() as u32, 0, 0);
        driver.offer(index);
        self.notify(queue);
    }

    /// Waits for the next buffer that comes back, and gives what is in it.
    fn take(&mut self, queue: usize) -> Vec<u8> {
        let seen = self.seen[queue];
        let driver = &self.queues[queue];
        wait_until(|| driver.used_index() != seen);
        let (head, size) = driver.used(u64::from(seen % 8));
        self.seen[queue] += 1;
        let mut bytes = vec![0; size as usize];
        self.bench.memory.read(Gpa(buffer(queue, head as u16)), &mut bytes).unwrap();
        bytes
    }

    fn control(&mut self, port: u32, event: u16, value: u16) {
        let message = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.send(CONTROL_TRANSMIT, &message);
        self.take(CONTROL_TRANSMIT);
    }

    /// The next message: port, event, value, and what follows.
    fn message(&mut self) -> (u8, u8, u8, Vec<u8>) {
        self.offer(CONTROL_RECEIVE);
        let bytes = self.take(CONTROL_RECEIVE);
        (bytes[0], bytes[4], bytes[6], bytes[8..].to_vec())
    }

    /// All that a driver does before a program opens port 1.
    fn greet(&mut self) {
        self.control(0, 0, 1);
        assert_eq!([self.message(), self.message()], [(0, 1, 1, vec![]), (1, 1, 1, vec![])]);
        self.control(1, 3, 1);
        assert_eq!(self.message(), (1, 7, 1, b"org.example.talk".to_vec()));
        assert_eq!(self.message().1, 6);
    }

    fn far(&self, port: usize) -> UnixStream {
        let far = UnixStream::from(self.console.connect_port(port).unwrap());
        far.set_read_timeout(Some(LONG)).unwrap();
        far
    }

    fn state(&self) -> crate::virtio::transport::State {
        let FunctionState::Virtio(state) = self.bench.host.lock().state().cards[1].function.clone() else {
            panic!("a virtio device");
        };
        state
    }
}

fn read(far: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    far.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn ports_are_told_of_and_carry_bytes_both_ways() {
    let mut guest = Guest::new();
    let mut far = guest.far(1);
    assert!(matches!(guest.console.connect_port(1), Err(ConsoleError::Taken(1))));
    assert!(matches!(guest.console.connect_port(2), Err(ConsoleError::NoPort { wanted: 2, count: 2 })));
    guest.control(0, 0, 1);
    // Terminal: what it is, its size, and that nobody is there. Named: its name, and that somebody is.
    guest.console.resize(0, 24, 80).unwrap();
    guest.control(0, 3, 1);
    guest.control(1, 3, 1);
    let told: Vec<_> = (0..7).map(|_| guest.message()).collect();
    let expected = [
        (0, 1, 1, vec![]),
        (1, 1, 1, vec![]),
        (0, 4, 1, vec![]),
        (0, 6, 0, vec![]),
        (0, 5, 0, vec![80, 0, 24, 0]),
        (1, 7, 1, b"org.example.talk".to_vec()),
        (1, 6, 1, vec![]),
    ];
    assert_eq!(told, expected);

    // Nothing is read before a program opens the port: it would be lost.
    far.write_all(b"early").unwrap();
    guest.offer(RECEIVE);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.queues[RECEIVE].used_index(), 0);
    assert!(!guest.console.is_open(1));
    guest.control(1, 6, 1);
    assert_eq!(guest.take(RECEIVE), b"early");
    assert!(guest.console.is_open(1));
    // A buffer first, bytes later; and the other way round; and more than one buffer holds.
    guest.offer(RECEIVE);
    far.write_all(b"later").unwrap();
    assert_eq!(guest.take(RECEIVE), b"later");
    far.write_all(&[7; 300]).unwrap();
    guest.offer(RECEIVE);
    guest.offer(RECEIVE);
    assert_eq!((guest.take(RECEIVE), guest.take(RECEIVE)), (vec![7; 256], vec![7; 44]));

    guest.send(TRANSMIT, b"hello ");
    guest.send(TRANSMIT, b"host");
    assert_eq!(read(&mut far, 10), b"hello host");
    // The terminal's socket comes later, and the driver hears of it.
    let mut terminal = guest.far(0);
    assert_eq!(guest.message(), (0, 6, 1, vec![]));
    guest.send(1, b"login:");
    assert_eq!(read(&mut terminal, 6), b"login:");
}

#[test]
fn a_far_end_that_closes_is_told_of_and_can_come_back() {
    let mut guest = Guest::new();
    guest.greet();
    guest.control(1, 6, 1);
    let mut far = guest.far(1);
    assert_eq!(guest.message(), (1, 6, 1, vec![]));
    far.write_all(b"last words").unwrap();
    drop(far);
    assert_eq!(guest.message(), (1, 6, 0, vec![]));
    guest.offer(RECEIVE);
    assert_eq!(guest.take(RECEIVE), b"last words");
    // What is sent to nobody is gone, and holds nothing up.
    guest.send(TRANSMIT, b"anybody?");
    guest.take(TRANSMIT);
    let mut far = guest.far(1);
    assert_eq!(guest.message(), (1, 6, 1, vec![]));
    guest.send(TRANSMIT, b"again");
    assert_eq!(read(&mut far, 5), b"again");
    far.write_all(b"and again").unwrap();
    guest.offer(RECEIVE);
    assert_eq!(guest.take(RECEIVE), b"and again");
}

#[test]
fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
    let mut guest = Guest::new();
    guest.greet();
    let mut far = guest.far(1);
    let pattern = |round: usize| -> Vec<u8> { (0..250).map(|at| (at * 7 + round) as u8).collect() };
    // Until the socket is full: then requests stay in their queue.
    let mut sent = 0;
    while guest.queues[TRANSMIT].available.wrapping_sub(guest.queues[TRANSMIT].used_index()) < 8 {
        guest.send(TRANSMIT, &pattern(sent));
        sent += 1;
        let driver = &guest.queues[TRANSMIT];
        let begin = std::time::Instant::now();
        while driver.used_index() != driver.available && begin.elapsed() < Duration::from_millis(20) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    // Another port goes on meanwhile.
    let mut terminal = guest.far(0);
    guest.send(1, b"not held up");
    assert_eq!(read(&mut terminal, 11), b"not held up");
    for round in 0..sent {
        assert_eq!(read(&mut far, 250), pattern(round), "round {round} of {sent}");
    }
    guest.queues[TRANSMIT].wait_for_used(sent as u16);
}

#[test]
fn what_was_said_last_arrives_and_then_the_end() {
    let mut guest = Guest::new();
    guest.greet();
    let mut far = guest.far(1);
    // Put into the queue, but not told of: the guest powers off that moment.
    let driver = &mut guest.queues[TRANSMIT];
    guest.bench.memory.write(Gpa(buffer(TRANSMIT, 0)), b"bye").unwrap();
    driver.descriptor(place(TRANSMIT).descriptors, 0, buffer(TRANSMIT, 0), 3, 0, 0);
    driver.offer(0);
    guest.bench.host.lock().end();
    let mut rest = Vec::new();
    far.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"bye");
}

#[test]
fn without_several_ports_there_is_one_that_is_open() {
    let mut guest = Guest::new();
    guest.begin(feature::VERSION_1);
    let mut far = guest.far(0);
    guest.send(1, b"simple");
    assert_eq!(read(&mut far, 6), b"simple");
    far.write_all(b"driver").unwrap();
    guest.offer(0);
    assert_eq!(guest.take(0), b"driver");
    guest.console.resize(0, 24, 80).unwrap();
    assert_eq!(guest.bench.get(DEVICE, Dword), 24 << 16 | 80);
}

#[test]
fn nonsense_piles_nothing_up() {
    let mut guest = Guest::new();
    for round in 0..500_u32 {
        for (port, event, value) in [(1, 3, 1), (0, 0, 1), (round * 7919, 6, 1), (u32::MAX, 3, 1), (0, 99, 0)] {
            guest.control(port, event, value);
        }
    }
    guest.send(CONTROL_TRANSMIT, &[1, 2, 3]);
    guest.take(CONTROL_TRANSMIT);
    // Each port is added once, and said what it is once.
    let told: Vec<_> = (0..4).map(|_| guest.message()).map(|(port, event, ..)| (port, event)).collect();
    assert_eq!(told, [(0, 1), (1, 1), (1, 7), (1, 6)]);
    guest.offer(CONTROL_RECEIVE);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(guest.queues[CONTROL_RECEIVE].used_index(), 4);
    // A buffer that holds no message swallows it.
    let driver = &mut guest.queues[CONTROL_RECEIVE];
    let index = driver.available % 8;
    driver.descriptor(place(CONTROL_RECEIVE).descriptors, index, 0x8000, 3, WRITE, 0);
    driver.offer(index);
    guest.control(0, 3, 1);
    assert_eq!(guest.take(CONTROL_RECEIVE).len(), 8);
    assert_eq!(guest.take(CONTROL_RECEIVE), []);
}

#[test]
fn names_are_files_and_ports_are_few() {
    let named = |name: &str| PortKind::Named(name.into());
    for name in ["", "a/b", "..", "a b", "\u{e4}", &"a".repeat(64)] {
        assert!(matches!(Console::new(vec![named(name)]), Err(ConsoleError::Name(_))), "{name:?}");
    }
    assert!(matches!(Console::new(vec![named("a"), named("a")]), Err(ConsoleError::Twice(_))));
    assert!(matches!(Console::new(Vec::new()), Err(ConsoleError::Count(0))));
    assert!(matches!(Console::new(vec![PortKind::Console; 32]), Err(ConsoleError::Count(32))));
    assert!(Console::new(vec![PortKind::Console; 31]).is_ok());
}

#[test]
fn a_saved_console_goes_on_in_another_machine() {
    let mut guest = Guest::new();
    guest.greet();
    guest.control(1, 6, 1);
    let far = guest.far(1);
    // A request that is sent in part: the socket is full.
    let mut junk = 0;
    while guest.queues[TRANSMIT].available == guest.queues[TRANSMIT].used_index() {
        guest.send(TRANSMIT, &[b'x'; 256]);
        junk += 256;
        let driver = &guest.queues[TRANSMIT];
        let begin = std::time::Instant::now();
        while driver.used_index() != driver.available && begin.elapsed() < Duration::from_millis(100) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    let saved = guest.state();
    let BackendState::Console(console) = &saved.backend else { panic!("a console") };
    assert!(console.ports[1].is_open && console.ports[1].is_ready);
    let sent_before = console.ports[1].sent;

    let second = Guest::new();
    let mut page = vec![0; super::RAM as usize];
    guest.bench.memory.read(Gpa(0), &mut page).unwrap();
    second.bench.memory.write(Gpa(0), &page).unwrap();
    let mut other = second.far(1);
    let mut state = second.bench.host.lock().state();
    state.cards[1].function = FunctionState::Virtio(saved.clone());
    second.bench.host.lock().restore(&state);
    // What was not sent yet arrives there, and nothing twice.
    let mut got = Vec::<u8>::new();
    let mut piece = [0; 4096];
    wait_until(|| {
        match events::receive(other.as_fd(), &mut piece) {
            Ok(count) => got.extend(&piece[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        got.len() as u64 >= 256 - sent_before
    });
    assert_eq!(got, vec![b'x'; 256 - sent_before as usize], "of {junk}");
    // The driver hears that somebody is there, and receives.
    for driver in &mut guest.queues {
        driver.memory = Arc::clone(&second.bench.memory);
    }
    let mut second = Guest { queues: guest.queues, seen: guest.seen, ..second };
    assert_eq!(second.message(), (1, 6, 1, vec![]));
    other.write_all(b"moved").unwrap();
    second.offer(RECEIVE);
    assert_eq!(second.take(RECEIVE), b"moved");
    drop(far);
    // State for state, but for what was told and sent since.
    let BackendState::Console(mut console) = saved.backend else { panic!("a console") };
    (console.ports[1].sent, console.ports[1].untold) = (0, 0);
    assert_eq!(second.state().backend, BackendState::Console(console));
}
