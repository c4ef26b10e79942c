//! The worker of one VM's memory: what is done a little at a time, beside the guest, as often and as far as a policy says.
//! It samples which pages are used, looks for equal pages, and puts pages into the swap store.
//!
//! It works on the calling thread, which is no processor's.

mod evict;
mod sample;
mod scan;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use x86::Ppn;

pub use self::evict::Evicted;
pub use self::scan::Scanned;
use crate::guest::GuestMemory;
use crate::swap::Page;

/// The shared pool, as a VM sees it: whoever counts the pages there.
pub trait Common: Send {
    /// What hashes begin with, so that nobody can guess them.
    fn seed(&self) -> u64;

    /// Offers pages by their hashes; gives for each the shared page that may have the same content, which is then counted for
    /// the VM. `content` says what is in a page now, if it can be had.
    ///
    /// # Errors
    /// When there is nobody who answers any more.
    fn offer(
        &mut self,
        pages: &[(Ppn, u64)],
        content: &mut dyn FnMut(Ppn) -> Option<Box<Page>>,
    ) -> io::Result<Vec<Option<u32>>>;

    /// Shared pages that the VM does not use, each once for each time that it was counted.
    ///
    /// # Errors
    /// As for [`Common::offer`].
    fn release(&mut self, pages: &[u32]) -> io::Result<()>;

    /// Pages that were offered, and have found an equal one since.
    fn take_again(&mut self) -> Vec<Ppn> {
        Vec::new()
    }
}

pub struct Worker {
    memory: Arc<GuestMemory>,
    random: Random,
    scan: scan::Progress,
    common: Option<Box<dyn Common>>,
    /// One that failed. As long as it is there, what the VM has stays counted: nobody may take it for gone.
    failed: Option<Box<dyn Common>>,
    /// Pages that are watched for the working set.
    sampled: Vec<Ppn>,
    /// Pages that go first if nobody has touched them.
    candidates: Vec<Ppn>,
}

/// splitmix64 (Steele, Lea, Flood 2014): to choose pages, not to keep secrets.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let mut seed = [0; 8];
        // Without randomness the choice is always the same, which is as fair.
        let _ = host::random::fill(&mut seed);
        Random(u64::from_le_bytes(seed))
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound.max(1)
    }
}

impl Worker {
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Worker {
        Worker {
            memory,
            random: Random::new(),
            scan: scan::Progress::default(),
            common: None,
            failed: None,
            sampled: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Has somebody count the pages of the shared pool, who knows what the VM has of it ([`GuestMemory::shared_pages`]); whoever did so
    /// before is forgotten.
    pub fn attach(&mut self, common: Box<dyn Common>) {
        self.scan = scan::Progress::default();
        self.common = Some(common);
        self.failed = None;
    }

    /// A random page of RAM.
    fn any_page(&mut self) -> Ppn {
        let pmap = self.memory.pmap();
        pmap.at(self.random.below(pmap.pages()) as usize)
    }
}
