use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use host::map::memfd;
use x86::PAGE_SIZE;

use super::store::Store;
use super::{Full, Lost, Page, Slot};
use crate::random::Random;

const MIB: u64 = 1 << 20;
const SIZE: usize = PAGE_SIZE as usize;

/// A page of so many random bytes, and the rest of one.
fn page(random: &mut Random, bytes: usize) -> Page {
    let mut page = [random.next() as u8; SIZE];
    random.fill(&mut page[..bytes]);
    page
}

/// A store with a file that the test has in hand, too.
fn store(compressed: u64, pages: u64) -> (Store, File) {
    let file = memfd(c"swap-test", 0).unwrap();
    let store = Store::with_file(compressed, Some((file.try_clone().unwrap(), pages * PAGE_SIZE))).unwrap();
    (store, file)
}

#[test]
fn pages_come_back_from_memory_and_from_the_file() {
    let mut random = Random(1);
    let (store, file) = store(MIB, 64);
    let pages = [page(&mut random, 0), page(&mut random, 1000), page(&mut random, SIZE)];
    let slots = pages.map(|page| store.put(&page).unwrap());
    let before = store.statistics();
    assert_eq!((before.compressed, before.in_file, before.incompressible), (2, 1, 1));
    assert!(before.compressed_bytes < 1200, "{before:?}");
    assert_eq!(store.spill(1).unwrap(), 1, "the oldest");
    let after = store.statistics();
    assert_eq!((after.compressed, after.in_file, after.spills), (1, 2, 1));
    for (slot, page) in slots.into_iter().zip(&pages) {
        assert_eq!(store.get(slot).unwrap(), *page);
        store.free(slot);
        assert!(matches!(store.get(slot), Err(Lost::Empty(_))));
    }
    let end = store.statistics();
    assert_eq!((end.compressed, end.compressed_bytes, end.in_file), (0, 0, 0));
    assert_eq!((end.memory_loads, end.file_loads), (1, 2));
    assert_eq!(file.metadata().unwrap().len(), 0, "the disk has its blocks back");
}

#[test]
fn nothing_of_a_page_can_be_read_in_the_file() {
    let (store, file) = store(MIB, 64);
    let page: Page = std::array::from_fn(|at| b"a guest's secret "[at % 17]);
    let slots = [store.put(&page).unwrap(), store.put(&page).unwrap()];
    store.spill(2).unwrap();
    let mut blocks = [[0; SIZE]; 2];
    file.read_exact_at(&mut blocks[0], 0).unwrap();
    file.read_exact_at(&mut blocks[1], PAGE_SIZE).unwrap();
    assert!(blocks.iter().all(|block| !block.windows(6).any(|bytes| bytes == b"secret")));
    assert_ne!(blocks[0], blocks[1], "equal pages do not look equal");
    store.free(slots[0]);
    store.put(&page).unwrap();
    store.spill(1).unwrap();
    let mut again = [0; SIZE];
    file.read_exact_at(&mut again, 0).unwrap();
    assert_ne!(again, blocks[0], "a block that is used again has another nonce");
}

