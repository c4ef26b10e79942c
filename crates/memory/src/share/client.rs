//! The VM's side of sharing: offers pages, and is told which shared pages may replace them.
//!
//! A client keeps its socket open as long as it lives, also when sharing has failed: what closes is gone, and its pages go back
//! to the pool, so it must not be dropped while the VM uses shared pages. When another sharer comes, the VM registers
//! with that one, and drops the old client then.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use host::passing::send_all;
use x86::Ppn;

use super::wire::{
    HEADER, MOST_CONTENTS, MOST_HELD, MOST_OFFERED, MOST_RELEASED, NONE, Reply, Request, VERSION, size_of_items,
};
use super::{MOST_PAGES, Page};
use crate::worker::Common;

/// How long a sharer may take for an answer. One that takes longer has failed: only sharing waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    seed: u64,
    has_failed: bool,
    again: Vec<Ppn>,
}

fn is_page(page: &u32) -> bool {
    *page < MOST_PAGES || *page == NONE
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the sharer {what}"))
}

impl Common for Client {
    fn seed(&self) -> u64 {
        self.seed
    }

    fn offer(
        &mut self,
        pages: &[(Ppn, u64)],
        content: &mut dyn FnMut(Ppn) -> Option<Box<Page>>,
    ) -> io::Result<Vec<Option<u32>>> {
        self.offer_all(pages, content)
    }

    fn release(&mut self, pages: &[u32]) -> io::Result<()> {
        pages
            .chunks(MOST_RELEASED)
            .try_for_each(|part| self.attempt(|client| client.send(&Request::Release(part.to_vec()))))
    }

    fn take_again(&mut self) -> Vec<Ppn> {
        std::mem::take(&mut self.again)
    }
}

impl Client {
    /// Registers with a sharer. `held` are the shared pages that the VM uses already, and how often, each named once. `pool` is
    /// the file that has them: also one without pages of the VM's may be what a new sharer waits for.
    ///
    /// # Errors
    /// The socket's; when the sharer refuses, its sentence.
    pub fn new(socket: UnixStream, pool: Option<&File>, held: &[(u32, u32)]) -> io::Result<Client> {
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let mut client = Client { socket, seed: 0, has_failed: false, again: Vec::new() };
        let register = Request::Register { version: VERSION, held: held.len() as u32 };
        send_all(client.socket.as_fd(), &register.encode(), pool.map(|pool| pool.as_fd()))?;
        for part in held.chunks(MOST_HELD) {
            client.send(&Request::Held(part.to_vec()))?;
        }
        match client.receive()? {
            Reply::Welcome { seed } => client.seed = seed,
            _ => return Err(wrong("did not welcome the vm")),
        }
        Ok(client)
    }

    fn offer_all(
        &mut self,
        pages: &[(Ppn, u64)],
        content: &mut dyn FnMut(Ppn) -> Option<Box<Page>>,
    ) -> io::Result<Vec<Option<u32>>> {
        let mut answers = Vec::with_capacity(pages.len());
        for part in pages.chunks(MOST_OFFERED) {
            let answer = self.attempt(|client| client.offer_part(part, content))?;
            answers.extend(answer.into_iter().map(|page| (page != NONE).then_some(page)));
        }
        Ok(answers)
    }

    fn offer_part(
        &mut self,
        pages: &[(Ppn, u64)],
        content: &mut dyn FnMut(Ppn) -> Option<Box<Page>>,
    ) -> io::Result<Vec<u32>> {
        // A page number of RAM has 28 bits at most.
        self.send(&Request::Offer(pages.iter().map(|(ppn, hash)| (ppn.0 as u32, *hash)).collect()))?;
        // Each page is asked for once at most.
        for _ in 0..=pages.len() + 1 {
            match self.receive()? {
                Reply::Want(places) if places.len() <= MOST_CONTENTS => {
                    let page = |place: u32| {
                        let (ppn, _) =
                            pages.get(place as usize).ok_or_else(|| wrong("wants a page that was not offered"))?;
                        Ok(content(*ppn).map(|page| (place, page)))
                    };
                    let found: io::Result<Vec<_>> = places.into_iter().map(page).collect();
                    self.send(&Request::Content(found?.into_iter().flatten().collect()))?;
                }
                Reply::Again(again) => self.again.extend(again.into_iter().map(|ppn| Ppn(u64::from(ppn)))),
                Reply::Answer(answer) if answer.len() == pages.len() && answer.iter().all(is_page) => {
                    return Ok(answer);
                }
                _ => return Err(wrong("answers something else than it was asked")),
            }
        }
        Err(wrong("wants more pages than were offered"))
    }

    /// After a failure nobody knows what the other side has understood.
    fn attempt<T>(&mut self, call: impl FnOnce(&mut Client) -> io::Result<T>) -> io::Result<T> {
        if self.has_failed {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "sharing has ended by an earlier failure"));
        }
        let result = call(self);
        self.has_failed = result.is_err();
        result
    }

    fn send(&self, request: &Request) -> io::Result<()> {
        send_all(self.socket.as_fd(), &request.encode(), None)
    }

    fn receive(&mut self) -> io::Result<Reply> {
        let mut kind = [0; HEADER];
        self.socket.read_exact(&mut kind)?;
        let size = size_of_items(kind, true).map_err(|_| wrong("says what no sharer says"))?;
        let mut items = vec![0; size];
        self.socket.read_exact(&mut items)?;
        match Reply::decode(kind, &items) {
            Some(Reply::Refused(why)) => {
                Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("the sharer refuses the vm: {why}")))
            }
            Some(reply) => Ok(reply),
            None => Err(wrong("says what cannot be read")),
        }
    }
}
