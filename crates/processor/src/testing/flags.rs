//! Which arithmetic flags are undefined where: a sequence must not read one, and those undefined at its end do not count.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register, RflagsBits};
use x86::rflags;

const NAMES: [(u32, u64); 6] = [
    (RflagsBits::OF, rflags::OF),
    (RflagsBits::SF, rflags::SF),
    (RflagsBits::ZF, rflags::ZF),
    (RflagsBits::AF, rflags::AF),
    (RflagsBits::CF, rflags::CF),
    (RflagsBits::PF, rflags::PF),
];

fn bits(iced: u32) -> u64 {
    NAMES.iter().filter(|(name, _)| iced & name != 0).map(|(_, bit)| bit).sum()
}

/// The flags that `instruction` looks at.
#[must_use]
pub fn read(instruction: &Instruction) -> u64 {
    match instruction.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfq | Mnemonic::Pushfd => rflags::ARITHMETIC,
        Mnemonic::Lahf => rflags::ARITHMETIC & !rflags::OF,
        _ => bits(instruction.rflags_read()),
    }
}

/// Whether the instruction may leave the flags as they were, which only its operands' values tell.
fn is_conditional(instruction: &Instruction) -> bool {
    let by_cl = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    let last = instruction.op_count().saturating_sub(1);
    (by_cl && instruction.op_kind(last) == OpKind::Register && instruction.op_register(last) == Register::CL)
        || instruction.has_rep_prefix()
        || instruction.has_repne_prefix()
}

/// The undefined flags after `instruction`, given those before it.
#[must_use]
pub fn after(instruction: &Instruction, before: u64) -> u64 {
    let undefined = bits(instruction.rflags_undefined());
    if is_conditional(instruction) {
        return before | undefined;
    }
    before & !bits(instruction.rflags_modified()) | undefined
}

/// Undefined flags on entry to each instruction, in order, and last those at the end of the code; `None` when an
/// instruction reads an undefined flag. `instructions` have their real IPs and cover the code without gaps.
#[must_use]
pub fn undefined(instructions: &[Instruction]) -> Option<Vec<u64>> {
    let mut entry = vec![0_u64; instructions.len() + 1];
    let place = |ip: u64| instructions.iter().position(|i| i.ip() == ip).unwrap_or(instructions.len());
    // Backward branches make a second and third pass necessary; sets only grow, so this ends.
    loop {
        let mut changed = false;
        for (index, instruction) in instructions.iter().enumerate() {
            let out = after(instruction, entry[index]);
            let mut flow = |to: usize| {
                changed |= out & !entry[to] != 0;
                entry[to] |= out;
            };
            flow(index + 1);
            if instruction.op_count() > 0 && instruction.op0_kind() == OpKind::NearBranch64 {
                flow(place(instruction.near_branch64()));
            }
        }
        if !changed {
            break;
        }
    }
    let reads_undefined = instructions.iter().zip(&entry).any(|(i, undefined)| read(i) & undefined != 0);
    (!reads_undefined).then_some(entry)
}

/// Whether `instruction` writes `register` or a part of it.
pub fn writes(factory: &mut InstructionInfoFactory, instruction: &Instruction, register: Register) -> bool {
    use iced_x86::OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
    factory.info(instruction).used_registers().iter().any(|used| {
        used.register().full_register() == register
            && matches!(used.access(), Write | CondWrite | ReadWrite | ReadCondWrite)
    })
}
