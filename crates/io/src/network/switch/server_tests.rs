//! The switch between processes, driven over sockets as processes drive it, honest ones and others.

use std::io::{ErrorKind, IoSlice};
use std::os::fd::AsFd;
use std::time::Duration;

use host::events::{Watch, poll};
use host::medium::{self, Medium};

use super::server::{Counters, Refused, Server};
use crate::network::frame::{HEADER_BYTES, MOST_BYTES};
use crate::network::{Mac, packet};

const LONG: Option<Duration> = Some(Duration::from_secs(30));

fn mac(number: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, number])
}

struct Process(Medium);

impl Process {
    fn new(server: &Server, card: Mac) -> Result<Process, Refused> {
        let (ours, theirs) = medium::pair().unwrap();
        server.plug_in(card, theirs)?;
        Ok(Process(Medium::socket(ours).unwrap()))
    }

    /// Sends a frame that is told by `mark`; false when there is no room for it.
    fn send(&self, source: Mac, target: Mac, mark: u8, size: usize) -> bool {
        let mut bytes = packet::ethernet(source, target, 0x88b5);
        bytes.resize(size, mark);
        let sent = self.0.send(&[IoSlice::new(&[0; HEADER_BYTES]), IoSlice::new(&bytes)]);
        assert!(sent.as_ref().is_ok_and(|()| true) || sent.as_ref().unwrap_err().kind() == ErrorKind::WouldBlock);
        sent.is_ok()
    }

    /// What the next frame is told by, waiting for one.
    fn hear(&self) -> u8 {
        let mut watches = [Watch::new(self.0.as_fd(), true, false)];
        poll(&mut watches, LONG).unwrap();
        assert!(watches[0].readable, "nothing has come");
        let (mut header, mut bytes) = ([0; HEADER_BYTES], Vec::new());
        assert!(self.0.receive(&mut header, &mut bytes, MOST_BYTES).unwrap() > HEADER_BYTES);
        *bytes.last().unwrap()
    }
}

fn counters(server: &Server, card: Mac) -> Counters {
    server.report().into_iter().find(|(known, _)| *known == card).unwrap().1
}

#[test]
fn processes_hear_what_is_for_them_and_nobody_speaks_for_another() {
    let server = Server::start().unwrap();
    let [a, b, c] = [1, 2, 3].map(|number| Process::new(&server, mac(number)).unwrap());
    assert!(a.send(mac(1), mac(2), 10, 60_000));
    assert_eq!(b.hear(), 10);
    // With another's address, too short, and then with its own: only that is heard.
    assert!(b.send(mac(1), mac(3), 11, 100));
    b.0.send(&[IoSlice::new(b"no frame")]).unwrap();
    b.0.send(&[IoSlice::new(&[0; HEADER_BYTES]), IoSlice::new(&vec![0; MOST_BYTES + 1])]).unwrap();
    assert!(b.send(mac(2), mac(3), 12, 100));
    assert_eq!(c.hear(), 12);
    assert_eq!(counters(&server, mac(2)).refused_frames, 3);
    assert!(c.send(mac(3), Mac::BROADCAST, 13, 100));
    assert_eq!((a.hear(), b.hear()), (13, 13));
    let known = counters(&server, mac(1));
    assert_eq!((known.received_frames, known.received_bytes, known.sent_frames), (1, 60_000, 1));
}

#[test]
fn an_address_is_one_cards_and_free_when_its_process_is_gone() {
    let server = Server::start().unwrap();
    let first = Process::new(&server, mac(1)).unwrap();
    assert!(matches!(Process::new(&server, mac(1)), Err(Refused::Taken(_))));
    drop(first);
    let (again, other) = (Process::new(&server, mac(1)).unwrap(), Process::new(&server, mac(2)).unwrap());
    assert!(other.send(mac(2), mac(1), 5, 64));
    assert_eq!(again.hear(), 5);
}

#[test]
fn who_reads_nothing_and_who_shouts_harm_themselves_only() {
    let server = Server::start().unwrap();
    let [loud, deaf, quiet, other] = [1, 2, 3, 4].map(|number| Process::new(&server, mac(number)).unwrap());
    let mut sent = 0;
    // Until the one that does not read has lost some.
    while counters(&server, mac(2)).lost_frames == 0 {
        sent += u64::from(loud.send(mac(1), mac(2), 1, 60_000));
        assert!(sent < 100_000);
    }
    assert!(quiet.send(mac(3), mac(4), 2, 100));
    assert_eq!(other.hear(), 2);
    // What is for the deaf one from somebody else has its place, and comes in turn.
    assert!(quiet.send(mac(3), mac(2), 3, 100));
    let heard = (0..200).position(|_| deaf.hear() == 3).unwrap();
    assert!(heard < 40, "it came behind {heard} others");
    // Nobody may speak to all for ever.
    while counters(&server, mac(1)).limited_frames == 0 {
        loud.send(mac(1), Mac::BROADCAST, 4, 60_000);
    }
}
