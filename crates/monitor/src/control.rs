//! How a machine is told to stand still, go on, or end, and how it answers: shared by the operator's calls, the
//! processors' threads and the devices.
//!
//! The order of locks: an operator's call holds [`Rank::Machine`] while it looks at a machine that stands still, so that
//! no processor can go on meanwhile. A processor's thread holds its own [`Rank::Processor`] while it runs, and has let
//! it go when it asks here whether it may go on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, OnceLock};
use std::time::{Duration, Instant};

use host::lock::{Rank, RankedGuard, RankedMutex};

use crate::Error;
use crate::kick::Kicker;

/// Something to do once when the machine ends, whoever ended it: let go those who wait for a device that never answers.
pub type AtEnd = Box<dyn Fn() + Send + Sync>;

pub struct Control {
    kickers: Vec<Kicker>,
    /// Why the machine ends; the first reason counts.
    reason: OnceLock<String>,
    /// A processor has to come to [`Control::stand`] before it runs another instruction.
    ordered: AtomicBool,
    state: RankedMutex<State>,
    changed: Condvar,
    at_end: OnceLock<AtEnd>,
}

#[derive(Default)]
struct State {
    started: bool,
    /// Threads of processors that have not ended.
    alive: usize,
    /// How many of them stand still.
    standing: usize,
    /// How many want them to stand still: the operator's pause counts once, every call that works on a still machine
    /// counts while it lasts.
    holds: usize,
    paused: bool,
}

impl State {
    fn is_still(&self) -> bool {
        self.standing == self.alive && (self.alive == 0 || self.holds > 0)
    }
}

impl Control {
    #[must_use]
    pub fn new(kickers: Vec<Kicker>) -> Control {
        Control {
            kickers,
            reason: OnceLock::new(),
            ordered: AtomicBool::new(false),
            state: RankedMutex::new(Rank::Machine, State::default()),
            changed: Condvar::new(),
            at_end: OnceLock::new(),
        }
    }

    /// Sets what is done once when the machine ends. The first call counts.
    pub fn at_end(&self, action: AtEnd) {
        let _ = self.at_end.set(action);
        if let (Some(action), true) = (self.at_end.get(), self.is_ending()) {
            action();
        }
    }

    pub fn kick(&self, processor: usize) {
        if let Some(kicker) = self.kickers.get(processor) {
            kicker.kick();
        }
    }

    fn kick_all(&self) {
        for kicker in &self.kickers {
            kicker.kick();
        }
    }

    /// The calling thread is that of `processor`.
    pub fn serve(&self, processor: usize) {
        if let Some(kicker) = self.kickers.get(processor) {
            kicker.serve();
        }
    }

    /// Puts the calling thread, that of `processor`, to sleep until somebody kicks it.
    pub fn sleep(&self, processor: usize) {
        if let Some(kicker) = self.kickers.get(processor) {
            kicker.sleep();
        }
    }

    // What devices and processors call.

