//! The file system device: a folder of the host that the guest mounts. Source: VIRTIO 1.2, 5.11 "File System Device"; what goes
//! over its queues is Linux's FUSE ([`protocol`]).
//!
//! A request: queue -> [`server`], in the queues' one thread -> [`host::folder`] -> the host's file system. A file is reached by
//! its place below the folder ([`nodes`]) and no other way; one that was removed is reached as long as it is open. Writes go
//! through to the host at once, and the guest asks anew for what it knows: for a file's status whenever it needs it, for a name
//! after a second. So programs on both sides may use the folder at the same time.
//!
//! Where the machine's process is jailed, the server is in another one ([`elsewhere`]).

mod elsewhere;
mod nodes;
mod protocol;
mod server;
mod state;

use std::borrow::Cow;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use host::folder::Folder;
use host::lock::{Rank, RankedMutex};

use super::queue::Chain;
use super::{Answer, Backend, BackendState};
use elsewhere::Elsewhere;
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

/// A request, and the place for its answer: a chain of the driver's, or what came of one to another process.
trait Exchange {
    fn readable_bytes(&self) -> u64;
    fn writable_bytes(&self) -> u64;
    fn read(&self, offset: u64, bytes: &mut [u8]) -> bool;
    fn write(&self, offset: u64, bytes: &[u8]) -> bool;
}

impl Exchange for Chain<'_> {
    fn readable_bytes(&self) -> u64 {
        self.readable_bytes()
    }

    fn writable_bytes(&self) -> u64 {
        self.writable_bytes()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> bool {
        self.read(offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        self.write(offset, bytes)
    }
}

/// Where requests are carried out.
enum Place {
    Here(Server),
    Elsewhere(Elsewhere),
}

/// A folder that a guest can mount.
pub struct SharedFolder {
    config: [u8; CONFIG_BYTES],
    place: RankedMutex<Place>,
    /// The driver has gone since the last request. Who notes it does not wait for one that is being served.
    is_new: AtomicBool,
}

fn open(path: &Path, is_read_only: bool) -> io::Result<Server> {
    Folder::open(path).map(|folder| Server::new(folder, is_read_only))
}

/// Serves a folder to a machine's process at the other end of a socket, until that has gone. When the folder is open, before
/// that process is listened to, `jail` gives up what is not needed any more.
///
/// # Errors
/// What it says makes no sense, or the socket's.
pub fn serve_folder(
    path: &Path,
    is_read_only: bool,
    socket: UnixStream,
    jail: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    match open(path, is_read_only).and_then(|server| jail().map(|()| server)) {
        Ok(mut server) => elsewhere::serve(&mut server, socket),
        Err(error) => elsewhere::refuse(socket, &error),
    }
}

impl SharedFolder {
    /// # Errors
    /// [`FsError`] for a name that no guest can mount by, and a folder that cannot be opened.
    pub fn new(path: &Path, tag: &str, is_read_only: bool) -> Result<SharedFolder, FsError> {
        let failed = |error| FsError::Folder { path: path.into(), error };
        SharedFolder::at(tag, || open(path, is_read_only).map(Place::Here).map_err(failed))
    }

    /// A folder that [`serve_folder`] serves at the other end of a socket.
    ///
    /// # Errors
    /// As [`SharedFolder::new`].
    pub fn elsewhere(path: &Path, tag: &str, socket: UnixStream) -> Result<SharedFolder, FsError> {
        let failed = |error| FsError::Folder { path: path.into(), error };
        SharedFolder::at(tag, || Elsewhere::join(socket).map(Place::Elsewhere).map_err(failed))
    }

    fn at(tag: &str, place: impl FnOnce() -> Result<Place, FsError>) -> Result<SharedFolder, FsError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        if !(1..=TAG_BYTES).contains(&tag.len()) || !tag.bytes().all(allowed) {
            return Err(FsError::Tag(tag.into()));
        }
        let place = RankedMutex::new(Rank::Backend, place()?);
        let mut config = [0; CONFIG_BYTES];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_BYTES..].copy_from_slice(&u32::from(QUEUES - 1).to_le_bytes());
        Ok(SharedFolder { config, place, is_new: AtomicBool::new(false) })
    }
}

/// One request: what kind it is, which it is, and what it is about.
struct Request {
    op: u32,
    unique: u64,
    node: u64,
}

fn request(chain: &impl Exchange) -> Option<Request> {
    let mut bytes = [0; IN_HEADER];
    if !chain.read(0, &mut bytes) {
        return None;
    }
    let mut header = Arguments(&bytes);
    let _size = header.u32().ok()?;
    Some(Request { op: header.u32().ok()?, unique: header.u64().ok()?, node: header.u64().ok()? })
}

/// What the guest reads from a file: straight into its buffers, behind the header. Gives the size of all.
fn read(server: &Server, chain: &impl Exchange, room: u64) -> Result<u64, i32> {
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

fn write(server: &Server, chain: &impl Exchange) -> Answered {
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
fn carry_out(server: &mut Server, chain: &impl Exchange) -> Option<u32> {
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
    finish(chain, request.unique, error, size, &reply)
}

/// Writes the header of an answer, and what of it is not there yet.
fn finish(chain: &impl Exchange, unique: u64, error: i32, size: u64, reply: &Reply) -> Option<u32> {
    let total = OUT_HEADER as u32 + size as u32;
    let header = Reply::default().u32(total).u32(error.cast_unsigned()).u64(unique);
    (chain.write(0, &header.0) && chain.write(OUT_HEADER as u64, &reply.0)).then_some(total)
}

impl Place {
    fn carry_out(&mut self, chain: &Chain<'_>) -> Option<u32> {
        match self {
            Place::Here(server) => carry_out(server, chain),
            Place::Elsewhere(elsewhere) => elsewhere.carry_out(chain).unwrap_or_else(|_| {
                // It has gone, or the request is longer than any that makes sense.
                finish(chain, request(chain)?.unique, -libc::EIO, 0, &Reply::default())
            }),
        }
    }

    fn forget_all(&mut self) {
        match self {
            Place::Here(server) => server.forget_all(),
            Place::Elsewhere(elsewhere) => elsewhere.forget_all(),
        }
    }

    fn close_all(&mut self) {
        match self {
            Place::Here(server) => server.close_all(),
            Place::Elsewhere(elsewhere) => elsewhere.close_all(),
        }
    }

    fn state(&mut self) -> State {
        match self {
            Place::Here(server) => server.state(),
            Place::Elsewhere(elsewhere) => elsewhere.state(),
        }
    }

    fn restore(&mut self, state: &State) {
        match self {
            Place::Here(server) => server.restore(state),
            Place::Elsewhere(elsewhere) => elsewhere.restore(state),
        }
    }
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
        BackendState::Fs(self.place.lock().state())
    }

    fn restore(&self, state: &BackendState) {
        let BackendState::Fs(state) = state else { return };
        self.is_new.store(false, Ordering::SeqCst);
        self.place.lock().restore(state);
    }

    fn end(&self) {
        self.place.lock().close_all();
    }

    fn serve(&self, _queue: u16, _features: u64, chain: &Chain<'_>) -> Answer {
        let mut place = self.place.lock();
        if self.is_new.swap(false, Ordering::SeqCst) {
            place.forget_all();
        }
        Answer::Done(place.carry_out(chain).unwrap_or(0))
    }
}
