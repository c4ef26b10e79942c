//! From a decoded guest block to host code.
//!
//! Guest flags are in the host's RFLAGS or in `Hot::flags`; which of the two is known at every point of the code. A block
//! has an entry for either. Whatever fails (a TLB miss, a fault of the host) leaves with the guest's state as it was
//! before the instruction, so that the interpreter can run it.

use iced_x86::RflagsBits;
use memory::tlb::Bank;
use x86::cr0;

use super::asm::{Asm, Label, Mem, RAX, T0, cc};
use super::block::{Insn, Kind, Source};
use super::enter::{Stubs, home};
use super::exits::Cold;
use super::frame;
use super::groups::Groups;
use super::liveness::ALL_FLAGS;
use super::refill::Crossing;
use super::short::Short;
use super::sites::Sites;

/// What translated code depends on besides its bytes and addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mode(pub u8);

impl Mode {
    pub const USER: u8 = 1;
    /// RFLAGS.AC lifts SMAP.
    pub const AC: u8 = 2;
    /// SIMD state is in host registers.
    pub const SIMD: u8 = 4;
    /// Every access is checked by itself. Only blocks that others lead to directly are of this mode, where a check of
    /// several at once found a page's end between them.
    pub const APART: u8 = 8;

    #[must_use]
    pub const fn is_user(self) -> bool {
        self.0 & Self::USER != 0
    }

    #[must_use]
    pub fn is_simd(self) -> bool {
        self.0 & Self::SIMD != 0
    }

    #[must_use]
    pub fn is_apart(self) -> bool {
        self.0 & Self::APART != 0
    }

    /// The mode of the code that runs, however its accesses are checked.
    #[must_use]
    pub fn of_code(self) -> Mode {
        Mode(self.0 & !Self::APART)
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

/// What a failed probe says of its instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Check {
    /// The instruction makes exactly this access, and does nothing before it that could fault: a fault of the access is that
    /// of the instruction, unless the operand has to be aligned and is not.
    Exact,
    /// Several accesses were checked at once, or only running the instruction shows what it does first.
    Part,
}

/// Why translated code left. The word behind the leaving call is an index into the list of sites, of which there is one
/// for every access to memory: so they are small. RIPs are relative to the block's, addresses to the code cache's start.
#[derive(Clone, Copy, Debug)]
pub enum Site {
    /// A TLB probe failed; the address is in the first scratch register.
    Probe { block: u32, retry: u32, guest: u16, size: u16, write: bool, check: Check, crossing: Crossing },
    /// As `Link`, to the code that checks the accesses from this instruction on one by one.
    Apart { block: u32, at: u32, guest: u16 },
    /// The interpreter shall run the instruction.
    Interpret { block: u32, guest: u16 },
    /// The same, and code goes on behind the site if the guest goes on behind the instruction, of `size` bytes.
    Callout { block: u32, guest: u16, size: u8 },
    /// The same for an instruction that is known.
    Short { block: u32, guest: u16, size: u8, short: Short },
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

impl Site {
    /// Where the displacement of the jump is, from the code cache's start, for a site whose jump may be made to lead to a
    /// block directly. Such jumps are undone when the block goes.
    pub fn displacement(self) -> Option<u32> {
        match self {
            Site::Link { at, .. } | Site::Apart { at, .. } => Some(at),
            Site::Probe { .. }
            | Site::Interpret { .. }
            | Site::Callout { .. }
            | Site::Short { .. }
            | Site::Lookup
            | Site::Window { .. }
            | Site::Simd { .. } => None,
        }
    }

    /// Bytes of a packed site.
    pub const PACKED: usize = 16;

    /// The site as bytes, whatever its block's number is and wherever the code begins (`start`, from the code cache's start).
    pub fn pack(self, start: u32) -> [u8; Site::PACKED] {
        let (tag, flags, guest, size, words) = match self {
            Site::Probe { retry, guest, size, write, check, crossing, .. } => {
                let flags = u8::from(write) | (check as u8) << 1 | (crossing as u8) << 2;
                (0, flags, guest, size, [retry.wrapping_sub(start), 0])
            }
            Site::Interpret { guest, .. } => (1, 0, guest, 0, [0, 0]),
            Site::Link { at, target, flags_in_host, .. } => {
                (2, u8::from(flags_in_host), 0, 0, [at.wrapping_sub(start), target as u32])
            }
            Site::Lookup => (3, 0, 0, 0, [0, 0]),
            Site::Window { guest, .. } => (4, 0, guest, 0, [0, 0]),
            Site::Simd { guest, .. } => (5, 0, guest, 0, [0, 0]),
            Site::Callout { guest, size, .. } => (6, 0, guest, size.into(), [0, 0]),
            Site::Apart { at, guest, .. } => (7, 0, guest, 0, [at.wrapping_sub(start), 0]),
            Site::Short { guest, size, short, .. } => (8, 0, guest, size.into(), [0, short.pack()]),
        };
        let mut bytes = [0; Site::PACKED];
        (bytes[0], bytes[1]) = (tag, flags);
        bytes[2..4].copy_from_slice(&guest.to_le_bytes());
        bytes[4..6].copy_from_slice(&size.to_le_bytes());
        bytes[8..12].copy_from_slice(&words[0].to_le_bytes());
        bytes[12..16].copy_from_slice(&words[1].to_le_bytes());
        bytes
    }

