//! Translated code has left: why, and what is to be done about it.

use x86::{GuestFault, Gva, PAGE_SIZE, cr0};

use super::blocks::Key;
use super::lower::{Check, Flags, Site};
use super::refill::Crossing;
use super::{KERNEL_SIMD_LEAVES, Next, Translator, set_flags};
use crate::core::Core;

impl Translator {
    /// Finds out why translated code left, and brings RIP and flags up to date.
    pub(super) fn left(&mut self, core: &mut Core<'_>) -> Next {
        let site = core.vcpu.hot.site;
        let is_stub = self.stubs.contains(site);
        if is_stub && self.stubs.is_fault(site) {
            return self.fault(core);
        }
        set_flags(&mut core.vcpu.cpu, core.vcpu.hot.flags);
        if is_stub && self.stubs.is_lookup(site) {
            return self.look_up(core);
        }
        // Behind the opcode of an instruction that carries it.
        let index = self.cache.read_u32(site + 1);
        let Some(found) = self.sites.get(index) else {
            panic!("no site has the number {index}");
        };
        match found {
            Site::Probe { block, retry, guest, size, write, check, crossing } => {
                self.counters.exits_probe += 1;
                core.vcpu.cpu.rip = self.blocks.rip(block, guest);
                let address = Gva(core.vcpu.hot.scratch[0]);
                let crosses = address.offset() + u64::from(size) > PAGE_SIZE;
                if crosses && crossing == Crossing::Apart {
                    // The page of the first byte may be none that this instruction touches.
                    return self.enter_apart(core);
                }
                let filled = if crosses {
                    let second = Gva(address.page().0.wrapping_add(PAGE_SIZE));
                    // Which of the pages faults, and at which address, the interpreter tells.
                    Ok(crossing == Crossing::Buffer
                        && second.is_canonical()
                        && self.fill(core, address, write) == Ok(true)
                        && self.fill(core, second, write) == Ok(true))
                } else {
                    self.fill(core, address, write)
                };
                match filled {
                    Ok(true) => {
                        self.counters.probe_filled += 1;
                        return Next::Enter(self.cache.range().start + u64::from(retry));
                    }
                    // Vector operands may have to be aligned, which is checked before.
                    Err(fault) if check == Check::Exact && (size <= 8 || address.0.is_multiple_of(size.into())) => {
                        return Next::Fault(fault);
                    }
                    _ => {}
                }
                Next::Step
            }
            Site::Apart { block, at, guest } => self.go_apart(core, block, at, guest),
            Site::Interpret { block, guest } => {
                let rip = self.blocks.rip(block, guest);
                self.counters.exits_interpret += 1;
                core.vcpu.cpu.rip = rip;
                Next::Step
            }
            Site::Callout { block, guest, size } => {
                let rip = self.blocks.rip(block, guest);
                self.counters.exits_interpret += 1;
                core.vcpu.cpu.rip = rip;
                Next::Callout { resume: site + 5, next: rip.wrapping_add(size.into()) }
            }
            // Sites are five bytes of code that does nothing.
            Site::Short { block, guest, size, short } => self.short(core, short, (block, guest), size, site + 5),
            Site::Link { block, at, target, flags_in_host } => {
                let rip = self.blocks.rip(block, 0).wrapping_add_signed(target.into());
                self.counters.exits_link += 1;
                core.vcpu.cpu.rip = rip;
                if self.options.single || core.vcpu.attention.is_raised() {
                    return Next::Dispatch;
                }
                let gone = self.code_gone();
                let Some((host, slot)) = self.find(core) else { return Next::Step };
                if self.code_gone() == gone && !core.memory.code.is_pending(core.vcpu.number) {
                    let at = self.cache.range().start + u64::from(at);
                    self.link(core, block, at, if flags_in_host { host } else { slot });
                }
                Next::Enter(slot)
            }
            Site::Lookup => self.look_up(core),
            Site::Window { block, guest } => {
                let rip = self.blocks.rip(block, guest);
                core.vcpu.cpu.rip = rip;
                core.vcpu.cpu.interrupt_shadow = true;
                Next::Dispatch
            }
            Site::Simd { block, guest } => {
                let rip = self.blocks.rip(block, guest);
                self.counters.exits_simd += 1;
                core.vcpu.cpu.rip = rip;
                let cpu = &core.vcpu.cpu;
                if cpu.cr0 & (cr0::TS | cr0::EM) != 0 {
                    return Next::Step;
                }
                self.simd = true;
                self.kernel_simd = KERNEL_SIMD_LEAVES;
                Next::Dispatch
            }
        }
    }

