use std::path::PathBuf;
use std::process::Command;

use super::super::chain::{self, Format, Link};
use super::super::memory::Memory;
use super::*;

const SIZE: u64 = 12 << 20;

/// A file of its own, gone with this.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let path = std::env::temp_dir().join(format!("ringzero-qcow2-{}-{name}", std::process::id()));
        std::fs::write(&path, b"").unwrap();
        Place(path)
    }

    fn image(name: &str, size: u64, backing: Option<&str>) -> Place {
        let place = Place::new(name);
        create(&place.file(), size, backing.map(|name| (name.into(), "raw".into()))).unwrap();
        place
    }

    fn file(&self) -> HostFile {
        HostFile::open(&self.0, false, Cache::WriteBack).unwrap()
    }

    fn open(&self, backing: Option<Vec<u8>>) -> Qcow2 {
        let backing = backing.map(|bytes| Box::new(Memory::new(bytes)) as Box<dyn Medium>);
        Qcow2::open(&self.0, false, Cache::WriteBack, backing).unwrap()
    }

    /// Our own check, and QEMU's where it is installed.
    fn assert_clean(&self) {
        let report = Qcow2::check(&self.file(), false).unwrap();
        assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.sentences);
        // What lies behind it is in memory, where QEMU does not find it.
        let path = self.0.display();
        let image =
            format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{path}"}},"backing":null}}"#);
        if let Ok(done) = Command::new("qemu-img").args(["check", "-U", &image]).output() {
            assert!(done.status.success(), "{done:?}");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn read(disk: &dyn Medium, at: u64, size: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; size as usize];
    disk.read(at, size, &Bytes::new(&mut bytes), 0).unwrap();
    bytes
}

