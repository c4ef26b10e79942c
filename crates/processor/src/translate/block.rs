//! A guest block before it is translated: its instructions decoded, classed, and analysed for which flags are live, which
//! registers change, and where memory is touched.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register,
};

use super::encode::Fields;
use crate::interpret::condition_code;

/// How the translator treats an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Copied, with registers and the memory operand replaced.
    Plain,
    Lea,
    /// Does nothing that a guest can see.
    Nop,
    PushReg(u8),
    PushImm(i32),
    PushMem,
    PopReg(u8),
    Leave,
    CallNear(u64),
    CallIndirect,
    Jump(u64),
    JumpIndirect,
    JumpIf(u8, u64),
    Return(u16),
    System(System),
    Repeat(StringOp),
    /// BT and its kin with a bit offset in a register and the bits in memory: (log2 of the operand size).
    BitInMemory(u8),
    /// Left to the interpreter; ends the block.
    Interpret,
}

/// System instructions that are worth code of their own, all of CPL 0 but RDTSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    ClearInterrupts,
    SetInterrupts,
    PushFlags,
    PopFlags,
    SwapGs,
    ReadTsc,
    ReadTscAndId,
    ClearDirection,
    /// STAC and CLAC: code after them is of another mode.
    SetAccess(bool),
    /// To a general register from CR0, CR2, CR3 or CR4.
    ReadControl {
        to: u8,
        control: u8,
    },
    /// To a general register from a segment selector, zero-extended.
    ReadSelector {
        to: u8,
        segment: u8,
    },
    /// RDFSBASE and its kin, 64 bits wide.
    ReadBase {
        to: u8,
        segment: u8,
    },
    WriteBase {
        from: u8,
        segment: u8,
    },
    Syscall,
    Sysret,
}

/// A string instruction with REP, on elements of 2 to the given power bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StringOp {
    Store(u8),
    Move(u8),
}

impl Kind {
    pub fn ends_block(self) -> bool {
        matches!(
            self,
            Kind::CallNear(_)
                | Kind::CallIndirect
                | Kind::Jump(_)
                | Kind::JumpIndirect
                | Kind::JumpIf(..)
                | Kind::Return(_)
                | Kind::System(System::SetAccess(_) | System::Syscall | System::Sysret)
                | Kind::Interpret
        )
    }
}

/// One of the memory accesses of an instruction: an explicit operand or the stack.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub size: u16,
    pub write: bool,
    /// `Some` when the address is a general register plus a constant: (register, displacement).
    pub simple: Option<(u8, i32)>,
}

#[derive(Clone, Debug)]
pub struct Insn {
    pub iced: Instruction,
    pub fields: Option<Fields>,
    pub kind: Kind,
    pub is_simd: bool,
    /// Explicit memory operand.
    pub operand: Option<Access>,
    /// Implicit access to the stack.
    pub stack: Option<Access>,
    pub flags_read: u32,
    /// Flags that a likely fault in the instruction shows to the guest.
    pub flags_shown: u32,
    /// Flags that are certainly overwritten.
    pub flags_killed: u32,
    /// Flags that may change.
    pub flags_changed: u32,
    /// A bit for each general register that is written, as a whole or in part.
    pub writes: u16,
    /// Flags that are read after this instruction before they are overwritten.
    pub live_out: u32,
}

impl Insn {
    /// Flags that must still be right when this instruction begins.
    pub fn live_in(&self) -> u32 {
        self.live_out & !self.flags_killed | self.flags_read | self.flags_shown
    }
}

#[derive(Debug, Default)]
pub struct Source {
    pub insns: Vec<Insn>,
    /// Bytes of guest code.
    pub size: usize,
}

/// Longer blocks gain little, and an interrupt waits for the end of a block at most.
const MOST_INSTRUCTIONS: usize = 64;

/// What the guest may run, as far as the translator must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// SSE instructions are enabled (CR4.OSFXSR, CR0.EM clear).
    pub sse: bool,
    /// AVX state is enabled (CR4.OSXSAVE, XCR0).
    pub avx: bool,
    /// Code runs at CPL 3.
    pub user: bool,
    /// RDTSC is for the kernel only (CR4.TSD).
    pub tsc_disabled: bool,
    /// RDFSBASE and its kin are enabled (CR4.FSGSBASE).
    pub fsgsbase: bool,
    /// SYSCALL and SYSRET are enabled (EFER.SCE).
    pub syscall: bool,
}

