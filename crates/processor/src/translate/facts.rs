//! What is the same for every instruction of one code: found once with iced's tables of operands and implied registers,
//! which cost more to ask than all else that is done to translate an instruction.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpCodeOperandKind, OpKind, Register,
};

use super::encode::slot_of;

/// How an instruction is classed by its code alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Copied, on general registers and memory.
    Plain,
    /// Copied, on x87, MMX, SSE or AVX state; `vex` when it needs AVX enabled.
    Simd {
        vex: bool,
    },
    Lea,
    /// A direct conditional jump.
    JumpIf,
    PushReg,
    PopReg,
    /// Has to be looked at.
    Other,
}

/// Which operands an instruction reads or writes, and which registers it writes beside those it names.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    pub class: Class,
    pub is_simd: bool,
    /// A bit for each operand that is read, and that is written, perhaps on a condition.
    pub reads: u8,
    pub writes: u8,
    /// A bit for each general register that is written though no operand names it freely.
    pub implied_writes: u16,
}

/// The facts of the codes that were seen.
pub struct Table {
    known: Vec<Option<Facts>>,
    factory: InstructionInfoFactory,
}

impl Table {
    pub fn new() -> Table {
        Table { known: vec![None; Code::values().len()], factory: InstructionInfoFactory::new() }
    }

    pub fn of(&mut self, iced: &Instruction) -> Facts {
        let index = iced.code() as usize;
        if let Some(facts) = self.known[index] {
            return facts;
        }
        let facts = self.find(iced);
        self.known[index] = Some(facts);
        facts
    }

    fn find(&mut self, iced: &Instruction) -> Facts {
        let general = with_rare_registers(iced);
        let info = self.factory.info_options(&general, InstructionInfoOptions::NONE);
        let (mut reads, mut writes, mut implied_writes) = (0, 0, 0);
        for operand in 0..general.op_count() {
            let access = info.op_access(operand);
            reads |= u8::from(is_read(access)) << operand;
            writes |= u8::from(is_written(access)) << operand;
        }
        for used in info.used_registers() {
            let full = used.register().full_register();
            if is_written(used.access()) && full.is_gpr64() && !RARE.contains(&full) {
                implied_writes |= 1 << full.number();
            }
        }
        let is_simd = is_simd(iced);
        Facts { class: class(iced, is_simd), is_simd, reads, writes, implied_writes }
    }
}

