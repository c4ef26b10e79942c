//! The walk of the guest's own page tables, as the processor does it: Intel SDM (2024-12) Vol. 3A ch. 5 "Paging",
//! with accessed and dirty bits set in the guest's tables.

use x86::fault::page_fault;
use x86::paging::{ADDRESS, RESERVED_HIGH, entry};
use x86::{CpuState, Gpa, GuestFault, Gva, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, cr0, cr4, efer, rflags};

use crate::GuestMemory;

/// How an instruction means to use an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub write: bool,
    pub fetch: bool,
    /// By code at CPL 3, and not an implicit supervisor access (descriptor tables, TSS, exception stacks).
    pub user: bool,
    /// Implicit supervisor accesses do not honour RFLAGS.AC under SMAP (SDM Vol. 3A 5.6 "Access Rights").
    pub implicit: bool,
}

impl Access {
    #[must_use]
    pub const fn read(user: bool) -> Access {
        Access { write: false, fetch: false, user, implicit: false }
    }

    #[must_use]
    pub const fn write(user: bool) -> Access {
        Access { write: true, fetch: false, user, implicit: false }
    }

    #[must_use]
    pub const fn fetch(user: bool) -> Access {
        Access { write: false, fetch: true, user, implicit: false }
    }

    #[must_use]
    pub const fn system(write: bool) -> Access {
        Access { write, fetch: false, user: false, implicit: true }
    }
}

/// The control bits that paging depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    pub enabled: bool,
    pub root: Gpa,
    pub write_protect: bool,
    pub no_execute: bool,
    pub smep: bool,
    /// SMAP is on and not lifted by RFLAGS.AC.
    pub smap: bool,
    pub smap_implicit: bool,
    pub global: bool,
    /// PKRU and IA32_PKRS, which forbid nothing where CR4 does not enable them.
    pub user_keys: u32,
    pub supervisor_keys: u32,
}

impl Paging {
    #[must_use]
    pub fn of(cpu: &CpuState) -> Paging {
        let smap = cpu.cr4 & cr4::SMAP != 0;
        Paging {
            enabled: cpu.cr0 & cr0::PG != 0,
            root: Gpa(cpu.cr3 & ADDRESS),
            write_protect: cpu.cr0 & cr0::WP != 0,
            no_execute: cpu.efer & efer::NXE != 0,
            smep: cpu.cr4 & cr4::SMEP != 0,
            smap: smap && cpu.rflags & rflags::AC == 0,
            smap_implicit: smap,
            global: cpu.cr4 & cr4::PGE != 0,
            user_keys: if cpu.cr4 & cr4::PKE != 0 { cpu.pkru } else { 0 },
            supervisor_keys: if cpu.cr4 & cr4::PKS != 0 { cpu.pkrs } else { 0 },
        }
    }

    /// Whether the protection key in the `leaf` entry of a user or supervisor page forbids an access, whatever else does:
    /// SDM Vol. 3A 5.6.2 "Protection Keys". Of the two bits for a key the lower forbids all data accesses, the upper stores.
    fn key_forbids(&self, leaf: u64, user_page: bool, access: Access) -> bool {
        let keys = if user_page { self.user_keys } else { self.supervisor_keys };
        let key = leaf >> entry::KEY_SHIFT & 15;
        let (no_access, no_store) = (keys >> (2 * key) & 1 != 0, keys >> (2 * key) & 2 != 0);
        !access.fetch && (no_access || (no_store && access.write && (access.user || self.write_protect)))
    }
}

/// Where an address leads, and what else may be done there without another walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    pub gpa: Gpa,
    /// A store by the same kind of code is allowed and the dirty bit is already set.
    pub writable: bool,
    pub global: bool,
    /// The U/S bit of all levels: a user page.
    pub user: bool,
    /// Bytes that the guest's entry maps: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
}

/// Translates `address` for `access` of a processor; sets accessed and dirty bits as hardware would. The processor looks at its
/// requests afterwards.
pub fn walk(
    memory: &GuestMemory,
    by: Option<usize>,
    paging: &Paging,
    address: Gva,
    access: Access,
) -> Result<Translation, GuestFault> {
    if !paging.enabled {
        let gpa = Gpa(address.0);
        return Ok(Translation { gpa, writable: true, global: false, user: true, page_size: PAGE_SIZE });
    }
    loop {
        match attempt(memory, by, paging, address, access)? {
            Some(translation) => return Ok(translation),
            // An entry changed between its reading and the update of its accessed bit: another processor's doing.
            None => continue,
        }
    }
}

