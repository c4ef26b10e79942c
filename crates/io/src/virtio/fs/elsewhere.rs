//! A folder that another process serves: one that runs a guest in a jail opens no files. Requests go to it as the driver wrote
//! them, over a socket, and answers come back; it knows nothing of the machine, and of this process only that it is as hostile as
//! the guest may be.
//!
//! A message: what it is, how many bytes its answer may have, how many bytes follow, these. An answer: how many bytes follow,
//! these; none where the driver waits for none. First of all comes whether the folder could be opened, as a number of an error.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::protocol::{Arguments, IN_HEADER, OUT_HEADER, WRITE_IN};
use super::server::{MOST_PAGES, Server, State};
use super::{Exchange, MOST_ARGUMENTS, carry_out};

const REQUEST: u32 = 0;
const FORGET: u32 = 1;
const CLOSE: u32 = 2;
const STATE: u32 = 3;
const RESTORE: u32 = 4;

/// The bytes of files in a request.
const MOST_DATA: u64 = MOST_PAGES as u64 * x86::PAGE_SIZE;
/// A request: a write, or names.
pub const MOST_REQUEST: u64 = IN_HEADER as u64 + WRITE_IN as u64 + MOST_DATA + MOST_ARGUMENTS;
const MOST_ANSWER: u64 = OUT_HEADER as u64 + MOST_DATA + MOST_ARGUMENTS;
/// A state: some hundred bytes for each of a million nodes.
const MOST_STATE: u64 = 512 << 20;

fn number(socket: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    socket.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Bytes with their number before them.
fn bytes(socket: &mut impl Read, most: u64) -> io::Result<Vec<u8>> {
    let size = u64::from(number(socket)?);
    // Of what is long, memory is taken as it comes.
    let mut bytes = Vec::with_capacity(size.min(MOST_ANSWER) as usize);
    if size > most || socket.take(size).read_to_end(&mut bytes)? as u64 != size {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(bytes)
}

fn send(socket: &mut impl Write, numbers: &[u32], bytes: &[u8]) -> io::Result<()> {
    let size = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let head: Vec<u8> = numbers.iter().chain([&size]).flat_map(|number| number.to_le_bytes()).collect();
    socket.write_all(&head)?;
    socket.write_all(bytes)
}

/// The process that serves, seen from the one that has the machine.
pub struct Elsewhere(UnixStream);

impl Elsewhere {
    /// # Errors
    /// Why the folder cannot be served.
    pub fn join(mut socket: UnixStream) -> io::Result<Elsewhere> {
        match number(&mut socket)?.cast_signed() {
            0 => Ok(Elsewhere(socket)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    fn ask(&mut self, what: u32, room: u64, question: &[u8]) -> io::Result<Vec<u8>> {
        let most = if what == STATE { MOST_STATE } else { room };
        send(&mut self.0, &[what, room as u32], question)?;
        bytes(&mut self.0, most)
    }

    /// Has a request answered; `None` when the driver waits for no answer, or there is nobody any more who could give one.
    pub fn carry_out(&mut self, exchange: &impl Exchange) -> io::Result<Option<u32>> {
        let mut request = vec![0; exchange.readable_bytes().min(MOST_REQUEST) as usize];
        if exchange.readable_bytes() > MOST_REQUEST || !exchange.read(0, &mut request) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let room = exchange.writable_bytes().min(MOST_ANSWER);
        let answer = self.ask(REQUEST, room, &request)?;
        Ok((!answer.is_empty() && exchange.write(0, &answer)).then_some(answer.len() as u32))
    }

    // Of the others, one that has gone has nothing to forget.

    pub fn forget_all(&mut self) {
        let _ = self.ask(FORGET, 0, &[]);
    }

    pub fn close_all(&mut self) {
        let _ = self.ask(CLOSE, 0, &[]);
    }

    pub fn state(&mut self) -> State {
        let bytes = self.ask(STATE, 0, &[]).unwrap_or_default();
        State::from_bytes(&mut Arguments(&bytes)).unwrap_or_default()
    }

    pub fn restore(&mut self, state: &State) {
        let _ = self.ask(RESTORE, 0, &state.to_bytes());
    }
}

/// A request whose bytes came over the socket, and its answer's.
struct Message {
    request: Vec<u8>,
    room: u64,
    answer: RefCell<Vec<u8>>,
}

impl Exchange for Message {
    fn readable_bytes(&self) -> u64 {
        self.request.len() as u64
    }

    fn writable_bytes(&self) -> u64 {
        self.room
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let part = usize::try_from(offset).ok().and_then(|start| self.request.get(start..)?.get(..bytes.len()));
        part.inspect(|part| bytes.copy_from_slice(part)).is_some()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some(end) = offset.checked_add(bytes.len() as u64).filter(|end| *end <= self.room) else { return false };
        let mut answer = self.answer.borrow_mut();
        let size = answer.len().max(end as usize);
        answer.resize(size, 0);
        answer[offset as usize..end as usize].copy_from_slice(bytes);
        true
    }
}

/// Serves a folder until the other process has gone.
///
/// # Errors
/// The socket's, and what the other process says that makes no sense.
pub fn serve(server: &mut Server, mut socket: UnixStream) -> io::Result<()> {
    socket.write_all(&0_u32.to_le_bytes())?;
    loop {
        let what = match number(&mut socket) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        };
        let room = u64::from(number(&mut socket)?).min(MOST_ANSWER);
        let request = bytes(&mut socket, if what == RESTORE { MOST_STATE } else { MOST_REQUEST })?;
        let mut answer = Vec::new();
        match what {
            REQUEST => {
                let message = Message { request, room, answer: RefCell::default() };
                if let Some(size) = carry_out(server, &message) {
                    answer = message.answer.into_inner();
                    answer.truncate(size as usize);
                }
            }
            FORGET => server.forget_all(),
            CLOSE => server.close_all(),
            STATE => answer = server.state().to_bytes(),
            RESTORE => server.restore(&State::from_bytes(&mut Arguments(&request)).unwrap_or_default()),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        send(&mut socket, &[], &answer)?;
    }
}

/// Says that there is no folder to serve, and why not.
///
/// # Errors
/// The socket's.
pub fn refuse(mut socket: UnixStream, error: &io::Error) -> io::Result<()> {
    socket.write_all(&super::server::errno(error).to_le_bytes())
}
