//! How fast a disk may be: token buckets of operations and of bytes. A request takes its tokens when it begins, and waits
//! until they are there. One that is larger than a full bucket goes through when it is full, and those after it pay for it.

use std::time::{Duration, Instant};

/// A second's tokens may be saved up, so that what seldom comes is not slowed down.
const SAVED: f64 = 1.0;

/// Rates, each 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub operations: u64,
    pub bytes: u64,
}

#[derive(Debug)]
struct Bucket {
    rate: f64,
    /// Below 0 in debt.
    tokens: f64,
}

impl Bucket {
    fn new(rate: u64) -> Bucket {
        Bucket { rate: rate as f64, tokens: rate as f64 * SAVED }
    }

    fn fill(&mut self, passed: Duration) {
        self.tokens = (self.tokens + self.rate * passed.as_secs_f64()).min(self.rate * SAVED);
    }

    /// How long it takes until so many tokens are there, or all that there can be.
    fn wait(&self, cost: f64) -> Duration {
        let missing = cost.min(self.rate * SAVED) - self.tokens;
        if self.rate == 0.0 || missing <= 0.0 {
            return Duration::ZERO;
        }
        // A little more, so that they are there then.
        Duration::from_secs_f64(missing / self.rate) + Duration::from_nanos(100)
    }
}

#[derive(Debug)]
pub struct Limit {
    operations: Bucket,
    bytes: Bucket,
    last: Instant,
}

impl Limit {
    #[must_use]
    pub fn new(rates: Rates, now: Instant) -> Limit {
        Limit { operations: Bucket::new(rates.operations), bytes: Bucket::new(rates.bytes), last: now }
    }

    /// Takes the tokens for a request, or says how long it has to wait for them; nothing is taken then.
    pub fn admit(&mut self, bytes: u64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.last);
        self.last = self.last.max(now);
        self.operations.fill(passed);
        self.bytes.fill(passed);
        let wait = self.operations.wait(1.0).max(self.bytes.wait(bytes as f64));
        if wait.is_zero() {
            self.operations.tokens -= 1.0;
            self.bytes.tokens -= bytes as f64;
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many requests of a size get through in a time, each as soon as it may.
    fn through(limit: &mut Limit, bytes: u64, start: Instant, time: Duration) -> u64 {
        let (mut now, mut count) = (start, 0);
        while now < start + time {
            match limit.admit(bytes, now) {
                Duration::ZERO => count += 1,
                wait => now += wait,
            }
        }
        count
    }

    #[test]
    fn rates_are_kept_whichever_is_the_tighter() {
        let start = Instant::now();
        let ten = Duration::from_secs(10);
        for (operations, bytes, size, expected) in
            [(100, 0, 4096, 1100), (0, 1 << 20, 4096, 2816), (100, 1 << 20, 4096, 1100), (1000, 1 << 20, 65536, 176)]
        {
            let mut limit = Limit::new(Rates { operations, bytes }, start);
            let count = through(&mut limit, size, start, ten);
            assert!(count.abs_diff(expected) <= expected / 50 + 1, "{operations} {bytes} {size}: {count}");
        }
        let mut limit = Limit::new(Rates::default(), start);
        assert!((0..100_000).all(|_| limit.admit(1 << 30, start).is_zero()), "no limit");
    }

    #[test]
    fn a_request_larger_than_a_bucket_goes_through_and_is_paid_for() {
        let start = Instant::now();
        let mut limit = Limit::new(Rates { operations: 0, bytes: 1000 }, start);
        assert!(limit.admit(5000, start).is_zero());
        let wait = limit.admit(1, start);
        assert!(wait > Duration::from_secs(4) && wait < Duration::from_millis(4010), "{wait:?}");
        assert!(!limit.admit(1, start + wait / 2).is_zero());
        assert!(limit.admit(1, start + wait).is_zero());
        // A clock that seems to go back does no harm.
        assert!(limit.admit(1, start) < Duration::from_millis(2));
    }
}
