//! What each request does to the folder, but for the bytes of files.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;

use host::folder::{self, Folder, Status, Time};

use super::nodes::{NodeState, Nodes, ROOT};
use super::protocol::{Arguments, LEAST_MINOR, MAJOR, MAX_PAGES, MINOR, Reply, WANTED, op, set};

/// Pages of one request: 512 KiB, and with a header and the request's own buffers less than a queue has descriptors.
pub const MOST_PAGES: u16 = 128;
/// Open files and folders of a guest, where this process may have so many twice.
const MOST_HANDLES: u64 = 4096;
/// Permissions that a guest can give. Those that make a program run as its file's owner are not among them: here that is not
/// the guest's root, but whoever runs the machine.
const PERMISSIONS: u32 = 0o1777;
/// Flags of an open that are the guest's to choose, beside the way of access.
const OPEN_FLAGS: i32 = libc::O_SYNC | libc::O_DSYNC;

pub type Answered = Result<Reply, i32>;

/// An open file or folder.
pub struct Handle {
    pub file: File,
    pub node: u64,
    flags: i32,
    is_folder: bool,
}

/// What a saved machine keeps of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HandleState {
    pub number: u64,
    pub node: u64,
    pub flags: i32,
    pub is_folder: bool,
}

/// What a saved machine keeps of a folder's device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub nodes: Vec<NodeState>,
    pub handles: Vec<HandleState>,
}

pub struct Server {
    root: Folder,
    is_read_only: bool,
    /// Whose files are root's in the guest.
    owner: (u32, u32),
    nodes: Nodes,
    handles: HashMap<u64, Handle>,
    next_handle: u64,
    most_handles: usize,
}

/// As the driver wants it.
pub fn errno(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(match error.kind() {
        std::io::ErrorKind::InvalidInput => libc::EINVAL,
        _ => libc::EIO,
    })
}

fn done<T>(result: std::io::Result<T>) -> Result<T, i32> {
    result.map_err(|error| errno(&error))
}

impl Server {
    pub fn new(root: Folder, is_read_only: bool) -> Server {
        let most_handles = (folder::most_descriptors() / 2).min(MOST_HANDLES) as usize;
        let (nodes, handles) = Default::default();
        Server { root, is_read_only, owner: folder::owner(), nodes, handles, next_handle: 1, most_handles }
    }

    /// The driver knows nothing any more.
    pub fn forget_all(&mut self) {
        self.nodes = Nodes::default();
        self.handles.clear();
    }

    /// The machine has ended: its files are not held any more.
    pub fn close_all(&mut self) {
        self.handles.clear();
    }

    pub fn state(&self) -> State {
        let handles = self.handles.iter().map(|(number, handle)| HandleState {
            number: *number,
            node: handle.node,
            flags: handle.flags,
            is_folder: handle.is_folder,
        });
        let mut handles: Vec<_> = handles.collect();
        handles.sort_by_key(|state| state.number);
        State { nodes: self.nodes.state(), handles }
    }

    /// Takes over a state. What is not there any more is an error when it is next used.
    pub fn restore(&mut self, state: &State) {
        let root = &self.root;
        self.nodes.restore(&state.nodes, |nodes, number| {
            let (folder, name) = nodes.place(number).ok()?;
            root.below(&nodes.path(folder).ok()?).ok()?.status_of(name).ok()
        });
        self.handles.clear();
        for saved in state.handles.iter().take(self.most_handles) {
            let opened = match saved.is_folder {
                true => self.folder(saved.node).and_then(|folder| done(folder.open_itself())),
                false => self.open_node(saved.node, saved.flags),
            };
            if let Ok(file) = opened {
                let (node, flags, is_folder) = (saved.node, saved.flags, saved.is_folder);
                self.handles.insert(saved.number, Handle { file, node, flags, is_folder });
            }
            self.next_handle = self.next_handle.max(saved.number.saturating_add(1));
        }
    }

    /// A node that is a folder, opened.
    fn folder(&self, node: u64) -> Result<Folder, i32> {
        done(self.root.below(&self.nodes.path(node)?))
    }

    /// The folder that a node is in, and its name there, which is empty for the root.
    fn place(&self, node: u64) -> Result<(Folder, &OsStr), i32> {
        if node == ROOT {
            return Ok((done(self.root.below("".as_ref()))?, OsStr::new("")));
        }
        let (folder, name) = self.nodes.place(node)?;
        Ok((self.folder(folder)?, name))
    }

    fn status(&self, node: u64) -> Result<Status, i32> {
        let found = match self.place(node) {
            Ok((folder, name)) if name.is_empty() => done(folder.status()),
            Ok((folder, name)) => done(folder.status_of(name)),
            Err(error) => Err(error),
        };
        // A file that was removed is there as long as somebody has it open.
        found.or_else(|error| {
            let open = self.handles.values().find(|handle| handle.node == node).ok_or(error)?;
            done(folder::status(&open.file))
        })
    }

