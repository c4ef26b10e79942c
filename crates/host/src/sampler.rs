//! Where a thread spends its time: it says in one word what it is doing, and while it is being sampled, a timer of the
//! host interrupts it at even intervals of time and notes that word together with the instruction pointer.
//!
//! Saying it costs one store, whether anybody samples or not. A thread that sleeps is woken for each sample, so what it
//! sleeps for is counted too. Samples that come while it has no processor become one: shares are of the time that it had.
//!
//! Contract of the unsafe code: the signal handler finds its [`Sampler`] through a pointer of its own thread, which is null
//! but while a [`Sampling`] of that thread lives and keeps the sampler alive. The handler calls nothing, takes no lock and
//! writes only atomics of the sampler, so that it may interrupt anything; it runs on the alternate stack, because the stack
//! pointer of translated code is no stack.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::signal;

const SIGNAL: i32 = libc::SIGPROF;
/// Samples that wait to be taken out; at the default period some twenty seconds of them.
const ROOM: usize = 1 << 16;

/// One moment of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What the thread had said last.
    pub doing: u32,
    /// The host's instruction pointer.
    pub rip: u64,
}

/// What one thread says that it does, and the samples of it.
#[derive(Debug, Default)]
pub struct Sampler {
    doing: AtomicU32,
    /// Made when sampling starts; pairs of `doing` and RIP.
    ring: OnceLock<Box<[(AtomicU32, AtomicU64)]>>,
    /// How many samples were put in and taken out.
    put: AtomicUsize,
    taken: AtomicUsize,
    lost: AtomicU64,
}

impl Sampler {
    /// Says what the thread does from now on, and gives back what it did.
    #[inline(always)]
    pub fn now(&self, doing: u32) -> u32 {
        // Only the thread itself stores it: no need for an atomic exchange.
        let before = self.doing.load(Ordering::Relaxed);
        self.doing.store(doing, Ordering::Relaxed);
        before
    }

    #[inline(always)]
    #[must_use]
    pub fn doing(&self) -> u32 {
        self.doing.load(Ordering::Relaxed)
    }

    /// How many samples did not fit.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// How many samples wait to be taken out.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.put.load(Ordering::Relaxed).wrapping_sub(self.taken.load(Ordering::Relaxed))
    }

    /// Whether so many wait that they want to be taken out soon.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.waiting() > ROOM / 2
    }

    /// Takes out all samples. One caller at a time, while the thread runs or not.
    pub fn take(&self, mut each: impl FnMut(Sample)) {
        let Some(ring) = self.ring.get() else { return };
        let put = self.put.load(Ordering::Acquire);
        let mut taken = self.taken.load(Ordering::Relaxed);
        while taken != put {
            let (doing, rip) = &ring[taken % ROOM];
            each(Sample { doing: doing.load(Ordering::Relaxed), rip: rip.load(Ordering::Relaxed) });
            taken = taken.wrapping_add(1);
            self.taken.store(taken, Ordering::Release);
        }
    }

    /// Notes a sample: in the signal handler.
    fn note(&self, rip: u64) {
        let Some(ring) = self.ring.get() else { return };
        let put = self.put.load(Ordering::Relaxed);
        if put.wrapping_sub(self.taken.load(Ordering::Acquire)) >= ROOM {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let place = &ring[put % ROOM];
        place.0.store(self.doing(), Ordering::Relaxed);
        place.1.store(rip, Ordering::Relaxed);
        self.put.store(put.wrapping_add(1), Ordering::Release);
    }

    /// Samples the calling thread until the guard is dropped, in this thread.
    pub fn start(self: &Arc<Self>, period: Duration) -> io::Result<Sampling> {
        self.ring.get_or_init(|| (0..ROOM).map(|_| Default::default()).collect());
        signal::prepare_thread()?;
        install()?;
        CURRENT.with(|current| current.set(Arc::as_ptr(self)));
        let timer = start_timer(period).inspect_err(|_| CURRENT.with(|current| current.set(ptr::null())))?;
        let sampling = Sampling { timer, _sampler: Arc::clone(self), not_send: std::marker::PhantomData };
        unblock();
        Ok(sampling)
    }
}

