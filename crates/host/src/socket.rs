//! Sockets that never wait, where the standard library has only those that do, and epoll, which watches many of them.
//!
//! Contract of the unsafe code: every descriptor that is handed to the kernel is borrowed from a live owner for the whole call,
//! or new and owned from then on; every buffer and address is passed with its own length.

use std::io;
use std::mem::size_of;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn family(address: SocketAddr) -> i32 {
    if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// Begins to connect to an address. The stream can be written when that is over, and has an error ([`TcpStream::take_error`])
/// if it failed.
///
/// # Errors
/// The system's, when it knows at once that it cannot be.
pub fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = socket(family(address), libc::SOCK_STREAM, 0)?;
    // SAFETY: the address is a whole one, of the length that is said.
    let result = unsafe {
        match address {
            SocketAddr::V4(address) => {
                let raw = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                    sin_zero: [0; 8],
                };
                libc::connect(socket.as_raw_fd(), (&raw const raw).cast(), size_of_val(&raw) as u32)
            }
            SocketAddr::V6(address) => {
                let raw = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
                libc::connect(socket.as_raw_fd(), (&raw const raw).cast(), size_of_val(&raw) as u32)
            }
        }
    };
    match check(result) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(TcpStream::from(socket)),
    }
}

/// A socket for echo requests, which needs no right where the system's administrator allows it (net.ipv4.ping_group_range). The
/// kernel puts its own number into what is sent, and the checksum.
///
/// # Errors
/// The system's: EACCES where it is not allowed.
pub fn ping(address: SocketAddr) -> io::Result<UdpSocket> {
    let protocol = if address.is_ipv4() { libc::IPPROTO_ICMP } else { libc::IPPROTO_ICMPV6 };
    let socket = UdpSocket::from(socket(family(address), libc::SOCK_DGRAM, protocol)?);
    socket.connect(address)?;
    Ok(socket)
}

/// Appends what a stream has, at most so much, in one call; 0 is its end.
///
/// # Errors
/// `WouldBlock` when nothing is there, else the system's.
pub fn receive_into(stream: BorrowedFd<'_>, bytes: &mut Vec<u8>, most: usize) -> io::Result<usize> {
    bytes.reserve(most);
    let room = &mut bytes.spare_capacity_mut()[..most];
    // SAFETY: the room is ours to write, and is passed with its length.
    let count = unsafe { libc::recv(stream.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), libc::MSG_DONTWAIT) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has written so many bytes behind those that were there.
    unsafe { bytes.set_len(bytes.len() + count) };
    Ok(count)
}

/// Ends a connection so that its peer learns that it was broken off (RST), and not that all was said.
pub fn reset(stream: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: the option is passed with its length. Where it fails, the connection ends as others do.
    unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as u32,
        );
    }
    drop(stream);
}

/// What happened to a descriptor that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it was watched as.
    pub token: u64,
    pub readable: bool,
    pub writable: bool,
    /// The peer is gone, or the descriptor is in error.
    pub closed: bool,
}

/// The kernel's list of watched descriptors. What is closed leaves it by itself.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

const MOST_EVENTS: usize = 128;

impl Epoll {
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: no memory is passed.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Epoll(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn add(&self, fd: BorrowedFd<'_>, token: u64, events: i32) -> io::Result<()> {
        let mut event = libc::epoll_event { events: events as u32, u64: token };
        // SAFETY: the event lives through the call.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event) })?;
        Ok(())
    }

    /// Tells of changes, once each: when it becomes readable or writable, or is closed.
    ///
    /// # Errors
    /// The system's, when it can watch no more.
    pub fn watch_changes(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.add(fd, token, libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET)
    }

    /// Tells of it as long as it is readable.
    ///
    /// # Errors
    /// As [`Epoll::watch_changes`].
    pub fn watch_readable(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.add(fd, token, libc::EPOLLIN)
    }

    /// Tells from here on of a descriptor as long as it is readable, or writable, where that is asked for; in any case of its
    /// peer's end.
    ///
    /// # Errors
    /// As [`Epoll::watch_changes`].
    pub fn rewatch(&self, fd: BorrowedFd<'_>, token: u64, readable: bool, writable: bool) -> io::Result<()> {
        let events = if readable { libc::EPOLLIN } else { 0 } | if writable { libc::EPOLLOUT } else { 0 };
        let mut event = libc::epoll_event { events: events as u32, u64: token };
        // SAFETY: the event lives through the call.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_MOD, fd.as_raw_fd(), &raw mut event) })?;
        Ok(())
    }

    /// Tells of it no more, also when somebody else has it open still.
    pub fn forget(&self, fd: BorrowedFd<'_>) {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: the event lives through the call. What is not watched cannot be forgotten, and need not.
        unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_DEL, fd.as_raw_fd(), &raw mut event) };
    }

    /// Waits until something happens, at most `timeout` (for ever if `None`), and puts what it was into `events`.
    ///
    /// # Errors
    /// The system's. An interruption by a signal is none: nothing has happened then.
    pub fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
        events.clear();
        let mut raw = [libc::epoll_event { events: 0, u64: 0 }; MOST_EVENTS];
        // Rounded up: who is woken too early only waits again.
        let limit = timeout.map_or(-1, |timeout| i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        // SAFETY: the array is passed with its own length.
        let count = unsafe { libc::epoll_wait(self.0.as_raw_fd(), raw.as_mut_ptr(), MOST_EVENTS as i32, limit) };
        match check(count) {
            Ok(count) => {
                events.extend(raw[..count as usize].iter().map(|event| {
                    let has = |bits: i32| event.events & bits as u32 != 0;
                    Event {
                        token: event.u64,
                        readable: has(libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR),
                        writable: has(libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLERR),
                        closed: has(libc::EPOLLHUP | libc::EPOLLERR),
                    }
                }));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    const LONG: Option<Duration> = Some(Duration::from_secs(30));

    #[test]
    fn a_connection_begins_tells_and_is_broken_off() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let epoll = Epoll::new().unwrap();
        epoll.watch_changes(stream.as_fd(), 7).unwrap();
        let mut events = Vec::new();
        epoll.wait(&mut events, LONG).unwrap();
        assert_eq!(events, [Event { token: 7, readable: false, writable: true, closed: false }]);
        assert!(stream.take_error().unwrap().is_none());
        // Each change is told of once.
        epoll.wait(&mut events, Some(Duration::ZERO)).unwrap();
        assert_eq!(events, []);
        peer.write_all(b"hello").unwrap();
        epoll.wait(&mut events, LONG).unwrap();
        assert!(events[0].readable && !events[0].closed);
        let mut bytes = b"oh, ".to_vec();
        assert_eq!(receive_into(stream.as_fd(), &mut bytes, 3).unwrap(), 3);
        assert_eq!(receive_into(stream.as_fd(), &mut bytes, 64).unwrap(), 2);
        assert_eq!(bytes, b"oh, hello");
        let nothing = receive_into(stream.as_fd(), &mut bytes, 64).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        reset(stream);
        assert_eq!(peer.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn nobody_there_is_an_error_of_the_stream() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let Ok(stream) = connect(address) else { return };
        let epoll = Epoll::new().unwrap();
        epoll.watch_changes(stream.as_fd(), 1).unwrap();
        let mut events = Vec::new();
        epoll.wait(&mut events, LONG).unwrap();
        assert!(events[0].closed);
        assert_eq!(stream.take_error().unwrap().unwrap().kind(), io::ErrorKind::ConnectionRefused);
    }
}