fn write(disk: &dyn Medium, at: u64, bytes: &[u8]) {
    disk.write(at, bytes.len() as u64, &Bytes::new(&mut bytes.to_vec()), 0).unwrap();
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Random requests, and what the disk must then hold.
fn work(disk: &dyn Medium, model: &mut [u8], random: &mut Random, rounds: u32) {
    for _ in 0..rounds {
        let most = if random.below(8) == 0 { 2 << 20 } else { 100 << 10 };
        let at = random.below(SIZE / 512) * 512;
        let size = (random.below(most / 512) + 1).min((SIZE - at) / 512) * 512;
        let part = &mut model[at as usize..(at + size) as usize];
        match random.below(10) {
            0..5 => {
                let seed = random.below(255) as u8;
                part.iter_mut().enumerate().for_each(|(index, byte)| *byte = seed ^ (index / 512) as u8);
                write(disk, at, part);
            }
            5 => {
                part.fill(0);
                disk.write_zeroes(at, size, random.below(2) == 0).unwrap();
            }
            6 => {
                disk.discard(at, size).unwrap();
                // It may read as anything, and then stays so.
                part.copy_from_slice(&read(disk, at, size));
            }
            7 => disk.flush().unwrap(),
            _ => assert!(read(disk, at, size) == part, "{at:#x} {size:#x}"),
        }
    }
    assert!(read(disk, 0, SIZE) == model);
}

#[test]
fn a_disk_holds_what_was_written_and_its_image_is_clean() {
    for is_backed in [false, true] {
        let backing = is_backed.then(|| (0..7_u64 << 20).map(|at| (at >> 9) as u8 | 1).collect::<Vec<u8>>());
        let place = Place::image(&format!("work{is_backed}"), SIZE, is_backed.then_some("base"));
        let mut model = backing.clone().unwrap_or_default();
        model.resize(SIZE as usize, 0);
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for _ in 0..3 {
            let disk = place.open(backing.clone());
            assert!(read(&disk, 0, SIZE) == model);
            work(&disk, &mut model, &mut random, 150);
            drop(disk);
            place.assert_clean();
        }
    }
}

#[test]
fn threads_that_write_side_by_side_lose_nothing_to_one_another() {
    let place = Place::image("threads", SIZE, None);
    let disk = place.open(None);
    // Sectors of the same clusters.
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let disk = &disk;
            scope.spawn(move || {
                for sector in (thread..SIZE / 512).step_by(4).filter(|sector| sector % 64 < 8) {
                    write(disk, sector * 512, &[thread as u8 + 1; 512]);
                    if sector % 1024 < 4 {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    for sector in (0..SIZE / 512).filter(|sector| sector % 64 < 8) {
        assert!(read(&disk, sector * 512, 512) == [(sector % 4) as u8 + 1; 512], "{sector}");
    }
    drop(disk);
    place.assert_clean();
}

#[test]
fn a_discard_gives_space_back_that_is_used_again_after_a_flush() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::image("discard", SIZE, None);
    let disk = place.open(None);
    let blocks = || std::fs::metadata(&place.0).unwrap().blocks();
    let length = || std::fs::metadata(&place.0).unwrap().len();
    write(&disk, 0, &vec![1; 4 << 20]);
    let (full, long) = (blocks(), length());
    disk.discard(0, 4 << 20).unwrap();
    assert!(blocks() < full - (4 << 20) / 512 + 400);
    assert!(read(&disk, 0, 4096) == [0; 4096]);
    write(&disk, 4 << 20, &vec![2; 1 << 20]);
    assert!(length() > long, "nothing was flushed yet");
    disk.flush().unwrap();
    let long = length();
    write(&disk, 8 << 20, &vec![3; 3 << 20]);
    assert_eq!(length(), long);
    drop(disk);
    place.assert_clean();
}

#[test]
fn snapshots_keep_the_disk_as_it_was() {
    let place = Place::image("snapshots", SIZE, None);
    let mut random = Random(77);
    let mut model = vec![0; SIZE as usize];
    let disk = place.open(None);
    work(&disk, &mut model, &mut random, 60);
    disk.take_snapshot("first").unwrap();
    assert!(disk.take_snapshot("first").is_err());
    let first = model.clone();
    drop(disk);
    place.assert_clean();
    let disk = place.open(None);
    work(&disk, &mut model, &mut random, 60);
    disk.take_snapshot("second").unwrap();
    let second = model.clone();
    work(&disk, &mut model, &mut random, 60);
    drop(disk);
    place.assert_clean();
    let disk = place.open(None);
    let names: Vec<String> = disk.snapshots().unwrap().into_iter().map(|one| one.name).collect();
    assert_eq!(names, ["first", "second"]);
    disk.apply_snapshot("first").unwrap();
    assert!(read(&disk, 0, SIZE) == first);
    disk.delete_snapshot("first").unwrap();
    let mut model = first;
    work(&disk, &mut model, &mut random, 40);
    disk.apply_snapshot("second").unwrap();
    assert!(read(&disk, 0, SIZE) == second);
    disk.delete_snapshot("second").unwrap();
    assert!(disk.delete_snapshot("second").is_err());
    drop(disk);
    place.assert_clean();
}

#[test]
fn a_disk_is_made_larger_and_smaller() {
    let place = Place::image("resize", SIZE, Some("base"));
    let backing = vec![9; 16 << 20];
    let mut disk = place.open(Some(backing.clone()));
    write(&disk, SIZE - 4096, &[1; 4096]);
    assert!(disk.resize(SIZE + 100).is_err());
    disk.resize(2 << 30).unwrap();
    assert!(read(&disk, SIZE - 4096, 8192) == [vec![1; 4096], vec![0; 4096]].concat());
    write(&disk, (2 << 30) - 4096, &[2; 4096]);
    disk.resize(1 << 20).unwrap();
    disk.resize(SIZE).unwrap();
    assert!(read(&disk, 1 << 20, 1 << 20) == vec![0; 1 << 20]);
    assert!(read(&disk, 0, 4096) == [9; 4096]);
    drop(disk);
    place.assert_clean();
}

#[test]
fn what_an_image_has_goes_into_what_is_behind_it() {
    let base = Place::image("commit-base", SIZE, None);
    let top = Place::image("commit-top", SIZE, Some("base"));
    let (mut random, mut model) = (Random(99), vec![0; SIZE as usize]);
    work(&base.open(None), &mut model, &mut random, 60);
    let links = [&top, &base].map(|place| Link { path: place.0.clone(), format: Format::Qcow2 });
    let disk = chain::open_qcow2(&links, false, Cache::WriteBack, false).unwrap();
    work(&disk, &mut model, &mut random, 100);
    assert!(disk.commit(&mut |_, _| false).is_err(), "stopped");
    disk.commit(&mut |_, _| true).unwrap();
    assert!(read(&disk, 0, SIZE) == model);
    drop(disk);
    assert!(read(&base.open(None), 0, SIZE) == model);
    base.assert_clean();
    top.assert_clean();
    // Over it, for as long as a machine runs.
    let disk = chain::over(&links, Cache::WriteBack).unwrap();
    let before = model.clone();
    work(&*disk, &mut model, &mut random, 60);
    drop(disk);
    let disk = chain::open(&links, true, Cache::WriteBack).unwrap();
    assert!(read(&*disk, 0, SIZE) == before);
    let copied = Memory::new(vec![0; SIZE as usize]);
    chain::copy(&*disk, &copied, &mut |_, _| true).unwrap();
    assert!(read(&copied, 0, SIZE) == before);
}

#[test]
fn an_image_whose_writer_came_to_a_sudden_end_is_repaired() {
    let place = Place::image("dirty", SIZE, None);
    let disk = place.open(None);
    write(&disk, 0, &vec![5; 3 << 20]);
    // As if it was killed: nothing of it runs any more.
    std::mem::forget(disk);
    let file = HostFile::own(std::fs::File::options().read(true).write(true).open(&place.0).unwrap());
    let header = Header::read(&file).unwrap();
    assert_ne!(header.incompatible & header::DIRTY, 0);
    // What the host's end may leave: clusters that are used and not counted, and the other way round.
    let mut tables = Tables::read(&file, header.clone()).unwrap();
    let first = tables::offset(tables.entries(&file, 0..1).unwrap()[0]) >> header.cluster_bits;
    tables.set_refcount(&file, first, 0).unwrap();
    tables.set_refcount(&file, first + 500, 3).unwrap();
    let report = Qcow2::check(&file, false).unwrap();
    assert_eq!((report.errors, report.leaks), (1, 1), "{:?}", report.sentences);
    let disk = Qcow2::with_file(file, None).unwrap();
    write(&disk, 4 << 20, &vec![6; 1 << 20]);
    assert!(read(&disk, 0, 3 << 20) == vec![5; 3 << 20]);
    disk.close();
    drop(disk);
    let file = HostFile::own(std::fs::File::options().read(true).write(true).open(&place.0).unwrap());
    assert_eq!(Header::read(&file).unwrap().incompatible, 0);
    let report = Qcow2::check(&file, false).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.sentences);
}

#[test]
fn damaged_images_are_errors_and_never_more() {
    let place = Place::image("valid", SIZE, None);
    let disk = place.open(None);
    write(&disk, 0, &vec![1; 200 << 10]);
    disk.take_snapshot("one").unwrap();
    write(&disk, 5 << 20, &vec![2; 100 << 10]);
    drop(disk);
    let valid = std::fs::read(&place.0).unwrap();
    // Where numbers are: the header, and the tables.
    let header = Header::parse(&valid, valid.len() as u64).unwrap();
    let l2 = u64::from_be_bytes(valid[header.l1_offset as usize..][..8].try_into().unwrap()) & !COPIED;
    let places = [0, header.l1_offset, header.refcounts_offset, 2 << 16, l2, header.snapshots_offset];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut refused = 0;
    for round in 0..400 {
        let mut bytes = valid.clone();
        for _ in 0..=random.below(3) {
            let start = places[random.below(places.len() as u64) as usize] as usize;
            let at = start + random.below(112) as usize;
            match random.below(4) {
                0 => bytes[at] = random.below(256) as u8,
                1 => bytes[at] ^= 1 << random.below(8),
                2 => bytes[at..at + 4].fill(0xff),
                _ => bytes[at..at + 8].copy_from_slice(&(random.below(64) << 15).to_be_bytes()),
            }
        }
        if round % 10 == 0 {
            bytes.truncate(random.below(valid.len() as u64) as usize);
        }
        let file = host::nameless::nameless_file(&std::env::temp_dir()).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
        let again = || HostFile::own(file.try_clone().unwrap());
        // What they give does not matter; that they end does.
        let _ = Qcow2::check(&again(), false);
        let Ok(disk) = Qcow2::with_file(again(), None) else {
            refused += 1;
            continue;
        };
        let mut part = vec![0; 64 << 10];
        for at in (0..disk.size().min(SIZE)).step_by(1 << 20) {
            let size = (64 << 10).min(disk.size() - at);
            let _ = disk.read(at, size, &Bytes::new(&mut part), 0);
            let _ = disk.write(at, size, &Bytes::new(&mut part), 0);
            let _ = disk.discard(at, size);
        }
        let _ = disk.flush();
        let _ = disk.apply_snapshot("one");
        let _ = disk.delete_snapshot("one");
        disk.close();
        drop(disk);
        let _ = Qcow2::check(&again(), true);
    }
    assert!((40..400).contains(&refused), "{refused} of 400 were refused at once");
}

#[test]
fn what_is_behind_an_image_is_given_or_it_is_not_opened() {
    let place = Place::image("chain", SIZE, Some("/etc/shadow"));
    let error = Qcow2::open(&place.0, false, Cache::WriteBack, None).unwrap_err();
    assert!(error.to_string().contains("/etc/shadow"), "{error}");
    let header = Header::read(&place.file()).unwrap();
    assert_eq!(header.backing, Some(("/etc/shadow".into(), Some("raw".into()))));
    let alone = Place::image("alone", SIZE, None);
    let backing = Box::new(Memory::new(vec![0; 512]));
    assert!(Qcow2::open(&alone.0, false, Cache::WriteBack, Some(backing)).is_err());
}

#[test]
fn what_qemu_made_is_read_and_what_we_made_it_reads() {
    let qemu = |words: &[&str]| Command::new("qemu-img").args(words).output().ok().filter(|done| done.status.success());
    if qemu(&["--version"]).is_none() {
        eprintln!("skipped: no qemu-img (apt: qemu-utils)");
        return;
    }
    let raw = Place::new("raw");
    let mut content = vec![0; SIZE as usize];
    let mut random = Random(5);
    for at in (0..content.len() - 4096).step_by(24 << 10) {
        content[at..at + 4096].fill(random.below(256) as u8);
        content[at + 100] = random.below(256) as u8;
    }
    std::fs::write(&raw.0, &content).unwrap();
    let path = |place: &Place| place.0.to_str().unwrap().to_string();
    for options in [
        &["-o", "compat=1.1"][..],
        &["-o", "compat=0.10"],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-o", "cluster_size=4096"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
    ] {
        let made = Place::new("made");
        let mut words = vec!["convert", "-f", "raw", "-O", "qcow2"];
        words.extend(options);
        let (from, to) = (path(&raw), path(&made));
        words.extend([from.as_str(), to.as_str()]);
        assert!(qemu(&words).is_some(), "{options:?}");
        let disk = made.open(None);
        assert!(read(&disk, 0, SIZE) == content, "{options:?}");
        let mut model = content.clone();
        work(&disk, &mut model, &mut random, 80);
        drop(disk);
        made.assert_clean();
        // And back.
        let back = Place::new("back");
        let (from, to) = (path(&made), path(&back));
        assert!(qemu(&["convert", "-f", "qcow2", "-O", "raw", &from, &to]).is_some());
        assert!(std::fs::read(&back.0).unwrap() == model, "{options:?}");
    }
}