#[test]
fn damage_at_every_kind_of_place_is_found() {
    let mut random = Random(2);
    let (store, file) = store(MIB, 64);
    let pages: Vec<Page> = (0..6).map(|_| page(&mut random, SIZE)).collect();
    let slots: Vec<Slot> = pages.iter().map(|page| store.put(page).unwrap()).collect();
    let whole = |number: usize| assert_eq!(store.get(slots[number]).unwrap(), pages[number]);
    let is_damaged = |number: usize| assert!(matches!(store.get(slots[number]), Err(Lost::Damaged { .. })));
    let block = |number: u64| {
        let mut block = [0; SIZE];
        file.read_exact_at(&mut block, number * PAGE_SIZE).unwrap();
        block
    };
    let blocks: Vec<Page> = (0..6).map(block).collect();
    // A bit, at either end and somewhere.
    for (at, bit) in [(0, 0), (SIZE - 1, 7), (random.below(PAGE_SIZE) as usize, 3)] {
        let mut bad = blocks[0];
        bad[at] ^= 1 << bit;
        file.write_all_at(&bad, 0).unwrap();
        is_damaged(0);
        file.write_all_at(&blocks[0], 0).unwrap();
        whole(0);
    }
    // Two blocks exchanged, and one in the place of another.
    file.write_all_at(&blocks[2], PAGE_SIZE).unwrap();
    file.write_all_at(&blocks[1], 2 * PAGE_SIZE).unwrap();
    is_damaged(1);
    is_damaged(2);
    file.write_all_at(&blocks[2], 2 * PAGE_SIZE).unwrap();
    whole(2);
    // Zeroes, as a disk gives them that lost a write.
    file.write_all_at(&[0; SIZE], 3 * PAGE_SIZE).unwrap();
    is_damaged(3);
    // What was there before, though it was sealed by the same key for the same block.
    store.free(slots[4]);
    let newer = page(&mut random, SIZE);
    let slot = store.put(&newer).unwrap();
    assert_eq!(store.get(slot).unwrap(), newer);
    file.write_all_at(&blocks[4], 4 * PAGE_SIZE).unwrap();
    assert!(matches!(store.get(slot), Err(Lost::Damaged { block: 4 })));
    // Cut off within a block, and before it.
    for length in [6 * PAGE_SIZE - 1, 5 * PAGE_SIZE] {
        file.set_len(length).unwrap();
        assert!(matches!(store.get(slots[5]), Err(Lost::CutOff { block: 5 })));
    }
    assert_eq!(store.statistics().lost, 3 + 2 + 1 + 1 + 2);
    whole(0);
}

#[test]
fn a_full_store_refuses_and_loses_nothing() {
    let mut random = Random(3);
    let (store, _file) = store(MIB, 32);
    let mut kept = Vec::new();
    let refusal = loop {
        let page = page(&mut random, 2000);
        match store.put(&page) {
            Ok(slot) => kept.push((slot, page)),
            Err(full) => break full,
        }
    };
    assert!(matches!(refusal, Full::File(bytes) if bytes == 32 * PAGE_SIZE), "{refusal}");
    let full = store.statistics();
    assert_eq!((full.in_file, full.refused), (32, 1));
    assert!(full.compressed_bytes <= MIB && full.compressed_bytes > MIB * 9 / 10, "{full:?}");
    for (slot, page) in kept.drain(..kept.len() / 2) {
        assert_eq!(store.get(slot).unwrap(), page);
        store.free(slot);
    }
    let page = page(&mut random, 2000);
    kept.push((store.put(&page).unwrap(), page));
    assert!(kept.iter().all(|(slot, page)| store.get(*slot).unwrap() == *page));
}

#[test]
fn without_a_file_there_is_only_memory() {
    let mut random = Random(4);
    let store = Store::new(2 * MIB, None).unwrap();
    assert!(matches!(store.put(&page(&mut random, SIZE)), Err(Full::Incompressible)));
    assert!(matches!(store.spill(1), Err(Full::NoFile)));
    let mut slots = Vec::new();
    let refusal = loop {
        match store.put(&page(&mut random, 1000)) {
            Ok(slot) => slots.push(slot),
            Err(full) => break full,
        }
    };
    assert!(matches!(refusal, Full::NoFile) && slots.len() > 1500, "{refusal} after {}", slots.len());
}

#[test]
fn a_disk_without_room_refuses_and_pages_stay_in_memory() {
    // A device of Linux on which every write ends as on a full disk.
    let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let store = Store::with_file(MIB, Some((full, MIB))).unwrap();
    let mut random = Random(5);
    let pages: Vec<Page> = (0..20).map(|_| page(&mut random, 500)).collect();
    let slots: Vec<Slot> = pages.iter().map(|page| store.put(page).unwrap()).collect();
    for _ in 0..3 {
        let Err(Full::Host(error)) = store.spill(5) else { panic!("a full disk took a page") };
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        assert!(matches!(store.put(&page(&mut random, SIZE)), Err(Full::Host(_))));
    }
    assert!(slots.iter().zip(&pages).all(|(slot, page)| store.get(*slot).unwrap() == *page));
    let after = store.statistics();
    assert_eq!((after.compressed, after.in_file, after.spills), (20, 0, 0));
}

