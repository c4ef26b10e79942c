use super::*;
use crate::bus::AccessSize::Byte;
use crate::irq::pic::PicPort;
use crate::irq::{Fabric, Kick};
use crate::timer::TimerQueue;

struct Bench {
    pit: Arc<RankedMutex<Pit>>,
    fabric: Arc<Fabric>,
    timers: Arc<TimerQueue>,
    clock: Clock,
}

/// Nanoseconds in which at least `clocks` clocks pass.
fn nanoseconds(clocks: u64) -> u64 {
    scale(clocks, NANOSECONDS, PIT_HZ) + 1
}

impl Bench {
    fn new() -> Self {
        let clock = Clock::manual(1_000_000_000);
        let timers = TimerQueue::new(clock.clone(), Arc::default());
        let kick: Kick = Arc::new(|_| {});
        let fabric = Fabric::new(1, 1_000_000_000, &timers, &kick, Arc::default());
        fabric.set_up_as_firmware();
        for (port, value) in [(PicPort::MasterCommand, 0x13), (PicPort::MasterData, 0x20), (PicPort::MasterData, 3)] {
            fabric.write_pic(port, value);
        }
        let pit = Pit::new(clock.clone(), timers.timer(), fabric.line(0));
        Bench { pit, fabric, timers, clock }
    }

    fn put(&self, port: u16, value: u32) {
        self.pit.lock().write(port, Byte, value);
    }

    fn get(&self, port: u16) -> u32 {
        self.pit.lock().read(port, Byte)
    }

    fn count(&self, counter: u16) -> u32 {
        self.put(3, u32::from(counter) << 6);
        self.get(counter) | self.get(counter) << 8
    }

    /// Let time pass, serving deadlines as they come; returns the timer interrupts that came.
    fn run(&self, nanoseconds: u64) -> u32 {
        let (mut interrupts, end) = (0, self.clock.now() + nanoseconds);
        loop {
            let next = self.timers.next_deadline().min(end);
            self.clock.advance(next.saturating_sub(self.clock.now()));
            self.timers.run_due();
            while self.fabric.acknowledge(0).is_some() {
                interrupts += 1;
            }
            if self.clock.now() >= end {
                return interrupts;
            }
        }
    }
}

#[test]
fn periodic_as_linux_programs_it() {
    // pit_set_periodic(): mode 2, HZ = 250.
    let bench = Bench::new();
    bench.run(1000);
    bench.put(3, 0x34);
    bench.put(0, 4772 & 0xff);
    bench.put(0, 4772 >> 8);
    bench.run(0);
    assert_eq!(bench.run(NANOSECONDS), 250);
    // pit_shutdown(): mode 0 and a count of 0, which is the longest one.
    bench.put(3, 0x30);
    bench.put(0, 0);
    bench.put(0, 0);
    assert_eq!(bench.run(NANOSECONDS), 1);
    assert_eq!(bench.timers.next_deadline(), NEVER, "idle costs nothing");
}

#[test]
fn one_shot_as_linux_programs_it() {
    // pit_set_oneshot() and pit_next_event(): mode 4, then a count for each event.
    let bench = Bench::new();
    bench.put(3, 0x38);
    bench.run(0);
    for _ in 0..3 {
        bench.put(0, 0xe8);
        bench.put(0, 0x03);
        assert_eq!(bench.run(nanoseconds(999)), 0);
        assert_eq!(bench.run(nanoseconds(2)), 1);
        assert_eq!(bench.run(nanoseconds(100_000)), 0);
    }
}

#[test]
fn mode_0_interrupts_once_and_counts_on() {
    let bench = Bench::new();
    bench.put(3, 0x30);
    bench.put(0, 0x00);
    bench.put(0, 0x10);
    assert_eq!(bench.run(nanoseconds(0x0fff)), 0);
    assert_eq!(bench.run(nanoseconds(2)), 1);
    assert_eq!(bench.run(nanoseconds(0x10)), 0);
    let count = bench.count(0);
    assert!(count > 0xff00, "wrapped below zero: {count:#x}");
    // A new count starts it again, and its first byte takes the output down.
    bench.put(0, 0x00);
    bench.put(3, 0xe2);
    assert_eq!(bench.get(0), 0x70, "low, no count yet, two bytes, mode 0");
    bench.put(0, 0x01);
    bench.put(3, 0xe2);
    assert_eq!(bench.get(0), 0x30);
    assert_eq!(bench.run(nanoseconds(0x101)), 1);
}

#[test]
fn square_wave_and_its_count() {
    let bench = Bench::new();
    bench.put(3, 0xb6);
    bench.put(2, 0xe8);
    bench.put(2, 0x03);
    bench.put(SPEAKER_OFFSET, 1);
    assert_eq!(bench.count(2), 1000);
    bench.clock.advance(nanoseconds(100));
    assert_eq!(bench.count(2), 800, "counts by two");
    assert_ne!(bench.get(SPEAKER_OFFSET) & 0x20, 0);
    bench.clock.advance(nanoseconds(450));
    assert_eq!(bench.get(SPEAKER_OFFSET) & 0x20, 0);
    assert_eq!(bench.count(2), 900);
    // It has 18.2 edges a second at the slowest.
    bench.put(3, 0x36);
    bench.put(0, 0);
    bench.put(0, 0);
    bench.run(0);
    assert_eq!(bench.run(NANOSECONDS), 18);
}

