//! The network card, from the guest's side and from its cable's.

use std::sync::{Arc, Mutex, OnceLock};

use x86::Gpa;

use super::transport::{Bench, DEVICE, NOTIFY, bench};
use super::{Driver, NEXT, Random, WRITE, wait_until};
use crate::bus::AccessSize::{Byte, Word};
use crate::network::frame::{Cut, Frame, Offload, Payload};
use crate::network::inbox::Inbox;
use crate::network::{Mac, Wire, packet};
use crate::virtio::net::Net;
use crate::virtio::queue::Place;
use crate::virtio::{BackendState, feature};

const MAC: Mac = Mac([2, 1, 2, 3, 4, 5]);
const MERGEABLE: u64 = 1 << 15;
const TO_GUEST: u64 = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 10;
const CONTROL: u64 = 1 << 17 | 1 << 18 | 1 << 23;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL_QUEUE: usize = 2;
const SIZE: u32 = 1024;
const ENTRIES: u16 = 16;

/// A cable whose far end is the test.
#[derive(Default)]
struct Cable {
    inbox: OnceLock<Arc<Inbox>>,
    sent: Mutex<Vec<Frame>>,
    is_shared: bool,
}

impl Wire for Cable {
    fn connect(&self, inbox: &Arc<Inbox>) {
        let _ = self.inbox.set(Arc::clone(inbox));
    }

    fn send(&self, frame: &mut Frame) {
        self.sent.lock().unwrap().push(frame.clone());
    }

    fn is_shared(&self) -> bool {
        self.is_shared
    }
}

struct Guest {
    bench: Bench,
    card: Arc<Net>,
    cable: Arc<Cable>,
    queues: Vec<Driver>,
    seen: [u16; 3],
}

fn place(queue: usize) -> Place {
    let base = 0x1_0000 + 0x3000 * queue as u64;
    Place { entries: ENTRIES, descriptors: Gpa(base), driver: Gpa(base + 0x1000), device: Gpa(base + 0x2000) }
}

fn buffer(queue: usize, index: u16) -> u64 {
    0x4_0000 + 0x8000 * queue as u64 + u64::from(SIZE) * u64::from(index)
}

impl Guest {
    fn new(features: u64, is_shared: bool) -> Guest {
        let cable = Arc::new(Cable { is_shared, ..Cable::default() });
        let card = Arc::new(Net::new(cable.clone(), MAC, 1500));
        let bench = bench(card.clone());
        let places: Vec<Place> = (0..3).map(place).collect();
        bench.initialize_queues(feature::VERSION_1 | features, &places);
        assert_eq!(bench.status(), 15);
        let queues = places.into_iter().map(|place| Driver::at(&bench.memory, place)).collect();
        Guest { bench, card, cable, queues, seen: [0; 3] }
    }

    fn notify(&self, queue: usize) {
        self.bench.set(NOTIFY + 4 * queue as u64, Word, queue as u64);
    }

    fn offer(&mut self, size: u32) {
        let driver = &mut self.queues[RECEIVE];
        let index = driver.available % ENTRIES;
        driver.descriptor(place(RECEIVE).descriptors, index, buffer(RECEIVE, index), size, WRITE, 0);
        driver.offer(index);
        self.notify(RECEIVE);
    }

    fn send(&mut self, queue: usize, bytes: &[u8]) {
        let driver = &mut self.queues[queue];
        let index = driver.available % ENTRIES;
        self.bench.memory.write(Gpa(buffer(queue, index)), bytes).unwrap();
        driver.descriptor(place(queue).descriptors, index, buffer(queue, index), bytes.len() as u32, 0, 0);
        driver.offer(index);
        let count = driver.available;
        self.notify(queue);
        self.queues[queue].wait_for_used(count);
    }

    /// The next buffer that comes back.
    fn take(&mut self) -> Vec<u8> {
        let seen = self.seen[RECEIVE];
        let driver = &self.queues[RECEIVE];
        wait_until(|| driver.used_index() != seen);
        let (head, size) = driver.used(u64::from(seen % ENTRIES));
        self.seen[RECEIVE] += 1;
        let mut bytes = vec![0; size as usize];
        self.bench.memory.read(Gpa(buffer(RECEIVE, head as u16)), &mut bytes).unwrap();
        bytes
    }

    fn give(&self, frame: Frame) -> bool {
        self.cable.inbox.get().unwrap().offer(frame)
    }

