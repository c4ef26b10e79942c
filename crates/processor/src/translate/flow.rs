//! The stack and control flow: PUSH, POP, CALL, RET, jumps.

use iced_x86::OpKind;

use super::asm::{Label, Mem, Reg, T0, T1, cc};
use super::block::{CountJump, Insn};
use super::enter::home;
use super::exits::Cold;
use super::frame;
use super::lower::{Flags, Lowering};

/// Opcodes of the jumps that look at ZF, too.
const LOOPNE: u8 = 0xe0;
const LOOPE: u8 = 0xe1;

impl Lowering<'_> {
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

    pub(super) fn push_register(&mut self, index: usize, insn: &Insn, register: u8) -> Option<()> {
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

    pub(super) fn push_immediate(&mut self, index: usize, insn: &Insn, value: i32) -> Option<()> {
        let mem = self.stack(index, insn)?;
        self.c.asm.store_imm(mem, value);
        self.move_stack(-8);
        Some(())
    }

    pub(super) fn push_memory(&mut self, index: usize, insn: &Insn) -> Option<()> {
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
    pub(super) fn fold(&mut self, mem: Mem) -> Mem {
        if mem.base == T0 {
            self.c.asm.lea(T1, Mem::indexed(T0, T1, 0, 0));
            self.in_t1 = None;
            return Mem::base(T1, 0);
        }
        mem
    }

    pub(super) fn pop_register(&mut self, index: usize, insn: &Insn, register: u8) -> Option<()> {
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
    pub(super) fn leave_frame(&mut self, index: usize, insn: &Insn) -> Option<()> {
        let mem = self.stack(index, insn)?;
        let (stack, frame) = (home(4)?, home(5)?);
        self.c.asm.lea(stack, Mem::base(frame, 8));
        self.c.asm.load(frame, mem);
        Some(())
    }

    pub(super) fn call(&mut self, index: usize, insn: &Insn, target: u64) -> Option<()> {
        if target <= self.c.rip {
            self.poll();
        }
        let mem = self.stack(index, insn)?;
        let next = insn.iced.next_ip();
        self.push_constant(mem, next);
        // A call of what follows only wants to know where it is.
        if target != next {
            self.note_call(next, insn.live_out);
        }
        self.jump_to(target);
        Some(())
    }

    pub(super) fn push_constant(&mut self, mem: Mem, value: u64) {
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
    pub(super) fn indirect_target(&mut self, index: usize, insn: &Insn) -> Option<()> {
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

    pub(super) fn call_indirect(&mut self, index: usize, insn: &Insn) -> Option<()> {
        self.poll();
        self.slot_flags();
        self.indirect_target(index, insn)?;
        self.c.asm.store(Mem::vcpu(frame::SPILL), T0);
        let mem = self.stack(index, insn)?;
        self.push_constant(mem, insn.iced.next_ip());
        self.note_call(insn.iced.next_ip(), insn.live_out);
        self.c.asm.load(T0, Mem::vcpu(frame::SPILL));
        self.lookup();
        Some(())
    }

    pub(super) fn jump_indirect(&mut self, index: usize, insn: &Insn) -> Option<()> {
        self.poll();
        self.slot_flags();
        self.indirect_target(index, insn)?;
        self.lookup();
        Some(())
    }

    pub(super) fn ret(&mut self, index: usize, insn: &Insn, extra: u16) -> Option<()> {
        self.poll();
        self.slot_flags();
        let mem = self.stack(index, insn)?;
        self.c.asm.load(T0, mem);
        self.return_to_t0(extra);
        Some(())
    }

    /// The block goes on behind it.
    pub(super) fn jump_if(&mut self, condition: u8, target: u64) {
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
        self.side_exit(label, target);
    }

    /// The jump that was just emitted leads to `target`.
    fn side_exit(&mut self, label: Label, target: u64) {
        if self.is_linkable(target) {
            self.link(label, target);
        } else {
            self.cold.push(Cold::Lookup { label, target, flags: self.flags });
        }
    }

    /// JRCXZ, LOOP and their kin: the guest's RCX is the host's. The block goes on behind it.
    pub(super) fn jump_if_count(&mut self, jump: CountJump, target: u64) {
        if target <= self.c.rip {
            self.poll();
        }
        if matches!(jump.opcode, LOOPNE | LOOPE) && self.flags == Flags::Slot {
            self.restore_flags();
        }
        let label = self.c.asm.label();
        if jump.is_short {
            self.c.asm.byte(0x67);
        }
        // Over the next jump, which is over the one behind it.
        self.c.asm.bytes(&[jump.opcode, 2, 0xeb, 5]);
        self.c.asm.jmp(label);
        self.side_exit(label, target);
    }
}
