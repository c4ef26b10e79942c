//! Hints: which page of which VM was once offered with a hash. A hint may be stale, or missing; it only says that asking for a
//! content is worth while.
//!
//! There is room for a part of all pages, in two generations. New hints go into the younger one; when that has had as many as
//! it has room for, the older one goes. So what is offered now and then stays, and what is not goes. A generation is an array of
//! buckets, of 10 bytes a hint: a full bucket forgets one of its hints for a new one.

/// Hints of a bucket.
const WAYS: usize = 8;
/// Of all pages those that a generation has room for, in eighths. Of idle guests' pages a third is like no other.
const EIGHTHS: u64 = 3;
const SMALLEST: u64 = 1 << 10;

/// Who offered what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    pub member: u16,
    pub ppn: u32,
}

/// Which half of a mixed hash is the bucket, and which is kept.
fn halves(mixed: u64) -> (u32, u32) {
    // 0 stands for no hint.
    ((mixed as u32), ((mixed >> 32) as u32).max(1))
}

#[derive(Debug, Default)]
struct Generation {
    kept: Box<[u32]>,
    ppns: Box<[u32]>,
    members: Box<[u16]>,
    /// Hints that it has taken.
    taken: u64,
}

impl Generation {
    fn new(room: u64) -> Generation {
        let room = (room as usize).next_multiple_of(WAYS);
        let (kept, ppns, members) = (vec![0; room], vec![0; room], vec![0; room]);
        Generation { kept: kept.into(), ppns: ppns.into(), members: members.into(), taken: 0 }
    }

    fn bucket(&self, low: u32) -> std::ops::Range<usize> {
        let buckets = self.kept.len() / WAYS;
        let start = ((u64::from(low) * buckets as u64) >> 32) as usize * WAYS;
        start..(start + WAYS).min(self.kept.len())
    }

    fn find(&self, mixed: u64) -> Option<usize> {
        let (low, high) = halves(mixed);
        self.bucket(low).find(|at| self.kept[*at] == high)
    }

    fn hint(&self, at: usize) -> Hint {
        Hint { member: self.members[at], ppn: self.ppns[at] }
    }

    fn insert(&mut self, mixed: u64, hint: Hint) {
        let (low, high) = halves(mixed);
        let mut bucket = self.bucket(low);
        if bucket.is_empty() {
            return;
        }
        // Any of them goes, and not always the same one.
        let victim = bucket.start + self.taken as usize % WAYS;
        let at = bucket.find(|at| self.kept[*at] == high || self.kept[*at] == 0).unwrap_or(victim);
        self.kept[at] = high;
        self.ppns[at] = hint.ppn;
        self.members[at] = hint.member;
        self.taken += 1;
    }
}

#[derive(Debug, Default)]
pub struct Hints {
    young: Generation,
    old: Generation,
    /// Counts the generations.
    number: u32,
}

impl Hints {
    /// Who offered a page with this hash, if it is known still.
    pub fn get(&self, mixed: u64) -> Option<Hint> {
        let young = self.young.find(mixed).map(|at| self.young.hint(at));
        young.or_else(|| self.old.find(mixed).map(|at| self.old.hint(at)))
    }

    /// Remembers who offered a page; `pages` are those of all VMs.
    pub fn insert(&mut self, mixed: u64, hint: Hint, pages: u64) {
        let room = (pages * EIGHTHS / 8).max(SMALLEST);
        let has = self.young.kept.len() as u64;
        // Twice as many VMs as there were need no wait for a full generation.
        if self.young.taken >= has || room >= has * 2 {
            self.old = std::mem::replace(&mut self.young, Generation::new(room));
            self.number = self.number.wrapping_add(1);
        }
        if let Some(at) = self.young.find(mixed)
            && self.young.hint(at) == hint
        {
            return;
        }
        self.young.insert(mixed, hint);
    }

    /// Which generation is the younger one.
    pub fn generation(&self) -> u32 {
        self.number
    }

    /// Bytes that the hints take.
    pub fn size(&self) -> u64 {
        (self.young.kept.len() + self.old.kept.len()) as u64 * 10
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn what_is_offered_again_stays_and_what_is_not_goes() {
        let mut random = Random(1);
        let mut hints = Hints::default();
        let pages = 8 * 4096;
        let lasting = Hint { member: 3, ppn: 77 };
        for number in 0..50_000 {
            hints.insert(random.next(), Hint { member: 1, ppn: number }, pages);
            if number % 3000 == 0 {
                hints.insert(42, lasting, pages);
            }
            // A full bucket may forget it for a while.
            if number == 100 {
                assert_eq!(hints.get(42), Some(lasting));
            }
        }
        assert_eq!(hints.size(), 2 * 10 * pages * EIGHTHS / 8);
        let mut random = Random(1);
        let all: Vec<u64> = (0..50_000).map(|_| random.next()).collect();
        let known = |range: std::ops::Range<usize>| range.filter(|at| hints.get(all[*at]).is_some()).count();
        assert!(known(0..10_000) == 0, "old ones are gone");
        assert!(known(40_000..50_000) > 7500, "{} of the last 10,000 are known", known(40_000..50_000));
    }

    #[test]
    fn hints_say_who_offered_and_the_last_counts() {
        let mut hints = Hints::default();
        let (one, other) = (0x1234_5678_0000_0005, 0x8765_4321_0000_0005);
        assert_eq!(hints.get(one), None);
        hints.insert(one, Hint { member: 1, ppn: 10 }, 100);
        hints.insert(one, Hint { member: 2, ppn: 20 }, 100);
        assert_eq!(hints.get(one), Some(Hint { member: 2, ppn: 20 }));
        assert_eq!(hints.get(other), None, "the same bucket");
        let mut none = Hints::default();
        none.insert(0, Hint { member: 1, ppn: 1 }, 0);
        assert!(none.get(0).is_some());
    }
}
