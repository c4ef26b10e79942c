//! The one serial thread of a VM: carries bytes between the serial ports and their sockets.
//!
//! Bytes from the guest: the first one wakes the thread, which sends it at once and then dozes for a moment, so that
//! the rest of a message costs neither the guest nor the thread a system call a byte. When a socket is full, its port's
//! buffer fills up and the guest sees a busy transmitter.
//!
//! Bytes to the guest: read from the socket only as far as there is room, so back pressure reaches the sender.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use host::clock::{Clock, precise_sleeps};
use host::counters::Counters;
use host::events::{self, Watch};
use host::lock::{Rank, RankedMutex};

use crate::uart::{Doorbell, Receiver, TRANSMIT_BUFFER, Uart};

/// How long to doze after sending: an interactive byte waits at most this long, a burst fills the buffer meanwhile.
const DOZE: Duration = Duration::from_micros(200);
/// How often to look whether a guest that is reading has finished its burst, and when to stop looking: then the port
/// wakes the thread instead.
const LOOK_AGAIN: Duration = Duration::from_micros(50);
const LOOK_LONGEST: u64 = 5_000_000;
/// How much is read from a socket ahead of the guest.
const RECEIVE_BUFFER: usize = 16 * 1024;

/// What to wait for at one socket.
struct Interest {
    socket: Arc<UnixStream>,
    read: bool,
    write: bool,
}

/// What the thread keeps for one port.
struct Port {
    uart: Arc<RankedMutex<Uart>>,
    socket: Option<Arc<UnixStream>>,
    /// It had a socket once.
    joined: bool,
    /// Taken from the port, not all sent yet.
    outgoing: Vec<u8>,
    sent: usize,
    /// Read from the socket, not all handed to the port yet.
    incoming: Vec<u8>,
    handed: usize,
    /// The other side sends no more.
    ended: bool,
    /// When the last burst was handed to the port.
    handed_at: u64,
    /// The socket was full, or was empty: wait for it before trying again.
    full: bool,
    empty: bool,
}

struct Shared {
    clock: Clock,
    counters: Arc<Counters>,
    doorbell: Arc<Doorbell>,
    ports: RankedMutex<Vec<Port>>,
    stopping: AtomicBool,
    /// The guest has ended: a port whose last byte is sent tells its far end so.
    finishing: AtomicBool,
}

/// The ports and their thread. Dropping it stops the thread.
pub struct SerialService {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Why a serial port's socket cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    #[error("there is no serial port {0}")]
    NoPort(usize),
    #[error("serial port {0} already has its socket")]
    Taken(usize),
    #[error("no socket for a serial port: {0}")]
    System(#[from] io::Error),
}

impl SerialService {
    /// Serve these ports, which share the doorbell.
    ///
    /// # Errors
    /// The system's, when it gives no thread.
    pub fn start(
        uarts: Vec<Arc<RankedMutex<Uart>>>,
        doorbell: Arc<Doorbell>,
        clock: Clock,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let ports = uarts.into_iter().map(Port::new).collect();
        let shared = Arc::new(Shared {
            clock,
            counters,
            doorbell,
            ports: RankedMutex::new(Rank::Service, ports),
            stopping: AtomicBool::new(false),
            finishing: AtomicBool::new(false),
        });
        let twin = Arc::clone(&shared);
        let thread = thread::Builder::new().name("serial".into()).spawn(move || twin.run())?;
        Ok(SerialService { shared, thread: Some(thread) })
    }

    /// Join a stream socket to a port and return its far end, which the caller owns. Until then, what the guest sends
    /// through that port is gone, and from when the far end is closed.
    ///
    /// # Errors
    /// [`SerialError`], when there is no such port, or it has its socket already.
    pub fn connect(&self, index: usize) -> Result<OwnedFd, SerialError> {
        let mut ports = self.shared.ports.lock();
        let port = ports.get_mut(index).ok_or(SerialError::NoPort(index))?;
        if port.joined {
            return Err(SerialError::Taken(index));
        }
        let (near, far) = UnixStream::pair()?;
        port.socket = Some(Arc::new(near));
        port.joined = true;
        port.uart.lock().set_connected(true);
        drop(ports);
        self.shared.doorbell.ring_at_once();
        Ok(far.into())
    }
}

impl SerialService {
    /// The guest sends no more: each far end reads to the last byte that was sent, and then the end of the stream. Does
    /// not wait for that.
    pub fn finish(&self) {
        self.shared.finishing.store(true, Ordering::SeqCst);
        self.shared.doorbell.event.signal();
    }
}

impl Drop for SerialService {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.doorbell.event.signal();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Port {
    fn new(uart: Arc<RankedMutex<Uart>>) -> Self {
        Port {
            uart,
            socket: None,
            joined: false,
            outgoing: Vec::new(),
            sent: 0,
            incoming: Vec::new(),
            handed: 0,
            ended: false,
            handed_at: 0,
            full: false,
            empty: false,
        }
    }

