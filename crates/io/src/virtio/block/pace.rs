//! A disk that may only be so fast: a request that comes too early stays in its queue, and a thread has the queue looked at
//! when it is time. Nobody else waits, and nothing runs meanwhile.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, OnceLock, Weak};
use std::thread;
use std::time::Instant;

use host::lock::{Rank, RankedMutex};

use crate::disk::limit::{Limit, Rates};
use crate::virtio::line::Line;

#[derive(Debug)]
pub struct Pace {
    /// There is a limit: without one, this is all that is looked at.
    is_limited: AtomicBool,
    limit: RankedMutex<Limit>,
    alarm: Arc<Alarm>,
}

/// What the thread sleeps on; the thread is there from the first request that has to wait.
#[derive(Debug)]
struct Alarm {
    line: OnceLock<Weak<Line>>,
    state: RankedMutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    due: BTreeSet<(Instant, u16)>,
    has_thread: bool,
    is_over: bool,
}

impl Pace {
    pub fn new(rates: Rates) -> Pace {
        Pace {
            is_limited: AtomicBool::new(rates != Rates::default()),
            limit: RankedMutex::new(Rank::Waiting, Limit::new(rates, Instant::now())),
            alarm: Arc::new(Alarm {
                line: OnceLock::new(),
                state: RankedMutex::new(Rank::Waiting, State::default()),
                changed: Condvar::new(),
            }),
        }
    }

    pub fn connect(&self, line: &Arc<Line>) {
        let _ = self.alarm.line.set(Arc::downgrade(line));
    }

    pub fn set(&self, rates: Rates) {
        *self.limit.lock() = Limit::new(rates, Instant::now());
        self.is_limited.store(rates != Rates::default(), Ordering::Release);
        // Those who wait may not have to any more.
        let due = std::mem::take(&mut self.alarm.state.lock().due);
        self.alarm.look_at(due.into_iter().map(|(_, queue)| queue));
    }

    /// Whether a request of a queue comes too early; then the queue is looked at when it does not.
    pub fn delays(&self, queue: u16, bytes: u64) -> bool {
        if !self.is_limited.load(Ordering::Acquire) {
            return false;
        }
        let now = Instant::now();
        let wait = self.limit.lock().admit(bytes, now);
        // Without an alarm, a request that waits would wait for ever.
        !wait.is_zero() && Alarm::set(&self.alarm, now + wait, queue)
    }

    pub fn end(&self) {
        self.alarm.state.lock().is_over = true;
        self.alarm.changed.notify_all();
    }
}

impl Alarm {
    fn look_at(&self, queues: impl Iterator<Item = u16>) {
        if let Some(line) = self.line.get().and_then(Weak::upgrade) {
            queues.for_each(|queue| line.look_at(queue));
        }
    }

    /// Rings at a time for a queue; false when there is nobody who could.
    fn set(alarm: &Arc<Alarm>, at: Instant, queue: u16) -> bool {
        let mut state = alarm.state.lock();
        if !state.has_thread {
            let twin = Arc::clone(alarm);
            if thread::Builder::new().name("rz-disk-pace".into()).spawn(move || twin.run()).is_err() {
                return false;
            }
            state.has_thread = true;
        }
        state.due.insert((at, queue));
        drop(state);
        alarm.changed.notify_one();
        true
    }

    fn run(&self) {
        let mut state = self.state.lock();
        while !state.is_over {
            let now = Instant::now();
            let later = state.due.split_off(&(now, u16::MAX));
            let due = std::mem::replace(&mut state.due, later);
            if !due.is_empty() {
                drop(state);
                self.look_at(due.into_iter().map(|(_, queue)| queue));
                state = self.state.lock();
                continue;
            }
            let next = state.due.first().map(|(at, _)| at.saturating_duration_since(now));
            state = state.wait(&self.changed, next);
        }
    }
}