/// Where an address leads, as the guest's tables say now, whatever may be done there: nothing is touched. `None` where they
/// lead nowhere, or are not in memory.
#[must_use]
pub fn peek(memory: &GuestMemory, paging: &Paging, address: Gva) -> Option<Gpa> {
    if !paging.enabled {
        return Some(Gpa(address.0));
    }
    let mut table = paging.root;
    for level in (0..4_u32).rev() {
        let shift = PAGE_SHIFT + 9 * level;
        let value = memory.resident(table.ppn())?.read_u64(((address.0 >> shift) & 0x1ff) * 8);
        if value & entry::PRESENT == 0 {
            return None;
        }
        if level == 0 || value & entry::LARGE != 0 {
            let size = 1_u64 << shift;
            return Some(Gpa(value & ADDRESS & !(size - 1) | address.0 & (size - 1)));
        }
        table = Gpa(value & ADDRESS & !PAGE_MASK);
    }
    None
}

fn fault(paging: &Paging, address: Gva, access: Access, kind: u32) -> GuestFault {
    let mut code = kind;
    if access.write {
        code |= page_fault::WRITE;
    }
    if access.user {
        code |= page_fault::USER;
    }
    if access.fetch && (paging.no_execute || paging.smep) {
        code |= page_fault::FETCH;
    }
    GuestFault::page(address, code)
}

/// The rights that all levels grant together.
struct Rights {
    writable: bool,
    user: bool,
    no_execute: bool,
}

impl Rights {
    #[allow(clippy::nonminimal_bool, reason = "worded as the manual words it")]
    fn allow(&self, paging: &Paging, access: Access) -> bool {
        if access.user {
            return self.user && (!access.write || self.writable) && !(access.fetch && self.no_execute);
        }
        if access.fetch {
            return !self.no_execute && !(paging.smep && self.user);
        }
        let smap = if access.implicit { paging.smap_implicit } else { paging.smap };
        !(smap && self.user) && (!access.write || self.writable || !paging.write_protect)
    }

    /// Whether the same code may also write.
    fn allow_write(&self, paging: &Paging, access: Access) -> bool {
        self.writable || (!access.user && !paging.write_protect)
    }
}

fn attempt(
    memory: &GuestMemory,
    by: Option<usize>,
    paging: &Paging,
    address: Gva,
    access: Access,
) -> Result<Option<Translation>, GuestFault> {
    let mut table = paging.root;
    let mut rights = Rights { writable: true, user: true, no_execute: false };
    for level in (0..4_u32).rev() {
        let shift = PAGE_SHIFT + 9 * level;
        let index = (address.0 >> shift) & 0x1ff;
        let offset = index * 8;
        // A table outside RAM reads as all ones, as an empty bus does: reserved bits are then set.
        let value = memory.page(table.ppn()).map_or(u64::MAX, |page| page.read_u64(offset));
        if value & entry::PRESENT == 0 {
            return Err(fault(paging, address, access, 0));
        }
        let large = level > 0 && value & entry::LARGE != 0;
        let mut reserved = RESERVED_HIGH;
        if !paging.no_execute {
            reserved |= entry::NX;
        }
        if large {
            // Bit 12 of a large entry is PAT; the address bits below the page size must be zero.
            reserved |= ((1 << shift) - 1) & !0x1fff;
        }
        if value & reserved != 0 || (level == 3 && value & entry::LARGE != 0) || (large && level == 3) {
            return Err(fault(paging, address, access, page_fault::PRESENT | page_fault::RESERVED));
        }
        rights.writable &= value & entry::WRITABLE != 0;
        rights.user &= value & entry::USER != 0;
        rights.no_execute |= value & entry::NX != 0;
        let leaf = level == 0 || large;
        let is_locked = leaf && paging.key_forbids(value, rights.user, access);
        if is_locked || (leaf && !rights.allow(paging, access)) {
            let key = if is_locked { page_fault::KEY } else { 0 };
            return Err(fault(paging, address, access, page_fault::PRESENT | key));
        }
        let mut updated = value | entry::ACCESSED;
        if leaf && access.write {
            updated |= entry::DIRTY;
        }
        if updated != value {
            let page = memory.page_to_write(table.ppn(), by);
            let replaced = page.is_some_and(|page| page.replace_u64(offset, value, updated));
            if !replaced {
                return Ok(None);
            }
            // Page tables may share a page with code in tiny guests; the walk is a store like any other.
            memory.note_store(table.ppn(), offset, 8, None);
        }
        if leaf {
            let size = 1_u64 << shift;
            let base = value & ADDRESS & !(size - 1);
            let is_unlocked = !paging.key_forbids(value, rights.user, Access { write: true, ..access });
            return Ok(Some(Translation {
                gpa: Gpa(base | address.0 & (size - 1)),
                writable: updated & entry::DIRTY != 0 && rights.allow_write(paging, access) && is_unlocked,
                global: paging.global && value & entry::GLOBAL != 0,
                user: rights.user,
                page_size: size,
            }));
        }
        table = Gpa(value & ADDRESS & !PAGE_MASK);
    }
    unreachable!("level 0 is always a leaf")
}

#[cfg(test)]
mod tests;