#[test]
fn linux_calibrates_with_counter_2() {
    // pit_calibrate_tsc(): gate on, speaker off, mode 0, wait for the output.
    let bench = Bench::new();
    bench.put(SPEAKER_OFFSET, (bench.get(SPEAKER_OFFSET) & !2) | 1);
    bench.put(3, 0xb0);
    let latch = PIT_HZ / 100;
    bench.put(2, latch as u32 & 0xff);
    bench.put(2, latch as u32 >> 8);
    bench.clock.advance(nanoseconds(latch - 1));
    assert_eq!(bench.get(SPEAKER_OFFSET) & 0x23, 1);
    bench.clock.advance(nanoseconds(1));
    assert_eq!(bench.get(SPEAKER_OFFSET) & 0x23, 0x21);
    // quick_pit_calibrate(): the high byte goes down, one at a time.
    bench.put(3, 0xb0);
    bench.put(2, 0xff);
    bench.put(2, 0xff);
    for expected in [0xff, 0xfe, 0xfd] {
        bench.get(2);
        assert_eq!(bench.get(2), expected);
        bench.clock.advance(nanoseconds(256));
    }
}

#[test]
fn the_gate_holds_the_count() {
    let bench = Bench::new();
    bench.put(3, 0xb0);
    bench.put(2, 0x00);
    bench.put(2, 0x10);
    bench.clock.advance(nanoseconds(5000));
    assert_eq!(bench.count(2), 0x1000, "the gate is low");
    bench.put(SPEAKER_OFFSET, 1);
    bench.clock.advance(nanoseconds(0x800));
    assert_eq!(bench.count(2), 0x800);
    bench.put(SPEAKER_OFFSET, 0);
    bench.clock.advance(nanoseconds(5000));
    assert_eq!(bench.count(2), 0x800);
    // Mode 1 is started by the gate, and again by the next one.
    bench.put(3, 0xb2);
    bench.put(2, 0x64);
    bench.put(2, 0);
    assert_ne!(bench.get(SPEAKER_OFFSET) & 0x20, 0);
    for _ in 0..2 {
        bench.put(SPEAKER_OFFSET, 0);
        bench.put(SPEAKER_OFFSET, 1);
        assert_eq!(bench.get(SPEAKER_OFFSET) & 0x20, 0);
        bench.clock.advance(nanoseconds(101));
        assert_ne!(bench.get(SPEAKER_OFFSET) & 0x20, 0);
    }
}

#[test]
fn latches_hold_until_read() {
    let bench = Bench::new();
    bench.put(3, 0x34);
    bench.put(0, 0x00);
    bench.put(0, 0x80);
    bench.clock.advance(nanoseconds(0x100));
    // Read back: status and count of counter 0.
    bench.put(3, 0xc2);
    bench.clock.advance(nanoseconds(0x100));
    bench.put(3, 0x00);
    assert_eq!(bench.get(0), 0xb4, "output high, two bytes, mode 2");
    assert_eq!((bench.get(0), bench.get(0)), (0x00, 0x7f), "the first latch, not the second");
    assert_eq!((bench.get(0), bench.get(0)), (0x00, 0x7e), "live");
    // A new count waits for the end of the period.
    bench.put(0, 0x10);
    bench.put(0, 0x00);
    bench.put(3, 0xe2);
    assert_eq!(bench.get(0), 0xf4, "not loaded yet");
    assert_eq!(bench.count(0), 0x7e00);
    bench.clock.advance(nanoseconds(0x7e04));
    assert!(bench.count(0) <= 0x10);
    assert_eq!(bench.get(3), 0xff);
}

#[test]
fn bcd_and_single_bytes() {
    let bench = Bench::new();
    bench.put(3, 0x31);
    bench.put(0, 0x00);
    bench.put(0, 0x12);
    bench.clock.advance(nanoseconds(1));
    assert_eq!(bench.count(0), 0x1199);
    bench.put(3, 0x14);
    bench.put(0, 50);
    bench.clock.advance(nanoseconds(10));
    assert_eq!(bench.get(0), 40);
    assert_eq!(bench.get(0), 40);
    bench.put(3, 0x24);
    bench.put(0, 2);
    bench.clock.advance(nanoseconds(1));
    assert_eq!(bench.get(0), 1);
}

#[test]
fn the_refresh_bit_toggles() {
    let bench = Bench::new();
    let mut changes = 0;
    let mut last = bench.get(SPEAKER_OFFSET) & 0x10;
    for _ in 0..100 {
        bench.clock.advance(nanoseconds(REFRESH_CLOCKS));
        let now = bench.get(SPEAKER_OFFSET) & 0x10;
        changes += u32::from(now != last);
        last = now;
    }
    assert!(changes > 90);
}

#[test]
fn any_program_runs_without_a_storm() {
    let bench = Bench::new();
    let mut state = 1_u32;
    for _ in 0..20_000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (port, value) = ((state >> 29) as u16 % 5, state >> 16 & 0xff);
        if state & 0x100 == 0 {
            bench.put(port, value)
        } else {
            _ = bench.get(port)
        }
        bench.clock.advance(u64::from(state >> 20));
        bench.timers.run_due();
    }
    // The fastest period that can be asked for.
    bench.put(3, 0x14);
    bench.put(0, 1);
    bench.run(0);
    assert!(bench.run(NANOSECONDS / 10) <= 2001);
}