    fn interest(&self) -> Option<Interest> {
        let socket = Arc::clone(self.socket.as_ref()?);
        Some(Interest { socket, read: self.has_room() && self.empty, write: self.full })
    }

    /// The far end is closed: nothing can be sent any more. What it had sent is still the guest's; the kernel holds
    /// only a socket buffer of it.
    fn hang_up(&mut self) {
        while !self.ended && self.socket.is_some() {
            self.read_socket();
            if self.empty {
                break;
            }
        }
        self.ended = true;
        self.socket = None;
        self.outgoing.clear();
        self.sent = 0;
        self.uart.lock().set_connected(false);
    }

    /// Send what the guest has sent, as far as the socket takes it. True if there was anything.
    fn carry_out(&mut self, counters: &Counters) -> bool {
        let mut moved = false;
        while !self.full {
            let Some(socket) = &self.socket else { return moved };
            if self.sent == self.outgoing.len() {
                self.outgoing.clear();
                self.sent = 0;
                if self.outgoing.capacity() < TRANSMIT_BUFFER && moved {
                    self.outgoing.reserve(TRANSMIT_BUFFER);
                }
                self.uart.lock().take_transmitted(&mut self.outgoing);
                if self.outgoing.is_empty() {
                    return moved;
                }
            }
            match events::send(socket.as_fd(), &self.outgoing[self.sent..]) {
                Ok(count) => {
                    self.sent += count;
                    counters.serial_sent.add(count as u64);
                    moved = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.full = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.hang_up(),
            }
        }
        moved
    }

    /// After [`Port::carry_out`] has sent the guest's last bytes, tell the far end that there are no more.
    fn finish(&mut self) {
        if let (false, Some(socket)) = (self.full, &self.socket) {
            // It fails when the far end is gone, who then does not need it.
            let _ = socket.shutdown(std::net::Shutdown::Write);
        }
    }

    /// Whether there is room to read more from the socket.
    fn has_room(&self) -> bool {
        self.socket.is_some() && !self.ended && self.incoming.len() - self.handed < RECEIVE_BUFFER / 2
    }

    /// Read from the socket and hand to the port. Returns how soon to look again, if there is more to do.
    fn carry_in(&mut self, now: u64, counters: &Counters) -> Option<Duration> {
        if self.has_room() && !self.empty {
            self.read_socket();
        }
        if self.handed == self.incoming.len() {
            return None;
        }
        let mut uart = self.uart.lock();
        match uart.receiver(now) {
            Receiver::Ready => {
                let count = uart.receive(&self.incoming[self.handed..]);
                self.handed += count;
                self.handed_at = now;
                counters.serial_received.add(count as u64);
                // If this was all, the next thing to do is to read the socket, which may be waited for.
                let more = self.handed < self.incoming.len() || !self.empty && !self.ended;
                more.then_some(LOOK_AGAIN)
            }
            Receiver::ReadyAt(time) => Some(Duration::from_nanos(time.saturating_sub(now))),
            Receiver::Busy if now.saturating_sub(self.handed_at) < LOOK_LONGEST => Some(LOOK_AGAIN),
            Receiver::Busy => {
                uart.ring_when_ready();
                None
            }
        }
    }

    fn read_socket(&mut self) {
        let Some(socket) = &self.socket else { return };
        self.incoming.drain(..self.handed);
        self.handed = 0;
        let held = self.incoming.len();
        self.incoming.resize(held + RECEIVE_BUFFER, 0);
        let result = events::receive(socket.as_fd(), &mut self.incoming[held..]);
        let count = *result.as_ref().unwrap_or(&0);
        self.incoming.truncate(held + count);
        match result {
            Ok(0) => self.ended = true,
            // A stream socket that gives less than it could is empty.
            Ok(count) => self.empty = count < RECEIVE_BUFFER,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.empty = true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.ended = true,
        }
    }
}

impl Shared {
    fn run(&self) {
        precise_sleeps();
        loop {
            self.doorbell.awake();
            self.doorbell.event.drain();
            // Looked at after the drain: who stops us sets it before ringing, and a ring that is drained unseen is lost.
            if self.stopping.load(Ordering::SeqCst) {
                break;
            }
            let mut ports = self.ports.lock();
            let mut wait = self.look(&mut ports);
            self.doorbell.about_to_sleep(wait.is_some());
            if wait.is_none() {
                // The last look: whatever comes after it finds us announced as asleep, and rings.
                wait = self.look(&mut ports);
            }
            let sockets: Vec<_> = ports.iter().map(Port::interest).collect();
            // The ports must not stay locked while we sleep.
            drop(ports);
            if self.sleep(&sockets, wait).is_err() {
                // Out of kernel memory, or a defect of ours: do not spin on it.
                thread::sleep(Duration::from_millis(10));
            }
        }
        // What the guest said last is not lost because its machine is taken apart, if the sockets take it.
        self.look(&mut self.ports.lock());
    }

