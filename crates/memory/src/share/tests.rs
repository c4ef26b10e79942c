use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use host::map::memfd;
use host::passing::send_all;
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

/// A VM that says what it likes.
struct Rogue(UnixStream);

impl Rogue {
    fn new(sharer: &Sharer) -> Rogue {
        Rogue(join(sharer, "rogue").0)
    }

    fn registered(sharer: &Sharer) -> Rogue {
        let mut rogue = Rogue::new(sharer);
        rogue.say(&Request::Register { version: VERSION, held: 0 });
        assert!(matches!(rogue.hear(), Some(Reply::Welcome { .. })));
        rogue
    }

    fn say(&mut self, request: &Request) {
        self.0.write_all(&request.encode()).unwrap();
    }

    fn hear(&mut self) -> Option<Reply> {
        let mut kind = [0; 8];
        self.0.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        self.0.read_exact(&mut kind).ok()?;
        let mut items = vec![0; super::wire::size_of_items(kind, true).unwrap()];
        self.0.read_exact(&mut items).ok()?;
        Reply::decode(kind, &items)
    }

    fn is_refused(&mut self) -> String {
        match self.hear() {
            Some(Reply::Refused(why)) => why,
            other => panic!("not refused, but {other:?}"),
        }
    }
}

#[test]
fn who_breaks_a_rule_is_refused_in_a_sentence_and_the_others_go_on() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut good = Guest::new(&sharer, "good");
    let register = |version, held| Request::Register { version, held };
    let offer = Request::Offer(vec![(1, 10), (2, 10)]);
    let before: Vec<(Vec<Request>, &str)> = vec![
        (vec![register(VERSION + 1, 0)], "speaks version"),
        (vec![register(VERSION, u32::MAX)], "uses 4294967295 shared pages"),
        (vec![register(VERSION, 3)], "without the pool"),
        (vec![offer.clone()], "offers pages before"),
        (vec![Request::Release(vec![1])], "releases pages before"),
        (vec![Request::Held(vec![(1, 1)])], "names shared pages before"),
    ];
    let mut rogues = Vec::new();
    for (requests, words) in before {
        let mut rogue = Rogue::new(&sharer);
        requests.iter().for_each(|request| rogue.say(request));
        let why = rogue.is_refused();
        assert!(why.contains(words), "{why}");
        rogues.push(rogue);
    }
    let after: Vec<(Vec<Request>, &str)> = vec![
        (vec![register(VERSION, 0)], "registers when"),
        (vec![Request::Release(vec![1])], "which it does not use"),
        (vec![Request::Release(vec![u32::MAX])], "which it does not use"),
        (vec![Request::Content(vec![])], "sends contents when"),
        (vec![offer.clone(), offer.clone()], "offers pages when it was asked"),
        (vec![offer.clone(), Request::Content(vec![(5, Box::new([1; SIZE]))])], "that nobody asked for"),
        (
            vec![offer.clone(), Request::Content(vec![(1, Box::new([1; SIZE])), (1, Box::new([1; SIZE]))])],
            "nobody asked",
        ),
        (vec![offer, Request::Release(vec![])], "releases pages when it was asked"),
    ];
    for (requests, words) in after {
        let mut rogue = Rogue::registered(&sharer);
        for request in &requests {
            rogue.say(request);
        }
        let why = loop {
            match rogue.hear() {
                Some(Reply::Refused(why)) => break why,
                Some(_) => {}
                None => panic!("not refused, and not {words}"),
            }
        };
        assert!(why.contains(words), "{why}");
        rogues.push(rogue);
    }
    // Rubbish, a frame that is too long, half a close, files that nobody asked for.
    for bytes in [[0xff; 64].to_vec(), [3, 0, 0, 0, 1, 1, 0, 0].to_vec(), vec![]] {
        let mut rogue = Rogue::registered(&sharer);
        rogue.0.write_all(&bytes).unwrap();
        rogue.0.shutdown(Shutdown::Write).unwrap();
        rogue.is_refused();
        rogues.push(rogue);
    }
    let mut rogue = Rogue::registered(&sharer);
    let file = memfd(c"nothing", 0).unwrap();
    for _ in 0..10 {
        if send_all(rogue.0.as_fd(), &[3], Some(file.as_fd())).is_err() {
            break;
        }
    }
    rogue.is_refused();
    rogues.push(rogue);
    let report = sharer.report().unwrap();
    assert_eq!(report.sentences.len(), rogues.len());
    assert!(report.sentences[0].starts_with("vm 'rogue' of sharing group 'tenant' shares no more pages: it speaks"));
    good.store(1, 1);
    good.store(2, 1);
    assert_eq!(good.offer(&[1, 2]), 2);
    // They are there until they close, and then gone.
    assert_eq!(settled(&sharer, |_| true).members as usize, 1 + rogues.len());
    rogues.clear();
    settled(&sharer, |now| now.members == 1);
    good.check();
}