#[test]
fn wrong_slots_hold_nothing() {
    let store = Store::new(MIB, None).unwrap();
    let slot = store.put(&[1; SIZE]).unwrap();
    for wrong in [Slot(slot.0 + 1), Slot(slot.0 + (1 << 28)), Slot(u64::MAX)] {
        assert!(matches!(store.get(wrong), Err(Lost::Empty(_))));
        store.free(wrong);
    }
    store.free(slot);
    store.free(slot);
    let next = [(); 3].map(|()| store.put(&[2; SIZE]).unwrap());
    assert!(next[0] != next[1] && next[1] != next[2] && next[0] != next[2], "freed once, given out once");
    assert!(!next.contains(&slot), "a freed slot stays one that holds nothing");
    assert!(matches!(store.get(slot), Err(Lost::Empty(_))));
    store.free(slot);
    assert!(next.iter().all(|slot| slot.0 < 1 << 40 && store.get(*slot).unwrap() == [2; SIZE]));
}

#[test]
fn it_does_what_a_map_does() {
    let mut random = Random(6);
    let (store, file) = store(MIB / 2, 300);
    let mut model: HashMap<Slot, Page> = HashMap::new();
    for step in 0..30_000 {
        let any = |random: &mut Random| model.keys().nth(random.below(model.len().max(1) as u64) as usize).copied();
        match random.below(10) {
            0..4 => {
                // Mostly what compresses well, as in guests.
                let bytes = [0, 300, 1000, 2500, SIZE][random.below(5) as usize];
                let page = page(&mut random, bytes);
                if let Ok(slot) = store.put(&page) {
                    assert!(model.insert(slot, page).is_none(), "slot {slot:?} was given out twice");
                }
            }
            4..7 => {
                let Some(slot) = any(&mut random) else { continue };
                assert!(store.get(slot).unwrap() == model[&slot], "step {step}");
            }
            7..9 => {
                let Some(slot) = any(&mut random) else { continue };
                store.free(slot);
                model.remove(&slot);
            }
            _ => drop(store.spill(random.below(8))),
        }
    }
    assert!(model.len() > 100 && model.iter().all(|(slot, page)| store.get(*slot).unwrap() == *page));
    let now = store.statistics();
    assert_eq!(now.compressed + now.in_file, model.len() as u64);
    assert!(now.spills > 1000 && now.refused > 100 && now.in_file <= 300, "{now:?}");
    model.keys().for_each(|slot| store.free(*slot));
    let end = store.statistics();
    assert_eq!((end.compressed, end.in_file, end.compressed_bytes, end.lost), (0, 0, 0, 0));
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn threads_put_get_free_and_spill_at_once() {
    let (store, _file) = store(MIB, 4096);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|number| {
                let store = &store;
                scope.spawn(move || {
                    let mut random = Random(100 + number);
                    let mut kept: Vec<(Slot, Page)> = Vec::new();
                    for _ in 0..4000 {
                        if kept.len() < 200 || random.below(2) == 0 {
                            let bytes = random.below(3000) as usize;
                            let page = page(&mut random, bytes);
                            kept.push((store.put(&page).unwrap(), page));
                        } else {
                            let (slot, page) = kept.swap_remove(random.below(kept.len() as u64) as usize);
                            assert!(store.get(slot).unwrap() == page);
                            store.free(slot);
                        }
                    }
                    assert!(kept.iter().all(|(slot, page)| store.get(*slot).unwrap() == *page));
                })
            })
            .collect();
        let spiller = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                store.spill(4).unwrap();
                store.trim();
            }
        });
        // A worker that failed must not leave the spiller running.
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        done.store(true, Ordering::Relaxed);
        spiller.join().unwrap();
        assert!(results.iter().all(Result::is_ok));
    });
    assert_eq!(store.statistics().lost, 0);
}
