//! REP STOS and REP MOVS that stay inside a page on each side, run by the host's own; and bit instructions that address
//! memory by a bit offset. Everything else of the kind goes to the interpreter.

use x86::rflags;

use super::asm::{Alu, Mem, RCX, RDI, RSI, Reg, T0, T1, cc};
use super::block::{Insn, StringOp};
use super::exits::After;
use super::frame;
use super::lower::{Check, Flags, Lowering, Site};

impl Lowering<'_> {
    pub(super) fn repeat(&mut self, insn: &Insn, string: StringOp) -> Option<()> {
        let interpret = self.interpret(insn);
        self.before_clobber(insn.live_in());
        self.c.asm.test_byte_mem(Mem::vcpu(frame::RFLAGS + 1), (rflags::DF >> 8) as u8);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        self.c.asm.alu_imm(Alu::Cmp, RCX, 4096);
        self.leave_if(cc::A, interpret, Flags::Slot);
        let slot = |index: i32| Mem::vcpu(frame::STRING + 8 * index);
        let fields = insn.fields?;
        match string {
            StringOp::Store(log) => {
                self.string_operand(insn, RDI, log, true, interpret);
                let asm = &mut *self.c.asm;
                asm.store(slot(0), RDI);
                asm.mov(RDI, T0);
                fields.emit(asm, None);
            }
            StringOp::Move(log) => {
                self.string_operand(insn, RDI, log, true, interpret);
                self.c.asm.store(slot(1), T0);
                self.string_operand(insn, RSI, log, false, interpret);
                let asm = &mut *self.c.asm;
                asm.store(slot(0), RDI);
                asm.store(slot(2), RSI);
                asm.mov(RSI, T0);
                asm.load(RDI, slot(1));
                fields.emit(asm, None);
                asm.alu(Alu::Sub, RSI, T0);
                asm.alu_load(Alu::Add, RSI, slot(2));
                asm.load(T0, slot(1));
            }
        }
        // The guest's pointer has moved as far as the host's did.
        let asm = &mut *self.c.asm;
        asm.alu(Alu::Sub, RDI, T0);
        asm.alu_load(Alu::Add, RDI, slot(0));
        self.in_t1 = None;
        Some(())
    }

    /// Puts the host's address of what `pointer` points at into T0, after a check of RCX elements.
    fn string_operand(&mut self, insn: &Insn, pointer: Reg, log: u8, write: bool, interpret: Site) {
        let retry = self.c.asm.address();
        self.c.asm.mov(T0, pointer);
        self.probe(insn, retry, 1, write, Check::Part, After::Leave);
        let asm = &mut *self.c.asm;
        // T0 is the offset in the page, T1 the host's page.
        asm.lea(T1, Mem::indexed(T1, T0, 0, 0));
        asm.lea(T0, Mem::indexed(T0, RCX, log, 0));
        asm.alu_imm(Alu::Cmp, T0, 4096);
        self.leave_if(cc::A, interpret, Flags::Slot);
        self.c.asm.mov(T0, T1);
    }

    /// BT, BTS, BTR, BTC: the bit offset in a register may lead anywhere from the operand's address.
    pub(super) fn bit_in_memory(&mut self, insn: &Insn, log: u8) -> Option<()> {
        let access = insn.operand?;
        let mut fields = insn.fields?;
        let offset = fields.reg;
        self.before_clobber(insn.live_in());
        let retry = self.c.asm.address();
        self.linear_address(insn);
        let from = self.register(offset, T1);
        self.in_t1 = None;
        let bits = 3 + log;
        let asm = &mut *self.c.asm;
        if log == 3 {
            asm.mov(T1, from);
        } else {
            // movsxd r11, from: the offset is a signed 32-bit number
            asm.op_reg_raw(true, &[0x63], T1, from);
        }
        asm.sar(T1, bits);
        asm.lea(T0, Mem::indexed(T0, T1, log, 0));
        self.probe(insn, retry, access.size, access.write, Check::Exact, After::Leave);
        let asm = &mut *self.c.asm;
        asm.lea(T1, Mem::indexed(T1, T0, 0, 0));
        let from = self.register(offset, T0);
        let asm = &mut *self.c.asm;
        if from != T0 {
            asm.mov(T0, from);
        }
        asm.alu_imm32(Alu::And, T0, (1 << bits) - 1);
        if insn.live_out & !insn.flags_changed != 0 && self.flags == Flags::Slot {
            self.restore_flags();
        }
        fields.reg = T0.0;
        fields.emit(self.c.asm, Some(Mem::base(T1, 0)));
        self.flags = Flags::Host;
        Some(())
    }
}
