//! From a decoded guest block to host code.
//!
//! Guest flags are in the host's RFLAGS or in `Hot::flags`; which of the two is known at every point of the code. A block
//! has an entry for either. Whatever fails (a TLB miss, a fault of the host) leaves with the guest's state as it was
//! before the instruction, so that the interpreter can run it.

use iced_x86::{OpKind, Register};
use memory::tlb::{Bank, ENTRIES};

use super::asm::{Alu, Asm, Label, Mem, RAX, Reg, T0, T1, cc};
use super::block::{Insn, Kind, Source, has_segment_base};
use super::encode::{Fields, slot, slots};
use super::enter::{Stubs, home};
use super::frame;
use super::groups::{Group, Groups, Member};

/// What translated code depends on besides its bytes and addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mode(pub u8);

impl Mode {
    pub const USER: u8 = 1;
    /// RFLAGS.AC lifts SMAP.
    pub const AC: u8 = 2;
    /// SIMD state is in host registers.
    pub const SIMD: u8 = 4;

    #[must_use]
    pub fn is_user(self) -> bool {
        self.0 & Self::USER != 0
    }

    #[must_use]
    pub fn is_simd(self) -> bool {
        self.0 & Self::SIMD != 0
    }

    #[must_use]
    pub fn bank(self) -> Bank {
        if self.is_user() {
            Bank::User
        } else if self.0 & Self::AC != 0 {
            Bank::KernelAc
        } else {
            Bank::Kernel
        }
    }
}

/// Why translated code left. The word behind the leaving call is an index into the list of sites, of which there is one
/// for every access to memory: so they are small. RIPs are relative to the block's, addresses to the code cache's start.
#[derive(Clone, Copy, Debug)]
pub enum Site {
    /// A TLB probe failed; the address is in the first scratch register.
    Probe { block: u32, retry: u32, guest: u16, size: u16, write: bool, grouped: bool },
    /// The interpreter shall run the instruction.
    Interpret { block: u32, guest: u16 },
    /// A direct jump whose target is not linked yet: `at` is where its displacement is.
    Link { block: u32, at: u32, target: i32, flags_in_host: bool },
    /// The jump cache does not know the RIP in the first scratch register.
    Lookup,
    /// Interrupts were enabled while one waits: the instruction runs in the shadow, then the window is open.
    Window { block: u32, guest: u16 },
    /// An instruction needs SIMD state in registers.
    Simd { block: u32, guest: u16 },
}

const _: () = assert!(size_of::<Site>() <= 16);

/// Where the guest's flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    Host,
    Slot,
}

/// Maps host code back to guest instructions: from this offset on, code belongs to the instruction.
#[derive(Clone, Copy, Debug)]
pub struct MapEntry {
    pub host: u32,
    pub guest: u16,
    pub flags: Flags,
}

#[derive(Debug)]
pub struct Lowered {
    pub entry_host: u32,
    pub entry_slot: u32,
    pub map: Vec<MapEntry>,
}

/// Code that runs seldom, emitted behind the block.
#[derive(Debug)]
enum Cold {
    Leave {
        label: Label,
        site: Site,
        flags: Flags,
    },
    /// The TLB probe left address XOR tag in the scratch register.
    Probe {
        label: Label,
        site: Site,
        tag: i32,
    },
    LookupMiss {
        label: Label,
        mode: Mode,
        first: Option<usize>,
    },
    /// A conditional jump to another page.
    Lookup {
        label: Label,
        target: u64,
        flags: Flags,
    },
}

pub struct Context<'a> {
    pub asm: &'a mut Asm,
    pub stubs: &'a Stubs,
    pub sites: &'a mut Vec<Site>,
    /// The start of the code cache, which is the poll page.
    pub base: u64,
    pub mode: Mode,
    pub block: u32,
    /// First guest address of the block, and whether jumps inside its page may be linked.
    pub rip: u64,
    pub may_link: bool,
    pub count: Option<i32>,
}

pub(super) struct Lowering<'a> {
    pub(super) c: Context<'a>,
    groups: Groups,
    ready: Vec<bool>,
    pub(super) flags: Flags,
    /// The group whose pointer is in T1.
    pub(super) in_t1: Option<usize>,
    cold: Vec<Cold>,
    map: Vec<MapEntry>,
    /// The instruction at work, relative to the block.
    current: u16,
    unsupported: bool,
}

