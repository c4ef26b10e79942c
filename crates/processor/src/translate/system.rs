//! Host code for the system instructions that kernels use all the time.

use x86::{Segment, rflags, seg};

use super::asm::{Alu, Mem, RAX, RCX, RDX, T0, T1, cc};
use super::block::{Insn, System};
use super::enter::home;
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
                // It waits for all instructions and loads before it, as RDTSC does not: clocks that several processors read
                // rely on it. LFENCE makes RDTSC wait as well (SDM (2024-12) Vol. 2B "RDTSC", "RDTSCP").
                self.c.asm.bytes(&[0x0f, 0xae, 0xe8]);
                self.read_tsc(insn);
                self.c.asm.load32(RCX, Mem::vcpu(frame::TSC_AUX));
            }
            System::SetAccess(set) => self.set_access(insn, set),
            System::ReadControl { to, control } => self.read_field(to, frame::control(control)),
            System::ReadPriority(to) => self.read_priority(insn, to),
            System::WritePriority(from) => self.write_priority(insn, from),
            System::ReadBase { to, segment } => self.read_field(to, frame::segment_base(segment.into())),
            System::ReadSelector { to, segment } => {
                let host = home(to).unwrap_or(T0);
                // movzx r32, word
                self.c.asm.op_mem_raw(false, &[0x0f, 0xb7], host.0, Mem::vcpu(frame::selector(segment.into())));
                self.store_home(to, host);
            }
            System::StoreSelector(segment) => self.store_selector(index, insn, segment)?,
            System::WriteBase { from, segment } => self.write_base(insn, from, segment),
            System::Syscall => self.syscall(insn),
            System::Sysret => self.sysret(insn),
            System::InterruptReturn => self.interrupt_return(insn),
        }
        Some(())
    }

    fn store_selector(&mut self, index: usize, insn: &Insn, segment: u8) -> Option<()> {
        let to = if insn.operand.is_some() {
            let mem = self.operand(index, insn)?;
            self.fold(mem)
        } else {
            // The other 48 bits of the register stay.
            let number = insn.iced.op0_register().number() as u8;
            match home(number) {
                Some(host) => {
                    self.c.asm.store(Mem::vcpu(frame::SPILL), host);
                    Mem::vcpu(frame::SPILL)
                }
                None => Mem::vcpu(frame::gpr(number.into())),
            }
        };
        let asm = &mut *self.c.asm;
        // movzx r10d, word; mov word, r10w
        asm.op_mem_raw(false, &[0x0f, 0xb7], T0.0, Mem::vcpu(frame::selector(segment.into())));
        asm.byte(0x66);
        asm.op_mem_raw(false, &[0x89], T0.0, to);
        if insn.operand.is_none()
            && let Some(host) = home(insn.iced.op0_register().number() as u8)
        {
            asm.load(host, Mem::vcpu(frame::SPILL));
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
        let (block, guest) = (self.c.block, self.guest(insn.iced.next_ip()));
        self.leave_if(cc::NZ, Site::Window { block, guest }, Flags::Slot);
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
        let interpret = self.interpret(insn);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        let skip = self.c.asm.label();
        // test r10d, imm32
        self.c.asm.bytes(&[0x41, 0xf7, 0xc2]);
        self.c.asm.dword(rflags::IF as u32);
        self.c.asm.jcc(cc::Z, skip);
        self.c.asm.cmp_byte_mem(Mem::vcpu(frame::WANTS_WINDOW), 0);
        let interpret = self.interpret(insn);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
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

    fn read_field(&mut self, to: u8, field: i32) {
        let host = home(to).unwrap_or(T0);
        self.c.asm.load(host, Mem::vcpu(field));
        self.store_home(to, host);
    }

    fn read_priority(&mut self, insn: &Insn, to: u8) {
        self.before_clobber(insn.live_in());
        let host = home(to).unwrap_or(T0);
        self.c.asm.load32(host, Mem::vcpu(frame::PRIORITY));
        self.c.asm.shr(host, 4);
        self.store_home(to, host);
    }

    /// MOV to CR8. The interpreter raises #GP for values that it has no room for, and tells the local APIC of a lower
    /// priority than it knows; of others it is told later, see [`crate::vcpu::TaskPriority`].
    fn write_priority(&mut self, insn: &Insn, from: u8) {
        self.before_clobber(insn.live_in());
        let from = self.register(from, T1);
        let interpret = self.interpret(insn);
        let asm = &mut *self.c.asm;
        asm.mov(T0, from);
        asm.alu_imm(Alu::Cmp, T0, 15);
        self.leave_if(cc::A, interpret, Flags::Slot);
        self.c.asm.shl(T0, 4);
        // cmp r10d, [told]
        self.c.asm.op_mem_raw(false, &[0x3b], T0.0, Mem::vcpu(frame::PRIORITY_TOLD));
        self.leave_if(cc::B, interpret, Flags::Slot);
        // mov [value], r10d
        self.c.asm.op_mem_raw(false, &[0x89], T0.0, Mem::vcpu(frame::PRIORITY));
    }

    /// WRFSBASE, WRGSBASE. Not canonical: the interpreter raises #GP.
    fn write_base(&mut self, insn: &Insn, from: u8, segment: u8) {
        self.before_clobber(insn.live_in());
        let from = self.register(from, T1);
        let asm = &mut *self.c.asm;
        asm.mov(T0, from);
        asm.shl(T0, 16);
        asm.sar(T0, 16);
        asm.alu(Alu::Cmp, T0, from);
        let interpret = self.interpret(insn);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        self.c.asm.store(Mem::vcpu(frame::segment_base(segment.into())), from);
    }

    /// Stores flat CS and SS of a privilege level. The CS selector is in T0, that of SS is next to it: above for the kernel,
    /// below for user code. Clobbers T0 and T1.
    fn store_flat_segments(&mut self, dpl: u8) {
        let (code, stack) = (Segment::flat_code64(0, dpl), Segment::flat_data(0, dpl));
        // The second half of a segment register: limit, selector, attributes.
        let half = |segment: Segment| u64::from(segment.limit) | u64::from(segment.attributes) << 48;
        let next = if dpl == 0 { 8_u64 << 32 } else { (8_u64 << 32).wrapping_neg() };
        let asm = &mut *self.c.asm;
        asm.shl(T0, 32);
        for (index, segment, add) in [(seg::CS, code, 0), (seg::SS, stack, next)] {
            asm.store_imm(Mem::vcpu(frame::segment_base(index)), 0);
            asm.mov_imm(T1, half(segment).wrapping_add(add));
            asm.alu(Alu::Add, T1, T0);
            asm.store(Mem::vcpu(frame::segment_base(index) + 8), T1);
        }
    }

    /// SYSCALL in 64-bit mode, Intel SDM (2024-12) Vol. 2B "SYSCALL". The kernel's code begins without SIMD state in
    /// registers.
    fn syscall(&mut self, insn: &Insn) {
        self.slot_flags();
        // RFLAGS.AC that SFMASK leaves set would make the kernel's code one of another mode.
        self.c.asm.test_byte_mem(Mem::vcpu(frame::SFMASK + 2), (rflags::AC >> 16) as u8);
        let interpret = self.interpret(insn);
        self.leave_if(cc::Z, interpret, Flags::Slot);
        if self.c.mode.is_simd() {
            self.c.asm.call_address(self.c.stubs.save_simd());
        }
        let asm = &mut *self.c.asm;
        asm.load32(T0, Mem::vcpu(frame::FLAGS));
        asm.alu_imm32(Alu::And, T0, rflags::ARITHMETIC as i32);
        asm.load32(T1, Mem::vcpu(frame::RFLAGS));
        asm.alu_imm32(Alu::And, T1, !(rflags::ARITHMETIC | rflags::RF) as i32);
        asm.alu(Alu::Or, T0, T1);
        asm.store(Mem::vcpu(frame::gpr(11)), T0);
        asm.mov_imm(RCX, insn.iced.next_ip());
        asm.load(T1, Mem::vcpu(frame::SFMASK));
        // not r11
        asm.bytes(&[0x49, 0xf7, 0xd3]);
        asm.alu(Alu::And, T0, T1);
        asm.alu_imm32(Alu::Or, T0, rflags::FIXED as i32);
        asm.store(Mem::vcpu(frame::RFLAGS), T0);
        asm.store(Mem::vcpu(frame::FLAGS), T0);
        asm.load32(T0, Mem::vcpu(frame::STAR + 4));
        asm.alu_imm32(Alu::And, T0, 0xfffc);
        self.store_flat_segments(0);
        self.c.asm.store_imm32(Mem::vcpu(frame::MODE), 0);
        self.c.asm.load(T0, Mem::vcpu(frame::LSTAR));
        self.in_t1 = None;
        self.lookup_dynamic(Mode(0));
    }

    /// SYSRET to 64-bit code, with ordinary flags and a canonical target; anything else is the interpreter's.
    fn sysret(&mut self, insn: &Insn) {
        // It may lead back to the SYSCALL that it comes from.
        self.poll();
        let interpret = self.interpret(insn);
        self.slot_flags();
        if self.c.mode.0 != 0 {
            return self.leave(interpret);
        }
        let asm = &mut *self.c.asm;
        asm.mov(T0, RCX);
        asm.sar(T0, 47);
        // test r10, r10: only addresses of the lower half
        asm.bytes(&[0x4d, 0x85, 0xd2]);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        let asm = &mut *self.c.asm;
        asm.load(T1, Mem::vcpu(frame::gpr(11)));
        // test r11, imm32
        asm.bytes(&[0x49, 0xf7, 0xc3]);
        asm.dword(!(rflags::ARITHMETIC | rflags::IF | rflags::FIXED | rflags::ID) as u32);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        self.c.asm.cmp_byte_mem(Mem::vcpu(frame::WANTS_WINDOW), 0);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        let asm = &mut *self.c.asm;
        asm.alu_imm32(Alu::Or, T1, rflags::FIXED as i32);
        asm.store(Mem::vcpu(frame::RFLAGS), T1);
        asm.store(Mem::vcpu(frame::FLAGS), T1);
        asm.load(T0, Mem::vcpu(frame::STAR));
        asm.shr(T0, 48);
        asm.alu_imm32(Alu::Add, T0, 16);
        asm.alu_imm32(Alu::Or, T0, 3);
        self.store_flat_segments(3);
        self.c.asm.store_imm32(Mem::vcpu(frame::MODE), Mode::USER.into());
        self.c.asm.mov(T0, RCX);
        self.in_t1 = None;
        self.leave_for_direct();
        self.lookup_dynamic(Mode(Mode::USER));
    }

    /// Behind a return to user code, whose RIP is in T0: leaves where that code may run directly.
    pub(super) fn leave_for_direct(&mut self) {
        self.c.asm.cmp_byte_mem(Mem::vcpu(frame::DIRECT), 0);
        self.leave_if(cc::NZ, Site::Lookup, Flags::Slot);
    }
}
