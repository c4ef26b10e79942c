//! Memory operands: guest registers to host registers, effective addresses, and the probe of the soft TLB.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use memory::tlb::ENTRIES;

use super::asm::{Alu, BASE, Mem, Reg, T0, T1, cc};
use super::block::{Insn, Kind, has_segment_base};
use super::enter::home;
use super::exits::{After, Cold};
use super::frame;
use super::groups::{Group, Member};
use super::lower::{Check, Lowering, Site};

/// Whether all registers of a SIMD instruction are XMM or YMM registers.
fn is_vector(iced: &Instruction) -> bool {
    (0..iced.op_count())
        .filter(|operand| iced.op_kind(*operand) == OpKind::Register)
        .all(|operand| iced.op_register(operand).is_vector_register())
        && iced.op_count() > 1
}

impl Lowering<'_> {
    /// Checks `size` bytes at the address in T0 and leaves the page's host address in T1 and the offset in T0.
    pub(super) fn probe(&mut self, insn: &Insn, retry: u64, size: u16, write: bool, check: Check, after: After) {
        let bank = frame::tlb(self.c.mode.bank());
        let tag = bank + if write { frame::TLB_WRITE } else { frame::TLB_READ };
        let label = self.c.asm.label();
        let asm = &mut *self.c.asm;
        asm.mov(T1, T0);
        // An entry has 32 bytes.
        asm.shr(T1, 7);
        asm.alu_imm32(Alu::And, T1, ((ENTRIES - 1) << 5) as i32);
        asm.alu_load(Alu::Xor, T0, Mem::indexed(BASE, T1, 0, tag));
        asm.alu_imm(Alu::Cmp, T0, 4096 - i32::from(size));
        asm.jcc(cc::A, label);
        asm.load(T1, Mem::indexed(BASE, T1, 0, bank + frame::TLB_PAGE));
        self.in_t1 = None;
        let (block, guest) = (self.c.block, self.guest(insn.iced.ip()));
        let retry = (retry - self.c.base) as u32;
        let site = Site::Probe { block, retry, guest, size, write, check, crossing: after.crossing() };
        self.cold.push(Cold::Probe { label, site, tag, after });
        if let After::Load { hit } = after {
            self.c.asm.bind(hit);
        }
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
    pub(super) fn address(&mut self, insn: &Insn) -> Result<Mem, u64> {
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
    pub(super) fn operand(&mut self, index: usize, insn: &Insn) -> Option<Mem> {
        let access = insn.operand?;
        if let Some((member, group)) = self.groups.member(index, 0) {
            return Some(self.member(insn, member, group, access.simple?.0));
        }
        self.before_clobber(insn.live_in());
        let retry = self.c.asm.address();
        self.linear_address(insn);
        // An x87 or MMX instruction reports a pending exception before it touches memory.
        let check = if insn.is_simd && !is_vector(&insn.iced) { Check::Part } else { Check::Exact };
        let after = if !access.write {
            After::Load { hit: self.c.asm.label() }
        } else if stores_by_parts(insn) {
            let done = self.c.asm.label();
            self.stored = Some(done);
            After::Store { index, flags: self.flags, size: access.size, done }
        } else {
            After::Leave
        };
        self.probe(insn, retry, access.size, access.write, check, after);
        Some(Mem::indexed(T0, T1, 0, 0))
    }

    /// Accesses a member of a group: through its pointer, which the first member makes.
    pub(super) fn member(&mut self, insn: &Insn, member: Member, group: Group, base: u8) -> Mem {
        let slot = frame::group(group.slot.unwrap_or(0));
        if !self.ready[member.group] {
            self.before_clobber(insn.live_in());
            let retry = self.c.asm.address();
            let host = self.register(base, T0);
            self.c.asm.lea(T0, Mem::base(host, (group.low - member.base_offset) as i32));
            let (size, after) = ((group.high - group.low) as u16, After::Apart { guest: self.current });
            self.probe(insn, retry, size, group.write, Check::Part, after);
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
        self.probe(insn, retry, access.size, access.write, Check::Exact, After::Leave);
        Some(Mem::indexed(T0, T1, 0, 0))
    }
}

/// Whether a store may go to its two pages one after the other: not when it is locked, as XCHG always is.
fn stores_by_parts(insn: &Insn) -> bool {
    insn.kind == Kind::Plain && !insn.iced.has_lock_prefix() && insn.iced.mnemonic() != Mnemonic::Xchg
}
