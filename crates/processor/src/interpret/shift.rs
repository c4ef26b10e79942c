//! Shifts and rotates. The manual leaves OF undefined for counts above 1; Intel cores set it as for a count of 1, and
//! clear AF, which is what these do (`tests.rs` has values taken from a Sapphire Rapids core).

use x86::GuestFault;
use x86::rflags::{ARITHMETIC, CF, OF};

use super::Flow;
use super::flags::{self, top, when};
use super::op::{Op, get, kind, load, modify, ones, set};
use crate::core::Core;

/// The operations of [`shift`], in the order of their encoding (6 is an alias of SHL).
pub mod operation {
    pub const ROL: u8 = 0;
    pub const ROR: u8 = 1;
    pub const RCL: u8 = 2;
    pub const RCR: u8 = 3;
    pub const SHL: u8 = 4;
    pub const SHR: u8 = 5;
    pub const SAR: u8 = 7;
}

/// Counts are taken modulo 64 for 64-bit operands and modulo 32 for all others.
#[inline(always)]
fn mask_count<const S: usize>(count: u64) -> u32 {
    (count & if S == 8 { 63 } else { 31 }) as u32
}

/// An `S`-byte value as a signed number.
#[inline(always)]
pub const fn sign_extend<const S: usize>(value: u64) -> i64 {
    let unused = 64 - 8 * S as u32;
    ((value << unused) as i64) >> unused
}

/// Shifts by 0-63 that give 0 (or all signs) when everything goes out.
#[inline(always)]
fn left<const S: usize>(value: u64, count: u32) -> u64 {
    value << count & ones::<S>()
}

/// The result of a masked count that is not zero.
#[inline(always)]
fn value_of<const O: u8, const S: usize>(value: u64, count: u32, carry: u64) -> u64 {
    let bits = 8 * S as u32;
    match O {
        operation::SHL => left::<S>(value, count),
        operation::SHR => value >> count,
        operation::SAR => (sign_extend::<S>(value) >> count) as u64 & ones::<S>(),
        operation::ROL | operation::ROR => {
            let count = if O == operation::ROL { count % bits } else { (bits - count % bits) % bits };
            if count == 0 { value } else { left::<S>(value, count) | value >> (bits - count) }
        }
        _ => through_carry::<O, S>(value, count, carry).0,
    }
}

/// RCL and RCR turn a ring of the operand and CF; gives the operand and the new CF.
fn through_carry<const O: u8, const S: usize>(value: u64, count: u32, carry: u64) -> (u64, u64) {
    let bits = 8 * S as u32;
    let ring = u128::from(value) | u128::from(carry) << bits;
    let count = count % (bits + 1);
    let count = if O == operation::RCL { count } else { (bits + 1 - count) % (bits + 1) };
    let turned = if count == 0 { ring } else { ring << count | ring >> (bits + 1 - count) };
    (turned as u64 & ones::<S>(), (turned >> bits) as u64 & 1)
}

/// The flags of a masked count that is not zero: which, and their values.
#[inline(always)]
fn flags_of<const O: u8, const S: usize>(old: u64, count: u32, carry: u64) -> (u64, u64) {
    let bits = 8 * S as u32;
    let new = value_of::<O, S>(old, count, carry);
    let overflow_left = top::<S>(old ^ old << 1);
    let (last_out, overflow) = match O {
        operation::SHL => (if count > bits { 0 } else { old >> (bits - count) & 1 }, overflow_left),
        operation::SHR => (old >> (count - 1) & 1, top::<S>(old)),
        operation::SAR => ((sign_extend::<S>(old) >> (count - 1)) as u64 & 1, 0),
        operation::ROL => (new & 1, overflow_left),
        operation::ROR => (top::<S>(new), top::<S>(old) ^ old & 1),
        operation::RCL => (through_carry::<O, S>(old, count, carry).1, overflow_left),
        _ => (through_carry::<O, S>(old, count, carry).1, top::<S>(old) ^ carry),
    };
    let both = last_out | when(overflow != 0, OF);
    match O {
        operation::SHL | operation::SHR | operation::SAR => (ARITHMETIC, both | flags::result::<S>(new)),
        // A turn of the whole ring changes nothing, not even OF.
        operation::RCL | operation::RCR if count.is_multiple_of(bits + 1) => (0, 0),
        _ => (CF | OF, both),
    }
}

/// ROL, ROR, RCL, RCR, SHL, SHR, SAR by an immediate or CL.
pub fn shift<const O: u8, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let count = mask_count::<S>(load::<1, { kind::ANY }, 1>(core, op)?);
    if count == 0 {
        // The destination is read and written all the same, and a 32-bit register loses its upper half.
        modify::<S, { kind::ANY }>(core, op, |old| old)?;
        return Ok(Flow::Next);
    }
    let carry = flags::carry(core);
    let old = modify::<S, { kind::ANY }>(core, op, |old| value_of::<O, S>(old, count, carry))?;
    let (which, flags) = flags_of::<O, S>(old, count, carry);
    flags::set_some(core, which, flags);
    Ok(Flow::Next)
}

/// What SHLD or SHRD makes of destination and source: the value and CF. 16-bit operands with counts above 16 turn a ring
/// of destination, source and destination again, as Intel cores do.
fn double_value<const RIGHT: bool, const S: usize>(into: u64, from: u64, count: u32) -> (u64, u64) {
    let bits = 8 * S as u32;
    if S == 2 {
        let ring = u64::from(into as u16) | (from & 0xffff) << 16 | u64::from(into as u16) << 32;
        return if RIGHT {
            (ring >> count & 0xffff, ring >> (count - 1) & 1)
        } else {
            (ring >> (32 - count) & 0xffff, ring >> (48 - count) & 1)
        };
    }
    if RIGHT {
        ((into >> count | from << (bits - count)) & ones::<S>(), into >> (count - 1) & 1)
    } else {
        ((into << count | from >> (bits - count)) & ones::<S>(), into >> (bits - count) & 1)
    }
}

/// SHLD and SHRD.
pub fn double<const RIGHT: bool, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let from = get::<S>(core, op.places[1]);
    let count = mask_count::<S>(load::<1, { kind::ANY }, 2>(core, op)?);
    if count == 0 {
        modify::<S, { kind::ANY }>(core, op, |old| old)?;
        return Ok(Flow::Next);
    }
    let old = modify::<S, { kind::ANY }>(core, op, |old| double_value::<RIGHT, S>(old, from, count).0)?;
    let (new, carry) = double_value::<RIGHT, S>(old, from, count);
    let overflow = if RIGHT { top::<S>(old) ^ from & 1 } else { top::<S>(old ^ old << 1) };
    flags::set(core, carry | when(overflow != 0, OF) | flags::result::<S>(new));
    Ok(Flow::Next)
}

/// SHLX, SHRX, SARX: no flags.
pub fn without_flags<const O: u8, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    let count = mask_count::<S>(get::<S>(core, op.places[2]));
    set::<S>(core, op.places[0], value_of::<O, S>(value, count, 0));
    Ok(Flow::Next)
}

pub fn rorx<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    let count = mask_count::<S>(op.immediate);
    set::<S>(core, op.places[0], value_of::<{ operation::ROR }, S>(value, count, 0));
    Ok(Flow::Next)
}
