//! The file system device: a folder of the host that the guest mounts. Source: VIRTIO 1.2, 5.11 "File System Device"; what goes
//! over its queues is Linux's FUSE ([`protocol`]).
//!
//! A request: queue -> [`server`], in the queues' one thread -> [`host::folder`] -> the host's file system. A file is reached by
//! its place below the folder ([`nodes`]) and no other way; one that was removed is reached as long as it is open. Writes go
//! through to the host at once, and the guest asks anew for what it knows: for a file's status whenever it needs it, for a name
//! after a second. So programs on both sides may use the folder at the same time.

mod nodes;
mod protocol;
mod server;

use std::borrow::Cow;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use host::folder::Folder;
use host::lock::{Rank, RankedMutex};

use super::queue::Chain;
use super::{Answer, Backend, BackendState};
pub use nodes::NodeState;
use protocol::{Arguments, IN_HEADER, OUT_HEADER, Reply, WRITE_IN, op};
use server::{Answered, MOST_PAGES, Server, errno};
pub use server::{HandleState, State};

const DEVICE_TYPE: u16 = 26;
/// A mass storage controller of no further kind.
const PCI_CLASS: u32 = 0x01_8000;

/// 5.11.2 "Virtqueues": what is urgent, and requests.
const QUEUES: u16 = 2;

/// 5.11.4 "Device configuration layout": the name by which a guest mounts it, and the number of queues for requests.
pub const TAG_BYTES: usize = 36;
const CONFIG_BYTES: usize = 40;

/// Arguments of a request that is no write: two names of the longest kind, or many nodes to forget.
const MOST_ARGUMENTS: u64 = 128 << 10;
/// How much of a file is copied at a time.
const PIECE: usize = 128 << 10;

#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("a folder cannot be mounted by the name {0:?}: give 1 to {TAG_BYTES} letters, digits, dots and dashes")]
    Tag(String),
    #[error("the folder {} cannot be shared: {error}", .path.display())]
    Folder { path: std::path::PathBuf, error: io::Error },
}

/// A folder that a guest can mount.
pub struct SharedFolder {
    config: [u8; CONFIG_BYTES],
    server: RankedMutex<Server>,
    /// The driver has gone since the last request. Who notes it does not wait for one that is being served.
    is_new: AtomicBool,
}

impl SharedFolder {
    /// # Errors
    /// [`FsError`] for a name that no guest can mount by, and a folder that cannot be opened.
    pub fn new(path: &Path, tag: &str, is_read_only: bool) -> Result<SharedFolder, FsError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        if !(1..=TAG_BYTES).contains(&tag.len()) || !tag.bytes().all(allowed) {
            return Err(FsError::Tag(tag.into()));
        }
        let folder = Folder::open(path).map_err(|error| FsError::Folder { path: path.into(), error })?;
        let mut config = [0; CONFIG_BYTES];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_BYTES..].copy_from_slice(&u32::from(QUEUES - 1).to_le_bytes());
        let server = RankedMutex::new(Rank::Backend, Server::new(folder, is_read_only));
        Ok(SharedFolder { config, server, is_new: AtomicBool::new(false) })
    }
}

/// One request: what kind it is, which it is, and what it is about.
struct Request {
    op: u32,
    unique: u64,
    node: u64,
}

fn request(chain: &Chain<'_>) -> Option<Request> {
    let mut bytes = [0; IN_HEADER];
    if !chain.read(0, &mut bytes) {
        return None;
    }
    let mut header = Arguments(&bytes);
    let _size = header.u32().ok()?;
    Some(Request { op: header.u32().ok()?, unique: header.u64().ok()?, node: header.u64().ok()? })
}

