//! Cables: between two cards over a switch, and with somebody at the other end who is not to be trusted.

use std::time::{Duration, Instant};

use host::medium;

use super::*;
use crate::network::frame::Offload;
use crate::network::switch::server::Server;
use crate::network::{Mac, packet};

const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
const B: Mac = Mac([2, 0, 0, 0, 0, 2]);

struct Card {
    cable: Cable,
    inbox: Arc<Inbox>,
}

impl Card {
    fn new() -> Card {
        let (cable, inbox) = (Cable::new().unwrap(), Inbox::new(0));
        cable.connect(&inbox);
        Card { cable, inbox }
    }

    fn plug_into(&self, server: &Server, card: Mac) {
        let (ours, theirs) = medium::pair().unwrap();
        server.plug_in(card, theirs).unwrap();
        self.cable.plug_into(Medium::socket(ours).unwrap()).unwrap();
    }

    fn hear(&self) -> Frame {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some((frame, tell)) = self.inbox.take() {
                if tell {
                    self.cable.has_room();
                }
                return frame;
            }
            assert!(Instant::now() < end, "nothing has come");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn frame(source: Mac, target: Mac, number: u32, size: usize) -> Frame {
    let mut bytes = packet::ethernet(source, target, 0x88b5);
    bytes.extend(number.to_be_bytes());
    bytes.resize(size, 0);
    Frame::plain(bytes)
}

#[test]
fn frames_come_in_order_and_as_they_are_through_a_switch_that_comes_back() {
    let (a, b) = (Card::new(), Card::new());
    // Plugged into nothing, all is lost.
    a.cable.send(&mut frame(A, B, 0, 100));
    assert_eq!((a.cable.lost(), a.cable.is_plugged_in()), (1, false));
    for _ in 0..2 {
        let server = Server::start().unwrap();
        a.plug_into(&server, A);
        b.plug_into(&server, B);
        // More than sockets hold, so that some wait on the way: none is lost below the limits.
        for number in 0..60 {
            let mut sent = frame(A, B, number, 60_000);
            sent.offload = Offload { checksum: Some((14, 2)), ..Offload::default() };
            a.cable.send(&mut sent);
        }
        for number in 0..60_u32 {
            let heard = b.hear();
            assert_eq!(heard.head[14..18], number.to_be_bytes());
            assert_eq!((heard.len(), heard.offload.checksum), (60_000, Some((14, 2))));
        }
        drop(server);
        let end = Instant::now() + Duration::from_secs(30);
        while a.cable.is_plugged_in() {
            assert!(Instant::now() < end);
            thread::sleep(Duration::from_millis(1));
        }
    }
    a.cable.end();
    let (ours, _theirs) = medium::pair().unwrap();
    let late = a.cable.plug_into(Medium::socket(ours).unwrap()).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::BrokenPipe);
}

#[test]
fn what_makes_no_sense_is_not_given_to_the_guest() {
    let card = Card::new();
    let (ours, theirs) = medium::pair().unwrap();
    card.cable.plug_into(Medium::socket(ours).unwrap()).unwrap();
    let theirs = Medium::socket(theirs).unwrap();
    let good = frame(A, B, 7, 60);
    let cut = Offload { checksum: Some((34, 16)), cut: Cut::Tcp4, piece: 1400 }.to_bytes(54, 1);
    for (header, bytes) in [
        (&[0; HEADER_BYTES][..], &[0; 13][..]),
        (&[0; 3], &[]),
        (&[0; HEADER_BYTES], &vec![0; MOST_BYTES + 1]),
        // It is no TCP segment.
        (&cut, &good.head),
        // Its checksum is outside.
        (&Offload { checksum: Some((60, 0)), ..Offload::default() }.to_bytes(0, 1), &good.head),
        (&[0; HEADER_BYTES], &good.head),
    ] {
        theirs.send(&[IoSlice::new(header), IoSlice::new(bytes)]).unwrap();
    }
    assert_eq!(card.hear().head, good.head);
    assert!(card.inbox.is_empty());
}

#[test]
fn a_guest_that_takes_nothing_makes_who_sends_wait() {
    let card = Card::new();
    let (ours, theirs) = medium::pair().unwrap();
    card.cable.plug_into(Medium::socket(ours).unwrap()).unwrap();
    let theirs = Medium::socket(theirs).unwrap();
    let large = frame(A, B, 0, 60_000);
    let mut sent = 0;
    let mut refused = 0;
    while refused < 100 {
        match theirs.send(&[IoSlice::new(&[0; HEADER_BYTES]), IoSlice::new(&large.head)]) {
            Ok(()) => (sent, refused) = (sent + 1, 0),
            Err(_) => {
                refused += 1;
                thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(sent < 1000, "nobody waits");
    }
    for _ in 0..sent {
        card.hear();
    }
    assert_eq!(card.inbox.lost(), 0);
}
