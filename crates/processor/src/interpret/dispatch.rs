//! Which function runs an instruction: looked up once, when it is decoded.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use x86::GuestFault;
use x86::rflags::{CF, OF};

use super::op::{Op, Run, kind};
use super::{Flow, arithmetic, bits, branch, decimal, multiply, other, port, shift, stack, string, transfer};
use crate::core::Core;

const REG: u8 = kind::REGISTER;
const MEM: u8 = kind::MEMORY;
const IMM: u8 = kind::IMMEDIATE;
const ANY: u8 = kind::ANY;

/// #UD: not an instruction, or one that the guest's processor does not have.
pub fn invalid(_: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    Err(GuestFault::UD)
}

/// Instantiates a handler for the operand size: `size!(op, path, [params before the size], [params after it])`. Sizes that
/// are not listed cannot be decoded.
macro_rules! size {
    ($size:expr, $($path:ident)::+, [$($before:expr),*], [$($after:expr),*]) => {
        match $size {
            1 => $($path)::+::<$({ $before },)* 1, $({ $after },)*> as Run,
            2 => $($path)::+::<$({ $before },)* 2, $({ $after },)*>,
            4 => $($path)::+::<$({ $before },)* 4, $({ $after },)*>,
            _ => $($path)::+::<$({ $before },)* 8, $({ $after },)*>,
        }
    };
    ($size:expr, $($path:ident)::+) => { size!($size, $($path)::+, [], []) };
    ($size:expr, $($path:ident)::+, [$($before:expr),*]) => { size!($size, $($path)::+, [$($before),*], []) };
}

/// As `size!`, without bytes.
macro_rules! wide {
    ($size:expr, $($path:ident)::+, [$($before:expr),*], [$($after:expr),*]) => {
        match $size {
            2 => $($path)::+::<$({ $before },)* 2, $({ $after },)*> as Run,
            4 => $($path)::+::<$({ $before },)* 4, $({ $after },)*>,
            _ => $($path)::+::<$({ $before },)* 8, $({ $after },)*>,
        }
    };
    ($size:expr, $($path:ident)::+) => { wide!($size, $($path)::+, [], []) };
    ($size:expr, $($path:ident)::+, [$($before:expr),*]) => { wide!($size, $($path)::+, [$($before),*], []) };
}

/// Instantiates a handler for the kinds of destination and source, too.
macro_rules! two_operands {
    ($op:expr, $($path:ident)::+, [$($before:expr),*]) => {
        match ($op.places[0].kind, $op.places[1].kind) {
            (REG, REG) => size!($op.size, $($path)::+, [$($before),*], [REG, REG]),
            (REG, IMM) => size!($op.size, $($path)::+, [$($before),*], [REG, IMM]),
            (REG, MEM) => size!($op.size, $($path)::+, [$($before),*], [REG, MEM]),
            (MEM, REG) => size!($op.size, $($path)::+, [$($before),*], [MEM, REG]),
            _ => size!($op.size, $($path)::+, [$($before),*], [ANY, ANY]),
        }
    };
}

macro_rules! binary {
    ($op:expr, $operation:ident) => {
        two_operands!($op, arithmetic::binary, [arithmetic::operation::$operation])
    };
}

macro_rules! step {
    ($op:expr, $down:expr) => {
        if $op.places[0].kind == REG {
            size!($op.size, arithmetic::step, [$down], [REG])
        } else {
            size!($op.size, arithmetic::step, [$down], [MEM])
        }
    };
}

/// The 16 instances of a handler that takes a condition.
macro_rules! condition {
    ($code:expr, |$cc:ident| $handler:expr) => {{
        macro_rules! with {
            ($value:literal) => {{
                const $cc: u8 = $value;
                $handler
            }};
        }
        match $code {
            0 => with!(0),
            1 => with!(1),
            2 => with!(2),
            3 => with!(3),
            4 => with!(4),
            5 => with!(5),
            6 => with!(6),
            7 => with!(7),
            8 => with!(8),
            9 => with!(9),
            10 => with!(10),
            11 => with!(11),
            12 => with!(12),
            13 => with!(13),
            14 => with!(14),
            _ => with!(15),
        }
    }};
}

