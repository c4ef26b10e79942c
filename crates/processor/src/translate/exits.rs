//! How translated code goes from block to block and out: links, jump caches, polls, and the code that runs seldom.

use x86::{PAGE_MASK, PAGE_SIZE};

use super::asm::{Alu, Asm, BASE, Label, Mem, T0, T1, cc};
use super::block::Insn;
use super::frame::{self, JumpCache, JumpEntry};
use super::lower::{Flags, Lowering, MapEntry, Mode, Site};
use super::refill::Crossing;
use super::short::Short;
use crate::code_cache::POLL;

/// Bytes of the longest instruction.
const LONGEST_INSTRUCTION: u64 = 15;

/// Code that runs seldom, emitted behind the block.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cold {
    Leave {
        label: Label,
        site: Site,
        flags: Flags,
    },
    /// The TLB probe left address XOR tag in the scratch register. What follows is for an access that crosses pages.
    Probe {
        label: Label,
        site: Site,
        tag: i32,
        after: After,
    },
    LookupMiss {
        label: Label,
        mode: Mode,
        first: Option<usize>,
    },
    /// Where the return from a call arrives.
    Landing {
        label: Label,
        next: u64,
    },
    /// A conditional jump to another page.
    Lookup {
        label: Label,
        target: u64,
        flags: Flags,
    },
}

/// How code goes on after a failed probe, when the access crosses from one page into the next.
#[derive(Clone, Copy, Debug)]
pub(super) enum After {
    /// Not at all: the subroutine has left.
    Leave,
    /// In a block that checks accesses one by one.
    Apart { guest: u16 },
    /// Behind the probe: the instruction loads from the buffer.
    Load { hit: Label },
    /// Here: the instruction at this index stores into the buffer, which then goes to its pages.
    Store { index: usize, flags: Flags, size: u16, done: Label },
}

impl After {
    pub(super) fn crossing(self) -> Crossing {
        match self {
            After::Leave => Crossing::Leave,
            After::Apart { .. } => Crossing::Apart,
            After::Load { .. } | After::Store { .. } => Crossing::Buffer,
        }
    }
}

