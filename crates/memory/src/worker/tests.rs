use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use host::map::memfd;
use x86::{Gpa, PAGE_SIZE, Ppn};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::*;
use crate::machine::{FIRST_IMAGE, SHARED};
use crate::pmap::State;
use crate::swap::Store;

const SEED: u64 = 77;

/// A shared pool and its counts, without another process.
struct Table {
    pool: File,
    pages: HashMap<u64, u32>,
    counts: HashMap<u32, i64>,
    lies: bool,
}

#[derive(Clone)]
struct Client(Arc<Mutex<Table>>);

impl Client {
    fn new() -> Client {
        let pool = memfd(c"test-shared", 64 << 20).unwrap();
        Client(Arc::new(Mutex::new(Table { pool, pages: HashMap::new(), counts: HashMap::new(), lies: false })))
    }

    /// How often pages are counted in all.
    fn counted(&self) -> i64 {
        self.0.lock().unwrap().counts.values().sum()
    }
}

impl Common for Client {
    fn seed(&self) -> u64 {
        SEED
    }

    fn offer(
        &mut self,
        pages: &[(Ppn, u64)],
        content: &mut dyn FnMut(Ppn) -> Option<Box<Page>>,
    ) -> io::Result<Vec<Option<u32>>> {
        let mut table = self.0.lock().unwrap();
        let mut answers = Vec::new();
        for (ppn, hash) in pages {
            let fresh = table.pages.len() as u32;
            let number = match table.pages.get(hash) {
                Some(number) => *number,
                None => {
                    let Some(page) = content(*ppn).filter(|page| xxh3_64_with_seed(&page[..], SEED) == *hash) else {
                        answers.push(None);
                        continue;
                    };
                    table.pool.write_all_at(&page[..], u64::from(fresh) * PAGE_SIZE).unwrap();
                    table.pages.insert(*hash, fresh);
                    fresh
                }
            };
            let number = if table.lies { 0 } else { number };
            *table.counts.entry(number).or_default() += 1;
            answers.push(Some(number));
        }
        Ok(answers)
    }

    fn release(&mut self, pages: &[u32]) -> io::Result<()> {
        let mut table = self.0.lock().unwrap();
        pages.iter().for_each(|page| *table.counts.get_mut(page).unwrap() -= 1);
        Ok(())
    }
}

fn guest(client: &Client) -> (Arc<GuestMemory>, Worker) {
    let memory = Arc::new(GuestMemory::new(8 << 20).unwrap());
    let pool = client.0.lock().unwrap().pool.try_clone().unwrap();
    memory.machine().add_source(SHARED, pool, 1 << 14).unwrap();
    let mut worker = Worker::new(Arc::clone(&memory));
    worker.attach(Box::new(client.clone()));
    (memory, worker)
}

fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(512)
}

fn write(memory: &GuestMemory, page: u64, number: u64) {
    memory.write(Ppn(page).gpa(), &content(number)).unwrap();
}

fn holds(memory: &GuestMemory, page: u64, number: u64) -> bool {
    let mut bytes = vec![0; PAGE_SIZE as usize];
    memory.read(Ppn(page).gpa(), &mut bytes).unwrap();
    bytes == content(number)
}

fn state(memory: &GuestMemory, page: u64) -> State {
    memory.pmap().get(Ppn(page)).unwrap().state()
}

#[test]
fn equal_pages_become_one_and_a_store_breaks_them() {
    let client = Client::new();
    let (memory, mut worker) = guest(&client);
    for page in 0..100 {
        write(&memory, page, 1 + page % 10);
    }
    assert_eq!(worker.scan(1000).shared, 0, "no page is offered before it was the same twice");
    let scanned = worker.scan(1000);
    assert_eq!((scanned.scanned, scanned.shared, scanned.has_ended), (100, 100, true));
    assert_eq!((memory.pool().in_use(), client.counted()), (0, 100));
    assert_eq!(memory.shared_pages(), (0..10).map(|page| (page, 10)).collect::<Vec<_>>());
    assert!((0..100).all(|page| holds(&memory, page, 1 + page % 10)));
    memory.write(Gpa(5 * PAGE_SIZE + 8), &[9]).unwrap();
    assert_eq!((state(&memory, 5), state(&memory, 15)), (State::Private, State::Shared));
    assert!(holds(&memory, 15, 6) && !holds(&memory, 5, 6));
    worker.scan(1);
    assert_eq!(client.counted(), 99, "what a store has broken is counted no more");
}

