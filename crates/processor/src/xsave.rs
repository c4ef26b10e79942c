//! FXSAVE, the XSAVE family, XCR0 and MXCSR: Intel SDM (2024-12) Vol. 1 ch. 13 "Managing State Using the XSAVE Feature
//! Set". State components: 0 x87, 1 SSE, 2 AVX, and 9 PKRU where CPUID offers
//! it. There are no supervisor components: IA32_XSS is zero.

use std::ops::Range;

use iced_x86::{Instruction, Mnemonic as M};
use x86::registers::xcr0::{AVX, PKRU, SSE, X87};
use x86::{CpuState, FpuArea, GuestFault, Gva, cr0, cr4};

use crate::core::Core;
use crate::interpret::{Flow, operand};
use crate::simd::is_pending;
use crate::system::set_pkru;

/// What CPUID.(EAX=0DH,ECX=1):EAX may say: XSAVEOPT, XSAVEC, XGETBV with ECX=1, XSAVES.
pub const EXTENSIONS: u32 = 0xf;
/// Places in the standard format and sizes in bytes of the components behind the header.
pub const AVX_OFFSET: u32 = 576;
pub const AVX_SIZE: u32 = 256;
pub const PKRU_OFFSET: u32 = 832;
pub const PKRU_SIZE: u32 = 8;

/// MXCSR after reset, and the bits that exist.
const MXCSR_INITIAL: u32 = 0x1f80;
const MXCSR_VALID: u32 = 0xffff;

const HEADER: u64 = 512;
const COMPACTED: u64 = 1 << 63;

const CONTROL: Range<usize> = 0..24;
const MXCSR: Range<usize> = 24..28;
const MXCSR_AND_MASK: Range<usize> = 24..32;
const STACK: Range<usize> = 32..160;

pub fn execute(core: &mut Core<'_>, i: &Instruction) -> Option<Result<Flow, GuestFault>> {
    let done = match i.mnemonic() {
        M::Fxsave => fxsave(core, i, false),
        M::Fxsave64 => fxsave(core, i, true),
        M::Fxrstor => fxrstor(core, i, false),
        M::Fxrstor64 => fxrstor(core, i, true),
        M::Xsave => save(core, i, Save::Plain, false),
        M::Xsave64 => save(core, i, Save::Plain, true),
        M::Xsaveopt => save(core, i, Save::Optimized, false),
        M::Xsaveopt64 => save(core, i, Save::Optimized, true),
        M::Xsavec => save(core, i, Save::Compacted, false),
        M::Xsavec64 => save(core, i, Save::Compacted, true),
        M::Xsaves => supervisor(core).and_then(|()| save(core, i, Save::Compacted, false)),
        M::Xsaves64 => supervisor(core).and_then(|()| save(core, i, Save::Compacted, true)),
        M::Xrstor => restore(core, i, false, false),
        M::Xrstor64 => restore(core, i, true, false),
        M::Xrstors => supervisor(core).and_then(|()| restore(core, i, false, true)),
        M::Xrstors64 => supervisor(core).and_then(|()| restore(core, i, true, true)),
        M::Xgetbv => xgetbv(core),
        M::Xsetbv => xsetbv(core),
        M::Ldmxcsr | M::Vldmxcsr => load_mxcsr(core, i),
        M::Stmxcsr | M::Vstmxcsr => store_mxcsr(core, i),
        _ => return None,
    };
    Some(done.map(|()| Flow::Next))
}

fn mxcsr(area: &FpuArea) -> u32 {
    word(&area.bytes[MXCSR])
}

fn word(bytes: &[u8]) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[..4]);
    u32::from_le_bytes(word)
}

/// How many vector registers exist in the mode: outside 64-bit mode the upper eight are neither saved nor loaded.
fn vectors(cpu: &CpuState) -> usize {
    if cpu.is_code64() { 16 } else { 8 }
}

fn address(core: &Core<'_>, i: &Instruction, alignment: u64, write: bool) -> Result<Gva, GuestFault> {
    let address = if write { operand::linear_address_for_write(core, i)? } else { operand::linear_address(core, i)? };
    if address.0 & (alignment - 1) != 0 { Err(GuestFault::GP0) } else { Ok(address) }
}

/// The ways in which an image differs from the internal area: without REX.W, FIP and FDP have 32 bits and selectors, which
/// are zero, as on processors that deprecate them.
fn shape_pointers(bytes: &mut [u8], wide: bool) {
    if !wide {
        bytes[12..16].fill(0);
        bytes[20..24].fill(0);
    }
}

