use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::record::Span;
use super::*;

const VERSION: [u8; 32] = [7; 32];

/// A fresh place in the host's folder for temporary files.
fn place(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ringzero-kept-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    path
}

fn key(page: u64) -> GroupKey {
    GroupKey { page, kind: 1, system: 7 }
}

/// Notes `blocks` blocks of a page, whose code is `byte`s.
fn note(store: &Store, page: u64, blocks: u16, byte: u8) {
    let guest = [byte; 4096];
    for index in 0..blocks {
        let block = Block {
            parts: &[Span { offset: 8 * index, size: 8 }],
            page: &guest,
            insns: 1,
            entry_host: 0,
            entry_slot: 0,
            start: 0,
            code: &[byte; 64],
            externals: &[],
            sites: &[],
            site_uses: &[],
            map: &[],
        };
        store.note(key(page), &block);
    }
}

/// What a new machine finds of a page: the first code byte of each block.
fn found(place: &Path, page: u64) -> Vec<u8> {
    let store = Store::open(place, VERSION).unwrap();
    let mut records = Vec::new();
    if let Some(group) = store.find(key(page)) {
        store.read(key(page), group, &mut records);
    }
    let mut rest = &records[..];
    std::iter::from_fn(|| Record::take(&mut rest)).map(|record| record.code[0]).collect()
}

/// A place with a file of two pages.
fn filled(name: &str) -> (PathBuf, PathBuf) {
    let place = place(name);
    let store = Store::open(&place, VERSION).unwrap();
    note(&store, 1, 200, 0xa1);
    note(&store, 2, 100, 0xa2);
    store.save().unwrap();
    let file = place.join(&store.name);
    (place, file)
}