    /// Move what can be moved, and say how soon to look again. None: nothing will move until somebody wakes us.
    fn look(&self, ports: &mut [Port]) -> Option<Duration> {
        let now = self.clock.now();
        let mut wait = None;
        for port in ports {
            let doze = port.carry_out(&self.counters).then_some(DOZE);
            if self.finishing.load(Ordering::SeqCst) {
                port.finish();
            }
            let again = port.carry_in(now, &self.counters);
            wait = [wait, doze, again].into_iter().flatten().min();
        }
        wait
    }

    /// Sleep until a socket or the doorbell wants us, or `wait` has passed, and note what the sockets say.
    fn sleep(&self, sockets: &[Option<Interest>], wait: Option<Duration>) -> io::Result<()> {
        let mut watches = vec![Watch::new(self.doorbell.event.as_fd(), true, false)];
        let mut owners = Vec::new();
        for (index, interest) in sockets.iter().enumerate() {
            if let Some(Interest { socket, read, write }) = interest {
                watches.push(Watch::new(socket.as_fd(), *read, *write));
                owners.push(index);
            }
        }
        events::poll(&mut watches, wait)?;
        let mut ports = self.ports.lock();
        for (watch, index) in watches.iter().skip(1).zip(owners) {
            let Some(port) = ports.get_mut(index) else { continue };
            port.full &= !watch.writable;
            port.empty &= !watch.readable;
            if watch.closed {
                port.hang_up();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{AccessSize::Byte, PortDevice, shared};
    use crate::irq::Fabric;
    use crate::timer::TimerQueue;
    use std::io::{Read, Write};
    use std::time::Instant;

    struct Bench {
        service: SerialService,
        uart: Arc<RankedMutex<Uart>>,
        far: UnixStream,
        counters: Arc<Counters>,
    }

    fn bench() -> Bench {
        let counters = Arc::<Counters>::default();
        let clock = Clock::new();
        let timers = TimerQueue::new(clock.clone(), Arc::clone(&counters));
        let kick: crate::irq::Kick = Arc::new(|_| {});
        let fabric = Fabric::new(1, 1_000_000_000, &timers, &kick, Arc::clone(&counters));
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let uart = shared(Uart::new(clock.clone(), fabric.line(4), doorbell.clone(), counters.clone()));
        let service = SerialService::start(vec![uart.clone()], doorbell, clock, counters.clone()).unwrap();
        let far = UnixStream::from(service.connect(0).unwrap());
        far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Bench { service, uart, far, counters }
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 7 + at / 251) as u8).collect()
    }

    /// A guest that fills the FIFO whenever it is empty, as a driver does.
    fn guest_sends(uart: &RankedMutex<Uart>, bytes: &[u8]) {
        for chunk in bytes.chunks(64) {
            while uart.lock().read(5, Byte) & 0x20 == 0 {
                thread::sleep(Duration::from_micros(50));
            }
            for byte in chunk {
                uart.lock().write(0, Byte, u32::from(*byte));
            }
        }
    }

    #[test]
    fn a_byte_goes_out_at_once() {
        let mut bench = bench();
        let mut longest = Duration::ZERO;
        for byte in 0..20 {
            let began = Instant::now();
            bench.uart.lock().write(0, Byte, byte);
            let mut got = [0];
            bench.far.read_exact(&mut got).unwrap();
            assert_eq!(u32::from(got[0]), byte);
            longest = longest.max(began.elapsed());
            thread::sleep(Duration::from_millis(1));
        }
        // Far more than it takes, because the machine may be busy with other things.
        assert!(longest < Duration::from_millis(200), "{longest:?}");
    }

    #[test]
    fn ten_megabytes_out_with_few_wakeups() {
        let bench = bench();
        let sent = pattern(10_000_000);
        let mut far = bench.far.try_clone().unwrap();
        let length = sent.len();
        let reader = thread::spawn(move || {
            let mut got = vec![0; length];
            far.read_exact(&mut got).map(|()| got)
        });
        guest_sends(&bench.uart, &sent);
        assert!(reader.join().unwrap().unwrap() == sent);
        assert_eq!(bench.counters.serial_overrun.get(), 0);
        assert!(bench.counters.serial_wakeups.get() < 10_000, "{}", bench.counters.serial_wakeups.get());
    }

    #[test]
    fn a_service_that_is_dropped_as_soon_as_it_starts_ends() {
        // A join that never returns would hang the test: it happens in a thread of its own.
        let (done, told) = std::sync::mpsc::channel();
        thread::spawn(move || {
            for round in 0..3000 {
                let doorbell = Arc::new(Doorbell::new().unwrap());
                let service = SerialService::start(Vec::new(), doorbell, Clock::new(), Arc::default()).unwrap();
                // So that the thread is told at every point of its first round.
                let began = Instant::now();
                while began.elapsed() < Duration::from_nanos(round * 40) {}
                drop(service);
            }
            let _ = done.send(());
        });
        told.recv_timeout(Duration::from_secs(60)).expect("a thread that was told to stop sleeps on");
    }

    #[test]
    fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
        let mut bench = bench();
        let sent = pattern(600_000);
        let (uart, twin) = (bench.uart.clone(), sent.clone());
        let writer = thread::spawn(move || guest_sends(&uart, &twin));
        thread::sleep(Duration::from_millis(100));
        assert_eq!(bench.uart.lock().read(5, Byte) & 0x60, 0, "busy while the socket is full");
        let mut got = vec![0; sent.len()];
        bench.far.read_exact(&mut got).unwrap();
        writer.join().unwrap();
        assert!(got == sent);
    }

