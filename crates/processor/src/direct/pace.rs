//! Is it worth it? Each way into the process and out again costs some microseconds, in which translated code would have done
//! part of the work already. So direct execution begins where user code was found at work twice, goes on while more time is
//! spent in the guest's code than around it, and otherwise pauses, longer every time. An excursion that was too short for
//! itself is followed by a breath, also longer every time: calls and faults come in bursts. Who has gained enough before
//! goes on without.

use std::collections::HashMap;

use host::clock::host_tsc_hz;

/// Times that user code must be found at work first: a process that lives for a few milliseconds is not worth a start.
const SAMPLES: u32 = 2;
/// Blocks of user code that are translated before direct execution is tried: to map a page takes as long as to translate ten.
const BLOCKS: u32 = 256;
/// Address spaces that are remembered.
const MOST: usize = 256;
/// Parts of a second: how much is looked at to judge, and the shortest and longest pause.
const WINDOW: u64 = 2_000;
const SHORTEST: u64 = 250;
const LONGEST: u64 = 16;
/// The same of a breath. Every look whether it is over takes as long as a system call, so what needs a longer one pauses.
const SHORTEST_BREATH: u64 = 40_000;
const LONGEST_BREATH: u64 = 5_000;
/// The same of what direct execution may lose where it has gained as much before: a program that computes touches new memory
/// now and then, page after page, and computes again.
const MOST_CREDIT: u64 = 50;
const FIRST_CREDIT: u64 = 200;
/// The part of a second that forbidding CPUID adds to the way at most, as far as was seen.
const MOST_DEAR: u64 = 30_000;

#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    samples: u32,
    /// Blocks that were translated since they last made it wanted.
    blocks: u32,
    is_wanted: bool,
    is_banned: bool,
    /// Ticks in the guest's code and around it, since the last judgement.
    useful: u64,
    lost: u64,
    /// Ticks gained, less those lost.
    credit: i64,
    pause: u64,
    until: u64,
    /// As `pause` and `until`, for a burst of system calls or faults in what else computes.
    breath: u64,
    breathes_until: u64,
}

/// The paces of address spaces, by the address of their top-level table.
#[derive(Debug)]
pub struct Paces {
    paces: HashMap<u64, Pace>,
    /// The shortest excursion so far, which did nothing: what the way alone takes; and the same where CPUID is forbidden.
    switch: u64,
    dear_switch: u64,
    /// How often direct execution was found not to be worth it.
    pub given_up: u64,
}

impl Default for Paces {
    fn default() -> Self {
        Paces { paces: HashMap::new(), switch: u64::MAX, dear_switch: u64::MAX, given_up: 0 }
    }
}

impl Paces {
    fn get(&mut self, root: u64) -> &mut Pace {
        if self.paces.len() >= MOST && !self.paces.contains_key(&root) {
            self.paces.clear();
        }
        let credit = (host_tsc_hz() / FIRST_CREDIT).cast_signed();
        self.paces.entry(root).or_insert(Pace { credit, ..Pace::default() })
    }

    /// User code of a space was found at work; says whether it is to be run directly.
    pub fn sampled(&mut self, root: u64, now: u64) -> bool {
        let pace = self.get(root);
        pace.samples = pace.samples.saturating_add(1);
        let is_over = now.wrapping_sub(pace.until) < u64::MAX / 2;
        pace.is_wanted |= pace.samples >= SAMPLES && is_over && !pace.is_banned;
        pace.is_wanted
    }

    /// Whether a space's code is in a burst of calls or faults just now.
    pub fn breathes(&self, root: u64, now: u64) -> bool {
        self.paces.get(&root).is_some_and(|pace| pace.breathes_until.wrapping_sub(now) < u64::MAX / 2)
    }

    /// A block of user code of a space had to be translated; says whether that is to be run directly from now on.
    pub fn translated(&mut self, root: u64, now: u64) -> bool {
        let pace = self.get(root);
        pace.blocks += 1;
        if pace.blocks < BLOCKS {
            return pace.is_wanted;
        }
        pace.blocks = 0;
        pace.samples = SAMPLES;
        self.sampled(root, now)
    }

    pub fn is_wanted(&self, root: u64) -> bool {
        self.paces.get(&root).is_some_and(|pace| pace.is_wanted)
    }

    pub fn any_wanted(&self) -> bool {
        self.paces.values().any(|pace| pace.is_wanted)
    }

    /// Ticks of an excursion without those of the way, which is dear where CPUID is forbidden.
    pub fn without_switch(&mut self, ticks: u64, is_dear: bool) -> u64 {
        if is_dear {
            // Of code that computes only there is no short one to measure it by.
            let most = self.switch.saturating_add(host_tsc_hz() / MOST_DEAR);
            self.dear_switch = self.dear_switch.min(ticks).min(most);
            return ticks - self.dear_switch;
        }
        self.switch = self.switch.min(ticks);
        ticks - self.switch
    }