    pub fn handle(&self, number: u64) -> Result<&Handle, i32> {
        self.handles.get(&number).ok_or(libc::EBADF)
    }

    pub fn check_writable(&self) -> Result<(), i32> {
        if self.is_read_only { Err(libc::EROFS) } else { Ok(()) }
    }

    fn add_handle(&mut self, file: File, node: u64, flags: i32, is_folder: bool) -> Result<u64, i32> {
        if self.handles.len() >= self.most_handles {
            return Err(libc::ENFILE);
        }
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(number, Handle { file, node, flags, is_folder });
        Ok(number)
    }

    fn open_node(&self, node: u64, flags: i32) -> Result<File, i32> {
        let access = flags & libc::O_ACCMODE;
        if access != libc::O_RDONLY {
            self.check_writable()?;
        }
        let (folder, name) = self.place(node)?;
        done(folder.open_file(name, access | flags & OPEN_FLAGS, 0))
    }

    /// Carries a request out that does not read or write files. A request without an answer has none: `None`.
    pub fn serve(&mut self, op: u32, node: u64, bytes: &[u8], room: usize) -> Option<Answered> {
        let arguments = &mut Arguments(bytes);
        Some(match op {
            op::INIT => self.init(arguments),
            op::DESTROY => {
                self.forget_all();
                Ok(Reply::default())
            }
            op::FORGET => {
                self.nodes.forget(node, arguments.u64().unwrap_or(0));
                return None;
            }
            op::BATCH_FORGET => {
                let count = arguments.u32().unwrap_or(0);
                let _ = arguments.u32();
                for _ in 0..count {
                    let (Ok(node), Ok(count)) = (arguments.u64(), arguments.u64()) else { break };
                    self.nodes.forget(node, count);
                }
                return None;
            }
            // Whatever it is, it is over before this is read.
            op::INTERRUPT => return None,
            op::LOOKUP => arguments.name().and_then(|name| self.look_up(node, name)),
            op::GETATTR => self.status(node).map(|status| Reply::default().attributes(&status, self.owner)),
            op::SETATTR => self.set_attributes(node, arguments),
            op::READLINK => self.read_link(node),
            op::SYMLINK | op::MKNOD | op::MKDIR | op::LINK => self.make(op, node, arguments),
            op::CREATE => self.create(node, arguments),
            op::UNLINK | op::RMDIR => arguments.name().and_then(|name| self.remove(node, name, op == op::RMDIR)),
            op::RENAME | op::RENAME2 => self.rename(node, arguments, op == op::RENAME2),
            op::OPEN => self.open(node, arguments),
            op::OPENDIR => {
                let file = self.folder(node).and_then(|folder| done(folder.open_itself()));
                file.and_then(|file| self.add_handle(file, node, 0, true)).map(|handle| Reply::default().opened(handle))
            }
            op::READDIR | op::READDIRPLUS => self.list(node, arguments, op == op::READDIRPLUS, room),
            op::RELEASE | op::RELEASEDIR => arguments.u64().map(|handle| {
                self.handles.remove(&handle);
                Reply::default()
            }),
            op::STATFS => done(self.root.room()).map(|room| Reply::default().room(&room)),
            op::FSYNC | op::FSYNCDIR => self.synchronize(arguments),
            op::FALLOCATE => self.allocate(arguments),
            op::LSEEK => self.seek(arguments),
            // The driver asks for none of these again, and does without: extended attributes, locks among machines, flushes
            // of what is not held back.
            _ => Err(libc::ENOSYS),
        })
    }

    fn init(&mut self, arguments: &mut Arguments<'_>) -> Answered {
        let (major, minor) = (arguments.u32()?, arguments.u32()?);
        let (readahead, flags) = (arguments.u32()?, arguments.u32()?);
        if major != MAJOR || minor < LEAST_MINOR || flags & MAX_PAGES == 0 {
            return Err(libc::EPROTO);
        }
        self.forget_all();
        Ok(Reply::default().init(minor.min(MINOR), readahead, flags & WANTED, MOST_PAGES))
    }

    /// What there is by a name, as a node that the driver is told of.
    fn told(&mut self, folder: u64, within: &Folder, name: &OsStr) -> Answered {
        let status = done(within.status_of(name))?;
        let node = self.nodes.tell(folder, name, &status)?;
        Ok(Reply::default().entry(node, &status, self.owner))
    }

    fn look_up(&mut self, node: u64, name: &OsStr) -> Answered {
        let folder = self.folder(node)?;
        self.told(node, &folder, name)
    }