#[test]
fn what_a_refused_vm_uses_stays_until_it_is_gone() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut guest = Guest::new(&sharer, "guest");
    (0..40).for_each(|ppn| guest.store(ppn, ppn / 2));
    assert_eq!(guest.offer(&(0..40).collect::<Vec<_>>()), 40);
    guest.client.release(&[u32::MAX - 1]).unwrap();
    assert!(guest.client.offer(&[(Ppn(1), 1)], &mut |_| None).unwrap_err().to_string().contains("does not use"));
    assert!(guest.client.release(&[1]).is_err());
    assert_eq!(settled(&sharer, |_| true).uses, 40);
    guest.check();
    // It may come again by another socket.
    let (ours, theirs) = UnixStream::pair().unwrap();
    sharer.join(newcomer(theirs, "guest", Some(guest.identity))).unwrap();
    guest.client = Client::new(ours, Some(&guest.pool), &guest.held()).unwrap();
    settled(&sharer, |now| (now.members, now.uses) == (1, 40));
    guest.check();
    drop(guest);
    settled(&sharer, |now| now.members == 0);
}

#[test]
fn a_vm_may_die_at_any_moment() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut guest = Guest::new(&sharer, "guest");
    (0..64).for_each(|ppn| guest.store(ppn, ppn / 2));
    guest.offer(&(0..64).collect::<Vec<_>>());
    let seed = guest.client.seed();
    let known = Request::Offer((0..32).map(|ppn| (ppn, hash(&content(u64::from(ppn)), seed))).collect());
    let wanted = Request::Offer(vec![(1, 77), (2, 77)]);
    let right = Request::Offer((0..2).map(|ppn| (ppn, hash(&content(99), seed))).collect());
    let sent = Request::Content(vec![(1, Box::new(content(99)))]);
    let mut random = Random(4);
    for requests in
        [vec![known.clone()], vec![wanted], vec![right.clone(), sent], vec![known, Request::Release(vec![])]]
    {
        let bytes: Vec<u8> = requests.iter().flat_map(Request::encode).collect();
        for _ in 0..30 {
            // Dies after so many bytes, having read none of its answers, some, or all.
            let mut rogue = Rogue::registered(&sharer);
            rogue.0.write_all(&bytes[..random.below(bytes.len() as u64 + 1) as usize]).unwrap();
            if random.below(2) == 0 {
                rogue.0.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
                let _ = rogue.0.read(&mut [0; 64]);
            }
        }
    }
    settled(&sharer, |now| (now.members, now.uses, now.shared_pages) == (1, 64, 32));
    guest.check();
}

#[test]
fn who_does_not_read_his_answers_or_talks_without_end_holds_nobody_up() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut good = Guest::new(&sharer, "good");
    (0..20).for_each(|ppn| good.store(ppn, ppn / 2));
    let rogue = Rogue::registered(&sharer);
    let mut flood = rogue.0.try_clone().unwrap();
    flood.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let flooder = std::thread::spawn(move || {
        let mut random = Random(9);
        let mut sent = 0_u64;
        loop {
            let offer = Request::Offer((0..256).map(|ppn| (ppn, random.next())).collect()).encode();
            if flood.write_all(&offer).is_err() {
                break sent;
            }
            sent += offer.len() as u64;
        }
    });
    assert_eq!(good.offer(&(0..20).collect::<Vec<_>>()), 20);
    // Its answers fill its socket; then it is not read from, and its own writes stand still.
    assert!(flooder.join().unwrap() < 16 << 20);
    (20..40).for_each(|ppn| good.store(ppn, ppn / 2));
    assert_eq!(good.offer(&(20..40).collect::<Vec<_>>()), 20);
    drop(rogue);
    settled(&sharer, |now| now.members == 1);
}