impl Lowering<'_> {
    pub(super) fn site(&mut self, site: Site) {
        let index = self.c.sites.next_number();
        self.c.sites.push(site);
        // test eax, imm32: a number that may be run over, behind a call that comes back.
        self.c.asm.byte(0xa9);
        self.site_uses.push(self.c.asm.position() as u32);
        self.c.asm.dword(index);
    }

    pub(super) fn leave(&mut self, site: Site) {
        self.leave_with(site, self.flags);
    }

    pub(super) fn leave_with(&mut self, site: Site, flags: Flags) {
        let stub = self.c.stubs.leave(flags == Flags::Host, self.c.mode.is_simd());
        self.c.asm.call_address(stub);
        self.site(site);
    }

    /// A RIP relative to the block: blocks are shorter than a page.
    pub(super) fn guest(&self, rip: u64) -> u16 {
        rip.wrapping_sub(self.c.rip) as u16
    }

    pub(super) fn interpret(&self, insn: &Insn) -> Site {
        Site::Interpret { block: self.c.block, guest: self.guest(insn.iced.ip()) }
    }

    /// Has the monitor run the instruction in the middle of the block. It may change anything, TLB entries among it: what
    /// follows depends on nothing but the mode.
    pub(super) fn call_out(&mut self, insn: &Insn) -> Option<()> {
        let Site::Interpret { block, guest } = self.interpret(insn) else { return None };
        let size = insn.iced.len() as u8;
        self.leave(match Short::of(&insn.iced).filter(|_| !self.c.mode.is_user()) {
            Some(short) => Site::Short { block, guest, size, short },
            None => Site::Callout { block, guest, size },
        });
        self.flags = Flags::Slot;
        self.in_t1 = None;
        Some(())
    }

    /// Notes that the host may fault at the next byte of code, on behalf of the instruction at work.
    pub(super) fn may_fault(&mut self) {
        let host = self.c.asm.position() as u32;
        self.map.push(MapEntry { host, guest: self.current, flags: self.flags });
    }

    /// Reads the poll page, which faults when somebody wants the VCPU. Comes before anything of the instruction.
    pub(super) fn poll(&mut self) {
        self.may_fault();
        self.c.asm.bytes(&POLL);
        self.c.asm.relative(self.c.base);
    }

    /// Links inside a page last as long as the page's code. Links of kernel code to other pages are undone when kernel
    /// mappings change, which is rare; user mappings change with every switch of address spaces. So user code looks for
    /// targets whose first instruction may reach into the next page, too.
    pub(super) fn is_linkable(&self, target: u64) -> bool {
        let distance = target.wrapping_sub(self.c.rip) as i64;
        let stays = target >> 12 == self.c.rip >> 12 && target & PAGE_MASK <= PAGE_SIZE - LONGEST_INSTRUCTION;
        self.c.may_link && i32::try_from(distance).is_ok() && (stays || !self.c.mode.is_user())
    }

    /// Goes to a constant RIP, from wherever the flags are.
    pub(super) fn jump_to(&mut self, target: u64) {
        if self.is_linkable(target) {
            let label = self.c.asm.label();
            self.c.asm.jmp(label);
            self.link(label, target);
        } else {
            if self.flags == Flags::Host {
                self.save_flags();
            }
            self.lookup_constant(target);
        }
    }

    /// Makes the jump that was just emitted one that can be linked to the block at `target`.
    pub(super) fn link(&mut self, label: Label, target: u64) {
        let at = (self.c.asm.address() - 4 - self.c.base) as u32;
        let flags_in_host = self.flags == Flags::Host;
        // Direct jumps reach two GiB from their end, and the block begins before that.
        let target = target.wrapping_sub(self.c.rip) as i32;
        let site = Site::Link { block: self.c.block, at, target, flags_in_host };
        self.cold.push(Cold::Leave { label, site, flags: self.flags });
    }

    /// A jump that is seldom taken, on a condition, out to a site.
    pub(super) fn leave_if(&mut self, condition: u8, site: Site, flags: Flags) {
        let label = self.c.asm.label();
        self.c.asm.jcc(condition, label);
        self.cold.push(Cold::Leave { label, site, flags });
    }

    pub(super) fn lookup_constant(&mut self, target: u64) {
        self.lookup_in_mode(target, self.c.mode);
    }

    /// Goes to a constant RIP whose code is of another mode.
    pub(super) fn lookup_in_mode(&mut self, target: u64, mode: Mode) {
        let place = jump_index(target, mode);
        let label = self.c.asm.label();
        let asm = &mut *self.c.asm;
        asm.mov_imm(T0, target);
        if mode.is_user() {
            asm.alu_load(Alu::Xor, T0, Mem::vcpu(frame::USER_GENERATION));
        }
        let [tag, host] = constant_entry(asm, mode, place);
        asm.alu_load(Alu::Cmp, T0, tag);
        asm.jcc(cc::NZ, label);
        asm.jmp_mem(host);
        self.in_t1 = None;
        self.cold.push(Cold::LookupMiss { label, mode, first: Some(place) });
    }

    /// Goes to the RIP in T0; flags must be in their slot.
    pub(super) fn lookup(&mut self) {
        self.lookup_dynamic(self.c.mode);
    }

    /// Goes to the RIP in T0, whose code is of the given mode.
    pub(super) fn lookup_dynamic(&mut self, mode: Mode) {
        let (strange, label) = (self.c.asm.label(), self.c.asm.label());
        look_up(self.c.asm, mode, strange, label);
        if mode.is_user() {
            self.cold.push(Cold::Leave { label: strange, site: Site::Lookup, flags: Flags::Slot });
        }
        self.cold.push(Cold::LookupMiss { label, mode, first: None });
        self.in_t1 = None;
    }

    fn after_crossing(&mut self, after: After) {
        match after {
            After::Leave => {}
            After::Apart { guest } => {
                let label = self.c.asm.label();
                self.c.asm.jmp(label);
                let at = (self.c.asm.address() - 4 - self.c.base) as u32;
                self.c.asm.bind(label);
                self.leave_with(Site::Apart { block: self.c.block, at, guest }, Flags::Slot);
            }
            After::Load { hit } => self.c.asm.jmp(hit),
            After::Store { index, flags, size, done } => {
                let insn = &self.insns[index];
                self.current = self.guest(insn.iced.ip());
                self.flags = flags;
                self.in_t1 = None;
                if self.plain_at(insn, Some(Mem::indexed(T0, T1, 0, 0))).is_none() {
                    return self.leave_with(self.interpret(insn), flags);
                }
                self.c.asm.mov_imm(T0, size.into());
                self.c.asm.call_address(self.c.stubs.scatter());
                self.c.asm.jmp(done);
            }
        }
    }

    pub(super) fn emit_cold(&mut self) {
        let mut index = 0;
        // A cold piece may add further ones.
        while index < self.cold.len() {
            let cold = self.cold[index];
            index += 1;
            match cold {
                Cold::Leave { label, site, flags } => {
                    self.c.asm.bind(label);
                    self.leave_with(site, flags);
                }
                Cold::Probe { label, site, tag, after } => {
                    self.c.asm.bind(label);
                    self.c.asm.alu_load(Alu::Xor, T0, Mem::indexed(BASE, T1, 0, tag));
                    let Site::Probe { retry, write, crossing, .. } = site else { continue };
                    let refill = self.c.stubs.refill(self.c.mode.bank(), write, self.c.mode.is_simd(), crossing);
                    self.c.asm.call_address(refill);
                    self.site(site);
                    self.c.asm.jmp_address(self.c.base + u64::from(retry));
                    self.after_crossing(after);
                }
                Cold::LookupMiss { label, mode, first } => {
                    self.c.asm.bind(label);
                    look_up_second(self.c.asm, mode, first);
                    let stub = self.c.stubs.leave(false, mode.is_simd());
                    self.c.asm.call_address(stub);
                    self.site(Site::Lookup);
                }
                Cold::Landing { label, next } => {
                    self.c.asm.bind(label);
                    self.land(next);
                }
                Cold::Lookup { label, target, flags } => {
                    self.c.asm.bind(label);
                    self.flags = flags;
                    if flags == Flags::Host {
                        self.save_flags();
                    }
                    self.lookup_constant(target);
                }
            }
        }
    }
}