    fn set_attributes(&mut self, node: u64, arguments: &mut Arguments<'_>) -> Answered {
        let valid = arguments.u32()?;
        arguments.skip(4)?;
        let (handle, size) = (arguments.u64()?, arguments.u64()?);
        arguments.skip(8)?;
        let (accessed, modified) = (arguments.u64()?.cast_signed(), arguments.u64()?.cast_signed());
        arguments.skip(8)?;
        let (accessed_part, modified_part) = (arguments.u32()?, arguments.u32()?);
        arguments.skip(4)?;
        let mode = arguments.u32()?;
        arguments.skip(4)?;
        let (user, group) = (arguments.u32()?, arguments.u32()?);
        self.check_writable()?;
        // Everything is root's here; who wants it so wants nothing new.
        if valid & set::USER != 0 && user != 0 || valid & set::GROUP != 0 && group != 0 {
            return Err(libc::EPERM);
        }
        if valid & set::SIZE != 0 {
            let truncated = match valid & set::HANDLE {
                0 => done(self.open_node(node, libc::O_WRONLY)?.set_len(size)),
                _ => done(self.handle(handle)?.file.set_len(size)),
            };
            truncated?;
        }
        if valid & set::MODE != 0 {
            match self.place(node) {
                Ok((folder, name)) => done(folder.set_mode(name, mode & PERMISSIONS))?,
                // It was removed, and is open.
                Err(_) => done(folder::set_mode(&self.handle(handle)?.file, mode & PERMISSIONS))?,
            }
        }
        let time = |is_set, is_now, seconds, part| match (valid & is_set != 0, valid & is_now != 0) {
            (false, _) => Time::Keep,
            (_, true) => Time::Now,
            _ => Time::At(seconds, part),
        };
        let accessed = time(set::ACCESSED, set::ACCESSED_NOW, accessed, accessed_part);
        let modified = time(set::MODIFIED, set::MODIFIED_NOW, modified, modified_part);
        if (accessed, modified) != (Time::Keep, Time::Keep) {
            let (folder, name) = self.place(node)?;
            done(folder.set_times(name, accessed, modified))?;
        }
        Ok(Reply::default().attributes(&self.status(node)?, self.owner))
    }

    fn read_link(&self, node: u64) -> Answered {
        let (folder, name) = self.place(node)?;
        Ok(Reply(done(folder.read_link(name))?.as_bytes().to_vec()))
    }

    fn make(&mut self, op: u32, node: u64, arguments: &mut Arguments<'_>) -> Answered {
        self.check_writable()?;
        let folder = self.folder(node)?;
        let name;
        match op {
            op::SYMLINK => {
                name = arguments.name()?;
                done(folder.make_link(name, arguments.name()?))?;
            }
            op::LINK => {
                let other = arguments.u64()?;
                name = arguments.name()?;
                let (from, old) = self.place(other)?;
                done(from.link(old, &folder, name))?;
            }
            op::MKDIR => {
                let mode = arguments.u32()? & PERMISSIONS;
                arguments.skip(4)?;
                name = arguments.name()?;
                done(folder.make_folder(name, mode))?;
                // This process's own mask does not count: the guest has applied that of its program.
                done(folder.set_mode(name, mode))?;
            }
            _ => {
                let mode = arguments.u32()?;
                arguments.skip(12)?;
                name = arguments.name()?;
                if mode & libc::S_IFMT == libc::S_IFREG {
                    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
                    let file = done(folder.open_file(name, flags, mode & PERMISSIONS))?;
                    done(folder::set_mode(&file, mode & PERMISSIONS))?;
                } else {
                    done(folder.make_node(name, mode & (libc::S_IFMT | PERMISSIONS)))?;
                }
            }
        }
        self.told(node, &folder, name)
    }

    fn create(&mut self, node: u64, arguments: &mut Arguments<'_>) -> Answered {
        let (flags, mode) = (arguments.u32()?.cast_signed(), arguments.u32()? & PERMISSIONS);
        arguments.skip(8)?;
        let name = arguments.name()?;
        self.check_writable()?;
        let folder = self.folder(node)?;
        let kept = flags & (libc::O_ACCMODE | OPEN_FLAGS);
        let file = match folder.open_file(name, kept | libc::O_CREAT | libc::O_EXCL, mode) {
            Ok(file) => {
                done(folder::set_mode(&file, mode))?;
                file
            }
            // A program of the host was faster.
            Err(error) if errno(&error) == libc::EEXIST && flags & libc::O_EXCL == 0 => {
                done(folder.open_file(name, kept | flags & libc::O_TRUNC, 0))?
            }
            Err(error) => return Err(errno(&error)),
        };
        let status = done(folder::status(&file))?;
        // Before the node: one that the driver is not told of would never be forgotten.
        let handle = self.add_handle(file, 0, kept, false)?;
        let made = match self.nodes.tell(node, name, &status) {
            Ok(made) => made,
            Err(error) => {
                self.handles.remove(&handle);
                return Err(error);
            }
        };
        if let Some(handle) = self.handles.get_mut(&handle) {
            handle.node = made;
        }
        Ok(Reply::default().entry(made, &status, self.owner).opened(handle))
    }

