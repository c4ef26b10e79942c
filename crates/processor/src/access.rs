//! More ways of [`Core`] to reach guest memory: read to write later, 16 bytes in one step, whole blocks.

use memory::Access;
use memory::tlb::index;
use x86::{GuestFault, Gva, PAGE_SIZE};

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
        let gpa = self.translate(address, access)?.gpa;
        let low = self.read_as(address, 8, access)?;
        let high = self.read_as(address.add(8), 8, access)?;
        let mut guess = u128::from(high) << 64 | u128::from(low);
        while let Some(seen) = self.vcpu.tlb.compare_exchange16(bank, address, guess, change(guess)) {
            if seen == guess {
                return Ok(seen);
            }
            guess = seen;
        }
        if let Some(page) = self.memory.page_to_write(gpa.ppn(), Some(self.vcpu.number)) {
            // A traced page.
            loop {
                let seen = page.compare_exchange16(gpa.offset(), guess, change(guess));
                if seen == guess {
                    self.note_store(gpa, 16);
                    self.obey();
                    return Ok(seen);
                }
                guess = seen;
            }
        }
        let new = change(guess);
        self.write_as(address, 8, new as u64, access)?;
        self.write_as(address.add(8), 8, (new >> 64) as u64, access)?;
        Ok(guess)
    }

    /// Copies `size` bytes, of one page on either side, as if byte by byte, upwards or `down`; says whether it did. It leaves to
    /// others what faults, what is not plain memory, and what overlaps in a way that matters.
    pub fn copy_block(&mut self, to: Gva, from: Gva, size: usize, down: bool) -> bool {
        if in_page(to, size) < size || in_page(from, size) < size {
            return false;
        }
        let bank = self.vcpu.bank();
        // Twice: the first miss fills the TLB.
        self.vcpu.tlb.copy(bank, to, from, size, down)
            || (self.reach(from, false) && self.reach(to, true) && self.vcpu.tlb.copy(bank, to, from, size, down))
            || (index(to) == index(from) && self.copy_through_buffer(to, from, size))
    }

    /// As [`Core::copy_block`], for addresses whose TLB entries displace each other: a kernel that moves itself by a multiple of
    /// the TLB's reach does nothing but that.
    fn copy_through_buffer(&mut self, to: Gva, from: Gva, size: usize) -> bool {
        let mut buffer = [0; PAGE_SIZE as usize];
        let Some(bytes) = buffer.get_mut(..size) else { return false };
        if self.check_canonical(from, 1).is_err() || self.check_canonical(to, 1).is_err() {
            return false;
        }
        let Ok(source) = self.translate(from, self.access(false)) else { return false };
        let Ok(target) = self.translate(to, self.access(true)) else { return false };
        // Two names of one page may overlap.
        if source.gpa.ppn() == target.gpa.ppn() {
            return false;
        }
        let Some(page) = self.memory.page(source.gpa.ppn()) else { return false };
        page.read(source.gpa.offset(), bytes);
        self.vcpu.tlb.store_bytes(self.vcpu.bank(), to, bytes)
    }

    /// Stores bytes to one page; says whether it did, as [`Core::copy_block`].
    pub fn store_block(&mut self, to: Gva, data: &[u8]) -> bool {
        if in_page(to, data.len()) < data.len() {
            return false;
        }
        let bank = self.vcpu.bank();
        self.vcpu.tlb.store_bytes(bank, to, data) || (self.reach(to, true) && self.vcpu.tlb.store_bytes(bank, to, data))
    }

    /// Stores bytes with the rights of `access` if the TLB has their one page; says whether it did.
    pub fn store_frame(&mut self, to: Gva, data: &[u8], access: Access) -> bool {
        self.vcpu.tlb.store_bytes(self.bank_of(access), to, data)
    }

    /// Loads bytes of one page; says whether it did, as [`Core::copy_block`].
    pub fn load_block(&mut self, from: Gva, buffer: &mut [u8]) -> bool {
        if in_page(from, buffer.len()) < buffer.len() {
            return false;
        }
        let bank = self.vcpu.bank();
        self.vcpu.tlb.load_bytes(bank, from, buffer)
            || (self.reach(from, false) && self.vcpu.tlb.load_bytes(bank, from, buffer))
    }

    /// Fills the TLB for an access; a fault is found again by whoever does the access.
    fn reach(&mut self, address: Gva, write: bool) -> bool {
        self.check_canonical(address, 1).is_ok() && self.translate(address, self.access(write)).is_ok()
    }
}
