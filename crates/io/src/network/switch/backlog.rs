//! The frames that a port has no room for yet: bounded, and divided between those who sent them, so that one sender does not
//! crowd out another.

use std::collections::{BTreeMap, VecDeque};

use crate::network::Mac;

/// Bytes that wait; who has less than its part of them may add to it in any case, so that it can be twice as much.
pub const MOST_BYTES: usize = 4 << 20;
/// What a frame takes beside its bytes, counted with them.
const OVERHEAD: usize = 256;

#[derive(Debug, Default)]
struct Lane {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

/// Frames by who sent them, which are taken in turn.
#[derive(Debug, Default)]
pub struct Backlog {
    lanes: BTreeMap<Mac, Lane>,
    bytes: usize,
    /// Whose frame was taken last.
    last: Option<Mac>,
}

impl Backlog {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Puts a frame behind those of its sender; false when there is no room for it.
    pub fn offer(&mut self, from: Mac, frame: &[&[u8]]) -> bool {
        let senders = self.lanes.len() + usize::from(!self.lanes.contains_key(&from));
        let own = self.lanes.get(&from).map_or(0, |lane| lane.bytes);
        if self.bytes >= MOST_BYTES && own >= MOST_BYTES / senders {
            return false;
        }
        let frame = frame.concat();
        let bytes = frame.len() + OVERHEAD;
        let lane = self.lanes.entry(from).or_default();
        lane.bytes += bytes;
        lane.frames.push_back(frame);
        self.bytes += bytes;
        true
    }

    /// Gives `send` frames of all senders in turn until it takes no more of them.
    pub fn drain(&mut self, mut send: impl FnMut(&[u8]) -> bool) {
        loop {
            let after = self.last.map(|last| (std::ops::Bound::Excluded(last), std::ops::Bound::Unbounded));
            let next = after.and_then(|range| self.lanes.range(range).next()).or_else(|| self.lanes.iter().next());
            let Some((&sender, _)) = next else { return };
            let Some(lane) = self.lanes.get_mut(&sender) else { return };
            let Some(frame) = lane.frames.front() else { return };
            if !send(frame) {
                return;
            }
            let bytes = frame.len() + OVERHEAD;
            lane.frames.pop_front();
            lane.bytes -= bytes;
            self.bytes -= bytes;
            self.last = Some(sender);
            if lane.frames.is_empty() {
                self.lanes.remove(&sender);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOUD: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const QUIET: Mac = Mac([2, 0, 0, 0, 0, 2]);

    #[test]
    fn who_sends_little_is_heard_among_those_who_send_much() {
        let mut backlog = Backlog::default();
        let large = vec![1; 60_000];
        let count = (0..1000).filter(|_| backlog.offer(LOUD, &[&large])).count();
        assert_eq!(count, MOST_BYTES.div_ceil(60_000 + OVERHEAD));
        // Its part is free although nothing is.
        let count = (0..1000).filter(|_| backlog.offer(QUIET, &[&[2], &large])).count();
        assert_eq!(count, (MOST_BYTES / 2).div_ceil(60_001 + OVERHEAD));
        let mut order = Vec::new();
        backlog.drain(|frame| {
            order.push(frame[0]);
            order.len() <= 6
        });
        assert_eq!(order, [1, 2, 1, 2, 1, 2, 1]);
        order.clear();
        backlog.drain(|frame| {
            order.push(frame[0]);
            true
        });
        // What was not taken comes first, and nothing is left behind.
        assert_eq!(order[..2], [1, 2]);
        assert!(backlog.is_empty() && backlog.bytes == 0);
    }
}
