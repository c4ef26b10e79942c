//! The thread that waits for the sockets of a console's ports. It is there from when the first port is joined.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use host::events::{self, Watch};

use super::{CONTROL_RECEIVE, Ports, receive_queue, transmit_queue};

/// The thread. Dropping it stops it and waits for it.
pub(super) struct Sockets {
    ports: Arc<Ports>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sockets {
    pub fn start(ports: Arc<Ports>) -> io::Result<Sockets> {
        let stopping = Arc::<AtomicBool>::default();
        let (twin, flag) = (Arc::clone(&ports), Arc::clone(&stopping));
        let thread = thread::Builder::new().name("rz-console".into()).spawn(move || twin.run(&flag))?;
        let _ = ports.waiter.set(thread.thread().id());
        Ok(Sockets { ports, stopping, thread: Some(thread) })
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.ports.doorbell.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Ports {
    fn run(&self, stopping: &AtomicBool) {
        loop {
            self.doorbell.drain();
            // Looked at after the drain: who stops us sets it before ringing.
            if stopping.load(Ordering::SeqCst) {
                return;
            }
            if self.wait().is_err() {
                // Out of kernel memory, or a defect of ours: do not spin on it.
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Sleeps until a socket or the doorbell wants us, and serves the queues that waited for the former.
    fn wait(&self) -> io::Result<()> {
        let interests =
            self.list.iter().enumerate().filter_map(|(number, port)| Some((number, port.lock().interest()?)));
        let interests: Vec<_> = interests.collect();
        let mut watches = vec![Watch::new(self.doorbell.as_fd(), true, false)];
        for (_, (socket, read, write)) in &interests {
            watches.push(Watch::new(socket.as_fd(), *read, *write));
        }
        events::poll(&mut watches, None)?;
        let Some(line) = self.line.get() else { return Ok(()) };
        for (watch, (number, (socket, ..))) in watches[1..].iter().zip(&interests) {
            let (mut receive, mut transmit) = (false, false);
            {
                let mut port = self.list[*number].lock();
                // Whoever joined the port anew meanwhile has another socket.
                if !port.interest().is_some_and(|(now, ..)| Arc::ptr_eq(&now, socket)) {
                    continue;
                }
                if watch.closed {
                    port.hang_up();
                    (receive, transmit) = (true, true);
                }
                if watch.readable {
                    receive |= port.can_read();
                }
                if watch.writable {
                    transmit |= port.can_write();
                }
            }
            if receive {
                line.serve(receive_queue(*number));
            }
            if transmit {
                line.serve(transmit_queue(*number));
            }
            if watch.closed {
                line.serve(CONTROL_RECEIVE);
            }
        }
        Ok(())
    }
}
