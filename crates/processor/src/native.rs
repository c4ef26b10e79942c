//! Runs one guest SIMD or x87 instruction on the host's processor, exactly: no softfloat can be more right than it.
//!
//! Contract (this file and `native/` hold unsafe code): each distinct instruction becomes a slot of 16 bytes of code, the
//! instruction and a RET, with its memory operand replaced by `[rsi]` and its general-register operand by RBX. Slots live
//! in an arena that is mapped twice, writable here and executable there. [`run`] loads the guest's FPU state into the
//! processor, calls a slot with RSI at a buffer of ours as large as the largest operand, and saves the state back, so a
//! slot touches nothing but registers and that buffer. Only instructions of a fixed list of extensions become slots, all
//! of which the host has ([`crate::simd::features`]), so none is undefined; the buffer is aligned, so none faults; SIMD
//! exceptions are masked by the caller, and x87 exceptions stay pending until a waiting instruction, which is not run.
//!
//! A slot is made once for each instruction, so the cost of a run is that of XRSTOR and XSAVE.

use std::arch::x86_64::__cpuid;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::mem::offset_of;

use host::map::{self, Map, Protection};
use iced_x86::{Encoder, Instruction, OpKind, Register};
use x86::FpuArea;

#[cfg(feature = "testing")]
pub mod sequence;

const SLOT: usize = 16;
/// Room for 64 Ki instructions; a guest that makes more starts the arena anew. Tests fill a small one.
const ARENA: usize = if cfg!(test) { 16 << 10 } else { 1 << 20 };

/// The largest memory operand is the 108 bytes of FNSAVE.
pub const BUFFER: usize = 128;

/// What an instruction works on beside the FPU state.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Operands {
    /// The memory operand.
    pub memory: [u8; BUFFER],
    /// The explicit general register.
    pub register: u64,
    /// RAX, RCX, RDX, for instructions that name them implicitly.
    pub implicit: [u64; 3],
    /// Arithmetic flags.
    pub rflags: u64,
    mask: u64,
}

impl Operands {
    #[must_use]
    pub fn new() -> Operands {
        Operands { memory: [0; BUFFER], register: 0, implicit: [0; 3], rflags: 2, mask: host_components() }
    }
}

impl Default for Operands {
    fn default() -> Self {
        Operands::new()
    }
}

/// The state components of ours that the host has enabled: x87 and SSE, and AVX where there is AVX.
fn host_components() -> u64 {
    if std::is_x86_feature_detected!("avx") { 7 } else { 3 }
}

/// Loads the guest's state from `area` (RDI), calls `slot` (RCX) with RSI at the memory operand (the first field of
/// `operands`, RDX = RSI), and saves everything back. What the C ABI wants kept is kept: MXCSR, the x87 control word, and
/// an empty x87 stack.
#[unsafe(naked)]
unsafe extern "sysv64" fn call(area: *mut FpuArea, memory: *mut u8, operands: *mut Operands, slot: *const u8) {
    std::arch::naked_asm!(
        "push rbx", "push r12", "push r13", "push r14", "push r15",
        "sub rsp, 16",
        "stmxcsr [rsp]",
        "fnstcw [rsp + 8]",
        "mov r12, rdx",
        "mov r13, rdi",
        "mov r14, rcx",
        "mov r15, [r12 + {mask}]",
        "mov eax, r15d",
        "xor edx, edx",
        "xrstor64 [r13]",
        "push qword ptr [r12 + {rflags}]",
        "popfq",
        "mov rbx, [r12 + {register}]",
        "mov rax, [r12 + {implicit}]",
        "mov rcx, [r12 + {implicit} + 8]",
        "mov rdx, [r12 + {implicit} + 16]",
        "call r14",
        "pushfq",
        "pop qword ptr [r12 + {rflags}]",
        "mov [r12 + {register}], rbx",
        "mov [r12 + {implicit}], rax",
        "mov [r12 + {implicit} + 8], rcx",
        "mov [r12 + {implicit} + 16], rdx",
        "mov eax, r15d",
        "xor edx, edx",
        "xsave64 [r13]",
        "fninit",
        "fldcw [rsp + 8]",
        "test r15d, 4",
        "jz 2f",
        "vzeroupper",
        "2: ldmxcsr [rsp]",
        "add rsp, 16",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbx",
        "ret",
        mask = const offset_of!(Operands, mask),
        rflags = const offset_of!(Operands, rflags),
        register = const offset_of!(Operands, register),
        implicit = const offset_of!(Operands, implicit),
    )
}

/// An instruction that is ready to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    offset: u32,
    /// The arena's generation: a slot of an earlier one is void.
    generation: u32,
}

struct Arena {
    code: Map,
    /// The same pages, writable.
    alias: Map,
    _file: File,
    used: usize,
    generation: u32,
    slots: HashMap<[u8; SLOT], u32>,
}

thread_local! {
    /// One arena a thread, so that VCPUs need no lock.
    static ARENAS: RefCell<Option<Arena>> = const { RefCell::new(None) };
}

