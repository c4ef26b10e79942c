//! The code cache: where translated code lives. One memfd mapped twice, writable for the translator and executable for
//! the processor, so that no page is both at one address.
//!
//! Contract: code is only written through [`CodeCache::write`], inside the cache; addresses handed out are those of the
//! executable mapping, and stay valid until the cache is dropped. The first page holds no code: it is the poll page, which
//! translated code reads at every loop and which a [`Poll`] makes unreadable to stop it.

use std::fs::File;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use host::map::{Map, PAGE, Protection, memfd, punch_hole};

#[derive(Debug)]
pub struct CodeCache {
    writable: Map,
    executable: Arc<Map>,
    /// Where the next code goes, and where it must end.
    next: usize,
    limit: usize,
    /// The end of the highest code so far, and how much was added in all.
    highest: usize,
    added: u64,
    /// Code below this has memory behind it, in both maps.
    ready: usize,
    /// Where code starts after [`CodeCache::clear`]: behind the poll page and the stubs.
    first: usize,
    file: File,
}

/// How code reads the poll page: MOV R10D, [RIP + displacement]. No other code addresses memory so.
pub const POLL: [u8; 3] = [0x44, 0x8b, 0x15];

/// The first page of a code cache.
#[derive(Clone, Debug)]
pub struct Poll {
    map: Arc<Map>,
    /// Whether it was armed and not disarmed since. It may be armed without this for a moment: by somebody who was overtaken.
    armed: Arc<AtomicBool>,
}

impl Poll {
    /// Makes every poll fault. Any thread may do it.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
        // Only lack of memory in the kernel could make it fail; the VCPU then stops at its next leave instead.
        let _ = self.map.protect(0, PAGE, Protection::None);
    }

    /// Makes it readable again, if somebody armed it.
    pub fn disarm(&self) {
        // One that is armed in this moment makes the next poll fault, as one that is armed later.
        if self.armed.load(Ordering::Relaxed) && self.armed.swap(false, Ordering::SeqCst) {
            self.force();
        }
    }

    /// Makes it readable again in any case: for whoever just saw that it was not.
    pub fn force(&self) {
        let _ = self.map.protect(0, PAGE, Protection::Read);
    }
}

const ALIGNMENT: usize = 16;
/// Bytes that get their memory before they are needed.
const AT_ONCE: usize = 128 << 10;

impl CodeCache {
    pub fn new(size: usize) -> io::Result<CodeCache> {
        let file = memfd(c"ringzero-code", size as u64)?;
        let writable = Map::shared(&file, size, Protection::ReadWrite)?;
        let executable = Arc::new(Map::shared(&file, size, Protection::ReadExecute)?);
        executable.protect(0, PAGE, Protection::Read)?;
        Ok(CodeCache {
            writable,
            executable,
            next: PAGE,
            limit: size,
            highest: PAGE,
            added: 0,
            ready: PAGE,
            first: PAGE,
            file,
        })
    }

    #[must_use]
    pub fn poll(&self) -> Poll {
        Poll { map: Arc::clone(&self.executable), armed: Arc::default() }
    }

    /// The range of host addresses that hold code.
    #[must_use]
    pub fn range(&self) -> std::ops::Range<u64> {
        let base = self.executable.base().as_ptr() as u64;
        base..base + self.executable.size() as u64
    }

    /// Where the next code will be.
    #[must_use]
    pub fn next_address(&self) -> u64 {
        self.range().start + self.next as u64
    }

    /// Code is added in a ring, behind what was added last and before the `oldest` that is still wanted. Moves to the start
    /// when there is no room at the end; says whether there is room for `size` bytes then.
    pub fn make_room(&mut self, size: usize, oldest: Option<u64>) -> bool {
        let oldest = oldest.map(|address| (address - self.range().start) as usize);
        if oldest.is_none() {
            self.next = self.first;
        }
        self.limit = oldest.filter(|oldest| *oldest >= self.next).unwrap_or(self.executable.size());
        if self.limit - self.next < size && self.limit == self.executable.size() {
            self.next = self.first;
            self.limit = oldest.unwrap_or(self.limit);
        }
        self.limit - self.next >= size
    }