    /// The jump cache does not know where the guest goes.
    pub(super) fn look_up(&mut self, core: &mut Core<'_>) -> Next {
        self.counters.exits_lookup += 1;
        core.vcpu.cpu.rip = core.vcpu.hot.scratch[0];
        let may_be_direct = core.vcpu.hot.direct != 0 && core.vcpu.cpu.cpl() == 3;
        if self.options.single || core.vcpu.attention.is_raised() || may_be_direct {
            return Next::Dispatch;
        }
        match self.find(core) {
            Some((_, slot)) => Next::Enter(slot),
            None => Next::Step,
        }
    }

    /// Makes the jump of block `from` whose displacement is at `at` lead to `target`, which is the block at the guest's RIP.
    pub(super) fn link(&mut self, core: &mut Core<'_>, from: u32, at: u64, target: u64) {
        let mode = self.mode(&core.vcpu.cpu);
        let rip = core.vcpu.cpu.rip;
        let Some(gpa) = self.fetches.find(core, rip, mode) else { return };
        let source = from;
        let from = self.blocks.by_index(source).map(|block| block.key);
        let known = self.blocks.find(&Key { gpa, rip, mode });
        let (Some(from), Some(known)) = (from, known) else { return };
        // `second` is where the end of the target's instruction is, when that is another page.
        let second = self.blocks.by_index(known.index).and_then(|block| block.second);
        if from.rip >> 12 != rip >> 12 {
            self.links.note(source, gpa.ppn(), at, &self.cache);
        } else if from.gpa.ppn() != gpa.ppn() {
            // The page was remapped since `from` was translated: then the two do not belong together.
            return;
        }
        if let Some(second) = second {
            if mode.is_user() {
                // That page may be remapped without our knowing which links it concerns.
                return;
            }
            self.links.note(source, second, at, &self.cache);
        }
        self.cache.set_displacement(at, target);
    }

    /// Fills the TLB for a failed probe. False when the access may fault without a walk, or is not one of plain RAM.
    pub(super) fn fill(&self, core: &mut Core<'_>, address: Gva, write: bool) -> Result<bool, GuestFault> {
        if !address.is_canonical() {
            return Ok(false);
        }
        if core.vcpu.tlb.devices.find(core.vcpu.bank(), address, write).is_some() {
            return Ok(false);
        }
        let access = core.access(write);
        core.translate(address, access)?;
        Ok(core.vcpu.tlb.allows(core.vcpu.bank(), address, write))
    }

    /// The host faulted in translated code, or found the poll page armed.
    pub(super) fn fault(&mut self, core: &mut Core<'_>) -> Next {
        let origin = self.blocks.origin(self.landing.fault_rip());
        let Some(origin) = origin else {
            // Every instruction that can fault is in the map; anything else is a defect of ours.
            panic!("host fault outside the map of blocks at {:#x}", self.landing.fault_rip());
        };
        let flags = if origin.flags == Flags::Host { core.vcpu.hot.fault_flags } else { core.vcpu.hot.flags };
        set_flags(&mut core.vcpu.cpu, flags);
        core.vcpu.cpu.rip = origin.rip;
        if core.vcpu.attention.is_raised() {
            self.counters.exits_poll += 1;
            return Next::Dispatch;
        }
        // A kick that was answered before it armed the page would make every poll fault; one that comes now is seen below.
        if self.cache.is_poll(self.landing.fault_rip()) {
            self.poll.force();
        }
        if core.vcpu.attention.is_raised() {
            return Next::Dispatch;
        }
        self.counters.exits_fault += 1;
        Next::Step
    }
}