/// What the guest reads from a file: straight into its buffers, behind the header. Gives the size of all.
fn read(server: &Server, chain: &Chain<'_>, room: u64) -> Result<u64, i32> {
    let mut bytes = [0; 20];
    if !chain.read(IN_HEADER as u64, &mut bytes) {
        return Err(libc::EINVAL);
    }
    let mut arguments = Arguments(&bytes);
    let (handle, offset, size) = (arguments.u64()?, arguments.u64()?, arguments.u32()?);
    let size = u64::from(size).min(room).min(u64::from(MOST_PAGES) * x86::PAGE_SIZE);
    let file = &server.handle(handle)?.file;
    let mut piece = vec![0; PIECE.min(size as usize)];
    let mut done = 0;
    while done < size {
        let piece = &mut piece[..(size - done).min(PIECE as u64) as usize];
        let at = offset.checked_add(done).ok_or(libc::EINVAL)?;
        match file.read_at(piece, at) {
            Ok(0) => break,
            Ok(count) => {
                if !chain.write(OUT_HEADER as u64 + done, &piece[..count]) {
                    return Err(libc::EIO);
                }
                done += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if done == 0 => return Err(errno(&error)),
            Err(_) => break,
        }
    }
    Ok(done)
}

fn write(server: &Server, chain: &Chain<'_>) -> Answered {
    let mut bytes = [0; WRITE_IN];
    if !chain.read(IN_HEADER as u64, &mut bytes) {
        return Err(libc::EINVAL);
    }
    let mut arguments = Arguments(&bytes);
    let (handle, offset, size) = (arguments.u64()?, arguments.u64()?, u64::from(arguments.u32()?));
    server.check_writable()?;
    let start = (IN_HEADER + WRITE_IN) as u64;
    if chain.readable_bytes() < start + size {
        return Err(libc::EINVAL);
    }
    let file = &server.handle(handle)?.file;
    let mut piece = vec![0; PIECE.min(size as usize)];
    let mut done = 0;
    while done < size {
        let piece = &mut piece[..(size - done).min(PIECE as u64) as usize];
        let at = offset.checked_add(done).ok_or(libc::EFBIG)?;
        if !chain.read(start + done, piece) {
            return Err(libc::EIO);
        }
        match file.write_at(piece, at) {
            Ok(0) => break,
            Ok(count) => done += count as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // What is there already counts; the next write finds out why there is no more.
            Err(error) if done == 0 => return Err(errno(&error)),
            Err(_) => break,
        }
    }
    Ok(Reply::default().u32(done as u32).u32(0))
}

/// Carries a request out; `None` when it has no answer, or no room for one.
fn carry_out(server: &mut Server, chain: &Chain<'_>) -> Option<u32> {
    let request = request(chain)?;
    // Without room for an answer nobody waits for one.
    let room = chain.writable_bytes().saturating_sub(OUT_HEADER as u64);
    let answer = match request.op {
        op::READ => read(server, chain, room).map(|size| (size, Reply::default())),
        op::WRITE => write(server, chain).map(|reply| (0, reply)),
        other => {
            let size = chain.readable_bytes() - IN_HEADER as u64;
            let mut arguments = vec![0; size.min(MOST_ARGUMENTS) as usize];
            if size > MOST_ARGUMENTS || !chain.read(IN_HEADER as u64, &mut arguments) {
                Err(libc::EINVAL)
            } else {
                let room = usize::try_from(room.min(1 << 20)).unwrap_or(0);
                server.serve(other, request.node, &arguments, room)?.map(|reply| (0, reply))
            }
        }
    };
    let (error, size, reply) = match answer {
        // What the driver left no room for: it cannot know of it.
        Ok((_, reply)) if reply.0.len() as u64 > room => (-libc::ERANGE, 0, Reply::default()),
        Ok((size, reply)) => (0, size + reply.0.len() as u64, reply),
        Err(error) => (-error, 0, Reply::default()),
    };
    let total = OUT_HEADER as u32 + size as u32;
    let header = Reply::default().u32(total).u32(error.cast_unsigned()).u64(request.unique);
    (chain.write(0, &header.0) && chain.write(OUT_HEADER as u64, &reply.0)).then_some(total)
}

impl Backend for SharedFolder {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn shares_thread(&self) -> bool {
        true
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.config)
    }

    fn reset(&self) {
        self.is_new.store(true, Ordering::SeqCst);
    }

    fn state(&self) -> BackendState {
        if self.is_new.load(Ordering::SeqCst) {
            return BackendState::Fs(State::default());
        }
        BackendState::Fs(self.server.lock().state())
    }

    fn restore(&self, state: &BackendState) {
        let BackendState::Fs(state) = state else { return };
        self.is_new.store(false, Ordering::SeqCst);
        self.server.lock().restore(state);
    }

    fn end(&self) {
        self.server.lock().close_all();
    }

    fn serve(&self, _queue: u16, _features: u64, chain: &Chain<'_>) -> Answer {
        let mut server = self.server.lock();
        if self.is_new.swap(false, Ordering::SeqCst) {
            server.forget_all();
        }
        Answer::Done(carry_out(&mut server, chain).unwrap_or(0))
    }
}
