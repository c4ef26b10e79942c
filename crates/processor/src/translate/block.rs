//! A guest block before it is translated: its instructions decoded, classed, and analysed for which flags are live, which
//! registers change, and where memory is touched.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::encode::Fields;
use super::facts::{Class, Facts, Table, registers_are_plain};
use super::liveness::{ALL_FLAGS, Ahead, changes_flags_for_sure, find_live_flags};
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
    /// JRCXZ, LOOP and their kin.
    JumpIfCount(CountJump, u64),
    Return(u16),
    System(System),
    Repeat(StringOp),
    /// BT and its kin with a bit offset in a register and the bits in memory: (log2 of the operand size).
    BitInMemory(u8),
    /// Left to the interpreter, which comes back behind it.
    Callout,
    /// Left to the interpreter; ends the block.
    Interpret,
}

/// A jump that looks at RCX, or counts it down: the opcode, and whether only ECX counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CountJump {
    pub opcode: u8,
    pub is_short: bool,
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
    /// MOV from and to CR8.
    ReadPriority(u8),
    WritePriority(u8),
    /// To a general register from a segment selector, zero-extended.
    ReadSelector {
        to: u8,
        segment: u8,
    },
    /// From a segment selector to 16 bits of a general register or memory.
    StoreSelector(u8),
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
    InterruptReturn,
}

/// A string instruction with REP, on elements of 2 to the given power bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StringOp {
    Store(u8),
    Move(u8),
}

impl Kind {
    /// Where a conditional jump leads when it is taken. The block goes on behind it.
    pub fn side_exit(self) -> Option<u64> {
        match self {
            Kind::JumpIf(_, target) | Kind::JumpIfCount(_, target) => Some(target),
            _ => None,
        }
    }

