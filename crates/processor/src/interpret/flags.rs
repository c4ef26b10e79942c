//! The arithmetic flags: pure functions of operands and results of `S` bytes. Flags that the manual leaves undefined are as
//! current Intel cores leave them, where `tests.rs` says so.

use x86::rflags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};

use super::op::ones;
use crate::core::Core;

/// Bit number of a flag.
const fn bit(flag: u64) -> u32 {
    flag.trailing_zeros()
}

/// PF: the low byte has an even number of ones.
#[inline(always)]
#[must_use]
pub const fn parity(value: u64) -> u64 {
    let nibble = (value ^ value >> 4) & 0xf;
    (0x9669 >> nibble & 1) << bit(PF)
}

/// The uppermost bit of an `S`-byte value, as 0 or 1.
#[inline(always)]
#[must_use]
pub const fn top<const S: usize>(value: u64) -> u64 {
    value >> (8 * S - 1) & 1
}

/// SF, ZF and PF of a result that is already cut to `S` bytes.
#[inline(always)]
#[must_use]
pub const fn result<const S: usize>(value: u64) -> u64 {
    top::<S>(value) << bit(SF) | ((value == 0) as u64) << bit(ZF) | parity(value)
}

/// The sum of two values and a carry, and all flags.
#[inline(always)]
#[must_use]
pub const fn add<const S: usize>(left: u64, right: u64, carry: u64) -> (u64, u64) {
    let sum = left.wrapping_add(right).wrapping_add(carry) & ones::<S>();
    // The carries out of every bit.
    let carries = left & right | (left | right) & !sum;
    let flags = top::<S>(carries)
        | (carries >> 3 & 1) << bit(AF)
        | top::<S>((left ^ sum) & (right ^ sum)) << bit(OF)
        | result::<S>(sum);
    (sum, flags)
}

/// The difference, less a borrow, and all flags.
#[inline(always)]
#[must_use]
pub const fn subtract<const S: usize>(left: u64, right: u64, borrow: u64) -> (u64, u64) {
    let difference = left.wrapping_sub(right).wrapping_sub(borrow) & ones::<S>();
    // The borrows out of every bit.
    let borrows = !left & right | (!left | right) & difference;
    let flags = top::<S>(borrows)
        | (borrows >> 3 & 1) << bit(AF)
        | top::<S>((left ^ right) & (left ^ difference)) << bit(OF)
        | result::<S>(difference);
    (difference, flags)
}

/// CF as a number.
#[inline(always)]
#[must_use]
pub fn carry(core: &Core<'_>) -> u64 {
    core.vcpu.cpu.rflags & CF
}

/// Replaces all six arithmetic flags.
#[inline(always)]
pub fn set(core: &mut Core<'_>, flags: u64) {
    set_some(core, ARITHMETIC, flags);
}

/// Replaces the flags in `which`.
#[inline(always)]
pub fn set_some(core: &mut Core<'_>, which: u64, flags: u64) {
    let rflags = &mut core.vcpu.cpu.rflags;
    *rflags = *rflags & !which | flags & which;
}

/// A flag as 0 or its bit.
#[inline(always)]
#[must_use]
pub const fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// Whether condition `CC` (0-15, as encoded in Jcc, SETcc and CMOVcc) holds: Intel SDM (2024-12) Vol. 1 appendix B.
#[inline(always)]
#[must_use]
pub const fn condition<const CC: u8>(rflags: u64) -> bool {
    let less = (rflags >> bit(SF) ^ rflags >> bit(OF)) & 1 != 0;
    let holds = match CC >> 1 {
        0 => rflags & OF != 0,
        1 => rflags & CF != 0,
        2 => rflags & ZF != 0,
        3 => rflags & (CF | ZF) != 0,
        4 => rflags & SF != 0,
        5 => rflags & PF != 0,
        6 => less,
        _ => less || rflags & ZF != 0,
    };
    holds != (CC & 1 != 0)
}
