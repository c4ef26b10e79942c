//! The local APIC's timer: a counter that is never counted, only computed from the time.
//! Source: Intel SDM (2024-12) Vol. 3A 12.5.4 "APIC Timer".

use host::clock::scale;

use crate::timer::NEVER;

const NANOSECONDS: u64 = 1_000_000_000;
/// A guest may ask for a periodic interrupt every nanosecond. Nobody can serve that; periods that would only keep the
/// timer thread spinning are merged to this many nanoseconds. Linux's shortest tick is 1 ms.
const SHORTEST_PERIOD: u64 = 50_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

#[derive(Clone, Debug)]
pub struct Countdown {
    /// Frequency of the undivided timer clock, in hertz.
    hz: u64,
    mode: TimerMode,
    divide_register: u32,
    initial: u32,
    /// When the count was `first`, in timer clocks.
    start: u64,
    first: u32,
    /// The guest TSC value of TSC-deadline mode; 0 is disarmed.
    deadline: u64,
    /// When it is next due, in nanoseconds of the VM's clock.
    pub due: u64,
}

impl Countdown {
    pub fn new(hz: u64) -> Self {
        Countdown {
            hz,
            mode: TimerMode::OneShot,
            divide_register: 0,
            initial: 0,
            start: 0,
            first: 0,
            deadline: 0,
            due: NEVER,
        }
    }

    pub fn hz(&self) -> u64 {
        self.hz
    }

    fn clocks(&self, now: u64) -> u64 {
        scale(now, self.hz, NANOSECONDS)
    }

    /// Timer clocks a count. Bits 0, 1 and 3 of the register count from "divide by 2", and wrap to "by 1".
    fn divisor(&self) -> u64 {
        let code = (self.divide_register & 3 | self.divide_register >> 1 & 4) + 1;
        1 << (code & 7)
    }

    fn schedule(&mut self, now: u64) {
        self.due = if self.first == 0 || self.mode == TimerMode::TscDeadline {
            NEVER
        } else {
            // Rounded up, so that the count is 0 when the interrupt comes.
            scale(self.start + u64::from(self.first) * self.divisor(), NANOSECONDS, self.hz).saturating_add(1).max(now)
        };
    }

    pub fn mode(&self) -> TimerMode {
        self.mode
    }

    /// Bits 18:17 of the LVT entry were written. Going to or from TSC-deadline mode disarms.
    pub fn set_mode(&mut self, bits: u32, now: u64) {
        let mode = match bits & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            // Reserved. Kept as it was.
            _ => return,
        };
        if mode == self.mode {
            return;
        }
        if mode == TimerMode::TscDeadline || self.mode == TimerMode::TscDeadline {
            self.mode = mode;
            self.stop();
        } else {
            // The count goes on; what happens at its end changes.
            let count = self.current(now);
            self.mode = mode;
            self.start = self.clocks(now);
            self.first = count;
            self.schedule(now);
        }
    }

    pub fn stop(&mut self) {
        self.initial = 0;
        self.first = 0;
        self.deadline = 0;
        self.due = NEVER;
    }

    pub fn divide_register(&self) -> u32 {
        self.divide_register
    }

    pub fn set_divide_register(&mut self, value: u32, now: u64) {
        let count = self.current(now);
        self.divide_register = value & 0xb;
        self.start = self.clocks(now);
        self.first = count;
        if self.mode != TimerMode::TscDeadline {
            self.schedule(now);
        }
    }

    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// Writing the initial count starts the timer, 0 stops it; ignored in TSC-deadline mode.
    pub fn set_initial(&mut self, value: u32, now: u64) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = value;
        self.first = value;
        self.start = self.clocks(now);
        self.schedule(now);
    }

    pub fn current(&self, now: u64) -> u32 {
        if self.mode == TimerMode::TscDeadline || self.first == 0 {
            return 0;
        }
        let passed = self.clocks(now).saturating_sub(self.start) / self.divisor();
        match u64::from(self.first).checked_sub(passed) {
            Some(left) if left > 0 => left as u32,
            _ if self.mode == TimerMode::Periodic && self.initial != 0 => {
                let into = (passed - u64::from(self.first)) % u64::from(self.initial);
                self.initial - into as u32
            }
            _ => 0,
        }
    }

    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    /// `due` is when the guest's TSC will be `deadline`.
    pub fn set_deadline(&mut self, deadline: u64, due: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.deadline = deadline;
            self.due = if deadline == 0 { NEVER } else { due };
        }
    }

    /// True once for each time that the timer has run out by `now`; periods that were missed are merged.
    pub fn expire(&mut self, now: u64) -> bool {
        if now < self.due {
            return false;
        }
        match self.mode {
            TimerMode::OneShot => {
                self.first = 0;
                self.due = NEVER;
            }
            TimerMode::TscDeadline => {
                self.deadline = 0;
                self.due = NEVER;
            }
            TimerMode::Periodic => {
                // Keep the phase: the next end is a whole number of periods after this one.
                let period = u64::from(self.initial) * self.divisor();
                let end = self.start + u64::from(self.first) * self.divisor();
                match self.clocks(now).saturating_sub(end).checked_div(period) {
                    None => self.stop(),
                    Some(missed) => {
                        self.start = end + missed * period;
                        self.first = self.initial;
                        self.schedule(now.saturating_add(SHORTEST_PERIOD));
                    }
                }
            }
        }
        true
    }
}
