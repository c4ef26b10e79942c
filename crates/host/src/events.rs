//! Waiting and waking: eventfd, poll and socket calls that the standard library does not have.
//!
//! Contract of the unsafe code: every descriptor handed to the kernel is borrowed from a live owner for the whole call,
//! and every buffer is passed with its own length.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A counter in the kernel that one thread raises to wake another out of [`poll`].
#[derive(Debug)]
pub struct EventFd(File);

impl EventFd {
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(EventFd(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Wake whoever polls this. Never blocks: when the counter is at its limit, the waiter is awake already.
    pub fn signal(&self) {
        let _ = (&self.0).write(&1_u64.to_ne_bytes());
    }

    /// Take all signals back; true if there were any.
    pub fn drain(&self) -> bool {
        let mut count = [0; 8];
        matches!((&self.0).read(&mut count), Ok(8))
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One descriptor to wait for, and afterwards what happened to it.
#[derive(Debug)]
pub struct Watch<'a> {
    pub fd: BorrowedFd<'a>,
    /// Wait until it can be read (or its peer has closed).
    pub read: bool,
    /// Wait until it can be written.
    pub write: bool,
    /// Result: reading will not block.
    pub readable: bool,
    /// Result: writing will not block.
    pub writable: bool,
    /// Result: the peer is gone, or the descriptor is in error.
    pub closed: bool,
}

impl<'a> Watch<'a> {
    #[must_use]
    pub fn new(fd: BorrowedFd<'a>, read: bool, write: bool) -> Self {
        Watch { fd, read, write, readable: false, writable: false, closed: false }
    }
}

/// Wait until something happens to one of `watches`, at most `timeout` (for ever if `None`). A closed peer is reported
/// whether asked for or not, so a caller leaves it out once it knows.
///
/// # Errors
/// The system's. An interruption by a signal is not an error: nothing has happened then.
pub fn poll(watches: &mut [Watch<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let mut fds: Vec<libc::pollfd> = watches
        .iter()
        .map(|watch| {
            let read = if watch.read { libc::POLLIN } else { 0 };
            let write = if watch.write { libc::POLLOUT } else { 0 };
            libc::pollfd { fd: watch.fd.as_raw_fd(), events: read | write, revents: 0 }
        })
        .collect();
    let limit = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs().min(i64::MAX as u64) as libc::time_t,
        tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
    });
    let limit_pointer = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `fds` is an array of its own length; `limit` outlives the call; no signal mask is passed.
    let count = unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit_pointer, std::ptr::null()) };
    if count < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    for (watch, fd) in watches.iter_mut().zip(&fds) {
        watch.readable = fd.revents & libc::POLLIN != 0;
        watch.writable = fd.revents & libc::POLLOUT != 0;
        watch.closed = fd.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0;
    }
    Ok(())
}

/// Write to a socket without blocking, and without SIGPIPE when the peer is gone (our process may be anyone's).
///
/// # Errors
/// `WouldBlock` when the socket is full, `BrokenPipe` when the peer is gone, else the system's.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the buffer is passed with its own length and only read.
    let count = unsafe {
        libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Read from a socket without blocking; 0 is the end of the stream.
///
/// # Errors
/// `WouldBlock` when nothing is there, else the system's.
pub fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is passed with its own length and is ours to write.
    let count = unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_signal_ends_a_wait() {
        let event = EventFd::new().unwrap();
        assert!(!event.drain());
        let mut watches = [Watch::new(event.as_fd(), true, false)];
        poll(&mut watches, Some(Duration::from_millis(1))).unwrap();
        assert!(!watches[0].readable);
        event.signal();
        event.signal();
        poll(&mut watches, None).unwrap();
        assert!(watches[0].readable);
        assert!(event.drain());
        assert!(!event.drain());
    }

    #[test]
    fn sockets_fill_drain_and_close() {
        let (left, right) = UnixStream::pair().unwrap();
        let mut sent = 0;
        let error = loop {
            match send(left.as_fd(), &[7; 4096]) {
                Ok(count) => sent += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let mut buffer = [0; 4096];
        let mut received = 0;
        while let Ok(count) = receive(right.as_fd(), &mut buffer) {
            received += count;
        }
        assert_eq!(sent, received);
        drop(right);
        assert_eq!(send(left.as_fd(), &[1]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let mut watches = [Watch::new(left.as_fd(), false, false)];
        poll(&mut watches, None).unwrap();
        assert!(watches[0].closed);
    }
}
