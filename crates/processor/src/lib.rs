//! PROCESSOR VIRTUALIZATION. Two engines behind one trait: `interpret`, the specification, and `translate`, which turns
//! guest code into host code block by block. Both work on the same [`Core`], so every rare instruction is written once.

/// Has tables made that all engines of this process share, and that are else made when they are first needed: a process that
/// forks has them once.
pub fn prepare() {
    translate::make_tables();
    native::make_tables();
}

mod access;
pub mod code_cache;
pub mod core;
pub mod cpuid;
pub mod debug;
pub mod deliver;
pub mod direct;
pub mod engine;
pub mod far;
pub mod interpret;
pub mod native;
mod obey;
pub mod profile;
pub mod real;
pub mod segment;
pub mod simd;
pub mod system;
#[cfg(feature = "testing")]
pub mod testing;
pub mod translate;
pub mod vcpu;
pub mod xsave;

pub use crate::core::Core;
pub use engine::{Engine, Exit, Outside};
pub use vcpu::Vcpu;