/// The condition of Jcc, SETcc and CMOVcc, as encoded.
pub fn condition_code(instruction: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match instruction.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

/// Sets the handler of an instruction.
pub fn choose(op: &mut Op) {
    if let Some(run) = integer(op) {
        op.run = run;
    } else {
        op.run = other::run;
        op.sensitive = !other::is_simd(op);
    }
    let loads_segment = op.mnemonic() == Mnemonic::Pop && op.places[0].kind == kind::SEGMENT;
    op.sensitive |= loads_segment || matches!(op.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq);
}

fn integer(op: &Op) -> Option<Run> {
    Some(match op.mnemonic() {
        Mnemonic::Mov => return mov(op),
        Mnemonic::Lea => wide!(op.size, transfer::lea),
        Mnemonic::Add => binary!(op, ADD),
        Mnemonic::Or => binary!(op, OR),
        Mnemonic::Adc => binary!(op, ADC),
        Mnemonic::Sbb => binary!(op, SBB),
        Mnemonic::And => binary!(op, AND),
        Mnemonic::Sub => binary!(op, SUB),
        Mnemonic::Xor => binary!(op, XOR),
        Mnemonic::Cmp => binary!(op, CMP),
        Mnemonic::Test => binary!(op, TEST),
        Mnemonic::Inc => step!(op, false),
        Mnemonic::Dec => step!(op, true),
        Mnemonic::Neg => size!(op.size, arithmetic::neg),
        Mnemonic::Not => size!(op.size, arithmetic::not),
        Mnemonic::Adcx => wide!(op.size, arithmetic::add_with, [CF]),
        Mnemonic::Adox => wide!(op.size, arithmetic::add_with, [OF]),
        Mnemonic::Jmp => return jmp(op),
        Mnemonic::Call => return call(op),
        Mnemonic::Ret => wide!(op.size, branch::ret),
        _ if op.instruction.is_jcc_short_or_near() => {
            condition!(condition_code(&op.instruction), |CC| branch::jcc::<CC> as Run)
        }
        _ => return stack_and_strings(op).or_else(|| arithmetic_rest(op)).or_else(|| transfer_rest(op)),
    })
}

fn mov(op: &Op) -> Option<Run> {
    Some(match (op.places[0].kind, op.places[1].kind) {
        (REG | MEM, kind::SEGMENT) => transfer::from_segment,
        (REG | MEM, REG | MEM | IMM) => two_operands!(op, transfer::mov, []),
        // Loads of segment registers, control and debug registers.
        _ => return None,
    })
}

fn is_near_branch(op: &Op) -> bool {
    matches!(op.instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

fn jmp(op: &Op) -> Option<Run> {
    Some(match op.code() {
        _ if is_near_branch(op) => branch::jmp,
        Code::Jmp_rm16 => branch::jmp_indirect::<2>,
        Code::Jmp_rm32 => branch::jmp_indirect::<4>,
        Code::Jmp_rm64 => branch::jmp_indirect::<8>,
        _ => return None,
    })
}

fn call(op: &Op) -> Option<Run> {
    Some(match op.code() {
        Code::Call_rel16 => branch::call::<2>,
        Code::Call_rel32_32 => branch::call::<4>,
        Code::Call_rel32_64 => branch::call::<8>,
        Code::Call_rm16 => branch::call_indirect::<2>,
        Code::Call_rm32 => branch::call_indirect::<4>,
        Code::Call_rm64 => branch::call_indirect::<8>,
        _ => return None,
    })
}

fn stack_and_strings(op: &Op) -> Option<Run> {
    use string::operation::{CMPS, LODS, MOVS, SCAS, STOS};
    use string::{port_string, string};
    Some(match op.code() {
        Code::Movsb_m8_m8 => string::<MOVS, 1>,
        Code::Movsw_m16_m16 => string::<MOVS, 2>,
        Code::Movsd_m32_m32 => string::<MOVS, 4>,
        Code::Movsq_m64_m64 => string::<MOVS, 8>,
        Code::Stosb_m8_AL => string::<STOS, 1>,
        Code::Stosw_m16_AX => string::<STOS, 2>,
        Code::Stosd_m32_EAX => string::<STOS, 4>,
        Code::Stosq_m64_RAX => string::<STOS, 8>,
        Code::Lodsb_AL_m8 => string::<LODS, 1>,
        Code::Lodsw_AX_m16 => string::<LODS, 2>,
        Code::Lodsd_EAX_m32 => string::<LODS, 4>,
        Code::Lodsq_RAX_m64 => string::<LODS, 8>,
        Code::Cmpsb_m8_m8 => string::<CMPS, 1>,
        Code::Cmpsw_m16_m16 => string::<CMPS, 2>,
        Code::Cmpsd_m32_m32 => string::<CMPS, 4>,
        Code::Cmpsq_m64_m64 => string::<CMPS, 8>,
        Code::Scasb_AL_m8 => string::<SCAS, 1>,
        Code::Scasw_AX_m16 => string::<SCAS, 2>,
        Code::Scasd_EAX_m32 => string::<SCAS, 4>,
        Code::Scasq_RAX_m64 => string::<SCAS, 8>,
        Code::Insb_m8_DX => port_string::<false, 1>,
        Code::Insw_m16_DX => port_string::<false, 2>,
        Code::Insd_m32_DX => port_string::<false, 4>,
        Code::Outsb_DX_m8 => port_string::<true, 1>,
        Code::Outsw_DX_m16 => port_string::<true, 2>,
        Code::Outsd_DX_m32 => port_string::<true, 4>,
        Code::In_AL_imm8 | Code::In_AL_DX => port::input::<1>,
        Code::In_AX_imm8 | Code::In_AX_DX => port::input::<2>,
        Code::In_EAX_imm8 | Code::In_EAX_DX => port::input::<4>,
        Code::Out_imm8_AL | Code::Out_DX_AL => port::output::<1>,
        Code::Out_imm8_AX | Code::Out_DX_AX => port::output::<2>,
        Code::Out_imm8_EAX | Code::Out_DX_EAX => port::output::<4>,
        Code::Pushaw => stack::push_all::<2>,
        Code::Pushad => stack::push_all::<4>,
        Code::Popaw => stack::pop_all::<2>,
        Code::Popad => stack::pop_all::<4>,
        Code::Pushfw => stack::push_flags::<2>,
        Code::Pushfd => stack::push_flags::<4>,
        Code::Pushfq => stack::push_flags::<8>,
        Code::Popfw => stack::pop_flags::<2>,
        Code::Popfd => stack::pop_flags::<4>,
        Code::Popfq => stack::pop_flags::<8>,
        Code::Enterw_imm16_imm8 => stack::enter::<2>,
        Code::Enterd_imm16_imm8 => stack::enter::<4>,
        Code::Enterq_imm16_imm8 => stack::enter::<8>,
        Code::Leavew => stack::leave::<2>,
        Code::Leaved => stack::leave::<4>,
        Code::Leaveq => stack::leave::<8>,
        Code::Salc => stack::set_al_from_carry,
        _ => match (op.mnemonic(), op.places[0].kind) {
            (Mnemonic::Push, kind::SEGMENT) => wide!(pushed(op), stack::push_segment),
            (Mnemonic::Push, REG) => wide!(pushed(op), stack::push_operand, [], [REG]),
            (Mnemonic::Push, _) => wide!(pushed(op), stack::push_operand, [], [ANY]),
            (Mnemonic::Pop, kind::SEGMENT) => wide!(pushed(op), other::pop_segment),
            (Mnemonic::Pop, REG | MEM) => wide!(pushed(op), stack::pop_operand),
            _ => return None,
        },
    })
}

/// Bytes that PUSH or POP moves.
fn pushed(op: &Op) -> usize {
    op.instruction.stack_pointer_increment().unsigned_abs() as usize
}

macro_rules! shift {
    ($op:expr, $operation:ident) => {
        size!($op.size, shift::shift, [shift::operation::$operation])
    };
}

fn arithmetic_rest(op: &Op) -> Option<Run> {
    use bits::lowest_operation::{BLSI, BLSMSK, BLSR};
    use bits::operation::{BT, BTC, BTR, BTS};
    let three = op.places[2].kind == IMM;
    let two = op.places[1].kind != kind::NONE;
    Some(match op.mnemonic() {
        Mnemonic::Rol => shift!(op, ROL),
        Mnemonic::Ror => shift!(op, ROR),
        Mnemonic::Rcl => shift!(op, RCL),
        Mnemonic::Rcr => shift!(op, RCR),
        Mnemonic::Shl | Mnemonic::Sal => shift!(op, SHL),
        Mnemonic::Shr => shift!(op, SHR),
        Mnemonic::Sar => shift!(op, SAR),
        Mnemonic::Shld => wide!(op.size, shift::double, [false]),
        Mnemonic::Shrd => wide!(op.size, shift::double, [true]),
        Mnemonic::Shlx => wide!(op.size, shift::without_flags, [shift::operation::SHL]),
        Mnemonic::Shrx => wide!(op.size, shift::without_flags, [shift::operation::SHR]),
        Mnemonic::Sarx => wide!(op.size, shift::without_flags, [shift::operation::SAR]),
        Mnemonic::Rorx => wide!(op.size, shift::rorx),
        Mnemonic::Mul => size!(op.size, multiply::mul),
        Mnemonic::Imul if three => wide!(op.size, multiply::imul_to, [true]),
        Mnemonic::Imul if two => wide!(op.size, multiply::imul_to, [false]),
        Mnemonic::Imul => size!(op.size, multiply::imul),
        Mnemonic::Mulx => wide!(op.size, multiply::mulx),
        Mnemonic::Div => size!(op.size, multiply::div),
        Mnemonic::Idiv => size!(op.size, multiply::idiv),
        Mnemonic::Bt => wide!(op.size, bits::test, [BT]),
        Mnemonic::Bts => wide!(op.size, bits::test, [BTS]),
        Mnemonic::Btr => wide!(op.size, bits::test, [BTR]),
        Mnemonic::Btc => wide!(op.size, bits::test, [BTC]),
        Mnemonic::Bsf => wide!(op.size, bits::scan, [false]),
        Mnemonic::Bsr => wide!(op.size, bits::scan, [true]),
        Mnemonic::Tzcnt => wide!(op.size, bits::count_zeros, [false]),
        Mnemonic::Lzcnt => wide!(op.size, bits::count_zeros, [true]),
        Mnemonic::Popcnt => wide!(op.size, bits::popcnt),
        Mnemonic::Andn => wide!(op.size, bits::andn),
        Mnemonic::Blsi => wide!(op.size, bits::lowest, [BLSI]),
        Mnemonic::Blsmsk => wide!(op.size, bits::lowest, [BLSMSK]),
        Mnemonic::Blsr => wide!(op.size, bits::lowest, [BLSR]),
        Mnemonic::Bextr if !three => wide!(op.size, bits::bextr),
        Mnemonic::Bzhi => wide!(op.size, bits::bzhi),
        Mnemonic::Pdep => wide!(op.size, bits::deposit, [false]),
        Mnemonic::Pext => wide!(op.size, bits::deposit, [true]),
        Mnemonic::Crc32 => size!(op.places[1].size, bits::crc32),
        Mnemonic::Cmc => bits::carry::<BTC>,
        Mnemonic::Clc => bits::carry::<BTR>,
        Mnemonic::Stc => bits::carry::<BTS>,
        Mnemonic::Lahf => bits::lahf,
        Mnemonic::Sahf => bits::sahf,
        Mnemonic::Daa => decimal::adjust_packed::<false>,
        Mnemonic::Das => decimal::adjust_packed::<true>,
        Mnemonic::Aaa => decimal::adjust_unpacked::<false>,
        Mnemonic::Aas => decimal::adjust_unpacked::<true>,
        Mnemonic::Aam => decimal::split,
        Mnemonic::Aad => decimal::join,
        _ => return None,
    })
}

fn transfer_rest(op: &Op) -> Option<Run> {
    let from = op.places[1].size;
    Some(match op.mnemonic() {
        Mnemonic::Movzx if from == 1 => wide!(op.size, transfer::zero_extend, [1]),
        Mnemonic::Movzx => wide!(op.size, transfer::zero_extend, [2]),
        Mnemonic::Movsx if from == 1 => wide!(op.size, transfer::sign_extend_to, [1]),
        Mnemonic::Movsx => wide!(op.size, transfer::sign_extend_to, [2]),
        Mnemonic::Movsxd if from == 2 => transfer::sign_extend_to::<2, 2>,
        Mnemonic::Movsxd => wide!(op.size, transfer::sign_extend_to, [4]),
        Mnemonic::Movnti => wide!(op.size, transfer::mov, [], [MEM, REG]),
        Mnemonic::Movdiri => wide!(op.size, other::store_direct),
        Mnemonic::Rdrand | Mnemonic::Rdseed if other::is_offered(op.mnemonic()) => wide!(op.size, other::random),
        Mnemonic::Movbe => wide!(op.size, transfer::movbe),
        Mnemonic::Bswap => wide!(op.size, transfer::bswap),
        Mnemonic::Xchg => size!(op.size, transfer::xchg),
        Mnemonic::Xadd => size!(op.size, transfer::xadd),
        Mnemonic::Cmpxchg => size!(op.size, transfer::cmpxchg),
        Mnemonic::Cmpxchg8b => transfer::cmpxchg8b,
        Mnemonic::Cmpxchg16b => transfer::cmpxchg16b,
        Mnemonic::Xlatb => transfer::xlat,
        Mnemonic::Bound => wide!(op.places[0].size, transfer::bound),
        Mnemonic::Cbw => transfer::widen::<1, 2>,
        Mnemonic::Cwde => transfer::widen::<2, 4>,
        Mnemonic::Cdqe => transfer::widen::<4, 8>,
        Mnemonic::Cwd => transfer::spread_sign::<2>,
        Mnemonic::Cdq => transfer::spread_sign::<4>,
        Mnemonic::Cqo => transfer::spread_sign::<8>,
        Mnemonic::Cld => transfer::direction::<true>,
        Mnemonic::Std => transfer::direction::<false>,
        Mnemonic::Jcxz => branch::jump_if_count_zero::<2>,
        Mnemonic::Jecxz => branch::jump_if_count_zero::<4>,
        Mnemonic::Jrcxz => branch::jump_if_count_zero::<8>,
        Mnemonic::Loop => wide!(count_size(op.code()), branch::loop_while, [2]),
        Mnemonic::Loope => wide!(count_size(op.code()), branch::loop_while, [1]),
        Mnemonic::Loopne => wide!(count_size(op.code()), branch::loop_while, [0]),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => transfer::flush_line,
        Mnemonic::Pause => transfer::pause,
        Mnemonic::Mfence => transfer::fence,
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        // Without shadow stacks these read nothing and leave their destination: Intel SDM (2024-12) Vol. 2B "RDSSPD".
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Lfence
        | Mnemonic::Sfence
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Cldemote => transfer::nothing,
        _ => {
            let name = op.instruction.condition_code();
            if name == iced_x86::ConditionCode::None {
                return None;
            }
            return conditional(op);
        }
    })
}

fn count_size(code: Code) -> u8 {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

/// SETcc and CMOVcc.
fn conditional(op: &Op) -> Option<Run> {
    let code = condition_code(&op.instruction);
    Some(match op.mnemonic() {
        Mnemonic::Seta
        | Mnemonic::Setae
        | Mnemonic::Setb
        | Mnemonic::Setbe
        | Mnemonic::Sete
        | Mnemonic::Setg
        | Mnemonic::Setge
        | Mnemonic::Setl
        | Mnemonic::Setle
        | Mnemonic::Setne
        | Mnemonic::Setno
        | Mnemonic::Setnp
        | Mnemonic::Setns
        | Mnemonic::Seto
        | Mnemonic::Setp
        | Mnemonic::Sets => condition!(code, |CC| transfer::setcc::<CC> as Run),
        Mnemonic::Cmova
        | Mnemonic::Cmovae
        | Mnemonic::Cmovb
        | Mnemonic::Cmovbe
        | Mnemonic::Cmove
        | Mnemonic::Cmovg
        | Mnemonic::Cmovge
        | Mnemonic::Cmovl
        | Mnemonic::Cmovle
        | Mnemonic::Cmovne
        | Mnemonic::Cmovno
        | Mnemonic::Cmovnp
        | Mnemonic::Cmovns
        | Mnemonic::Cmovo
        | Mnemonic::Cmovp
        | Mnemonic::Cmovs => condition!(code, |CC| wide!(op.size, transfer::cmov, [CC])),
        _ => return None,
    })
}
