//! Multiplication and division. Flags that the manual leaves undefined: multiplication sets SF and PF by the low half and
//! clears ZF and AF, division changes none, as Intel cores do.

use x86::GuestFault;
use x86::rflags::{CF, OF, PF, SF};
use x86::state::gpr::{RAX, RDX};

use super::Flow;
use super::flags;
use super::op::{Op, Place, get, kind, load, ones, set};
use super::shift::sign_extend;
use crate::core::Core;

const fn place(index: usize, shift: u8) -> Place {
    Place { kind: kind::REGISTER, index: index as u8, shift, size: 0 }
}

const AX: Place = place(RAX, 0);
const DX: Place = place(RDX, 0);

/// Writes a double-width result to AX, or to DX:AX, EDX:EAX, RDX:RAX.
fn set_pair<const S: usize>(core: &mut Core<'_>, low: u64, high: u64) {
    if S == 1 {
        set::<2>(core, AX, low & 0xff | (high & 0xff) << 8);
    } else {
        set::<S>(core, AX, low);
        set::<S>(core, DX, high);
    }
}

fn set_product_flags<const S: usize>(core: &mut Core<'_>, low: u64, overflow: bool) {
    let undefined = flags::result::<S>(low) & (SF | PF);
    flags::set(core, undefined | flags::when(overflow, CF | OF));
}

/// MUL.
pub fn mul<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let product = u128::from(load::<S, { kind::ANY }, 0>(core, op)?) * u128::from(get::<S>(core, AX));
    let (low, high) = (product as u64 & ones::<S>(), (product >> (8 * S)) as u64 & ones::<S>());
    set_pair::<S>(core, low, high);
    set_product_flags::<S>(core, low, high != 0);
    Ok(Flow::Next)
}

/// The low half of a signed product, the high half, and whether the low half alone is not enough.
fn signed_product<const S: usize>(left: u64, right: u64) -> (u64, u64, bool) {
    let product = i128::from(sign_extend::<S>(left)) * i128::from(sign_extend::<S>(right));
    let low = product as u64 & ones::<S>();
    let overflow = i128::from(sign_extend::<S>(low)) != product;
    (low, (product >> (8 * S)) as u64 & ones::<S>(), overflow)
}

/// IMUL with one operand.
pub fn imul<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let right = load::<S, { kind::ANY }, 0>(core, op)?;
    let (low, high, overflow) = signed_product::<S>(get::<S>(core, AX), right);
    set_pair::<S>(core, low, high);
    set_product_flags::<S>(core, low, overflow);
    Ok(Flow::Next)
}

/// IMUL with two operands, and with three.
pub fn imul_to<const THREE: bool, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let right = load::<S, { kind::ANY }, 1>(core, op)?;
    let left = if THREE { op.immediate & ones::<S>() } else { get::<S>(core, op.places[0]) };
    let (low, _, overflow) = signed_product::<S>(left, right);
    set::<S>(core, op.places[0], low);
    set_product_flags::<S>(core, low, overflow);
    Ok(Flow::Next)
}

/// MULX: no flags; when both destinations are one register, it gets the high half.
pub fn mulx<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let product = u128::from(load::<S, { kind::ANY }, 2>(core, op)?) * u128::from(get::<S>(core, DX));
    set::<S>(core, op.places[1], product as u64);
    set::<S>(core, op.places[0], (product >> (8 * S)) as u64);
    Ok(Flow::Next)
}

/// The dividend: AX, or DX:AX, EDX:EAX, RDX:RAX.
fn dividend<const S: usize>(core: &Core<'_>) -> u128 {
    if S == 1 {
        u128::from(get::<2>(core, AX))
    } else {
        u128::from(get::<S>(core, DX)) << (8 * S) | u128::from(get::<S>(core, AX))
    }
}

/// DIV: #DE when the divisor is zero or the quotient does not fit.
pub fn div<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let divisor = load::<S, { kind::ANY }, 0>(core, op)?;
    if divisor == 0 {
        return Err(GuestFault::DE);
    }
    let high = if S == 1 { get::<2>(core, AX) >> 8 } else { get::<S>(core, DX) };
    if high >= divisor {
        return Err(GuestFault::DE);
    }
    let (quotient, remainder) = if S < 8 {
        let whole = dividend::<S>(core) as u64;
        (whole / divisor, whole % divisor)
    } else if high == 0 {
        let whole = get::<8>(core, AX);
        (whole / divisor, whole % divisor)
    } else {
        let whole = dividend::<S>(core);
        ((whole / u128::from(divisor)) as u64, (whole % u128::from(divisor)) as u64)
    };
    set_pair::<S>(core, quotient, remainder);
    Ok(Flow::Next)
}

/// IDIV.
pub fn idiv<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let divisor = i128::from(sign_extend::<S>(load::<S, { kind::ANY }, 0>(core, op)?));
    let unused = 128 - 16 * S as u32;
    let whole = ((dividend::<S>(core) << unused) as i128) >> unused;
    // The one division whose quotient no i128 holds overflows here as it does in any smaller size.
    let (Some(quotient), Some(remainder)) = (whole.checked_div(divisor), whole.checked_rem(divisor)) else {
        return Err(GuestFault::DE);
    };
    let low = quotient as u64 & ones::<S>();
    if i128::from(sign_extend::<S>(low)) != quotient {
        return Err(GuestFault::DE);
    }
    set_pair::<S>(core, low, remainder as u64 & ones::<S>());
    Ok(Flow::Next)
}