    pub fn ends_block(self) -> bool {
        matches!(
            self,
            Kind::CallNear(_)
                | Kind::CallIndirect
                | Kind::Jump(_)
                | Kind::JumpIndirect
                | Kind::Return(_)
                | Kind::System(System::SetAccess(_) | System::Syscall | System::Sysret | System::InterruptReturn)
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
    /// Flags that are read before they are overwritten where a jump leads when it is taken.
    pub live_taken: u32,
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
/// A block goes on behind a conditional jump forward, as compilers lay out what is likely; each further one is less likely
/// to be reached, and is translated all the same.
pub const MOST_SIDE_EXITS: u32 = 4;

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
    /// The machine has no other processor, so that nobody needs the core that a PAUSE could give away.
    pub is_alone: bool,
}

/// What [`decode`] keeps from block to block.
pub struct BlockDecoder {
    facts: Table,
    pub source: Source,
}

impl BlockDecoder {
    pub fn new() -> BlockDecoder {
        BlockDecoder { facts: Table::new(), source: Source::default() }
    }

    /// Decodes the block at `rip`. `code` are the bytes there, up to the end of the page or, when the first instruction
    /// reaches into the next page, of that instruction; `ahead` is where jumps lead. False when more bytes than `code` might
    /// have changed the block.
    pub fn decode(&mut self, code: &[u8], rip: u64, limit: usize, features: Features, ahead: &mut Ahead<'_>) -> bool {
        let mut decoder = Decoder::with_ip(64, code, rip, DecoderOptions::NONE);
        let BlockDecoder { facts, source } = self;
        source.insns.clear();
        source.size = 0;
        let limit = limit.min(MOST_INSTRUCTIONS);
        let mut ended = false;
        let mut side_exits = 0;
        while !ended && source.insns.len() < limit && decoder.can_decode() {
            let start = decoder.position();
            source.insns.push(Insn::default());
            let place = source.insns.len() - 1;
            let insn = &mut source.insns[place];
            decoder.decode_out(&mut insn.iced);
            if insn.iced.is_invalid() {
                // Cut off by the end of the page, or no instruction at all: the interpreter finds out which.
                if place == 0 {
                    insn.leave_to_interpreter();
                    source.size = 1;
                } else {
                    source.insns.pop();
                }
                ended = start + LONGEST <= code.len();
                break;
            }
            if insn.classify(&code[start..decoder.position()], features, facts).is_none() {
                insn.leave_to_interpreter();
            }
            source.size = decoder.position();
            ended = insn.kind.ends_block();
            if let Some(target) = insn.kind.side_exit() {
                side_exits += 1;
                // Behind a jump back there is the end of a loop, which is seldom reached.
                ended = target <= insn.iced.ip() || side_exits > MOST_SIDE_EXITS;
            }
        }
        find_live_flags(source, rip, features, facts, ahead);
        ended || source.insns.len() == limit
    }
}

/// No instruction has more bytes, Intel SDM (2024-12) Vol. 2A 2.3.11 "AVX Instruction Length".
const LONGEST: usize = 15;

impl Default for Insn {
    fn default() -> Insn {
        Insn {
            iced: Instruction::default(),
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
            live_taken: 0,
            live_out: ALL_FLAGS,
        }
    }
}

impl Insn {
    fn leave_to_interpreter(&mut self) {
        // Most go on behind themselves. Whether this one did is seen when it has run.
        let goes_on = !self.iced.is_invalid() && self.iced.flow_control() == FlowControl::Next;
        let kind = if goes_on { Kind::Callout } else { Kind::Interpret };
        *self = Insn { iced: self.iced, kind, ..Insn::default() };
    }

    /// Fills in all but the liveness of flags. `None` for what the interpreter shall do.
    fn classify(&mut self, bytes: &[u8], features: Features, facts: &mut Table) -> Option<()> {
        let iced = &self.iced;
        let facts = facts.of(iced);
        self.kind = kind_of(iced, facts, features)?;
        self.fields = Some(Fields::parse(bytes)?);
        self.is_simd = facts.is_simd;
        self.flags_read = iced.rflags_read() & ALL_FLAGS;
        self.flags_changed = iced.rflags_modified() & ALL_FLAGS;
        self.flags_killed = if changes_flags_for_sure(iced) { self.flags_changed } else { 0 };
        if is_division(iced) {
            // The flags are undefined after a division, but #DE shows those before it.
            (self.flags_changed, self.flags_killed, self.flags_shown) = (0, 0, ALL_FLAGS);
        }
        if self.kind == Kind::System(System::InterruptReturn) {
            // As if the interpreter ran it, which it does when anything is unusual.
            (self.flags_changed, self.flags_killed, self.flags_shown) = (0, 0, ALL_FLAGS);
        }
        describe(self, facts)
    }
}

/// Whether #DE may come of it.
pub(super) fn is_division(iced: &Instruction) -> bool {
    matches!(iced.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
}

/// Finds accesses and written registers.
fn describe(insn: &mut Insn, facts: Facts) -> Option<()> {
    let iced = &insn.iced;
    insn.writes = facts.written(iced);
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
    if matches!(insn.kind, Kind::Lea | Kind::Nop) {
        return Some(());
    }
    // The explicit operand is the one with the operand's registers; the stack's is implicit.
    let Some(operand) = (0..iced.op_count()).find(|operand| iced.op_kind(*operand) == OpKind::Memory) else {
        return Some(());
    };
    let write = facts.writes & 1 << operand != 0;
    if !write && facts.reads & 1 << operand == 0 {
        return None;
    }
    let size = iced.memory_size().size();
    if !(1..=64).contains(&size) {
        return None;
    }
    let simple = if let Kind::BitInMemory(_) = insn.kind { None } else { simple_address(iced) };
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

pub fn has_segment_base(iced: &Instruction) -> bool {
    matches!(iced.memory_segment(), Register::FS | Register::GS)
}

pub(super) fn kind_of(iced: &Instruction, facts: Facts, features: Features) -> Option<Kind> {
    let kind = match facts.class {
        Class::Plain => Kind::Plain,
        Class::Simd { vex } => (features.sse && (!vex || features.avx)).then_some(Kind::Plain)?,
        Class::Lea => Kind::Lea,
        Class::JumpIf => return Some(Kind::JumpIf(condition_code(iced), iced.near_branch64())),
        Class::PushReg => return Some(Kind::PushReg(iced.op0_register().number() as u8)),
        Class::PopReg => return Some(Kind::PopReg(iced.op0_register().number() as u8)),
        Class::Other => return other_kind(iced, facts.is_simd, features),
    };
    address_is_long(iced).then_some(kind)
}

/// Whether the memory operand, if there is one, is addressed by 64-bit registers. Indices that are vectors stay with the
/// interpreter.
fn address_is_long(iced: &Instruction) -> bool {
    let fits = |register: Register| register == Register::None || register.is_gpr64() || register == Register::RIP;
    // Without a memory operand both are none.
    fits(iced.memory_base()) && fits(iced.memory_index())
}

/// The kind of what its code alone does not class.
fn other_kind(iced: &Instruction, is_simd: bool, features: Features) -> Option<Kind> {
    use Mnemonic as M;
    if let Some(system) = system_kind(iced, features) {
        return Some(Kind::System(system));
    }
    if is_simd || !registers_are_plain(iced) {
        return None;
    }
    if let Some(string) = string_kind(iced) {
        return Some(Kind::Repeat(string));
    }
    if !address_is_long(iced) {
        return None;
    }
    match iced.flow_control() {
        FlowControl::Next => {}
        FlowControl::ConditionalBranch => {
            return Some(Kind::JumpIfCount(count_jump(iced.code())?, iced.near_branch64()));
        }
        FlowControl::UnconditionalBranch if iced.op_kind(0) == OpKind::NearBranch64 => {
            return Some(Kind::Jump(iced.near_branch64()));
        }
        FlowControl::Call if iced.code() == Code::Call_rel32_64 => return Some(Kind::CallNear(iced.near_branch64())),
        FlowControl::IndirectCall if iced.code() == Code::Call_rm64 => return Some(Kind::CallIndirect),
        FlowControl::IndirectBranch if iced.code() == Code::Jmp_rm64 => return Some(Kind::JumpIndirect),
        FlowControl::Return if iced.code() == Code::Retnq => return Some(Kind::Return(0)),
        FlowControl::Return if iced.code() == Code::Retnq_imm16 => return Some(Kind::Return(iced.immediate16())),
        _ => return None,
    }
    let is_memory = |operand| iced.op_kind(operand) == OpKind::Memory;
    let kind = match iced.mnemonic() {
        M::Push => match iced.code() {
            Code::Pushq_imm8 | Code::Pushq_imm32 => Kind::PushImm(iced.immediate(0) as i32),
            Code::Push_rm64 if is_memory(0) => Kind::PushMem,
            Code::Push_rm64 => Kind::PushReg(iced.op0_register().number() as u8),
            _ => return None,
        },
        M::Leave if iced.code() == Code::Leaveq => Kind::Leave,
        M::Nop | M::Endbr64 | M::Endbr32 => Kind::Nop,
        M::Pause if features.is_alone => Kind::Nop,
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw | M::Prefetch => Kind::Nop,
        M::Bt | M::Btc | M::Btr | M::Bts if is_memory(0) && iced.op1_kind() == OpKind::Register => {
            match iced.memory_size().size() {
                4 => Kind::BitInMemory(2),
                8 => Kind::BitInMemory(3),
                _ => return None,
            }
        }
        M::Bt | M::Btc | M::Btr | M::Bts => Kind::Plain,
        M::Serialize => Kind::Nop,
        _ => return None,
    };
    Some(kind)
}

/// Intel SDM (2024-12) Vol. 2A 3.3 "Jcc—Jump if Condition Is Met" (JRCXZ, JECXZ) and "LOOP/LOOPcc".
fn count_jump(code: Code) -> Option<CountJump> {
    let (opcode, is_short) = match code {
        Code::Loopne_rel8_64_RCX => (0xe0, false),
        Code::Loopne_rel8_64_ECX => (0xe0, true),
        Code::Loope_rel8_64_RCX => (0xe1, false),
        Code::Loope_rel8_64_ECX => (0xe1, true),
        Code::Loop_rel8_64_RCX => (0xe2, false),
        Code::Loop_rel8_64_ECX => (0xe2, true),
        Code::Jrcxz_rel8_64 => (0xe3, false),
        Code::Jecxz_rel8_64 => (0xe3, true),
        _ => return None,
    };
    Some(CountJump { opcode, is_short })
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
    if matches!(iced.code(), Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg)
        && address_is_long(iced)
    {
        return Some(System::StoreSelector(iced.op1_register().number() as u8));
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
            Register::CR8 => Some(System::ReadPriority(iced.op0_register().number() as u8)),
            _ => None,
        },
        Code::Mov_cr_r64 if iced.op0_register() == Register::CR8 => {
            Some(System::WritePriority(iced.op1_register().number() as u8))
        }
        Code::Iretq => Some(System::InterruptReturn),
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
