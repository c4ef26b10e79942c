//! What carries whole frames between processes or to the kernel, each in one call: an end of a pair of Unix sockets that keep
//! messages apart (SOCK_SEQPACKET, unix(7)), or a tap, which is a network card of the host's kernel (its
//! Documentation/networking/tuntap.rst). Neither ever waits.
//!
//! Contract of the unsafe code: every descriptor that is handed to the kernel is borrowed from a live owner for the whole call,
//! or new and owned from then on; every buffer is passed with its own length, and a list of buffers lives through its call.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::events::{Watch, poll};

/// A list of buffers as the system has it: the standard library promises that an `IoSlice` is one.
const _: () = assert!(size_of::<IoSlice<'_>>() == size_of::<libc::iovec>());

/// Bytes that may wait in a socket, of which the system allows twice as much; what more there is, its owners queue by rules of
/// their own. No system's limit (net.core.wmem_max) is much lower if nobody has changed it.
const SOCKET_BYTES: libc::c_int = 256 << 10;

/// Linux, include/uapi/linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// What the kernel may leave to whoever reads: checksums, TCP segments of both kinds with congestion marks, fragments of UDP.
const OFFLOADS: libc::c_ulong = 0x01 | 0x02 | 0x04 | 0x08;
const OFFLOAD_UDP: libc::c_ulong = 0x10;

/// The longest name of a card, with the zero behind it.
const NAME_BYTES: usize = 16;

/// `struct ifreq`, as far as TUNSETIFF looks at it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: u16,
    _rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

#[derive(Debug)]
pub struct Medium {
    file: File,
    is_socket: bool,
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl Medium {
    /// An end of a pair of sockets that somebody made.
    ///
    /// # Errors
    /// When it is none that keeps messages apart.
    pub fn socket(fd: OwnedFd) -> io::Result<Medium> {
        let (mut kind, mut size): (libc::c_int, _) = (0, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: the value and its length are passed as they are, and live through the call.
        let result = unsafe {
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut size)
        };
        check(result as isize)?;
        if kind != libc::SOCK_SEQPACKET {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a cable is a socket that keeps messages apart"));
        }
        let wanted = SOCKET_BYTES;
        // SAFETY: the value is passed with its length. Where it fails, less waits in the socket.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_SNDBUF,
                (&raw const wanted).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            );
        }
        Ok(Medium { file: File::from(fd), is_socket: true })
    }

    /// The tap of that name, with a header of `header` bytes (`struct virtio_net_hdr`) before each frame. One that is not there
    /// is made, by who may.
    ///
    /// # Errors
    /// The system's: EPERM when it is another user's, EBUSY when somebody has it open; `InvalidInput` for a name that none can
    /// have.
    pub fn tap(name: &str, header: u8) -> io::Result<Medium> {
        if name.is_empty() || name.len() >= NAME_BYTES || name.contains(['/', '%', '\0']) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        let mut bytes = [0; NAME_BYTES];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        let request = InterfaceRequest { name: bytes, flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, _rest: [0; 22] };
        let size = libc::c_int::from(header);
        let fd = file.as_raw_fd();
        // SAFETY: the request is as large as the kernel's own, the size is an int, and both live through their calls; the
        // offloads are passed as a number.
        unsafe {
            check(libc::ioctl(fd, TUNSETIFF, &raw const request) as isize)?;
            check(libc::ioctl(fd, TUNSETVNETHDRSZ, &raw const size) as isize)?;
            // Kernels differ in whether they know the last; without any, the kernel finishes all itself.
            if libc::ioctl(fd, TUNSETOFFLOAD, OFFLOADS | OFFLOAD_UDP) < 0 {
                libc::ioctl(fd, TUNSETOFFLOAD, OFFLOADS);
            }
        }
        Ok(Medium { file, is_socket: false })
    }

    /// Sends a frame in pieces, whole or not at all.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room for it, else the system's.
    pub fn send(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        let result = if self.is_socket {
            // SAFETY: all zeroes is a message header that says nothing.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = pieces.as_ptr().cast_mut().cast();
            message.msg_iovlen = pieces.len();
            // SAFETY: the list and what it names live through the call, which only reads them.
            unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
        } else {
            // SAFETY: as above.
            unsafe { libc::writev(fd, pieces.as_ptr().cast(), pieces.len() as libc::c_int) }
        };
        check(result).map(drop)
    }

    /// Reads the next frame: its beginning into `header`, and the rest behind what `bytes` holds, at most `most`. Gives how much
    /// there was of both; 0 when the other end is gone. What is longer is cut off.
    ///
    /// # Errors
    /// `WouldBlock` when there is none, else the system's.
    pub fn receive(&self, header: &mut [u8], bytes: &mut Vec<u8>, most: usize) -> io::Result<usize> {
        bytes.reserve(most);
        let begun = header.len();
        let room = &mut bytes.spare_capacity_mut()[..most];
        let mut pieces = [
            libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: begun },
            libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: most },
        ];
        let fd = self.file.as_raw_fd();
        let result = if self.is_socket {
            // SAFETY: all zeroes is a message header that says nothing.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = pieces.as_mut_ptr();
            message.msg_iovlen = pieces.len();
            // SAFETY: both pieces are ours to write, with the lengths that they say. Descriptors that somebody sends along
            // find no room, and the kernel closes them.
            unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) }
        } else {
            // SAFETY: both pieces are ours to write, with the lengths that they say.
            unsafe { libc::readv(fd, pieces.as_mut_ptr(), pieces.len() as libc::c_int) }
        };
        let count = check(result)?;
        // SAFETY: the kernel has filled the header first, and then so many bytes behind those that were there.
        unsafe { bytes.set_len(bytes.len() + count.saturating_sub(begun)) };
        Ok(count)
    }

    /// Whether the other end is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        let mut watches = [Watch::new(self.file.as_fd(), false, false)];
        poll(&mut watches, Some(std::time::Duration::ZERO)).is_ok() && watches[0].closed
    }
}