impl Arena {
    fn new() -> io::Result<Arena> {
        let file = map::memfd(c"ringzero-native", ARENA as u64)?;
        let alias = Map::shared(&file, ARENA, Protection::ReadWrite)?;
        let code = Map::shared(&file, ARENA, Protection::ReadExecute)?;
        Ok(Arena { code, alias, _file: file, used: 0, generation: 1, slots: HashMap::new() })
    }

    fn place(&mut self, bytes: [u8; SLOT]) -> Slot {
        if let Some(offset) = self.slots.get(&bytes) {
            return Slot { offset: *offset, generation: self.generation };
        }
        if self.used + SLOT > ARENA {
            self.used = 0;
            self.generation = self.generation.wrapping_add(1);
            self.slots.clear();
        }
        let offset = self.used as u32;
        // SAFETY: inside the alias; no slot of this thread's arena runs now.
        unsafe { self.alias.base().as_ptr().add(self.used).copy_from_nonoverlapping(bytes.as_ptr(), SLOT) };
        // Intel SDM (2024-12) Vol. 3A 10.1.3 "Handling Self- and Cross-Modifying Code": code that was written through
        // another linear address needs a serializing instruction before it runs.
        let _ = __cpuid(0);
        self.used += SLOT;
        self.slots.insert(bytes, offset);
        Slot { offset, generation: self.generation }
    }
}

/// This module's part of [`crate::prepare`].
pub fn make_tables() {
    let nop = Instruction::with(iced_x86::Code::Nopd);
    // What comes of it does not matter: the first encoding makes the tables.
    let _ = Encoder::new(64).encode(&nop, 0);
}

/// The general register that `instruction` names, by operand, if any.
#[must_use]
pub fn general_operand(instruction: &Instruction) -> Option<(u32, Register)> {
    (0..instruction.op_count()).find_map(|operand| {
        let register = instruction.op_register(operand);
        (instruction.op_kind(operand) == OpKind::Register && register.is_gpr()).then_some((operand, register))
    })
}

/// RBX in the size of `register`.
fn stand_in(register: Register) -> Register {
    match register.size() {
        8 => Register::RBX,
        4 => Register::EBX,
        2 => Register::BX,
        _ => Register::BL,
    }
}

/// Makes `instruction` ready to run; `keep_register` leaves its general register as it is, because the encoding names it
/// implicitly. `None` when it cannot be put into a slot.
///
/// # Errors
/// The system's, when it gives us no executable memory.
pub(crate) fn prepare(instruction: &Instruction, keep_register: bool) -> io::Result<Option<Slot>> {
    let mut copy = *instruction;
    copy.set_segment_prefix(Register::None);
    for operand in 0..copy.op_count() {
        if copy.op_kind(operand) == OpKind::Memory {
            copy.set_memory_base(Register::RSI);
            copy.set_memory_index(Register::None);
            copy.set_memory_index_scale(1);
            copy.set_memory_displacement64(0);
            copy.set_memory_displ_size(0);
        }
    }
    if let Some((operand, register)) = general_operand(instruction).filter(|_| !keep_register) {
        copy.set_op_register(operand, stand_in(register));
    }
    let mut encoder = Encoder::new(64);
    let Ok(length) = encoder.encode(&copy, 0) else { return Ok(None) };
    let code = encoder.take_buffer();
    if length >= SLOT {
        return Ok(None);
    }
    let mut bytes = [0xc3; SLOT];
    bytes[..length].copy_from_slice(&code[..length]);
    ARENAS.with_borrow_mut(|arena| {
        let arena = match arena {
            Some(arena) => arena,
            None => arena.insert(Arena::new()?),
        };
        Ok(Some(arena.place(bytes)))
    })
}

/// Whether a slot is still what it was made of.
#[must_use]
pub(crate) fn is_current(slot: Slot) -> bool {
    ARENAS.with_borrow(|arena| arena.as_ref().is_some_and(|arena| arena.generation == slot.generation))
}

/// Runs a slot on `area` and `operands`; false, with nothing done, when it is not current. `area` has a valid MXCSR with
/// all exceptions masked, and no unmasked x87 exception pending unless the instruction does not wait.
pub(crate) fn run(slot: Slot, area: &mut FpuArea, operands: &mut Operands) -> bool {
    ARENAS.with_borrow(|arena| {
        let Some(arena) = arena.as_ref().filter(|arena| arena.generation == slot.generation) else { return false };
        let mask = host_components();
        operands.mask = mask;
        // What XRSTOR faults on is made regular, whatever the guest's area holds.
        area.bytes[FpuArea::XSTATE_BV..FpuArea::XSTATE_BV + 64].fill(0);
        area.bytes[FpuArea::XSTATE_BV] = mask as u8;
        area.bytes[FpuArea::MXCSR + 2..FpuArea::MXCSR + 4].fill(0);
        // SAFETY: the slot is inside the arena and holds an instruction and a RET (`place`); the area is aligned, its header
        // and MXCSR are valid; by the contract above the instruction touches only registers and the buffer.
        unsafe {
            let code = arena.code.base().as_ptr().add(slot.offset as usize);
            call(&raw mut *area, (&raw mut operands.memory).cast(), &raw mut *operands, code);
        }
        area.bytes[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
        area.bytes[FpuArea::XSTATE_BV] = 7;
        true
    })
}
