//! The four kinds of address and page number. They are distinct types, so that no function can be handed the wrong one.

use core::fmt;

pub const PAGE_SHIFT: u32 = 12;
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Selects the offset within a page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, ":{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// A guest virtual (linear) address.
    Gva,
    "gva"
);
address!(
    /// A guest "physical" address: what the guest believes.
    Gpa,
    "gpa"
);
address!(
    /// The page number of a [`Gpa`].
    Ppn,
    "ppn"
);
address!(
    /// A machine page number: where a page really is, in the host's pool.
    Mpn,
    "mpn"
);

impl Gva {
    #[must_use]
    pub fn offset(self) -> u64 {
        self.0 & PAGE_MASK
    }

    #[must_use]
    pub fn page(self) -> Gva {
        Gva(self.0 & !PAGE_MASK)
    }

    #[must_use]
    #[allow(clippy::should_implement_trait, reason = "it wraps, and two addresses do not add")]
    pub fn add(self, bytes: u64) -> Gva {
        Gva(self.0.wrapping_add(bytes))
    }

    /// Whether bits 63:47 are all equal, as 4-level paging demands.
    #[must_use]
    pub fn is_canonical(self) -> bool {
        ((self.0 as i64) << 16 >> 16) as u64 == self.0
    }
}

impl Gpa {
    #[must_use]
    pub fn ppn(self) -> Ppn {
        Ppn(self.0 >> PAGE_SHIFT)
    }

    #[must_use]
    pub fn offset(self) -> u64 {
        self.0 & PAGE_MASK
    }

    #[must_use]
    #[allow(clippy::should_implement_trait, reason = "it wraps, and two addresses do not add")]
    pub fn add(self, bytes: u64) -> Gpa {
        Gpa(self.0.wrapping_add(bytes))
    }
}

impl Ppn {
    #[must_use]
    pub fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}