    fn remove(&mut self, node: u64, name: &OsStr, wants_folder: bool) -> Answered {
        self.check_writable()?;
        let folder = self.folder(node)?;
        let status = done(folder.status_of(name))?;
        done(folder.remove(name, wants_folder))?;
        self.nodes.removed(node, name, &status);
        Ok(Reply::default())
    }

    fn rename(&mut self, node: u64, arguments: &mut Arguments<'_>, has_flags: bool) -> Answered {
        let target = arguments.u64()?;
        let flags = if has_flags { arguments.u32()? } else { 0 };
        if has_flags {
            arguments.skip(4)?;
        }
        let (old, new) = (arguments.name()?, arguments.name()?);
        self.check_writable()?;
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(libc::EINVAL);
        }
        let (from, to) = (self.folder(node)?, self.folder(target)?);
        let (moved, replaced) = (done(from.status_of(old))?, to.status_of(new).ok());
        done(from.rename(old, &to, new, flags))?;
        let is_same = replaced.is_some_and(|status| (status.device, status.inode) == (moved.device, moved.inode));
        if is_same {
            // Two names of one file: the system leaves both.
            return Ok(Reply::default());
        }
        if let Some(replaced) = replaced {
            if flags & libc::RENAME_EXCHANGE != 0 {
                self.nodes.moved(&replaced, (target, new), (node, old));
            } else {
                self.nodes.removed(target, new, &replaced);
            }
        }
        self.nodes.moved(&moved, (node, old), (target, new));
        Ok(Reply::default())
    }

    fn open(&mut self, node: u64, arguments: &mut Arguments<'_>) -> Answered {
        let flags = arguments.u32()?.cast_signed() & (libc::O_ACCMODE | OPEN_FLAGS);
        let file = self.open_node(node, flags)?;
        Ok(Reply::default().opened(self.add_handle(file, node, flags, false)?))
    }

    fn list(&mut self, node: u64, arguments: &mut Arguments<'_>, with_status: bool, room: usize) -> Answered {
        let (handle, offset) = (arguments.u64()?, arguments.u64()?);
        let room = room.min(arguments.u32()? as usize);
        let entries = done(folder::list(&self.handle(handle)?.file, offset))?;
        let within = if with_status { Some(self.folder(node)?) } else { None };
        let mut reply = Reply::default();
        for entry in entries {
            let name = entry.name.as_bytes();
            let size = if with_status { 128 } else { 0 } + (24 + name.len()).next_multiple_of(8);
            if reply.0.len() + size > room {
                break;
            }
            if let Some(within) = &within {
                // Those two are no nodes that the driver is told of.
                let is_own = name == b"." || name == b"..";
                let told = if is_own { None } else { within.status_of(&entry.name).ok() };
                let status = told.unwrap_or_default();
                let number = match told {
                    // Neither is what has gone meanwhile.
                    None => 0,
                    Some(status) => self.nodes.tell(node, &entry.name, &status).unwrap_or(0),
                };
                reply = reply.entry(number, &status, self.owner);
            }
            reply = reply.listed(entry.inode, entry.next, entry.kind, name);
        }
        Ok(reply)
    }

    fn synchronize(&self, arguments: &mut Arguments<'_>) -> Answered {
        let (handle, flags) = (arguments.u64()?, arguments.u32()?);
        let file = &self.handle(handle)?.file;
        done(if flags & 1 != 0 { file.sync_data() } else { file.sync_all() }).map(|()| Reply::default())
    }

    fn allocate(&self, arguments: &mut Arguments<'_>) -> Answered {
        let (handle, offset, size) = (arguments.u64()?, arguments.u64()?, arguments.u64()?);
        let mode = arguments.u32()?.cast_signed();
        self.check_writable()?;
        let known = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !known != 0 {
            return Err(libc::EOPNOTSUPP);
        }
        let file = &self.handle(handle)?.file;
        done(folder::allocate(file, mode, offset.cast_signed(), size.cast_signed())).map(|()| Reply::default())
    }

    fn seek(&self, arguments: &mut Arguments<'_>) -> Answered {
        let (handle, offset, whence) = (arguments.u64()?, arguments.u64()?, arguments.u32()?.cast_signed());
        let file = &self.handle(handle)?.file;
        if whence != libc::SEEK_DATA && whence != libc::SEEK_HOLE {
            return Err(libc::EINVAL);
        }
        Ok(Reply::default().u64(done(folder::seek(file, offset.cast_signed(), whence))?))
    }
}
