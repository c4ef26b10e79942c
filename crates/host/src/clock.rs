//! Guest time. One [`Clock`] a VM: nanoseconds since the VM was made, counted by the host's time stamp counter, so that
//! every timer of the platform (PIT, PM timer, local APIC) and the guest's own RDTSC agree and never drift apart.
//!
//! Contract of the unsafe code: RDTSC is available (every x86-64 has it; CR4.TSD is never set by Linux unless a
//! process asks with PR_SET_TSC, which would end this process with SIGSEGV, not with undefined behaviour).

use std::arch::x86_64::{__cpuid, _mm_lfence, _rdtsc};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const NANOSECONDS: u64 = 1_000_000_000;
/// Fraction bits of the ticks-to-nanoseconds factor.
const SHIFT: u32 = 32;

/// Read the host's time stamp counter.
#[inline]
#[must_use]
pub fn host_tsc() -> u64 {
    // SAFETY: see the contract at the head of the file; the instruction reads no memory.
    unsafe { _rdtsc() }
}

/// Read it only after all loads before are done: what they have seen was not written later than this.
#[inline]
#[must_use]
pub fn host_tsc_in_order() -> u64 {
    // SAFETY: see the contract at the head of the file; the instructions touch no memory.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

/// Ask the kernel for exact wake-ups in this thread (its default is to be up to 50 microseconds late, to save power).
pub fn precise_sleeps() {
    // SAFETY: PR_SET_TIMERSLACK takes an integer and touches no memory of ours; failure only leaves the default.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64, 0, 0, 0) };
}

/// Where the measurement of the counter's frequency begins: a counter value and the raw monotonic time.
static BEGIN: OnceLock<(u64, u64)> = OnceLock::new();
/// A measurement that began longer ago may reach over a change of the host: it begins again.
const STALE: Duration = Duration::from_secs(2);

/// Begins to measure the counter's frequency, so that [`host_tsc_hz`] need not wait when it is wanted later.
pub fn begin_to_measure() {
    BEGIN.get_or_init(tsc_and_raw_time);
}

/// The frequency of the host's time stamp counter in hertz; measured once a process.
#[must_use]
pub fn host_tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        // What the processor or the hypervisor below says is exact where it is right; a migrated cloud instance can be
        // told the frequency of another machine, so a short measurement has the last word.
        if let Some(told) = tsc_hz_from_cpuid() {
            let measured = measure_tsc_hz(Duration::from_millis(1));
            if told.abs_diff(measured) < measured / 200 {
                return told;
            }
        }
        measure_tsc_hz(Duration::from_millis(10))
    })
}

fn tsc_hz_from_cpuid() -> Option<u64> {
    // Intel SDM (2024-12) Vol. 3B 20.7.3 "Determining the Processor Base Frequency".
    if __cpuid(0).eax >= 0x15 {
        let ratio = __cpuid(0x15);
        if ratio.eax != 0 && ratio.ebx != 0 && ratio.ecx != 0 {
            return Some(u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax));
        }
    }
    // The hypervisor timing leaf that VMware began and others follow: kilohertz in EAX. Bit 31 says hypervisor.
    if __cpuid(1).ecx & 1 << 31 != 0 && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let kilohertz = __cpuid(0x4000_0010).eax;
        if kilohertz != 0 {
            return Some(u64::from(kilohertz) * 1000);
        }
    }
    None
}

fn measure_tsc_hz(period: Duration) -> u64 {
    let now = tsc_and_raw_time();
    let passed = |begin: (u64, u64)| Duration::from_nanos(now.1.saturating_sub(begin.1));
    let (tsc, time) = BEGIN.get().copied().filter(|begin| passed(*begin) < STALE).unwrap_or(now);
    std::thread::sleep(period.saturating_sub(passed((tsc, time))));
    let (tsc_later, time_later) = tsc_and_raw_time();
    let ticks = u128::from(tsc_later.wrapping_sub(tsc));
    let nanoseconds = u128::from(time_later.saturating_sub(time)).max(1);
    u64::try_from(ticks * u128::from(NANOSECONDS) / nanoseconds).unwrap_or(u64::MAX).max(1)
}

/// A counter value and the raw monotonic time of the same moment: the tightest of a few tries.
fn tsc_and_raw_time() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let before = host_tsc();
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid place for the result.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &raw mut time) };
        let width = host_tsc().wrapping_sub(before);
        if width < best.0 {
            let nanoseconds = time.tv_sec.unsigned_abs() * NANOSECONDS + time.tv_nsec.unsigned_abs();
            best = (width, before + width / 2, nanoseconds);
        }
    }
    (best.1, best.2)
}