    /// Ends the machine with this reason, unless it is ending already. Takes no lock that a device may hold, so it may
    /// be called from anywhere. Says whether the reason counted.
    pub fn end(&self, reason: String) -> bool {
        let counted = self.reason.set(reason).is_ok();
        if counted {
            self.ordered.store(true, Ordering::SeqCst);
            if let Some(action) = self.at_end.get() {
                action();
            }
            self.kick_all();
        }
        counted
    }

    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.reason.get().is_some()
    }

    /// Whether a processor has to come to [`Control::stand`].
    #[inline]
    #[must_use]
    pub fn is_ordered(&self) -> bool {
        self.ordered.load(Ordering::Acquire)
    }

    /// Called by a processor's thread between two instructions, without its lock: stands still as long as anyone wants
    /// it to. Says whether to go on; if not, the machine ends.
    #[must_use]
    pub fn stand(&self) -> bool {
        let mut state = self.state.lock();
        if state.holds > 0 && !self.is_ending() {
            state.standing += 1;
            self.changed.notify_all();
            while state.holds > 0 && !self.is_ending() {
                state = state.wait(&self.changed, None);
            }
            state.standing -= 1;
        }
        !self.is_ending()
    }

    /// Called by a processor's thread as its last deed; says whether it was the last one.
    pub fn leave(&self) -> bool {
        let mut state = self.state.lock();
        state.alive = state.alive.saturating_sub(1);
        self.changed.notify_all();
        state.alive == 0
    }

    /// Whether the machine was ever started.
    #[must_use]
    pub fn has_started(&self) -> bool {
        self.state.lock().started
    }

    /// Whether the machine ends and none of its processors runs, or will ever.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.state.lock().alive == 0 && self.is_ending()
    }

    // What the operator calls.

    /// Notes that `processors` threads start now.
    ///
    /// # Errors
    /// [`Error::Started`] the second time, [`Error::Ended`] when the machine was stopped before.
    pub fn start(&self, processors: usize) -> Result<(), Error> {
        let mut state = self.state.lock();
        if state.started {
            return Err(Error::Started);
        }
        if let Some(reason) = self.reason.get() {
            return Err(Error::Ended(reason.clone()));
        }
        state.started = true;
        state.alive = processors;
        Ok(())
    }

    /// # Errors
    /// [`Error::NotStarted`] before the start, [`Error::Ended`] from when the machine is ending.
    pub fn check_alive(&self) -> Result<(), Error> {
        if let Some(reason) = self.reason.get() {
            return Err(Error::Ended(reason.clone()));
        }
        if self.state.lock().started { Ok(()) } else { Err(Error::NotStarted) }
    }

    /// Ends the machine from outside.
    pub fn stop(&self, reason: String) {
        self.end(reason);
        // Whoever stands still or waits for that looks again.
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    fn hold(&self, state: &mut RankedGuard<'_, State>) {
        state.holds += 1;
        self.ordered.store(true, Ordering::SeqCst);
        self.kick_all();
    }

    fn release(&self, state: &mut RankedGuard<'_, State>) {
        state.holds -= 1;
        if state.holds == 0 && !self.is_ending() {
            self.ordered.store(false, Ordering::SeqCst);
            // An end that came between the check and the store must stay visible.
            if self.is_ending() {
                self.ordered.store(true, Ordering::SeqCst);
            }
        }
        self.changed.notify_all();
    }

    fn wait_until_still<'a>(&'a self, mut state: RankedGuard<'a, State>) -> RankedGuard<'a, State> {
        while !state.is_still() {
            state = state.wait(&self.changed, None);
        }
        state
    }

    /// Stops the processors between two instructions until [`Control::resume`]; returns when they stand still. A
    /// machine that has ended stands still already.
    ///
    /// # Errors
    /// [`Error::NotStarted`].
    pub fn pause(&self) -> Result<(), Error> {
        let mut state = self.state.lock();
        if !state.started {
            return Err(Error::NotStarted);
        }
        if !state.paused {
            state.paused = true;
            self.hold(&mut state);
        }
        drop(self.wait_until_still(state));
        Ok(())
    }

    /// Lets the processors go on after [`Control::pause`]; does nothing when they are not paused.
    ///
    /// # Errors
    /// [`Error::NotStarted`].
    pub fn resume(&self) -> Result<(), Error> {
        let mut state = self.state.lock();
        if !state.started {
            return Err(Error::NotStarted);
        }
        if state.paused {
            state.paused = false;
            self.release(&mut state);
        }
        Ok(())
    }

    /// Does something with a machine that is not started, paused or ended, and keeps it so meanwhile.
    ///
    /// # Errors
    /// [`Error::Running`] when its processors run.
    pub fn while_still<T>(&self, action: impl FnOnce() -> T) -> Result<T, Error> {
        let state = self.state.lock();
        if !state.is_still() {
            return Err(Error::Running);
        }
        let result = action();
        drop(state);
        Ok(result)
    }

    /// Stops the processors between two instructions if they run, does something, and lets them go on.
    pub fn between_instructions<T>(&self, action: impl FnOnce() -> T) -> T {
        let mut state = self.state.lock();
        self.hold(&mut state);
        let mut state = self.wait_until_still(state);
        let result = action();
        self.release(&mut state);
        result
    }

    /// Waits until all processors have ended and says why; `None` when `timeout` passed first.
    ///
    /// # Errors
    /// [`Error::NotStarted`] when it never runs, and was not stopped either.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<String>, Error> {
        // A timeout past the end of time is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state.lock();
        loop {
            if let (Some(reason), 0) = (self.reason.get(), state.alive) {
                return Ok(Some(reason.clone()));
            }
            if !state.started {
                return Err(Error::NotStarted);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            state = state.wait(&self.changed, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use processor::vcpu::Attention;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    /// A machine whose processors only count, with the protocol of the run loop.
    struct Counting {
        control: Arc<Control>,
        counts: Vec<Arc<AtomicU64>>,
    }

    fn counting(processors: usize) -> Counting {
        let attentions: Vec<_> = (0..processors).map(|_| Arc::<Attention>::default()).collect();
        let kickers = attentions.iter().map(|attention| Kicker::new(Arc::clone(attention), None));
        let control = Arc::new(Control::new(kickers.collect()));
        control.start(processors).unwrap();
        let mut counts = Vec::new();
        for attention in attentions {
            let count = Arc::new(AtomicU64::new(0));
            counts.push(Arc::clone(&count));
            let control = Arc::clone(&control);
            std::thread::spawn(move || {
                loop {
                    attention.take();
                    if control.is_ordered() && !control.stand() {
                        break;
                    }
                    while !attention.is_raised() {
                        count.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_micros(10));
                    }
                }
                control.leave();
            });
        }
        Counting { control, counts }
    }

    impl Counting {
        fn counts(&self) -> Vec<u64> {
            self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect()
        }
    }

    #[test]
    fn a_paused_machine_stands_still_until_it_is_resumed() {
        let machine = counting(2);
        assert!(matches!(machine.control.while_still(|| ()), Err(Error::Running)));
        machine.control.pause().unwrap();
        let before = machine.control.while_still(|| machine.counts()).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.counts(), before);
        // A call that wants it still does not resume a paused machine.
        machine.control.between_instructions(|| ());
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(machine.counts(), before);
        machine.control.resume().unwrap();
        while machine.counts().iter().zip(&before).any(|(now, before)| now == before) {
            std::thread::sleep(Duration::from_millis(1));
        }
        machine.control.stop("stopped".into());
        assert_eq!(machine.control.wait(None).unwrap().as_deref(), Some("stopped"));
    }

    #[test]
    fn the_first_reason_counts_and_ends_a_paused_machine_too() {
        let machine = counting(2);
        machine.control.pause().unwrap();
        assert_eq!(machine.control.wait(Some(Duration::from_millis(1))).unwrap(), None);
        machine.control.stop("first".into());
        machine.control.stop("second".into());
        assert_eq!(machine.control.wait(None).unwrap().as_deref(), Some("first"));
        machine.control.while_still(|| ()).unwrap();
        machine.control.pause().unwrap();
    }

    #[test]
    fn a_machine_starts_once() {
        let machine = counting(1);
        assert!(matches!(machine.control.start(1), Err(Error::Started)));
        machine.control.stop("stopped".into());
        machine.control.wait(None).unwrap();
        let control = Control::new(Vec::new());
        assert!(matches!(control.wait(None), Err(Error::NotStarted)));
        control.stop("stopped".into());
        assert!(matches!(control.start(1), Err(Error::Ended(_))));
        assert_eq!(control.wait(None).unwrap().as_deref(), Some("stopped"));
    }

    #[test]
    fn holding_it_again_and_again_never_loses_it() {
        let machine = counting(2);
        for _ in 0..200 {
            machine.control.between_instructions(|| ());
        }
        machine.control.stop("stopped".into());
        assert!(machine.control.wait(Some(Duration::from_secs(20))).unwrap().is_some());
    }
}
