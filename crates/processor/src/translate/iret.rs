//! IRETQ to 64-bit code of the kernel or of users, through the flat segments that 64-bit systems have; everything else is the
//! interpreter's. Intel SDM (2024-12) Vol. 2A "IRET/IRETD/IRETQ".

use x86::{Segment, dr7, rflags, seg};

use super::asm::{Alu, Label, Mem, R15, RAX, RCX, T0, T1, cc};
use super::block::Insn;
use super::exits::After;
use super::frame;
use super::lower::{Check, Flags, Lowering, Mode};

/// The words of the frame that IRETQ pops.
const RIP: i32 = 0;
const CS: i32 = 8;
const RFLAGS: i32 = 16;
const RSP: i32 = 24;
const SS: i32 = 32;
const FRAME: u16 = 40;

/// Bytes of the GDT that are looked at: its first eight descriptors.
const DESCRIPTORS: u16 = 64;

/// Flags that may be set in the frame. RF is only for instruction breakpoints, and there are none.
const ORDINARY: u64 = rflags::ARITHMETIC | rflags::IF | rflags::DF | rflags::ID | rflags::RF | rflags::FIXED;

/// Where the host's address of the GDT is, and where two of the guest's registers wait.
fn kept(index: i32) -> Mem {
    Mem::vcpu(frame::STRING + 8 * index)
}

fn selector(segment: usize) -> Mem {
    Mem::vcpu(frame::selector(segment))
}

