//! The threads that serve a device's queues, one each or one for all, from the driver's DRIVER_OK to its reset. Where
//! requests take long, others help ([`helpers`]).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use host::lock::{Rank, RankedMutex};
use memory::GuestMemory;

use super::helpers::Helpers;
use super::line::Line;
use super::queue::{Broken, Progress, Queue};
use super::requests::{Requests, Turn};
use super::{Answer, Backend};
use crate::pci::interrupts::Interrupts;

/// How many requests may be done before the driver is told of them, while more wait: an interrupt each would cost the guest
/// more than the requests do.
const MOST_UNTOLD: u16 = 8;
/// With a longer request before it, the driver is told first; and copying its bytes is work enough for another thread to
/// serve the next one meanwhile.
const LONG_BYTES: u64 = 64 << 10;
/// A request that takes longer than copying its bytes does waits for something: meanwhile others can be served.
const COPY_BYTES_A_NANOSECOND: u64 = 2;
const COPY: Duration = Duration::from_micros(40);

/// Why INTA# is asserted, 4.1.4.5 "ISR status capability".
const CAUSE_QUEUE: u8 = 1;
const CAUSE_CONFIG: u8 = 2;

/// Closed while a machine's memory must stand still: all devices of a machine share one. Whoever touches guest memory from
/// a thread of its own holds it open.
#[derive(Debug, Default)]
pub struct Gate(RwLock<()>);

impl Gate {
    fn open(&self) -> RwLockReadGuard<'_, ()> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no device is at work any more; none begins before the guard is dropped.
    pub fn close(&self) -> RwLockWriteGuard<'_, ()> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all queues of a device are served with.
pub struct Work {
    pub backend: Arc<dyn Backend>,
    pub memory: Arc<GuestMemory>,
    pub gate: Arc<Gate>,
    pub interrupts: Arc<Interrupts>,
    pub line: Arc<Line>,
    pub features: u64,
    /// The message for changes of the configuration.
    pub config_vector: u16,
}

/// A queue that is served.
struct Ring {
    number: u16,
    vector: AtomicU16,
    queue: RankedMutex<Queue>,
    helpers: Helpers,
    /// The last request waited for something.
    is_slow: AtomicBool,
    /// Its thread's, in [`Shared::bells`].
    bell: usize,
}

/// What a thread sleeps on.
struct Bell {
    /// There may be something in one of its queues.
    rung: RankedMutex<bool>,
    changed: Condvar,
}

pub(super) struct Shared {
    work: Work,
    rings: Vec<Ring>,
    bells: Vec<Bell>,
    stopping: AtomicBool,
    is_broken: AtomicBool,
    /// Threads that may still touch guest memory: our own, and those of the back end that serve a queue just now.
    running: AtomicUsize,
}

/// The threads of one device. Dropping it stops them and waits for them.
pub struct Service {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Service {
    /// Serves these queues: number, interrupt vector and queue of each.
    ///
    /// # Errors
    /// The system's, when it gives no thread.
    pub fn start(work: Work, queues: Vec<(u16, u16, Queue)>) -> io::Result<Service> {
        let is_shared = work.backend.shares_thread();
        let rings = queues.into_iter().enumerate().map(|(index, (number, vector, queue))| Ring {
            number,
            vector: AtomicU16::new(vector),
            queue: RankedMutex::new(Rank::Queue, queue),
            helpers: Helpers::new(work.backend.helpers()),
            is_slow: AtomicBool::new(false),
            bell: if is_shared { 0 } else { index },
        });
        let rings: Vec<Ring> = rings.collect();
        let threads = if is_shared { rings.len().min(1) } else { rings.len() };
        let line = Arc::clone(&work.line);
        let shared = Arc::new(Shared {
            work,
            rings,
            bells: (0..threads).map(|_| Bell::new()).collect(),
            stopping: AtomicBool::new(false),
            is_broken: AtomicBool::new(false),
            running: AtomicUsize::new(0),
        });
        let mut service = Service { shared: Arc::clone(&shared), threads: Vec::new() };
        for index in 0..threads {
            shared.running.fetch_add(1, Ordering::SeqCst);
            let name = format!("rz-virtio{}.{}", shared.work.backend.device_type(), shared.rings[index].number);
            let twin = Arc::clone(&shared);
            match thread::Builder::new().name(name).spawn(move || twin.run(index)) {
                Ok(thread) => service.threads.push(thread),
                Err(error) => {
                    shared.running.fetch_sub(1, Ordering::SeqCst);
                    return Err(error);
                }
            }
        }
        line.set(&shared);
        Ok(service)
    }

