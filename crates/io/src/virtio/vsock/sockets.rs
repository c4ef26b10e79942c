//! The thread that waits for the sockets of a guest's connections, and for those who want one.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use host::events::{self, Watch};

use super::{RECEIVE, Shared};

/// Who has connected and not said to what, at any time.
const MOST_GREETINGS: usize = 64;
/// `CONNECT 4294967295` and the end of the line.
const LONGEST_LINE: usize = 19;

/// The thread. Dropping it stops it and waits for it.
pub struct Sockets {
    shared: Arc<Shared>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A program that has connected to our own socket, and has yet to say to which port.
struct Greeting {
    socket: UnixStream,
    line: Vec<u8>,
}

enum Said {
    /// Not all of it.
    Part,
    Port(u32),
    /// What is no line of ours, or nothing any more.
    Nonsense,
}

impl Sockets {
    pub fn start(shared: Arc<Shared>, listener: Option<UnixListener>) -> io::Result<Sockets> {
        let stopping = Arc::<AtomicBool>::default();
        let (twin, flag) = (Arc::clone(&shared), Arc::clone(&stopping));
        let thread =
            thread::Builder::new().name("rz-vsock".into()).spawn(move || twin.run(&flag, listener.as_ref()))?;
        let _ = shared.waiter.set(thread.thread().id());
        Ok(Sockets { shared, stopping, thread: Some(thread) })
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.shared.doorbell.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Greeting {
    /// Reads on, to the end of the line and no further: what follows is the guest's.
    fn read(&mut self) -> Said {
        loop {
            let mut byte = [0];
            match events::receive(self.socket.as_fd(), &mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if self.line.len() < LONGEST_LINE => self.line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Said::Part,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return Said::Nonsense,
            }
        }
        let port = self.line.strip_prefix(b"CONNECT ").and_then(|port| std::str::from_utf8(port).ok());
        port.and_then(|port| port.trim_end_matches('\r').parse().ok()).map_or(Said::Nonsense, Said::Port)
    }
}

impl Shared {
    fn run(&self, stopping: &AtomicBool, listener: Option<&UnixListener>) {
        let mut greetings = Vec::new();
        loop {
            self.doorbell.drain();
            // Looked at after the drain: who stops us sets it before ringing.
            if stopping.load(Ordering::SeqCst) {
                return;
            }
            if self.wait(listener, &mut greetings).is_err() {
                // Out of kernel memory, or a defect of ours: do not spin on it.
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Sleeps until a socket or the doorbell wants us, and carries out what the former say.
    fn wait(&self, listener: Option<&UnixListener>, greetings: &mut Vec<Greeting>) -> io::Result<()> {
        let interests: Vec<_> = {
            let table = self.table.lock();
            table.connections.iter().filter_map(|(number, one)| Some((*number, one.interest()?))).collect()
        };
        let listener = listener.filter(|_| greetings.len() < MOST_GREETINGS);
        let mut watches = vec![Watch::new(self.doorbell.as_fd(), true, false)];
        for (_, (socket, read, write)) in &interests {
            watches.push(Watch::new(socket.as_fd(), *read, *write));
        }
        watches.extend(greetings.iter().map(|greeting| Watch::new(greeting.socket.as_fd(), true, false)));
        watches.extend(listener.map(|listener| Watch::new(listener.as_fd(), true, false)));
        events::poll(&mut watches, None)?;

        let said: Vec<(bool, bool, bool)> =
            watches[1..].iter().map(|watch| (watch.readable, watch.writable, watch.closed)).collect();
        drop(watches);
        let (of_connections, rest) = said.split_at(interests.len());
        let (of_greetings, of_listener) = rest.split_at(greetings.len());
        let mut has_something = false;
        let mut table = self.table.lock();
        for ((number, _), (readable, writable, closed)) in interests.iter().zip(of_connections) {
            let Some(connection) = table.connections.get_mut(number).filter(|_| *readable || *writable || *closed)
            else {
                continue;
            };
            connection.woken(*readable, *writable, *closed);
            table.settle(*number);
            has_something = true;
        }
        let mut heard = of_greetings.iter();
        greetings
            .extract_if(.., |greeting| {
                let wakes = heard.next().is_some_and(|(readable, _, closed)| *readable || *closed);
                match if wakes { greeting.read() } else { Said::Part } {
                    Said::Part => false,
                    Said::Nonsense => true,
                    Said::Port(port) => {
                        if let Ok(socket) = greeting.socket.try_clone() {
                            // Who finds too many there already reads the end of the stream.
                            has_something |= table.connect(port, socket);
                        }
                        true
                    }
                }
            })
            .for_each(drop);
        drop(table);
        if let (Some(listener), Some((true, ..))) = (listener, of_listener.first()) {
            // One that has thought better of it meanwhile is none; the system may have no descriptor left.
            match listener.accept() {
                Ok((socket, _)) => greetings.push(Greeting { socket, line: Vec::new() }),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if let (true, Some(line)) = (has_something, self.line.get()) {
            line.serve(RECEIVE);
        }
        Ok(())
    }
}