/// Decodes the block at `rip`. `code` are the bytes there, up to the end of the page or, when the first instruction
/// reaches into the next page, of that instruction (`whole` is then false for what follows it).
pub fn decode(code: &[u8], rip: u64, limit: usize, features: Features, info: &mut InstructionInfoFactory) -> Source {
    let mut decoder = Decoder::with_ip(64, code, rip, DecoderOptions::NONE);
    let mut source = Source::default();
    let limit = limit.min(MOST_INSTRUCTIONS);
    while source.insns.len() < limit && decoder.can_decode() {
        let start = decoder.position();
        let iced = decoder.decode();
        if iced.is_invalid() {
            // Cut off by the end of the page, or no instruction at all: the interpreter finds out which.
            if source.insns.is_empty() {
                source.insns.push(interpreted(iced));
                source.size = 1;
            }
            break;
        }
        let bytes = &code[start..decoder.position()];
        let insn = classify(iced, bytes, features, info);
        source.size = decoder.position();
        let ends = insn.kind.ends_block();
        source.insns.push(insn);
        if ends {
            break;
        }
    }
    find_live_flags(&mut source.insns);
    source
}

const ALL_FLAGS: u32 = iced_x86::RflagsBits::OF
    | iced_x86::RflagsBits::SF
    | iced_x86::RflagsBits::ZF
    | iced_x86::RflagsBits::AF
    | iced_x86::RflagsBits::CF
    | iced_x86::RflagsBits::PF;

fn find_live_flags(insns: &mut [Insn]) {
    let mut live = ALL_FLAGS;
    for insn in insns.iter_mut().rev() {
        insn.live_out = live;
        live = insn.live_in();
    }
}

fn interpreted(iced: Instruction) -> Insn {
    Insn {
        iced,
        fields: None,
        kind: Kind::Interpret,
        is_simd: false,
        operand: None,
        stack: None,
        flags_read: ALL_FLAGS,
        flags_shown: 0,
        flags_killed: 0,
        flags_changed: 0,
        writes: 0,
        live_out: ALL_FLAGS,
    }
}

fn classify(iced: Instruction, bytes: &[u8], features: Features, info: &mut InstructionInfoFactory) -> Insn {
    classify_known(iced, bytes, features, info).unwrap_or_else(|| interpreted(iced))
}

/// `None` for what the interpreter shall do.
fn classify_known(
    iced: Instruction,
    bytes: &[u8],
    features: Features,
    info: &mut InstructionInfoFactory,
) -> Option<Insn> {
    let fields = Fields::parse(bytes)?;
    let is_simd = is_simd(&iced);
    let kind = kind_of(&iced, is_simd, features)?;
    let mut insn = interpreted(iced);
    insn.kind = kind;
    insn.is_simd = is_simd;
    insn.flags_read = iced.rflags_read() & ALL_FLAGS;
    insn.flags_changed = iced.rflags_modified() & ALL_FLAGS;
    insn.flags_killed = if changes_flags_for_sure(&iced) { insn.flags_changed } else { 0 };
    if matches!(iced.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) {
        // The flags are undefined after a division, but #DE shows those before it.
        (insn.flags_changed, insn.flags_killed, insn.flags_shown) = (0, 0, ALL_FLAGS);
    }
    insn.fields = Some(fields);
    describe(&mut insn, info)?;
    Some(insn)
}

/// Shifts and rotates by CL leave the flags alone when the count is zero.
fn changes_flags_for_sure(iced: &Instruction) -> bool {
    use Mnemonic as M;
    match iced.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd => {
            let last = iced.op_count() - 1;
            iced.op_kind(last) == OpKind::Immediate8 && iced.immediate8() & 31 != 0
        }
        _ => true,
    }
}

