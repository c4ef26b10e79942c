//! Where the guest's addresses lead that are no RAM: the last few pages of registers that were accessed, so that each access
//! to a device needs no walk. What is known here goes with what the soft TLB knows.

use x86::{Gpa, Gva};

use crate::tlb::Bank;

/// A guest uses one or two devices at a time.
const ENTRIES: usize = 4;

#[derive(Clone, Copy, Debug)]
struct Entry {
    page: Gva,
    gpa: Gpa,
    bank: Bank,
    is_writable: bool,
    is_global: bool,
}

#[derive(Debug, Default)]
pub struct DevicePages {
    entries: [Option<Entry>; ENTRIES],
    /// Which entry goes next.
    next: usize,
}

impl DevicePages {
    /// Where an access leads, when that is known to be no RAM and the guest's tables allow it.
    #[inline]
    #[must_use]
    pub fn find(&self, bank: Bank, address: Gva, write: bool) -> Option<Gpa> {
        let fits = |entry: &&Entry| entry.page == address.page() && entry.bank == bank && (entry.is_writable || !write);
        let entry = self.entries.iter().flatten().find(fits)?;
        Some(entry.gpa.add(address.offset()))
    }

    /// Remembers that `address` leads to `gpa`.
    pub fn fill(&mut self, bank: Bank, address: Gva, gpa: Gpa, is_writable: bool, is_global: bool) {
        let page = address.page();
        let gpa = Gpa(gpa.0 - gpa.offset());
        let known = self.entries.iter().position(|entry| entry.is_some_and(|it| it.page == page && it.bank == bank));
        let place = known.unwrap_or(self.next);
        self.entries[place] = Some(Entry { page, gpa, bank, is_writable, is_global });
        self.next = (place + 1) % ENTRIES;
    }

    /// Forgets all but global pages, as a load of CR3 does.
    pub fn forget_local(&mut self) {
        for entry in &mut self.entries {
            *entry = entry.filter(|entry| entry.is_global);
        }
    }

    pub fn forget_all(&mut self) {
        self.entries = [None; ENTRIES];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_found_with_their_rights_until_they_are_forgotten() {
        let mut devices = DevicePages::default();
        devices.fill(Bank::Kernel, Gva(0x7123), Gpa(0xfee0_0123), true, true);
        devices.fill(Bank::User, Gva(0x8000), Gpa(0xfec0_0000), false, false);
        assert_eq!(devices.find(Bank::Kernel, Gva(0x70b0), true), Some(Gpa(0xfee0_00b0)));
        assert_eq!(devices.find(Bank::User, Gva(0x70b0), true), None);
        assert_eq!(devices.find(Bank::User, Gva(0x8ff8), false), Some(Gpa(0xfec0_0ff8)));
        assert_eq!(devices.find(Bank::User, Gva(0x8000), true), None);
        // The same page again, for stores now.
        devices.fill(Bank::User, Gva(0x8000), Gpa(0xfec0_0000), true, false);
        assert_eq!(devices.find(Bank::User, Gva(0x8000), true), Some(Gpa(0xfec0_0000)));
        devices.forget_local();
        assert_eq!(devices.find(Bank::User, Gva(0x8000), false), None);
        assert_eq!(devices.find(Bank::Kernel, Gva(0x7000), false), Some(Gpa(0xfee0_0000)));
        devices.forget_all();
        assert_eq!(devices.find(Bank::Kernel, Gva(0x7000), false), None);
        for page in 0..2 * ENTRIES as u64 {
            devices.fill(Bank::Kernel, Gva(page << 12), Gpa(0xfe00_0000), true, false);
        }
        let held = (0..2 * ENTRIES as u64).filter(|page| devices.find(Bank::Kernel, Gva(page << 12), true).is_some());
        assert_eq!(held.collect::<Vec<_>>(), [4, 5, 6, 7]);
    }
}
