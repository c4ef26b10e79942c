//! Facts of the x86 manuals, without behaviour: addresses, processor state, control bits, page-table entries,
//! model-specific registers, and faults. Nothing here knows that it is being virtualized.
#![forbid(unsafe_code)]

pub mod address;
pub mod fault;
pub mod msr;
pub mod paging;
pub mod registers;
pub mod state;

pub use address::{Gpa, Gva, Mpn, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Ppn};
pub use fault::{GuestFault, vector};
pub use registers::{cr0, cr4, dr6, dr7, efer, rflags};
pub use state::{Cpl, CpuState, DescriptorTable, FpuArea, Segment, seg};
