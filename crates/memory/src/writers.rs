//! What processors hold of pages, translations and rights to store: sets of processors, and how it is taken back from those
//! that run.
//!
//! A processor that makes code of a page wants to hear of every store to it. It first marks the page as traced in the
//! pmap, so that no TLB is filled with the right to store any more; the same word tells it which processors had the right
//! before. Of these each gets a request. One that is outside guest code (halted, paused, or asking for something itself)
//! obeys when it comes back; the others are kicked and waited for until they have left guest code once. Whoever waits counts
//! as outside itself, so two that ask each other wait for nobody.
//!
//! There are two ways to wait. Who takes a page's content away waits until the others have left guest code ([`Seats::forget`]):
//! then none of them is in the middle of an instruction, with the page's address in hand. Who only breaks a read-only page does
//! so in the middle of an instruction of his own, and so may others whom he waits for; they are *aside* then, and look at their
//! requests before they use their TLBs again ([`Seats::forget_translations`]). What they have in hand still has the content that
//! the page had, which is all that the order of loads asks for.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use x86::{Mpn, Ppn};

/// Processors of a VM at most: the bits of [`Processors`].
pub const MOST_PROCESSORS: usize = 16;

/// Called with a processor's number to make it leave guest code soon.
pub type Kick = Box<dyn Fn(usize) + Send + Sync>;

/// How often a waiter looks before it goes to sleep: as long as a kick takes where every processor has a core.
const LOOKS: u32 = 2000;

/// A set of processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processors(pub u16);

impl Processors {
    #[must_use]
    pub fn one(number: usize) -> Processors {
        Processors(1 << (number % MOST_PROCESSORS))
    }

    #[must_use]
    pub fn has(self, number: usize) -> bool {
        self.0 & Processors::one(number).0 != 0
    }

    #[must_use]
    pub fn with(self, number: usize) -> Processors {
        Processors(self.0 | Processors::one(number).0)
    }

    #[must_use]
    pub fn without(self, number: usize) -> Processors {
        Processors(self.0 & !Processors::one(number).0)
    }

    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..MOST_PROCESSORS).filter(move |number| self.has(*number))
    }
}

/// What a processor is to do before it uses its TLB again.
#[derive(Debug, Default)]
pub struct Requests {
    /// Pages to which it may not store without a trap any more.
    pub protect: HashSet<Ppn>,
    /// Pages, and the machine pages that they have no more.
    pub forget: Vec<(Ppn, Mpn)>,
    /// There are too many to be listed.
    pub forget_all: bool,
}

impl Requests {
    /// A processor that was halted for long finds no more than this.
    const MOST: usize = 4096;

    fn forget(&mut self, pages: &[(Ppn, Mpn)]) {
        if self.forget_all || self.forget.len() + pages.len() > Self::MOST {
            (self.forget_all, self.forget) = (true, Vec::new());
        } else {
            self.forget.extend_from_slice(pages);
        }
    }
}

/// What concerns one processor; on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Seat {
    /// Odd while the processor may run guest code, or use its TLB. Only its own thread changes it.
    turns: AtomicU64,
    /// Odd while it may use its TLB without another look at its requests.
    looks: AtomicU64,
    /// Whether there are requests.
    asked: AtomicBool,
    requests: Mutex<Requests>,
}

/// What somebody who asked waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    Left,
    Looked,
}

impl Seat {
    fn count(&self, until: Until) -> &AtomicU64 {
        match until {
            Until::Left => &self.turns,
            Until::Looked => &self.looks,
        }
    }
}

/// The seats of a VM's processors.
pub struct Seats {
    seats: [Seat; MOST_PROCESSORS],
    kick: OnceLock<Kick>,
    /// Processors that were ever there.
    present: AtomicU16,
    /// How many threads sleep until somebody leaves guest code.
    sleepers: AtomicU32,
    sleep: Mutex<()>,
    left: Condvar,
    /// Requests that had to be waited for.
    waits: AtomicU64,
}

impl std::fmt::Debug for Seats {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Seats").field("seats", &self.seats).finish_non_exhaustive()
    }
}