impl AsFd for Medium {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Both ends of a pair of sockets that keep messages apart.
///
/// # Errors
/// The system's, when it has no descriptor left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends: [libc::c_int; 2] = [-1; 2];
    // SAFETY: the system writes two numbers to an array of two.
    let result =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) };
    check(result as isize)?;
    // SAFETY: both are new and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn frames_stay_whole_until_there_is_no_room() {
        let (left, right) = pair().unwrap();
        let (left, right) = (Medium::socket(left).unwrap(), Medium::socket(right).unwrap());
        let body = vec![7; 65_000];
        let mut sent = 0;
        let error = loop {
            match left.send(&[IoSlice::new(b"head"), IoSlice::new(&body), IoSlice::new(b"tail")]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(sent > 0);
        let (mut header, mut bytes) = ([0; 4], b"before".to_vec());
        for _ in 0..sent {
            bytes.truncate(6);
            assert_eq!(right.receive(&mut header, &mut bytes, 100_000).unwrap(), 65_008);
            assert_eq!((&header, &bytes[..7], &bytes[bytes.len() - 4..]), (b"head", &b"before\x07"[..], &b"tail"[..]));
        }
        let nothing = right.receive(&mut header, &mut bytes, 100).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        left.send(&[IoSlice::new(b"hi")]).unwrap();
        assert_eq!(right.receive(&mut header, &mut bytes, 100).unwrap(), 2);
        assert!(!right.is_closed());
        drop(left);
        assert!(right.is_closed());
        assert_eq!(right.receive(&mut header, &mut bytes, 100).unwrap(), 0);
    }

    #[test]
    fn what_keeps_no_messages_apart_or_has_no_name_is_refused() {
        let (stream, _other) = UnixStream::pair().unwrap();
        assert!(Medium::socket(stream.into()).is_err());
        for name in ["", "a name that is too long", "a/b", "rz%d"] {
            assert_eq!(Medium::tap(name, 12).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
    }
}
