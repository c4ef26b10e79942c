//! The 8254 interval timer and port 0x61, which belongs to its third counter.
//! Sources: Intel 8254 data sheet (order number 231164-005); port 0x61: Intel PIIX3 (82371SB) 3.2.5.
//!
//! No counter is ever counted: a counter's state follows from the time since it was loaded. Counter 0's output is ISA
//! line 0, so its rising edges are deadlines of the timer thread; the other counters cost nothing.

use std::sync::{Arc, Weak};

use host::clock::{Clock, scale};
use host::lock::RankedMutex;

use super::service::{NEVER, Timer, TimerTarget};
use crate::bus::{AccessSize, PortDevice, shared};
use crate::irq::IrqLine;

/// 14.31818 MHz / 12.
pub const PIT_HZ: u64 = 1_193_182;
const NANOSECONDS: u64 = 1_000_000_000;
/// DRAM refresh cycles, which bit 4 of port 0x61 shows, came every 15.085 microseconds: 18 clocks.
const REFRESH_CLOCKS: u64 = 18;
/// A guest may ask for an interrupt at each clock; edges that are nearer than this (in nanoseconds) are merged.
const SHORTEST_PERIOD: u64 = 50_000;

/// How the bytes of a 16-bit count go through the 8-bit port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    Both,
}

#[derive(Clone, Debug)]
struct Counter {
    mode: u8,
    bcd: bool,
    bytes: Bytes,
    /// The count that was written; 0 stands for 65536 (10000 in BCD). None until one is written after a mode.
    reload: Option<u16>,
    /// Modes 2 and 3: a count that was written while counting, and begins with the next period.
    next_reload: Option<u16>,
    /// The first byte of a two-byte write.
    low: Option<u8>,
    /// The second byte of a two-byte read comes next.
    high_next: bool,
    /// Latched count, and how many of its bytes are to be read.
    latch: Option<(u16, u8)>,
    status_latch: Option<u8>,
    gate: bool,
    /// The clock at which the present count began.
    start: u64,
    /// Clocks counted before `start`, when the gate interrupted (modes 0 and 4).
    counted: u64,
    /// Modes 1 and 5 count after the gate has risen only.
    triggered: bool,
}

impl Counter {
    fn new(gate: bool) -> Self {
        Counter {
            mode: 0,
            bcd: false,
            bytes: Bytes::Both,
            reload: None,
            next_reload: None,
            low: None,
            high_next: false,
            latch: None,
            status_latch: None,
            gate,
            start: 0,
            counted: 0,
            triggered: false,
        }
    }