    #[test]
    fn bytes_wait_for_the_guest_and_all_arrive() {
        let mut bench = bench();
        let sent = pattern(300_000);
        let mut far = bench.far.try_clone().unwrap();
        let twin = sent.clone();
        let writer = thread::spawn(move || far.write_all(&twin));
        thread::sleep(Duration::from_millis(30));
        assert_eq!(bench.uart.lock().read(5, Byte) & 1, 0, "the port is not open yet");
        bench.uart.lock().write(4, Byte, 0x0b);
        let mut got = Vec::new();
        let mut paused = false;
        let began = Instant::now();
        while got.len() < sent.len() && began.elapsed() < Duration::from_secs(20) {
            let byte = {
                let mut uart = bench.uart.lock();
                (uart.read(5, Byte) & 1 != 0).then(|| uart.read(0, Byte) as u8)
            };
            match byte {
                Some(byte) => got.push(byte),
                None => thread::sleep(Duration::from_micros(20)),
            }
            if got.len() == 100_000 && !paused {
                // The driver can take no more for a while, longer than the thread keeps looking.
                paused = true;
                bench.uart.lock().write(4, Byte, 0x09);
                thread::sleep(Duration::from_millis(20));
                bench.uart.lock().write(4, Byte, 0x0b);
            }
        }
        assert!(got == sent, "{} of {}", got.len(), sent.len());
        writer.join().unwrap().unwrap();
        // The other direction still works, and then the end.
        bench.uart.lock().write(0, Byte, 0x41);
        let mut last = [0];
        bench.far.read_exact(&mut last).unwrap();
        assert_eq!(last, [0x41]);
    }

    #[test]
    fn a_closed_far_end_swallows_and_a_half_closed_one_still_reads() {
        let mut half = bench();
        half.far.write_all(b"x").unwrap();
        half.far.shutdown(std::net::Shutdown::Write).unwrap();
        half.uart.lock().write(4, Byte, 3);
        let began = Instant::now();
        while half.uart.lock().read(5, Byte) & 1 == 0 {
            assert!(began.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(half.uart.lock().read(0, Byte), 0x78);
        half.uart.lock().write(0, Byte, 0x79);
        let mut got = [0];
        half.far.read_exact(&mut got).unwrap();
        assert_eq!(got, [0x79]);

        let Bench { service, uart, far, .. } = bench();
        drop(far);
        guest_sends(&uart, &pattern(500_000));
        assert!(matches!(service.connect(0), Err(SerialError::Taken(0))));
        assert!(matches!(service.connect(1), Err(SerialError::NoPort(1))));
        drop(service);
    }
}