    /// Takes note of what an excursion was good for; says whether to go on.
    pub fn judge(&mut self, root: u64, useful: u64, lost: u64, now: u64) -> bool {
        let second = host_tsc_hz();
        let pace = self.get(root);
        pace.useful += useful;
        pace.lost += lost;
        let gain = useful.cast_signed().saturating_sub(lost.cast_signed());
        pace.credit = pace.credit.saturating_add(gain).min((second / MOST_CREDIT).cast_signed());
        let mut is_over = false;
        if useful >= lost || pace.credit > 0 {
            pace.breath = 0;
        } else {
            is_over = pace.breath >= second / LONGEST_BREATH;
            pace.breath = (pace.breath * 2).clamp(second / SHORTEST_BREATH, second / LONGEST_BREATH);
            pace.breathes_until = now.wrapping_add(pace.breath);
        }
        if is_over || pace.useful + pace.lost >= second / WINDOW {
            let is_good = pace.useful > pace.lost && !is_over;
            (pace.useful, pace.lost) = (0, 0);
            if is_good || pace.credit > 0 {
                pace.pause = 0;
            } else {
                pace.credit = 0;
                pace.pause = (pace.pause * 2).clamp(second / SHORTEST, second / LONGEST);
                pace.until = now.wrapping_add(pace.pause);
                pace.is_wanted = false;
                self.given_up += 1;
            }
        }
        self.is_wanted(root)
    }

    /// Code that does what direct execution cannot keep from it: never again.
    pub fn ban(&mut self, root: u64) {
        let pace = self.get(root);
        (pace.is_banned, pace.is_wanted) = (true, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u64 = 0x5000;

    fn sampled() -> (Paces, u64) {
        let mut paces = Paces::default();
        assert!(!paces.sampled(ROOT, 1000), "once is not enough");
        assert!(paces.sampled(ROOT, 2000) && paces.is_wanted(ROOT) && paces.any_wanted());
        assert!(!paces.is_wanted(ROOT + 0x1000));
        paces.get(ROOT).credit = 0;
        (paces, host_tsc_hz())
    }

    #[test]
    fn what_computes_goes_on() {
        let (mut paces, second) = sampled();
        for round in 0..100 {
            assert!(paces.judge(ROOT, second / 1000, second / 5000, 3000 + round));
        }
        assert_eq!(paces.given_up, 0);
    }

    #[test]
    fn what_calls_its_kernel_all_the_time_pauses_longer_and_longer() {
        let (mut paces, second) = sampled();
        let mut now = 10_000;
        let mut pauses: Vec<u64> = Vec::new();
        for _ in 0..12 {
            assert!(!paces.judge(ROOT, second / 5000, second / 1000, now));
            let begin = now;
            while !paces.sampled(ROOT, now) {
                now += second / 1000;
            }
            pauses.push((now - begin) / (second / 1000));
        }
        assert!(
            pauses[..3].iter().zip([4, 8, 16]).all(|(pause, wanted)| (wanted..=wanted + 1).contains(pause)),
            "{pauses:?}"
        );
        assert!((62..=64).contains(&pauses[11]), "{pauses:?}");
        // One good stretch, and the next pause is short again.
        assert!(paces.judge(ROOT, second, 0, now));
        assert!(!paces.judge(ROOT, 0, second, now));
        assert!(paces.sampled(ROOT, now + second / 200));
    }

    #[test]
    fn a_burst_is_left_to_the_translator() {
        let (mut paces, second) = sampled();
        let (short, long) = (second / 200_000, second / 2_000);
        let mut now = 10_000;
        for breath in [25, 50, 100, 200] {
            assert!(!paces.breathes(ROOT, now));
            assert!(paces.judge(ROOT, 0, short, now));
            assert!(paces.breathes(ROOT, now + second / 1_000_000 * (breath - 1)), "{breath}");
            now += second / 1_000_000 * (breath + 1);
        }
        assert!(paces.judge(ROOT, long, short, now) && !paces.breathes(ROOT, now));
        paces.judge(ROOT, 0, short, now);
        assert!(!paces.breathes(ROOT, now + second / 30_000), "the next burst begins with a short one");
    }

    #[test]
    fn a_burst_that_does_not_end_is_paused() {
        let (mut paces, second) = sampled();
        let mut now = 10_000;
        while paces.judge(ROOT, 0, second / 200_000, now) {
            assert!(now < second / 500, "it breathes for ever");
            now += second / 4_000;
        }
        assert!(!paces.sampled(ROOT, now + second / 300) && paces.sampled(ROOT, now + second / 200));
        // It is no better afterwards.
        assert!(!paces.judge(ROOT, 0, second / 200_000, now) && !paces.sampled(ROOT, now + second / 150));
    }

    #[test]
    fn what_has_gained_much_may_lose_some() {
        let (mut paces, second) = sampled();
        let mut now = 10_000;
        assert!(paces.judge(ROOT, second, 0, now));
        let mut lost = 0;
        while paces.judge(ROOT, 0, second / 100_000, now) {
            (now, lost) = (now + second / 1000, lost + second / 100_000);
        }
        let credit = second / MOST_CREDIT;
        assert!((credit / 10 * 9..credit / 10 * 11).contains(&lost), "{lost} of {second}");
        assert!(!paces.sampled(ROOT, now));
    }

    #[test]
    fn what_is_banned_stays_so() {
        let (mut paces, _) = sampled();
        paces.ban(ROOT);
        assert!(!paces.sampled(ROOT, 5000) && !paces.is_wanted(ROOT));
    }

    #[test]
    fn the_way_itself_does_not_count() {
        let mut paces = Paces::default();
        assert_eq!(paces.without_switch(5000, false), 0);
        assert_eq!(paces.without_switch(9000, false), 4000);
        assert_eq!(paces.without_switch(4000, false), 0);
        let (long, most) = (host_tsc_hz(), host_tsc_hz() / MOST_DEAR);
        assert_eq!(paces.without_switch(long, true), long - most - 4000);
        assert_eq!(paces.without_switch(5000, true), 0);
        assert_eq!(paces.without_switch(6000, true), 1000);
    }
}