fn is_written(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

fn is_read(access: OpAccess) -> bool {
    matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// No instruction writes these unless it names them.
const RARE: [Register; 3] = [Register::R12, Register::R13, Register::R14];

/// The instruction with different rare registers in place of the general ones that its operands name freely, so that what
/// is written beside them shows, and no two operands are the same (XOR of a register with itself reads nothing).
fn with_rare_registers(iced: &Instruction) -> Instruction {
    let mut general = *iced;
    let info = iced.code().op_code();
    for operand in 0..iced.op_count() {
        if iced.op_kind(operand) != OpKind::Register || slot_of(info.op_kind(operand)) == 0 {
            continue;
        }
        use Register as R;
        let register = iced.op_register(operand);
        let rare = if register.is_gpr64() {
            RARE
        } else if register.is_gpr32() {
            [R::R12D, R::R13D, R::R14D]
        } else if register.is_gpr16() {
            [R::R12W, R::R13W, R::R14W]
        } else {
            [R::R12L, R::R13L, R::R14L]
        };
        general.set_op_register(operand, rare[(operand as usize).min(2)]);
    }
    general
}

/// Whether an instruction works on x87, MMX, SSE or AVX state: it has an operand there, be it in memory this time, or needs
/// the control words.
fn is_simd(iced: &Instruction) -> bool {
    let info = iced.code().op_code();
    (0..iced.op_count()).any(|operand| is_simd_operand(info.op_kind(operand)))
        || iced.cpuid_features().iter().any(|feature| {
            use CpuidFeature as F;
            matches!(feature, F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::AVX | F::AVX2)
        })
        || matches!(iced.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Emms)
}

fn is_simd_operand(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        kind,
        K::mm_reg
            | K::mm_rm
            | K::mm_or_mem
            | K::xmm_reg
            | K::xmm_rm
            | K::xmm_vvvv
            | K::xmm_is4
            | K::xmm_is5
            | K::xmm_or_mem
            | K::ymm_reg
            | K::ymm_rm
            | K::ymm_vvvv
            | K::ymm_is4
            | K::ymm_is5
            | K::ymm_or_mem
            | K::st0
            | K::sti_opcode
    )
}

/// Whether all registers that an instruction names are general ones or of SIMD state.
pub fn registers_are_plain(iced: &Instruction) -> bool {
    (0..iced.op_count()).all(|operand| {
        iced.op_kind(operand) != OpKind::Register || {
            let register = iced.op_register(operand);
            !register.is_segment_register()
                && !register.is_cr()
                && !register.is_dr()
                && !register.is_k()
                && !register.is_bnd()
                && !register.is_tr()
        }
    })
}

fn class(iced: &Instruction, is_simd: bool) -> Class {
    if !registers_are_plain(iced) || has_absolute_address(iced) {
        return Class::Other;
    }
    if is_simd {
        return simd_class(iced);
    }
    if iced.is_jcc_short_or_near() && iced.op_kind(0) == OpKind::NearBranch64 {
        return Class::JumpIf;
    }
    if iced.flow_control() != FlowControl::Next {
        return Class::Other;
    }
    match iced.code() {
        Code::Push_r64 => Class::PushReg,
        Code::Pop_r64 => Class::PopReg,
        Code::Lea_r64_m | Code::Lea_r32_m => Class::Lea,
        _ if is_copied(iced.mnemonic()) && !is_string(iced) => Class::Plain,
        _ => Class::Other,
    }
}

fn is_string(iced: &Instruction) -> bool {
    (0..iced.op_count()).any(|operand| {
        !matches!(
            iced.op_kind(operand),
            OpKind::Register
                | OpKind::Memory
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
    })
}

/// A 64-bit absolute address stays with the interpreter.
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

/// Instructions on general registers that do the same in translated code as in the guest. Those that address bits of
/// memory by a register (BT and its kin) are looked at apart.
fn is_copied(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Mul
            | M::Imul
            | M::Div
            | M::Idiv
            | M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Movbe
            | M::Movnti
            | M::Bswap
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Bsf
            | M::Bsr
            | M::Tzcnt
            | M::Lzcnt
            | M::Popcnt
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Lahf
            | M::Sahf
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Lfence
            | M::Mfence
            | M::Sfence
            | M::Crc32
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
            | M::Adcx
            | M::Adox
            | M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovne
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
            | M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setne
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
    )
}

fn simd_class(iced: &Instruction) -> Class {
    use CpuidFeature as F;
    use Mnemonic as M;
    // Store images with addresses of the host, fault where a mask says not to, or need care of their own.
    let is_special = matches!(
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
    );
    if is_special || iced.is_vsib() || iced.flow_control() != FlowControl::Next {
        return Class::Other;
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
    match iced.encoding() {
        EncodingKind::Legacy if known => Class::Simd { vex: false },
        EncodingKind::VEX if known => Class::Simd { vex: true },
        _ => Class::Other,
    }
}

impl Facts {
    /// A bit for each general register that the instruction writes, as a whole or in part.
    pub fn written(&self, iced: &Instruction) -> u16 {
        let mut written = self.implied_writes;
        for operand in 0..iced.op_count() {
            if self.writes & 1 << operand != 0 && iced.op_kind(operand) == OpKind::Register {
                let full = iced.op_register(operand).full_register();
                if full.is_gpr64() {
                    written |= 1 << full.number();
                }
            }
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;
    use crate::testing::random::Random;

    /// Random bytes, most of them after an opcode map's escape or prefixes that matter.
    fn random_code(random: &mut Random) -> [u8; 15] {
        let mut code = [0; 15];
        random.fill(&mut code);
        let starts: [&[u8]; 8] =
            [&[], &[0x48], &[0x0f], &[0x48, 0x0f], &[0x66, 0x0f], &[0xf3, 0x0f], &[0xc4, 0xe2], &[0x66, 0x0f, 0x38]];
        let start = random.pick(&starts);
        code[..start.len()].copy_from_slice(start);
        code
    }

    #[test]
    fn the_table_says_of_an_instruction_what_its_own_analysis_says() {
        let mut table = Table::new();
        let mut factory = InstructionInfoFactory::new();
        let mut random = Random::new(1);
        let mut copied = 0;
        for _ in 0..300_000 {
            let code = random_code(&mut random);
            let iced = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE).decode();
            if iced.is_invalid() {
                continue;
            }
            let facts = table.of(&iced);
            assert_eq!(facts.is_simd, is_simd(&iced), "{iced:?}");
            assert_eq!(facts.class, class(&iced, facts.is_simd), "{iced:?}");
            if facts.class == Class::Other {
                continue;
            }
            copied += 1;
            let info = factory.info(&iced);
            let mut written = 0;
            for used in info.used_registers() {
                let full = used.register().full_register();
                if is_written(used.access()) && full.is_gpr64() {
                    written |= 1 << full.number();
                }
            }
            assert_eq!(facts.written(&iced), written, "registers that {iced:?} writes");
            for operand in 0..iced.op_count() {
                if iced.op_kind(operand) == OpKind::Memory && facts.class != Class::Lea {
                    let access = info.op_access(operand);
                    assert_eq!(facts.writes & 1 << operand != 0, is_written(access), "{iced:?}");
                    assert_eq!(facts.reads & 1 << operand != 0, is_read(access), "{iced:?}");
                }
            }
        }
        assert!(copied > 50_000, "only {copied} instructions were of a class that the table decides");
    }
}
