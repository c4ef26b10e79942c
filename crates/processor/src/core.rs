//! What an instruction works on: one VCPU, the guest's memory, and the machine outside. Every access to guest virtual
//! memory by either engine's slow path goes through here: soft TLB, else walk, pmap, pool, else MMIO.

use memory::bytes::{PageMut, in_line};
use memory::tlb::Bank;
use memory::{Access, GuestMemory, Paging, Translation, walk};
use x86::{Gpa, GuestFault, Gva, PAGE_SIZE, Ppn, vector};

use crate::engine::Outside;
use crate::profile::Doing;
use crate::vcpu::{TaskPriority, Vcpu};

pub struct Core<'a> {
    pub vcpu: &'a mut Vcpu,
    pub memory: &'a GuestMemory,
    pub outside: &'a mut dyn Outside,
}

/// How many of `size` bytes at `address` lie in its page.
pub(crate) fn in_page(address: Gva, size: usize) -> usize {
    size.min((PAGE_SIZE - address.offset()) as usize)
}

fn mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

impl Core<'_> {
    /// Explicit access by the running code.
    #[must_use]
    pub fn access(&self, write: bool) -> Access {
        Access { write, fetch: false, user: self.vcpu.cpu.cpl() == 3, implicit: false }
    }

    /// The bank whose entries mean the same as `access`, if there is one.
    pub(crate) fn bank_of(&self, access: Access) -> Bank {
        if access.user {
            Bank::User
        } else if access.implicit {
            Bank::Kernel
        } else {
            self.vcpu.bank()
        }
    }

    pub(crate) fn check_canonical(&self, address: Gva, size: usize) -> Result<(), GuestFault> {
        if !self.vcpu.cpu.is_long_mode() {
            return Ok(());
        }
        let last = address.add(size as u64 - 1);
        if address.is_canonical() && last.is_canonical() { Ok(()) } else { Err(GuestFault::GP0) }
    }

    /// Walks the guest's tables and fills the TLB when the page is RAM.
    pub fn translate(&mut self, address: Gva, access: Access) -> Result<Translation, GuestFault> {
        let before = self.vcpu.sampler.now(Doing::Walk.word());
        let translation = self.walk(address, access);
        self.vcpu.sampler.now(before);
        translation
    }

    fn walk(&mut self, address: Gva, access: Access) -> Result<Translation, GuestFault> {
        let translation = self.walk_and_fill(address, access);
        // Pages may have been broken on the way, tables among them.
        self.obey();
        translation
    }

    fn walk_and_fill(&mut self, address: Gva, access: Access) -> Result<Translation, GuestFault> {
        let paging = Paging::of(&self.vcpu.cpu);
        let translation = walk(self.memory, Some(self.vcpu.number), &paging, address, access)?;
        let ppn = translation.gpa.ppn();
        if access.fetch {
            return Ok(translation);
        }
        let bank = self.bank_of(access);
        let Some(held) = self.memory.hold(ppn, self.vcpu.number, translation.writable, access.write) else {
            let Translation { gpa, writable, global, .. } = translation;
            self.vcpu.tlb.devices.fill(bank, address, gpa, writable, global);
            return Ok(translation);
        };
        self.vcpu.tlb.fill(bank, address, &held, translation.global);
        if translation.page_size > PAGE_SIZE {
            self.vcpu.tlb.note_large(address, translation.page_size);
        }
        Ok(translation)
    }

    /// Where code at `address` is, checked for execution at the current privilege.
    pub fn translate_fetch(&mut self, address: Gva) -> Result<Gpa, GuestFault> {
        self.check_canonical(address, 1)?;
        let access = Access::fetch(self.vcpu.cpu.cpl() == 3);
        Ok(self.translate(address, access)?.gpa)
    }

    /// Reads 1, 2, 4 or 8 bytes for the running code.
    #[inline]
    pub fn read(&mut self, address: Gva, size: usize) -> Result<u64, GuestFault> {
        if self.vcpu.checks != 0 {
            self.check_access(address, size, false)?;
        }
        match self.vcpu.tlb.load(self.vcpu.bank(), address, size) {
            Some(value) => Ok(value),
            None => self.read_as(address, size, self.access(false)),
        }
    }

    /// Writes 1, 2, 4 or 8 bytes for the running code; all of them or, with a fault, none.
    #[inline]
    pub fn write(&mut self, address: Gva, size: usize, value: u64) -> Result<(), GuestFault> {
        if self.vcpu.checks != 0 {
            self.check_access(address, size, true)?;
        }
        if self.vcpu.tlb.store(self.vcpu.bank(), address, size, value) {
            return Ok(());
        }
        self.write_as(address, size, value, self.access(true))
    }

    /// Reads with given rights, e.g. [`Access::system`] for descriptor tables.
    pub fn read_as(&mut self, address: Gva, size: usize, access: Access) -> Result<u64, GuestFault> {
        self.check_canonical(address, size)?;
        let first = in_page(address, size);
        if first == size {
            return self.read_in_page(address, size, access);
        }
        // Both pages are checked before either is read, so that MMIO is not touched by an access that faults.
        self.translate(address, access)?;
        self.translate(self.wrap(address.add(first as u64)), access)?;
        let mut value = 0;
        for byte in 0..size as u64 {
            value |= self.read_in_page(self.wrap(address.add(byte)), 1, access)? << (8 * byte);
        }
        Ok(value)
    }

    /// Outside 64-bit mode linear addresses have 32 bits.
    fn wrap(&self, address: Gva) -> Gva {
        if self.vcpu.cpu.is_long_mode() { address } else { Gva(address.0 & 0xffff_ffff) }
    }

    fn read_in_page(&mut self, address: Gva, size: usize, access: Access) -> Result<u64, GuestFault> {
        let bank = self.bank_of(access);
        if let Some(value) = self.vcpu.tlb.load(bank, address, size) {
            return Ok(value);
        }
        let gpa = match self.vcpu.tlb.devices.find(bank, address, false) {
            Some(gpa) => gpa,
            None => self.translate(address, access)?.gpa,
        };
        match self.memory.page(gpa.ppn()) {
            Some(page) => Ok(page.load(gpa.offset(), size)),
            None => Ok(self.device_read(gpa, size)),
        }
    }

    pub fn write_as(&mut self, address: Gva, size: usize, value: u64, access: Access) -> Result<(), GuestFault> {
        self.check_canonical(address, size)?;
        let first = in_page(address, size);
        if first == size {
            return self.write_in_page(address, size, value, access);
        }
        self.translate(address, access)?;
        self.translate(self.wrap(address.add(first as u64)), access)?;
        for byte in 0..size as u64 {
            self.write_in_page(self.wrap(address.add(byte)), 1, value >> (8 * byte) & 0xff, access)?;
        }
        Ok(())
    }

    fn write_in_page(&mut self, address: Gva, size: usize, value: u64, access: Access) -> Result<(), GuestFault> {
        let bank = self.bank_of(access);
        if self.vcpu.tlb.store(bank, address, size, value) {
            return Ok(());
        }
        let gpa = match self.vcpu.tlb.devices.find(bank, address, true) {
            Some(gpa) => gpa,
            None => self.translate(address, access)?.gpa,
        };
        match self.page_to_write(gpa) {
            Some(page) => {
                page.store(gpa.offset(), size, value);
                self.note_store(gpa, size);
            }
            None => self.device_write(gpa, size, value),
        }
        Ok(())
    }

    /// A page for a store that goes past the TLB.
    pub(crate) fn page_to_write(&mut self, gpa: Gpa) -> Option<PageMut<'_>> {
        let memory = self.memory;
        let page = memory.page_to_write(gpa.ppn(), Some(self.vcpu.number));
        self.obey();
        page
    }

    /// Tells the code trace of a store that went past the TLB.
    pub(crate) fn note_store(&mut self, gpa: Gpa, size: usize) {
        self.memory.note_store(gpa.ppn(), gpa.offset(), size as u64, Some(self.vcpu.number));
    }

    /// Watches for stores to `code`, which was just read at `gpa` in one page. No processor can store there unnoticed any
    /// more; says whether the bytes are still these, so that something may be made of them. Only between two blocks: TLB
    /// entries are withdrawn.
    #[must_use]
    pub(crate) fn trace_code(&mut self, gpa: Gpa, code: &[u8]) -> bool {
        let (me, ppn) = (self.vcpu.number, gpa.ppn());
        let writers = self.memory.trace_code(me, ppn, gpa.offset(), code.len() as u64);
        if writers.has(me) {
            self.vcpu.forget_stores(self.memory, [ppn]);
        }
        let others = writers.without(me);
        if !others.is_empty() {
            self.memory.seats.ask(me, others, ppn);
            self.obey();
        }
        self.memory.page(ppn).is_some_and(|page| page.holds(gpa.offset(), code))
    }

    /// Watches for stores to whole pages, of whose code something is to be made: what is read of them from now on is either
    /// still there, or its page is reported. As [`Core::trace_code`], only between two blocks.
    pub(crate) fn trace_pages(&mut self, pages: impl IntoIterator<Item = Ppn>) {
        let me = self.vcpu.number;
        let mut mine = Vec::new();
        let mut has_asked = false;
        for ppn in pages {
            let writers = self.memory.trace_code(me, ppn, 0, PAGE_SIZE);
            if writers.has(me) {
                mine.push(ppn);
            }
            let others = writers.without(me);
            if !others.is_empty() {
                self.memory.seats.ask(me, others, ppn);
                has_asked = true;
            }
        }
        if !mine.is_empty() {
            self.vcpu.forget_stores(self.memory, mine);
        }
        if has_asked {
            self.obey();
        }
    }

    /// Forgets what others have asked for: pages that are elsewhere now, the right to store to pages of which other processors
    /// make code. Called before guest code runs, whenever others were let pass meanwhile, and in the middle of instructions
    /// where a page may have been broken. Whoever keeps addresses from the TLB looks whether [`Vcpu::obeyed`] has changed.
    pub fn obey(&mut self) {
        self.vcpu.obey(self.memory);
    }

    /// Replaces a value of 1, 2, 4 or 8 bytes in one atomic step with respect to other processors (aligned RAM), as a LOCKed
    /// instruction does: `change` gets the old value and says the new one; it may be asked again when another processor
    /// interfered. Gives back the old value. A locked instruction is a store even when the value stays the same.
    pub fn update(&mut self, address: Gva, size: usize, mut change: impl FnMut(u64) -> u64) -> Result<u64, GuestFault> {
        let access = self.access(true);
        let bank = self.vcpu.bank();
        self.check_canonical(address, size)?;
        if self.vcpu.checks != 0 {
            self.check_access(address, size, true)?;
        }
        while let Some(old) = self.vcpu.tlb.load(bank, address, size) {
            match self.vcpu.tlb.compare_exchange(bank, address, size, old, change(old)) {
                Some(seen) if seen == old => return Ok(old),
                Some(_) => {}
                None => break,
            }
        }
        let gpa = self.translate(address, access)?.gpa;
        if in_line(address.0, size)
            && let Some(page) = self.memory.page_to_write(gpa.ppn(), Some(self.vcpu.number))
        {
            loop {
                let old = page.load(gpa.offset(), size);
                if page.compare_exchange(gpa.offset(), size, old, change(old)) == old {
                    self.note_store(gpa, size);
                    self.obey();
                    return Ok(old);
                }
            }
        }
        // MMIO, and what would lock the host's bus.
        let first = in_page(address, size);
        if first < size {
            self.translate(self.wrap(address.add(first as u64)), access)?;
        }
        let memory = self.memory;
        let _alone = memory.split_lock();
        let old = self.read_as(address, size, access)?;
        self.write_as(address, size, change(old), access)?;
        Ok(old)
    }

    /// Checks that `size` bytes can be accessed, faulting as the access would: for instructions that must fault before
    /// they change anything.
    pub fn probe(&mut self, address: Gva, size: usize, write: bool) -> Result<(), GuestFault> {
        self.check_canonical(address, size)?;
        let access = self.access(write);
        let mut at = address;
        let end = address.add(size as u64 - 1);
        loop {
            if !self.vcpu.tlb.allows(self.vcpu.bank(), at, write) {
                self.translate(at, access)?;
            }
            if at.page() == end.page() {
                return Ok(());
            }
            at = Gva(at.page().0.wrapping_add(PAGE_SIZE));
        }
    }

    /// Reads any number of bytes for the running code.
    pub fn read_bytes(&mut self, address: Gva, buffer: &mut [u8]) -> Result<(), GuestFault> {
        let mut done = 0;
        while done < buffer.len() {
            let at = self.wrap(address.add(done as u64));
            let piece = in_page(at, buffer.len() - done);
            if piece > 8 && self.vcpu.checks == 0 && self.load_block(at, &mut buffer[done..done + piece]) {
                done += piece;
                continue;
            }
            let size = match buffer.len() - done {
                8.. if in_page(at, 8) == 8 => 8,
                4.. if in_page(at, 4) == 4 => 4,
                _ => 1,
            };
            let value = self.read(at, size)?;
            buffer[done..done + size].copy_from_slice(&value.to_le_bytes()[..size]);
            done += size;
        }
        Ok(())
    }

    /// Writes any number of bytes for the running code; all or, with a fault, none.
    pub fn write_bytes(&mut self, address: Gva, data: &[u8]) -> Result<(), GuestFault> {
        if data.is_empty() {
            return Ok(());
        }
        self.probe(address, data.len(), true)?;
        let mut done = 0;
        while done < data.len() {
            let at = self.wrap(address.add(done as u64));
            let piece = in_page(at, data.len() - done);
            if piece > 8 && self.vcpu.checks == 0 && self.store_block(at, &data[done..done + piece]) {
                done += piece;
                continue;
            }
            let size = match data.len() - done {
                8.. if in_page(at, 8) == 8 => 8,
                4.. if in_page(at, 4) == 4 => 4,
                _ => 1,
            };
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(&data[done..done + size]);
            self.write(at, size, u64::from_le_bytes(bytes))?;
            done += size;
        }
        Ok(())
    }

    /// MOV to CR8, of a value up to 15. Only a lower priority may let an interrupt through.
    pub(crate) fn set_cr8(&mut self, value: u64) {
        let priority = &mut self.vcpu.priority;
        priority.value = (value as u32 & 0xf) << 4;
        if priority.value < priority.told {
            self.tell_priority();
        }
    }

    /// Whether the local APIC believes that more interrupts can be taken than can.
    #[must_use]
    pub fn is_priority_untold(&self) -> bool {
        self.vcpu.priority.value != self.vcpu.priority.told
    }

    /// Before the local APIC is asked for anything that depends on the task priority.
    pub fn tell_priority(&mut self) {
        if self.is_priority_untold() {
            let priority = &mut self.vcpu.priority;
            priority.told = priority.value;
            self.outside.set_task_priority(priority.value as u8);
        }
    }

    /// After anything that may have changed the priority in the local APIC.
    pub fn learn_priority(&mut self) {
        let priority = u32::from(self.outside.task_priority());
        self.vcpu.priority = TaskPriority { value: priority, told: priority };
    }

    /// Reads a register that is not RAM; it may be one of the local APIC.
    pub(crate) fn device_read(&mut self, address: Gpa, size: usize) -> u64 {
        self.tell_priority();
        let outside = &mut self.outside;
        // It may wait for a thread of the device's, which may wait for us to forget a page.
        let value = self.memory.seats.aside(self.vcpu.number, || outside.mmio_read(address, size as u8));
        self.obey();
        value & mask(size)
    }

    pub(crate) fn device_write(&mut self, address: Gpa, size: usize, value: u64) {
        self.tell_priority();
        let outside = &mut self.outside;
        self.memory.seats.aside(self.vcpu.number, || outside.mmio_write(address, size as u8, value & mask(size)));
        self.obey();
        self.learn_priority();
    }

    /// Reads an MSR of the local APIC, if there is one of that number.
    pub(crate) fn apic_read(&mut self, number: u32) -> Option<u64> {
        self.tell_priority();
        self.outside.apic_read(number)
    }

    /// Says whether the write was legal.
    pub(crate) fn apic_write(&mut self, number: u32, value: u64) -> bool {
        self.tell_priority();
        let is_legal = self.outside.apic_write(number, value);
        self.learn_priority();
        is_legal
    }

    /// INVLPG and its like: both the TLB and the code caches forget one page.
    pub fn flush_page(&mut self, address: Gva) {
        self.vcpu.tlb.flush_page(address);
        self.vcpu.mappings += 1;
        if self.vcpu.kernel_code.may_contain(address) {
            self.vcpu.stale.all_mappings = true;
        }
        if self.vcpu.user_code.may_contain(address) {
            self.vcpu.flush_space();
        }
    }
}

/// The fault of a non-canonical or misplaced stack access is #SS(0) instead of #GP(0).
#[must_use]
pub fn as_stack_fault(fault: GuestFault) -> GuestFault {
    if fault.vector == vector::GP && fault.error == Some(0) { GuestFault::SS0 } else { fault }
}
