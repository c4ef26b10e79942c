//! SIMD and x87 exceptions without letting the host raise them.
//!
//! SIMD instructions run with everything masked; the flags that they set in a cleared MXCSR tell which exceptions there
//! were, and if the guest has unmasked one, the result is thrown away and #XM raised. x87 instructions run with the guest's
//! own masks: an exception then only becomes pending, and is delivered by us before the next waiting instruction.
//!
//! Two things are not exact, and only for guests that unmask SIMD exceptions: with an unmasked overflow or underflow the
//! inexact flag is that of the masked result, and DPPS and DPPD, which are several operations, report the flags of all.

use x86::{FpuArea, GuestFault, cr4, vector};

use super::plan::{Class, Plan};
use super::{is_pending, masked};
use crate::core::Core;
use crate::native::{self, Operands, Slot};

/// What a memory operand that is only written holds before, to see whether it was written.
pub const UNTOUCHED: u8 = 0x5a;

mod mxcsr {
    pub const FLAGS: u32 = 0x3f;
    /// Invalid, denormal, division by zero: found before the operation is done.
    pub const BEFORE: u32 = 0x07;
    pub const UNDERFLOW: u32 = 0x10;
    pub const MASKS: u32 = 0x1f80;
    pub const MASK_SHIFT: u32 = 7;
    pub const FLUSH_TO_ZERO: u32 = 1 << 15;
}

fn read_mxcsr(area: &FpuArea) -> u32 {
    let b = &area.bytes[FpuArea::MXCSR..FpuArea::MXCSR + 4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

fn write_mxcsr(area: &mut FpuArea, value: u32) {
    area.bytes[FpuArea::MXCSR..FpuArea::MXCSR + 4].copy_from_slice(&value.to_le_bytes());
}

/// Takes the exception flags of SIMD from `after`.
pub(super) fn keep_flags(before: &mut FpuArea, after: &FpuArea) {
    write_mxcsr(before, read_mxcsr(after));
}

/// Runs the slot on a copy of the guest's state; false when the slot is void. A fault leaves the guest's state as it was,
/// but for the flags in MXCSR that say why.
pub(super) fn run(
    core: &mut Core<'_>,
    plan: &Plan,
    slot: Slot,
    area: &mut FpuArea,
    operands: &mut Operands,
) -> Result<bool, GuestFault> {
    let control = read_mxcsr(area) & 0xffff;
    let unmasked = !(control >> mxcsr::MASK_SHIFT) & mxcsr::FLAGS;
    let mut quiet = (control | mxcsr::MASKS) & !mxcsr::FLAGS;
    let underflow = unmasked & mxcsr::UNDERFLOW != 0;
    let uses_mxcsr = plan.class != Class::X87;
    if underflow {
        // Flush-to-zero applies to masked underflow only.
        quiet &= !mxcsr::FLUSH_TO_ZERO;
    }
    write_mxcsr(area, quiet);
    let mut trial = (underflow && uses_mxcsr).then(|| (area.clone(), operands.clone()));
    if !run_quiet(plan, slot, area, operands) {
        return Ok(false);
    }
    let mut flags = read_mxcsr(area) & mxcsr::FLAGS;
    if let Some((area, operands)) = &mut trial {
        // Unmasked, a tiny result underflows even if it is exact. Flushing to zero tells: it flags every tiny result.
        write_mxcsr(area, quiet | mxcsr::FLUSH_TO_ZERO);
        if !run_quiet(plan, slot, area, operands) {
            return Ok(false);
        }
        flags |= read_mxcsr(area) & mxcsr::UNDERFLOW;
    }
    let raised = flags & unmasked;
    if raised == 0 || !uses_mxcsr {
        write_mxcsr(area, control | flags);
        return Ok(true);
    }
    if raised & mxcsr::BEFORE != 0 {
        flags &= mxcsr::BEFORE;
    }
    let cpu = &mut core.vcpu.cpu;
    if plan.class == Class::Mmx && masked::is_mmx(area) {
        // A conversion that faults has taken the x87 stack over all the same.
        masked::enter_mmx(&mut cpu.fpu);
    }
    write_mxcsr(&mut cpu.fpu, control | flags);
    if cpu.cr4 & cr4::OSXMMEXCPT == 0 {
        return Err(GuestFault::UD);
    }
    Err(GuestFault::plain(vector::XM))
}

/// Runs the slot so that a pending x87 exception is not met by an instruction that should not see it.
fn run_quiet(plan: &Plan, slot: Slot, area: &mut FpuArea, operands: &mut Operands) -> bool {
    let sse = matches!(plan.class, Class::Sse | Class::Avx);
    if !sse || !is_pending(area) {
        return native::run(slot, area, operands);
    }
    let saved: [u8; 4] = [area.bytes[0], area.bytes[1], area.bytes[2], area.bytes[3]];
    area.bytes[0] |= 0x3f;
    area.bytes[2] &= 0x7f;
    area.bytes[3] &= 0x7f;
    let done = native::run(slot, area, operands);
    area.bytes[..4].copy_from_slice(&saved);
    done
}

/// Whether an x87 store was not done because of the exception that it raised.
pub(super) fn is_suppressed(plan: &Plan, before: &FpuArea, after: &FpuArea, operands: &Operands) -> bool {
    plan.class == Class::X87
        && !plan.reads
        && is_pending(after)
        && !is_pending(before)
        && operands.memory[..plan.size].iter().all(|byte| *byte == UNTOUCHED)
}