#[test]
fn nobody_counts_the_pages_of_an_image() {
    let client = Client::new();
    let (memory, mut worker) = guest(&client);
    memory.machine().add_source(FIRST_IMAGE, memfd(c"test-image", 1 << 20).unwrap(), 256).unwrap();
    memory.map_image(FIRST_IMAGE, Ppn(10), 0, 20).unwrap();
    (10..15).for_each(|page| write(&memory, page, page));
    assert_eq!(memory.balloon(&[Ppn(20)]), 1);
    assert_eq!(
        (state(&memory, 12), state(&memory, 25), state(&memory, 20)),
        (State::Private, State::Image, State::Ballooned)
    );
    assert!(memory.take_given_back().is_empty());
    worker.scan(100);
    assert!(memory.shared_pages().is_empty());
}

#[test]
fn two_guests_share_and_a_lie_about_a_page_is_found() {
    let client = Client::new();
    let ((one, mut first), (other, mut second)) = (guest(&client), guest(&client));
    for page in 0..50 {
        write(&one, page, 100 + page);
        write(&other, 50 - page, 100 + page);
    }
    for worker in [&mut first, &mut second] {
        worker.scan(1000);
        worker.scan(1000);
    }
    assert_eq!((one.pool().in_use(), other.pool().in_use(), client.counted()), (0, 0, 100));
    assert!((0..50).all(|page| holds(&one, page, 100 + page) && holds(&other, 50 - page, 100 + page)));
    client.0.lock().unwrap().lies = true;
    (60..70).for_each(|page| write(&one, page, page));
    first.scan(1000);
    let scanned = first.scan(1000);
    assert_eq!((scanned.shared, scanned.different), (0, 10));
    assert!((60..70).all(|page| holds(&one, page, page)) && client.counted() == 100);
}

#[test]
fn zeroes_cost_nothing_and_a_page_that_changes_is_not_offered() {
    let client = Client::new();
    let (memory, mut worker) = guest(&client);
    (0..20).for_each(|page| write(&memory, page, 7));
    (0..10).for_each(|page| write(&memory, page, 0));
    for round in 0..5 {
        write(&memory, 19, 1000 + round);
        worker.scan(1000);
    }
    assert_eq!(
        (state(&memory, 3), state(&memory, 12), state(&memory, 19)),
        (State::Zero, State::Shared, State::Private)
    );
    assert!(holds(&memory, 3, 0) && holds(&memory, 12, 7) && holds(&memory, 19, 1004));
}

#[test]
fn samples_tell_how_much_is_used() {
    let (memory, mut worker) = guest(&Client::new());
    (0..2048).for_each(|page| write(&memory, page, page));
    worker.sample(200);
    for page in 0..1024 {
        assert!(holds(&memory, page, page));
    }
    let (touched, sampled) = worker.sample(0);
    assert!((150..=200).contains(&sampled));
    assert!((sampled / 3..=2 * sampled / 3).contains(&touched), "{touched} of {sampled}");
    // What the worker does by itself is no use.
    worker.sample(200);
    worker.scan(5000);
    worker.scan(5000);
    assert_eq!(worker.sample(0).0, 0);
}