pub fn lower(context: Context<'_>, source: &Source, groups: Groups) -> Lowered {
    let ready = vec![false; groups.groups.len()];
    let mut l = Lowering {
        c: context,
        groups,
        ready,
        flags: Flags::Slot,
        in_t1: None,
        cold: Vec::new(),
        map: Vec::new(),
        current: 0,
        unsupported: false,
    };
    let (entry_host, entry_slot) = l.entries(&source.insns);
    if let Some(counter) = l.c.count {
        l.count(counter, source.insns.len());
    }
    let mut ended = false;
    for (index, insn) in source.insns.iter().enumerate() {
        l.current = l.guest(insn.iced.ip());
        if insn.kind == Kind::Interpret {
            let site = l.interpret(insn);
            l.leave(site);
            ended = true;
            break;
        }
        if insn.is_simd && !l.c.mode.is_simd() {
            let (block, guest) = (l.c.block, l.guest(insn.iced.ip()));
            l.leave(Site::Simd { block, guest });
            ended = true;
            break;
        }
        l.unsupported = false;
        l.instruction(index, insn);
        if l.unsupported {
            let site = l.interpret(insn);
            l.leave(site);
            ended = true;
            break;
        }
        if insn.kind.ends_block() {
            ended = true;
            break;
        }
    }
    if !ended {
        l.jump_to(l.c.rip + source.size as u64);
    }
    l.emit_cold();
    l.c.asm.finish();
    Lowered { entry_host, entry_slot, map: l.map }
}

