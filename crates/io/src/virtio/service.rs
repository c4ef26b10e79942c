//! The threads that serve a device's queues, one each or one for all, from the driver's DRIVER_OK to its reset.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};

use host::lock::{Rank, RankedMutex};
use memory::GuestMemory;

use super::line::Line;
use super::queue::{Broken, Progress, Queue};
use super::requests::{Requests, Turn};
use super::{Answer, Backend};
use crate::pci::interrupts::Interrupts;

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
        self.shared.bells.iter().for_each(Bell::ring);
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

    fn run(&self, bell: usize) {
        let _leave = Leave(self);
        while !self.stopping.load(Ordering::SeqCst) && !self.is_broken() {
            self.bells[bell].wait();
            for ring in self.rings.iter().filter(|ring| ring.bell == bell) {
                self.serve_or_break(ring);
            }
        }
    }

    /// Serves a queue in the caller's own thread, which is spared waking the queue's.
    pub(super) fn serve_here(&self, number: u16) {
        // Counted before it looks whether it may: a reset is over when nobody is left.
        self.running.fetch_add(1, Ordering::SeqCst);
        let _leave = Leave(self);
        if let Some(ring) = self.rings.iter().find(|ring| ring.number == number) {
            self.serve_or_break(ring);
        }
    }

    fn serve_or_break(&self, ring: &Ring) {
        if self.serve(ring).is_err() {
            // 2.1.2: the device does nothing more until it is reset, and says so.
            self.is_broken.store(true, Ordering::Release);
            self.bells.iter().for_each(Bell::ring);
            self.tell_config();
        }
    }

    /// Serves a queue until it is empty, or the back end keeps what is in it.
    fn serve(&self, ring: &Ring) -> Result<(), Broken> {
        let work = &self.work;
        let together = work.backend.serves_together(ring.number);
        let mut is_last_look = false;
        loop {
            let _open = work.gate.open();
            // A guest that has lost memory may order anything until it stands.
            if self.stopping.load(Ordering::SeqCst) || self.is_broken() || work.memory.is_lost() {
                return Ok(());
            }
            let mut queue = ring.queue.lock();
            if together {
                let mut requests = Requests::new(&mut queue, &work.memory);
                let turn = work.backend.serve_together(ring.number, work.features, &mut requests)?;
                if queue.wants_interrupt(&work.memory)? {
                    work.interrupts.raise(ring.vector.load(Ordering::Relaxed), CAUSE_QUEUE);
                }
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
            match queue.pop(&work.memory)? {
                None if is_last_look => return Ok(()),
                None => {
                    queue.want_notification(&work.memory, true)?;
                    is_last_look = true;
                }
                Some(chain) => {
                    if is_last_look {
                        queue.want_notification(&work.memory, false)?;
                        is_last_look = false;
                    }
                    let Answer::Done(written) = work.backend.serve(ring.number, work.features, &chain) else {
                        // The driver notifies of what it adds after this one, and the back end rings on its own account.
                        queue.want_notification(&work.memory, true)?;
                        queue.put_back();
                        return Ok(());
                    };
                    queue.push(&work.memory, chain.head(), written)?;
                    if queue.wants_interrupt(&work.memory)? {
                        work.interrupts.raise(ring.vector.load(Ordering::Relaxed), CAUSE_QUEUE);
                    }
                }
            }
        }
    }
}