#[test]
fn swapped_pages_come_back_as_they_were_and_the_used_ones_stay() {
    let (memory, mut worker) = guest(&Client::new());
    (0..2048).for_each(|page| write(&memory, page, page));
    assert_eq!(worker.evict(100).pages, 0, "there is no store");
    assert!(memory.set_swap(Store::new(64 << 20, None).unwrap()));
    worker.evict(1);
    let mut pages = 1;
    for _ in 0..10 {
        assert!((0..512).all(|page| holds(&memory, page, page)), "the guest uses a quarter all the time");
        pages += worker.evict(100).pages;
    }
    let gone = (0..512).filter(|page| state(&memory, *page) == State::Swapped).count();
    let in_all = memory.pmap().counts()[State::Swapped as usize];
    assert!(in_all > 500 && gone < 30, "{gone} of {in_all} were in use; {pages} were put away");
    assert!((0..2048).all(|page| holds(&memory, page, page)));
    assert_eq!((memory.pool().in_use(), memory.swap().unwrap().statistics().pages()), (2048, 0));
}

#[test]
fn whatever_goes_on_at_once_no_store_is_lost() {
    let client = Client::new();
    let (memory, mut worker) = guest(&client);
    assert!(memory.set_swap(Store::new(64 << 20, None).unwrap()));
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for writer in 0..2_u64 {
            let (memory, stop, rounds) = (&memory, &stop, &rounds);
            scope.spawn(move || {
                let pages = writer * 256..writer * 256 + 256;
                for round in 0.. {
                    for page in pages.clone() {
                        // Some pages are equal, some are zero, some never change.
                        let number = |round: u64| if page % 3 == 0 { 5 } else { round % 4 * (page % 7) };
                        if round > 0 {
                            assert!(holds(memory, page, number(round - 1)), "page {page} in round {round}");
                        }
                        write(memory, page, number(round));
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        while rounds.load(Ordering::Relaxed) < 60 {
            worker.scan(300);
            worker.evict(20);
            worker.sample(10);
            memory.remap(Ppn(rounds.load(Ordering::Relaxed) % 512)).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let shared = memory.pmap().counts()[State::Shared as usize];
    worker.release();
    assert_eq!(client.counted(), shared as i64);
    assert_eq!(memory.swap().unwrap().statistics().pages(), memory.pmap().counts()[State::Swapped as usize]);
    assert_eq!(memory.pool().in_use(), memory.pmap().counts()[State::Private as usize]);
}

#[test]
fn a_balloon_may_ask_for_anything() {
    let (memory, _) = guest(&Client::new());
    (0..20).for_each(|page| write(&memory, page, 3));
    assert_eq!(memory.balloon(&[Ppn(1), Ppn(1), Ppn(2), Ppn(1 << 40), Ppn(u64::MAX), Ppn(100)]), 3);
    assert_eq!((memory.pool().in_use(), state(&memory, 100)), (18, State::Ballooned));
    // It was a lie.
    assert!(holds(&memory, 1, 0));
    assert_eq!(memory.unballoon(&[Ppn(1), Ppn(2), Ppn(2), Ppn(u64::MAX)]), 1);
    assert_eq!(memory.discard(&[Ppn(2), Ppn(3), Ppn(100), Ppn(u64::MAX)]), 2);
    assert_eq!(state(&memory, 3), State::Zero);
    let pinned = memory.pin(Ppn(4)).unwrap();
    assert_eq!(memory.balloon(&[Ppn(4)]), 0, "somebody reads it");
    drop(pinned);
    assert_eq!(memory.balloon(&[Ppn(4)]), 1);
}

#[test]
fn pages_that_are_broken_meanwhile_are_counted_once_and_not_forgotten() {
    let client = Client::new();
    let (memory, mut worker) = guest(&client);
    for _ in 0..5 {
        for page in 0..1000 {
            write(&memory, page, 1 + page % 10);
        }
        while worker.scan(2000).shared > 0 || client.counted() == 0 {}
        assert_eq!(client.counted(), 1000);
        std::thread::scope(|scope| {
            let stores = scope.spawn(|| (0..1000).for_each(|page| write(&memory, page, 100)));
            while !stores.is_finished() {
                assert_eq!(memory.shared_pages().iter().map(|(_, count)| count).sum::<u32>(), 1000);
            }
        });
        worker.scan(1);
        assert_eq!(client.counted(), 0);
    }
}