    /// Bytes that hold code or held it since the last [`CodeCache::clear`].
    #[must_use]
    pub fn used(&self) -> usize {
        self.highest
    }

    /// Bytes that were ever added.
    #[must_use]
    pub fn added(&self) -> u64 {
        self.added
    }

    /// Adds code made for [`CodeCache::next_address`], for which there is room. `None` when there is not.
    pub fn add(&mut self, code: &[u8]) -> Option<u64> {
        if code.len() > self.limit - self.next {
            return None;
        }
        let address = self.next_address();
        self.prepare(self.next + code.len());
        self.write(address, code);
        self.next = (self.next + code.len()).next_multiple_of(ALIGNMENT).min(self.limit);
        self.highest = self.highest.max(self.next);
        self.added += code.len() as u64;
        Some(address)
    }

    /// Gets memory for code up to `end` and some that comes next: twice a fault for each page costs more than that.
    fn prepare(&mut self, end: usize) {
        if end > self.ready {
            let to = (end + AT_ONCE).next_multiple_of(PAGE).min(self.writable.size());
            self.writable.populate(self.ready, to - self.ready, true);
            self.executable.populate(self.ready, to - self.ready, false);
            self.ready = to;
        }
    }

    /// Overwrites code, e.g. the target of a jump. No processor runs these bytes meanwhile.
    pub fn write(&mut self, address: u64, code: &[u8]) {
        let offset = (address - self.range().start) as usize;
        assert!(offset >= PAGE && offset + code.len() <= self.writable.size(), "write outside the code cache");
        // SAFETY: inside the writable map, as just checked; the source is a Rust slice elsewhere.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.writable.base().as_ptr().add(offset), code.len()) };
    }

    /// Reads a 32-bit word that lies beside code.
    #[must_use]
    pub fn read_u32(&self, address: u64) -> u32 {
        let offset = (address - self.range().start) as usize;
        assert!(offset >= PAGE && offset + 4 <= self.executable.size(), "read outside the code cache");
        // SAFETY: inside the executable map behind the poll page, as just checked; that map is readable.
        unsafe { ptr::read_unaligned(self.executable.base().as_ptr().add(offset).cast()) }
    }

    /// Whether the code at `address` begins with [`POLL`].
    #[must_use]
    pub fn is_poll(&self, address: u64) -> bool {
        self.read_u32(address) & 0xff_ffff == u32::from_le_bytes([POLL[0], POLL[1], POLL[2], 0])
    }

    /// Makes the jump whose 32-bit displacement is at `at` lead to `target`.
    pub fn set_displacement(&mut self, at: u64, target: u64) {
        self.write(at, &(target.wrapping_sub(at + 4) as u32).to_le_bytes());
    }

    /// Tells that nothing is written for a while: what was is resident once instead of twice.
    pub fn rest(&mut self) {
        self.writable.let_go();
    }

    /// Where the jump whose displacement is at `at` leads.
    #[must_use]
    pub fn displacement_target(&self, at: u64) -> u64 {
        (at + 4).wrapping_add(self.read_u32(at) as i32 as u64)
    }

    /// What was added so far survives [`CodeCache::clear`].
    pub fn keep_from_here(&mut self) {
        self.first = self.next;
    }

    /// The addresses of code that is not kept.
    #[must_use]
    pub fn code(&self) -> std::ops::Range<u64> {
        self.range().start + self.first as u64..self.range().end
    }

    /// What was added before [`CodeCache::keep_from_here`].
    #[must_use]
    pub fn kept(&self) -> Vec<u8> {
        let words = (PAGE..self.first).step_by(4);
        words.flat_map(|at| self.read_u32(self.range().start + at as u64).to_le_bytes()).collect()
    }

    /// Forgets all code but what is kept, and gives its memory back.
    pub fn clear(&mut self) {
        let kept = self.first.next_multiple_of(PAGE);
        if self.ready > kept {
            // A refusal only means that the memory stays in use.
            let _ = punch_hole(&self.file, kept as u64, (self.ready - kept) as u64);
            self.ready = kept;
        }
        (self.next, self.highest) = (self.first, self.first);
        self.limit = self.executable.size();
    }
}
