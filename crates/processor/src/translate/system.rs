//! Host code for the system instructions that kernels use all the time.

use x86::{rflags, seg};

use super::asm::{Alu, Mem, RAX, RCX, RDX, T0, T1, cc};
use super::block::{Insn, System};
use super::frame;
use super::lower::{Flags, Lowering, Mode, Site};

impl Lowering<'_> {
    pub(super) fn system(&mut self, index: usize, insn: &Insn, system: System) -> Option<()> {
        match system {
            System::ClearInterrupts => self.change_rflags(insn, Alu::And, !rflags::IF),
            System::ClearDirection => self.change_rflags(insn, Alu::And, !rflags::DF),
            System::SetInterrupts => self.set_interrupts(insn),
            System::PushFlags => self.push_flags(index, insn)?,
            System::PopFlags => self.pop_flags(index, insn)?,
            System::SwapGs => self.swap_gs(),
            System::ReadTsc => self.read_tsc(insn),
            System::ReadTscAndId => {
                self.read_tsc(insn);
                self.c.asm.load32(RCX, Mem::vcpu(frame::TSC_AUX));
            }
            System::SetAccess(set) => self.set_access(insn, set),
        }
        Some(())
    }

    fn change_rflags(&mut self, insn: &Insn, operation: Alu, mask: u64) {
        self.before_clobber(insn.live_in());
        self.c.asm.alu_mem_imm(operation, Mem::vcpu(frame::RFLAGS), mask as i32);
    }

    /// STAC, CLAC: what follows uses another bank of the TLB.
    fn set_access(&mut self, insn: &Insn, set: bool) {
        self.slot_flags();
        let (operation, mask) = if set { (Alu::Or, rflags::AC) } else { (Alu::And, !rflags::AC) };
        self.c.asm.alu_mem_imm(operation, Mem::vcpu(frame::RFLAGS), mask as i32);
        let mode = Mode(if set { self.c.mode.0 | Mode::AC } else { self.c.mode.0 & !Mode::AC });
        self.lookup_in_mode(insn.iced.next_ip(), mode);
    }

    /// STI. When an interrupt waits, the next instruction still comes first.
    fn set_interrupts(&mut self, insn: &Insn) {
        self.slot_flags();
        self.c.asm.alu_mem_imm(Alu::Or, Mem::vcpu(frame::RFLAGS), rflags::IF as i32);
        self.c.asm.cmp_byte_mem(Mem::vcpu(frame::WANTS_WINDOW), 0);
        self.leave_if(cc::NZ, Site::Window { rip: insn.iced.next_ip() }, Flags::Slot);
    }

    fn push_flags(&mut self, index: usize, insn: &Insn) -> Option<()> {
        self.slot_flags();
        let asm = &mut *self.c.asm;
        asm.load32(T0, Mem::vcpu(frame::FLAGS));
        asm.alu_imm32(Alu::And, T0, rflags::ARITHMETIC as i32);
        asm.load32(T1, Mem::vcpu(frame::RFLAGS));
        asm.alu_imm32(Alu::And, T1, !(rflags::ARITHMETIC | rflags::RF | rflags::VM) as i32);
        asm.alu(Alu::Or, T0, T1);
        self.in_t1 = None;
        self.push_t0(index, insn)
    }

    /// POPF that changes nothing but arithmetic flags and IF; anything else goes to the interpreter.
    fn pop_flags(&mut self, index: usize, insn: &Insn) -> Option<()> {
        let rip = insn.iced.ip();
        self.slot_flags();
        let mem = self.stack(index, insn)?;
        let asm = &mut *self.c.asm;
        asm.load(T0, mem);
        asm.load(T1, Mem::vcpu(frame::RFLAGS));
        asm.alu(Alu::Xor, T1, T0);
        self.in_t1 = None;
        // test r11, imm32
        asm.bytes(&[0x49, 0xf7, 0xc3]);
        asm.dword(!(rflags::ARITHMETIC | rflags::IF) as u32);
        self.leave_if(cc::NZ, Site::Interpret { rip }, Flags::Slot);
        let skip = self.c.asm.label();
        // test r10d, imm32
        self.c.asm.bytes(&[0x41, 0xf7, 0xc2]);
        self.c.asm.dword(rflags::IF as u32);
        self.c.asm.jcc(cc::Z, skip);
        self.c.asm.cmp_byte_mem(Mem::vcpu(frame::WANTS_WINDOW), 0);
        self.leave_if(cc::NZ, Site::Interpret { rip }, Flags::Slot);
        self.c.asm.bind(skip);
        self.c.asm.store(Mem::vcpu(frame::RFLAGS), T0);
        self.c.asm.store(Mem::vcpu(frame::FLAGS), T0);
        self.flags = Flags::Slot;
        self.move_stack(8);
        Some(())
    }

    fn swap_gs(&mut self) {
        let (current, other) = (Mem::vcpu(frame::segment_base(seg::GS)), Mem::vcpu(frame::KERNEL_GS_BASE));
        let asm = &mut *self.c.asm;
        asm.load(T0, current);
        asm.load(T1, other);
        asm.store(current, T1);
        asm.store(other, T0);
        self.in_t1 = None;
    }

    fn read_tsc(&mut self, insn: &Insn) {
        self.before_clobber(insn.live_in());
        let asm = &mut *self.c.asm;
        asm.bytes(&[0x0f, 0x31]);
        asm.shl(RDX, 32);
        asm.alu(Alu::Or, RAX, RDX);
        asm.alu_load(Alu::Add, RAX, Mem::vcpu(frame::TSC_OFFSET));
        asm.mov(RDX, RAX);
        asm.shr(RDX, 32);
        asm.mov32(RAX, RAX);
    }
}
