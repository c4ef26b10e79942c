//! What there is to know of a SIMD instruction before it runs, found once for each and remembered.

use std::cell::RefCell;
use std::io;

use iced_x86::{
    Code, CpuidFeature as F, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic as M, OpAccess, OpKind,
    Register,
};

use super::features;
use crate::native::{self, Slot};

/// Which rules hold for an instruction beside its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    X87,
    /// MMX registers: x87 exceptions that are pending come first, and the x87 stack is taken over.
    Mmx,
    Sse,
    Avx,
}

/// How it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Native(Slot),
    /// WAIT: nothing but the checks.
    Wait,
    /// (V)MASKMOVDQU, MASKMOVQ.
    MaskedBytes,
    /// VMASKMOV*, VPMASKMOV*: elements of 4 or 8 bytes.
    MaskedLoad(Slot),
    MaskedStore,
    Gather,
    /// Not an instruction for guests.
    Undefined,
}

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub kind: Kind,
    pub class: Class,
    /// An x87 instruction that looks for pending exceptions first.
    pub waits: bool,
    /// Touches the XMM registers, so that CR4.OSFXSR counts.
    pub xmm: bool,
    /// Bytes of the memory operand; 0: none.
    pub size: usize,
    pub reads: bool,
    pub writes: bool,
    /// What the operand's address must be a multiple of.
    pub alignment: u64,
    /// The explicit general register.
    pub register: Register,
    pub register_written: bool,
    /// Uses RAX, RCX, RDX implicitly.
    pub implicit: bool,
    pub flags: bool,
}

const ENTRIES: usize = 2048;

/// Most places stay empty.
type Cache = Box<[Option<Box<(Instruction, Plan)>>]>;

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::new(Box::default());
}

/// A place in the cache: the low bits of a mix of what tells instructions of a program apart.
fn place(i: &Instruction) -> usize {
    let registers = i.op0_register() as u32 | (i.op1_register() as u32) << 8 | (i.memory_base() as u32) << 16;
    let mix =
        u64::from(registers) << 16 ^ i.code() as u64 ^ i.memory_displacement64() << 20 ^ u64::from(i.immediate8()) << 9;
    (mix.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 53) as usize & (ENTRIES - 1)
}

/// The plan for `instruction`; `None` when it is not one of x87, MMX, SSE or AVX.
///
/// # Errors
/// The system's, when it gives us no executable memory.
pub fn find(instruction: &Instruction) -> io::Result<Option<Plan>> {
    CACHE.with_borrow_mut(|cache| {
        if cache.is_empty() {
            *cache = (0..ENTRIES).map(|_| None).collect();
        }
        let entry = &mut cache[place(instruction)];
        if let Some((known, plan)) = entry.as_deref()
            && known == instruction
        {
            let slot = match plan.kind {
                Kind::Native(slot) | Kind::MaskedLoad(slot) => Some(slot),
                _ => None,
            };
            if slot.is_none_or(native::is_current) {
                return Ok(Some(*plan));
            }
        }
        let plan = make(instruction)?;
        if let Some(plan) = plan {
            *entry = Some(Box::new((*instruction, plan)));
        }
        Ok(plan)
    })
}

/// Nothing was wanted for a while: gives back what this thread's plans take.
pub fn rest() {
    CACHE.with_borrow_mut(|cache| *cache = Box::default());
}

fn class(i: &Instruction) -> Class {
    let has = |wanted: &[F]| i.cpuid_features().iter().any(|feature| wanted.contains(feature));
    let mmx = (0..i.op_count()).any(|operand| i.op_kind(operand) == OpKind::Register && i.op_register(operand).is_mm());
    if i.encoding() == EncodingKind::VEX {
        Class::Avx
    } else if mmx || has(&[F::MMX]) {
        Class::Mmx
    } else if has(&[F::FPU, F::FPU287, F::FPU387]) {
        Class::X87
    } else {
        Class::Sse
    }
}