/// After x87 state came from memory: reserved bytes are zero, and ES and B are what flags and masks make them.
fn settle_x87(area: &mut FpuArea) {
    area.bytes[5] = 0;
    for st in 0..8 {
        area.bytes[32 + 16 * st + 10..32 + 16 * st + 16].fill(0);
    }
    // The opcode has 11 bits, the instruction pointer as many as a linear address of processors with 5-level paging.
    area.bytes[7] &= 7;
    area.bytes[15] = if area.bytes[15] & 1 != 0 { 0xff } else { 0 };
    // Bits 15:13 and 7:6 of the control word read as zero and (bit 6) one.
    area.bytes[0] = area.bytes[0] & 0x3f | 0x40;
    area.bytes[1] &= 0x1f;
    let pending = is_pending(area);
    area.bytes[2] = area.bytes[2] & 0x7f | u8::from(pending) << 7;
    area.bytes[3] = area.bytes[3] & 0x7f | u8::from(pending) << 7;
}

fn write_pieces(core: &mut Core<'_>, i: &Instruction, base: Gva, pieces: &[(u64, &[u8])]) -> Result<(), GuestFault> {
    let fault = |fault| operand::stack_fault(i, fault);
    for (offset, bytes) in pieces {
        core.probe(base.add(*offset), bytes.len(), true).map_err(fault)?;
    }
    for (offset, bytes) in pieces {
        core.write_bytes(base.add(*offset), bytes).map_err(fault)?;
    }
    Ok(())
}

fn read(core: &mut Core<'_>, i: &Instruction, base: Gva, offset: u64, into: &mut [u8]) -> Result<(), GuestFault> {
    core.read_bytes(base.add(offset), into).map_err(|fault| operand::stack_fault(i, fault))
}

fn fxsave(core: &mut Core<'_>, i: &Instruction, wide: bool) -> Result<(), GuestFault> {
    if core.vcpu.cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(GuestFault::NM);
    }
    let base = address(core, i, 16, true)?;
    let mut image = core.vcpu.cpu.fpu.clone();
    shape_pointers(&mut image.bytes, wide);
    let end = FpuArea::XMM + 16 * vectors(&core.vcpu.cpu);
    write_pieces(core, i, base, &[(0, &image.bytes[..end])])
}

fn fxrstor(core: &mut Core<'_>, i: &Instruction, wide: bool) -> Result<(), GuestFault> {
    if core.vcpu.cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(GuestFault::NM);
    }
    let base = address(core, i, 16, false)?;
    let mut area = core.vcpu.cpu.fpu.clone();
    let kept: [u8; 4] = [area.bytes[28], area.bytes[29], area.bytes[30], area.bytes[31]];
    let end = FpuArea::XMM + 16 * vectors(&core.vcpu.cpu);
    read(core, i, base, 0, &mut area.bytes[..end])?;
    if mxcsr(&area) & !MXCSR_VALID != 0 {
        return Err(GuestFault::GP0);
    }
    area.bytes[28..32].copy_from_slice(&kept);
    shape_pointers(&mut area.bytes, wide);
    settle_x87(&mut area);
    core.vcpu.cpu.fpu = area;
    Ok(())
}

/// The checks of the whole XSAVE family; gives the requested components.
fn requested(core: &Core<'_>) -> Result<u64, GuestFault> {
    let cpu = &core.vcpu.cpu;
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(GuestFault::UD);
    }
    if cpu.cr0 & cr0::TS != 0 {
        return Err(GuestFault::NM);
    }
    Ok(cpu.xcr0 & (cpu.gpr[0] & 0xffff_ffff | cpu.gpr[2] << 32))
}

/// XSAVES and XRSTORS are for CPL 0.
fn supervisor(core: &Core<'_>) -> Result<(), GuestFault> {
    if core.vcpu.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(GuestFault::UD);
    }
    if core.vcpu.cpu.cpl() != 0 { Err(GuestFault::GP0) } else { Ok(()) }
}

/// The components that are not in their initial configuration (XINUSE, SDM Vol. 1 13.6).
#[must_use]
pub fn in_use(cpu: &CpuState) -> u64 {
    let area = &cpu.fpu.bytes;
    let initial = FpuArea::initial();
    let any = |range: Range<usize>| area[range.clone()] != initial.bytes[range];
    let mut components = 0;
    if any(CONTROL) || any(STACK) {
        components |= X87;
    }
    if any(FpuArea::XMM..FpuArea::XMM + 256) {
        components |= SSE;
    }
    if any(FpuArea::YMM_HIGH..FpuArea::SIZE) {
        components |= AVX;
    }
    if cpu.pkru != 0 {
        components |= PKRU;
    }
    components & cpu.xcr0
}