    /// The site of a block with another number, whose code begins elsewhere.
    pub fn unpack(bytes: [u8; Site::PACKED], block: u32, start: u32) -> Option<Site> {
        let [tag, flags, g0, g1, s0, s1, _, _, a0, a1, a2, a3, b0, b1, b2, b3] = bytes;
        let (guest, size) = (u16::from_le_bytes([g0, g1]), u16::from_le_bytes([s0, s1]));
        let (at, other) = (u32::from_le_bytes([a0, a1, a2, a3]), u32::from_le_bytes([b0, b1, b2, b3]));
        let at = start.wrapping_add(at);
        Some(match tag {
            0 => {
                let check = if flags & 2 == 0 { Check::Exact } else { Check::Part };
                let crossing = Crossing::ALL.into_iter().find(|crossing| *crossing as u8 == flags >> 2)?;
                Site::Probe { block, retry: at, guest, size, write: flags & 1 != 0, check, crossing }
            }
            1 => Site::Interpret { block, guest },
            2 => Site::Link { block, at, target: other as i32, flags_in_host: flags & 1 != 0 },
            3 => Site::Lookup,
            4 => Site::Window { block, guest },
            5 => Site::Simd { block, guest },
            6 => Site::Callout { block, guest, size: u8::try_from(size).ok()? },
            7 => Site::Apart { block, at, guest },
            8 => Site::Short { block, guest, size: u8::try_from(size).ok()?, short: Short::unpack(other)? },
            _ => return None,
        })
    }
}

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
}

/// Lists that are kept from block to block, so that none is allocated for each.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The last block's host code mapped back to guest instructions.
    pub map: Vec<MapEntry>,
    /// Where in its code the numbers of its sites are, in the sites' order.
    pub site_uses: Vec<u32>,
    ready: Vec<bool>,
    cold: Vec<Cold>,
}

pub struct Context<'a> {
    pub asm: &'a mut Asm,
    pub stubs: &'a Stubs,
    pub sites: &'a mut Sites,
    /// The start of the code cache, which is the poll page.
    pub base: u64,
    pub mode: Mode,
    pub block: u32,
    /// First guest address of the block, and whether jumps inside its page may be linked.
    pub rip: u64,
    pub may_link: bool,
    /// Whether instructions and accesses are counted.
    pub count: bool,
}

pub(super) struct Lowering<'a> {
    pub(super) c: Context<'a>,
    pub(super) insns: &'a [Insn],
    pub(super) groups: &'a Groups,
    pub(super) ready: &'a mut Vec<bool>,
    pub(super) flags: Flags,
    /// The group whose pointer is in T1.
    pub(super) in_t1: Option<usize>,
    /// Where code goes on after the instruction at work, when it is a store of which there is a second form.
    pub(super) stored: Option<Label>,
    pub(super) cold: &'a mut Vec<Cold>,
    pub(super) map: &'a mut Vec<MapEntry>,
    pub(super) site_uses: &'a mut Vec<u32>,
    /// The instruction at work, relative to the block.
    pub(super) current: u16,
    pub(super) unsupported: bool,
}

/// Emits the code of a block. What maps it back is then in `scratch`.
pub fn lower<'a>(context: Context<'a>, source: &'a Source, groups: &'a Groups, scratch: &'a mut Scratch) -> Lowered {
    let Scratch { map, site_uses, ready, cold } = scratch;
    map.clear();
    site_uses.clear();
    cold.clear();
    ready.clear();
    ready.resize(groups.groups.len(), false);
    let mut l = Lowering {
        c: context,
        insns: &source.insns,
        groups,
        ready,
        flags: Flags::Slot,
        in_t1: None,
        stored: None,
        cold,
        map,
        site_uses,
        current: 0,
        unsupported: false,
    };
    let (entry_host, entry_slot) = l.entries(&source.insns);
    l.count(&source.insns);
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
            l.take_simd(insn);
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
        if insn.kind.side_exit().is_some() {
            l.count(&source.insns[index + 1..]);
        }
    }
    if !ended {
        l.jump_to(l.c.rip + source.size as u64);
    }
    l.emit_cold();
    l.c.asm.finish();
    Lowered { entry_host, entry_slot }
}

