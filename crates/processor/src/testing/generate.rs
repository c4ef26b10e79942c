//! Makes random instruction sequences: random bytes in the shape of instructions, of which those are kept that a user
//! program may run and whose memory operands lie in the arena.

use iced_x86::{
    Code, ConstantOffsets, CpuidFeature as F, Decoder, DecoderOptions, FlowControl, Instruction,
    InstructionInfoFactory, Mnemonic, OpKind, Register,
};

use super::flags;
use super::random::Random;
use super::sequence::{Fix, Item, Kinds, Sequence};
use crate::native::sequence::{CONSTANT_OFFSET, DATA_OFFSET, DATA_SIZE};
use crate::simd::features;

/// A memory operand's bytes.
struct Form {
    /// ModRM without the reg field, SIB, displacement.
    bytes: Vec<u8>,
    b: u8,
    x: u8,
    /// What must run before it: keeps an index small.
    setup: Item,
    index: Option<u8>,
    arena: Option<i64>,
}

const RSP: u8 = 4;

pub struct Generator {
    pub(super) random: Random,
    pub(super) kinds: Kinds,
    pub(super) factory: InstructionInfoFactory,
    pub(super) pointers: [u8; 2],
    /// The sequence has an instruction that loads FPU state.
    pub(super) has_loaded: bool,
}

impl Generator {
    #[must_use]
    pub fn new(seed: u64, kinds: Kinds) -> Generator {
        let mut random = Random::new(seed);
        let mut candidates: Vec<u8> = (0..16).filter(|r| *r != RSP).collect();
        let first = candidates.remove(random.below(candidates.len()));
        let second = candidates.remove(random.below(candidates.len()));
        Generator {
            random,
            kinds,
            factory: InstructionInfoFactory::new(),
            pointers: [first, second],
            has_loaded: false,
        }
    }

    pub fn sequence(&mut self) -> Sequence {
        let pointers = self.pointers.map(usize::from);
        let length = 1 + self.random.below(24);
        let mut best = Sequence::assemble(Vec::new(), pointers).unwrap_or_else(|| unreachable!("an empty sequence"));
        while best.len() < length {
            let mut items = best.items.clone();
            let item = self.item();
            items.push(item);
            // An item that reads undefined flags is not taken.
            if let Some(longer) = Sequence::assemble(items, pointers) {
                best = longer;
            }
        }
        best
    }

    fn item(&mut self) -> Item {
        loop {
            if self.kinds.state
                && self.random.chance(60)
                && let Some(item) = self.state()
            {
                return item;
            }
            let item = match self.random.below(if self.kinds.integer { 100 } else { 74 }) {
                0..74 => self.plain(),
                74..82 => Some(self.skip()),
                82..86 => self.repeat(),
                86..90 => self.call(),
                90..95 => self.string(),
                95..97 => Some(self.pop_flags()),
                _ => self.divide(),
            };
            if let Some(item) = item {
                return item;
            }
        }
    }

    fn place(&mut self) -> i64 {
        let place = if self.random.chance(4) {
            CONSTANT_OFFSET + self.random.below(0x800)
        } else {
            DATA_OFFSET + 0x1000 + self.random.below(DATA_SIZE - 0x2000)
        };
        self.aligned(place as i64)
    }

    pub(super) fn aligned(&mut self, value: i64) -> i64 {
        // Mostly aligned, or most sequences with SSE would end early.
        let any: &[i64] = if self.kinds.integer { &[1, 1, 8, 16, 32, 64] } else { &[1, 16, 16, 32, 32, 64, 64, 64] };
        let alignment = self.random.pick(any);
        value & !(alignment - 1)
    }

    pub(super) fn is_pointer(&self, register: u8) -> bool {
        register == RSP || self.pointers.contains(&register)
    }

