//! The one timer thread of a VM. Every timer of the platform is a slot with a deadline; the thread sleeps until the
//! first of them, so a VM without deadlines costs nothing.
//!
//! There are about twenty slots, so the earliest is found by looking at all of them: at that number a heap would be
//! slower, and re-arming (what guests do most) is one store.

use std::io;
use std::sync::{Arc, Condvar, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use host::clock::{Clock, precise_sleeps};
use host::counters::Counters;
use host::lock::{Rank, RankedMutex};

/// A deadline that never comes.
pub const NEVER: u64 = u64::MAX;

/// What a passed deadline is told to. Called from the timer thread, with no lock held; it may be late, and it may be
/// called for a deadline that was moved in that moment, so the target looks at the time itself.
pub trait TimerTarget: Send + Sync {
    fn expired(&self, now: u64);
}

/// The deadlines of one VM, in nanoseconds of its [`Clock`].
pub struct TimerQueue {
    clock: Clock,
    counters: Arc<Counters>,
    state: RankedMutex<State>,
    changed: Condvar,
}

struct State {
    slots: Vec<Slot>,
    /// When the thread wakes up by itself: no need to wake it for anything later. 0 while it is awake.
    asleep_until: u64,
    stopping: bool,
}

struct Slot {
    deadline: u64,
    target: Option<Weak<dyn TimerTarget>>,
}

/// One slot of the queue.
pub struct Timer {
    queue: Arc<TimerQueue>,
    slot: usize,
}

impl TimerQueue {
    #[must_use]
    pub fn new(clock: Clock, counters: Arc<Counters>) -> Arc<Self> {
        let state = State { slots: Vec::new(), asleep_until: 0, stopping: false };
        Arc::new(TimerQueue { clock, counters, state: RankedMutex::new(Rank::Timers, state), changed: Condvar::new() })
    }

    /// A new timer, unarmed and without a target.
    #[must_use]
    pub fn timer(self: &Arc<Self>) -> Timer {
        let mut state = self.state.lock();
        state.slots.push(Slot { deadline: NEVER, target: None });
        Timer { queue: Arc::clone(self), slot: state.slots.len() - 1 }
    }

    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The earliest deadline, or [`NEVER`].
    #[must_use]
    pub fn next_deadline(&self) -> u64 {
        self.state.lock().next_deadline()
    }

    /// Serve every deadline that has passed. The thread does this; tests with a manual clock call it themselves.
    pub fn run_due(&self) -> usize {
        let now = self.clock.now();
        let due = self.state.lock().take_due(now);
        self.serve(&due, now);
        due.len()
    }

    fn serve(&self, due: &[Weak<dyn TimerTarget>], now: u64) {
        self.counters.timer_expirations.add(due.len() as u64);
        for target in due.iter().filter_map(Weak::upgrade) {
            target.expired(now);
        }
    }

    fn run(&self) {
        precise_sleeps();
        let mut state = self.state.lock();
        while !state.stopping {
            let now = self.clock.now();
            let due = state.take_due(now);
            if due.is_empty() {
                let next = state.next_deadline();
                state.asleep_until = next;
                let sleep = (next != NEVER).then(|| Duration::from_nanos(next - now));
                state = state.wait(&self.changed, sleep);
                state.asleep_until = 0;
                self.counters.timer_wakeups.add(1);
            } else {
                drop(state);
                self.serve(&due, now);
                state = self.state.lock();
            }
        }
    }
}

impl State {
    fn next_deadline(&self) -> u64 {
        self.slots.iter().map(|slot| slot.deadline).min().unwrap_or(NEVER)
    }

    /// Disarm what is due at `now` and return whom to tell.
    fn take_due(&mut self, now: u64) -> Vec<Weak<dyn TimerTarget>> {
        let mut due = Vec::new();
        for slot in self.slots.iter_mut().filter(|slot| slot.deadline <= now) {
            slot.deadline = NEVER;
            due.extend(slot.target.clone());
        }
        due
    }
}

impl Timer {
    /// Say whom to tell. The queue holds no strong reference, so that a device may own its timer.
    pub fn set_target(&self, target: Weak<dyn TimerTarget>) {
        if let Some(slot) = self.queue.state.lock().slots.get_mut(self.slot) {
            slot.target = Some(target);
        }
    }

    /// Set the deadline (nanoseconds of the VM's clock), in place of an earlier one. [`NEVER`] disarms.
    pub fn arm(&self, deadline: u64) {
        let mut state = self.queue.state.lock();
        if let Some(slot) = state.slots.get_mut(self.slot) {
            slot.deadline = deadline;
        }
        // When the thread wakes anyway before this deadline, it will see it then: saves a system call.
        if deadline < state.asleep_until {
            state.asleep_until = deadline;
            drop(state);
            self.queue.changed.notify_one();
        }
    }

    pub fn disarm(&self) {
        self.arm(NEVER);
    }
}

/// The running thread. Dropping it stops the thread and waits for it.
pub struct TimerThread {
    queue: Arc<TimerQueue>,
    thread: Option<JoinHandle<()>>,
}

impl TimerThread {
    /// # Errors
    /// The system's, when it gives no thread.
    pub fn start(queue: Arc<TimerQueue>) -> io::Result<Self> {
        let twin = Arc::clone(&queue);
        let thread = thread::Builder::new().name("timers".into()).spawn(move || twin.run())?;
        Ok(TimerThread { queue, thread: Some(thread) })
    }
}

impl Drop for TimerThread {
    fn drop(&mut self) {
        self.queue.state.lock().stopping = true;
        self.queue.changed.notify_one();
        // A callback may drop the last owner of the VM: a thread cannot wait for itself.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    struct Tell(RankedMutex<Sender<u64>>);

    impl TimerTarget for Tell {
        fn expired(&self, now: u64) {
            let _ = self.0.lock().send(now);
        }
    }

    fn tell() -> (Arc<Tell>, std::sync::mpsc::Receiver<u64>) {
        let (sender, receiver) = channel();
        (Arc::new(Tell(RankedMutex::new(Rank::Device, sender))), receiver)
    }

    #[test]
    fn deadlines_come_in_order_and_once() {
        let clock = Clock::manual(1_000_000_000);
        let queue = TimerQueue::new(clock.clone(), Arc::default());
        let (target, told) = tell();
        let target: Arc<dyn TimerTarget> = target;
        let (first, second) = (queue.timer(), queue.timer());
        first.set_target(Arc::downgrade(&target));
        second.set_target(Arc::downgrade(&target));
        second.arm(200);
        first.arm(100);
        assert_eq!(queue.next_deadline(), 100);
        clock.advance(99);
        assert_eq!(queue.run_due(), 0);
        clock.advance(1);
        assert_eq!(queue.run_due(), 1);
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [100]);
        second.disarm();
        clock.advance(1000);
        assert_eq!(queue.run_due(), 0);
        assert_eq!(queue.next_deadline(), NEVER);
    }

    #[test]
    fn the_thread_wakes_for_an_earlier_deadline_and_stops() {
        let queue = TimerQueue::new(Clock::new(), Arc::default());
        let thread = TimerThread::start(Arc::clone(&queue)).unwrap();
        let (target, told) = tell();
        let target: Arc<dyn TimerTarget> = target;
        let timer = queue.timer();
        timer.set_target(Arc::downgrade(&target));
        timer.arm(queue.clock().now() + 3_600_000_000_000);
        let deadline = queue.clock().now() + 5_000_000;
        timer.arm(deadline);
        let at = told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(at >= deadline);
        drop(thread);
        // Only this function and `timer` still know the queue: the thread is gone.
        assert_eq!(Arc::strong_count(&queue), 2);
    }
}
