use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::AtomicI32;

use memory::GuestMemory;
use x86::Gpa;

use super::requests::{DISCARD, FLUSH, GET_SERIAL, MAY_UNMAP, READ, WRITE, WRITE_ZEROES};
use super::*;
use crate::disk::memory::Memory;
use crate::disk::raw::Raw;
use crate::disk::{Buffers, Bytes, Cache};
use crate::virtio::queue::{Place, Progress, Queue, Rules};

const TABLE: Gpa = Gpa(0x1000);
const PLACE: Place = Place { entries: 8, descriptors: TABLE, driver: Gpa(0x2000), device: Gpa(0x3000) };
const HEADER: Gpa = Gpa(0x4000);
const DATA: Gpa = Gpa(0x5000);
const STATUS: Gpa = Gpa(0x4800);
const ALL: u64 = offered::FLUSH | offered::DISCARD | offered::WRITE_ZEROES;

fn disk() -> Disk {
    Disk { serial: "R0".into(), queues: 2, ..Disk::default() }
}

fn open(path: &Path, cache: Cache) -> io::Result<Block> {
    Ok(Block::new(Box::new(Raw::open(path, false, cache)?), disk()))
}

fn in_memory(bytes: Vec<u8>) -> Block {
    Block::new(Box::new(Memory::new(bytes)), disk())
}

