//! Bit tests, bit scans, counts, BMI1 and BMI2.

use x86::GuestFault;
use x86::rflags::{ARITHMETIC, CF, PF, SF, ZF};

use super::Flow;
use super::flags::{self, when};
use super::op::{Op, get, kind, load, modify, ones, set};
use super::shift::sign_extend;
use crate::core::Core;

/// The operations of [`test`], in the order of their encoding.
pub mod operation {
    pub const BT: u8 = 4;
    pub const BTS: u8 = 5;
    pub const BTR: u8 = 6;
    pub const BTC: u8 = 7;
}

#[inline(always)]
fn changed<const O: u8>(value: u64, bit: u64) -> u64 {
    match O {
        operation::BTS => value | bit,
        operation::BTR => value & !bit,
        operation::BTC => value ^ bit,
        _ => value,
    }
}

/// BT, BTS, BTR, BTC. A register offset into memory may point far from the operand's address, both ways; an immediate one, or
/// any into a register, is taken modulo the operand size. Only CF changes.
pub fn test<const O: u8, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let bits = 8 * S as u64;
    let offset = load::<S, { kind::ANY }, 1>(core, op)?;
    let bit = 1 << (offset & (bits - 1));
    let old = if op.has_memory_destination() && op.places[1].kind == kind::REGISTER {
        // Whole operands of S bytes away from the address, towards minus infinity.
        let further = (sign_extend::<S>(offset) >> bits.trailing_zeros()).wrapping_mul(S as i64) as u64;
        let write = O != operation::BT;
        let address = op.address.linear_at(core, further, S, write)?;
        let result = if !write {
            core.read(address, S)
        } else if op.is_locked() {
            core.update(address, S, |old| changed::<O>(old, bit))
        } else {
            core.read_for_write(address, S).and_then(|old| core.write(address, S, changed::<O>(old, bit)).map(|()| old))
        };
        result.map_err(|fault| op.address.adjust(fault))?
    } else if O == operation::BT {
        load::<S, { kind::ANY }, 0>(core, op)?
    } else {
        modify::<S, { kind::ANY }>(core, op, |old| changed::<O>(old, bit))?
    };
    flags::set_some(core, CF, when(old & bit != 0, CF));
    Ok(Flow::Next)
}

/// BSF and BSR: a zero source leaves the destination whole. PF follows the result and the others are cleared, as on Intel.
pub fn scan<const REVERSE: bool, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    if value == 0 {
        flags::set(core, ZF | PF);
        return Ok(Flow::Next);
    }
    let index = u64::from(if REVERSE { 63 - value.leading_zeros() } else { value.trailing_zeros() });
    set::<S>(core, op.places[0], index);
    flags::set(core, flags::parity(index));
    Ok(Flow::Next)
}

/// TZCNT and LZCNT.
pub fn count_zeros<const LEADING: bool, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    let bits = 8 * S as u32;
    let count = if LEADING { value.leading_zeros() - (64 - bits) } else { value.trailing_zeros().min(bits) };
    set::<S>(core, op.places[0], u64::from(count));
    flags::set(core, when(value == 0, CF) | when(count == 0, ZF));
    Ok(Flow::Next)
}

pub fn popcnt<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    set::<S>(core, op.places[0], u64::from(value.count_ones()));
    flags::set(core, when(value == 0, ZF));
    Ok(Flow::Next)
}

/// SF and ZF of the result, with CF; OF, AF and PF cleared.
fn set_sign_zero<const S: usize>(core: &mut Core<'_>, result: u64, carry: bool) {
    flags::set(core, flags::result::<S>(result) & (SF | ZF) | when(carry, CF));
}

pub fn andn<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let result = load::<S, { kind::ANY }, 2>(core, op)? & !get::<S>(core, op.places[1]);
    set::<S>(core, op.places[0], result);
    set_sign_zero::<S>(core, result, false);
    Ok(Flow::Next)
}

/// The operations of [`lowest`].
pub mod lowest_operation {
    pub const BLSI: u8 = 0;
    pub const BLSMSK: u8 = 1;
    pub const BLSR: u8 = 2;
}

/// BLSI, BLSMSK, BLSR.
pub fn lowest<const O: u8, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    let (result, carry) = match O {
        lowest_operation::BLSI => (value & value.wrapping_neg(), value != 0),
        lowest_operation::BLSMSK => (value ^ value.wrapping_sub(1), value == 0),
        _ => (value & value.wrapping_sub(1), value == 0),
    };
    let result = result & ones::<S>();
    set::<S>(core, op.places[0], result);
    set_sign_zero::<S>(core, result, carry);
    Ok(Flow::Next)
}

/// BEXTR: only ZF is defined; all others are cleared.
pub fn bextr<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    let control = get::<S>(core, op.places[2]);
    let (start, length) = (control & 0xff, control >> 8 & 0xff);
    let shifted = if start < 64 { value >> start } else { 0 };
    let result = if length < 64 { shifted & ((1 << length) - 1) } else { shifted };
    set::<S>(core, op.places[0], result);
    flags::set(core, when(result == 0, ZF));
    Ok(Flow::Next)
}

pub fn bzhi<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    let index = get::<S>(core, op.places[2]) & 0xff;
    let beyond = index >= 8 * S as u64;
    let result = if beyond { value } else { value & ((1 << index) - 1) };
    set::<S>(core, op.places[0], result);
    set_sign_zero::<S>(core, result, beyond);
    Ok(Flow::Next)
}

/// PDEP and PEXT.
pub fn deposit<const EXTRACT: bool, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let mut mask = load::<S, { kind::ANY }, 2>(core, op)?;
    let value = get::<S>(core, op.places[1]);
    let mut result = 0;
    let mut packed = 1_u64;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        let (from, to) = if EXTRACT { (lowest, packed) } else { (packed, lowest) };
        if value & from != 0 {
            result |= to;
        }
        mask ^= lowest;
        packed = packed.wrapping_shl(1);
    }
    set::<S>(core, op.places[0], result);
    Ok(Flow::Next)
}

/// CRC32 with the polynomial 0x11EDC6F41, bits reflected. The destination keeps 32 bits.
pub fn crc32<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    const REFLECTED: u64 = 0x82f6_3b78;
    let mut data = load::<S, { kind::ANY }, 1>(core, op)?;
    let mut crc = get::<4>(core, op.places[0]);
    for _ in 0..8 * S {
        let out = (crc ^ data) & 1;
        crc = (crc >> 1) ^ (REFLECTED * out);
        data >>= 1;
    }
    set::<4>(core, op.places[0], crc);
    Ok(Flow::Next)
}

/// CMC, CLC, STC.
pub fn carry<const O: u8>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let rflags = &mut core.vcpu.cpu.rflags;
    *rflags = changed::<O>(*rflags, CF);
    Ok(Flow::Next)
}

/// LAHF and SAHF: the five flags in the low byte.
const LOW: u64 = ARITHMETIC & 0xff;

pub fn lahf(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let flags = core.vcpu.cpu.rflags & LOW | x86::rflags::FIXED;
    let rax = &mut core.vcpu.cpu.gpr[x86::state::gpr::RAX];
    *rax = *rax & !0xff00 | flags << 8;
    Ok(Flow::Next)
}

pub fn sahf(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let ah = core.vcpu.cpu.gpr[x86::state::gpr::RAX] >> 8;
    flags::set_some(core, LOW, ah);
    Ok(Flow::Next)
}
