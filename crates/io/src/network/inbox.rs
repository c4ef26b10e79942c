//! The frames that wait for one guest.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use host::lock::{Rank, RankedMutex};

use super::frame::Frame;
use crate::virtio::line::Line;

/// From so many bytes on nobody who can wait offers more.
const ENOUGH: usize = 1 << 20;
/// What waits at most: frames of those who cannot wait are lost beyond it.
const MOST_BYTES: usize = 4 << 20;
const MOST_FRAMES: usize = 4096;
/// What a frame takes beside its bytes, counted with them.
const OVERHEAD: usize = 256;

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Somebody was told that there is no room, and waits to be told otherwise.
    is_awaited: bool,
}

#[derive(Debug)]
pub struct Inbox {
    waiting: RankedMutex<Waiting>,
    line: OnceLock<Arc<Line>>,
    /// The queue that takes the frames.
    queue: u16,
    lost: AtomicU64,
}

impl Inbox {
    #[must_use]
    pub fn new(queue: u16) -> Arc<Inbox> {
        let waiting = RankedMutex::new(Rank::Frames, Waiting::default());
        Arc::new(Inbox { waiting, line: OnceLock::new(), queue, lost: AtomicU64::new(0) })
    }

    pub fn connect(&self, line: &Arc<Line>) {
        let _ = self.line.set(Arc::clone(line));
    }

    /// Puts a frame in, for the guest to get; false where there is no room, or nobody to take it: it is lost.
    pub fn offer(&self, frame: Frame) -> bool {
        // Without a driver nobody takes them, and one that comes later wants none of them.
        let line = self.line.get();
        if !line.map_or(cfg!(any(test, feature = "testing")), |line| line.has_driver()) {
            return false;
        }
        let mut waiting = self.waiting.lock();
        if waiting.bytes >= MOST_BYTES || waiting.frames.len() >= MOST_FRAMES {
            drop(waiting);
            self.lost.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let was_empty = waiting.frames.is_empty();
        waiting.bytes += frame.len() + OVERHEAD;
        waiting.frames.push_back(frame);
        drop(waiting);
        if let Some(line) = line.filter(|_| was_empty) {
            line.look_at(self.queue);
        }
        true
    }

    /// Whether who can wait should go on. If not, the wire's `has_room` is called when that changes.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let mut waiting = self.waiting.lock();
        let has_room = waiting.bytes < ENOUGH;
        waiting.is_awaited |= !has_room;
        has_room
    }

    /// The next frame, and whether somebody waits for the room that there is now.
    pub fn take(&self) -> Option<(Frame, bool)> {
        let mut waiting = self.waiting.lock();
        let frame = waiting.frames.pop_front()?;
        waiting.bytes -= frame.len() + OVERHEAD;
        let tell = waiting.is_awaited && waiting.bytes < ENOUGH / 2;
        waiting.is_awaited &= !tell;
        Some((frame, tell))
    }

    /// A frame that was taken could not be given to the guest yet.
    pub fn put_back(&self, frame: Frame) {
        let mut waiting = self.waiting.lock();
        waiting.bytes += frame.len() + OVERHEAD;
        waiting.frames.push_front(frame);
    }

    pub fn clear(&self) {
        *self.waiting.lock() = Waiting::default();
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.lock().frames.is_empty()
    }

    /// How many frames were lost because the guest took none.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
