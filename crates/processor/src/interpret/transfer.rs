//! Data movement: MOV and its relatives, exchanges, conversions, conditional moves.

use x86::GuestFault;
use x86::rflags::{DF, ZF};
use x86::state::gpr::{RAX, RBX, RCX, RDX};

use super::Flow;
use super::flags;
use super::op::{self, Op, Place, get, kind, load, load_memory, modify, ones, set, store};
use super::shift::sign_extend;
use crate::core::Core;

/// MOV between general registers, memory and immediates.
pub fn mov<const S: usize, const D: u8, const K: u8>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, K, 1>(core, op)?;
    store::<S, D, 0>(core, op, value)?;
    Ok(Flow::Next)
}

/// MOV from a segment register: 16 bits to memory, zero-extended to a register.
pub fn from_segment(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let selector = core.vcpu.cpu.segments[usize::from(op.places[1].index)].selector;
    let value = u64::from(selector);
    match (op.places[0].kind, op.places[0].size) {
        (kind::MEMORY, _) => op::store_memory::<2>(core, op, value)?,
        (_, 2) => set::<2>(core, op.places[0], value),
        _ => set::<8>(core, op.places[0], value),
    }
    Ok(Flow::Next)
}

/// MOVZX: `F` bytes to `S`.
pub fn zero_extend<const F: usize, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<F, { kind::ANY }, 1>(core, op)?;
    set::<S>(core, op.places[0], value);
    Ok(Flow::Next)
}

/// MOVSX and MOVSXD.
pub fn sign_extend_to<const F: usize, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<F, { kind::ANY }, 1>(core, op)?;
    set::<S>(core, op.places[0], sign_extend::<F>(value) as u64);
    Ok(Flow::Next)
}

pub fn lea<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let address = op.address.effective(&core.vcpu.cpu);
    set::<S>(core, op.places[0], address);
    Ok(Flow::Next)
}

/// CMOVcc: the source is read in any case, and a 32-bit destination loses its upper half in any case.
pub fn cmov<const CC: u8, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let source = load::<S, { kind::ANY }, 1>(core, op)?;
    let value = if flags::condition::<CC>(core.vcpu.cpu.rflags) { source } else { get::<S>(core, op.places[0]) };
    set::<S>(core, op.places[0], value);
    Ok(Flow::Next)
}

pub fn setcc<const CC: u8>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = u64::from(flags::condition::<CC>(core.vcpu.cpu.rflags));
    store::<1, { kind::ANY }, 0>(core, op, value)?;
    Ok(Flow::Next)
}

pub fn bswap<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = get::<S>(core, op.places[0]);
    // Undefined for 16 bits: Intel cores give zero.
    let swapped = if S == 2 { 0 } else { value.swap_bytes() >> (64 - 8 * S) };
    set::<S>(core, op.places[0], swapped);
    Ok(Flow::Next)
}

pub fn movbe<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let value = load::<S, { kind::ANY }, 1>(core, op)?;
    store::<S, { kind::ANY }, 0>(core, op, value.swap_bytes() >> (64 - 8 * S))?;
    Ok(Flow::Next)
}

/// CBW, CWDE, CDQE: the accumulator from `F` bytes to twice as many.
pub fn widen<const F: usize, const S: usize>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let value = sign_extend::<F>(core.vcpu.cpu.gpr[RAX]) as u64;
    set::<S>(core, general(RAX), value);
    Ok(Flow::Next)
}

/// CWD, CDQ, CQO: the accumulator's sign to all of DX, EDX, RDX.
pub fn spread_sign<const S: usize>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    let sign = sign_extend::<S>(core.vcpu.cpu.gpr[RAX]) >> 63;
    set::<S>(core, general(RDX), sign as u64);
    Ok(Flow::Next)
}

pub(super) const fn general(index: usize) -> Place {
    Place { kind: kind::REGISTER, index: index as u8, shift: 0, size: 0 }
}

pub fn direction<const UP: bool>(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    flags::set_some(core, DF, if UP { 0 } else { DF });
    Ok(Flow::Next)
}

/// XLAT: AL from the table at BX + AL.
pub fn xlat(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    // The decoder gives base RBX and index AL; AL's place in Address is that of all of RAX.
    let mask = u64::MAX >> (64 - 8 * op.instruction.memory_base().size().clamp(2, 8));
    let offset = core.vcpu.cpu.gpr[RBX].wrapping_add(core.vcpu.cpu.gpr[RAX] & 0xff) & mask;
    let address = op::linear(core, usize::from(op.address.segment), offset, 1, false)?;
    let value = core.read(address, 1)?;
    set::<1>(core, general(RAX), value);
    Ok(Flow::Next)
}