#[test]
fn what_one_machine_notes_the_next_one_finds() {
    let (place, _) = filled("next");
    assert_eq!((found(&place, 1), found(&place, 2)), (vec![0xa1; 200], vec![0xa2; 100]));
    assert_eq!(found(&place, 3), []);
    // Other content of the same page is kept beside it, the same only once.
    let store = Store::open(&place, VERSION).unwrap();
    note(&store, 1, 200, 0xa1);
    note(&store, 1, 100, 0xb1);
    store.save().unwrap();
    let blocks = found(&place, 1);
    assert_eq!(blocks.iter().filter(|byte| **byte == 0xa1).count(), 200);
    assert_eq!(blocks.iter().filter(|byte| **byte == 0xb1).count(), 100);
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn a_few_blocks_make_no_file() {
    let place = place("few");
    let store = Store::open(&place, VERSION).unwrap();
    note(&store, 1, 10, 0xa1);
    store.save().unwrap();
    assert!(!place.join(&store.name).exists());
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn more_than_memory_shall_hold_waits_in_a_file_without_a_name() {
    let place = place("spool");
    let store = Store::open(&place, VERSION).unwrap();
    let pages = (2 * IN_MEMORY / (64 * 500)) as u64;
    (0..pages).for_each(|page| note(&store, page, 500, 0xa1));
    assert!(store.fresh().spool.is_some() && store.fresh().log.len() <= IN_MEMORY);
    let names: Vec<_> = store.folder.list().unwrap().into_iter().map(|(name, _)| name).collect();
    assert!(!names.iter().any(|name| name.starts_with("spool")), "{names:?}");
    store.save().unwrap();
    assert_eq!(found(&place, 0).len() + found(&place, pages - 1).len(), 1000);
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn a_damaged_byte_anywhere_costs_its_group_or_all_but_is_never_believed() {
    let (place, file) = filled("damaged");
    let good = fs::read(&file).unwrap();
    for at in (0..good.len()).step_by(97).chain(0..120).chain(good.len() - 130..good.len()) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&file, &bad).unwrap();
        for (page, byte, blocks) in [(1, 0xa1, 200), (2, 0xa2, 100)] {
            let found = found(&place, page);
            assert!(found.is_empty() || found == vec![byte; blocks], "byte {at} was changed and believed");
        }
    }
    for size in [0, 1, 95, 96, 500, good.len() - 1] {
        fs::write(&file, &good[..size]).unwrap();
        assert!(found(&place, 1).is_empty() && found(&place, 2).is_empty(), "a file cut to {size} bytes");
    }
    // The next machine that has something to keep makes it whole again.
    let store = Store::open(&place, VERSION).unwrap();
    note(&store, 2, 300, 0xc2);
    store.save().unwrap();
    assert_eq!((found(&place, 1), found(&place, 2)), (vec![], vec![0xc2; 300]));
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn groups_that_change_places_are_refused() {
    // A writer without the secret could still move what was sealed.
    let place = place("moved");
    let store = Store::open(&place, VERSION).unwrap();
    note(&store, 1, 200, 0xa1);
    note(&store, 2, 200, 0xa2);
    store.save().unwrap();
    let file = place.join(&store.name);
    let mut bytes = fs::read(&file).unwrap();
    let half = {
        let index = u64::from_le_bytes(bytes[48..56].try_into().unwrap()) as usize;
        (index - 96) / 2
    };
    let groups = bytes[96..96 + 2 * half].to_vec();
    bytes[96..96 + half].copy_from_slice(&groups[half..]);
    bytes[96 + half..96 + 2 * half].copy_from_slice(&groups[..half]);
    fs::write(&file, &bytes).unwrap();
    assert!(found(&place, 1).is_empty() && found(&place, 2).is_empty());
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn another_version_or_secret_finds_nothing() {
    let (place, file) = filled("version");
    let other = Store::open(&place, [8; 32]).unwrap();
    assert!(other.find(key(1)).is_none());
    // Even under the other version's name.
    fs::copy(&file, place.join(&other.name)).unwrap();
    assert!(Store::open(&place, [8; 32]).unwrap().find(key(1)).is_none());
    fs::write(place.join(SECRET), [1; 32]).unwrap();
    assert!(found(&place, 1).is_empty());
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn a_file_that_others_may_use_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let (place, file) = filled("mode");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(found(&place, 1).is_empty());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(found(&place, 1).len(), 200);
    fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(Store::open(&place, VERSION).is_err());
    fs::set_permissions(&place, fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn a_writer_that_died_in_the_middle_leaves_the_old_file() {
    let (place, _) = filled("died");
    let store = Store::open(&place, VERSION).unwrap();
    // As far as a writer gets before its last step.
    let mut writer = Writer::new(store.folder.create("new").unwrap(), &store.seal.0).unwrap();
    writer.add(key(1), 0, &[0xee; 1 << 20]).unwrap();
    drop(writer);
    let half = store.folder.read("new").unwrap();
    assert!(KeptFile::open(half, &store.seal.0).is_none());
    assert_eq!(found(&place, 1).len(), 200);
    note(&store, 3, 400, 0xa3);
    store.save().unwrap();
    assert_eq!((found(&place, 1).len(), found(&place, 3).len()), (200, 400));
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn machines_that_end_at_once_keep_what_each_of_them_noted() {
    let place = place("both");
    let kept: Vec<_> = (0..4).map(|_| Arc::new(Kept::new(place.clone()))).collect();
    for (page, kept) in kept.iter().enumerate() {
        note(kept.join(VERSION).unwrap(), page as u64, 300, 0xa0);
    }
    std::thread::scope(|scope| {
        for kept in &kept {
            scope.spawn(|| kept.leave());
        }
    });
    for page in 0..4 {
        assert_eq!(found(&place, page).len(), 300, "page {page}");
    }
    fs::remove_dir_all(place).unwrap();
}

#[test]
fn what_was_not_used_for_longest_goes_first() {
    let place = place("limit");
    let store = Store::open(&place, VERSION).unwrap();
    let mut writer = Writer::new(store.folder.create("new").unwrap(), &store.seal.0).unwrap();
    let records = {
        let scratch = Store::open(&place, VERSION).unwrap();
        note(&scratch, 0, 500, 0xa1);
        let log = scratch.fresh().take_all().unwrap();
        merge(&sort_log(&log)[&key(0)], &[])
    };
    let groups = MOST_KEPT / records.len() as u64 + 10;
    for page in 0..groups {
        writer.add(key(page), page as u32, &records).unwrap();
    }
    writer.finish().unwrap();
    store.folder.rename("new", &store.name).unwrap();
    let store = Store::open(&place, VERSION).unwrap();
    // Enough to be worth it.
    (0..10).for_each(|page| note(&store, 1 << 40 | page, 500, 0xa2));
    store.save().unwrap();
    assert!(fs::metadata(place.join(&store.name)).unwrap().len() < MOST_KEPT + MOST_KEPT / 4);
    assert!(found(&place, 0).is_empty() && found(&place, groups - 1).len() == 500);
    fs::remove_dir_all(place).unwrap();
}