thread_local! {
    static CURRENT: Cell<*const Sampler> = const { Cell::new(ptr::null()) };
}

/// The current thread is being sampled.
#[derive(Debug)]
pub struct Sampling {
    timer: libc::timer_t,
    _sampler: Arc<Sampler>,
    not_send: std::marker::PhantomData<*const ()>,
}

impl Drop for Sampling {
    fn drop(&mut self) {
        CURRENT.with(|current| current.set(ptr::null()));
        // SAFETY: the timer is ours and was not deleted; a signal that is still under way finds no sampler.
        unsafe { libc::timer_delete(self.timer) };
    }
}

fn start_timer(period: Duration) -> io::Result<libc::timer_t> {
    let mut timer: libc::timer_t = ptr::null_mut();
    // SAFETY: `event` and `times` are fully initialized, `timer` is a valid place for the result.
    unsafe {
        let mut event: libc::sigevent = MaybeUninit::zeroed().assume_init();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGNAL;
        event.sigev_notify_thread_id = libc::gettid();
        if libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) != 0 {
            return Err(io::Error::last_os_error());
        }
        let step = libc::timespec { tv_sec: period.as_secs().cast_signed(), tv_nsec: i64::from(period.subsec_nanos()) };
        let times = libc::itimerspec { it_interval: step, it_value: step };
        if libc::timer_settime(timer, 0, &raw const times, ptr::null_mut()) != 0 {
            let error = io::Error::last_os_error();
            libc::timer_delete(timer);
            return Err(error);
        }
    }
    Ok(timer)
}

fn install() -> io::Result<()> {
    // SAFETY: `action` is fully initialized; the handler has the signature that SA_SIGINFO asks for.
    let result = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(SIGNAL, &raw const action, ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn unblock() {
    // SAFETY: the set is initialized by sigemptyset; only this thread's mask changes.
    unsafe {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, SIGNAL);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
    }
}

extern "C" fn handler(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let sampler = CURRENT.try_with(Cell::get).unwrap_or(ptr::null());
    if sampler.is_null() {
        return;
    }
    // SAFETY: a non-null sampler is kept alive by the guard of this thread; the kernel passes a valid context to a handler
    // with SA_SIGINFO.
    let (sampler, registers) = unsafe { (&*sampler, &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs) };
    sampler.note(registers[libc::REG_RIP as usize].cast_unsigned());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn spin(time: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < time {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn samples_say_what_the_thread_did_also_while_it_slept() {
        let sampler = Arc::<Sampler>::default();
        let sampling = sampler.start(Duration::from_micros(100)).unwrap();
        let mut seen = [0; 3];
        let mut places = std::collections::HashSet::new();
        let begin = Instant::now();
        // How soon is the host's affair.
        while seen[1..].iter().any(|count| *count < 5) && begin.elapsed() < Duration::from_secs(20) {
            sampler.now(1);
            spin(Duration::from_micros(400));
            assert_eq!(sampler.now(2), 1);
            std::thread::sleep(Duration::from_micros(400));
            sampler.now(0);
            sampler.take(|sample| {
                seen[sample.doing as usize] += 1;
                places.insert(sample.rip);
            });
        }
        assert!(seen[1..].iter().all(|count| *count >= 5), "{seen:?}");
        assert!(places.len() > 1 && sampler.lost() == 0);
        drop(sampling);
        sampler.take(|_| ());
        spin(Duration::from_millis(2));
        let mut late = 0;
        sampler.take(|_| late += 1);
        assert_eq!(late, 0, "nobody is sampled any more");
    }

    #[test]
    fn samples_that_do_not_fit_are_counted() {
        let sampler = Sampler::default();
        sampler.note(1);
        assert_eq!(sampler.lost(), 0, "nobody samples");
        sampler.ring.get_or_init(|| (0..ROOM).map(|_| Default::default()).collect());
        for rip in 0..ROOM as u64 + 3 {
            sampler.note(rip);
        }
        let mut count = 0;
        sampler.take(|sample| {
            assert_eq!(sample, Sample { doing: 0, rip: count });
            count += 1;
        });
        assert_eq!((count, sampler.lost()), (ROOM as u64, 3));
        sampler.note(5);
        sampler.take(|sample| assert_eq!(sample.rip, 5));
    }
}
