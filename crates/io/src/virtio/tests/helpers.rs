//! Several threads at one queue.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use x86::Gpa;

use super::transport::{Bench, NOTIFY, bench};
use super::{Driver, PLACE, WRITE, wait_until};
use crate::bus::AccessSize::Word;
use crate::virtio::line::Line;
use crate::virtio::queue::Chain;
use crate::virtio::{Answer, Backend, feature};

/// Requests that wait: for one another, and, if it says so, for somebody else.
#[derive(Default)]
struct Waiting {
    line: OnceLock<Arc<Line>>,
    inside: AtomicUsize,
    most: AtomicUsize,
    keeps: AtomicBool,
    kept: AtomicUsize,
}

impl Backend for Waiting {
    fn device_type(&self) -> u16 {
        2
    }

    fn pci_class(&self) -> u32 {
        0
    }

    fn helpers(&self) -> usize {
        3
    }

    fn connect(&self, line: &Arc<Line>) {
        let _ = self.line.set(Arc::clone(line));
    }

    fn serve(&self, _queue: u16, _features: u64, chain: &Chain<'_>) -> Answer {
        let inside = self.inside.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(inside, Ordering::SeqCst);
        // Long enough to be taken for one that waits; those after it wait until they are two.
        std::thread::sleep(Duration::from_millis(1));
        let mut head = [0];
        if chain.writable_bytes() == 2 {
            wait_until(|| self.most.load(Ordering::SeqCst) > 1);
            head[0] = chain.head() as u8;
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
        if self.keeps.load(Ordering::SeqCst) {
            self.kept.fetch_add(1, Ordering::SeqCst);
            return Answer::Kept;
        }
        Answer::Done(u32::from(chain.write(0, &head)))
    }
}

fn start(device: &Arc<Waiting>) -> (Bench, Driver) {
    let bench = bench(Arc::clone(device) as Arc<dyn Backend>);
    bench.initialize_queues(feature::VERSION_1, &[PLACE]);
    let driver = Driver::new(&bench.memory);
    for index in 0..8 {
        // The first asks for one byte only.
        let size = if index == 0 { 1 } else { 2 };
        driver.descriptor(PLACE.descriptors, index, 0x8000 + 16 * u64::from(index), size, WRITE, 0);
    }
    (bench, driver)
}

fn heads(driver: &Driver, count: u64) -> Vec<u32> {
    let mut heads: Vec<u32> = (0..count).map(|slot| driver.used(slot).0).collect();
    heads.sort_unstable();
    heads
}

#[test]
fn requests_that_wait_are_served_at_once_and_each_is_done_once() {
    let device = Arc::new(Waiting::default());
    let (bench, mut driver) = start(&device);
    (0..8).for_each(|head| driver.offer(head));
    bench.set(NOTIFY, Word, 0);
    driver.wait_for_used(8);
    assert_eq!(heads(&driver, 8), (0..8).collect::<Vec<_>>());
    assert!((2..=4).contains(&device.most.load(Ordering::SeqCst)), "its own thread and three more");
    for head in 1..8_u8 {
        let mut byte = [0];
        bench.memory.read(Gpa(0x8000 + 16 * u64::from(head)), &mut byte).unwrap();
        assert_eq!(byte, [head]);
    }
}

#[test]
fn requests_that_several_threads_keep_are_served_again_and_survive_a_move() {
    let device = Arc::new(Waiting::default());
    let (bench, mut driver) = start(&device);
    // Two at once, so that two are kept.
    device.keeps.store(true, Ordering::SeqCst);
    (0..8).for_each(|head| driver.offer(head));
    wait_until(|| {
        bench.set(NOTIFY, Word, 0);
        device.kept.load(Ordering::SeqCst) > 4 && device.most.load(Ordering::SeqCst) > 1
    });
    assert_eq!(driver.used_index(), 0);
    // Another machine takes them over.
    let saved = bench.saved();
    let other = Arc::new(Waiting::default());
    // There, they need not wait for one another.
    other.most.store(2, Ordering::SeqCst);
    let next = super::transport::bench(other.clone());
    let mut all = vec![0; super::RAM as usize];
    bench.memory.read(Gpa(0), &mut all).unwrap();
    next.memory.write(Gpa(0), &all).unwrap();
    next.host.lock().restore(&saved);
    driver.memory = Arc::clone(&next.memory);
    driver.wait_for_used(8);
    assert_eq!(heads(&driver, 8), (0..8).collect::<Vec<_>>());
}
