//! The balloon, over a memory that only notes what it is told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use memory::GuestMemory;
use x86::{Gpa, PAGE_SIZE, Ppn};

use super::transport::{Bench, COMMON, DEVICE, ISR, NOTIFY, bench};
use super::{Driver, NEXT, PLACE, RAM, Random, WRITE, memory, wait_until};
use crate::bus::AccessSize::{Byte, Dword, Word};
use crate::virtio::balloon::{Balloon, Reclaim, State};
use crate::virtio::queue::{Place, Progress, Queue, Rules};
use crate::virtio::{Answer, Backend, BackendState, feature};

const PAGES: u64 = RAM / PAGE_SIZE;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
/// What Linux agrees to.
const FEATURES: u64 = feature::VERSION_1 | feature::EVENT_INDEX | 1 << 1 | 1 << 2 | 1 << 5;

/// Which pages are in the balloon, and which were discarded.
#[derive(Default)]
struct Noted {
    balloon: Mutex<Vec<Ppn>>,
    discarded: Mutex<Vec<Ppn>>,
}

impl Reclaim for Noted {
    fn balloon(&self, pages: &[Ppn]) -> usize {
        let mut balloon = self.balloon.lock().unwrap();
        let before = balloon.len();
        for page in pages {
            if page.0 < PAGES && !balloon.contains(page) {
                balloon.push(*page);
            }
        }
        balloon.len() - before
    }

    fn unballoon(&self, pages: &[Ppn]) -> usize {
        let mut balloon = self.balloon.lock().unwrap();
        let before = balloon.len();
        balloon.retain(|page| !pages.contains(page));
        before - balloon.len()
    }

    fn discard(&self, pages: &[Ppn]) -> usize {
        let good = pages.iter().filter(|page| page.0 < PAGES);
        self.discarded.lock().unwrap().extend(good.clone());
        good.count()
    }
}

impl Noted {
    fn in_balloon(&self) -> Vec<u64> {
        self.balloon.lock().unwrap().iter().map(|page| page.0).collect()
    }

    fn discarded(&self) -> Vec<u64> {
        self.discarded.lock().unwrap().iter().map(|page| page.0).collect()
    }
}

/// A balloon that no driver has found yet.
fn balloon() -> (Arc<Balloon>, Arc<Noted>) {
    let noted = Arc::<Noted>::default();
    (Arc::new(Balloon::new(noted.clone(), PAGES)), noted)
}

fn stats(balloon: &Balloon) -> BTreeMap<&'static str, u64> {
    balloon.stats().into_iter().collect()
}

/// One request with these buffers: address, size, flags.
fn request(balloon: &Balloon, memory: &Arc<GuestMemory>, queue: u16, buffers: &[(u64, u32, u16)]) -> Answer {
    let mut driver = Driver::new(memory);
    for (index, (address, size, flags)) in buffers.iter().enumerate() {
        let more = if index + 1 < buffers.len() { NEXT } else { 0 };
        driver.descriptor(PLACE.descriptors, index as u16, *address, *size, flags | more, index as u16 + 1);
    }
    driver.set_16(PLACE.driver.add(2), 0);
    driver.offer(0);
    let mut ring = Queue::new(memory, PLACE, Rules::default(), Progress::default()).unwrap();
    let chain = ring.pop(memory).unwrap().unwrap();
    balloon.serve(queue, FEATURES, &chain)
}

/// A request with these page numbers, in two buffers that no number needs to be within.
fn numbers(balloon: &Balloon, memory: &Arc<GuestMemory>, queue: u16, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let split = bytes.len() / 3;
    memory.write(Gpa(0x8000), &bytes[..split]).unwrap();
    memory.write(Gpa(0xa000), &bytes[split..]).unwrap();
    let list = [(0x8000, split as u32, 0), (0xa000, (bytes.len() - split) as u32, 0)];
    assert_eq!(request(balloon, memory, queue, &list), Answer::Done(0));
}