    /// The driver says that there is something in a queue.
    pub fn notify(&self, number: u16) {
        self.shared.look_at(number);
    }

    /// The driver has chosen another message for a queue.
    pub fn set_vector(&self, number: u16, vector: u16) {
        if let Some(ring) = self.shared.rings.iter().find(|ring| ring.number == number) {
            ring.vector.store(vector, Ordering::Relaxed);
        }
    }

    /// The driver did what no device can work with.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.shared.is_broken()
    }

    /// Asks the threads to end after what they do now; does not wait.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.wake_all();
    }

    /// No thread will touch guest memory any more.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.shared.running.load(Ordering::SeqCst) == 0
    }

    /// How far the queues have come. The [`Gate`] is closed, or a queue that is being served is waited for.
    #[must_use]
    pub fn progress(&self) -> Vec<(u16, Progress)> {
        self.shared.rings.iter().map(|ring| (ring.number, ring.queue.lock().progress())).collect()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            // It has told nobody of a panic but the standard error; the device it served is gone.
            let _ = thread.join();
        }
        self.shared.rings.iter().for_each(|ring| ring.helpers.join());
    }
}

impl Bell {
    /// Rung from the start: a driver may have filled its queues already.
    fn new() -> Bell {
        Bell { rung: RankedMutex::new(Rank::Waiting, true), changed: Condvar::new() }
    }

    fn ring(&self) {
        let mut rung = self.rung.lock();
        if !*rung {
            *rung = true;
            drop(rung);
            self.changed.notify_one();
        }
    }

    fn wait(&self) {
        let mut rung = self.rung.lock();
        while !*rung {
            rung = rung.wait(&self.changed, None);
        }
        *rung = false;
    }
}

