//! The sharer: one thread that serves the members of all groups, each over a socket of its own, and does what its owner asks.
//!
//! Members get a turn each, of one read and what it brings; who does not read his answers is not read from either. A member
//! that breaks a rule is refused in a sentence, and not listened to from then on; when its socket closes, the pages that it
//! used go back. Half a close is none: a VM that is gone has closed both.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use host::events::{EventFd, Watch, poll, send};
use host::passing::receive;

use super::MOST_PAGES;
use super::group::{Group, Statistics};
use super::table::Identity;
use super::wire::{Frames, Reply};

/// Bytes that are read from a member in its turn.
const TURN: usize = 64 << 10;
/// Files that may wait for the frame that they came with.
const MOST_FILES: usize = 4;
/// Sentences that are kept for the owner.
const MOST_SENTENCES: usize = 1000;

/// A VM that is to become a member.
#[derive(Debug)]
pub struct Newcomer {
    pub group: String,
    pub name: String,
    pub socket: UnixStream,
    /// Pages of memory that the VM has.
    pub pages: u64,
    /// The pool that the VM has from a sharer that is gone: it will bring it along.
    pub pool: Option<Identity>,
}

/// The pool of a group, to read, and which file it is; no file when it is one that a VM has to bring.
pub type Pool = (Option<File>, Identity);

enum Command {
    Join(Newcomer, SyncSender<io::Result<Pool>>),
    Recovered(SyncSender<()>),
    Report(SyncSender<Report>),
    Audit(SyncSender<Vec<String>>),
    Stop,
}

/// All groups by name, and what has happened since the last report, a sentence each.
#[derive(Debug, Default)]
pub struct Report {
    pub groups: Vec<(String, Statistics)>,
    pub sentences: Vec<String>,
}

/// A running sharer. It ends when this is dropped.
#[derive(Debug)]
pub struct Sharer {
    commands: Sender<Command>,
    wake: std::sync::Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Sharer {
    /// Starts the thread; a group's pool has at most `limit` pages, and [`MOST_PAGES`].
    ///
    /// # Errors
    /// The system's.
    pub fn start(limit: u32) -> io::Result<Sharer> {
        let wake = std::sync::Arc::new(EventFd::new()?);
        let (commands, received) = channel();
        let mut server = Server {
            limit: limit.min(MOST_PAGES),
            wake: std::sync::Arc::clone(&wake),
            commands: received,
            groups: HashMap::new(),
            members: Vec::new(),
            sentences: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("sharer".into()).spawn(move || server.run())?;
        Ok(Sharer { commands, wake, thread: Some(thread) })
    }

    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> io::Result<T> {
        let (sender, receiver) = sync_channel(1);
        let ended = || io::Error::other("the sharer has ended by a defect of its own");
        self.commands.send(command(sender)).map_err(|_| ended())?;
        self.wake.signal();
        receiver.recv().map_err(|_| ended())
    }

    /// Takes a VM into a group, which is made when it is the first.
    ///
    /// # Errors
    /// When there is no memory for a pool, the group has another one, or waits for a VM that brings it.
    pub fn join(&self, newcomer: Newcomer) -> io::Result<Pool> {
        self.ask(|sender| Command::Join(newcomer, sender))?
    }

    /// All VMs that had shared pages of an earlier sharer have joined, or are gone. What none of them claims when it registers is
    /// freed.
    ///
    /// # Errors
    /// When the sharer has ended.
    pub fn recovered(&self) -> io::Result<()> {
        self.ask(Command::Recovered)
    }

    /// # Errors
    /// When the sharer has ended.
    pub fn report(&self) -> io::Result<Report> {
        self.ask(Command::Report)
    }

    /// What is not as it must be, a sentence each. Reads all pools.
    ///
    /// # Errors
    /// When the sharer has ended.
    pub fn audit(&self) -> io::Result<Vec<String>> {
        self.ask(Command::Audit)
    }
}

impl Drop for Sharer {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        self.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
struct Member {
    group: String,
    name: String,
    /// Its number in the group.
    number: u16,
    socket: UnixStream,
    frames: Frames,
    files: Vec<OwnedFd>,
    /// Answers that it has not read yet.
    out: Vec<u8>,
    /// It broke a rule.
    is_refused: bool,
}

struct Server {
    limit: u32,
    wake: std::sync::Arc<EventFd>,
    commands: Receiver<Command>,
    groups: HashMap<String, Group>,
    members: Vec<Member>,
    sentences: Vec<String>,
}

impl Server {
    fn run(&mut self) {
        loop {
            self.wake.drain();
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Join(newcomer, sender) => drop(sender.send(self.join(newcomer))),
                    Command::Recovered(sender) => {
                        self.groups.values_mut().for_each(Group::all_are_here);
                        let _ = sender.send(());
                    }
                    Command::Report(sender) => drop(sender.send(self.report())),
                    Command::Audit(sender) => drop(sender.send(self.audit())),
                    Command::Stop => return,
                }
            }
            if let Err(error) = self.wait_and_serve() {
                self.sentences.push(format!("the sharer cannot wait for its members: {error}"));
                return;
            }
        }
    }

    fn join(&mut self, newcomer: Newcomer) -> io::Result<Pool> {
        let Newcomer { group: name, name: vm, socket, pages, pool } = newcomer;
        let refused = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("sharing group '{name}' {why}"));
        if !self.groups.contains_key(&name) {
            self.groups.insert(name.clone(), Group::new(self.limit, pool)?);
        }
        let group = self.groups.get_mut(&name).ok_or_else(|| refused("is not there"))?;
        let identity = group.identity()?;
        let file = group.pool().transpose()?.map(|(file, _)| file);
        if pool.is_some_and(|pool| pool != identity) {
            return Err(refused("has another pool than that vm had"));
        }
        if pool.is_none() && file.is_none() {
            return Err(refused("waits for its pool, which a vm that had it must bring first"));
        }
        let number = group.join(pages, pool.is_some()).ok_or_else(|| refused("has no room for another vm"))?;
        let (frames, files, out) = (Frames::default(), Vec::new(), Vec::new());
        self.members.push(Member { group: name, name: vm, number, socket, frames, files, out, is_refused: false });
        Ok((file, identity))
    }

