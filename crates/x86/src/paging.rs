//! Page-table entries of 4-level paging: Intel SDM (2024-12) Vol. 3A 5.5 "4-Level Paging and 5-Level Paging".

pub mod entry {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITABLE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    /// In a PDPTE or PDE: the entry maps a 1 GiB or 2 MiB page.
    pub const LARGE: u64 = 1 << 7;
    pub const GLOBAL: u64 = 1 << 8;
    /// Where the protection key is, bits 62:59 of an entry that maps a page.
    pub const KEY_SHIFT: u32 = 59;
    pub const NX: u64 = 1 << 63;
}

/// Width of a guest physical address that CPUID reports to guests (leaf 0x8000_0008).
pub const PHYSICAL_BITS: u32 = 40;

/// The address field of an entry; bits above [`PHYSICAL_BITS`] up to 51 are reserved.
pub const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;
pub const RESERVED_HIGH: u64 = ((1 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);
