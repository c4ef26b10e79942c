//! Addition, subtraction, comparison and logic.

use x86::GuestFault;
use x86::rflags::{CF, OF};

use super::Flow;
use super::flags;
use super::op::{Op, kind, load, modify, ones};
use crate::core::Core;

/// The operations of [`binary`], in the order of their encoding; TEST is the ninth.
pub mod operation {
    pub const ADD: u8 = 0;
    pub const OR: u8 = 1;
    pub const ADC: u8 = 2;
    pub const SBB: u8 = 3;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const XOR: u8 = 6;
    pub const CMP: u8 = 7;
    pub const TEST: u8 = 8;
}

#[inline(always)]
fn compute<const O: u8, const S: usize>(left: u64, right: u64, carry: u64) -> (u64, u64) {
    let logic = |value| (value, flags::result::<S>(value));
    match O {
        operation::ADD => flags::add::<S>(left, right, 0),
        operation::ADC => flags::add::<S>(left, right, carry),
        operation::SUB | operation::CMP => flags::subtract::<S>(left, right, 0),
        operation::SBB => flags::subtract::<S>(left, right, carry),
        operation::OR => logic(left | right),
        operation::XOR => logic(left ^ right),
        _ => logic(left & right),
    }
}

/// ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST: destination of kind `D`, source of kind `K`.
pub fn binary<const O: u8, const S: usize, const D: u8, const K: u8>(
    core: &mut Core<'_>,
    op: &Op,
) -> Result<Flow, GuestFault> {
    let right = load::<S, K, 1>(core, op)?;
    let carry = flags::carry(core);
    let left = if O == operation::CMP || O == operation::TEST {
        load::<S, D, 0>(core, op)?
    } else {
        modify::<S, D>(core, op, |left| compute::<O, S>(left, right, carry).0)?
    };
    flags::set(core, compute::<O, S>(left, right, carry).1);
    Ok(Flow::Next)
}

/// INC and DEC: CF stays.
pub fn step<const DOWN: bool, const S: usize, const D: u8>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let change = |old| if DOWN { flags::subtract::<S>(old, 1, 0) } else { flags::add::<S>(old, 1, 0) };
    let old = modify::<S, D>(core, op, |old| change(old).0)?;
    flags::set_some(core, x86::rflags::ARITHMETIC & !CF, change(old).1);
    Ok(Flow::Next)
}

pub fn neg<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let old = modify::<S, { kind::ANY }>(core, op, |old| flags::subtract::<S>(0, old, 0).0)?;
    flags::set(core, flags::subtract::<S>(0, old, 0).1);
    Ok(Flow::Next)
}

pub fn not<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    modify::<S, { kind::ANY }>(core, op, |old| !old & ones::<S>())?;
    Ok(Flow::Next)
}

/// ADCX (`F` is CF) and ADOX (`F` is OF): a carry chain in one flag, all others stay.
pub fn add_with<const F: u64, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let right = load::<S, { kind::ANY }, 1>(core, op)?;
    let left = super::op::get::<S>(core, op.places[0]);
    let carry = u64::from(core.vcpu.cpu.rflags & F != 0);
    let (sum, flags) = flags::add::<S>(left, right, carry);
    super::op::set::<S>(core, op.places[0], sum);
    flags::set_some(core, F, if F == OF { flags::when(flags & CF != 0, OF) } else { flags });
    Ok(Flow::Next)
}