/// A VM's time. Clones share it.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    tsc_hz: u64,
    /// Nanoseconds a tick, as a fixed-point number with `SHIFT` fraction bits.
    factor: u64,
    /// The counter when the VM was made.
    epoch: u64,
    /// Tests turn their clock by hand: its ticks, instead of the host's.
    manual: Option<AtomicU64>,
}

impl Clock {
    /// A clock whose time starts at zero now. Its counter is the host's time stamp counter, so that code which reads that by
    /// itself reads the same.
    #[must_use]
    pub fn new() -> Self {
        Self::with(host_tsc_hz(), host_tsc(), None)
    }

    /// A clock that stands until [`Clock::advance`] turns it; for tests and replays.
    #[must_use]
    pub fn manual(tsc_hz: u64) -> Self {
        Self::with(tsc_hz.max(1), 0, Some(AtomicU64::new(0)))
    }

    fn with(tsc_hz: u64, epoch: u64, manual: Option<AtomicU64>) -> Self {
        let factor = (u128::from(NANOSECONDS) << SHIFT) / u128::from(tsc_hz);
        Clock(Arc::new(Inner { tsc_hz, factor: u64::try_from(factor).unwrap_or(u64::MAX), epoch, manual }))
    }

    /// Turn a manual clock by `nanoseconds`; a running clock is left alone.
    pub fn advance(&self, nanoseconds: u64) {
        if let Some(ticks) = &self.0.manual {
            ticks.fetch_add(scale(nanoseconds, self.0.tsc_hz, NANOSECONDS), Ordering::Relaxed);
        }
    }

    /// The frequency of the guest's time stamp counter, in hertz: the host's.
    #[must_use]
    pub fn tsc_hz(&self) -> u64 {
        self.0.tsc_hz
    }

    /// The guest's time stamp counter, while the guest has not written its own: the host's.
    #[inline]
    #[must_use]
    pub fn tsc(&self) -> u64 {
        match &self.0.manual {
            None => host_tsc(),
            Some(ticks) => ticks.load(Ordering::Relaxed),
        }
    }

    /// Nanoseconds since the VM was made.
    #[inline]
    #[must_use]
    pub fn now(&self) -> u64 {
        self.nanoseconds_at(self.tsc())
    }

    /// The time, in nanoseconds since the VM was made and rounded down, at which [`Clock::tsc`] is `tsc`.
    #[inline]
    #[must_use]
    pub fn nanoseconds_at(&self, tsc: u64) -> u64 {
        let tsc = tsc.saturating_sub(self.0.epoch);
        // The product of two 64-bit numbers shifted by 32: it is past 64 bits only after centuries.
        u64::try_from((u128::from(tsc) * u128::from(self.0.factor)) >> SHIFT).unwrap_or(u64::MAX)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

/// `value * to / from` without overflow on the way: converts between ticks of two frequencies.
#[inline]
#[must_use]
pub fn scale(value: u64, to: u64, from: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(to) / u128::from(from.max(1))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_runs_with_the_host() {
        let clock = Clock::new();
        let (first, began) = (clock.now(), std::time::Instant::now());
        std::thread::sleep(Duration::from_millis(30));
        let (passed, really) = (clock.now() - first, began.elapsed().as_nanos() as u64);
        // A busy machine can hold us up between the two readings, but not by a third.
        assert!(passed.abs_diff(really) < 10_000_000, "{passed} against {really}");
        assert!(clock.now() < 60 * NANOSECONDS, "the guest's time starts at zero");
        let (before, tsc) = (host_tsc(), clock.tsc());
        assert!((before..=host_tsc()).contains(&tsc));
        assert_eq!(clock.nanoseconds_at(0), 0);
    }

    #[test]
    fn told_frequency_agrees_with_measured() {
        let measured = measure_tsc_hz(Duration::from_millis(20));
        assert!(host_tsc_hz().abs_diff(measured) < measured / 100);
    }

    #[test]
    fn a_manual_clock_stands_until_it_is_turned() {
        let clock = Clock::manual(2_000_000_000);
        assert_eq!(clock.now(), 0);
        clock.advance(1_500);
        assert_eq!((clock.now(), clock.tsc()), (1_500, 3_000));
        assert_eq!(clock.nanoseconds_at(6_000), 3_000);
    }

    #[test]
    fn scaling_does_not_overflow() {
        assert_eq!(scale(u64::MAX, 1_000, 1_000), u64::MAX);
        assert_eq!(scale(u64::MAX, 2, 1), u64::MAX);
        assert_eq!(scale(3_579_545, 1_000_000_000, 3_579_545), 1_000_000_000);
        assert_eq!(scale(5, 1, 0), 5);
    }
}