/// Counts who serves out, however that ends: a thread that panics leaves a device that needs a reset.
struct Leave<'a>(&'a Shared);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.is_broken.store(true, Ordering::Release);
        }
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Acquire)
    }

    pub(super) fn look_at(&self, number: u16) {
        if let Some(ring) = self.rings.iter().find(|ring| ring.number == number) {
            self.bells[ring.bell].ring();
        }
    }

    /// Tells the driver to look at the configuration, or at the status.
    pub(super) fn tell_config(&self) {
        self.work.interrupts.raise(self.work.config_vector, CAUSE_CONFIG);
    }

    fn wake_all(&self) {
        self.bells.iter().for_each(Bell::ring);
        self.rings.iter().for_each(|ring| ring.helpers.wake_all());
    }

    fn is_over(&self) -> bool {
        self.stopping.load(Ordering::SeqCst) || self.is_broken()
    }

    /// 2.1.2: the device does nothing more until it is reset, and says so.
    fn break_down(&self) {
        self.is_broken.store(true, Ordering::Release);
        self.wake_all();
        self.tell_config();
    }

    fn run(self: &Arc<Self>, bell: usize) {
        let _leave = Leave(self);
        while !self.is_over() {
            self.bells[bell].wait();
            for (index, ring) in self.rings.iter().enumerate().filter(|(_, ring)| ring.bell == bell) {
                self.serve_or_break(index, ring, false);
            }
        }
    }

    /// Serves a queue in the caller's own thread, which is spared waking the queue's.
    pub(super) fn serve_here(self: &Arc<Self>, number: u16) {
        // Counted before it looks whether it may: a reset is over when nobody is left.
        self.running.fetch_add(1, Ordering::SeqCst);
        let _leave = Leave(self);
        if let Some((index, ring)) = self.rings.iter().enumerate().find(|(_, ring)| ring.number == number) {
            self.serve_or_break(index, ring, false);
        }
    }

    fn serve_or_break(self: &Arc<Self>, index: usize, ring: &Ring, is_helper: bool) {
        if self.serve(index, ring, is_helper).is_err() {
            self.break_down();
        }
    }

    /// What a helper of a queue does.
    fn help(self: &Arc<Self>, index: usize) {
        let _leave = Leave(self);
        let ring = &self.rings[index];
        loop {
            self.serve_or_break(index, ring, true);
            if !ring.helpers.wait_for_call(|| self.is_over()) {
                return;
            }
        }
    }

    /// Has another thread serve a queue, too, if there may be one.
    fn call_helper(self: &Arc<Self>, index: usize) {
        let ring = &self.rings[index];
        ring.helpers.call(|| {
            self.running.fetch_add(1, Ordering::SeqCst);
            let name = format!("rz-virtio{}.{}+", self.work.backend.device_type(), ring.number);
            let twin = Arc::clone(self);
            let spawned = thread::Builder::new().name(name).spawn(move || twin.help(index));
            if spawned.is_err() {
                self.running.fetch_sub(1, Ordering::SeqCst);
            }
            spawned.ok()
        });
    }

    /// Tells the driver of what was done since it was last told, if it wants to know.
    fn tell(&self, ring: &Ring, queue: &mut Queue) -> Result<(), Broken> {
        if queue.wants_interrupt(&self.work.memory)? {
            self.work.interrupts.raise(ring.vector.load(Ordering::Relaxed), CAUSE_QUEUE);
        }
        Ok(())
    }

    /// Serves a queue until it is empty, or the back end keeps what is in it. Whoever helps leaves it to the queue's own
    /// thread to ask for notifications.
    fn serve(self: &Arc<Self>, index: usize, ring: &Ring, is_helper: bool) -> Result<(), Broken> {
        let work = &self.work;
        let together = work.backend.serves_together(ring.number);
        let mut is_last_look = is_helper;
        loop {
            let _open = work.gate.open();
            // A guest that has lost memory may order anything until it stands.
            if self.is_over() || work.memory.is_lost() {
                return Ok(());
            }
            let mut queue = ring.queue.lock();
            if together {
                let mut requests = Requests::new(&mut queue, &work.memory);
                let turn = work.backend.serve_together(ring.number, work.features, &mut requests)?;
                self.tell(ring, &mut queue)?;
                match turn {
                    Turn::Waits => return Ok(()),
                    Turn::Empty if is_last_look => return Ok(()),
                    Turn::Empty => queue.want_notification(&work.memory, true)?,
                    Turn::More if is_last_look => queue.want_notification(&work.memory, false)?,
                    Turn::More => {}
                }
                is_last_look = turn == Turn::Empty;
                continue;
            }
            let Some(chain) = queue.pop(&work.memory)? else {
                self.tell(ring, &mut queue)?;
                if is_last_look {
                    return Ok(());
                }
                queue.want_notification(&work.memory, true)?;
                is_last_look = true;
                continue;
            };
            if is_last_look && !is_helper {
                queue.want_notification(&work.memory, false)?;
                is_last_look = false;
            }
            let bytes = chain.bytes();
            if queue.untold() >= MOST_UNTOLD || bytes > LONG_BYTES {
                self.tell(ring, &mut queue)?;
            }
            // A queue that nobody helps with stays locked: its requests are served one after the other, whoever comes.
            let mut locked = Some(queue);
            if ring.helpers.may_come() {
                let is_worth_it = bytes > LONG_BYTES || ring.is_slow.load(Ordering::Relaxed);
                let wants_help = is_worth_it && locked.as_ref().is_some_and(|queue| queue.has_more(&work.memory));
                locked = None;
                if wants_help {
                    self.call_helper(index);
                }
            }
            let began = Instant::now();
            let answer = work.backend.serve(ring.number, work.features, &chain);
            let is_slow = began.elapsed() > COPY + Duration::from_nanos(bytes / COPY_BYTES_A_NANOSECOND);
            ring.is_slow.store(is_slow, Ordering::Relaxed);
            let mut queue = locked.unwrap_or_else(|| ring.queue.lock());
            let Answer::Done(written) = answer else {
                // The driver notifies of what it adds after this one, and the back end rings on its own account.
                queue.keep(chain.head())?;
                queue.want_notification(&work.memory, true)?;
                return self.tell(ring, &mut queue);
            };
            queue.push(&work.memory, chain.head(), written)?;
            if is_slow {
                self.tell(ring, &mut queue)?;
            }
        }
    }
}