/// The tag and the host address at a place of a jump cache. Clobbers T1.
fn constant_entry(asm: &mut Asm, mode: Mode, place: usize) -> [Mem; 2] {
    let offset = (place * size_of::<JumpEntry>()) as i32;
    match frame::jump_cache(mode) {
        JumpCache::Here(cache) => [0, 8].map(|word| Mem::vcpu(cache + offset + word)),
        JumpCache::At(table) => {
            asm.load(T1, Mem::vcpu(table));
            [0, 8].map(|word| Mem::base(T1, offset + word))
        }
    }
}

/// The same, the offset of the place being in T1; that may be changed to its address.
fn entry(asm: &mut Asm, mode: Mode) -> [Mem; 2] {
    match frame::jump_cache(mode) {
        JumpCache::Here(cache) => [0, 8].map(|word| Mem::indexed(BASE, T1, 0, cache + word)),
        JumpCache::At(table) => {
            asm.alu_load(Alu::Add, T1, Mem::vcpu(table));
            [0, 8].map(|word| Mem::base(T1, word))
        }
    }
}

/// Looks in the jump cache for the RIP in T0: either jumps to its block, or goes to `strange` with T0 as it came, or to
/// `miss` with T0 as a tag and the place in T1, as [`entry`] left it. Clobbers flags.
pub fn look_up(asm: &mut Asm, mode: Mode, strange: Label, miss: Label) {
    if mode.is_user() {
        // Only addresses of the lower half have tags that the generation cannot confuse.
        asm.mov(T1, T0);
        asm.shr(T1, 47);
        asm.jcc(cc::NZ, strange);
    }
    asm.multiply32(T1, T0, frame::JUMP_MULTIPLIER);
    // As `jump_index`, times the 16 bytes of an entry.
    let bits = frame::jump_bits(mode);
    asm.shr(T1, (32 - bits - 4) as u8);
    asm.alu_imm32(Alu::And, T1, ((1 << bits) - 1) << 4);
    if mode.is_user() {
        asm.alu_load(Alu::Xor, T0, Mem::vcpu(frame::USER_GENERATION));
    }
    let [tag, host] = entry(asm, mode);
    asm.alu_load(Alu::Cmp, T0, tag);
    asm.jcc(cc::NZ, miss);
    asm.jmp_mem(host);
}

/// The other place where a jump may be remembered. `first` is the place just looked at, unless that is in T1. Goes on with
/// the RIP in T0 when it is not there either.
pub fn look_up_second(asm: &mut Asm, mode: Mode, first: Option<usize>) {
    let miss = asm.label();
    let [tag, host] = match first {
        Some(place) => constant_entry(asm, mode, place ^ 1),
        None => {
            if let JumpCache::At(table) = frame::jump_cache(mode) {
                asm.alu_load(Alu::Sub, T1, Mem::vcpu(table));
            }
            // An entry has 16 bytes.
            asm.alu_imm32(Alu::Xor, T1, 16);
            entry(asm, mode)
        }
    };
    asm.alu_load(Alu::Cmp, T0, tag);
    asm.jcc(cc::NZ, miss);
    asm.jmp_mem(host);
    asm.bind(miss);
    if mode.is_user() {
        asm.alu_load(Alu::Xor, T0, Mem::vcpu(frame::USER_GENERATION));
    }
}

/// The place of a RIP in the jump cache of a mode.
#[must_use]
pub fn jump_index(rip: u64, mode: Mode) -> usize {
    ((rip as u32).wrapping_mul(frame::JUMP_MULTIPLIER) >> (32 - frame::jump_bits(mode))) as usize
}
