//! What a VM and the sharer say to each other, over a stream socket. A frame is its kind and the number of its items, 4 bytes
//! each, then the items; all numbers are little endian. A VM speaks, the sharer answers:
//!
//! ```text
//! REGISTER, HELD ...                     WELCOME: the seed of the group's hashes
//! OFFER: pages and their hashes          WANT: contents that it has not and would like to have (at most 16)
//! CONTENT: those that are still there    WANT, once more, or AGAIN and
//!                                        ANSWER: the shared page of each that was offered
//! RELEASE: pages that are not used       (nothing)
//! ```
//!
//! Whatever is not so is a fault of the VM's, and the end of the talk.

use x86::PAGE_SIZE;

use super::Page;

pub const VERSION: u32 = 1;
pub const HEADER: usize = 8;
/// Items of a frame, at most.
pub const MOST_HELD: usize = 1024;
pub const MOST_OFFERED: usize = 256;
pub const MOST_CONTENTS: usize = 16;
pub const MOST_RELEASED: usize = 1024;
/// Bytes of a refusal, at most.
const MOST_WORDS: usize = 512;
/// No page.
pub const NONE: u32 = u32::MAX;

const REGISTER: u32 = 1;
const HELD: u32 = 2;
const OFFER: u32 = 3;
const CONTENT: u32 = 4;
const RELEASE: u32 = 5;
const WELCOME: u32 = 17;
const WANT: u32 = 18;
const AGAIN: u32 = 19;
const ANSWER: u32 = 20;
const REFUSED: u32 = 21;

const CONTENT_SIZE: usize = 4 + PAGE_SIZE as usize;

/// What a VM says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The VM uses so many shared pages, which HELD frames that follow name. Where there are some, the pool's file comes along.
    Register {
        version: u32,
        held: u32,
    },
    /// (shared page, how often the VM uses it).
    Held(Vec<(u32, u32)>),
    /// (page of the VM, hash of its content).
    Offer(Vec<(u32, u64)>),
    /// (place in the offer, content).
    Content(Vec<(u32, Box<Page>)>),
    Release(Vec<u32>),
}

/// What the sharer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Welcome {
        seed: u64,
    },
    /// Places in the offer.
    Want(Vec<u32>),
    /// Pages of the VM that have found an equal one since they were offered.
    Again(Vec<u32>),
    /// For each page offered the shared page, or [`NONE`].
    Answer(Vec<u32>),
    Refused(String),
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn header(kind: u32, count: usize) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend((count as u32).to_le_bytes());
    bytes
}

fn numbers(kind: u32, numbers: &[u32]) -> Vec<u8> {
    let mut bytes = header(kind, numbers.len());
    numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    bytes
}

fn numbers_of(items: &[u8]) -> Vec<u32> {
    items.chunks_exact(4).map(|item| u32_at(item, 0)).collect()
}

/// The bytes of a frame's items that a header announces; an error when there is no such frame.
pub fn size_of_items(header: [u8; HEADER], of_sharer: bool) -> Result<usize, String> {
    let (kind, count) = (u32_at(&header, 0), u32_at(&header, 4));
    let (size, most) = match (of_sharer, kind) {
        (false, REGISTER) => (8, 1),
        (false, HELD) => (8, MOST_HELD),
        (false, OFFER) => (12, MOST_OFFERED),
        (false, CONTENT) => (CONTENT_SIZE, MOST_CONTENTS),
        (false, RELEASE) => (4, MOST_RELEASED),
        (true, WELCOME) => (8, 1),
        (true, WANT) => (4, MOST_CONTENTS),
        (true, AGAIN | ANSWER) => (4, MOST_OFFERED),
        (true, REFUSED) => (1, MOST_WORDS),
        _ => return Err(format!("a frame of kind {kind} is none")),
    };
    let least = usize::from(matches!(kind, REGISTER | WELCOME));
    if !(least..=most).contains(&(count as usize)) {
        return Err(format!("a frame of kind {kind} has no {count} items"));
    }
    Ok(count as usize * size)
}

impl Request {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Request::Register { version, held } => {
                let mut bytes = header(REGISTER, 1);
                [version, held].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
                bytes
            }
            Request::Held(held) => {
                let mut bytes = header(HELD, held.len());
                held.iter().for_each(|(page, count)| {
                    bytes.extend(page.to_le_bytes());
                    bytes.extend(count.to_le_bytes());
                });
                bytes
            }
            Request::Offer(pages) => {
                let mut bytes = header(OFFER, pages.len());
                pages.iter().for_each(|(ppn, hash)| {
                    bytes.extend(ppn.to_le_bytes());
                    bytes.extend(hash.to_le_bytes());
                });
                bytes
            }
            Request::Content(pages) => {
                let mut bytes = header(CONTENT, pages.len());
                pages.iter().for_each(|(place, page)| {
                    bytes.extend(place.to_le_bytes());
                    bytes.extend(page.iter());
                });
                bytes
            }
            Request::Release(pages) => numbers(RELEASE, pages),
        }
    }

    /// A frame whose header [`size_of_items`] has passed, with as many bytes as that said.
    pub fn decode(kind: [u8; HEADER], items: &[u8]) -> Option<Request> {
        Some(match u32_at(&kind, 0) {
            REGISTER => Request::Register { version: u32_at(items, 0), held: u32_at(items, 4) },
            HELD => Request::Held(items.chunks_exact(8).map(|item| (u32_at(item, 0), u32_at(item, 4))).collect()),
            OFFER => Request::Offer(items.chunks_exact(12).map(|item| (u32_at(item, 0), u64_at(item, 4))).collect()),
            CONTENT => {
                let page = |item: &[u8]| Box::<Page>::try_from(Box::<[u8]>::from(&item[4..])).ok();
                let pages = items.chunks_exact(CONTENT_SIZE).map(|item| Some((u32_at(item, 0), page(item)?)));
                Request::Content(pages.collect::<Option<_>>()?)
            }
            RELEASE => Request::Release(numbers_of(items)),
            _ => return None,
        })
    }
}

