mod faults;
mod recovery;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use x86::{PAGE_SIZE, Ppn};

use super::client::Client;
use super::group::{Group, Statistics};
use super::server::{Newcomer, Sharer};
use super::table::Identity;
use super::wire::{MOST_OFFERED, NONE, Reply, Request, VERSION};
use super::{Page, hash};
use crate::random::Random;
use crate::worker::Common;

const SIZE: usize = PAGE_SIZE as usize;
const PAGES: u64 = 4096;

/// A content of which there is one for each number.
fn content(number: u64) -> Page {
    let mut page = [0; SIZE];
    Random(number).fill(&mut page);
    page
}

fn newcomer(socket: UnixStream, name: &str, pool: Option<Identity>) -> Newcomer {
    Newcomer { group: "tenant".into(), name: name.into(), socket, pages: PAGES, pool }
}

/// Joins as a VM does that is started, and gives its socket and its pool.
fn join(sharer: &Sharer, name: &str) -> (UnixStream, File, Identity) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (pool, identity) = sharer.join(newcomer(theirs, name, None)).unwrap();
    (ours, pool.unwrap(), identity)
}

/// A guest whose pages are numbers of contents, and which of them are shared.
struct Guest {
    client: Client,
    pool: File,
    identity: Identity,
    pages: HashMap<u64, u64>,
    shared: HashMap<u64, u32>,
}

impl Guest {
    fn new(sharer: &Sharer, name: &str) -> Guest {
        let (socket, pool, identity) = join(sharer, name);
        let client = Client::new(socket, None, &[]).unwrap();
        Guest { client, pool, identity, pages: HashMap::new(), shared: HashMap::new() }
    }

    fn in_pool(&self, page: u32) -> Page {
        let mut bytes = [0; SIZE];
        self.pool.read_exact_at(&mut bytes, u64::from(page) * PAGE_SIZE).unwrap();
        bytes
    }

    /// Offers pages, and uses what it is given; gives how many.
    fn offer(&mut self, ppns: &[u64]) -> usize {
        let seed = self.client.seed();
        let pages: Vec<(Ppn, u64)> =
            ppns.iter().map(|ppn| (Ppn(*ppn), hash(&content(self.pages[ppn]), seed))).collect();
        let answer = self.client.offer(&pages, &mut |ppn| Some(Box::new(content(self.pages[&ppn.0])))).unwrap();
        for (ppn, page) in ppns.iter().zip(&answer) {
            if let Some(page) = page {
                assert!(self.in_pool(*page) == content(self.pages[ppn]));
                assert!(self.shared.insert(*ppn, *page).is_none());
            }
        }
        answer.iter().flatten().count()
    }

    /// A store to a page: a shared one is broken.
    fn store(&mut self, ppn: u64, number: u64) {
        self.pages.insert(ppn, number);
        if let Some(page) = self.shared.remove(&ppn) {
            self.client.release(&[page]).unwrap();
        }
    }

    fn check(&self) {
        for (ppn, page) in &self.shared {
            assert!(self.in_pool(*page) == content(self.pages[ppn]), "page {ppn} changed while it was shared");
        }
    }

    fn held(&self) -> Vec<(u32, u32)> {
        let mut counts = HashMap::<u32, u32>::new();
        self.shared.values().for_each(|page| *counts.entry(*page).or_default() += 1);
        counts.into_iter().collect()
    }
}