#[test]
fn rubbish_between_frames_breaks_nothing() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut good = Guest::new(&sharer, "good");
    (0..20).for_each(|ppn| good.store(ppn, ppn / 2));
    good.offer(&(0..20).collect::<Vec<_>>());
    let seed = good.client.seed();
    let mut random = Random(5);
    for _ in 0..300 {
        let mut rogue = Rogue::registered(&sharer);
        let mut bytes = Vec::new();
        for _ in 0..1 + random.below(4) {
            let some = |random: &mut Random| random.below(12) as u32;
            let request = match random.below(4) {
                0 => Request::Offer((0..20).map(|ppn| (ppn, hash(&content(random.below(12)), seed))).collect()),
                1 => Request::Release((0..random.below(3)).map(|_| some(&mut random)).collect()),
                2 => {
                    let place = some(&mut random);
                    Request::Content(
                        (0..1 + random.below(3)).map(|_| (place, Box::new(content(random.below(12))))).collect(),
                    )
                }
                _ => Request::Held(vec![(some(&mut random), some(&mut random))]),
            };
            bytes.extend(request.encode());
            if random.below(3) == 0 {
                let at = bytes.len() - 1 - random.below(8) as usize;
                bytes[at] = random.next() as u8;
            }
        }
        let _ = rogue.0.write_all(&bytes);
    }
    settled(&sharer, |now| (now.members, now.uses) == (1, 20));
    good.check();
    assert_eq!(good.offer(&[]), 0);
}

/// A sharer takes over from one that is gone.
fn take_over(guests: &mut [Guest]) -> Sharer {
    let sharer = Sharer::start(1 << 20).unwrap();
    for guest in guests {
        let (ours, theirs) = UnixStream::pair().unwrap();
        sharer.join(newcomer(theirs, "guest", Some(guest.identity))).unwrap();
        guest.client = Client::new(ours, Some(&guest.pool), &guest.held()).unwrap();
    }
    sharer
}

#[test]
fn another_sharer_finds_all_that_is_used_and_frees_the_rest() {
    let mut random = Random(6);
    let mut sharer = Sharer::start(1 << 20).unwrap();
    let mut guests: Vec<Guest> = (0..3).map(|number| Guest::new(&sharer, &format!("vm{number}"))).collect();
    for round in 0..4 {
        for _ in 0..20 {
            let guest = &mut guests[random.below(3) as usize];
            (0..40).for_each(|_| guest.store(random.below(300), 1 + random.below(150)));
            let open: Vec<u64> = guest.pages.keys().filter(|ppn| !guest.shared.contains_key(ppn)).copied().collect();
            guest.offer(&open);
        }
        // What was released, and what was given, when the sharer dies: a VM knows best.
        drop(sharer);
        let broken: Vec<u64> = guests[0].shared.keys().take(20).copied().collect();
        for ppn in broken {
            guests[0].shared.remove(&ppn);
            guests[0].pages.insert(ppn, 1000 + ppn);
        }
        sharer = take_over(&mut guests);
        guests.iter().for_each(Guest::check);
        let uses: usize = guests.iter().map(|guest| guest.shared.len()).sum();
        assert_eq!(settled(&sharer, |_| true).uses, uses as u64);
        if round % 2 == 0 {
            // What comes before all have claimed does not touch what they may still claim.
            let end = guests[0].pool.metadata().unwrap().len() / PAGE_SIZE;
            guests[1].store(301, 2000 + round);
            guests[2].store(301, 2000 + round);
            assert_eq!(guests[1].offer(&[301]) + guests[2].offer(&[301]), 1);
            assert!(u64::from(guests[2].shared[&301]) >= end);
        }
        sharer.recovered().unwrap();
        guests.iter().for_each(Guest::check);
        let now = settled(&sharer, |_| true);
        assert_eq!(guests[0].pool.metadata().unwrap().blocks() * 512, now.shared_pages * PAGE_SIZE);
    }
}

#[test]
fn nothing_is_freed_before_all_who_are_here_have_said_what_they_use() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut guests: Vec<Guest> = (0..3).map(|number| Guest::new(&sharer, &format!("vm{number}"))).collect();
    for (number, guest) in (0..).zip(&mut guests) {
        (0..40).for_each(|ppn| guest.store(ppn, 100 * number + ppn / 2));
        guest.offer(&(0..40).collect::<Vec<_>>());
    }
    drop(sharer);
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut sockets = Vec::new();
    for guest in &guests {
        let (ours, theirs) = UnixStream::pair().unwrap();
        sharer.join(newcomer(theirs, "guest", Some(guest.identity))).unwrap();
        sockets.push(ours);
    }
    sharer.recovered().unwrap();
    // The last of them dies without a word: what it used goes only then.
    let dead = guests.pop().unwrap();
    for (guest, socket) in guests.iter_mut().zip(sockets.drain(..2)) {
        guest.client = Client::new(socket, Some(&guest.pool), &guest.held()).unwrap();
        guest.check();
        dead.check();
    }
    sockets.clear();
    settled(&sharer, |now| (now.members, now.shared_pages) == (2, 40));
    guests.iter().for_each(Guest::check);
    assert_eq!(guests[0].pool.metadata().unwrap().blocks() * 512, 40 * PAGE_SIZE);
}