    /// A memory operand relative to a pointer, with or without index, or to RIP.
    fn form(&mut self) -> Form {
        let mut form = Form { bytes: vec![], b: 0, x: 0, setup: Item::default(), index: None, arena: None };
        if self.random.chance(15) {
            form.bytes = vec![5, 0, 0, 0, 0];
            form.arena = Some(self.place());
            return form;
        }
        let base = self.random.pick(&[self.pointers[0], self.pointers[1], self.pointers[0], RSP]);
        form.b = base >> 3;
        let wide = self.random.chance(30);
        let none = !wide && base & 7 != 5 && self.random.chance(20);
        let mode = if none {
            0
        } else if wide {
            0x80
        } else {
            0x40
        };
        let index = self.random.byte() & 15;
        if self.random.chance(25) && !self.is_pointer(index) {
            form.index = Some(index);
            form.x = index >> 3;
            form.bytes = vec![mode | 4, self.random.byte() & 0xc0 | (index & 7) << 3 | base & 7];
            // movsx or movzx index, its low byte: indexes stay small, flags stay as they are.
            let opcode = self.random.pick(&[0xb6, 0xbe]);
            form.setup = Item::of(&extend_low(index, opcode));
        } else if base & 7 == 4 {
            form.bytes = vec![mode | 4, 0x20 | base & 7];
        } else {
            form.bytes = vec![mode | base & 7];
        }
        if wide {
            let displacement = self.random.below(0x800) as i64 - 0x400;
            form.bytes.extend_from_slice(&(self.aligned(displacement) as i32).to_le_bytes());
        } else if !none {
            let displacement = i64::from(self.random.byte() as i8);
            form.bytes.push(self.aligned(displacement) as u8);
        }
        form
    }

    /// One random instruction, perhaps with what makes its memory operand safe.
    pub(super) fn plain(&mut self) -> Option<Item> {
        for _ in 0..4000 {
            if let Some(item) = self.attempt() {
                return Some(item);
            }
        }
        None
    }

    fn attempt(&mut self) -> Option<Item> {
        let form = self.random.chance(50).then(|| self.form());
        let (b, x) = match &form {
            Some(form) => (form.b, form.x),
            None => (self.random.byte() & 1, self.random.byte() & 1),
        };
        let kinds = self.kinds;
        let simd = !kinds.integer || (kinds != Kinds::INTEGER && self.random.chance(50));
        let mut bytes = Vec::with_capacity(24);
        let is_padded = form.is_none() && self.random.chance(6);
        if is_padded {
            // Without an address, its size means nothing.
            bytes.push(0x67);
        }
        if self.random.chance(if kinds.avx && simd { 50 } else { 5 }) {
            let map = self.random.pick(&[1, 2, 2, 3]);
            self.vex(&mut bytes, map, b, x);
        } else {
            self.legacy(&mut bytes, simd, b, x);
        }
        let reg = self.random.byte() & 7;
        match &form {
            Some(form) => {
                bytes.push(form.bytes[0] | reg << 3);
                bytes.extend_from_slice(&form.bytes[1..]);
            }
            None => bytes.push(0xc0 | reg << 3 | self.random.byte() & 7),
        }
        let mut immediate = [0; 8];
        self.random.fill(&mut immediate);
        bytes.extend_from_slice(&immediate);
        let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.is_invalid() || !self.allows(&instruction, form.as_ref()) {
            return None;
        }
        if is_padded && (0..instruction.op_count()).any(|operand| is_memory(instruction.op_kind(operand))) {
            return None;
        }
        let offsets = decoder.get_constant_offsets(&instruction);
        bytes.truncate(instruction.len());
        Some(self.complete(&instruction, &offsets, bytes, form))
    }

    fn legacy(&mut self, bytes: &mut Vec<u8>, simd: bool, b: u8, x: u8) {
        let random = &mut self.random;
        if random.chance(8) && !simd {
            bytes.push(0xf0);
        }
        let opcode = random.byte();
        let (map, repeat) =
            if simd { (random.below(10), 45) } else { (random.pick(&[0, 0, 0, 0, 3, 3, 3, 8, 9, 0]), 8) };
        let x87 = simd && map < 3 && self.kinds.x87;
        if random.chance(if x87 { 2 } else { 25 }) {
            bytes.push(0x66);
        }
        if random.chance(if x87 { 2 } else { repeat }) {
            bytes.push(random.pick(&[0xf2, 0xf3]));
        }
        let w = random.byte() & 1;
        if b | x != 0 || random.chance(60) {
            bytes.push(0x40 | w << 3 | (random.byte() & 1) << 2 | x << 1 | b);
        }
        if x87 {
            bytes.push(0xd8 | opcode & 7);
            return;
        }
        match map {
            0 => {}
            8 => bytes.extend_from_slice(&[0x0f, 0x38]),
            9 => bytes.extend_from_slice(&[0x0f, 0x3a]),
            _ => bytes.push(0x0f),
        }
        bytes.push(opcode);
    }