/// What the group has when what was sent has been done.
fn settled(sharer: &Sharer, is_it: impl Fn(&Statistics) -> bool) -> Statistics {
    for _ in 0..2000 {
        let report = sharer.report().unwrap();
        let now = report.groups.first().map_or(Statistics::default(), |(_, statistics)| *statistics);
        if is_it(&now) {
            assert_eq!(sharer.audit().unwrap(), Vec::<String>::new());
            return now;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it never got there: {:?}", sharer.report())
}

#[test]
fn equal_pages_become_one_and_neighbours_stay_neighbours() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let (mut one, mut other) = (Guest::new(&sharer, "one"), Guest::new(&sharer, "other"));
    let ppns: Vec<u64> = (100..400).collect();
    for ppn in &ppns {
        one.store(*ppn, *ppn);
        other.store(*ppn, *ppn);
    }
    assert_eq!(one.offer(&ppns), 0, "nobody has offered them before");
    assert_eq!(other.offer(&ppns), 300);
    assert!(ppns[..256].windows(2).all(|pair| other.shared[&pair[1]] == other.shared[&pair[0]] + 1));
    // The first hears that its pages have twins when it next asks, and offers them again.
    one.store(7, 7);
    one.offer(&[7]);
    let again: Vec<u64> = one.client.take_again().into_iter().map(|ppn| ppn.0).collect();
    assert_eq!(again.len(), 256, "the others wait for its next pass");
    assert_eq!(one.offer(&again), again.len());
    assert!(again.iter().all(|ppn| one.shared[ppn] == other.shared[ppn]));
    let now = settled(&sharer, |_| true);
    assert_eq!((now.members, now.shared_pages, now.uses), (2, 300, 556));
    assert_eq!(one.pool.metadata().unwrap().blocks() * 512, 300 * PAGE_SIZE);

    // A page that nobody uses is given back to the system at once.
    other.store(399, 0);
    settled(&sharer, |now| now.shared_pages == 299);
    assert_eq!(one.pool.metadata().unwrap().blocks() * 512, 299 * PAGE_SIZE);
    drop(other);
    settled(&sharer, |now| (now.members, now.uses, now.shared_pages) == (1, 256, 256));
    one.check();
}

#[test]
fn a_vm_shares_with_itself_and_the_page_of_zeroes_is_not_shared() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut one = Guest::new(&sharer, "one");
    (0..10).for_each(|ppn| one.store(ppn, 5));
    assert_eq!(one.offer(&(0..10).collect::<Vec<_>>()), 10, "all of one batch");
    assert_eq!(settled(&sharer, |_| true).shared_pages, 1);
    let zeroes = hash(&[0; SIZE], one.client.seed());
    let answer =
        one.client.offer(&[(Ppn(1), zeroes), (Ppn(2), zeroes)], &mut |_| panic!("the content of zeroes is known"));
    assert_eq!(answer.unwrap(), [None, None]);
    assert_eq!(one.held(), [(one.shared[&0], 10)]);
}

#[test]
fn pages_in_the_pool_stay_what_they_were_whatever_guests_do() {
    let mut random = Random(1);
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut guests: Vec<Guest> = (0..5).map(|number| Guest::new(&sharer, &format!("vm{number}"))).collect();
    for step in 0..1500 {
        let at = random.below(guests.len() as u64) as usize;
        match random.below(20) {
            0 => guests[at] = Guest::new(&sharer, &format!("vm{step}")),
            1..9 => (0..30).for_each(|_| guests[at].store(random.below(200), 1 + random.below(60))),
            _ => {
                let guest = &mut guests[at];
                let mut ppns: Vec<u64> =
                    guest.pages.keys().filter(|ppn| !guest.shared.contains_key(ppn)).copied().collect();
                ppns.sort_unstable();
                ppns.truncate(random.below(80) as usize);
                guest.offer(&ppns);
            }
        }
        if step % 100 == 0 {
            guests.iter().for_each(Guest::check);
        }
    }
    guests.iter().for_each(Guest::check);
    let uses: usize = guests.iter().map(|guest| guest.shared.len()).sum();
    let now = settled(&sharer, |now| now.uses == uses as u64);
    assert!(now.shared_pages <= 60 && now.uses > 200, "{now:?}");
    guests.clear();
    assert!(sharer.report().is_ok());
    settled(&sharer, |now| now.members == 0);
    assert!(sharer.report().unwrap().groups.is_empty(), "a group without members is gone, and its pool");
}

