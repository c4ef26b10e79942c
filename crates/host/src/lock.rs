//! Ranked locks: the one list of lock ranks, and a mutex that checks their order in debug builds.
//!
//! A thread may take a lock only when it holds none of the same or a later rank, so that no two threads can wait for
//! each other. A panic in one VM's thread must not spread, so a poisoned lock is taken as it is: what it guards is only
//! that VM's, and that VM is about to be stopped.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Every lock of the process, in the order in which they may be taken: outermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Rank {
    /// The assembly of one VM: start, pause, stop.
    Machine,
    /// One virtual processor, held by its thread while it runs and by whoever looks at it while it stands still.
    Processor,
    /// The list of ports that a service thread serves.
    Service,
    /// One device on the bus: a UART, the PIT, the ACPI block, a Python device.
    Device,
    /// One virtqueue, held by the thread that serves it.
    Queue,
    /// What the back end of a virtio device keeps beside its queues: one port of a console, the connections of a vsock.
    Backend,
    /// The network behind a card: the connections of one guest, or the ports of a switch.
    Network,
    /// The frames that wait for one guest.
    Frames,
    /// The interrupts of one PCI function: its MSI-X table and its INTA#.
    FunctionInterrupts,
    /// The interrupt lines and the two controllers behind them, PIC and IOAPIC.
    Wiring,
    /// One processor's local APIC. No two are ever held at once.
    LocalApic,
    /// The swap store of one VM. A page can come back under almost any lock, so it is late.
    SwapStore,
    /// The deadlines of a VM's timer thread. Anything may arm a timer, so it is late.
    Timers,
    /// What one thread sleeps on until another wakes it. Anything may wake, so it is last: nothing is taken under it.
    Waiting,
}

/// A [`std::sync::Mutex`] with a rank. Release builds check nothing and pay nothing.
#[derive(Debug)]
pub struct RankedMutex<T: ?Sized> {
    rank: Rank,
    inner: Mutex<T>,
}

/// Holds a [`RankedMutex`]. Dropping it unlocks.
#[derive(Debug)]
pub struct RankedGuard<'a, T: ?Sized> {
    // Declared before `_held`, so that the lock is free before its rank is.
    guard: MutexGuard<'a, T>,
    held: Held,
}

impl<T> RankedMutex<T> {
    pub const fn new(rank: Rank, value: T) -> Self {
        RankedMutex { rank, inner: Mutex::new(value) }
    }
}

impl<T: ?Sized> RankedMutex<T> {
    /// Take the lock, waiting for it. In debug builds, panics when the order of ranks is broken.
    #[inline]
    pub fn lock(&self) -> RankedGuard<'_, T> {
        let held = Held::new(self.rank);
        RankedGuard { guard: self.inner.lock().unwrap_or_else(PoisonError::into_inner), held }
    }
}

impl<'a, T> RankedGuard<'a, T> {
    /// Let the lock go while waiting on `condition`, at most `timeout` (for ever if `None`), and take it again.
    /// May return early: the caller looks again at what it waits for.
    #[must_use]
    pub fn wait(self, condition: &Condvar, timeout: Option<Duration>) -> RankedGuard<'a, T> {
        let RankedGuard { guard, held } = self;
        let guard = match timeout {
            None => condition.wait(guard).unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => condition.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner).0,
        };
        RankedGuard { guard, held }
    }
}

impl<T: ?Sized> Deref for RankedGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T: ?Sized> DerefMut for RankedGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[cfg(debug_assertions)]
mod order {
    use super::Rank;
    use std::cell::RefCell;

    thread_local! {
        static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
    }

    /// One rank that this thread holds.
    #[derive(Debug)]
    pub struct Held(Rank);

    impl Held {
        pub fn new(rank: Rank) -> Self {
            HELD.with_borrow_mut(|held| {
                if let Some(last) = held.iter().max() {
                    assert!(*last < rank, "lock order: {rank:?} asked for while {last:?} is held");
                }
                held.push(rank);
            });
            Held(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            HELD.with_borrow_mut(|held| {
                if let Some(at) = held.iter().rposition(|rank| *rank == self.0) {
                    held.remove(at);
                }
            });
        }
    }
}

#[cfg(not(debug_assertions))]
mod order {
    use super::Rank;

    /// Nothing: release builds keep no list.
    #[derive(Debug)]
    pub struct Held;

    impl Held {
        #[inline]
        pub fn new(_rank: Rank) -> Self {
            Held
        }
    }
}

use order::Held;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn locks_in_order_may_nest_and_a_panic_does_not_poison() {
        let device = Arc::new(RankedMutex::new(Rank::Device, 1));
        let wiring = RankedMutex::new(Rank::Wiring, 2);
        let outer = device.lock();
        let inner = wiring.lock();
        assert_eq!(*outer + *inner, 3);
        drop(outer);
        drop(inner);
        let twin = Arc::clone(&device);
        let ended = std::thread::spawn(move || {
            let _held = twin.lock();
            panic!("expected by the test");
        })
        .join();
        assert!(ended.is_err());
        assert_eq!(*device.lock(), 1);
    }

    #[test]
    #[cfg(debug_assertions)]
    fn wrong_order_is_caught() {
        let wiring = RankedMutex::new(Rank::Wiring, ());
        let device = RankedMutex::new(Rank::Device, ());
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _inner = wiring.lock();
            let _outer = device.lock();
        }));
        assert!(caught.is_err());
        // The unwinding gave the rank back: the right order still works.
        let _outer = device.lock();
        let _inner = wiring.lock();
    }
}
