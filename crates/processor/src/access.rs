//! More ways of [`Core`] to reach guest memory: read to write later, 16 bytes in one step, whole blocks.

use x86::{GuestFault, Gva};

use crate::core::{Core, in_page};

impl Core<'_> {
    /// Reads what the same instruction is about to write, with the rights of the write: an instruction that changes memory
    /// faults as a write even at its read.
    #[inline]
    pub fn read_for_write(&mut self, address: Gva, size: usize) -> Result<u64, GuestFault> {
        if self.vcpu.checks != 0 {
            self.check_access(address, size, true)?;
        }
        match self.vcpu.tlb.load(self.vcpu.bank(), address, size) {
            Some(value) => Ok(value),
            None => self.read_as(address, size, self.access(true)),
        }
    }

    /// As [`Core::update`], of 16 bytes at a multiple of 16.
    pub fn update16(&mut self, address: Gva, mut change: impl FnMut(u128) -> u128) -> Result<u128, GuestFault> {
        let access = self.access(true);
        let bank = self.vcpu.bank();
        self.check_canonical(address, 16)?;
        if self.vcpu.checks != 0 {
            self.check_access(address, 16, true)?;
        }
        self.translate(address, access)?;
        let low = self.read_as(address, 8, access)?;
        let high = self.read_as(address.add(8), 8, access)?;
        let mut guess = u128::from(high) << 64 | u128::from(low);
        while let Some(seen) = self.vcpu.tlb.compare_exchange16(bank, address, guess, change(guess)) {
            if seen == guess {
                return Ok(seen);
            }
            guess = seen;
        }
        // A traced page or MMIO.
        let new = change(guess);
        self.write_as(address, 8, new as u64, access)?;
        self.write_as(address.add(8), 8, (new >> 64) as u64, access)?;
        Ok(guess)
    }

    /// Copies `size` bytes, of one page on either side, upwards; says whether it did. It leaves to others what faults, what is
    /// not plain memory, and what overlaps in a way that matters.
    pub fn copy_block(&mut self, to: Gva, from: Gva, size: usize) -> bool {
        if in_page(to, size) < size || in_page(from, size) < size {
            return false;
        }
        let bank = self.vcpu.bank();
        // Twice: the first miss fills the TLB. Entries of both addresses may also displace each other.
        self.vcpu.tlb.copy(bank, to, from, size)
            || (self.reach(from, false) && self.reach(to, true) && self.vcpu.tlb.copy(bank, to, from, size))
    }

    /// Stores bytes to one page; says whether it did, as [`Core::copy_block`].
    pub fn store_block(&mut self, to: Gva, data: &[u8]) -> bool {
        if in_page(to, data.len()) < data.len() {
            return false;
        }
        let bank = self.vcpu.bank();
        self.vcpu.tlb.store_bytes(bank, to, data) || (self.reach(to, true) && self.vcpu.tlb.store_bytes(bank, to, data))
    }

    /// Fills the TLB for an access; a fault is found again by whoever does the access.
    fn reach(&mut self, address: Gva, write: bool) -> bool {
        self.check_canonical(address, 1).is_ok() && self.translate(address, self.access(write)).is_ok()
    }
}
