//! A shared folder, by requests as a driver makes them.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memory::GuestMemory;
use x86::Gpa;

use super::{Driver, NEXT, PLACE, Random, WRITE, memory};
use crate::virtio::fs::{FsError, SharedFolder, State, serve_folder};
use crate::virtio::queue::{Progress, Queue, Rules};
use crate::virtio::{Answer, Backend, BackendState};

const IN: u64 = 0x8000;
const OUT: u64 = 0x2_0000;
const ROOM: u32 = 0x1_0000;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE_OP: u32 = 16;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIRPLUS: u32 = 44;
const CREATE: u32 = 35;

/// Whether the folder is served where the machine is, or over a socket.
#[derive(Clone, Copy, Debug)]
enum How {
    Here,
    Elsewhere,
}

fn both(test: impl Fn(How)) {
    test(How::Here);
    test(How::Elsewhere);
}

/// A folder that somebody else serves.
fn served(path: &Path, is_read_only: bool) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let path = path.to_path_buf();
    std::thread::spawn(move || serve_folder(&path, is_read_only, theirs, || Ok(())));
    ours
}

struct Guest {
    folder: SharedFolder,
    memory: Arc<GuestMemory>,
    unique: u64,
}

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ringzero-fs-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).unwrap();
    path
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn with_name(values: &[u32], name: &str) -> Vec<u8> {
    [&words(values)[..], name.as_bytes(), b"\0"].concat()
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Guest {
    fn new(how: How, path: &Path, is_read_only: bool) -> Guest {
        let folder = match how {
            How::Here => SharedFolder::new(path, "tag", is_read_only),
            How::Elsewhere => SharedFolder::elsewhere(path, "tag", served(path, is_read_only)),
        };
        let folder = folder.unwrap();
        let mut guest = Guest { folder, memory: memory(), unique: 100 };
        let answer = guest.ask(INIT, 0, &words(&[7, 36, 0x2_0000, u32::MAX])).unwrap();
        assert_eq!((answer.len(), &answer[..8]), (64, &words(&[7, 31])[..]));
        guest
    }

    /// One request as it is: all that it gives back.
    fn raw(&mut self, request: &[u8], room: u32) -> (Answer, Vec<u8>) {
        self.memory.write(Gpa(IN), request).unwrap();
        let mut driver = Driver::new(&self.memory);
        // In pieces that no field needs to be within.
        let split = request.len() as u32 / 3;
        driver.descriptor(PLACE.descriptors, 0, IN, split, NEXT, 1);
        driver.descriptor(PLACE.descriptors, 1, IN + u64::from(split), request.len() as u32 - split, NEXT, 2);
        driver.descriptor(PLACE.descriptors, 2, OUT, room, WRITE, 0);
        driver.set_16(PLACE.driver.add(2), 0);
        driver.offer(0);
        let mut ring = Queue::new(&self.memory, PLACE, Rules::default(), Progress::default()).unwrap();
        let chain = ring.pop(&self.memory).unwrap().unwrap();
        let answer = self.folder.serve(1, 0, &chain);
        let Answer::Done(size) = answer else { panic!("a folder keeps nothing") };
        let mut bytes = vec![0; size as usize];
        self.memory.read(Gpa(OUT), &mut bytes).unwrap();
        (answer, bytes)
    }

    fn request(&mut self, op: u32, node: u64, arguments: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let mut bytes = words(&[40 + arguments.len() as u32, op]);
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(arguments);
        bytes
    }

    /// The answer of a request, or its error.
    fn ask(&mut self, op: u32, node: u64, arguments: &[u8]) -> Result<Vec<u8>, i32> {
        let request = self.request(op, node, arguments);
        let (_, bytes) = self.raw(&request, ROOM);
        assert_eq!(number(&bytes, 8), self.unique, "the answer to this request");
        assert_eq!(number(&bytes, 0) as u32 as usize, bytes.len());
        match i32::from_le_bytes(bytes[4..8].try_into().unwrap()) {
            0 => Ok(bytes[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn look_up(&mut self, folder: u64, name: &str) -> Result<u64, i32> {
        self.ask(LOOKUP, folder, &with_name(&[], name)).map(|entry| number(&entry, 0))
    }

    /// Makes a file: its node and handle.
    fn create(&mut self, folder: u64, name: &str) -> Result<(u64, u64), i32> {
        let flags = libc::O_RDWR as u32;
        let answer = self.ask(CREATE, folder, &with_name(&[flags, 0o4644, 0, 0], name))?;
        Ok((number(&answer, 0), number(&answer, 128)))
    }

    fn write(&mut self, handle: u64, offset: u64, bytes: &[u8]) -> Result<u64, i32> {
        let mut arguments = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        arguments.extend(words(&[bytes.len() as u32, 0, 0, 0, 0, 0]));
        arguments.extend(bytes);
        self.ask(WRITE_OP, 0, &arguments).map(|answer| number(&answer, 0))
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut arguments = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        arguments.extend(words(&[size, 0, 0, 0, 0, 0]));
        self.ask(READ, 0, &arguments)
    }

    fn state(&self) -> State {
        let BackendState::Fs(state) = self.folder.state() else { panic!("a folder") };
        state
    }
}

#[test]
fn files_are_made_written_and_read() {
    both(|how| {
        let path = scratch("files");
        let mut guest = Guest::new(how, &path, false);
        assert_eq!(guest.look_up(1, "file"), Err(libc::ENOENT));
        let (node, handle) = guest.create(1, "file").unwrap();
        assert_eq!(guest.write(handle, 0, b"hello, host"), Ok(11));
        assert_eq!(guest.write(handle, 1 << 20, b"far"), Ok(3));
        assert_eq!(std::fs::read(path.join("file")).unwrap()[..11], *b"hello, host");
        assert_eq!(guest.read(handle, 7, 100).unwrap()[..4], *b"host");
        assert_eq!(guest.read(handle, 1 << 20, 100).unwrap(), b"far");
        assert_eq!(guest.read(handle, 2 << 20, 100).unwrap(), b"");
        let status = guest.ask(GETATTR, node, &[0; 16]).unwrap();
        assert_eq!(number(&status, 24), (1 << 20) + 3);
        assert_eq!(u32::from_le_bytes(status[76..80].try_into().unwrap()), libc::S_IFREG | 0o644, "no set-user-ID");
        assert_eq!(guest.ask(RELEASE, node, &[handle.to_le_bytes(), [0; 8], [0; 8]].concat()), Ok(vec![]));
        assert_eq!(guest.read(handle, 0, 1), Err(libc::EBADF));
        // Names that are none.
        for name in ["", ".", "..", "a/b", "../file"] {
            assert_eq!(guest.look_up(1, name), Err(libc::EINVAL), "{name:?}");
            assert_eq!(guest.create(1, name), Err(libc::EINVAL), "{name:?}");
        }
        assert_eq!(guest.ask(LOOKUP, 1, b"no end"), Err(libc::EINVAL));
        assert_eq!(guest.ask(MKNOD, 1, &with_name(&[libc::S_IFCHR | 0o600, 0x103, 0, 0], "null")), Err(libc::EPERM));
        assert_eq!(guest.ask(99, 1, &[]), Err(libc::ENOSYS));
        std::fs::remove_dir_all(path).unwrap();
    });
}

#[test]
fn links_lead_nowhere() {
    both(|how| {
        let outside = scratch("links-outside");
        std::fs::write(outside.join("secret"), "x").unwrap();
        let path = scratch("links");
        let mut guest = Guest::new(how, &path, false);
        guest.ask(SYMLINK, 1, &with_name(&[], &format!("link\0{}", outside.display()))).unwrap();
        guest.ask(SYMLINK, 1, &with_name(&[], &format!("file\0{}", outside.join("secret").display()))).unwrap();
        let (link, file) = (guest.look_up(1, "link").unwrap(), guest.look_up(1, "file").unwrap());
        assert!(guest.look_up(link, "secret").is_err());
        assert!(guest.create(link, "made").is_err());
        assert!(guest.ask(OPEN, file, &words(&[libc::O_RDWR as u32, 0])).is_err());
        // And not if a folder that the guest knows becomes a link.
        guest.ask(MKDIR, 1, &with_name(&[0o755, 0], "real")).unwrap();
        let real = guest.look_up(1, "real").unwrap();
        guest.create(real, "inside").unwrap();
        std::fs::rename(path.join("real"), path.join("other")).unwrap();
        std::os::unix::fs::symlink(&outside, path.join("real")).unwrap();
        assert!(guest.look_up(real, "secret").is_err());
        assert!(guest.create(real, "made").is_err());
        assert!(!outside.join("made").exists());
        std::fs::remove_dir_all(path).unwrap();
        std::fs::remove_dir_all(outside).unwrap();
    });
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    both(|how| {
        let path = scratch("read-only");
        std::fs::write(path.join("file"), "content").unwrap();
        let mut guest = Guest::new(how, &path, true);
        let node = guest.look_up(1, "file").unwrap();
        let mut size = words(&[1 << 3, 0]);
        size.resize(88, 0);
        assert_eq!(guest.ask(SETATTR, node, &size), Err(libc::EROFS));
        assert_eq!(guest.create(1, "new"), Err(libc::EROFS));
        assert_eq!(guest.ask(UNLINK, 1, &with_name(&[], "file")), Err(libc::EROFS));
        assert_eq!(guest.ask(OPEN, node, &words(&[libc::O_WRONLY as u32, 0])), Err(libc::EROFS));
        let flags = (libc::O_RDONLY | libc::O_TRUNC | libc::O_CREAT) as u32;
        let opened = guest.ask(OPEN, node, &words(&[flags, 0])).unwrap();
        assert_eq!(guest.write(number(&opened, 0), 0, b"no"), Err(libc::EROFS));
        assert_eq!(guest.read(number(&opened, 0), 0, 7).unwrap(), b"content");
        std::fs::remove_dir_all(path).unwrap();
    });
}

#[test]
fn folders_are_listed_with_what_is_in_them() {
    both(|how| {
        let path = scratch("listed");
        for number in 0..300 {
            std::fs::write(path.join(format!("file {number}")), "x").unwrap();
        }
        let mut guest = Guest::new(how, &path, false);
        let handle = number(&guest.ask(OPENDIR, 1, &words(&[0, 0])).unwrap(), 0);
        let (mut names, mut offset) = (Vec::new(), 0_u64);
        loop {
            let mut arguments = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
            arguments.extend(words(&[4096, 0, 0, 0, 0, 0]));
            let list = guest.ask(READDIRPLUS, 1, &arguments).unwrap();
            assert!(list.len() <= 4096);
            if list.is_empty() {
                break;
            }
            let mut at = 0;
            while at < list.len() {
                let node = number(&list, at);
                offset = number(&list, at + 128 + 8);
                let size = u32::from_le_bytes(list[at + 144..at + 148].try_into().unwrap()) as usize;
                let name = std::str::from_utf8(&list[at + 152..at + 152 + size]).unwrap();
                assert_eq!(node == 0, name.starts_with('.'), "{name}");
                names.push(name.to_owned());
                at += (152 + size).next_multiple_of(8);
            }
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 302);
        assert_eq!(guest.state().nodes.len(), 300);
        std::fs::remove_dir_all(path).unwrap();
    });
}

#[test]
fn a_saved_folder_goes_on_in_another_machine() {
    both(|how| {
        let path = scratch("saved");
        let mut guest = Guest::new(how, &path, false);
        guest.ask(MKDIR, 1, &with_name(&[0o755, 0], "a")).unwrap();
        let folder = guest.look_up(1, "a").unwrap();
        let (node, handle) = guest.create(folder, "file").unwrap();
        guest.write(handle, 0, b"before").unwrap();
        let listing = number(&guest.ask(OPENDIR, folder, &words(&[0, 0])).unwrap(), 0);
        let (gone, gone_handle) = guest.create(1, "gone").unwrap();
        let saved = guest.state();
        assert_eq!((saved.nodes.len(), saved.handles.len()), (3, 3));
        std::fs::remove_file(path.join("gone")).unwrap();

        let mut second = Guest::new(how, &path, false);
        second.folder.restore(&BackendState::Fs(saved.clone()));
        assert_eq!(second.state().nodes, saved.nodes);
        assert_eq!(second.read(handle, 0, 6).unwrap(), b"before");
        second.write(handle, 6, b", after").unwrap();
        assert_eq!(std::fs::read(path.join("a/file")).unwrap(), b"before, after");
        assert_eq!(second.look_up(folder, "file"), Ok(node), "the same file");
        let arguments = [&listing.to_le_bytes()[..], &[0; 8], &words(&[4096, 0, 0, 0, 0, 0])].concat();
        assert!(second.ask(READDIRPLUS, folder, &arguments).unwrap().len() > 300);
        // What has gone meanwhile is an error, and no other file.
        assert_eq!(second.read(gone_handle, 0, 1), Err(libc::EBADF));
        assert_eq!(second.ask(GETATTR, gone, &[0; 16]), Err(libc::ENOENT));
        assert!(second.create(1, "new").unwrap().1 > gone_handle);
        // A driver that begins anew begins with nothing.
        second.folder.reset();
        assert_eq!(second.state(), State::default());
        assert_eq!(second.look_up(folder, "file"), Err(libc::ESTALE));
        std::fs::remove_dir_all(path).unwrap();
    });
}

#[test]
fn a_guest_that_asks_for_anything_at_all_stays_in_its_folder() {
    both(|how| {
        let outside = scratch("any-outside");
        let path = outside.join("inside");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(outside.join("a"), "not yours").unwrap();
        let mut guest = Guest::new(how, &path, false);
        let mut random = Random(0x51ed_2707);
        let names = ["a", "b", "c", "..", ".", "", "a/../../a", "../a", "long name"];
        for round in 0..20_000 {
            let op = if random.below(20) == 0 { random.next() as u32 } else { random.below(50) as u32 };
            let node = if random.below(10) == 0 { random.next() } else { random.below(12) };
            let mut arguments = Vec::new();
            for _ in 0..random.below(8) {
                let value = if random.below(3) == 0 { random.next() } else { random.below(16) };
                arguments.extend(value.to_le_bytes());
            }
            for _ in 0..random.below(3) {
                arguments.extend(names[random.below(names.len() as u64) as usize].as_bytes());
                arguments.push(0);
            }
            arguments.truncate(random.below(arguments.len() as u64 + 1) as usize + 64);
            let mut request = guest.request(op, node, &arguments);
            if random.below(50) == 0 {
                request.truncate(random.below(40) as usize + 3);
            }
            // No file larger than a disk may have room for.
            if matches!(op, SETATTR | 43) || op == WRITE_OP && round % 7 != 0 {
                continue;
            }
            let room = if random.below(10) == 0 { random.below(40) as u32 + 1 } else { ROOM };
            let (answer, _) = guest.raw(&request, room);
            assert!(matches!(answer, Answer::Done(size) if size <= room), "{answer:?}");
        }
        assert_eq!(std::fs::read(outside.join("a")).unwrap(), b"not yours");
        let mut there: Vec<_> = std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        there.sort();
        assert_eq!(there, ["a", "inside"]);
        let state = guest.state();
        for node in &state.nodes {
            let mut arguments = node.lookups.to_le_bytes().to_vec();
            arguments.resize(8, 0);
            let request = guest.request(FORGET, node.number, &arguments);
            assert_eq!(guest.raw(&request, ROOM).0, Answer::Done(0), "nobody waits for an answer");
        }
        assert_eq!(guest.state().nodes, []);
        std::fs::remove_dir_all(outside).unwrap();
    });
}

#[test]
fn a_folder_is_mounted_by_a_name() {
    let path = std::env::temp_dir();
    for tag in ["", "a b", &"x".repeat(37)] {
        assert!(matches!(SharedFolder::new(&path, tag, false), Err(FsError::Tag(_))), "{tag:?}");
    }
    let folder = SharedFolder::new(&path, "mount0", false).unwrap();
    assert_eq!(folder.config()[..8], *b"mount0\0\0");
    assert_eq!(folder.config()[36..], [1, 0, 0, 0]);
    let missing = path.join("ringzero-fs-that-is-not-there");
    assert!(matches!(SharedFolder::new(&missing, "x", false), Err(FsError::Folder { .. })));
}

#[test]
fn a_server_that_has_gone_is_an_error_of_each_request() {
    let path = scratch("gone");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (heard, told) = (theirs.try_clone().unwrap(), path.clone());
    let server = std::thread::spawn(move || serve_folder(&told, false, theirs, || Ok(())));
    let folder = SharedFolder::elsewhere(&path, "tag", ours).unwrap();
    let mut guest = Guest { folder, memory: memory(), unique: 1 };
    assert!(guest.ask(INIT, 0, &words(&[7, 36, 0x2_0000, u32::MAX])).is_ok());
    heard.shutdown(std::net::Shutdown::Both).unwrap();
    server.join().unwrap().unwrap();
    assert_eq!(guest.look_up(1, "a"), Err(libc::EIO));
    assert_eq!(guest.state(), State::default());
    std::fs::remove_dir_all(&path).unwrap();
    // Nor is there one whose folder is not there.
    let missing = SharedFolder::elsewhere(&path, "tag", served(&path, false));
    assert!(matches!(missing, Err(FsError::Folder { error, .. }) if error.raw_os_error() == Some(libc::ENOENT)));
}

#[test]
fn a_server_believes_nothing() {
    use std::io::{Read, Write};
    let path = scratch("rubbish");
    for (message, is_answered) in [
        (words(&[0, 0, u32::MAX]), false),
        (words(&[9, 0, 0]), false),
        (words(&[0, u32::MAX, 0]), true),
        ([words(&[0, 64, 8]), vec![0xff; 8]].concat(), true),
        ([words(&[4, 0, 8]), vec![0xff; 8]].concat(), true),
    ] {
        let mut socket = served(&path, false);
        socket.write_all(&message).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answers = Vec::new();
        let _ = socket.read_to_end(&mut answers);
        assert_eq!(answers.len() > 4, is_answered, "{message:?}");
    }
    std::fs::remove_dir_all(&path).unwrap();
}
