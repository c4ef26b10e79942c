//! One processor's local APIC: its registers behind a lock of its own, and one word that says, without the lock,
//! whether anything waits for the processor.

mod countdown;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use host::clock::Clock;
use host::lock::{Rank, RankedMutex};
use x86::Gpa;

pub use state::{DEFAULT_PAGE, Effect, Illegal, Shorthand, attention};
use state::{State, register};

use super::Kick;
use super::message::Message;
use crate::bus::AccessSize;
use crate::timer::{NEVER, Timer, TimerQueue, TimerTarget};

/// What the shared word is when the page is not mapped. No guest page has this number.
const NO_PAGE: u64 = u64::MAX;

// Its own cache lines, so that processors do not disturb each other's word.
#[repr(align(128))]
pub struct LocalApic {
    /// Bits of [`attention`], written under the lock, read without.
    attention: AtomicU32,
    /// The task priority, for the processor itself.
    priority: AtomicU8,
    /// Where the xAPIC registers are, or `NO_PAGE`.
    page: AtomicU64,
    /// What the guest's TSC is ahead of the clock's, when it has written its own.
    tsc_ahead: AtomicU64,
    state: RankedMutex<State>,
    clock: Clock,
    timer: Timer,
    kick: Kick,
    cpu: usize,
}

impl LocalApic {
    pub(super) fn new(cpu: usize, timer_hz: u64, timers: &Arc<TimerQueue>, kick: Kick) -> Arc<Self> {
        let apic = Arc::new(LocalApic {
            attention: AtomicU32::new(0),
            priority: AtomicU8::new(0),
            page: AtomicU64::new(DEFAULT_PAGE),
            tsc_ahead: AtomicU64::new(0),
            state: RankedMutex::new(Rank::LocalApic, State::new(cpu as u32, timer_hz)),
            clock: timers.clock().clone(),
            timer: timers.timer(),
            kick,
            cpu,
        });
        let target: Arc<dyn TimerTarget> = apic.clone();
        apic.timer.set_target(Arc::downgrade(&target));
        apic
    }