impl Reply {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Reply::Welcome { seed } => {
                let mut bytes = header(WELCOME, 1);
                bytes.extend(seed.to_le_bytes());
                bytes
            }
            Reply::Want(places) => numbers(WANT, places),
            Reply::Again(pages) => numbers(AGAIN, pages),
            Reply::Answer(pages) => numbers(ANSWER, pages),
            Reply::Refused(sentence) => {
                let words = &sentence.as_bytes()[..sentence.len().min(MOST_WORDS)];
                let mut bytes = header(REFUSED, words.len());
                bytes.extend(words);
                bytes
            }
        }
    }

    /// As [`Request::decode`].
    pub fn decode(kind: [u8; HEADER], items: &[u8]) -> Option<Reply> {
        Some(match u32_at(&kind, 0) {
            WELCOME => Reply::Welcome { seed: u64_at(items, 0) },
            WANT => Reply::Want(numbers_of(items)),
            AGAIN => Reply::Again(numbers_of(items)),
            ANSWER => Reply::Answer(numbers_of(items)),
            REFUSED => Reply::Refused(String::from_utf8_lossy(items).into_owned()),
            _ => return None,
        })
    }
}

/// Cuts what comes from a VM into frames. Never holds more than one that is not whole.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next frame, when it is whole; an error when it is none.
    pub fn next(&mut self) -> Result<Option<Request>, String> {
        let Some(kind) = self.0.first_chunk::<HEADER>().copied() else { return Ok(None) };
        let end = HEADER + size_of_items(kind, false)?;
        if self.0.len() < end {
            return Ok(None);
        }
        let request = Request::decode(kind, &self.0[HEADER..end]).ok_or("a frame cannot be read")?;
        self.0.drain(..end);
        if self.0.is_empty() {
            // Most VMs are silent most of the time.
            self.0 = Vec::new();
        }
        Ok(Some(request))
    }

    /// Bytes that wait for the rest of their frame.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn some_request(random: &mut Random) -> Request {
        let mut word = || random.next() as u32;
        match word() % 5 {
            0 => Request::Register { version: word(), held: word() },
            1 => Request::Held((0..word() as usize % (MOST_HELD + 1)).map(|_| (word(), word())).collect()),
            2 => {
                let count = word() as usize % (MOST_OFFERED + 1);
                Request::Offer((0..count).map(|_| (word(), u64::from(word()) << 20)).collect())
            }
            3 => {
                let count = word() as usize % (MOST_CONTENTS + 1);
                Request::Content((0..count).map(|_| (word(), Box::new([word() as u8; 4096]))).collect())
            }
            _ => Request::Release((0..word() as usize % (MOST_RELEASED + 1)).map(|_| word()).collect()),
        }
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let mut random = Random(1);
        let requests: Vec<Request> = (0..200).map(|_| some_request(&mut random)).collect();
        let bytes: Vec<u8> = requests.iter().flat_map(Request::encode).collect();
        let (mut frames, mut got, mut rest) = (Frames::default(), Vec::new(), bytes.as_slice());
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.len().min(random.below(9000) as usize));
            frames.add(part);
            rest = after;
            while let Some(request) = frames.next().unwrap() {
                got.push(request);
            }
        }
        assert_eq!(frames.waiting(), 0);
        assert!(got == requests);
    }

    #[test]
    fn replies_come_out_as_they_went_in() {
        for reply in [
            Reply::Welcome { seed: 1 << 63 | 5 },
            Reply::Want(vec![0, 255]),
            Reply::Again(vec![]),
            Reply::Answer(vec![NONE; MOST_OFFERED]),
            Reply::Refused("why".into()),
        ] {
            let bytes = reply.encode();
            let (kind, items) = bytes.split_first_chunk().unwrap();
            assert_eq!(size_of_items(*kind, true), Ok(items.len()));
            assert!(size_of_items(*kind, false).is_err(), "a VM cannot say what the sharer says");
            assert_eq!(Reply::decode(*kind, items), Some(reply));
        }
    }

    #[test]
    fn rubbish_is_an_error_or_a_request_and_holds_little_memory() {
        let mut random = Random(2);
        let mut faults = 0;
        for _ in 0..20_000 {
            let mut frames = Frames::default();
            let mut bytes = some_request(&mut random).encode();
            // Whole rubbish, or a frame with a byte of it.
            if random.below(4) == 0 {
                random.fill(&mut bytes);
            } else {
                let at = random.below(bytes.len().min(24) as u64) as usize;
                bytes[at] = random.next() as u8;
            }
            frames.add(&bytes);
            loop {
                match frames.next() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => {
                        faults += 1;
                        break;
                    }
                }
            }
            assert!(frames.waiting() <= bytes.len());
        }
        assert!(faults > 5000);
    }
}
