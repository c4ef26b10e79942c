//! Compressed pages in memory: a log of records, in segments. A record goes to the end of the log; a freed one leaves a hole,
//! and when holes add up, the emptiest segment is moved to the end of the log and its memory goes back to the system. So
//! holes are never more than a quarter of what lives and a few segments, whatever is freed in whatever order; a heap with size classes
//! has no such bound.
//!
//! The cost of that bound: a segment that is moved has at least its part of the holes, a fifth, so that for each byte that is
//! freed at most four are moved.

use std::io;

use host::arena::Arena;

const SEGMENT: usize = 64 << 10;
/// Owner, and length with a bit for the dead.
const HEADER: usize = 6;
const DEAD: u16 = 1 << 15;
/// Segments beyond the bound: one is filled while another is emptied.
const SPARE: usize = 2;
/// Segments of holes that are not worth a move.
const TOLERATED: usize = 2;

/// Where a record is: the offset of its header in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(u64);

#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    /// Bytes from its beginning that are written; 0 when it is free.
    used: u32,
    /// Bytes of these that belong to live records.
    live: u32,
}

#[derive(Debug)]
pub struct Log {
    arena: Arena,
    segments: Vec<Segment>,
    /// The segment that grows.
    head: Option<usize>,
    /// Segments that may be in use between two calls.
    bound: usize,
    in_use: usize,
    /// Sums over all segments.
    used: usize,
    live: usize,
}

impl Log {
    /// A log that takes at most `bytes` of memory, rounded up to whole segments.
    pub fn new(bytes: u64) -> io::Result<Log> {
        let too_many = || io::Error::new(io::ErrorKind::InvalidInput, "more memory than there are addresses");
        let bound = usize::try_from(bytes).map_err(|_| too_many())?.div_ceil(SEGMENT);
        let size = (bound + SPARE).checked_mul(SEGMENT).ok_or_else(too_many)?;
        let arena = Arena::new(size)?;
        Ok(Log { arena, segments: Vec::new(), head: None, bound, in_use: 0, used: 0, live: 0 })
    }

    /// Adds a record; `moved` hears of records that had to move for it. `None` when the bound is reached.
    pub fn append(&mut self, owner: u32, bytes: &[u8], mut moved: impl FnMut(u32, Place)) -> Option<Place> {
        debug_assert!(bytes.len() < usize::from(DEAD), "the length has no room for a longer record");
        let size = HEADER + bytes.len();
        while self.in_use >= self.bound && !self.head_has(size) {
            // Near the bound more is moved for each byte that is gained, but not without end.
            if self.used - self.live < (self.used / 16).max(SEGMENT) || !self.clean(&mut moved) {
                return None;
            }
        }
        self.write(owner, bytes)
    }

    #[must_use]
    pub fn bytes(&self, place: Place) -> &[u8] {
        let (_, length, _) = self.header(place.0 as usize);
        let start = place.0 as usize + HEADER;
        &self.arena.bytes()[start..start + length]
    }

    /// Frees a record; `moved` hears of others that moved because of it.
    pub fn free(&mut self, place: Place, mut moved: impl FnMut(u32, Place)) {
        let at = place.0 as usize;
        let (_, length, dead) = self.header(at);
        debug_assert!(!dead, "freed twice");
        let mark = (length as u16 | DEAD).to_le_bytes();
        self.arena.bytes_mut()[at + 4..at + 6].copy_from_slice(&mark);
        let size = HEADER + length;
        let number = at / SEGMENT;
        self.segments[number].live -= size as u32;
        self.live -= size;
        if self.segments[number].live == 0 {
            self.give_back(number);
        }
        while self.used - self.live > self.live / 4 + TOLERATED * SEGMENT {
            if !self.clean(&mut moved) {
                break;
            }
        }
    }

    /// Bytes of live records, with their headers.
    #[cfg(test)]
    pub fn live(&self) -> u64 {
        self.live as u64
    }

    /// Bytes of memory that the log takes.
    #[must_use]
    pub fn footprint(&self) -> u64 {
        // A segment takes memory only up to where it is written.
        self.used as u64
    }

    fn header(&self, at: usize) -> (u32, usize, bool) {
        let bytes = &self.arena.bytes()[at..at + HEADER];
        let length = u16::from_le_bytes([bytes[4], bytes[5]]);
        let owner = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        (owner, usize::from(length & !DEAD), length & DEAD != 0)
    }

    fn head_has(&self, size: usize) -> bool {
        self.head.is_some_and(|head| self.segments[head].used as usize + size <= SEGMENT)
    }

    /// Writes a record at the end of the log; `None` when not even a spare segment is left.
    fn write(&mut self, owner: u32, bytes: &[u8]) -> Option<Place> {
        let size = HEADER + bytes.len();
        if !self.head_has(size) {
            let free = self.segments.iter().position(|segment| segment.used == 0);
            let head = match free {
                Some(free) => free,
                None if self.segments.len() < self.bound + SPARE => {
                    self.segments.push(Segment::default());
                    self.segments.len() - 1
                }
                None => return None,
            };
            self.head = Some(head);
            self.in_use += 1;
        }
        let head = self.head?;
        let segment = &mut self.segments[head];
        let at = head * SEGMENT + segment.used as usize;
        segment.used += size as u32;
        segment.live += size as u32;
        self.used += size;
        self.live += size;
        let room = &mut self.arena.bytes_mut()[at..at + size];
        room[..4].copy_from_slice(&owner.to_le_bytes());
        room[4..HEADER].copy_from_slice(&(bytes.len() as u16).to_le_bytes());
        room[HEADER..].copy_from_slice(bytes);
        Some(Place(at as u64))
    }