/// XCHG, which is LOCKed without a prefix when it names memory.
pub fn xchg<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let (memory, register) = if op.places[0].kind == kind::MEMORY { (0, 1) } else { (1, 0) };
    let new = get::<S>(core, op.places[register]);
    let old = if op.places[memory].kind == kind::MEMORY {
        let address = op.address.linear(core, S, true)?;
        core.update(address, S, |_| new).map_err(|fault| op.address.adjust(fault))?
    } else {
        let old = get::<S>(core, op.places[memory]);
        set::<S>(core, op.places[memory], new);
        old
    };
    set::<S>(core, op.places[register], old);
    Ok(Flow::Next)
}

pub fn xadd<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let right = get::<S>(core, op.places[1]);
    if op.has_memory_destination() {
        let left = modify::<S, { kind::MEMORY }>(core, op, |left| left.wrapping_add(right) & ones::<S>())?;
        set::<S>(core, op.places[1], left);
        flags::set(core, flags::add::<S>(left, right, 0).1);
    } else {
        // With both operands the same register, the sum wins.
        let left = get::<S>(core, op.places[0]);
        let (sum, flags) = flags::add::<S>(left, right, 0);
        set::<S>(core, op.places[1], left);
        set::<S>(core, op.places[0], sum);
        flags::set(core, flags);
    }
    Ok(Flow::Next)
}

pub fn cmpxchg<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let new = get::<S>(core, op.places[1]);
    let expected = get::<S>(core, general(RAX));
    let old = if op.has_memory_destination() {
        // Memory is written even when the comparison fails, with what it held.
        modify::<S, { kind::MEMORY }>(core, op, |old| if old == expected { new } else { old })?
    } else {
        get::<S>(core, op.places[0])
    };
    if old != expected {
        set::<S>(core, general(RAX), old);
    } else if !op.has_memory_destination() {
        set::<S>(core, op.places[0], new);
    }
    flags::set(core, flags::subtract::<S>(expected, old, 0).1);
    Ok(Flow::Next)
}

pub fn cmpxchg8b(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let gpr = &core.vcpu.cpu.gpr;
    let pair = |high: usize, low: usize| gpr[high] << 32 | gpr[low] & 0xffff_ffff;
    let (expected, new) = (pair(RDX, RAX), pair(RCX, RBX));
    let old = modify::<8, { kind::MEMORY }>(core, op, |old| if old == expected { new } else { old })?;
    if old != expected {
        set::<4>(core, general(RAX), old);
        set::<4>(core, general(RDX), old >> 32);
    }
    flags::set_some(core, ZF, flags::when(old == expected, ZF));
    Ok(Flow::Next)
}

pub fn cmpxchg16b(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let gpr = &core.vcpu.cpu.gpr;
    let pair = |high: usize, low: usize| u128::from(gpr[high]) << 64 | u128::from(gpr[low]);
    let (expected, new) = (pair(RDX, RAX), pair(RCX, RBX));
    let address = op.address.linear(core, 16, true)?;
    if address.0 & 15 != 0 {
        return Err(GuestFault::GP0);
    }
    let old = core
        .update16(address, |old| if old == expected { new } else { old })
        .map_err(|fault| op.address.adjust(fault))?;
    if old != expected {
        core.vcpu.cpu.gpr[RAX] = old as u64;
        core.vcpu.cpu.gpr[RDX] = (old >> 64) as u64;
    }
    flags::set_some(core, ZF, flags::when(old == expected, ZF));
    Ok(Flow::Next)
}

/// BOUND: #BR when the index is outside the signed pair of bounds in memory. 16- and 32-bit code only.
pub fn bound<const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let lower = sign_extend::<S>(load_memory::<S>(core, op)?);
    let second = op.address.linear_at(core, S as u64, S, false)?;
    let upper = sign_extend::<S>(core.read(second, S)?);
    let index = sign_extend::<S>(get::<S>(core, op.places[0]));
    if (lower..=upper).contains(&index) { Ok(Flow::Next) } else { Err(GuestFault::plain(x86::vector::BR)) }
}

/// The instruction does nothing at all: NOP, hints, ENDBR, and what older processors made of new encodings.
pub fn nothing(_: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    Ok(Flow::Next)
}

/// MFENCE: the host's stores are the guest's, and so must its barrier be.
pub fn fence(_: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(Flow::Next)
}

/// After so many PAUSEs the processor gives its host core away: the one that it waits for may have none.
const PATIENCE: u64 = 32;

pub fn pause(core: &mut Core<'_>, _: &Op) -> Result<Flow, GuestFault> {
    if core.vcpu.cpuid.cpus() > 1 {
        core.vcpu.pauses += 1;
        if core.vcpu.pauses.is_multiple_of(PATIENCE) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
    Ok(Flow::Next)
}

/// CLFLUSH, CLFLUSHOPT, CLWB, CLDEMOTE: no cache to flush, but the address is checked as that of a load.
pub fn flush_line(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let address = op.address.linear(core, 1, false)?;
    core.read(address, 1).map_err(|fault| op.address.adjust(fault))?;
    Ok(Flow::Next)
}