impl Lowering<'_> {
    pub(super) fn interrupt_return(&mut self, insn: &Insn) {
        // A frame may lead back to its own IRETQ.
        self.poll();
        let interpret = self.interpret(insn);
        self.slot_flags();
        if self.c.mode.0 != 0 {
            return self.leave(interpret);
        }
        self.c.asm.test_byte_mem(Mem::vcpu(frame::RFLAGS + 1), (rflags::NT >> 8) as u8);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        self.c.asm.test_byte_mem(Mem::vcpu(frame::DR7), dr7::ANY_ENABLED as u8);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        self.c.asm.cmp_byte_mem(Mem::vcpu(frame::NMI_BLOCKED), 0);
        self.leave_if(cc::NZ, interpret, Flags::Slot);
        self.c.asm.cmp_word_mem(Mem::vcpu(frame::GDT_LIMIT), DESCRIPTORS as i8 - 1);
        self.leave_if(cc::B, interpret, Flags::Slot);

        let retry = self.c.asm.address();
        self.c.asm.load(T0, Mem::vcpu(frame::GDT_BASE));
        self.probe(insn, retry, DESCRIPTORS, false, Check::Part, After::Leave);
        self.c.asm.lea(T1, Mem::indexed(T1, T0, 0, 0));
        self.c.asm.store(kept(0), T1);
        let retry = self.c.asm.address();
        self.c.asm.mov(T0, R15);
        self.probe(insn, retry, FRAME, false, Check::Part, After::Leave);
        let asm = &mut *self.c.asm;
        asm.lea(T1, Mem::indexed(T1, T0, 0, 0));
        asm.store(kept(1), RAX);
        asm.store(kept(2), RCX);

        let (strange, kernel) = (self.c.asm.label(), self.c.asm.label());
        self.c.asm.test_byte_mem(Mem::base(T1, CS), 3);
        self.c.asm.jcc(cc::Z, kernel);
        self.return_to_level(3, strange);
        self.c.asm.bind(kernel);
        self.return_to_level(0, strange);
        self.c.asm.bind(strange);
        self.c.asm.load(RAX, kept(1));
        self.c.asm.load(RCX, kept(2));
        self.leave_with(interpret, Flags::Slot);
    }

    /// The rest of IRETQ, with the frame at T1: all that could be otherwise is checked, then all is committed.
    fn return_to_level(&mut self, level: u8, strange: Label) {
        let (code, stack) = (Segment::flat_code64(0, level), Segment::flat_data(0, level));
        self.check_descriptor(CS, code, strange);
        let (null, checked) = (self.c.asm.label(), self.c.asm.label());
        if level == 0 {
            // An interrupt of user code leaves a null SS to the kernel, which is what it gets back.
            self.c.asm.cmp_word_mem(Mem::base(T1, SS), 0);
            self.c.asm.jcc(cc::Z, null);
        }
        self.check_descriptor(SS, stack, strange);
        self.c.asm.jmp(checked);
        self.c.asm.bind(null);
        self.c.asm.cmp_word_mem(selector(seg::SS), 0);
        self.c.asm.jcc(cc::NZ, strange);
        self.c.asm.bind(checked);
        if level == 3 {
            // Others would have to be looked at: user code must not keep the kernel's.
            for segment in [seg::ES, seg::DS, seg::FS, seg::GS] {
                self.c.asm.cmp_word_mem(selector(segment), 0);
                self.c.asm.jcc(cc::NZ, strange);
            }
        }
        self.check_target(level, strange);

        let asm = &mut *self.c.asm;
        asm.load(RAX, Mem::base(T1, RFLAGS));
        // test rax, imm32
        asm.bytes(&[0x48, 0xa9]);
        asm.dword(!ORDINARY as u32);
        asm.jcc(cc::NZ, strange);
        let closed = asm.label();
        // test eax, imm32
        asm.byte(0xa9);
        asm.dword(rflags::IF as u32);
        asm.jcc(cc::Z, closed);
        asm.cmp_byte_mem(Mem::vcpu(frame::WANTS_WINDOW), 0);
        asm.jcc(cc::NZ, strange);
        asm.bind(closed);

        asm.alu_imm32(Alu::And, RAX, !rflags::RF as i32);
        asm.alu_imm32(Alu::Or, RAX, rflags::FIXED as i32);
        asm.store(Mem::vcpu(frame::RFLAGS), RAX);
        asm.store(Mem::vcpu(frame::FLAGS), RAX);
        self.load_segment(seg::CS, CS, code);
        let skip = self.c.asm.label();
        if level == 0 {
            self.c.asm.cmp_word_mem(Mem::base(T1, SS), 0);
            self.c.asm.jcc(cc::Z, skip);
        }
        self.load_segment(seg::SS, SS, stack);
        let asm = &mut *self.c.asm;
        asm.bind(skip);
        asm.load(R15, Mem::base(T1, RSP));
        asm.load(T0, Mem::base(T1, RIP));
        asm.load(RAX, kept(1));
        asm.load(RCX, kept(2));
        let mode = Mode(if level == 3 { Mode::USER } else { 0 });
        asm.store_imm32(Mem::vcpu(frame::MODE), mode.0.into());
        self.in_t1 = None;
        if level == 3 {
            self.leave_for_direct();
        }
        self.lookup_dynamic(mode);
    }

    /// Goes to `strange` unless the selector in the frame names the flat descriptor of `segment`, already accessed, with the
    /// segment's privilege, among the first of the GDT. Clobbers RAX and RCX.
    fn check_descriptor(&mut self, place: i32, segment: Segment, strange: Label) {
        let level = segment.dpl();
        // Attributes are bytes 5 and 6 of the descriptor; its limit, in pages, fills the rest.
        let attributes = u64::from(segment.attributes) | 0xf00;
        let raw = attributes << 40 | 0xffff;
        let asm = &mut *self.c.asm;
        // movzx ecx, word
        asm.op_mem_raw(false, &[0x0f, 0xb7], RCX.0, Mem::base(T1, place));
        asm.mov32(RAX, RCX);
        // All but the index: the table is the GDT, and the requested privilege that of the segment.
        asm.alu_imm32(Alu::And, RAX, 0xffc7);
        asm.alu_imm32(Alu::Cmp, RAX, level.into());
        asm.jcc(cc::NZ, strange);
        asm.alu_imm32(Alu::And, RCX, 0x38);
        asm.alu_load(Alu::Add, RCX, kept(0));
        asm.load(RCX, Mem::base(RCX, 0));
        asm.mov_imm(RAX, raw);
        asm.alu(Alu::Cmp, RAX, RCX);
        asm.jcc(cc::NZ, strange);
    }

    /// Goes to `strange` unless the frame's RIP is canonical and, for user code, of the lower half. Clobbers RAX.
    fn check_target(&mut self, level: u8, strange: Label) {
        let asm = &mut *self.c.asm;
        asm.load(RAX, Mem::base(T1, RIP));
        asm.sar(RAX, 47);
        if level == 3 {
            asm.alu_imm(Alu::Cmp, RAX, 0);
            asm.jcc(cc::NZ, strange);
        } else {
            asm.lea(RAX, Mem::base(RAX, 1));
            asm.alu_imm(Alu::Cmp, RAX, 1);
            asm.jcc(cc::A, strange);
        }
    }

    /// Makes a segment register the given flat segment, with the frame's selector. Clobbers RAX and RCX.
    fn load_segment(&mut self, register: usize, place: i32, segment: Segment) {
        let asm = &mut *self.c.asm;
        asm.op_mem_raw(false, &[0x0f, 0xb7], RAX.0, Mem::base(T1, place));
        asm.shl(RAX, 32);
        // The second half of a segment register: limit, selector, attributes.
        asm.mov_imm(RCX, u64::from(segment.limit) | u64::from(segment.attributes) << 48);
        asm.alu(Alu::Or, RAX, RCX);
        asm.store_imm(Mem::vcpu(frame::segment_base(register)), 0);
        asm.store(Mem::vcpu(frame::segment_base(register) + 8), RAX);
    }
}
