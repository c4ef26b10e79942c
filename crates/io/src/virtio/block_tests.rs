use std::io::{Seek, SeekFrom, Write};

use memory::GuestMemory;
use x86::Gpa;

use super::*;
use crate::virtio::queue::{Place, Progress, Queue, Rules};

const TABLE: Gpa = Gpa(0x1000);
const PLACE: Place = Place { entries: 8, descriptors: TABLE, driver: Gpa(0x2000), device: Gpa(0x3000) };
const HEADER: Gpa = Gpa(0x4000);
const DATA: Gpa = Gpa(0x5000);
const STATUS: Gpa = Gpa(0x4800);
const ALL: u64 = offered::FLUSH | offered::DISCARD | offered::WRITE_ZEROES;

fn disk() -> Disk {
    Disk { read_only: false, serial: "R0".into(), queues: 2 }
}

/// One request: its answer is the status and the length.
fn request(block: &Block, memory: &GuestMemory, kind: u32, sector: u64, data: &[(Gpa, u32, u16)]) -> (u8, u32) {
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
    let Answer::Done(written) = block.serve(0, ALL, &chain) else { panic!("a disk keeps nothing") };
    let mut status = [0];
    memory.read(STATUS, &mut status).unwrap();
    (status[0], written)
}

fn segment(first: u64, count: u32, flags: u32) -> Vec<u8> {
    [&first.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn sectors_are_written_and_read_in_a_file_and_in_memory() {
    let path = std::env::temp_dir().join(format!("ringzero-block-{}", std::process::id()));
    let mut file = File::create(&path).unwrap();
    file.write_all(&[0x11; 300 << 10]).unwrap();
    file.write_all(&[0x22; 100]).unwrap();
    for block in [Block::open(&path, disk()).unwrap(), Block::in_memory(vec![0x11; (300 << 10) + 100], disk())] {
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
    // An image that shrinks while it is in use.
    let block = Block::open(&path, disk()).unwrap();
    assert_eq!(Block::open(&path, disk()).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    assert!(Block::open(&path, Disk { read_only: true, ..disk() }).is_err(), "somebody writes to it");
    file.set_len(1024).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let memory = GuestMemory::new(1 << 20).unwrap();
    assert_eq!(request(&block, &memory, READ, 500, &[(DATA, 512, 2)]), (FAILED, 0));
    std::fs::remove_file(&path).unwrap();
    assert!(Block::open(&path, disk()).is_err());
    assert!(Block::open(&std::env::temp_dir(), Disk { read_only: true, ..disk() }).is_err(), "no file");
}

#[test]
fn zeroes_are_written_and_sectors_discarded_by_segments() {
    let block = Block::in_memory(vec![0x11; 8192], disk());
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
    assert_eq!(do_it(WRITE_ZEROES, &[segment(0, MOST_SECTORS + 1, 0)]), FAILED);
    assert_eq!(do_it(WRITE_ZEROES, &[segment(0, 0, 0)[..12].to_vec()]), FAILED, "no whole segment");
    assert_eq!(request(&block, &memory, WRITE_ZEROES, 0, &[]).0, FAILED);
    let all = match &block.medium {
        Medium::Memory(all) => all.read().unwrap().clone(),
        Medium::File(_) => unreachable!("made in memory"),
    };
    let cleared: Vec<usize> = (0..16).filter(|sector| all[512 * sector] == 0).collect();
    assert_eq!(cleared, [1, 2, 5, 7]);
}

#[test]
fn a_read_only_disk_is_never_written_and_a_serial_number_is_told() {
    let block = Block::in_memory(vec![0x11; 1024], Disk { read_only: true, ..disk() });
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