/// Where PKRU is in an image: of the compacted format, `room` says for which components it has room.
fn place_of_pkru(room: Option<u64>) -> u64 {
    u64::from(match room {
        None => PKRU_OFFSET,
        Some(room) if room & AVX != 0 => AVX_OFFSET + AVX_SIZE,
        Some(_) => AVX_OFFSET,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Save {
    Plain,
    /// XSAVEOPT: components in their initial configuration are not written.
    Optimized,
    /// XSAVEC, XSAVES: so, and the image says which components it has room for.
    Compacted,
}

fn save(core: &mut Core<'_>, i: &Instruction, kind: Save, wide: bool) -> Result<(), GuestFault> {
    let wanted = requested(core)?;
    let base = address(core, i, 64, true)?;
    let count = 16 * vectors(&core.vcpu.cpu);
    let mut image = core.vcpu.cpu.fpu.clone();
    shape_pointers(&mut image.bytes, wide);
    let mut used = in_use(&core.vcpu.cpu);
    if kind == Save::Compacted && mxcsr(&image) != MXCSR_INITIAL {
        used |= SSE;
    }
    let written = if kind == Save::Plain { wanted } else { wanted & used };
    let bytes = &image.bytes;
    let mut pieces: Vec<(u64, &[u8])> = Vec::with_capacity(6);
    if written & X87 != 0 {
        pieces.push((0, &bytes[CONTROL]));
        pieces.push((STACK.start as u64, &bytes[STACK]));
    }
    let with_mxcsr = if kind == Save::Compacted { written & SSE } else { wanted & (SSE | AVX) };
    if with_mxcsr != 0 {
        pieces.push((MXCSR_AND_MASK.start as u64, &bytes[MXCSR_AND_MASK]));
    }
    if written & SSE != 0 {
        pieces.push((FpuArea::XMM as u64, &bytes[FpuArea::XMM..FpuArea::XMM + count]));
    }
    if written & AVX != 0 {
        // Component 2 follows the header in either format, because no other component comes between.
        pieces.push((u64::from(AVX_OFFSET), &bytes[FpuArea::YMM_HIGH..FpuArea::YMM_HIGH + count]));
    }
    let pkru = u64::from(core.vcpu.cpu.pkru).to_le_bytes();
    if written & PKRU != 0 {
        pieces.push((place_of_pkru((kind == Save::Compacted).then_some(wanted)), &pkru));
    }
    let mut header = [0; 16];
    let (present, layout) = if kind == Save::Compacted {
        (wanted & used, COMPACTED | wanted)
    } else {
        // The header is read, changed and written: its faults are those of a write.
        let mut old = [0; 8];
        core.probe(base.add(HEADER), old.len(), true).map_err(|fault| operand::stack_fault(i, fault))?;
        read(core, i, base, HEADER, &mut old)?;
        (u64::from_le_bytes(old) & !wanted | wanted & used, 0)
    };
    header[..8].copy_from_slice(&present.to_le_bytes());
    header[8..].copy_from_slice(&layout.to_le_bytes());
    let size = if kind == Save::Compacted { 16 } else { 8 };
    pieces.push((HEADER, &header[..size]));
    write_pieces(core, i, base, &pieces)
}

fn restore(core: &mut Core<'_>, i: &Instruction, wide: bool, supervisor: bool) -> Result<(), GuestFault> {
    let wanted = requested(core)?;
    let base = address(core, i, 64, false)?;
    let mut header = [0; 64];
    read(core, i, base, HEADER, &mut header)?;
    let field = |at: usize| u64::from(word(&header[at..])) | u64::from(word(&header[at + 4..])) << 32;
    let (present, layout) = (field(0), field(8));
    let compacted = layout & COMPACTED != 0;
    let legal = if compacted {
        let room = layout & !COMPACTED;
        room & !core.vcpu.cpu.xcr0 == 0 && present & !room == 0 && header[16..].iter().all(|byte| *byte == 0)
    } else {
        !supervisor && present & !core.vcpu.cpu.xcr0 == 0 && header[8..24].iter().all(|byte| *byte == 0)
    };
    if !legal {
        return Err(GuestFault::GP0);
    }
    let count = 16 * vectors(&core.vcpu.cpu);
    let initial = FpuArea::initial();
    let mut area = core.vcpu.cpu.fpu.clone();
    let loads_mxcsr = if compacted { wanted & present & SSE } else { wanted & (SSE | AVX) };
    if loads_mxcsr != 0 {
        read(core, i, base, MXCSR.start as u64, &mut area.bytes[MXCSR])?;
        if mxcsr(&area) & !MXCSR_VALID != 0 {
            return Err(GuestFault::GP0);
        }
    } else if compacted && wanted & SSE != 0 {
        area.bytes[MXCSR].copy_from_slice(&initial.bytes[MXCSR]);
    }
    let xmm = FpuArea::XMM..FpuArea::XMM + count;
    let ymm = FpuArea::YMM_HIGH..FpuArea::YMM_HIGH + count;
    let places = [(X87, CONTROL, 0), (X87, STACK, STACK.start), (SSE, xmm.clone(), xmm.start), (AVX, ymm, 576)];
    for (component, range, offset) in places {
        if wanted & component == 0 {
            continue;
        }
        if present & component != 0 {
            read(core, i, base, offset as u64, &mut area.bytes[range])?;
        } else {
            area.bytes[range.clone()].copy_from_slice(&initial.bytes[range]);
        }
    }
    if wanted & present & X87 != 0 {
        shape_pointers(&mut area.bytes, wide);
        settle_x87(&mut area);
    }
    if wanted & PKRU != 0 {
        let mut pkru = [0; 4];
        if present & PKRU != 0 {
            let room = compacted.then_some(layout);
            read(core, i, base, place_of_pkru(room), &mut pkru)?;
        }
        set_pkru(core, u32::from_le_bytes(pkru));
    }
    core.vcpu.cpu.fpu = area;
    Ok(())
}

fn xgetbv(core: &mut Core<'_>) -> Result<(), GuestFault> {
    let cpu = &mut core.vcpu.cpu;
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(GuestFault::UD);
    }
    let value = match cpu.gpr[1] as u32 {
        0 => cpu.xcr0,
        1 => in_use(cpu) | if cpu.xcr0 & SSE != 0 && mxcsr(&cpu.fpu) != MXCSR_INITIAL { SSE } else { 0 },
        _ => return Err(GuestFault::GP0),
    };
    cpu.gpr[0] = value & 0xffff_ffff;
    cpu.gpr[2] = value >> 32;
    Ok(())
}

fn xsetbv(core: &mut Core<'_>) -> Result<(), GuestFault> {
    let components = core.vcpu.cpuid.xcr0_supported();
    let cpu = &mut core.vcpu.cpu;
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(GuestFault::UD);
    }
    let value = cpu.gpr[0] & 0xffff_ffff | cpu.gpr[2] << 32;
    let legal = value & !components == 0 && value & X87 != 0 && (value & AVX == 0 || value & SSE != 0);
    if cpu.cpl() != 0 || cpu.gpr[1] as u32 != 0 || !legal {
        return Err(GuestFault::GP0);
    }
    cpu.xcr0 = value;
    core.vcpu.stale.mode = true;
    Ok(())
}

/// #UD and #NM of LDMXCSR and STMXCSR, plain or with VEX.
fn check_mxcsr(core: &Core<'_>, i: &Instruction) -> Result<(), GuestFault> {
    let cpu = &core.vcpu.cpu;
    let legal = if matches!(i.mnemonic(), M::Vldmxcsr | M::Vstmxcsr) {
        cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & (SSE | AVX) == SSE | AVX
    } else {
        cpu.cr0 & cr0::EM == 0 && cpu.cr4 & cr4::OSFXSR != 0
    };
    if !legal {
        return Err(GuestFault::UD);
    }
    if cpu.cr0 & cr0::TS != 0 { Err(GuestFault::NM) } else { Ok(()) }
}

fn load_mxcsr(core: &mut Core<'_>, i: &Instruction) -> Result<(), GuestFault> {
    check_mxcsr(core, i)?;
    let value = operand::read(core, i, 0)? as u32;
    if value & !MXCSR_VALID != 0 {
        return Err(GuestFault::GP0);
    }
    core.vcpu.cpu.fpu.bytes[MXCSR].copy_from_slice(&value.to_le_bytes());
    Ok(())
}

fn store_mxcsr(core: &mut Core<'_>, i: &Instruction) -> Result<(), GuestFault> {
    check_mxcsr(core, i)?;
    let value = mxcsr(&core.vcpu.cpu.fpu);
    operand::write(core, i, 0, u64::from(value))
}