    fn period_of(&self, reload: u16) -> u64 {
        let period = if self.bcd {
            (0..4).rev().fold(0, |value, digit| value * 10 + u64::from(reload >> (4 * digit) & 15))
        } else {
            u64::from(reload)
        };
        match period {
            0 if self.bcd => 10_000,
            0 => 65_536,
            // 1 is illegal in modes 2 and 3; 2 is the nearest that counts.
            1 if self.is_periodic() => 2,
            period => period,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn wants_trigger(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// The period, once a count has been written.
    fn period(&self) -> Option<u64> {
        self.reload.map(|reload| self.period_of(reload))
    }

    /// Clocks that it has counted since it was loaded.
    fn elapsed(&self, clock: u64) -> u64 {
        let running = if self.wants_trigger() { self.triggered } else { self.gate };
        self.counted + if running { clock.saturating_sub(self.start) } else { 0 }
    }

    /// Go over to a count that waits for the end of the period.
    fn renew(&mut self, clock: u64) {
        let (Some(next), Some(period)) = (self.next_reload, self.period()) else { return };
        let elapsed = self.elapsed(clock);
        if elapsed >= period {
            self.start += period - self.counted.min(period);
            self.counted = 0;
            self.reload = Some(next);
            self.next_reload = None;
        }
    }

    fn load(&mut self, value: u16, clock: u64) {
        self.renew(clock);
        if self.is_periodic() && self.reload.is_some() {
            self.next_reload = Some(value);
            return;
        }
        // Modes 1 and 5 load at the next trigger; one in progress keeps its count, which we do not keep apart.
        self.reload = Some(value);
        self.start = clock;
        self.counted = 0;
    }

    fn count(&mut self, clock: u64) -> u16 {
        self.renew(clock);
        let Some(period) = self.period() else { return 0 };
        let elapsed = self.elapsed(clock);
        let modulus = if self.bcd { 10_000 } else { 65_536 };
        let count = match self.mode {
            2 => period - elapsed % period,
            // It counts down by two, twice a period; an odd count loses its last bit first.
            3 => {
                let even = period & !1;
                let half = period.div_ceil(2);
                let into = elapsed % period;
                let into = if into < half { into } else { into - half };
                even - (2 * into).min(even)
            }
            // The others go on below zero.
            _ => (period + modulus - elapsed % modulus) % modulus,
        };
        let count = count % modulus;
        if self.bcd {
            (0..4).fold(0, |value, digit| value | ((count / 10_u64.pow(digit) % 10) as u16) << (4 * digit))
        } else {
            count as u16
        }
    }

    fn output(&mut self, clock: u64) -> bool {
        self.renew(clock);
        // Before it is loaded, the mode alone says: low in mode 0, else high.
        let Some(period) = self.period() else { return self.mode != 0 };
        let elapsed = self.elapsed(clock);
        match self.mode {
            0 => elapsed >= period,
            1 => !self.triggered || elapsed >= period,
            2 => !self.gate || elapsed % period != period - 1,
            3 => !self.gate || elapsed % period < period.div_ceil(2),
            // A strobe: low for the one clock after the count has run out.
            _ => elapsed != period,
        }
    }

    /// The clock of the next rising edge of the output after `clock`.
    fn next_edge(&mut self, clock: u64) -> Option<u64> {
        self.renew(clock);
        let period = self.period()?;
        let running = if self.wants_trigger() { self.triggered } else { self.gate };
        if !running {
            return None;
        }
        let elapsed = self.elapsed(clock);
        let ahead = match self.mode {
            2 | 3 => period - elapsed % period,
            0 | 1 => period.checked_sub(elapsed).filter(|left| *left > 0)?,
            _ => (period + 1).checked_sub(elapsed).filter(|left| *left > 0)?,
        };
        Some(clock + ahead)
    }

    fn set_gate(&mut self, gate: bool, clock: u64) {
        if gate == self.gate {
            return;
        }
        match self.mode {
            0 | 4 => {
                // The gate only holds the count.
                if gate {
                    self.start = clock;
                } else {
                    self.counted = self.elapsed(clock);
                }
            }
            // A rising gate reloads and starts.
            _ if gate => {
                self.reload = self.next_reload.take().or(self.reload);
                self.start = clock;
                self.counted = 0;
                self.triggered = true;
            }
            _ => {}
        }
        self.gate = gate;
    }

    fn control(&mut self, value: u8) {
        let gate = self.gate;
        *self = Counter {
            // The top bit of the mode is ignored for modes 2 and 3.
            mode: match value >> 1 & 7 {
                mode @ 6..=7 => mode - 4,
                mode => mode,
            },
            bcd: value & 1 != 0,
            bytes: match value >> 4 & 3 {
                1 => Bytes::Low,
                2 => Bytes::High,
                _ => Bytes::Both,
            },
            ..Counter::new(gate)
        };
    }

    fn latch_count(&mut self, clock: u64) {
        // A second latch before the first is read is ignored.
        if self.latch.is_none() {
            let bytes = if self.bytes == Bytes::Both { 2 } else { 1 };
            self.latch = Some((self.count(clock), bytes));
        }
    }

    fn latch_status(&mut self, clock: u64) {
        if self.status_latch.is_none() {
            let bytes = match self.bytes {
                Bytes::Low => 1,
                Bytes::High => 2,
                Bytes::Both => 3,
            };
            let null_count = self.reload.is_none() || self.next_reload.is_some();
            self.status_latch = Some(
                u8::from(self.output(clock)) << 7
                    | u8::from(null_count) << 6
                    | bytes << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn read(&mut self, clock: u64) -> u8 {
        if let Some(status) = self.status_latch.take() {
            return status;
        }
        let value = match self.latch {
            Some((value, left)) => {
                self.latch = (left > 1).then_some((value, left - 1));
                value
            }
            None => self.count(clock),
        };
        let [low, high] = value.to_le_bytes();
        match self.bytes {
            Bytes::Low => low,
            Bytes::High => high,
            Bytes::Both => {
                self.high_next = !self.high_next;
                if self.high_next { low } else { high }
            }
        }
    }

    fn write(&mut self, value: u8, clock: u64) {
        match (self.bytes, self.low.take()) {
            (Bytes::Low, _) => self.load(u16::from(value), clock),
            (Bytes::High, _) => self.load(u16::from(value) << 8, clock),
            (Bytes::Both, Some(low)) => self.load(u16::from_le_bytes([low, value]), clock),
            (Bytes::Both, None) => {
                self.low = Some(value);
                // In mode 0 the first byte stops the count.
                if self.mode == 0 {
                    self.reload = None;
                }
            }
        }
    }
}

/// The offset at which the device expects port 0x61; 0 to 3 are the chip's own ports.
pub const SPEAKER_OFFSET: u16 = 4;

/// The chip, at ports 0x40 to 0x43, and port 0x61.
pub struct Pit {
    counters: [Counter; 3],
    /// Bits 0 and 1 of port 0x61: the gate of counter 2, and whether it reaches the speaker.
    speaker: u8,
    clock: Clock,
    timer: Timer,
    line: IrqLine,
    line_level: bool,
    /// When the edge that the timer waits for comes, in clocks.
    edge: Option<u64>,
}

impl Pit {
    /// The chip with its output 0 on `line`, idle as nobody has programmed it.
    #[must_use]
    pub fn new(clock: Clock, timer: Timer, line: IrqLine) -> Arc<RankedMutex<Pit>> {
        let counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        let pit = shared(Pit { counters, speaker: 0, clock, timer, line, line_level: false, edge: None });
        let target: Weak<RankedMutex<Pit>> = Arc::downgrade(&pit);
        pit.lock().timer.set_target(target);
        pit
    }

    fn clocks(&self) -> u64 {
        scale(self.clock.now(), PIT_HZ, NANOSECONDS)
    }

    /// Show counter 0's output on the line, and wait for its next rising edge.
    fn follow(&mut self, clock: u64) {
        let level = self.counters[0].output(clock);
        if self.edge.is_some_and(|edge| edge <= clock) {
            // The edge itself may have come and gone (modes 2 to 5 fall again), or the line never been seen low.
            self.set_line(false);
            self.set_line(true);
        }
        self.set_line(level);
        self.edge = self.counters[0].next_edge(clock);
        self.timer.arm(self.edge.map_or(NEVER, |edge| {
            // Rounded up, so that the edge has come when the timer runs out.
            let due = scale(edge, NANOSECONDS, PIT_HZ).saturating_add(1);
            if self.counters[0].is_periodic() { due.max(self.clock.now().saturating_add(SHORTEST_PERIOD)) } else { due }
        }));
    }

    fn set_line(&mut self, level: bool) {
        if level != self.line_level {
            self.line_level = level;
            self.line.set(level);
        }
    }

    fn read_back(&mut self, value: u8, clock: u64) {
        for (index, counter) in self.counters.iter_mut().enumerate() {
            if value & 2 << index != 0 {
                // Both bits are inverted; the status is read first.
                if value & 0x20 == 0 {
                    counter.latch_count(clock);
                }
                if value & 0x10 == 0 {
                    counter.latch_status(clock);
                }
            }
        }
    }

    fn read_speaker(&mut self, clock: u64) -> u8 {
        let refresh = (clock / REFRESH_CLOCKS) & 1;
        self.speaker | (refresh as u8) << 4 | u8::from(self.counters[2].output(clock)) << 5
    }

    fn write_speaker(&mut self, value: u8, clock: u64) {
        self.speaker = value & 3;
        self.counters[2].set_gate(value & 1 != 0, clock);
    }
}

impl PortDevice for Pit {
    fn read(&mut self, offset: u16, _size: AccessSize) -> u32 {
        let clock = self.clocks();
        match self.counters.get_mut(usize::from(offset)) {
            Some(counter) => u32::from(counter.read(clock)),
            None if offset == SPEAKER_OFFSET => u32::from(self.read_speaker(clock)),
            // The control word cannot be read.
            None => 0xff,
        }
    }

    fn write(&mut self, offset: u16, _size: AccessSize, value: u32) {
        let (clock, value) = (self.clocks(), value as u8);
        match self.counters.get_mut(usize::from(offset)) {
            Some(counter) => counter.write(value, clock),
            None if offset == SPEAKER_OFFSET => self.write_speaker(value, clock),
            None if value >> 6 == 3 => self.read_back(value, clock),
            None => {
                if let Some(counter) = self.counters.get_mut(usize::from(value >> 6)) {
                    if value >> 4 & 3 == 0 {
                        counter.latch_count(clock);
                    } else {
                        counter.control(value);
                    }
                }
            }
        }
        let touches_0 = offset == 0 || offset == 3 && value >> 6 == 0 && value >> 4 & 3 != 0;
        if touches_0 {
            // Programming takes back an edge that was waited for.
            self.edge = self.edge.filter(|_| offset == 0 && self.counters[0].next_reload.is_some());
            self.follow(clock);
        }
    }
}

impl TimerTarget for RankedMutex<Pit> {
    fn expired(&self, _now: u64) {
        let mut pit = self.lock();
        let clock = pit.clocks();
        pit.follow(clock);
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;