/// What the disk makes of one request.
fn answer(block: &Block, memory: &GuestMemory, kind: u32, sector: u64, data: &[(Gpa, u32, u16)]) -> Answer {
    let mut header = Vec::from(kind.to_le_bytes());
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    memory.write(HEADER, &header).unwrap();
    memory.write(STATUS, &[0xee]).unwrap();
    let mut list = vec![(HEADER, 16, 0)];
    list.extend(data);
    list.push((STATUS, 1, 2));
    for (index, (address, size, flags)) in list.iter().enumerate() {
        let is_last = index + 1 == list.len();
        let mut bytes = Vec::from(address.0.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend((flags | u16::from(!is_last)).to_le_bytes());
        bytes.extend((index as u16 + 1).to_le_bytes());
        memory.write(TABLE.add(16 * index as u64), &bytes).unwrap();
    }
    memory.write(Gpa(0x2002), &[1, 0, 0, 0]).unwrap();
    let mut queue = Queue::new(memory, PLACE, Rules::default(), Progress::default()).unwrap();
    let chain = queue.pop(memory).unwrap().unwrap();
    block.serve(0, ALL, &chain)
}

/// One request that is done: its status and its length.
fn request(block: &Block, memory: &GuestMemory, kind: u32, sector: u64, data: &[(Gpa, u32, u16)]) -> (u8, u32) {
    let Answer::Done(written) = answer(block, memory, kind, sector, data) else { panic!("it is kept") };
    let mut status = [0];
    memory.read(STATUS, &mut status).unwrap();
    (status[0], written)
}

fn segment(first: u64, count: u32, flags: u32) -> Vec<u8> {
    [&first.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn path_of(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("ringzero-block-{name}-{}", std::process::id()))
}

#[test]
fn sectors_are_written_and_read_in_a_file_and_in_memory() {
    let path = path_of("rw");
    let mut file = File::create(&path).unwrap();
    file.write_all(&[0x11; 300 << 10]).unwrap();
    file.write_all(&[0x22; 100]).unwrap();
    let caches = [Cache::WriteBack, Cache::WriteThrough, Cache::None, Cache::Unsafe];
    let opened = caches.iter().map(|cache| {
        file.seek(SeekFrom::Start(599 * 512)).unwrap();
        file.write_all(&[0x11; 512]).unwrap();
        open(&path, *cache).unwrap()
    });
    for block in opened.chain([in_memory(vec![0x11; (300 << 10) + 100])]) {
        let memory = GuestMemory::new(1 << 20).unwrap();
        assert_eq!(block.config()[..8], 600_u64.to_le_bytes(), "whole sectors");
        memory.write(DATA, &[7; 1024]).unwrap();
        assert_eq!(request(&block, &memory, WRITE, 599, &[(DATA, 512, 0)]), (OK, 1));
        assert_eq!(request(&block, &memory, WRITE, 599, &[(DATA, 1024, 0)]), (FAILED, 1), "past the end");
        assert_eq!(request(&block, &memory, WRITE, u64::MAX, &[(DATA, 512, 0)]), (FAILED, 1));
        assert_eq!(request(&block, &memory, WRITE, 0, &[(DATA, 100, 0)]), (FAILED, 1), "no whole sector");
        assert_eq!(request(&block, &memory, FLUSH, 0, &[]), (OK, 1));
        // All of it, in two buffers that are no whole number of pieces.
        let list = [(Gpa(0x1_0000), 199 * 1024 + 100, 2), (Gpa(0x8_0000), 101 * 1024 - 100, 2)];
        assert_eq!(request(&block, &memory, READ, 0, &list), (OK, (300 << 10) + 1));
        let mut bytes = vec![0; 513];
        memory.read(Gpa(0x8_0000 + 101 * 1024 - 100 - 513), &mut bytes).unwrap();
        assert_eq!((bytes[0], &bytes[1..]), (0x11, &[7; 512][..]));
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_disk_is_one_machines_and_what_has_gone_from_its_file_cannot_be_read() {
    let path = path_of("one");
    std::fs::write(&path, vec![1; 300 << 10]).unwrap();
    let block = open(&path, Cache::WriteBack).unwrap();
    assert_eq!(open(&path, Cache::WriteBack).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    assert!(Raw::open(&path, true, Cache::WriteBack).is_err(), "somebody writes to it");
    File::options().write(true).open(&path).unwrap().set_len(1024).unwrap();
    let memory = GuestMemory::new(1 << 20).unwrap();
    assert_eq!(request(&block, &memory, READ, 500, &[(DATA, 512, 2)]), (FAILED, 0));
    assert!(block.stats().contains(&("failed", 1)));
    block.end();
    open(&path, Cache::WriteBack).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(open(&path, Cache::WriteBack).is_err());
    assert!(Raw::open(&std::env::temp_dir(), true, Cache::WriteBack).is_err(), "no file");
}

#[test]
fn zeroes_are_written_and_sectors_discarded_by_segments() {
    let path = path_of("zeroes");
    std::fs::write(&path, vec![0x11; 8192]).unwrap();
    for block in [open(&path, Cache::WriteBack).unwrap(), in_memory(vec![0x11; 8192])] {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let do_it = |kind, segments: &[Vec<u8>]| {
            let bytes = segments.concat();
            memory.write(DATA, &bytes).unwrap();
            request(&block, &memory, kind, 0, &[(DATA, bytes.len() as u32, 0)]).0
        };
        assert_eq!(do_it(WRITE_ZEROES, &[segment(1, 2, 1), segment(5, 1, 0)]), OK);
        assert_eq!(do_it(DISCARD, &[segment(7, 1, 0)]), OK);
        assert_eq!(do_it(DISCARD, &[segment(0, 1, 1)]), UNSUPPORTED, "a flag that discards do not have");
        assert_eq!(do_it(WRITE_ZEROES, &[segment(0, 1, 2)]), UNSUPPORTED);
        assert_eq!(do_it(WRITE_ZEROES, &[segment(15, 2, 0)]), FAILED, "past the end");
        assert_eq!(do_it(WRITE_ZEROES, &[segment(u64::MAX, 1, 0)]), FAILED);
        assert_eq!(do_it(WRITE_ZEROES, &[segment(0, MOST_ZEROED + 1, 0)]), FAILED);
        assert_eq!(do_it(DISCARD, &[segment(3, 0, 0)]), OK, "nothing");
        assert_eq!(do_it(WRITE_ZEROES, &[segment(0, 0, 0)[..12].to_vec()]), FAILED, "no whole segment");
        assert_eq!(request(&block, &memory, WRITE_ZEROES, 0, &[]).0, FAILED);
        let mut all = vec![0; 8192];
        block.medium.read(0, 8192, &Bytes::new(&mut all), 0).unwrap();
        let cleared: Vec<usize> = (0..16).filter(|sector| all[512 * sector] == 0).collect();
        assert_eq!(cleared, [1, 2, 5, 7]);
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_discard_shrinks_the_file() {
    use std::os::unix::fs::MetadataExt;
    let path = path_of("discard");
    std::fs::write(&path, vec![0x11; 1 << 20]).unwrap();
    let block = open(&path, Cache::WriteBack).unwrap();
    let blocks = || std::fs::metadata(&path).unwrap().blocks();
    let full = blocks();
    let memory = GuestMemory::new(1 << 20).unwrap();
    memory.write(DATA, &segment(0, 1024, 0)).unwrap();
    assert_eq!(request(&block, &memory, DISCARD, 0, &[(DATA, 16, 0)]), (OK, 1));
    let half = blocks();
    memory.write(DATA, &segment(1024, 512, MAY_UNMAP)).unwrap();
    assert_eq!(request(&block, &memory, WRITE_ZEROES, 0, &[(DATA, 16, 0)]), (OK, 1));
    assert!(half <= full - 1000 && blocks() <= half - 500, "{full} {half} {}", blocks());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    std::fs::remove_file(&path).unwrap();
}

/// A medium that fails as it is told.
struct Failing(Arc<AtomicI32>);

impl Medium for Failing {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read(&self, _at: u64, _size: u64, _into: &dyn Buffers, _to: u64) -> io::Result<()> {
        self.flush()
    }

    fn write(&self, _at: u64, _size: u64, _of: &dyn Buffers, _from: u64) -> io::Result<()> {
        self.flush()
    }

    fn write_zeroes(&self, _at: u64, _size: u64, _may_unmap: bool) -> io::Result<()> {
        self.flush()
    }

    fn discard(&self, _at: u64, _size: u64) -> io::Result<()> {
        self.flush()
    }

    fn flush(&self) -> io::Result<()> {
        match self.0.load(Ordering::SeqCst) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

const NO_SPACE: i32 = 28;
const INPUT_OUTPUT: i32 = 5;

#[test]
fn a_full_disk_pauses_the_machine_and_other_errors_are_the_guests_unless_the_operator_wants_it_otherwise() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    for (on_error, when_full, otherwise) in
        [(OnError::Auto, true, false), (OnError::Report, false, false), (OnError::Pause, true, true)]
    {
        for (error, is_kept) in [(NO_SPACE, when_full), (INPUT_OUTPUT, otherwise)] {
            let told = Arc::new(AtomicI32::new(error));
            let block = Block::new(Box::new(Failing(Arc::clone(&told))), Disk { on_error, ..disk() });
            let pauses = Arc::new(AtomicI32::new(0));
            let counted = Arc::clone(&pauses);
            block.connect_pause(Box::new(move || {
                counted.fetch_add(1, Ordering::SeqCst);
            }));
            for _ in 0..2 {
                let answer = answer(&block, &memory, WRITE, 0, &[(DATA, 512, 0)]);
                assert_eq!(answer == Answer::Kept, is_kept, "{on_error:?} {error}");
            }
            assert_eq!(pauses.load(Ordering::SeqCst), i32::from(is_kept), "once");
            assert_eq!(block.trouble().is_some(), is_kept);
            told.store(0, Ordering::SeqCst);
            block.retry();
            assert_eq!(block.trouble(), None);
            assert_eq!(request(&block, &memory, WRITE, 0, &[(DATA, 512, 0)]), (OK, 1));
        }
    }
}

#[test]
fn a_flush_that_failed_is_never_believed_again() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let told = Arc::new(AtomicI32::new(NO_SPACE));
    let block = Block::new(Box::new(Failing(Arc::clone(&told))), Disk { on_error: OnError::Pause, ..disk() });
    assert_eq!(request(&block, &memory, FLUSH, 0, &[]), (FAILED, 1));
    told.store(0, Ordering::SeqCst);
    assert_eq!(request(&block, &memory, WRITE, 0, &[(DATA, 512, 0)]), (OK, 1));
    assert_eq!(request(&block, &memory, FLUSH, 0, &[]), (FAILED, 1));
    // A machine that goes on elsewhere knows it, too.
    let other = in_memory(vec![0; 4096]);
    other.restore(&block.state());
    assert_eq!(request(&other, &memory, FLUSH, 0, &[]), (FAILED, 1));
}

#[test]
fn a_limited_disk_keeps_what_comes_too_early() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    // What the first takes too much is paid for by those after it, for ten minutes.
    let rates = Rates { operations: 0, bytes: 1 };
    let block = Block::new(Box::new(Memory::new(vec![0; 4096])), Disk { rates, ..disk() });
    let read = || answer(&block, &memory, READ, 0, &[(DATA, 512, 2)]);
    assert_ne!(read(), Answer::Kept);
    assert_eq!(read(), Answer::Kept);
    block.set_rates(Rates::default());
    assert_ne!(read(), Answer::Kept);
    assert!(block.stats().contains(&("delayed", 1)));
}

#[test]
fn a_read_only_disk_is_never_written_and_a_serial_number_is_told() {
    let block = Block::new(Box::new(Memory::new(vec![0x11; 1024])), Disk { read_only: true, ..disk() });
    assert_eq!(block.features() & (offered::READ_ONLY | offered::WRITE_ZEROES), offered::READ_ONLY);
    let memory = GuestMemory::new(1 << 20).unwrap();
    memory.write(DATA, &segment(0, 1, 0)).unwrap();
    for (kind, size) in [(WRITE, 512), (WRITE_ZEROES, 16), (DISCARD, 16)] {
        assert_eq!(request(&block, &memory, kind, 0, &[(DATA, size, 0)]), (FAILED, 1));
    }
    assert_eq!(request(&block, &memory, READ, 1, &[(DATA, 512, 2)]), (OK, 513));
    assert_eq!(request(&block, &memory, GET_SERIAL, 0, &[(DATA, 20, 2)]), (OK, 21));
    let mut serial = [0xff; 4];
    memory.read(DATA, &mut serial).unwrap();
    assert_eq!(&serial, b"R0\0\0");
    assert_eq!(request(&block, &memory, GET_SERIAL, 0, &[(DATA, 1, 2)]), (OK, 2));
    assert_eq!(request(&block, &memory, 99, 0, &[]), (UNSUPPORTED, 1));
    assert_eq!(request(&block, &memory, READ, 2, &[(DATA, 512, 2)]), (FAILED, 0));
}