/// Finds accesses and written registers.
fn describe(insn: &mut Insn, info: &mut InstructionInfoFactory) -> Option<()> {
    let iced = insn.iced;
    let used = info.info_options(&iced, InstructionInfoOptions::NONE);
    for register in used.used_registers() {
        let written = matches!(
            register.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        let full = register.register().full_register();
        if written && full.is_gpr64() {
            insn.writes |= 1 << full.number();
        }
    }
    let stack = |write, displacement| Some(Access { size: 8, write, simple: Some((4, displacement)) });
    match insn.kind {
        Kind::PushReg(_) | Kind::PushImm(_) | Kind::CallNear(_) => insn.stack = stack(true, -8),
        Kind::PushMem => insn.stack = stack(true, -8),
        Kind::PopReg(_) | Kind::Return(_) => insn.stack = stack(false, 0),
        Kind::System(System::PushFlags) => insn.stack = stack(true, -8),
        Kind::System(System::PopFlags) => insn.stack = stack(false, 0),
        Kind::Leave => insn.stack = Some(Access { size: 8, write: false, simple: Some((5, 0)) }),
        Kind::CallIndirect => insn.stack = stack(true, -8),
        _ => {}
    }
    if let Kind::Repeat(_) = insn.kind {
        return Some(());
    }
    let has_operand = (0..iced.op_count()).any(|operand| iced.op_kind(operand) == OpKind::Memory);
    if !has_operand || matches!(insn.kind, Kind::Lea | Kind::Nop) {
        return Some(());
    }
    // The explicit operand is the one with the operand's registers; the stack's is implicit.
    let access = (0..iced.op_count()).find(|operand| iced.op_kind(*operand) == OpKind::Memory)?;
    let write = match used.op_access(access) {
        OpAccess::Read | OpAccess::CondRead => false,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
        _ => return None,
    };
    let size = iced.memory_size().size();
    if !(1..=64).contains(&size) {
        return None;
    }
    let simple = if let Kind::BitInMemory(_) = insn.kind { None } else { simple_address(&iced) };
    insn.operand = Some(Access { size: size as u16, write, simple });
    Some(())
}

fn simple_address(iced: &Instruction) -> Option<(u8, i32)> {
    let base = iced.memory_base();
    if !base.is_gpr64() || iced.memory_index() != Register::None || has_segment_base(iced) {
        return None;
    }
    let displacement = iced.memory_displacement64() as i64;
    Some((base.number() as u8, i32::try_from(displacement).ok()?))
}

fn has_absolute_address(iced: &Instruction) -> bool {
    matches!(
        iced.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}

pub fn has_segment_base(iced: &Instruction) -> bool {
    matches!(iced.memory_segment(), Register::FS | Register::GS)
}

/// Whether an instruction works on x87, MMX, SSE or AVX state.
fn is_simd(iced: &Instruction) -> bool {
    (0..iced.op_count()).any(|operand| {
        iced.op_kind(operand) == OpKind::Register && {
            let register = iced.op_register(operand);
            register.is_vector_register() || register.is_mm() || register.is_st()
        }
    }) || iced.cpuid_features().iter().any(|feature| {
        use CpuidFeature as F;
        matches!(feature, F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::AVX | F::AVX2)
    }) || matches!(iced.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Emms)
}

fn kind_of(iced: &Instruction, is_simd: bool, features: Features) -> Option<Kind> {
    use Mnemonic as M;
    let registers_are_plain = (0..iced.op_count()).all(|operand| {
        iced.op_kind(operand) != OpKind::Register || {
            let register = iced.op_register(operand);
            !register.is_segment_register()
                && !register.is_cr()
                && !register.is_dr()
                && !register.is_k()
                && !register.is_bnd()
                && !register.is_tr()
        }
    });
    if let Some(system) = system_kind(iced, features) {
        return Some(Kind::System(system));
    }
    if !registers_are_plain {
        return None;
    }
    if let Some(string) = string_kind(iced) {
        return Some(Kind::Repeat(string));
    }
    let memory = (0..iced.op_count()).any(|operand| iced.op_kind(operand) == OpKind::Memory);
    let address_is_long = !memory || {
        let (base, index) = (iced.memory_base(), iced.memory_index());
        let fits = |register: Register| register == Register::None || register.is_gpr64() || register == Register::RIP;
        // A 64-bit absolute address, and indices that are vectors, stay with the interpreter.
        fits(base) && fits(index) && !has_absolute_address(iced)
    };
    if !address_is_long {
        return None;
    }
    if is_simd {
        return simd_kind(iced, features);
    }
    match iced.flow_control() {
        FlowControl::Next => {}
        FlowControl::UnconditionalBranch if iced.op_kind(0) == OpKind::NearBranch64 => {
            return Some(Kind::Jump(iced.near_branch64()));
        }
        FlowControl::ConditionalBranch if iced.is_jcc_short_or_near() && iced.op_kind(0) == OpKind::NearBranch64 => {
            return Some(Kind::JumpIf(condition_code(iced), iced.near_branch64()));
        }
        FlowControl::Call if iced.code() == Code::Call_rel32_64 => return Some(Kind::CallNear(iced.near_branch64())),
        FlowControl::IndirectCall if iced.code() == Code::Call_rm64 => return Some(Kind::CallIndirect),
        FlowControl::IndirectBranch if iced.code() == Code::Jmp_rm64 => return Some(Kind::JumpIndirect),
        FlowControl::Return if iced.code() == Code::Retnq => return Some(Kind::Return(0)),
        FlowControl::Return if iced.code() == Code::Retnq_imm16 => return Some(Kind::Return(iced.immediate16())),
        _ => return None,
    }
    let kind = match iced.mnemonic() {
        M::Push => match iced.code() {
            Code::Push_r64 => Kind::PushReg(iced.op0_register().number() as u8),
            Code::Pushq_imm8 | Code::Pushq_imm32 => Kind::PushImm(iced.immediate(0) as i32),
            Code::Push_rm64 if memory => Kind::PushMem,
            Code::Push_rm64 => Kind::PushReg(iced.op0_register().number() as u8),
            _ => return None,
        },
        M::Pop => match iced.code() {
            Code::Pop_r64 => Kind::PopReg(iced.op0_register().number() as u8),
            _ => return None,
        },
        M::Leave if iced.code() == Code::Leaveq => Kind::Leave,
        M::Lea if matches!(iced.code(), Code::Lea_r64_m | Code::Lea_r32_m) => Kind::Lea,
        M::Nop | M::Endbr64 | M::Endbr32 | M::Pause => Kind::Nop,
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw | M::Prefetch => Kind::Nop,
        M::Bt | M::Btc | M::Btr | M::Bts if memory && iced.op1_kind() == OpKind::Register => {
            match iced.memory_size().size() {
                4 => Kind::BitInMemory(2),
                8 => Kind::BitInMemory(3),
                _ => return None,
            }
        }
        M::Serialize => Kind::Nop,
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => Kind::Plain,
        M::Inc | M::Dec | M::Neg | M::Not | M::Mul | M::Imul | M::Div | M::Idiv => Kind::Plain,
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Movbe | M::Movnti | M::Bswap => Kind::Plain,
        M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b => Kind::Plain,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd => Kind::Plain,
        M::Bt | M::Btc | M::Btr | M::Bts | M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt => Kind::Plain,
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo | M::Lahf | M::Sahf => Kind::Plain,
        M::Clc | M::Stc | M::Cmc | M::Lfence | M::Mfence | M::Sfence | M::Crc32 => Kind::Plain,
        M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi | M::Mulx | M::Pdep | M::Pext => Kind::Plain,
        M::Rorx | M::Sarx | M::Shlx | M::Shrx | M::Adcx | M::Adox => Kind::Plain,
        M::Cmova | M::Cmovae | M::Cmovb | M::Cmovbe | M::Cmove | M::Cmovne | M::Cmovg | M::Cmovge => Kind::Plain,
        M::Cmovl | M::Cmovle | M::Cmovno | M::Cmovnp | M::Cmovns | M::Cmovo | M::Cmovp | M::Cmovs => Kind::Plain,
        M::Seta | M::Setae | M::Setb | M::Setbe | M::Sete | M::Setne | M::Setg | M::Setge => Kind::Plain,
        M::Setl | M::Setle | M::Setno | M::Setnp | M::Setns | M::Seto | M::Setp | M::Sets => Kind::Plain,
        _ => return None,
    };
    // XCHG with memory locks by itself; other instructions copy their LOCK prefix along with the rest.
    Some(kind)
}

/// REP STOS and REP MOVS with 64-bit addresses and no segment base.
fn string_kind(iced: &Instruction) -> Option<StringOp> {
    use StringOp::{Move, Store};
    if !iced.has_rep_prefix() && !iced.has_repne_prefix() {
        return None;
    }
    let (string, addresses) = match iced.code() {
        Code::Stosb_m8_AL => (Store(0), [OpKind::MemoryESRDI; 2]),
        Code::Stosd_m32_EAX => (Store(2), [OpKind::MemoryESRDI; 2]),
        Code::Stosq_m64_RAX => (Store(3), [OpKind::MemoryESRDI; 2]),
        Code::Movsb_m8_m8 => (Move(0), [OpKind::MemoryESRDI, OpKind::MemorySegRSI]),
        Code::Movsd_m32_m32 => (Move(2), [OpKind::MemoryESRDI, OpKind::MemorySegRSI]),
        Code::Movsq_m64_m64 => (Move(3), [OpKind::MemoryESRDI, OpKind::MemorySegRSI]),
        _ => return None,
    };
    let second = if let Move(_) = string { iced.op1_kind() } else { addresses[1] };
    (iced.op0_kind() == addresses[0] && second == addresses[1] && !has_segment_base(iced)).then_some(string)
}

fn system_kind(iced: &Instruction, features: Features) -> Option<System> {
    if matches!(iced.code(), Code::Rdtsc | Code::Rdtscp) {
        let kind = if iced.code() == Code::Rdtsc { System::ReadTsc } else { System::ReadTscAndId };
        return (!features.user || !features.tsc_disabled).then_some(kind);
    }
    if iced.code() == Code::Cld {
        return Some(System::ClearDirection);
    }
    if features.fsgsbase {
        let register = iced.op0_register().number() as u8;
        let (fs, gs) = (x86::seg::FS as u8, x86::seg::GS as u8);
        match iced.code() {
            Code::Rdfsbase_r64 => return Some(System::ReadBase { to: register, segment: fs }),
            Code::Rdgsbase_r64 => return Some(System::ReadBase { to: register, segment: gs }),
            Code::Wrfsbase_r64 => return Some(System::WriteBase { from: register, segment: fs }),
            Code::Wrgsbase_r64 => return Some(System::WriteBase { from: register, segment: gs }),
            _ => {}
        }
    }
    if matches!(iced.code(), Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg) && iced.op0_kind() == OpKind::Register {
        let (to, segment) = (iced.op0_register().number() as u8, iced.op1_register().number() as u8);
        return Some(System::ReadSelector { to, segment });
    }
    if features.user {
        return (features.syscall && iced.code() == Code::Syscall).then_some(System::Syscall);
    }
    match iced.code() {
        Code::Sysretq if features.syscall => Some(System::Sysret),
        Code::Mov_r64_cr => match iced.op1_register() {
            Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 => {
                let (to, control) = (iced.op0_register().number() as u8, iced.op1_register().number() as u8);
                Some(System::ReadControl { to, control })
            }
            _ => None,
        },
        Code::Cli => Some(System::ClearInterrupts),
        Code::Sti => Some(System::SetInterrupts),
        Code::Pushfq => Some(System::PushFlags),
        Code::Popfq => Some(System::PopFlags),
        Code::Swapgs => Some(System::SwapGs),
        Code::Stac => Some(System::SetAccess(true)),
        Code::Clac => Some(System::SetAccess(false)),
        _ => None,
    }
}

fn simd_kind(iced: &Instruction, features: Features) -> Option<Kind> {
    use CpuidFeature as F;
    use Mnemonic as M;
    if iced.encoding() == EncodingKind::VEX && !features.avx {
        return None;
    }
    if iced.flow_control() != FlowControl::Next || !features.sse {
        return None;
    }
    // Store images with addresses of the host, fault where a mask says not to, or need care of their own.
    if matches!(
        iced.mnemonic(),
        M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Fnstenv
            | M::Fstenv
            | M::Fldenv
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
    ) || iced.is_vsib()
    {
        return None;
    }
    let known = iced.cpuid_features().iter().all(|feature| {
        matches!(
            feature,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::CMOV
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
                | F::VAES
                | F::VPCLMULQDQ
                | F::GFNI
        )
    });
    (known && matches!(iced.encoding(), EncodingKind::Legacy | EncodingKind::VEX)).then_some(Kind::Plain)
}
