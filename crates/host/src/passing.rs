//! Open files that go from one process to another with the bytes of a Unix socket, as unix(7) "Ancillary messages" has it.
//!
//! Contract of the unsafe code: message headers point to buffers that live through the call and have the lengths that are
//! said; a descriptor that the kernel has put into our table is owned by whoever gets it from here, and by nobody else.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Files that one message may bring.
const MOST: usize = 4;
/// Room for the descriptors of a message, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Another descriptor of what a number that somebody tells us stands for.
///
/// # Errors
/// The system's, when it stands for nothing.
pub fn duplicate(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; a number that is no descriptor is refused.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Sends all of it, and a file with its first byte. Blocks as the socket does; no SIGPIPE.
///
/// # Errors
/// The system's: the peer is gone, or the socket's timeout has passed.
pub fn send_all(socket: BorrowedFd<'_>, mut bytes: &[u8], mut file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut control = Control([0; 64]);
        let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: all zeroes is a message header that says nothing.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        if let Some(file) = file {
            message.msg_control = (&raw mut control).cast();
            // SAFETY: arithmetic only.
            message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<i32>() as u32) } as usize;
            // SAFETY: the control buffer is aligned and has room for one header with one descriptor.
            unsafe {
                let header = libc::CMSG_FIRSTHDR(&raw const message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as usize;
                libc::CMSG_DATA(header).cast::<i32>().write_unaligned(file.as_raw_fd());
            }
        }
        // SAFETY: the header and all it points to live through the call, which only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(count) => {
                bytes = &bytes[count..];
                file = None;
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Reads what is there without blocking, and appends the files that came with it; 0 bytes are the end of the stream.
///
/// # Errors
/// `WouldBlock` when nothing is there, else the system's.
pub fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zeroes is a message header that says nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    // SAFETY: arithmetic only. What finds no room is closed by the kernel.
    message.msg_controllen = unsafe { libc::CMSG_SPACE((MOST * size_of::<i32>()) as u32) } as usize;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: header and buffers live through the call, with the lengths that they say.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has filled the control buffer with whole headers, and CMSG_NXTHDR stays within it. Each descriptor in
    // it is new and ours alone.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if ((*header).cmsg_level, (*header).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let size = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<i32>();
                for number in 0..size / size_of::<i32>() {
                    files.push(OwnedFd::from_raw_fd(data.add(number).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::memfd;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_file_comes_with_the_bytes_that_it_was_sent_with() {
        let (left, right) = UnixStream::pair().unwrap();
        let file = memfd(c"passed", 4096).unwrap();
        send_all(left.as_fd(), b"one", Some(file.as_fd())).unwrap();
        send_all(left.as_fd(), b"two", None).unwrap();
        let (mut bytes, mut files) = ([0; 16], Vec::new());
        let first = receive(right.as_fd(), &mut bytes, &mut files).unwrap();
        let rest = receive(right.as_fd(), &mut bytes[first..], &mut files).unwrap();
        assert_eq!((first, rest), (3, 3), "a read ends where other files begin");
        file.write_all_at(b"same", 5).unwrap();
        let mut same = [0; 4];
        File::from(files.pop().unwrap()).read_exact_at(&mut same, 5).unwrap();
        assert_eq!((&bytes[..6], &same), (b"onetwo".as_slice(), b"same"));
        let nothing = receive(right.as_fd(), &mut bytes, &mut files).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        drop(right);
        assert_eq!(send_all(left.as_fd(), b"three", None).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(files.is_empty());
        assert!(duplicate(-1).is_err() && duplicate(left.as_raw_fd()).is_ok());
    }
}
