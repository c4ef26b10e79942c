//! The faults that a guest must see. They are values that travel to the guest; they are never errors of ours.

use crate::address::Gva;

/// Exception vectors, Intel SDM (2024-12) Vol. 3A 7.15 "Exception and Interrupt Reference".
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// Bits of the error code that a page fault pushes, Intel SDM Vol. 3A 5.7 "Page-Fault Exceptions".
pub mod page_fault {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
    pub const KEY: u32 = 1 << 5;
}

/// An exception to deliver to the guest, at the instruction that it is in (RIP is still that instruction's, unless
/// the exception is a trap).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestFault {
    pub vector: u8,
    /// The error code, for the vectors that push one.
    pub error: Option<u32>,
    /// What CR2 becomes; page faults only.
    pub address: Option<Gva>,
    /// The payload of a debug exception: the bits to set in DR6.
    pub dr6: u64,
}

impl GuestFault {
    #[must_use]
    pub const fn plain(vector: u8) -> Self {
        GuestFault { vector, error: None, address: None, dr6: 0 }
    }

    #[must_use]
    pub const fn with_code(vector: u8, error: u32) -> Self {
        GuestFault { vector, error: Some(error), address: None, dr6: 0 }
    }

    #[must_use]
    pub const fn page(address: Gva, error: u32) -> Self {
        GuestFault { vector: vector::PF, error: Some(error), address: Some(address), dr6: 0 }
    }

    #[must_use]
    pub const fn debug(dr6: u64) -> Self {
        GuestFault { vector: vector::DB, error: None, address: None, dr6 }
    }

    pub const GP0: GuestFault = GuestFault::with_code(vector::GP, 0);
    pub const SS0: GuestFault = GuestFault::with_code(vector::SS, 0);
    pub const UD: GuestFault = GuestFault::plain(vector::UD);
    pub const NM: GuestFault = GuestFault::plain(vector::NM);
    pub const DE: GuestFault = GuestFault::plain(vector::DE);
}