impl Lowering<'_> {
    /// Emits the two entries and chooses where flags are at the start, so that neither saves nor restores for nothing.
    fn entries(&mut self, insns: &[Insn]) -> (u32, u32) {
        let live = insns.first().is_none_or(|insn| insn.live_in() != 0);
        if !live {
            self.flags = Flags::Host;
            let here = self.c.asm.position() as u32;
            return (here, here);
        }
        if self.wants_flags_in_slot(insns) {
            let host = self.c.asm.position() as u32;
            self.save_flags();
            (host, self.c.asm.position() as u32)
        } else {
            let slot = self.c.asm.position() as u32;
            self.flags = Flags::Slot;
            self.restore_flags();
            self.flags = Flags::Host;
            (self.c.asm.position() as u32, slot)
        }
    }

    /// Whether the block needs scratch flags before it reads any.
    fn wants_flags_in_slot(&self, insns: &[Insn]) -> bool {
        for insn in insns {
            if insn.kind == Kind::Interpret {
                return true;
            }
            if insn.operand.is_some() || insn.stack.is_some() {
                return true;
            }
            if insn.flags_read != 0 || insn.flags_changed != 0 {
                return false;
            }
            if insn.kind.ends_block() {
                return true;
            }
        }
        true
    }

    pub(super) fn save_flags(&mut self) {
        // pushfq; pop [flags]: with RSP as base, POP computes the address after it has moved RSP back.
        self.c.asm.byte(0x9c);
        self.c.asm.pop_mem(Mem::vcpu(frame::FLAGS));
        self.flags = Flags::Slot;
    }

    /// POPFQ is slow; SAHF and an ADD that overflows on demand are not.
    pub(super) fn restore_flags(&mut self) {
        let asm = &mut *self.c.asm;
        asm.store(Mem::vcpu(frame::SPILL), RAX);
        asm.load32(RAX, Mem::vcpu(frame::FLAGS));
        // xchg al, ah; and al, 8; add al, 0x78; sahf
        asm.bytes(&[0x86, 0xc4, 0x24, 0x08, 0x04, 0x78, 0x9e]);
        asm.load(RAX, Mem::vcpu(frame::SPILL));
        self.flags = Flags::Host;
    }

    /// Before code that clobbers RFLAGS: saves them when `live` of them are still wanted.
    pub(super) fn before_clobber(&mut self, live: u32) {
        if self.flags == Flags::Host && live != 0 {
            self.save_flags();
        }
    }

    fn count(&mut self, counter: i32, instructions: usize) {
        let asm = &mut *self.c.asm;
        asm.load(T0, Mem::vcpu(counter));
        asm.lea(T0, Mem::base(T0, instructions as i32));
        asm.store(Mem::vcpu(counter), T0);
    }

    fn site(&mut self, site: Site) {
        let index = self.c.sites.len() as u32;
        self.c.sites.push(site);
        // test eax, imm32: a number that may be run over, behind a call that comes back.
        self.c.asm.byte(0xa9);
        self.c.asm.dword(index);
    }

    fn leave(&mut self, site: Site) {
        self.leave_with(site, self.flags);
    }

    fn leave_with(&mut self, site: Site, flags: Flags) {
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

    /// Notes that the host may fault at the next byte of code, on behalf of the instruction at work.
    fn may_fault(&mut self) {
        let host = self.c.asm.position() as u32;
        self.map.push(MapEntry { host, guest: self.current, flags: self.flags });
    }

    /// Reads the poll page, which faults when somebody wants the VCPU. Comes before anything of the instruction.
    fn poll(&mut self) {
        self.may_fault();
        // mov r10d, [rip + poll]
        self.c.asm.bytes(&[0x44, 0x8b, 0x15]);
        self.c.asm.relative(self.c.base);
    }

    /// Links inside a page last as long as the page's code. Links of kernel code to other pages are undone when kernel
    /// mappings change, which is rare; user mappings change with every switch of address spaces.
    fn is_linkable(&self, target: u64) -> bool {
        let distance = target.wrapping_sub(self.c.rip) as i64;
        self.c.may_link
            && i32::try_from(distance).is_ok()
            && (target >> 12 == self.c.rip >> 12 || !self.c.mode.is_user())
    }

    /// Goes to a constant RIP, from wherever the flags are.
    fn jump_to(&mut self, target: u64) {
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
    fn link(&mut self, label: Label, target: u64) {
        let at = (self.c.asm.address() - 4 - self.c.base) as u32;
        let flags_in_host = self.flags == Flags::Host;
        // Direct jumps reach two GiB from their end, and the block begins before that.
        let target = target.wrapping_sub(self.c.rip) as i32;
        let site = Site::Link { block: self.c.block, at, target, flags_in_host };
        self.cold.push(Cold::Leave { label, site, flags: self.flags });
    }

    pub(super) fn leave_always(&mut self, site: Site) {
        self.leave(site);
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
        let place = jump_index(target);
        let entry = frame::jump_entry(mode.0.into(), place);
        let label = self.c.asm.label();
        let asm = &mut *self.c.asm;
        asm.mov_imm(T0, target);
        if mode.is_user() {
            asm.alu_load(Alu::Xor, T0, Mem::vcpu(frame::USER_GENERATION));
        }
        asm.alu_load(Alu::Cmp, T0, Mem::vcpu(entry));
        asm.jcc(cc::NZ, label);
        asm.jmp_mem(Mem::vcpu(entry + 8));
        self.cold.push(Cold::LookupMiss { label, mode, first: Some(place) });
    }

    /// Goes to the RIP in T0; flags must be in their slot.
    fn lookup(&mut self) {
        self.lookup_dynamic(self.c.mode);
    }

    /// Goes to the RIP in T0, whose code is of the given mode.
    pub(super) fn lookup_dynamic(&mut self, mode: Mode) {
        let cache = frame::jump_entry(mode.0.into(), 0);
        let label = self.c.asm.label();
        if mode.is_user() {
            // Only addresses of the lower half have tags that the generation cannot confuse.
            let asm = &mut *self.c.asm;
            asm.mov(T1, T0);
            asm.shr(T1, 47);
            let strange = asm.label();
            asm.jcc(cc::NZ, strange);
            self.cold.push(Cold::Leave { label: strange, site: Site::Lookup, flags: Flags::Slot });
        }
        let asm = &mut *self.c.asm;
        asm.multiply32(T1, T0, frame::JUMP_MULTIPLIER);
        asm.shr(T1, 16);
        asm.alu_imm32(Alu::And, T1, ((frame::JUMP_ENTRIES - 1) << 4) as i32);
        if mode.is_user() {
            asm.alu_load(Alu::Xor, T0, Mem::vcpu(frame::USER_GENERATION));
        }
        asm.alu_load(Alu::Cmp, T0, Mem::indexed(super::asm::BASE, T1, 0, cache));
        asm.jcc(cc::NZ, label);
        asm.jmp_mem(Mem::indexed(super::asm::BASE, T1, 0, cache + 8));
        self.cold.push(Cold::LookupMiss { label, mode, first: None });
        self.in_t1 = None;
    }

    /// The other place where a jump may be remembered. `first` is the place just looked at, unless its offset is in T1.
    fn second_way(&mut self, mode: Mode, first: Option<usize>) {
        let asm = &mut *self.c.asm;
        let miss = asm.label();
        let (tag, host) = match first {
            Some(place) => {
                let entry = frame::jump_entry(mode.0.into(), place ^ 1);
                (Mem::vcpu(entry), Mem::vcpu(entry + 8))
            }
            None => {
                // An entry has 16 bytes.
                asm.alu_imm32(Alu::Xor, T1, 16);
                let cache = frame::jump_entry(mode.0.into(), 0);
                (Mem::indexed(super::asm::BASE, T1, 0, cache), Mem::indexed(super::asm::BASE, T1, 0, cache + 8))
            }
        };
        asm.alu_load(Alu::Cmp, T0, tag);
        asm.jcc(cc::NZ, miss);
        asm.jmp_mem(host);
        asm.bind(miss);
    }

    fn emit_cold(&mut self) {
        let mut index = 0;
        // A cold piece may add further ones.
        while index < self.cold.len() {
            let cold = std::mem::replace(
                &mut self.cold[index],
                Cold::LookupMiss { label: Label::default(), mode: Mode(0), first: None },
            );
            index += 1;
            match cold {
                Cold::Leave { label, site, flags } => {
                    self.c.asm.bind(label);
                    self.leave_with(site, flags);
                }
                Cold::Probe { label, site, tag } => {
                    self.c.asm.bind(label);
                    self.c.asm.alu_load(Alu::Xor, T0, Mem::indexed(super::asm::BASE, T1, 0, tag));
                    let Site::Probe { retry, write, .. } = site else { continue };
                    let refill = self.c.stubs.refill(self.c.mode.bank(), write, self.c.mode.is_simd());
                    self.c.asm.call_address(refill);
                    self.site(site);
                    self.c.asm.jmp_address(self.c.base + u64::from(retry));
                }
                Cold::LookupMiss { label, mode, first } => {
                    self.c.asm.bind(label);
                    self.second_way(mode, first);
                    if mode.is_user() {
                        self.c.asm.alu_load(Alu::Xor, T0, Mem::vcpu(frame::USER_GENERATION));
                    }
                    let stub = self.c.stubs.leave(false, mode.is_simd());
                    self.c.asm.call_address(stub);
                    self.site(Site::Lookup);
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

    /// Checks `size` bytes at the address in T0 and leaves the page's host address in T1 and the offset in T0.
    pub(super) fn probe(&mut self, insn: &Insn, retry: u64, size: u16, write: bool, grouped: bool) {
        let bank = frame::tlb(self.c.mode.bank());
        let tag = bank + if write { frame::TLB_WRITE } else { frame::TLB_READ };
        let label = self.c.asm.label();
        let asm = &mut *self.c.asm;
        asm.mov(T1, T0);
        // An entry has 32 bytes.
        asm.shr(T1, 7);
        asm.alu_imm32(Alu::And, T1, ((ENTRIES - 1) << 5) as i32);
        asm.alu_load(Alu::Xor, T0, Mem::indexed(super::asm::BASE, T1, 0, tag));
        asm.alu_imm(Alu::Cmp, T0, 4096 - i32::from(size));
        asm.jcc(cc::A, label);
        asm.load(T1, Mem::indexed(super::asm::BASE, T1, 0, bank + frame::TLB_PAGE));
        self.in_t1 = None;
        let (block, guest) = (self.c.block, self.guest(insn.iced.ip()));
        let retry = (retry - self.c.base) as u32;
        let site = Site::Probe { block, retry, guest, size, write, grouped };
        self.cold.push(Cold::Probe { label, site, tag });
    }

    /// Loads a guest register's home, or the register from the VCPU into `scratch`.
    pub(super) fn register(&mut self, guest: u8, scratch: Reg) -> Reg {
        match home(guest) {
            Some(host) => host,
            None => {
                self.c.asm.load(scratch, Mem::vcpu(frame::gpr(guest.into())));
                if scratch == T1 {
                    self.in_t1 = None;
                }
                scratch
            }
        }
    }

    /// The effective address of a memory operand in host registers, without segment base. `Err` is a constant.
    fn address(&mut self, insn: &Insn) -> Result<Mem, u64> {
        let iced = &insn.iced;
        let disp = iced.memory_displacement64();
        let (base, index) = (iced.memory_base(), iced.memory_index());
        if base == Register::RIP || (base == Register::None && index == Register::None) {
            return Err(disp);
        }
        let disp = disp as i32;
        let base = (base != Register::None).then(|| base.number() as u8);
        let index = (index != Register::None).then(|| index.number() as u8);
        let scale = iced.memory_index_scale().trailing_zeros() as u8;
        Ok(match (base, index) {
            (Some(base), None) => Mem::base(self.register(base, T0), disp),
            (Some(base), Some(index)) => {
                let base = self.register(base, T0);
                Mem::indexed(base, self.register(index, T1), scale, disp)
            }
            (None, Some(index)) => {
                let index = self.register(index, T1);
                // There is no form without a base that takes a scaled index and stays short: use a zero base.
                self.c.asm.mov_imm(T0, 0);
                Mem::indexed(T0, index, scale, disp)
            }
            (None, None) => unreachable!("a constant address"),
        })
    }

    /// Computes the linear address of the memory operand into T0. Clobbers T1 but no flags.
    pub(super) fn linear_address(&mut self, insn: &Insn) {
        match self.address(insn) {
            Ok(mem) => self.c.asm.lea(T0, mem),
            Err(constant) => self.c.asm.mov_imm(T0, constant),
        }
        if has_segment_base(&insn.iced) {
            let segment = if insn.iced.memory_segment() == Register::FS { x86::seg::FS } else { x86::seg::GS };
            self.c.asm.load(T1, Mem::vcpu(frame::segment_base(segment)));
            self.c.asm.lea(T0, Mem::indexed(T0, T1, 0, 0));
            self.in_t1 = None;
        }
    }

    /// Makes the memory operand accessible. On return it is at the given host address, which uses T1 and perhaps T0.
    fn operand(&mut self, index: usize, insn: &Insn) -> Option<Mem> {
        let access = insn.operand?;
        if let Some((member, group)) = self.groups.member(index, 0) {
            return Some(self.member(insn, member, group, access.simple?.0));
        }
        self.before_clobber(insn.live_in());
        let retry = self.c.asm.address();
        self.linear_address(insn);
        self.probe(insn, retry, access.size, access.write, false);
        Some(Mem::indexed(T0, T1, 0, 0))
    }

    /// Accesses a member of a group: through its pointer, which the first member makes.
    fn member(&mut self, insn: &Insn, member: Member, group: Group, base: u8) -> Mem {
        let slot = frame::group(group.slot.unwrap_or(0));
        if !self.ready[member.group] {
            self.before_clobber(insn.live_in());
            let retry = self.c.asm.address();
            let host = self.register(base, T0);
            self.c.asm.lea(T0, Mem::base(host, (group.low - member.base_offset) as i32));
            self.probe(insn, retry, (group.high - group.low) as u16, group.write_span(), true);
            // T1 + T0 is the host address of the group's first byte.
            self.c.asm.lea(T1, Mem::indexed(T1, T0, 0, -group.low as i32));
            self.c.asm.store(Mem::vcpu(slot), T1);
            self.ready[member.group] = true;
            self.in_t1 = Some(member.group);
        }
        if self.in_t1 != Some(member.group) {
            self.c.asm.load(T1, Mem::vcpu(slot));
            self.in_t1 = Some(member.group);
        }
        Mem::base(T1, member.at as i32)
    }

    /// Makes the stack access of an instruction accessible. May clobber T0.
    pub(super) fn stack(&mut self, index: usize, insn: &Insn) -> Option<Mem> {
        let access = insn.stack?;
        let (base, disp) = access.simple?;
        if let Some((member, group)) = self.groups.member(index, 1) {
            return Some(self.member(insn, member, group, base));
        }
        self.before_clobber(insn.live_in());
        let retry = self.c.asm.address();
        let host = self.register(base, T0);
        self.c.asm.lea(T0, Mem::base(host, disp));
        self.probe(insn, retry, access.size, access.write, false);
        Some(Mem::indexed(T0, T1, 0, 0))
    }

    fn instruction(&mut self, index: usize, insn: &Insn) {
        let done = match insn.kind {
            Kind::Nop | Kind::Interpret => Some(()),
            Kind::Plain => self.plain(index, insn),
            Kind::Repeat(string) => self.repeat(insn, string),
            Kind::BitInMemory(log) => self.bit_in_memory(insn, log),
            Kind::Lea => self.effective_address(insn),
            Kind::PushReg(register) => self.push_register(index, insn, register),
            Kind::PushImm(value) => self.push_immediate(index, insn, value),
            Kind::PushMem => self.push_memory(index, insn),
            Kind::PopReg(register) => self.pop_register(index, insn, register),
            Kind::Leave => self.leave_frame(index, insn),
            Kind::CallNear(target) => self.call(index, insn, target),
            Kind::CallIndirect => self.call_indirect(index, insn),
            Kind::Jump(target) => {
                if target <= self.c.rip {
                    self.poll();
                }
                self.jump_to(target);
                Some(())
            }
            Kind::JumpIndirect => self.jump_indirect(index, insn),
            Kind::JumpIf(condition, target) => {
                self.jump_if(insn, condition, target);
                Some(())
            }
            Kind::Return(extra) => self.ret(index, insn, extra),
            Kind::System(system) => self.system(index, insn, system),
        };
        self.unsupported = done.is_none();
    }

    fn effective_address(&mut self, insn: &Insn) -> Option<()> {
        let to = insn.iced.op0_register().number() as u8;
        let wide = insn.iced.op0_register().is_gpr64();
        let target = home(to).unwrap_or(T0);
        match self.address(insn) {
            Ok(mem) => {
                self.c.asm.op_mem_raw(wide, &[0x8d], target.0, mem);
            }
            Err(constant) => self.c.asm.mov_imm(target, if wide { constant } else { constant & 0xffff_ffff }),
        }
        self.store_home(to, target);
        Some(())
    }

    pub(super) fn store_home(&mut self, guest: u8, host: Reg) {
        if home(guest).is_none() {
            self.c.asm.store(Mem::vcpu(frame::gpr(guest.into())), host);
        }
    }

    /// Moves guest RSP by a constant, without flags.
    pub(super) fn move_stack(&mut self, by: i32) {
        let stack = home(4).unwrap_or(T0);
        self.c.asm.lea(stack, Mem::base(stack, by));
    }

    fn push_register(&mut self, index: usize, insn: &Insn, register: u8) -> Option<()> {
        let mem = self.stack(index, insn)?;
        let from = match home(register) {
            Some(host) => host,
            None => {
                let mem_needs_t0 = mem.base == T0;
                if mem_needs_t0 {
                    // Both scratch registers hold the address: fold it into one.
                    self.c.asm.lea(T1, Mem::indexed(T0, T1, 0, 0));
                    self.in_t1 = None;
                }
                self.c.asm.load(T0, Mem::vcpu(frame::gpr(register.into())));
                let mem = if mem_needs_t0 { Mem::base(T1, 0) } else { mem };
                self.c.asm.store(mem, T0);
                self.move_stack(-8);
                return Some(());
            }
        };
        self.c.asm.store(mem, from);
        self.move_stack(-8);
        Some(())
    }

    fn push_immediate(&mut self, index: usize, insn: &Insn, value: i32) -> Option<()> {
        let mem = self.stack(index, insn)?;
        self.c.asm.store_imm(mem, value);
        self.move_stack(-8);
        Some(())
    }

    fn push_memory(&mut self, index: usize, insn: &Insn) -> Option<()> {
        let mem = self.operand(index, insn)?;
        self.c.asm.load(T0, mem);
        self.push_t0(index, insn)?;
        Some(())
    }

    /// Pushes T0, which survives in `Hot::spill`.
    pub(super) fn push_t0(&mut self, index: usize, insn: &Insn) -> Option<()> {
        self.c.asm.store(Mem::vcpu(frame::SPILL), T0);
        let mem = self.stack(index, insn)?;
        let mem = self.fold(mem);
        self.c.asm.load(T0, Mem::vcpu(frame::SPILL));
        self.c.asm.store(mem, T0);
        self.move_stack(-8);
        Some(())
    }

    /// Frees T0 when an address uses it.
    fn fold(&mut self, mem: Mem) -> Mem {
        if mem.base == T0 {
            self.c.asm.lea(T1, Mem::indexed(T0, T1, 0, 0));
            self.in_t1 = None;
            return Mem::base(T1, 0);
        }
        mem
    }

    fn pop_register(&mut self, index: usize, insn: &Insn, register: u8) -> Option<()> {
        let mem = self.stack(index, insn)?;
        let to = home(register).unwrap_or(T0);
        self.c.asm.load(to, mem);
        self.store_home(register, to);
        if register != 4 {
            self.move_stack(8);
        }
        Some(())
    }

    /// LEAVE: RSP = RBP, then pop RBP.
    fn leave_frame(&mut self, index: usize, insn: &Insn) -> Option<()> {
        let mem = self.stack(index, insn)?;
        let (stack, frame) = (home(4)?, home(5)?);
        self.c.asm.lea(stack, Mem::base(frame, 8));
        self.c.asm.load(frame, mem);
        Some(())
    }

    fn call(&mut self, index: usize, insn: &Insn, target: u64) -> Option<()> {
        if target <= self.c.rip {
            self.poll();
        }
        let mem = self.stack(index, insn)?;
        self.push_constant(mem, insn.iced.next_ip());
        self.jump_to(target);
        Some(())
    }

    fn push_constant(&mut self, mem: Mem, value: u64) {
        match i32::try_from(value as i64) {
            Ok(small) => self.c.asm.store_imm(mem, small),
            Err(_) => {
                let mem = self.fold(mem);
                self.c.asm.mov_imm(T0, value);
                self.c.asm.store(mem, T0);
            }
        }
        self.move_stack(-8);
    }

    /// Loads the target of an indirect call or jump into T0.
    fn indirect_target(&mut self, index: usize, insn: &Insn) -> Option<()> {
        if insn.iced.op0_kind() == OpKind::Register {
            let from = self.register(insn.iced.op0_register().number() as u8, T0);
            if from != T0 {
                self.c.asm.mov(T0, from);
            }
        } else {
            let mem = self.operand(index, insn)?;
            self.c.asm.load(T0, mem);
        }
        Some(())
    }

    pub(super) fn slot_flags(&mut self) {
        if self.flags == Flags::Host {
            self.save_flags();
        }
    }

    fn call_indirect(&mut self, index: usize, insn: &Insn) -> Option<()> {
        self.poll();
        self.slot_flags();
        self.indirect_target(index, insn)?;
        self.c.asm.store(Mem::vcpu(frame::SPILL), T0);
        let mem = self.stack(index, insn)?;
        self.push_constant(mem, insn.iced.next_ip());
        self.c.asm.load(T0, Mem::vcpu(frame::SPILL));
        self.lookup();
        Some(())
    }

    fn jump_indirect(&mut self, index: usize, insn: &Insn) -> Option<()> {
        self.poll();
        self.slot_flags();
        self.indirect_target(index, insn)?;
        self.lookup();
        Some(())
    }

    fn ret(&mut self, index: usize, insn: &Insn, extra: u16) -> Option<()> {
        self.poll();
        self.slot_flags();
        let mem = self.stack(index, insn)?;
        self.c.asm.load(T0, mem);
        self.move_stack(8 + i32::from(extra));
        self.lookup();
        Some(())
    }

    fn jump_if(&mut self, insn: &Insn, condition: u8, target: u64) {
        if target <= self.c.rip {
            self.poll();
        }
        let mut jump = condition;
        if self.flags == Flags::Slot {
            // A condition on one flag is a test of its bit in memory.
            let bit = match condition >> 1 {
                0 => Some((1, 8)),
                1 => Some((0, 1)),
                2 => Some((0, 0x40)),
                4 => Some((0, 0x80)),
                5 => Some((0, 4)),
                _ => None,
            };
            match bit {
                Some((byte, mask)) => {
                    self.c.asm.test_byte_mem(Mem::vcpu(frame::FLAGS + byte), mask);
                    jump = if condition & 1 == 0 { cc::NZ } else { cc::Z };
                }
                None => self.restore_flags(),
            }
        }
        let label = self.c.asm.label();
        self.c.asm.jcc(jump, label);
        if self.is_linkable(target) {
            self.link(label, target);
        } else {
            self.cold.push(Cold::Lookup { label, target, flags: self.flags });
        }
        self.jump_to(insn.iced.next_ip());
    }

    /// Emits an instruction with the fields as they are, the flags being where it needs them.
    fn copy(&mut self, insn: &Insn, fields: &Fields, mem: Option<Mem>) {
        let keeps_some = insn.flags_changed & !insn.flags_killed != 0
            || (insn.flags_changed != 0 && insn.live_out & !insn.flags_changed != 0);
        if self.flags == Flags::Slot && (insn.flags_read != 0 || keeps_some) {
            self.restore_flags();
        }
        if can_fault(insn) {
            self.may_fault();
        }
        fields.emit(self.c.asm, mem);
        if insn.flags_changed != 0 {
            self.flags = Flags::Host;
        }
    }

    /// Copies an instruction with its registers and memory operand replaced.
    fn plain(&mut self, index: usize, insn: &Insn) -> Option<()> {
        let mut fields = insn.fields?;
        let slots = slots(insn.iced.code());
        let uses_high_byte = (0..insn.iced.op_count()).any(|operand| {
            insn.iced.op_kind(operand) == OpKind::Register
                && matches!(insn.iced.op_register(operand), Register::AH | Register::CH | Register::DH | Register::BH)
        });
        let homeless = homeless(&fields, slots, insn.operand.is_none());
        if uses_high_byte {
            // AH..BH cannot be named together with REX, which R8..R15 need; their numbers are those of RSP..RDI.
            let names_stack = (0..insn.iced.op_count()).any(|operand| {
                insn.iced.op_kind(operand) == OpKind::Register
                    && insn.iced.op_register(operand).full_register() == Register::RSP
            });
            if insn.operand.is_some() || names_stack {
                return None;
            }
            self.copy(insn, &fields, None);
            return Some(());
        }
        let mut mem = self.operand(index, insn);
        if insn.operand.is_some() && mem.is_none() {
            return None;
        }
        let mut scratch = [T0, T1].into_iter();
        if let Some(address) = mem {
            if homeless.iter().flatten().count() > 1 {
                return None;
            }
            if homeless[0].is_some() {
                mem = Some(self.fold(address));
            }
            scratch = [T0, T0].into_iter();
        } else if homeless.iter().flatten().count() > 2 {
            return None;
        }
        let writes_only = overwrites_first_operand(insn);
        let mut moved: [Option<(u8, Reg)>; 3] = [None; 3];
        for (place, guest) in homeless.iter().flatten().enumerate() {
            let host = scratch.next()?;
            if host == T1 {
                self.in_t1 = None;
            }
            if !(writes_only && place == 0 && first_operand_is(insn, *guest) && !reads_elsewhere(insn, *guest)) {
                self.c.asm.load(host, Mem::vcpu(frame::gpr((*guest).into())));
            }
            moved[place] = Some((*guest, host));
        }
        substitute(&mut fields, slots, insn.operand.is_none(), &moved);
        self.copy(insn, &fields, mem);
        for (guest, host) in moved.iter().flatten() {
            if insn.writes & 1 << guest != 0 {
                self.store_home(*guest, *host);
            }
        }
        Some(())
    }
}

/// The place of a RIP in a jump cache.
#[must_use]
pub fn jump_index(rip: u64) -> usize {
    ((rip as u32).wrapping_mul(frame::JUMP_MULTIPLIER) >> 20) as usize & (frame::JUMP_ENTRIES - 1)
}

/// The register numbers in the fields of an instruction that hold general registers.
fn named(fields: &Fields, slots: u8, rm_is_register: bool) -> impl Iterator<Item = u8> {
    [
        (slots & slot::REG != 0).then_some(fields.reg),
        (slots & slot::RM != 0 && rm_is_register).then_some(fields.rm),
        (slots & slot::OPCODE != 0).then_some(fields.embedded),
        (slots & slot::VVVV != 0).then_some(fields.vvvv),
    ]
    .into_iter()
    .flatten()
}

/// The distinct guest registers of an instruction that live in the VCPU.
fn homeless(fields: &Fields, slots: u8, rm_is_register: bool) -> [Option<u8>; 3] {
    let mut found = [None; 3];
    for guest in named(fields, slots, rm_is_register) {
        if home(guest).is_none()
            && !found.contains(&Some(guest))
            && let Some(place) = found.iter_mut().find(|place| place.is_none())
        {
            *place = Some(guest);
        }
    }
    found
}

fn substitute(fields: &mut Fields, slots: u8, rm_is_register: bool, moved: &[Option<(u8, Reg)>; 3]) {
    let host = |guest: u8| match home(guest) {
        Some(host) => host.0,
        None => moved.iter().flatten().find(|(number, _)| *number == guest).map_or(guest, |(_, host)| host.0),
    };
    if slots & slot::REG != 0 {
        fields.reg = host(fields.reg);
    }
    if slots & slot::RM != 0 && rm_is_register {
        fields.rm = host(fields.rm);
    }
    if slots & slot::OPCODE != 0 {
        fields.embedded = host(fields.embedded);
    }
    if slots & slot::VVVV != 0 {
        fields.vvvv = host(fields.vvvv);
    }
}

/// Whether the host may refuse the copied instruction: a division, an unaligned operand, a SIMD exception.
fn can_fault(insn: &Insn) -> bool {
    use iced_x86::Mnemonic as M;
    insn.is_simd || matches!(insn.iced.mnemonic(), M::Div | M::Idiv | M::Cmpxchg16b)
}

/// Whether the first operand is overwritten whole without being read: its old value need not be loaded.
fn overwrites_first_operand(insn: &Insn) -> bool {
    use iced_x86::Mnemonic as M;
    let register = insn.iced.op0_register();
    matches!(insn.iced.mnemonic(), M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Movd | M::Movq)
        && insn.iced.op0_kind() == OpKind::Register
        && (register.is_gpr64() || register.is_gpr32())
}

fn first_operand_is(insn: &Insn, guest: u8) -> bool {
    insn.iced.op0_register().number() == usize::from(guest)
}

fn reads_elsewhere(insn: &Insn, guest: u8) -> bool {
    (1..insn.iced.op_count()).any(|operand| {
        insn.iced.op_kind(operand) == OpKind::Register && {
            let register = insn.iced.op_register(operand);
            register.is_gpr() && register.full_register().number() == usize::from(guest)
        }
    })
}