    /// Moves what lives in the emptiest segment to the end of the log; false when no segment has anything to gain.
    fn clean(&mut self, moved: &mut impl FnMut(u32, Place)) -> bool {
        let emptiest = (0..self.segments.len())
            .filter(|number| self.head != Some(*number) && self.segments[*number].used > self.segments[*number].live)
            .min_by_key(|number| self.segments[*number].live);
        // Where the head alone has holes, it is closed and goes first.
        let Some(victim) = emptiest.or_else(|| self.head.take_if(|_| self.used > self.live)) else { return false };
        let start = victim * SEGMENT;
        let end = start + self.segments[victim].used as usize;
        let mut at = start;
        let mut record = Vec::new();
        while at < end {
            let (owner, length, dead) = self.header(at);
            if !dead {
                record.clear();
                record.extend_from_slice(&self.arena.bytes()[at + HEADER..at + HEADER + length]);
                let Some(place) = self.write(owner, &record) else { return false };
                moved(owner, place);
                let size = HEADER + length;
                self.segments[victim].live -= size as u32;
                self.live -= size;
                let mark = (length as u16 | DEAD).to_le_bytes();
                self.arena.bytes_mut()[at + 4..at + 6].copy_from_slice(&mark);
            }
            at += HEADER + length;
        }
        self.give_back(victim);
        true
    }

    /// Returns the memory of a segment in which nothing lives.
    fn give_back(&mut self, number: usize) {
        debug_assert_eq!(self.segments[number].live, 0);
        self.used -= self.segments[number].used as usize;
        self.segments[number] = Segment::default();
        self.in_use -= 1;
        if self.head == Some(number) {
            self.head = None;
        }
        self.arena.give_back(number * SEGMENT..(number + 1) * SEGMENT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use std::collections::HashMap;

    /// What a log should hold: for each owner its record, and where the log says that it is.
    #[derive(Default)]
    struct Model(HashMap<u32, (Place, Vec<u8>)>);

    impl Model {
        fn put(&mut self, log: &mut Log, owner: u32, bytes: Vec<u8>) -> bool {
            let places = &mut self.0;
            let place = log.append(owner, &bytes, |owner, place| places.get_mut(&owner).unwrap().0 = place);
            place.map(|place| self.0.insert(owner, (place, bytes))).is_some()
        }

        fn free(&mut self, log: &mut Log, owner: u32) {
            let place = self.0.remove(&owner).unwrap().0;
            let places = &mut self.0;
            log.free(place, |owner, place| places.get_mut(&owner).unwrap().0 = place);
        }

        fn check(&self, log: &Log) {
            assert!(self.0.values().all(|(place, bytes)| log.bytes(*place) == bytes));
            let live: usize = self.0.values().map(|(_, bytes)| bytes.len() + HEADER).sum();
            assert_eq!(log.live(), live as u64);
            let bound = live + live / 4 + (TOLERATED + 1) * SEGMENT;
            assert!(log.footprint() <= bound as u64, "{} bytes for {live}", log.footprint());
        }
    }

    #[test]
    fn holes_stay_within_their_bound_whatever_is_freed() {
        let mut random = Random(1);
        let mut log = Log::new(1 << 30).unwrap();
        let mut model = Model::default();
        let mut next = 0;
        for round in 0..40 {
            // Grows and shrinks in turn, down to almost nothing.
            let target = [4000, 300, 2500, 10][round % 4];
            while model.0.len() < target {
                let size = random.below(3000) as usize;
                assert!(model.put(&mut log, next, vec![next as u8; size]));
                next += 1;
            }
            while model.0.len() > target {
                let victim = *model.0.keys().nth(random.below(model.0.len() as u64) as usize).unwrap();
                model.free(&mut log, victim);
            }
            model.check(&log);
        }
    }

    #[test]
    fn a_full_log_takes_again_what_was_freed() {
        let mut random = Random(2);
        let bound = 4 << 20;
        let mut log = Log::new(bound).unwrap();
        let mut model = Model::default();
        let mut next = 0;
        for _ in 0..30 {
            while model.put(&mut log, next, vec![next as u8; random.below(3000) as usize]) {
                next += 1;
            }
            assert!(log.footprint() <= bound && log.live() > bound * 9 / 10, "{} of {bound}", log.live());
            model.check(&log);
            for _ in 0..random.below(model.0.len() as u64) {
                let victim = *model.0.keys().nth(random.below(model.0.len() as u64) as usize).unwrap();
                model.free(&mut log, victim);
            }
            model.check(&log);
        }
        for owner in model.0.keys().copied().collect::<Vec<_>>() {
            model.free(&mut log, owner);
        }
        assert_eq!((log.live(), log.footprint(), log.in_use), (0, 0, 0));
    }
}
