//! The groups of kept translations that a translator has at hand: read and checked once, then looked into block by block.
//!
//! The bytes of those that were not used for longest make way; of them stays where their blocks begin, so that a block which
//! is not kept costs no second look into the file.

use std::collections::{HashMap, VecDeque};

use super::record::Record;

/// Bytes of groups at hand. A boot of Debian looks into 25 MiB.
const MOST_BYTES: usize = 2 << 20;

/// One group.
#[derive(Debug)]
pub struct Group {
    /// The offset in its page where each block begins and where its record is, in order; the newest of one offset first.
    starts: Vec<(u16, u32)>,
    /// The records; none while they are only in the file.
    records: Vec<u8>,
    /// Looked into since its turn to go came last.
    is_wanted: bool,
    /// The look at hand is the first since the records were read.
    pub is_new: bool,
}

impl Group {
    fn new(records: Vec<u8>) -> Group {
        let mut rest = &records[..];
        let mut starts = Vec::new();
        loop {
            let at = (records.len() - rest.len()) as u32;
            let Some(offset) = Record::skip(&mut rest) else { break };
            starts.push((offset, at));
        }
        starts.sort_unstable();
        Group { starts, records, is_wanted: true, is_new: true }
    }

    /// Whether a block begins at an offset of the page.
    pub fn has(&self, offset: u16) -> bool {
        self.starts.binary_search_by_key(&offset, |(start, _)| *start).is_ok()
    }

    /// The offsets where blocks begin.
    pub fn offsets(&self) -> impl Iterator<Item = u16> {
        self.starts.iter().map(|(start, _)| *start)
    }

    /// The records of the blocks that begin at an offset, the newest first.
    pub fn records_at(&self, offset: u16) -> impl Iterator<Item = Record<'_>> {
        let first = self.starts.partition_point(|(start, _)| *start < offset);
        let starts = self.starts[first..].iter().take_while(move |(start, _)| *start == offset);
        starts.filter_map(|(_, at)| Record::take(&mut self.records.get(*at as usize..)?))
    }
}

/// The groups that were read, by their place in the file.
#[derive(Debug, Default)]
pub struct Near {
    groups: HashMap<u32, Group>,
    /// Those whose records are here, in the order in which it is their turn to go.
    turns: VecDeque<u32>,
    size: usize,
}

impl Near {
    /// What is known of a group, for a look at one offset: its records are there if it has that.
    pub fn find(&mut self, place: u32, offset: u16, read: impl FnOnce(&mut Vec<u8>)) -> Option<&Group> {
        let known = self.groups.get(&place);
        if known.is_some_and(|group| !group.has(offset)) {
            return None;
        }
        let is_new = known.is_none_or(|group| group.records.is_empty());
        if is_new {
            let mut records = Vec::new();
            read(&mut records);
            self.size += records.len();
            self.turns.push_back(place);
            self.groups.insert(place, Group::new(records));
            self.make_way(place);
        }
        let group = self.groups.get_mut(&place)?;
        (group.is_wanted, group.is_new) = (true, is_new);
        group.has(offset).then_some(group)
    }

    /// Lets go of records, but not of those of `last`.
    fn make_way(&mut self, last: u32) {
        while self.size > MOST_BYTES
            && let Some(place) = self.turns.pop_front()
            && let Some(group) = self.groups.get_mut(&place)
        {
            if place == last || std::mem::take(&mut group.is_wanted) {
                self.turns.push_back(place);
                if self.turns.len() == 1 {
                    break;
                }
            } else {
                self.size -= group.records.len();
                group.records = Vec::new();
            }
        }
    }

    /// Lets go of everything: nothing was wanted for a while.
    pub fn clear(&mut self) {
        *self = Near::default();
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::{Block, Span, write};
    use super::*;

    /// Records of blocks at some offsets, each with a byte of code for its place in the list.
    fn records(offsets: &[u16], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, offset) in offsets.iter().enumerate() {
            let block = Block {
                parts: &[Span { offset: *offset, size: 1 }],
                page: &[0; 4096],
                insns: 1,
                entry_host: 0,
                entry_slot: 0,
                start: 0,
                code: &vec![number as u8; size],
                externals: &[],
                sites: &[],
                site_uses: &[],
                map: &[],
            };
            write(&block, &mut out);
        }
        out
    }

    #[test]
    fn a_group_is_read_once_and_its_blocks_are_found_by_their_offsets() {
        let mut near = Near::default();
        let mut reads = 0;
        let mut look = |offset| {
            let group = near.find(5, offset, |out| {
                reads += 1;
                *out = records(&[0x30, 0x10, 0x30, 0x20], 4);
            })?;
            Some((group.is_new, group.records_at(offset).map(|record| record.code[0]).collect::<Vec<_>>()))
        };
        assert_eq!(look(0x10), Some((true, vec![1])));
        assert_eq!(look(0x30), Some((false, vec![0, 2])), "the newest is first");
        assert_eq!(look(0x31), None);
        assert_eq!(reads, 1);
    }

    #[test]
    fn groups_make_way_and_what_they_do_not_have_is_still_known() {
        let mut near = Near::default();
        let mut reads = Vec::new();
        let mut look = |near: &mut Near, place, offset| {
            let read = |out: &mut Vec<u8>| {
                reads.push(place);
                *out = records(&[0x10], MOST_BYTES / 3);
            };
            near.find(place, offset, read).map(|group| group.records_at(offset).count())
        };
        for place in [1, 2, 3] {
            assert_eq!(look(&mut near, place, 0x10), Some(1));
        }
        assert!(near.size <= MOST_BYTES && near.turns.len() == 2);
        for (place, offset, found) in [(1, 0x11, None), (3, 0x10, Some(1)), (1, 0x10, Some(1))] {
            assert_eq!(look(&mut near, place, offset), found);
        }
        assert_eq!(reads, [1, 2, 3, 1]);
    }

    #[test]
    fn a_damaged_group_is_read_once_and_has_nothing() {
        let mut near = Near::default();
        let mut reads = 0;
        for _ in 0..2 {
            assert!(near.find(1, 0x10, |_| reads += 1).is_none());
        }
        assert_eq!(reads, 1);
    }
}