#[test]
fn a_content_that_is_not_what_was_offered_is_not_shared() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let (mut one, mut liar) = (Guest::new(&sharer, "one"), Guest::new(&sharer, "liar"));
    one.store(1, 1);
    one.offer(&[1]);
    let offered = [(Ppn(9), hash(&content(1), liar.client.seed()))];
    for lie in [Some(content(2)), Some([0; SIZE]), None] {
        assert_eq!(liar.client.offer(&offered, &mut |_| lie.map(Box::new)).unwrap(), [None]);
    }
    let now = settled(&sharer, |_| true);
    assert_eq!((now.shared_pages, now.stale), (0, 3));
    assert_eq!(one.offer(&[1]), 0);
    assert_eq!(liar.client.offer(&offered, &mut |_| Some(Box::new(content(1)))).unwrap().len(), 1);
}

#[test]
fn nobody_uses_more_shared_pages_than_he_has_pages() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut greedy = Guest::new(&sharer, "greedy");
    for start in (0..3 * PAGES).step_by(MOST_OFFERED) {
        // Each content twice, so that all of them are wanted.
        (start..start + MOST_OFFERED as u64).for_each(|ppn| greedy.store(ppn, ppn / 2));
        greedy.offer(&(start..start + MOST_OFFERED as u64).collect::<Vec<_>>());
    }
    let now = settled(&sharer, |_| true);
    assert_eq!((now.uses, now.shared_pages), (PAGES, PAGES / 2));
}

#[test]
fn a_vm_cannot_write_the_pool_that_it_was_given() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let (_socket, pool, _) = join(&sharer, "guest");
    assert!(pool.write_all_at(&[1], 0).is_err() && pool.set_len(0).is_err());
    assert!(host::map::Map::shared(&pool, SIZE, host::map::Protection::ReadWrite).is_err());
}

#[test]
fn the_tables_take_less_than_a_two_hundredth_of_the_memory_that_is_shared() {
    // Guests as they are after boot: of their pages, half like those of the others, and half like no other.
    let (guests, pages) = (12_u64, 4096_u64);
    let mut group = Group::new(1 << 20, None).unwrap();
    let mut replies = Vec::new();
    let mut say = |group: &mut Group, number: u16, request: Request| {
        group.handle(number, request, &mut Vec::new(), &mut replies).unwrap();
        let last = replies.pop();
        replies.clear();
        last
    };
    let numbers: Vec<u16> = (0..guests).map(|_| group.join(pages, false).unwrap()).collect();
    let mut seed = 0;
    for number in &numbers {
        let welcome = say(&mut group, *number, Request::Register { version: VERSION, held: 0 });
        let Some(Reply::Welcome { seed: told }) = welcome else { panic!("{welcome:?}") };
        seed = told;
    }
    let common: Vec<Page> = (0..pages / 2).map(content).collect();
    let hashes: Vec<u64> = common.iter().map(|page| hash(page, seed)).collect();
    let mut random = Random(8);
    let mut shared = vec![vec![false; pages as usize]; guests as usize];
    for _pass in 0..3 {
        for (number, shared) in numbers.iter().zip(&mut shared) {
            for start in (0..pages).step_by(MOST_OFFERED) {
                let hash_of = |ppn: u64| hashes.get(ppn as usize).copied();
                let offer: Vec<(u32, u64)> = (start..start + MOST_OFFERED as u64)
                    .filter(|ppn| !shared[*ppn as usize])
                    .map(|ppn| (ppn as u32, hash_of(ppn).unwrap_or_else(|| random.next())))
                    .collect();
                let mut reply = say(&mut group, *number, Request::Offer(offer.clone()));
                while let Some(Reply::Want(places)) = reply {
                    let page = |place: &u32| (*place, Box::new(common[offer[*place as usize].0 as usize]));
                    reply = say(&mut group, *number, Request::Content(places.iter().map(page).collect()));
                }
                let Some(Reply::Answer(answer)) = reply else { panic!("{reply:?}") };
                offer.iter().zip(answer).for_each(|((ppn, _), page)| shared[*ppn as usize] |= page != NONE);
            }
        }
    }
    let now = group.statistics();
    assert_eq!(now.shared_pages, pages / 2);
    assert_eq!(now.uses, guests * pages / 2);
    let part = now.metadata_bytes as f64 / (now.guest_pages * PAGE_SIZE) as f64;
    assert!(part < 0.005, "{:.2} % of {} pages: {now:?}", part * 100.0, now.guest_pages);
    assert!(part > 0.0005, "it was counted");
}
