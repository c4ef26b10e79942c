//! Threads that help a queue's own while its requests wait for something, a disk for example. They are made when they are
//! first needed, and end when they have not been needed for a while.

use std::sync::Condvar;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::lock::{Rank, RankedMutex};

use super::queue::MOST_KEPT;

/// How long a helper waits for more to do.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Helpers {
    most: usize,
    state: RankedMutex<State>,
    called: Condvar,
}

#[derive(Debug, Default)]
struct State {
    threads: Vec<JoinHandle<()>>,
    /// Helpers that wait, and calls that they have not heard.
    idle: usize,
    calls: usize,
}

impl Helpers {
    pub fn new(most: usize) -> Helpers {
        // The queue's own thread is one of those that may have a request.
        let most = most.min(MOST_KEPT - 1);
        Helpers { most, state: RankedMutex::new(Rank::Waiting, State::default()), called: Condvar::new() }
    }

    #[must_use]
    pub fn may_come(&self) -> bool {
        self.most > 0
    }

    /// Has a helper come: one that waits, or one that `spawn` makes.
    pub fn call(&self, spawn: impl FnOnce() -> Option<JoinHandle<()>>) {
        if self.most == 0 {
            return;
        }
        let mut state = self.state.lock();
        if state.idle > state.calls {
            state.calls += 1;
            drop(state);
            self.called.notify_one();
            return;
        }
        state.threads.retain(|thread| !thread.is_finished());
        if state.threads.len() < self.most {
            state.threads.extend(spawn());
        }
    }

    /// Called by a helper that has nothing to do: waits until it is called; false when it shall end.
    pub fn wait_for_call(&self, is_over: impl Fn() -> bool) -> bool {
        let mut state = self.state.lock();
        state.idle += 1;
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if state.calls > 0 || is_over() || left.is_zero() {
                break;
            }
            state = state.wait(&self.called, Some(left));
        }
        state.idle -= 1;
        let is_called = state.calls > 0;
        state.calls -= usize::from(is_called);
        is_called && !is_over()
    }

    /// Has all that wait look whether it is over.
    pub fn wake_all(&self) {
        drop(self.state.lock());
        self.called.notify_all();
    }

    /// Waits for all to end, when it is over.
    pub fn join(&self) {
        let threads = std::mem::take(&mut self.state.lock().threads);
        for thread in threads {
            // As with the queue's own thread.
            let _ = thread.join();
        }
    }
}
