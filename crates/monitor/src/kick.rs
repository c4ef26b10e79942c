//! Kicks: how any thread makes a processor look up, whether it runs guest code or sleeps in HLT.

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use host::lock::{Rank, RankedMutex};
use processor::vcpu::Attention;

/// What an engine does beyond looking at its attention flag, so that code which runs without looking leaves soon.
pub type EngineKick = Arc<dyn Fn() + Send + Sync>;

/// Wakes one processor. Whoever has something for it first puts it where the run loop looks, then kicks.
pub struct Kicker {
    attention: Arc<Attention>,
    engine: Option<EngineKick>,
    asleep: AtomicBool,
    sleep: RankedMutex<()>,
    woken: Condvar,
}

thread_local! {
    /// That of the processor whose thread this is. It is compared, and never followed.
    static OWN: Cell<*const Kicker> = const { Cell::new(ptr::null()) };
}

impl Kicker {
    #[must_use]
    pub fn new(attention: Arc<Attention>, engine: Option<EngineKick>) -> Kicker {
        Kicker {
            attention,
            engine,
            asleep: AtomicBool::new(false),
            sleep: RankedMutex::new(Rank::Waiting, ()),
            woken: Condvar::new(),
        }
    }

    /// Makes the processor look at what is wanted of it. Costs no system call when it runs under an engine that polls.
    /// May be called under any lock.
    pub fn kick(&self) {
        if ptr::eq(OWN.get(), self) {
            // It is awake, and looks at its attention before it runs on.
            self.attention.raise_here();
            return;
        }
        self.attention.raise();
        // Pairs with the fence in `sleep`: either we see that it sleeps, or it sees the attention that we raised.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            // Taking the lock waits until the sleeper, which saw no attention, is on the condition.
            drop(self.sleep.lock());
            self.woken.notify_all();
        } else if let Some(engine) = &self.engine {
            // One that sleeps is in no engine, and looks at its attention before it goes into one.
            engine();
        }
    }

    /// The calling thread is the processor's own from now on.
    pub fn serve(&self) {
        OWN.set(self);
    }

    /// Blocks the calling thread, the processor's own, until a kick. One that came since the attention was last lowered
    /// counts. Costs nothing while it lasts: there is no polling and no timeout.
    pub fn sleep(&self) {
        let mut guard = self.sleep.lock();
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        while !self.attention.is_raised() {
            guard = guard.wait(&self.woken, None);
        }
        self.asleep.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::time::{Duration, Instant};

    #[test]
    fn a_processor_that_kicks_itself_only_looks_at_its_attention() {
        let attention = Arc::<Attention>::default();
        let engine: EngineKick = Arc::new(|| panic!("nobody has to stop it"));
        let kicker = Kicker::new(Arc::clone(&attention), Some(engine));
        kicker.serve();
        kicker.kick();
        assert!(attention.take());
        kicker.kick();
        kicker.sleep();
    }

    #[test]
    fn a_kick_before_the_sleep_is_not_lost() {
        let kicker = Kicker::new(Arc::default(), None);
        kicker.kick();
        kicker.sleep();
    }

    #[test]
    fn a_kick_wakes_a_sleeper_or_calls_the_engine() {
        let count = Arc::new(AtomicU32::new(0));
        let calls = Arc::clone(&count);
        let attention = Arc::<Attention>::default();
        let engine: EngineKick = Arc::new(move || {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        let kicker = Arc::new(Kicker::new(Arc::clone(&attention), Some(engine)));
        let twin = Arc::clone(&kicker);
        let begin = Instant::now();
        let sleeper = std::thread::spawn(move || {
            for _ in 0..100 {
                twin.sleep();
                attention.take();
            }
        });
        let mut kicks = 0;
        while !sleeper.is_finished() {
            kicker.kick();
            kicks += 1;
            std::thread::sleep(Duration::from_micros(50));
            assert!(begin.elapsed() < Duration::from_secs(20), "a kick was lost");
        }
        sleeper.join().unwrap();
        let called = count.load(Ordering::Relaxed);
        assert!(called <= kicks, "{called} of {kicks}");
        // Nobody sleeps now.
        kicker.kick();
        assert_eq!(count.load(Ordering::Relaxed), called + 1);
    }
}
