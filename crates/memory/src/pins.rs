//! Pins: pages that somebody outside the processors reads or writes just now, a device's thread or the operator. A pinned page
//! stays where it is; and whoever took a page away knows, after a while, that nobody is at work any more who found it before.

use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How often a waiter looks: a copy of some pages takes no longer.
const LOOK: Duration = Duration::from_micros(50);

#[derive(Debug)]
pub struct Pins {
    /// By the place of a page: how many have pinned it.
    pages: Box<[AtomicU16]>,
    /// Which of the two counts those who come now are counted in.
    side: AtomicUsize,
    /// How many are at work.
    counts: [AtomicU64; 2],
}

/// One pin, until it is dropped.
#[derive(Debug)]
pub struct Pin<'a> {
    pins: &'a Pins,
    page: usize,
    side: usize,
}

impl Pins {
    pub fn new(pages: u64) -> Pins {
        Pins {
            pages: (0..pages).map(|_| AtomicU16::new(0)).collect(),
            side: AtomicUsize::new(0),
            counts: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }

    /// Pins a page, by its place. Only then may it be asked where the page is.
    pub fn pin(&self, page: usize) -> Pin<'_> {
        let side = loop {
            let side = self.side.load(Ordering::SeqCst);
            self.counts[side].fetch_add(1, Ordering::SeqCst);
            if self.side.load(Ordering::SeqCst) == side {
                break side;
            }
            // It changed meanwhile: nobody may wait for us, or wait for others only.
            self.counts[side].fetch_sub(1, Ordering::SeqCst);
        };
        self.pages[page].fetch_add(1, Ordering::SeqCst);
        Pin { pins: self, page, side }
    }

    pub fn is_pinned(&self, page: usize) -> bool {
        self.pages[page].load(Ordering::SeqCst) != 0
    }

    /// Waits until everybody who is at work now has ended; false when that takes longer than `patience`. Only one may call it
    /// at a time.
    pub fn wait(&self, patience: Duration) -> bool {
        let old = self.side.load(Ordering::SeqCst);
        let began = Instant::now();
        let is_over = |side: usize| {
            while self.counts[side].load(Ordering::SeqCst) != 0 {
                if began.elapsed() > patience {
                    return false;
                }
                std::thread::sleep(LOOK);
            }
            true
        };
        // Of the other side some may be left from a wait that was given up.
        if !is_over(1 - old) {
            return false;
        }
        self.side.store(1 - old, Ordering::SeqCst);
        is_over(old)
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.pins.pages[self.page].fetch_sub(1, Ordering::SeqCst);
        self.pins.counts[self.side].fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_waits_for_those_before_and_not_for_those_after() {
        let pins = Pins::new(4);
        let old = pins.pin(1);
        assert!(pins.is_pinned(1) && !pins.is_pinned(2));
        assert!(!pins.wait(Duration::from_millis(1)));
        let new = pins.pin(2);
        assert!(!pins.wait(Duration::from_millis(1)), "the old one is there still");
        drop(old);
        drop(new);
        assert!(pins.wait(Duration::ZERO));
        std::thread::scope(|scope| {
            let late = scope.spawn(|| (0..20_000).for_each(|_| drop(pins.pin(3))));
            while !late.is_finished() {
                assert!(pins.wait(Duration::from_secs(20)));
            }
        });
        assert!(!pins.is_pinned(3));
    }
}
