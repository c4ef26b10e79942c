//! Unix sockets by name, as far as the standard library makes one wait.
//!
//! Contract of the unsafe code: the address is passed with its own length and lives through the call; the descriptor is new and
//! owned by what is returned.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Connects to the socket with this name, or fails at once: somebody who listens and does not accept holds nobody up.
///
/// # Errors
/// `WouldBlock` when too many wait there already, `InvalidInput` for a name that is too long, else the system's.
pub fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: all zeroes is an address without a name.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let name = path.as_os_str().as_bytes();
    // The name ends with a null byte, which is there already.
    if name.is_empty() || name.len() >= address.sun_path.len() || name.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in address.sun_path.iter_mut().zip(name) {
        *place = byte.cast_signed();
    }
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: see the head of the file.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let size = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: see the head of the file.
    if unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_listener_that_does_not_accept_holds_nobody_up() {
        let path = std::env::temp_dir().join(format!("ringzero-local-{}", std::process::id()));
        assert_eq!(connect_at_once(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        let mut first = connect_at_once(&path).unwrap();
        first.write_all(b"here").unwrap();
        let mut others = Vec::new();
        let error = loop {
            match connect_at_once(&path) {
                Ok(socket) => others.push(socket),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "after {}", others.len());
        let mut bytes = [0; 4];
        listener.accept().unwrap().0.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(connect_at_once("x".repeat(200).as_ref()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
