//! Sharers that take over from one that was killed.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use host::events::{Watch, poll};
use host::map::memfd;
use host::passing::{receive, send_all};
use x86::{PAGE_SIZE, Ppn};

use super::super::client::Client;
use super::super::hash;
use super::super::server::Sharer;
use super::super::wire::NONE;
use super::{Guest, content, newcomer, settled};
use crate::random::Random;
use crate::worker::Common;

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

/// Carries bytes, and files that come with them, from one socket to the other until `left` have gone by; then it says so, and
/// carries no more.
fn carry(from: UnixStream, to: UnixStream, left: Arc<AtomicUsize>, stuck: Sender<()>) {
    loop {
        let (mut byte, mut files) = ([0], Vec::new());
        poll(&mut [Watch::new(from.as_fd(), true, false)], None).unwrap();
        let Ok(1) = receive(from.as_fd(), &mut byte, &mut files) else { return };
        let take = |left: usize| if left == usize::MAX { Some(left) } else { left.checked_sub(1) };
        if left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_err() {
            let _ = stuck.send(());
            return;
        }
        if send_all(to.as_fd(), &byte, files.first().map(|file| file.as_fd())).is_err() {
            return;
        }
    }
}

#[test]
fn a_sharer_may_die_after_any_byte() {
    let mut random = Random(11);
    let mut sharer = Sharer::start(1 << 20).unwrap();
    let mut guest = Guest::new(&sharer, "guest");
    let mut other = Guest::new(&sharer, "other");
    let ppns: Vec<u64> = (0..12).collect();
    let mut ends = [0; 2];
    for _ in 0..60 {
        // A line to the sharer that is cut somewhere in what follows: 3 contents of 4 KiB, and some hundred bytes.
        let (ours, near) = UnixStream::pair().unwrap();
        let (far, theirs) = UnixStream::pair().unwrap();
        sharer.join(newcomer(theirs, "guest", Some(guest.identity))).unwrap();
        let left = Arc::new(AtomicUsize::new(usize::MAX));
        let (stuck, is_stuck) = channel();
        for (from, to) in [(&near, &far), (&far, &near)] {
            let (from, to, left, stuck) =
                (from.try_clone().unwrap(), to.try_clone().unwrap(), left.clone(), stuck.clone());
            std::thread::spawn(move || carry(from, to, left, stuck));
        }
        guest.client = Client::new(ours, Some(&guest.pool), &guest.held()).unwrap();
        ppns.iter().for_each(|ppn| other.store(*ppn, random.below(40)));
        other.offer(&ppns);
        let bytes = if random.below(2) == 0 { random.below(600) } else { random.below(16_000) };
        left.store(bytes as usize, Ordering::SeqCst);
        let seed = guest.client.seed();
        let ended = std::thread::scope(|scope| {
            let (guest, ppns) = (&mut guest, &ppns);
            let talk = scope.spawn(move || {
                // New contents, some of them in twos and some the other's; what was shared is released.
                let mut random = Random(bytes);
                let (pages, mut released) = (&mut guest.pages, Vec::new());
                for ppn in ppns {
                    pages.insert(*ppn, random.below(40));
                    released.extend(guest.shared.remove(ppn));
                }
                guest.client.release(&released)?;
                let offers: Vec<(Ppn, u64)> =
                    ppns.iter().map(|ppn| (Ppn(*ppn), hash(&content(pages[ppn]), seed))).collect();
                let answer = guest.client.offer(&offers, &mut |ppn| Some(Box::new(content(pages[&ppn.0]))))?;
                for (ppn, page) in ppns.iter().zip(answer) {
                    page.map(|page| guest.shared.insert(*ppn, page));
                }
                Ok::<_, std::io::Error>(())
            });
            while !talk.is_finished() && is_stuck.recv_timeout(Duration::from_millis(1)).is_err() {}
            // The sharer is killed; then the line is closed.
            sharer = Sharer::start(1 << 20).unwrap();
            [&near, &far].iter().for_each(|end| end.shutdown(Shutdown::Both).unwrap());
            talk.join().unwrap().is_ok()
        });
        ends[usize::from(ended)] += 1;
        for guest in [&mut guest, &mut other] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            sharer.join(newcomer(theirs, "guest", Some(guest.identity))).unwrap();
            guest.client = Client::new(ours, Some(&guest.pool), &guest.held()).unwrap();
        }
        sharer.recovered().unwrap();
        [&guest, &other].into_iter().for_each(Guest::check);
        let uses = guest.shared.len() + other.shared.len();
        settled(&sharer, |now| (now.members, now.uses) == (2, uses as u64));
    }
    assert!(ends[0] > 20 && ends[1] > 5, "{ends:?}");
}