    /// Change the state, and afterwards publish what it means: the word, the timer, a kick for what is new.
    #[inline]
    fn with<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock();
        let due = state.timer.due;
        let result = change(&mut state);
        if state.timer.due != due {
            self.timer.arm(state.timer.due);
        }
        // Only written under the lock, so no exchange is needed.
        self.priority.store(state.task_priority(), Ordering::Relaxed);
        let (old, new) = (self.attention.load(Ordering::Relaxed), state.attention());
        if new != old {
            self.attention.store(new, Ordering::Release);
        }
        drop(state);
        if new & !old != 0 {
            (self.kick)(self.cpu);
        }
        result
    }

    /// What waits for the processor: bits of [`attention`].
    #[inline]
    #[must_use]
    pub fn attention(&self) -> u32 {
        self.attention.load(Ordering::Acquire)
    }

    pub fn set_virtual_wire(&self) {
        self.with(State::set_virtual_wire);
    }

    pub fn accept(&self, message: &Message) -> bool {
        self.with(|state| state.accept(message))
    }

    #[must_use]
    pub fn matches(&self, destination: u32, logical: bool) -> bool {
        self.state.lock().matches(destination, logical)
    }

    /// How busy it is, for "lowest priority"; nothing if it takes no interrupts.
    #[must_use]
    pub fn arbitration_priority(&self) -> Option<u8> {
        let state = self.state.lock();
        state.accepts_fixed().then(|| state.arbitration_priority())
    }

    pub fn set_lint0(&self, level: bool) {
        self.with(|state| state.set_lint0(level));
    }

    /// Take the best interrupt of the local APIC into service and return its vector.
    pub fn acknowledge(&self) -> Option<u8> {
        self.with(State::acknowledge)
    }

    /// The processor is about to acknowledge an interrupt of the PIC.
    pub fn take_pic(&self) {
        self.with(State::take_pic);
    }

    pub fn take_nmi(&self) -> bool {
        self.with(State::take_nmi)
    }

    pub fn merge_nmis(&self) {
        self.with(State::merge_nmis);
    }

    pub fn take_init(&self) -> bool {
        self.with(State::take_init)
    }

    pub fn take_startup(&self) -> Option<u8> {
        self.with(State::take_startup)
    }

    /// Whether the xAPIC registers are on the page of `address`.
    #[inline]
    #[must_use]
    pub fn is_at(&self, address: Gpa) -> bool {
        address.0 & !0xfff == self.page.load(Ordering::Relaxed)
    }

    /// The time, for registers that depend on it: to ask the clock takes longer than most accesses.
    fn time_for(&self, register: u8) -> u64 {
        if register::is_timers(register) { self.clock.now() } else { 0 }
    }

    /// Read from the xAPIC page. Registers are 32 bits wide, each at the start of 16 bytes; what lies between reads 0.
    #[must_use]
    pub fn read_page(&self, offset: u64, size: AccessSize) -> u64 {
        let (register, byte) = ((offset >> 4) as u8, offset & 15);
        if byte >= 4 {
            return 0;
        }
        let now = self.time_for(register);
        let value = self.with(|state| state.read(register, now)).unwrap_or(0);
        u64::from(value) >> (8 * byte) & size.mask()
    }

    /// Write to the xAPIC page: 12.4.1 wants whole aligned 32-bit words, and others are ignored.
    #[must_use]
    pub fn write_page(&self, offset: u64, size: AccessSize, value: u64) -> Effect {
        if offset & 15 != 0 || size < AccessSize::Dword {
            return Effect::None;
        }
        let register = (offset >> 4) as u8;
        let now = self.time_for(register);
        self.with(|state| match state.write(register, value as u32, now) {
            Ok(effect) => state.keep(effect),
            Err(Illegal) => Effect::None,
        })
    }

    /// Read an x2APIC register, by its MSR number less 0x800.
    ///
    /// # Errors
    /// [`Illegal`] outside x2APIC mode, and for what is no readable register.
    pub fn read_x2apic(&self, register: u8) -> Result<u64, Illegal> {
        let now = self.time_for(register);
        self.with(|state| {
            if !state.is_x2apic() {
                return Err(Illegal);
            }
            match register {
                register::ICR_LOW => Ok(state.read_icr()),
                _ => state.read(register, now).map(u64::from),
            }
        })
    }

    /// Write an x2APIC register, by its MSR number less 0x800.
    ///
    /// # Errors
    /// [`Illegal`] outside x2APIC mode, for what is no writable register, and for reserved bits.
    pub fn write_x2apic(&self, register: u8, value: u64) -> Result<Effect, Illegal> {
        let now = self.time_for(register);
        self.with(|state| {
            if !state.is_x2apic() {
                return Err(Illegal);
            }
            if register == register::ICR_LOW {
                let effect = state.write_icr(value)?;
                return Ok(state.keep(effect));
            }
            let value = u32::try_from(value).map_err(|_| Illegal)?;
            let effect = state.write(register, value, now)?;
            Ok(state.keep(effect))
        })
    }

    #[must_use]
    pub fn base(&self) -> u64 {
        self.state.lock().base()
    }

    /// # Errors
    /// [`Illegal`] for a transition that 12.12.5 forbids, and for reserved bits.
    pub fn set_base(&self, value: u64, address_bits: u32) -> Result<(), Illegal> {
        self.with(|state| {
            state.set_base(value, address_bits)?;
            self.page.store(state.page().unwrap_or(NO_PAGE), Ordering::Relaxed);
            Ok(())
        })
    }

    #[must_use]
    pub fn tsc_deadline(&self) -> u64 {
        self.state.lock().tsc_deadline()
    }

    pub fn set_tsc_deadline(&self, deadline: u64) {
        let here = self.clock.tsc();
        let guest = here.wrapping_add(self.tsc_ahead.load(Ordering::Relaxed));
        let due = match deadline.checked_sub(guest) {
            // One more, because the conversion rounds down.
            Some(left) => self.clock.nanoseconds_at(here.saturating_add(left)).saturating_add(1),
            None => 0,
        };
        self.with(|state| {
            state.timer.set_deadline(deadline, due.min(NEVER - 1));
            state.run_timer(self.clock.now());
        });
    }

    /// The guest has moved its TSC: what it reads is the clock's plus `ahead` (wrapping).
    pub fn set_tsc_ahead(&self, ahead: u64) {
        self.tsc_ahead.store(ahead, Ordering::Relaxed);
        let deadline = self.tsc_deadline();
        if deadline != 0 {
            self.set_tsc_deadline(deadline);
        }
    }

    /// The task priority, without the lock.
    #[inline]
    #[must_use]
    pub fn task_priority(&self) -> u8 {
        self.priority.load(Ordering::Relaxed)
    }

    pub fn set_task_priority(&self, value: u8) {
        self.with(|state| state.set_task_priority(value));
    }
}

impl TimerTarget for LocalApic {
    fn expired(&self, now: u64) {
        self.with(|state| {
            // A timer that was moved while the queue served it has its deadline armed again already; one that was
            // only early is armed again by `due` not changing, so arm it by hand.
            if !state.run_timer(now) && state.timer.due != NEVER {
                self.timer.arm(state.timer.due);
            }
        });
    }
}