#[test]
fn a_page_that_one_vm_releases_waits_for_those_who_have_not_claimed_it_yet() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut guests: Vec<Guest> = (0..3).map(|number| Guest::new(&sharer, &format!("vm{number}"))).collect();
    for _ in 0..2 {
        for guest in &mut guests {
            guest.pages = (0..40).map(|ppn| (ppn, ppn / 2)).collect();
            let open: Vec<u64> = (0..40).filter(|ppn| !guest.shared.contains_key(ppn)).collect();
            guest.offer(&open);
        }
    }
    drop(sharer);
    let sharer = Sharer::start(1 << 20).unwrap();
    let again = |guest: &mut Guest| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        sharer.join(newcomer(theirs, "guest", Some(guest.identity))).unwrap();
        guest.client = Client::new(ours, Some(&guest.pool), &guest.held()).unwrap();
    };
    // The first comes, stores to all of its pages; the second comes and dies; the third has not come yet.
    again(&mut guests[0]);
    (0..40).for_each(|ppn| guests[0].store(ppn, 1000));
    settled(&sharer, |now| now.uses == 0);
    again(&mut guests[1]);
    let last = guests.pop().unwrap();
    drop(guests.pop());
    settled(&sharer, |now| now.members == 1);
    last.check();
    guests.push(last);
    again(&mut guests[1]);
    sharer.recovered().unwrap();
    settled(&sharer, |now| (now.shared_pages, now.uses) == (20, 40));
    guests[1].check();
    (0..40).for_each(|ppn| guests[1].store(ppn, 1001));
    settled(&sharer, |now| now.shared_pages == 0);
    assert_eq!(guests[0].pool.metadata().unwrap().blocks(), 0);
}

#[test]
fn only_the_pool_of_the_group_is_taken_and_only_what_is_used() {
    let sharer = Sharer::start(1 << 20).unwrap();
    let mut guest = Guest::new(&sharer, "guest");
    (0..40).for_each(|ppn| guest.store(ppn, ppn / 2));
    guest.offer(&(0..40).collect::<Vec<_>>());
    drop(sharer);
    let sharer = Sharer::start(1 << 20).unwrap();
    let come = |pool: &File, held: &[(u32, u32)]| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        sharer.join(newcomer(theirs, "guest", Some(guest.identity))).unwrap();
        Client::new(ours, Some(pool), held).map(|client| (client, ()))
    };
    let waiting = {
        // Nobody else can come before the pool is there.
        let (ours, theirs) = UnixStream::pair().unwrap();
        sharer.join(newcomer(theirs, "guest", Some(guest.identity))).unwrap();
        let (_, theirs) = UnixStream::pair().unwrap();
        assert!(sharer.join(newcomer(theirs, "new", None)).unwrap_err().to_string().contains("waits for its pool"));
        ours
    };
    let another = memfd(c"another", 1 << 20).unwrap();
    assert!(come(&another, &[(0, 1)]).unwrap_err().to_string().contains("not the pool of the group"));
    let (client, ()) = come(&guest.pool, &guest.held()).unwrap();
    guest.client = client;
    assert!(come(&another, &[(0, 1)]).unwrap_err().to_string().contains("another one"));
    let end = (guest.pool.metadata().unwrap().len() / PAGE_SIZE) as u32;
    for wrong in [(end, 1), (NONE, 1), (0, 0), (0, u32::MAX)] {
        let why = come(&guest.pool, &[wrong]).unwrap_err().to_string();
        assert!(why.contains("shared page"), "{why}");
    }
    drop(waiting);
    settled(&sharer, |now| now.members == 1);
    sharer.recovered().unwrap();
    let free = guest.shared.values().max().unwrap() + 1;
    assert!(come(&guest.pool, &[(free, 1)]).unwrap_err().to_string().contains("which is free"));
    let (_, theirs) = UnixStream::pair().unwrap();
    let wrong = (guest.identity.0, guest.identity.1 + 1);
    assert!(sharer.join(newcomer(theirs, "new", Some(wrong))).unwrap_err().to_string().contains("another pool"));
    guest.check();
    settled(&sharer, |now| now.uses == 40);
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
