//! Requests that each device might take for one of its own.

use super::machine::{Kind, Random};

fn mostly_below(random: &mut Random, limit: u64) -> u64 {
    if random.below(8) == 0 { random.number() } else { random.below(limit) }
}

fn any_bytes(random: &mut Random, most: u64) -> Vec<u8> {
    (0..random.below(most)).map(|_| random.number() as u8).collect()
}

/// What the device reads, for this queue.
pub fn any(kind: Kind, queue: u16, random: &mut Random) -> Vec<u8> {
    if random.below(10) == 0 {
        return any_bytes(random, 200);
    }
    match kind {
        Kind::Entropy => Vec::new(),
        Kind::Balloon => balloon(random),
        Kind::Block => block(random),
        Kind::Network => network(queue, random),
        Kind::Console => console(queue, random),
        Kind::Vsock => vsock(queue, random),
        Kind::Folder => folder(random),
    }
}

fn balloon(random: &mut Random) -> Vec<u8> {
    // Not the pages of the rings, so that there is a device left to be tested.
    (0..random.below(64)).flat_map(|_| (64 + mostly_below(random, 200) as u32).to_le_bytes()).collect()
}

fn block(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::from((mostly_below(random, 15) as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(mostly_below(random, 2100).to_le_bytes());
    for _ in 0..random.below(4) {
        bytes.extend(mostly_below(random, 2100).to_le_bytes());
        bytes.extend((mostly_below(random, 100) as u32).to_le_bytes());
        bytes.extend((random.below(3) as u32).to_le_bytes());
    }
    if random.below(2) == 0 {
        bytes.resize(16 + 512 * (1 + random.below(8) as usize), 0x77);
    }
    bytes
}

fn network(queue: u16, random: &mut Random) -> Vec<u8> {
    if queue == 2 {
        // Class and command, and what may be tables of addresses.
        let mut bytes = vec![random.below(3) as u8, random.below(4) as u8];
        for _ in 0..random.below(3) {
            let count = mostly_below(random, 3) as u32;
            bytes.extend(count.to_le_bytes());
            bytes.resize(bytes.len() + 6 * (count as usize % 4), 2);
        }
        return bytes;
    }
    // A header that asks for a sum or for pieces, and a frame: IPv4 or IPv6 with TCP or UDP, or none of those.
    let mut bytes = vec![random.below(3) as u8, [0, 0, 1, 3, 4, 5][random.below(6) as usize]];
    for limit in [80, 1500, 60, 20, 2] {
        bytes.extend((mostly_below(random, limit) as u16).to_le_bytes());
    }
    bytes.extend([[0xff; 6], [2, 0, 0, 0, 0, 1]].concat());
    bytes.extend([[8, 0], [0x86, 0xdd], [8, 6]][random.below(3) as usize]);
    bytes.push([0x45, 0x60, 0x4f][random.below(3) as usize]);
    bytes.extend(any_bytes(random, 2500));
    if bytes.len() > 40 {
        bytes[35] = [6, 17, 1][random.below(3) as usize];
    }
    bytes
}

fn console(queue: u16, random: &mut Random) -> Vec<u8> {
    if queue != 3 {
        return any_bytes(random, 3000);
    }
    let mut bytes = Vec::from((mostly_below(random, 3) as u32).to_le_bytes());
    bytes.extend((mostly_below(random, 9) as u16).to_le_bytes());
    bytes.extend((random.below(2) as u16).to_le_bytes());
    bytes
}

fn vsock(queue: u16, random: &mut Random) -> Vec<u8> {
    if queue != 1 {
        return Vec::new();
    }
    let size = random.below(3000);
    let mut bytes = [3_u64.to_le_bytes(), 2_u64.to_le_bytes()].concat();
    // Ports of the host's own connections begin at 2^30.
    let base = if random.below(2) == 0 { 0 } else { 1 << 30 };
    for word in [random.below(4) as u32, base + random.below(4) as u32, mostly_below(random, size + 1) as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend((mostly_below(random, 9) as u16).to_le_bytes());
    for word in [random.below(4), mostly_below(random, 1 << 18), mostly_below(random, 1 << 16)] {
        bytes.extend((word as u32).to_le_bytes());
    }
    bytes.resize(44 + size as usize, 9);
    bytes
}

/// Operation, words of 4 bytes before its names, and its names; the first word or two are mostly a node's or handle's number.
const SHAPES: [(u32, usize, usize); 24] = [
    (1, 0, 1),
    (2, 2, 0),
    (3, 4, 0),
    (5, 0, 0),
    (6, 0, 2),
    (8, 4, 1),
    (9, 2, 1),
    (10, 0, 1),
    (11, 0, 1),
    (12, 2, 2),
    (13, 2, 1),
    (14, 2, 0),
    (15, 10, 0),
    (17, 0, 0),
    (18, 6, 0),
    (20, 4, 0),
    (26, 4, 0),
    (27, 2, 0),
    (28, 10, 0),
    (29, 6, 0),
    (35, 4, 1),
    (42, 6, 0),
    (44, 10, 0),
    (45, 4, 2),
];

fn folder(random: &mut Random) -> Vec<u8> {
    const NAMES: [&str; 12] = ["a", "b", "c", "file", "a", "file", "new", "..", ".", "", "a/b", "../x"];
    let (mut op, words, names) = SHAPES[random.below(SHAPES.len() as u64) as usize];
    let mut arguments = Vec::new();
    for word in 0..words {
        // Numbers have 8 bytes, of which the upper half is mostly nothing; sizes come late.
        let limit = if word >= 4 { 5000 } else { 7 };
        let value = match word {
            0 if random.below(2) == 0 => 1,
            1 | 3 => mostly_below(random, 1),
            _ => mostly_below(random, limit),
        };
        arguments.extend((value as u32).to_le_bytes());
    }
    for _ in 0..names {
        arguments.extend(NAMES[random.below(NAMES.len() as u64) as usize].as_bytes());
        arguments.push(0);
    }
    match random.below(12) {
        0 => op = mostly_below(random, 52) as u32,
        1 => arguments.truncate(random.below(arguments.len() as u64 + 1) as usize),
        2 => {
            op = 16;
            arguments = [random.below(6).to_le_bytes(), random.below(9000).to_le_bytes()].concat();
            arguments.extend((random.below(500) as u32).to_le_bytes());
            arguments.resize(40 + random.below(600) as usize, 1);
        }
        _ => {}
    }
    // Of SETATTR and FALLOCATE: no files that fill the disk of whoever runs this.
    if matches!(op, 4 | 43) {
        arguments.clear();
    }
    let mut bytes = Vec::from((40 + arguments.len() as u32).to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend(random.number().to_le_bytes());
    // The root, and those that it was told of first.
    bytes.extend(if random.below(2) == 0 { 1 } else { mostly_below(random, 8) }.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(arguments);
    bytes
}