#[test]
fn pages_go_into_the_balloon_and_out_of_it_once() {
    let (balloon, noted) = balloon();
    let memory = memory();
    numbers(&balloon, &memory, INFLATE, &[9, 7, 8, 200, 7]);
    assert_eq!(noted.in_balloon(), [7, 8, 9, 200], "in order, for whoever treats neighbours together");
    numbers(&balloon, &memory, INFLATE, &[8, 256, u32::MAX, 0]);
    assert_eq!(noted.in_balloon(), [7, 8, 9, 200, 0]);
    numbers(&balloon, &memory, DEFLATE, &[7, 7, 100, 1 << 20, 200]);
    assert_eq!(noted.in_balloon(), [8, 9, 0]);
    let now = stats(&balloon);
    assert_eq!((now["inflated"], now["deflated"]), (5, 2));
    assert_eq!((now["refused_inflations"], now["refused_deflations"]), (4, 3));
    assert_eq!(now["malformed"], 0);
}

#[test]
fn a_request_that_is_no_list_or_has_no_end_is_counted() {
    let (balloon, noted) = balloon();
    let memory = memory();
    memory.write(Gpa(0x8000), &[1, 0, 0, 0, 2, 0, 0]).unwrap();
    request(&balloon, &memory, INFLATE, &[(0x8000, 7, 0)]);
    assert_eq!(noted.in_balloon(), [1], "what is whole is good");
    request(&balloon, &memory, INFLATE, &[(0x8000, 4, WRITE)]);
    request(&balloon, &memory, DEFLATE, &[(0x8000, 0, 0)]);
    assert_eq!(stats(&balloon)["malformed"], 3);
    // A little more than is looked at: all RAM but the queue, as the number 0x01010101 many times over.
    memory.write(Gpa(0x4000), &vec![1; 0x4_0004]).unwrap();
    request(&balloon, &memory, INFLATE, &[(0x4000, 0x4_0004, 0)]);
    let now = stats(&balloon);
    assert_eq!((now["malformed"], now["refused_inflations"]), (4, 0x1_0000));
    // A queue that was not agreed on.
    let mut driver = Driver::new(&memory);
    driver.descriptor(PLACE.descriptors, 0, 0x8000, 4, 0, 0);
    driver.set_16(PLACE.driver.add(2), 0);
    driver.offer(0);
    let mut ring = Queue::new(&memory, PLACE, Rules::default(), Progress::default()).unwrap();
    let chain = ring.pop(&memory).unwrap().unwrap();
    assert_eq!(balloon.serve(STATISTICS, feature::VERSION_1, &chain), Answer::Done(0));
    assert_eq!(stats(&balloon)["malformed"], 5);
}

#[test]
fn free_pages_are_discarded_as_far_as_they_are_whole() {
    for queue in [3, 4] {
        let (balloon, noted) = balloon();
        let memory = memory();
        let list = [(0x1_0000, 0x3000, WRITE), (0x2_0ffc, 0x2004, WRITE), (0x3_0001, 0x1ffe, WRITE)];
        assert_eq!(request(&balloon, &memory, queue, &list), Answer::Done(0));
        assert_eq!(noted.discarded(), [0x10, 0x11, 0x12, 0x21, 0x22]);
        assert_eq!((stats(&balloon)["reported"], stats(&balloon)["malformed"]), (5, 0));
        request(&balloon, &memory, queue, &[(0x1_0000, 0x1000, 0)]);
        request(&balloon, &memory, queue, &[(0x1_0001, 0x1000, WRITE)]);
        assert_eq!((stats(&balloon)["reported"], stats(&balloon)["malformed"]), (5, 2));
    }
}

fn places(count: u64) -> Vec<Place> {
    let at =
        |base: u64| Place { entries: 8, descriptors: Gpa(base), driver: Gpa(base + 0x400), device: Gpa(base + 0x800) };
    (0..count).map(|number| at(0x1000 * (number + 1))).collect()
}

fn with_driver(balloon: &Arc<Balloon>) -> Bench {
    let bench = bench(balloon.clone());
    bench.initialize_queues(FEATURES, &places(4));
    assert_eq!(bench.status(), 15);
    bench
}

