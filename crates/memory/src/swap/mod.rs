//! Where pages go when nothing else is left: the swap store of one VM. First compressed in memory; the oldest of these, and
//! pages that do not compress, encrypted in a file that has no name. What was put is what comes back, or an error: a damaged
//! block is found, and never handed to the guest.
//!
//! [`store`] has the way of a page in, on and out; [`table`] says which page is where; [`log`] keeps compressed pages, and
//! [`vault`] sealed ones in the file.

mod log;
mod store;
mod table;
#[cfg(test)]
mod tests;
mod vault;

use std::io;

pub use store::{Statistics, Store};

/// A page of the guest: what goes in and comes out.
pub type Page = [u8; x86::PAGE_SIZE as usize];

/// Names a page in the store, from the `put` that gave it to its `free`, and long after that no other page. 40 bits, so that it
/// has room in an entry of the pmap: which entry of the store's table, and the count of pages that this entry has had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot(pub u64);

/// Why a page cannot be taken in. Nothing is lost: whoever wanted to put it still has it.
#[derive(Debug, thiserror::Error)]
pub enum Full {
    #[error("the memory for compressed pages is used up, and there is no swap file")]
    NoFile,
    #[error("the page does not compress, and there is no swap file")]
    Incompressible,
    #[error("the swap file has reached its size of {0} bytes")]
    File(u64),
    #[error("the swap file cannot be written: {0}")]
    Host(io::Error),
}

/// Why a page does not come back.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// Our own mistake, or another thread has just freed it.
    #[error("slot {} of the swap store holds no page", .0.0)]
    Empty(Slot),
    #[error("slot {} of the swap store is damaged in memory", .0.0)]
    Memory(Slot),
    #[error("block {block} of the swap file is damaged: what is there is not what was written")]
    Damaged { block: u32 },
    #[error("block {block} of the swap file is gone: the file was cut off")]
    CutOff { block: u32 },
    #[error("block {block} of the swap file cannot be read: {error}")]
    Host { block: u32, error: io::Error },
}