    /// Carries a command out, and says what the device answers.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let driver = &mut self.queues[CONTROL_QUEUE];
        let at = buffer(CONTROL_QUEUE, 0);
        self.bench.memory.write(Gpa(at), bytes).unwrap();
        self.bench.memory.write(Gpa(at + 0x4000), &[77]).unwrap();
        driver.descriptor(place(CONTROL_QUEUE).descriptors, 0, at, bytes.len() as u32, NEXT, 1);
        driver.descriptor(place(CONTROL_QUEUE).descriptors, 1, at + 0x4000, 1, WRITE, 0);
        driver.offer(0);
        let count = driver.available;
        self.notify(CONTROL_QUEUE);
        self.queues[CONTROL_QUEUE].wait_for_used(count);
        let mut answer = [0];
        self.bench.memory.read(Gpa(at + 0x4000), &mut answer).unwrap();
        answer[0]
    }
}

fn frame(target: Mac, size: usize) -> Vec<u8> {
    let mut bytes = packet::ethernet(MAC, target, 0x88b5);
    bytes.extend((bytes.len()..size).map(|number| number as u8));
    bytes
}

#[test]
fn the_configuration_tells_of_the_card_and_its_cable() {
    let guest = Guest::new(0, false);
    let bytes: Vec<u64> = (0..12).map(|at| guest.bench.get(DEVICE + at, Byte)).collect();
    assert_eq!(bytes, [2, 1, 2, 3, 4, 5, 1, 0, 1, 0, 220, 5]);
    guest.card.set_link(false);
    assert_eq!(guest.bench.get(DEVICE + 6, Byte), 0);
    assert!(guest.give(Frame::plain(frame(MAC, 60))));
    guest.card.set_link(true);
    assert_eq!(guest.bench.get(DEVICE + 6, Byte), 1);
}

#[test]
fn frames_leave_with_what_is_to_be_done_to_them() {
    let mut guest = Guest::new(0, false);
    let mut bytes = vec![0; 12];
    bytes.extend(frame(Mac::BROADCAST, 64));
    guest.send(TRANSMIT, &bytes);
    wait_until(|| !guest.cable.sent.lock().unwrap().is_empty());
    let sent = guest.cable.sent.lock().unwrap().pop().unwrap();
    assert_eq!((sent.offload, &sent.head[..]), (Offload::default(), &bytes[12..]));
    // Too short, and one that wants to be cut but is no TCP: both come back, and go nowhere.
    guest.send(TRANSMIT, &bytes[..20]);
    guest.send(
        TRANSMIT,
        &[&Offload { checksum: Some((34, 16)), cut: Cut::Tcp4, piece: 10 }.to_bytes(54, 0), &bytes[12..]].concat(),
    );
    assert!(guest.cable.sent.lock().unwrap().is_empty());
    assert_eq!(guest.card.counters()[3], ("refused_frames", 2));
}