#[test]
fn a_target_reaches_the_driver_and_its_answer_the_host() {
    let (balloon, noted) = balloon();
    balloon.set_target(3);
    assert_eq!(stats(&balloon)["driver"], 0);
    let bench = with_driver(&balloon);
    assert_eq!((stats(&balloon)["driver"], stats(&balloon)["target"]), (1, 3));
    assert_eq!(bench.get(DEVICE, Dword), 3, "told to a driver that comes later");
    let generation = bench.get(COMMON + 0x15, Byte);
    balloon.set_target(3);
    assert_eq!(bench.get(ISR, Byte), 0, "nothing has changed");
    balloon.set_target(u64::MAX);
    assert_eq!(bench.get(ISR, Byte), 2);
    assert_eq!(bench.get(DEVICE, Dword), PAGES, "no more than there is");
    assert_ne!(bench.get(COMMON + 0x15, Byte), generation);
    let mut driver = Driver::at(&bench.memory, places(1)[0]);
    bench.memory.write(Gpa(0x8000), &[5, 0, 0, 0, 6, 0, 0, 0]).unwrap();
    driver.descriptor(driver.place.descriptors, 0, 0x8000, 8, 0, 0);
    driver.offer(0);
    bench.set(NOTIFY, Word, 0);
    driver.wait_for_used(1);
    bench.set(DEVICE, Dword, 99);
    bench.set(DEVICE + 4, Byte, 1);
    bench.set(DEVICE + 4, Dword, 2);
    bench.set(DEVICE + 8, Dword, 7);
    assert_eq!(stats(&balloon)["actual"], 2);
    assert_eq!(bench.get(DEVICE, Dword), PAGES, "that is not the driver's to write");
    assert_eq!(noted.in_balloon(), [5, 6]);
    // Another driver begins anew.
    bench.set_status(0);
    wait_until(|| bench.status() == 0);
    assert_eq!((stats(&balloon)["driver"], stats(&balloon)["actual"]), (0, 0));
    balloon.set_target(1);
    assert_eq!(bench.get(ISR, Byte), 0, "nobody is there to be told");
}

#[test]
fn what_a_guest_takes_back_unasked_is_told_apart() {
    let (balloon, _noted) = balloon();
    let bench = with_driver(&balloon);
    let memory = memory();
    balloon.set_target(4);
    numbers(&balloon, &memory, INFLATE, &[4, 5, 6, 7]);
    bench.set(DEVICE + 4, Dword, 4);
    numbers(&balloon, &memory, DEFLATE, &[4, 5]);
    bench.set(DEVICE + 4, Dword, 2);
    assert_eq!(stats(&balloon)["unasked"], 2);
    balloon.set_target(1);
    numbers(&balloon, &memory, DEFLATE, &[6]);
    assert_eq!((stats(&balloon)["unasked"], stats(&balloon)["deflated"]), (2, 3));
}

