//! MEMORY VIRTUALIZATION. A guest's "physical" pages (Ppn) are machine pages (Mpn) of a pool, joined by the pmap; guest
//! virtual addresses reach them through the guest's own page tables (walk) and a soft TLB that remembers the result.
//!
//! One guest load: [`tlb`] hit -> bytes. On a miss: [`walk`] -> [`pmap`] -> [`pool`] -> the TLB is filled.

pub mod audit;
pub mod bytes;
mod copy_on_write;
pub mod devices;
mod error;
pub mod guest;
pub mod machine;
mod pins;
pub mod pmap;
pub mod pool;
#[cfg(test)]
mod random;
pub mod reach;
pub mod reclaim;
mod regions;
mod reverse;
pub mod shadow;
pub mod share;
pub mod swap;
pub mod tlb;
pub mod trace;
pub mod transfer;
pub mod walk;
pub mod worker;
pub mod writers;

pub use error::Error;
pub use guest::GuestMemory;
pub use tlb::{Bank, SoftTlb};
pub use walk::{Access, Paging, Translation, walk};