#[test]
fn a_large_frame_fills_several_buffers_and_is_seen_as_a_whole() {
    let mut guest = Guest::new(MERGEABLE | TO_GUEST, false);
    for _ in 0..3 {
        guest.offer(SIZE);
    }
    let bytes = frame(MAC, 2900);
    let mut whole = Frame::plain(bytes[..60].to_vec());
    whole.tail = Some(Payload::new(bytes[60..].to_vec()));
    assert!(guest.give(whole));
    let first = guest.take();
    assert_eq!(guest.queues[RECEIVE].used_index(), 3);
    assert_eq!(first[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    let rest = [guest.take(), guest.take()].concat();
    assert!([&first[12..], &rest].concat() == bytes);
    // One that does not fit yet waits for more buffers.
    guest.offer(SIZE);
    assert!(guest.give(Frame::plain(frame(MAC, 2000))));
    guest.offer(SIZE);
    assert_eq!(guest.take().len() + guest.take().len(), 2012);
}

#[test]
fn without_mergeable_buffers_a_frame_has_one() {
    let mut guest = Guest::new(0, false);
    guest.offer(100);
    assert!(guest.give(Frame::plain(frame(MAC, 500))));
    assert_eq!(guest.take(), [], "it does not fit and is lost");
    guest.offer(SIZE);
    assert!(guest.give(Frame::plain(frame(MAC, 500))));
    let got = guest.take();
    assert_eq!((got[10], &got[12..]), (1, &frame(MAC, 500)[..]));
}

#[test]
fn a_shared_cable_is_filtered_as_the_guest_says() {
    let mut guest = Guest::new(MERGEABLE | CONTROL, true);
    let (other, group) = (Mac([2, 9, 9, 9, 9, 9]), Mac([1, 0, 0x5e, 0, 0, 1]));
    for _ in 0..8 {
        guest.offer(SIZE);
    }
    let heard = |guest: &mut Guest, target: Mac| {
        assert!(guest.give(Frame::plain(frame(target, 60))));
        assert!(guest.give(Frame::plain(frame(Mac::BROADCAST, 61))));
        let is_heard = guest.take().len() == 72;
        if is_heard {
            assert_eq!(guest.take().len(), 73);
            guest.offer(SIZE);
        }
        guest.offer(SIZE);
        is_heard
    };
    assert!(heard(&mut guest, other), "all, before the driver says anything");
    assert_eq!(guest.command(&[0, 0, 0]), 0);
    assert!(!heard(&mut guest, other) && heard(&mut guest, MAC) && !heard(&mut guest, group));
    assert_eq!(guest.command(&[0, 1, 1]), 0);
    assert!(heard(&mut guest, group) && !heard(&mut guest, other));
    assert_eq!(guest.command(&[0, 1, 0]), 0);
    let table = [&[1, 0, 1, 0, 0, 0][..], &other.0, &[1, 0, 0, 0], &group.0].concat();
    assert_eq!(guest.command(&table), 0);
    assert!(heard(&mut guest, group) && heard(&mut guest, other));
    assert_eq!(guest.command(&[&[1, 1][..], &[6, 6, 6, 6, 6, 6]].concat()), 0);
    assert!(heard(&mut guest, Mac([6; 6])) && !heard(&mut guest, MAC));
    // Nonsense: an address of several, tables that end early, commands that nobody knows.
    assert_eq!(guest.command(&[&[1, 1][..], &[1; 6]].concat()), 1);
    for size in 2..table.len() {
        assert_eq!(guest.command(&table[..size]), 1, "{size}");
    }
    assert_eq!((guest.command(&[0, 0]), guest.command(&[9, 9, 9])), (1, 1));
    // A driver that begins anew has said nothing.
    guest.bench.set_status(0);
    let BackendState::Net(state) = crate::virtio::Backend::state(&*guest.card) else { panic!() };
    assert_eq!((state.mac, state.filter.promiscuous), (MAC, true));
}

#[test]
fn no_chain_does_harm() {
    let mut random = Random(0x5eed_0000_0001);
    for round in 0..200 {
        let features = if round % 2 == 0 { MERGEABLE | TO_GUEST } else { 0 };
        let guest = Guest::new(features, round % 3 == 0);
        let Guest { bench, mut queues, .. } = guest;
        for _ in 0..30 {
            let queue = random.below(3) as usize;
            let driver = &mut queues[queue];
            let table = place(queue).descriptors;
            for index in 0..ENTRIES {
                let (address, flags) = (random.address(), random.below(4) as u16);
                let size = if random.below(8) == 0 { random.next() as u32 } else { random.below(3000) as u32 };
                driver.descriptor(table, index, address, size, flags, random.below(18) as u16);
            }
            driver.offer(random.below(17) as u16);
            bench.set(NOTIFY + 4 * queue as u64, Word, queue as u64);
            let inbox = guest.cable.inbox.get().unwrap();
            let mut frame = Frame::plain(vec![3; 14 + random.below(3000) as usize]);
            frame.offload.checksum =
                (random.below(2) == 0).then_some((random.below(60) as u16, random.below(60) as u16));
            inbox.offer(frame);
        }
        // It stands, or wants a reset; and comes back either way.
        bench.set_status(0);
        wait_until(|| bench.status() == 0);
    }
}

#[test]
fn a_frame_that_waits_for_buffers_is_given_when_they_come() {
    let mut guest = Guest::new(MERGEABLE | TO_GUEST | feature::EVENT_INDEX, false);
    guest.offer(SIZE);
    guest.offer(SIZE);
    assert!(guest.give(Frame::plain(frame(MAC, 3000))));
    // The driver is asked to tell of the next buffer, and not of those that are there: they are too few.
    let wanted = place(RECEIVE).device.add(4 + 8 * u64::from(ENTRIES));
    wait_until(|| guest.queues[RECEIVE].get_16(wanted) == 2);
    guest.offer(SIZE);
    assert_eq!(guest.take().len() + guest.take().len() + guest.take().len(), 3012);
}