    fn vex(&mut self, bytes: &mut Vec<u8>, map: u8, b: u8, x: u8) {
        let random = &mut self.random;
        let r = random.byte() & 1;
        let vvvv = if random.chance(40) { 15 } else { random.byte() & 15 };
        let (w, l, pp) = (random.byte() & 1, random.byte() & 1, random.byte() & 3);
        if map == 1 && b | x | w == 0 && random.chance(50) {
            bytes.extend_from_slice(&[0xc5, (r ^ 1) << 7 | vvvv << 3 | l << 2 | pp]);
        } else {
            bytes.push(0xc4);
            bytes.push((r ^ 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | map);
            bytes.push(w << 7 | vvvv << 3 | l << 2 | pp);
        }
        bytes.push(random.byte());
    }

    /// Adds what an instruction needs before it, and says what depends on its place.
    fn complete(
        &mut self,
        instruction: &Instruction,
        offsets: &ConstantOffsets,
        bytes: Vec<u8>,
        form: Option<Form>,
    ) -> Item {
        let mut own = Item { bytes, fixes: vec![] };
        let mut item = Item::default();
        if let Some(form) = form {
            // What looked like a ModRM may have become an immediate.
            if let Some(arena) = form.arena.filter(|_| instruction.is_ip_rel_memory_operand()) {
                let end = own.bytes.len();
                own.fixes.push(Fix::Place { at: offsets.displacement_offset(), end, arena });
            }
            item.append(&form.setup);
        }
        if is_bit_string(instruction) {
            // movsx of the bit number's low half: +-4 KiB from the base.
            let number = instruction.op1_register().full_register().number() as u8;
            item.append(&Item::of(&extend_low(number, 0xbf)));
        }
        if instruction.is_vsib() {
            // vmovdqu index, [rip+...]: small numbers from the constants.
            let number = instruction.memory_index().number() as u8;
            let arena = CONSTANT_OFFSET + 0x800 + 32 * self.random.below(32);
            item.append(&Item {
                bytes: vec![0xc5, if number < 8 { 0xfe } else { 0x7e }, 0x6f, 5 | (number & 7) << 3, 0, 0, 0, 0],
                fixes: vec![Fix::Place { at: 4, end: 8, arena: arena as i64 }],
            });
        }
        item.append(&own);
        item
    }

    fn allows(&mut self, instruction: &Instruction, form: Option<&Form>) -> bool {
        if instruction.flow_control() != FlowControl::Next
            || instruction.is_privileged()
            || is_denied(instruction)
            || !self.has_features(instruction)
        {
            return false;
        }
        for operand in 0..instruction.op_count() {
            match instruction.op_kind(operand) {
                OpKind::Memory => {
                    // The ModRM of the form may not have become one.
                    let Some(form) = form else { return false };
                    if !self.is_safe(instruction, form) {
                        return false;
                    }
                }
                OpKind::Register => {
                    let register = instruction.op_register(operand);
                    if register.is_segment_register() || register.is_cr() || register.is_dr() {
                        return false;
                    }
                    if instruction.is_stack_instruction()
                        && register.full_register() == Register::RSP
                        && operand == 0
                        && instruction.mnemonic() == Mnemonic::Pop
                    {
                        return false;
                    }
                }
                kind => {
                    if matches!(kind, OpKind::FarBranch16 | OpKind::FarBranch32)
                        || (kind as u32) >= (OpKind::MemorySegSI as u32) && kind != OpKind::Memory && is_memory(kind)
                    {
                        return false;
                    }
                }
            }
        }
        let register = |number: u8| Register::RAX + u32::from(number);
        let pointers = self.pointers;
        if pointers.iter().any(|p| flags::writes(&mut self.factory, instruction, register(*p))) {
            return false;
        }
        instruction.is_stack_instruction() || !flags::writes(&mut self.factory, instruction, Register::RSP)
    }

    fn is_safe(&self, instruction: &Instruction, form: &Form) -> bool {
        if instruction.segment_prefix() != Register::None {
            return false;
        }
        let number = |register: Register| register.full_register().number() as u8;
        if instruction.is_vsib() {
            let near = (instruction.memory_displacement64() as i64).unsigned_abs() <= 0x400;
            return near && form.index.is_some() && self.is_pointer(number(instruction.memory_base()));
        }
        if is_bit_string(instruction) {
            let bit = number(instruction.op1_register());
            // The index is made small too, and the two would be in each other's way.
            if self.is_pointer(bit) || form.index.is_some() {
                return false;
            }
        }
        if instruction.is_ip_rel_memory_operand() {
            return form.arena.is_some();
        }
        // What was meant as ModRM and displacement may have been decoded as something else.
        let near = (instruction.memory_displacement64() as i64).unsigned_abs() <= 0x400;
        if form.arena.is_some() || instruction.memory_base() == Register::None || !near {
            return false;
        }
        let index = instruction.memory_index();
        let index = (index != Register::None).then(|| number(index));
        self.is_pointer(number(instruction.memory_base())) && index == form.index
    }

    fn has_features(&self, instruction: &Instruction) -> bool {
        let mut any_x87 = false;
        let mut any_sse = false;
        let mut any_avx = false;
        for feature in instruction.cpuid_features() {
            match feature {
                F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CMOV
                | F::CX8
                | F::MULTIBYTENOP
                | F::PREFETCHW
                | F::PAUSE => {}
                F::BMI1 | F::BMI2 | F::ADX | F::POPCNT | F::LZCNT | F::MOVBE | F::CMPXCHG16B => {
                    if !self.has_integer(*feature) {
                        return false;
                    }
                }
                F::FPU | F::FPU287 | F::FPU387 => any_x87 = true,
                F::AVX | F::AVX2 | F::FMA | F::F16C | F::VAES | F::VPCLMULQDQ => {
                    any_avx = true;
                    if !features::is_offered(*feature) {
                        return false;
                    }
                }
                _ if features::is_offered(*feature) => any_sse = true,
                _ => return false,
            }
        }
        let integer_sse = matches!(
            instruction.mnemonic(),
            Mnemonic::Crc32 | Mnemonic::Movnti | Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence
        );
        if self.kinds.state && instruction.mnemonic() == Mnemonic::Wait {
            // It makes the x87 count as in use.
            return false;
        }
        if integer_sse || !(any_x87 || any_sse || any_avx) {
            return self.kinds.integer;
        }
        if any_x87 {
            return self.kinds.x87;
        }
        if any_avx { self.kinds.avx } else { self.kinds.sse }
    }

    fn has_integer(&self, feature: F) -> bool {
        match feature {
            F::BMI1 => std::is_x86_feature_detected!("bmi1"),
            F::BMI2 => std::is_x86_feature_detected!("bmi2"),
            F::ADX => std::is_x86_feature_detected!("adx"),
            F::POPCNT => std::is_x86_feature_detected!("popcnt"),
            F::LZCNT => std::is_x86_feature_detected!("lzcnt"),
            F::MOVBE => std::is_x86_feature_detected!("movbe"),
            _ => std::is_x86_feature_detected!("cmpxchg16b"),
        }
    }
}

/// movsx or movzx (0F `opcode`) of a 64-bit register from its own low part.
fn extend_low(register: u8, opcode: u8) -> [u8; 4] {
    let (high, low) = (register >> 3, register & 7);
    [0x48 | high << 2 | high, 0x0f, opcode, 0xc0 | low << 3 | low]
}

fn is_memory(kind: OpKind) -> bool {
    !matches!(
        kind,
        OpKind::Register
            | OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

fn is_bit_string(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && instruction.op0_kind() == OpKind::Memory
        && instruction.op1_kind() == OpKind::Register
}

/// Instructions whose result is not the same everywhere or is not defined, or that reach outside the arena.
fn is_denied(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Cpuid
        | M::Rdtsc
        | M::Rdtscp
        | M::Rdpmc
        | M::Rdrand
        | M::Rdseed
        | M::Rdpid
        | M::Xgetbv
        | M::Syscall
        | M::Sysenter
        | M::Sgdt
        | M::Sidt
        | M::Sldt
        | M::Str
        | M::Smsw
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Enter
        | M::Leave
        | M::Popf
        | M::Popfq
        | M::Popfd
        | M::Xlatb
        | M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Lss
        | M::Lfs
        | M::Lgs
        | M::Cli
        | M::Sti
        | M::In
        | M::Out
        | M::Hlt
        | M::Ud0
        | M::Ud1
        | M::Ud2
        | M::Xabort
        | M::Xbegin
        | M::Xend
        | M::Xtest => true,
        // These hold or show instruction pointers.
        M::Fnstenv
        | M::Fldenv
        | M::Fnsave
        | M::Frstor
        | M::Fstenv
        | M::Fsave
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xrstor
        | M::Xrstor64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstors
        | M::Xrstors64 => true,
        // Undefined results: 16-bit byte swap, double shifts of 16 bits by more.
        M::Bswap => instruction.code() == Code::Bswap_r16,
        M::Shld | M::Shrd => {
            let small = instruction.op1_register().size() == 2;
            small && (instruction.op2_kind() == OpKind::Register || instruction.immediate8() & 31 > 16)
        }
        // SSE4.2 string compares and others that read RAX/RDX are fine; CLFLUSH and its kin are nothing to compare.
        M::Clflush | M::Clflushopt | M::Clwb => true,
        _ => false,
    }
}
