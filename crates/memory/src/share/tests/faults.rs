//! Members that break rules, die, flood, or talk rubbish.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use host::map::memfd;
use host::passing::send_all;
use x86::Ppn;

use super::super::client::Client;
use super::super::hash;
use super::super::server::Sharer;
use super::super::wire::{Reply, Request, VERSION, size_of_items};
use super::{Guest, SIZE, content, join, newcomer, settled};
use crate::random::Random;
use crate::worker::Common;

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
        let mut items = vec![0; size_of_items(kind, true).unwrap()];
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