/// x87 instructions that do not wait for pending exceptions: Intel SDM (2024-12) Vol. 1 8.3.12.
fn waits(mnemonic: M) -> bool {
    !matches!(
        mnemonic,
        M::Fninit | M::Fnclex | M::Fnstsw | M::Fnstcw | M::Fnstenv | M::Fnsave | M::Fneni | M::Fndisi | M::Fnsetpm
    )
}

/// Alignment that the memory operand must have: Intel SDM Vol. 1 15.3 "Memory Alignment" for VEX; Vol. 2A 2.4 for the rest.
fn alignment(i: &Instruction, class: Class, size: usize) -> u64 {
    let always = matches!(
        i.mnemonic(),
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
    );
    let never = matches!(i.mnemonic(), M::Movups | M::Movupd | M::Movdqu | M::Lddqu) || is_string_compare(i);
    match class {
        Class::Avx if always => size as u64,
        Class::Sse | Class::Mmx if size == 16 && !never => 16,
        _ => 1,
    }
}

/// These name RAX, RCX and RDX implicitly.
fn is_string_compare(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Pcmpestri | M::Pcmpestri64 | M::Pcmpestrm | M::Pcmpestrm64 | M::Pcmpistri | M::Pcmpistrm)
        || matches!(
            i.mnemonic(),
            M::Vpcmpestri | M::Vpcmpestri64 | M::Vpcmpestrm | M::Vpcmpestrm64 | M::Vpcmpistri | M::Vpcmpistrm
        )
}

fn make(i: &Instruction) -> io::Result<Option<Plan>> {
    let is_wait = i.mnemonic() == M::Wait;
    let Some(offered) = features::judge(i).or(is_wait.then_some(true)) else { return Ok(None) };
    let class = if is_wait { Class::X87 } else { class(i) };
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    let mut plan = Plan {
        kind: Kind::Undefined,
        class,
        waits: class == Class::X87 && waits(i.mnemonic()),
        xmm: (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_xmm()),
        size: 0,
        reads: false,
        writes: false,
        alignment: 1,
        register: Register::None,
        register_written: false,
        implicit: is_string_compare(i) || i.code() == Code::Fnstsw_AX || i.code() == Code::Fstsw_AX,
        flags: (i.rflags_modified() | i.rflags_read()) != 0,
    };
    if !offered {
        return Ok(Some(plan));
    }
    for operand in 0..i.op_count() {
        let access = info.op_access(operand);
        let reads = !matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::None | OpAccess::NoMemAccess);
        let writes = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
        match i.op_kind(operand) {
            OpKind::Memory => {
                plan.size = i.memory_size().size();
                plan.reads = reads;
                plan.writes = writes;
                plan.alignment = alignment(i, class, plan.size);
            }
            OpKind::Register if i.op_register(operand).is_gpr() && !plan.implicit => {
                plan.register = i.op_register(operand);
                plan.register_written = writes;
            }
            _ => {}
        }
    }
    plan.kind = kind(i, &plan)?;
    Ok(Some(plan))
}

fn kind(i: &Instruction, plan: &Plan) -> io::Result<Kind> {
    if plan.size > native::BUFFER {
        return Ok(Kind::Undefined);
    }
    let masked = match i.mnemonic() {
        M::Wait => return Ok(Kind::Wait),
        M::Maskmovdqu | M::Vmaskmovdqu | M::Maskmovq => return Ok(Kind::MaskedBytes),
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => true,
        _ if i.is_vsib() => return Ok(Kind::Gather),
        _ => false,
    };
    if masked && plan.writes {
        return Ok(Kind::MaskedStore);
    }
    Ok(match native::prepare(i, plan.implicit)? {
        Some(slot) if masked => Kind::MaskedLoad(slot),
        Some(slot) => Kind::Native(slot),
        None => Kind::Undefined,
    })
}