/// A processor in guest code, until it is dropped.
#[derive(Debug)]
pub struct Running<'a> {
    seats: &'a Seats,
    number: usize,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.seats.leave(self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Seats {
    fn default() -> Self {
        Seats {
            seats: std::array::from_fn(|_| Seat::default()),
            kick: OnceLock::new(),
            present: AtomicU16::new(0),
            sleepers: AtomicU32::new(0),
            sleep: Mutex::default(),
            left: Condvar::new(),
            waits: AtomicU64::new(0),
        }
    }
}

impl Seats {
    /// Says how processors are made to leave guest code. The first call counts.
    pub fn set_kick(&self, kick: Kick) {
        let _ = self.kick.set(kick);
    }

    fn seat(&self, number: usize) -> &Seat {
        &self.seats[number % MOST_PROCESSORS]
    }

    /// Makes processors look up, because of something that was put where they look.
    pub fn kick(&self, who: Processors) {
        if let Some(kick) = self.kick.get() {
            who.iter().for_each(kick);
        }
    }

    /// The processor is about to run guest code. It must look at its requests first, see [`Seats::take`].
    #[must_use]
    pub fn enter(&self, number: usize) -> Running<'_> {
        let me = Processors::one(number).0;
        if self.present.load(Ordering::Relaxed) & me == 0 {
            self.present.fetch_or(me, Ordering::SeqCst);
        }
        self.come_back(number);
        Running { seats: self, number }
    }

    fn come_back(&self, number: usize) {
        for count in [&self.seat(number).turns, &self.seat(number).looks] {
            // Either we see the request when we look for it next, or it is seen by who asks that we run.
            count.store(count.load(Ordering::Relaxed) | 1, Ordering::SeqCst);
        }
    }

    fn leave(&self, number: usize) {
        for count in [&self.seat(number).looks, &self.seat(number).turns] {
            count.store((count.load(Ordering::Relaxed) | 1) + 1, Ordering::SeqCst);
        }
        self.wake();
    }

    /// Either we see the sleeper, or it sees what we did.
    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.sleep));
            self.left.notify_all();
        }
    }

    /// Does something in the middle of an instruction that may take long or wait for other processors, and uses no TLB. The
    /// processor must look at its requests afterwards, see [`Seats::is_asked`].
    pub fn aside<T>(&self, number: usize, action: impl FnOnce() -> T) -> T {
        let looks = &self.seat(number).looks;
        let was_running = looks.load(Ordering::Relaxed) & 1 == 1;
        if was_running {
            looks.store(looks.load(Ordering::Relaxed) + 1, Ordering::SeqCst);
            self.wake();
        }
        let result = action();
        if was_running {
            looks.store(looks.load(Ordering::Relaxed) | 1, Ordering::SeqCst);
        }
        result
    }

    /// Whether the processor has requests to obey.
    #[inline]
    #[must_use]
    pub fn is_asked(&self, number: usize) -> bool {
        self.seat(number).asked.load(Ordering::SeqCst)
    }

    /// What the processor has to forget.
    pub fn take(&self, number: usize) -> Requests {
        let seat = self.seat(number);
        let mut requests = lock(&seat.requests);
        seat.asked.store(false, Ordering::Release);
        std::mem::take(&mut *requests)
    }

    fn request(&self, who: Processors, request: impl Fn(&mut Requests)) {
        for number in who.iter() {
            let seat = self.seat(number);
            request(&mut lock(&seat.requests));
            seat.asked.store(true, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
    }

    /// Takes the right to store to `ppn` away from `others`; returns when none of them can use it any more. `me`, between
    /// two blocks of guest code, may find requests of its own afterwards.
    pub fn ask(&self, me: usize, others: Processors, ppn: Ppn) {
        self.request(others, |requests| {
            requests.protect.insert(ppn);
        });
        self.wait_for(Some((me, Until::Left)), others, Until::Left);
    }

    /// Has all processors forget pages; returns when none of them is in an instruction any more that was begun before. For
    /// threads that are no processor's.
    pub fn forget(&self, pages: &[(Ppn, Mpn)]) {
        let everybody = Processors(self.present.load(Ordering::SeqCst));
        self.request(everybody, |requests| requests.forget(pages));
        self.wait_for(None, everybody, Until::Left);
    }

    /// Has processors forget a page; returns when no other than `me` can use a translation that it has. Between or in the middle
    /// of instructions. `me` has a request of its own afterwards, if it is one of `who`, and perhaps others.
    pub fn forget_translations(&self, me: Option<usize>, who: Processors, ppn: Ppn, mpn: Mpn) {
        self.request(who, |requests| requests.forget(&[(ppn, mpn)]));
        let others = me.map_or(who, |me| who.without(me));
        self.wait_for(me.map(|me| (me, Until::Looked)), others, Until::Looked);
    }

    /// Waits until each of `others` has left, or looked, once, if it is there. Meanwhile we count as having done so ourselves.
    fn wait_for(&self, me: Option<(usize, Until)>, others: Processors, until: Until) {
        let mut running = [(0, 0); MOST_PROCESSORS];
        let mut count = 0;
        for number in others.iter() {
            let turn = self.seat(number).count(until).load(Ordering::SeqCst);
            if turn & 1 == 1 {
                running[count] = (number, turn);
                count += 1;
            }
        }
        let running = &running[..count];
        if running.is_empty() {
            return;
        }
        self.waits.fetch_add(1, Ordering::Relaxed);
        for (number, _) in running {
            self.kick(Processors::one(*number));
        }
        let is_done =
            || running.iter().all(|(number, turn)| self.seat(*number).count(until).load(Ordering::SeqCst) != *turn);
        match me {
            Some((me, Until::Left)) if self.seat(me).turns.load(Ordering::Relaxed) & 1 == 1 => {
                self.leave(me);
                self.wait(is_done);
                self.come_back(me);
            }
            Some((me, Until::Looked)) => self.aside(me, || self.wait(is_done)),
            _ => self.wait(is_done),
        }
    }

    fn wait(&self, done: impl Fn() -> bool) {
        for _ in 0..LOOKS {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        while !done() {
            guard = self.left.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// How often a processor had to wait for others.
    #[must_use]
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn who_is_outside_is_not_waited_for_and_finds_the_request() {
        let seats = Seats::default();
        drop(seats.enter(1));
        seats.ask(0, Processors::one(1), Ppn(7));
        assert!(seats.is_asked(1) && !seats.is_asked(2));
        seats.ask(0, Processors::one(1), Ppn(7));
        assert_eq!(seats.take(1).protect.into_iter().collect::<Vec<_>>(), [Ppn(7)]);
        assert!(!seats.is_asked(1));
        assert_eq!(seats.waits(), 0);
    }

    #[test]
    fn processors_that_ask_each_other_all_go_on_and_obey() {
        const ROUNDS: u64 = 300;
        let seats = Arc::new(Seats::default());
        let kicked: Arc<Vec<AtomicBool>> = Arc::new((0..4).map(|_| AtomicBool::new(false)).collect());
        let flags = Arc::clone(&kicked);
        seats.set_kick(Box::new(move |number| flags[number].store(true, Ordering::SeqCst)));
        // The right to store to the one page: who has it, and how often it was used after it was gone.
        let rights = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..4)
            .map(|me| {
                let (seats, kicked, rights) = (Arc::clone(&seats), Arc::clone(&kicked), Arc::clone(&rights));
                std::thread::spawn(move || {
                    let obey = || {
                        if !seats.take(me).protect.is_empty() {
                            rights.fetch_and(!(1 << me), Ordering::SeqCst);
                        }
                    };
                    for round in 0..ROUNDS {
                        let _running = seats.enter(me);
                        kicked[me].store(false, Ordering::SeqCst);
                        obey();
                        rights.fetch_or(1 << me, Ordering::SeqCst);
                        for _ in 0..20 {
                            if kicked[me].load(Ordering::SeqCst) {
                                break;
                            }
                            std::hint::spin_loop();
                        }
                        if round % 3 == 0 {
                            let others = Processors(0xf).without(me);
                            seats.ask(me, others, Ppn(1));
                            obey();
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!((0..4).all(|number| seats.seat(number).turns.load(Ordering::SeqCst) & 1 == 0));
    }

    #[test]
    fn processors_that_break_pages_of_each_other_do_not_wait_for_ever() {
        let seats = Arc::new(Seats::default());
        let threads: Vec<_> = (0..4)
            .map(|me| {
                let seats = Arc::clone(&seats);
                std::thread::spawn(move || {
                    for round in 0..300 {
                        let _running = seats.enter(me);
                        for page in 0..5 {
                            // In the middle of an instruction: nobody leaves guest code.
                            seats.forget_translations(Some(me), Processors(0xf), Ppn(page), Mpn(round));
                            let requests = seats.take(me);
                            assert!(requests.forget_all || requests.forget.contains(&(Ppn(page), Mpn(round))));
                        }
                    }
                })
            })
            .collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            seats.forget(&[(Ppn(1), Mpn(1))]);
        }
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn a_processor_that_is_halted_for_long_finds_one_request_for_all() {
        let seats = Seats::default();
        let pages = [(Ppn(1), Mpn(1)); 100];
        drop(seats.enter(3));
        (0..100).for_each(|_| seats.forget(&pages));
        let requests = seats.take(3);
        assert!(requests.forget_all && requests.forget.is_empty());
        assert!(!seats.is_asked(3));
    }
}