fn statistic(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_come_when_they_are_asked_for_and_stay_with_the_device() {
    let (balloon, _noted) = balloon();
    let bench = with_driver(&balloon);
    let place = places(3)[2];
    let mut driver = Driver::at(&bench.memory, place);
    let send = |driver: &mut Driver, bench: &Bench, list: &[Vec<u8>]| {
        let bytes = list.concat();
        driver.memory.write(Gpa(0x8000), &bytes).unwrap();
        driver.descriptor(place.descriptors, 0, 0x8000, bytes.len() as u32, 0, 0);
        driver.offer(0);
        bench.set(NOTIFY + 4 * u64::from(STATISTICS), Word, 2);
    };
    send(&mut driver, &bench, &[statistic(4, 1 << 20), statistic(6, 77), statistic(999, 5)]);
    wait_until(|| stats(&balloon)["updates"] == 1);
    let now = stats(&balloon);
    assert_eq!((now["guest_free"], now["guest_available"]), (1 << 20, 77));
    assert!(!now.contains_key("guest_total"), "the guest did not say");
    // A driver that notifies without a reason.
    bench.set(NOTIFY + 4 * u64::from(STATISTICS), Word, 2);
    assert_eq!(driver.used_index(), 0, "its buffer is kept");
    balloon.ask();
    driver.wait_for_used(1);
    send(&mut driver, &bench, &[statistic(5, 9), statistic(4, u64::MAX)]);
    wait_until(|| stats(&balloon)["updates"] == 2);
    assert_eq!((stats(&balloon)["guest_free"], stats(&balloon)["guest_total"]), (u64::MAX, 9));
    balloon.ask();
    driver.wait_for_used(2);
    send(&mut driver, &bench, &[vec![1; 11]]);
    wait_until(|| stats(&balloon)["malformed"] == 1);

    // A machine that is saved now has the buffer, and still has it when it goes on.
    let saved = bench.host.lock().state();
    let (balloon, _noted) = self::balloon();
    let other = self::bench(balloon.clone());
    let mut all = vec![0; RAM as usize];
    bench.memory.read(Gpa(0), &mut all).unwrap();
    other.memory.write(Gpa(0), &all).unwrap();
    other.host.lock().restore(&saved);
    driver.memory = Arc::clone(&other.memory);
    balloon.ask();
    driver.wait_for_used(3);
    send(&mut driver, &other, &[statistic(7, 1)]);
    wait_until(|| stats(&balloon)["updates"] == 1);
    assert_eq!(stats(&balloon)["guest_caches"], 1);
}

#[test]
fn target_and_answer_are_saved() {
    let (balloon, _noted) = balloon();
    let saved = BackendState::Balloon(State { target: 7, actual: 5 });
    balloon.restore(&saved);
    assert_eq!(balloon.state(), saved);
    balloon.restore(&BackendState::Balloon(State { target: u32::MAX, actual: 5 }));
    assert_eq!(stats(&balloon)["target"], PAGES);
    balloon.restore(&BackendState::Plain);
    assert_eq!(stats(&balloon)["target"], PAGES);
}

#[test]
fn random_requests_on_every_queue_do_no_harm() {
    let mut random = Random(0x1357_9bdf_0246_8ace);
    let (balloon, noted) = balloon();
    let memory = memory();
    let mut sent = 0;
    for _ in 0..3000 {
        let mut fill = vec![0; 4096];
        // Mostly page numbers that might be right.
        for number in fill.chunks_exact_mut(4) {
            let wide = random.below(8) == 0;
            number.copy_from_slice(&(random.below(if wide { 1 << 32 } else { 2 * PAGES }) as u32).to_le_bytes());
        }
        memory.write(Gpa(0x4_0000 + 0x1000 * random.below(16)), &fill).unwrap();
        let readable = random.below(4);
        let buffers: Vec<(u64, u32, u16)> = (0..1 + random.below(6))
            .map(|index| {
                let size = random.below(0x3000) as u32;
                (0x4_0000 + random.below(0x1_0000), size, if index < readable { 0 } else { WRITE })
            })
            .collect();
        let queue = random.below(7) as u16;
        if queue < STATISTICS {
            let bytes: u64 = buffers.iter().filter(|buffer| buffer.2 == 0).map(|buffer| u64::from(buffer.1)).sum();
            sent += bytes / 4;
        }
        if random.below(16) == 0 {
            balloon.ask();
        }
        let answer = request(&balloon, &memory, queue, &buffers);
        assert!(matches!(answer, Answer::Done(0)) || queue == STATISTICS);
    }
    let now = stats(&balloon);
    let told = ["inflated", "deflated", "refused_inflations", "refused_deflations"].map(|name| now[name]);
    assert_eq!(told.iter().sum::<u64>(), sent, "each number is counted once");
    assert!(told.iter().all(|count| *count > 100) && now["reported"] > 100 && now["malformed"] > 100);
    assert_eq!(now["inflated"] - now["deflated"], noted.in_balloon().len() as u64);
}