    fn report(&mut self) -> Report {
        let mut groups: Vec<_> = self.groups.iter().map(|(name, group)| (name.clone(), group.statistics())).collect();
        groups.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        Report { groups, sentences: std::mem::take(&mut self.sentences) }
    }

    fn audit(&self) -> Vec<String> {
        let of_group = |(name, group): (&String, &Group)| {
            group.audit().into_iter().map(|wrong| format!("sharing group '{name}': {wrong}")).collect::<Vec<_>>()
        };
        self.groups.iter().flat_map(of_group).collect()
    }

    /// Gives each member that has something to say a turn.
    fn wait_and_serve(&mut self) -> io::Result<()> {
        let watch = |member: &Member| (!member.is_refused && member.out.is_empty(), !member.out.is_empty());
        let mut watches = vec![Watch::new(self.wake.as_fd(), true, false)];
        watches.extend(self.members.iter().map(|member| {
            let (read, write) = watch(member);
            Watch::new(member.socket.as_fd(), read, write)
        }));
        poll(&mut watches, None)?;
        let happened: Vec<(bool, bool)> =
            watches[1..].iter().map(|watch| (watch.readable || watch.writable, watch.closed)).collect();
        // From the end, since those who are gone are taken out.
        for (at, (is_ready, is_closed)) in happened.into_iter().enumerate().rev() {
            if is_closed {
                self.leave(at);
            } else if is_ready {
                let member = &mut self.members[at];
                let Some(group) = self.groups.get_mut(&member.group) else { continue };
                if let Err(fault) = member.serve(group) {
                    self.refuse(at, &fault);
                }
            }
        }
        Ok(())
    }

    fn leave(&mut self, at: usize) {
        let member = self.members.swap_remove(at);
        let Some(group) = self.groups.get_mut(&member.group) else { return };
        group.leave(member.number);
        if group.is_empty() {
            self.groups.remove(&member.group);
        }
    }

    fn refuse(&mut self, at: usize, fault: &str) {
        let member = &mut self.members[at];
        member.is_refused = true;
        member.files = Vec::new();
        member.frames = Frames::default();
        let words = Reply::Refused(fault.to_string()).encode();
        member.out.extend(words);
        if member.flush().is_err() {
            member.out = Vec::new();
        }
        if self.sentences.len() < MOST_SENTENCES {
            let (vm, group) = (&member.name, &member.group);
            self.sentences.push(format!("vm '{vm}' of sharing group '{group}' shares no more pages: {fault}"));
        }
    }
}

impl Member {
    /// One read, and what can be done with what is there.
    fn serve(&mut self, group: &mut Group) -> Result<(), String> {
        let failed = |error: io::Error| format!("its socket failed: {error}");
        self.flush().map_err(failed)?;
        if !self.out.is_empty() || self.is_refused {
            return Ok(());
        }
        let mut bytes = vec![0; TURN];
        match receive(self.socket.as_fd(), &mut bytes, &mut self.files) {
            Ok(0) => return Err("it has closed its side of the socket".into()),
            Ok(_) if self.files.len() > MOST_FILES => return Err("it sends files that nobody asked for".into()),
            Ok(count) => self.frames.add(&bytes[..count]),
            // Nothing new: there may be frames that had to wait for answers to be read.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(failed(error)),
        }
        let mut replies = Vec::new();
        while self.out.is_empty()
            && let Some(request) = self.frames.next()?
        {
            group.handle(self.number, request, &mut self.files, &mut replies)?;
            replies.drain(..).for_each(|reply| self.out.extend(reply.encode()));
            self.flush().map_err(failed)?;
        }
        Ok(())
    }

    /// Sends what it takes now of its answers.
    fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match send(self.socket.as_fd(), &self.out) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It is gone, as the next poll will say.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.out = Vec::new(),
                Err(error) => return Err(error),
            }
        }
        // Most members are silent most of the time.
        self.out = Vec::new();
        Ok(())
    }
}