impl Lowering<'_> {
    /// Emits the two entries and chooses where flags are at the start, so that neither saves nor restores for nothing.
    pub(super) fn entries(&mut self, insns: &[Insn]) -> (u32, u32) {
        let live = insns.first().map_or(ALL_FLAGS, Insn::live_in);
        if live == 0 {
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
            self.need_flags(live);
            self.flags = Flags::Host;
            (self.c.asm.position() as u32, slot)
        }
    }

    /// Whether the block needs scratch flags before it reads any.
    pub(super) fn wants_flags_in_slot(&self, insns: &[Insn]) -> bool {
        for insn in insns {
            if matches!(insn.kind, Kind::Interpret | Kind::Callout) {
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
        // rol ax, 8; and al, 8; add al, 0x78; sahf
        asm.bytes(&[0x66, 0xc1, 0xc0, 0x08, 0x24, 0x08, 0x04, 0x78, 0x9e]);
        asm.load(RAX, Mem::vcpu(frame::SPILL));
        self.flags = Flags::Host;
    }

    /// Before an instruction that wants these flags in RFLAGS. When only CF is wanted, which INC, DEC, ADC and their kin take
    /// from far away, the others may be anything there; in their slot they stay.
    pub(super) fn need_flags(&mut self, wanted: u32) {
        if self.flags == Flags::Host || wanted == 0 {
            return;
        }
        if wanted & !RflagsBits::CF == 0 {
            self.c.asm.bit_test_mem32(Mem::vcpu(frame::FLAGS), 0);
        } else {
            self.restore_flags();
        }
    }

    /// Before code that clobbers RFLAGS: saves them when `live` of them are still wanted.
    pub(super) fn before_clobber(&mut self, live: u32) {
        if self.flags == Flags::Host && live != 0 {
            self.save_flags();
        }
    }

    /// Goes on at an instruction that needs SIMD state in registers, with code that has it there. User code does so by itself:
    /// SYSCALL put the state away, and many programs use it between any two system calls.
    fn take_simd(&mut self, insn: &Insn) {
        let (block, guest) = (self.c.block, self.guest(insn.iced.ip()));
        let site = Site::Simd { block, guest };
        if !self.c.mode.is_user() {
            return self.leave(site);
        }
        self.slot_flags();
        self.c.asm.test_byte_mem(Mem::vcpu(frame::control(0)), (cr0::TS | cr0::EM) as u8);
        self.leave_if(cc::NZ, site, Flags::Slot);
        self.c.asm.call_address(self.c.stubs.load_simd());
        let mode = Mode(self.c.mode.0 | Mode::SIMD);
        self.c.asm.store_imm32(Mem::vcpu(frame::MODE), mode.0.into());
        self.lookup_in_mode(insn.iced.ip(), mode);
    }

    /// Where instructions are counted, adds those up to the next conditional jump to the counters, without flags.
    pub(super) fn count(&mut self, insns: &[Insn]) {
        if !self.c.count || insns.is_empty() {
            return;
        }
        let jump = insns.iter().position(|insn| insn.kind.side_exit().is_some());
        let insns = &insns[..jump.map_or(insns.len(), |jump| jump + 1)];
        let accesses =
            insns.iter().map(|insn| u32::from(insn.operand.is_some()) + u32::from(insn.stack.is_some())).sum();
        let asm = &mut *self.c.asm;
        for (counter, number) in [(frame::INSTRUCTIONS, insns.len() as u32), (frame::ACCESSES, accesses)] {
            asm.load(T0, Mem::vcpu(counter));
            asm.lea(T0, Mem::base(T0, number as i32));
            asm.store(Mem::vcpu(counter), T0);
        }
    }

    pub(super) fn instruction(&mut self, index: usize, insn: &Insn) {
        let done = match insn.kind {
            Kind::Nop | Kind::Interpret => Some(()),
            Kind::Callout => self.call_out(insn),
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
                self.jump_if(condition, target);
                Some(())
            }
            Kind::JumpIfCount(jump, target) => {
                self.jump_if_count(jump, target);
                Some(())
            }
            Kind::Return(extra) => self.ret(index, insn, extra),
            Kind::System(system) => self.system(index, insn, system),
        };
        self.unsupported = done.is_none();
    }

    pub(super) fn effective_address(&mut self, insn: &Insn) -> Option<()> {
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
}
