//! Sharing by content across VMs: the sharer, a process of a host with one table and one pool of pages for each sharing group,
//! and its clients, the VMs of the group. The pool is a file in memory that the sharer writes and VMs can only read.
//!
//! A VM offers pages by the hash of their content ([`client`]). A hash that is in the table has a shared page; one that was
//! offered before, by whomever, gets one: its content is asked for, checked, and put into the pool ([`group`], [`table`]). Any
//! other is remembered as a hint ([`hints`]). The VM compares for itself, in full, and while nobody can store to its page; a
//! hash proves nothing. What it does not use, or uses no more, it releases.
//!
//! VMs are hostile. What they send is checked ([`wire`]), and one that breaks a rule is not listened to any more
//! ([`server`]); what it uses stays in the pool until it is gone, since it may be the guest that is innocent.
//!
//! The sharer may be killed at any time. VMs go on with what they have; the next sharer is given the pool by them, and what each
//! uses of it.

pub mod client;
mod group;
mod hints;
pub mod server;
mod table;
#[cfg(test)]
mod tests;
mod wire;

pub use group::Statistics;
pub use table::{Identity, identity};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Pages of a group's pool, at most: 64 GiB. A VM maps so many, which costs nothing.
pub const MOST_PAGES: u32 = 1 << 24;

/// Content of a page.
pub type Page = [u8; x86::PAGE_SIZE as usize];

/// The hash of a page, by which it is offered; the seed is the group's.
#[must_use]
pub fn hash(page: &Page, seed: u64) -> u64 {
    xxh3_64_with_seed(page, seed)
}
