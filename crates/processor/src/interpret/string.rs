//! String instructions. A repeated one keeps RCX, RSI and RDI exact at every element, so that a fault, or a request for
//! attention, finds it between two elements, to be resumed by running it again.

use x86::rflags::{DF, RF, TF, ZF};
use x86::state::gpr::{RAX, RCX, RDI, RSI};
use x86::{GuestFault, Gva, PAGE_SIZE, seg};

use super::Flow;
use super::flags;
use super::op::{self, Op, get, ones, set};
use super::transfer::general;
use crate::core::Core;

/// Elements that a repeated instruction does before it lets the step loop look around: some microseconds.
const TURN: u64 = 4096;
/// Below this many bytes the bulk path costs more than it saves.
const BULK: u64 = 64;

/// What the instruction does with an element.
pub mod operation {
    pub const MOVS: u8 = 0;
    pub const STOS: u8 = 1;
    pub const LODS: u8 = 2;
    pub const CMPS: u8 = 3;
    pub const SCAS: u8 = 4;
}

/// The pointers and the count of a string instruction, by address size.
struct Pointers {
    mask: u64,
    segment: usize,
    step: u64,
}

impl Pointers {
    fn of<const S: usize>(core: &Core<'_>, op: &Op) -> Pointers {
        let size = super::operand::string_address_size(&op.instruction);
        let down = core.vcpu.cpu.rflags & DF != 0;
        Pointers {
            mask: u64::MAX >> (64 - 8 * size),
            segment: super::operand::string_segment(&op.instruction),
            step: if down { (S as u64).wrapping_neg() } else { S as u64 },
        }
    }

    fn offset(&self, core: &Core<'_>, register: usize) -> u64 {
        core.vcpu.cpu.gpr[register] & self.mask
    }

    fn source(&self, core: &Core<'_>, size: usize) -> Result<Gva, GuestFault> {
        op::linear(core, self.segment, self.offset(core, RSI), size, false)
    }

    fn target(&self, core: &Core<'_>, size: usize, write: bool) -> Result<Gva, GuestFault> {
        op::linear(core, seg::ES, self.offset(core, RDI), size, write)
    }

    /// Sets a pointer or the count: a 32-bit one clears the upper half, a 16-bit one keeps the rest.
    fn put(&self, core: &mut Core<'_>, register: usize, value: u64) {
        let whole = &mut core.vcpu.cpu.gpr[register];
        *whole = if self.mask == 0xffff { *whole & !0xffff | value & 0xffff } else { value & self.mask };
    }

    fn advance(&self, core: &mut Core<'_>, register: usize, elements: u64) {
        let value = core.vcpu.cpu.gpr[register].wrapping_add(self.step.wrapping_mul(elements));
        self.put(core, register, value);
    }

    /// Whether the mode lets a run of bytes be addressed without asking the segment for each element.
    fn is_flat(&self, core: &Core<'_>) -> bool {
        core.vcpu.cpu.is_code64() && self.mask == u64::MAX && self.segment < seg::FS
    }
}

/// One element.
#[inline]
fn element<const O: u8, const S: usize>(core: &mut Core<'_>, pointers: &Pointers) -> Result<(), GuestFault> {
    match O {
        operation::MOVS => {
            let (from, to) = (pointers.source(core, S)?, pointers.target(core, S, true)?);
            let value = core.read(from, S)?;
            core.write(to, S, value)?;
        }
        operation::STOS => {
            let to = pointers.target(core, S, true)?;
            core.write(to, S, get::<S>(core, general(RAX)))?;
        }
        operation::LODS => {
            let from = pointers.source(core, S)?;
            let value = core.read(from, S)?;
            set::<S>(core, general(RAX), value);
        }
        operation::CMPS => {
            let (from, to) = (pointers.source(core, S)?, pointers.target(core, S, false)?);
            let (left, right) = (core.read(from, S)?, core.read(to, S)?);
            flags::set(core, flags::subtract::<S>(left, right, 0).1);
        }
        _ => {
            let to = pointers.target(core, S, false)?;
            let right = core.read(to, S)?;
            flags::set(core, flags::subtract::<S>(get::<S>(core, general(RAX)), right, 0).1);
        }
    }
    if matches!(O, operation::MOVS | operation::LODS | operation::CMPS) {
        pointers.advance(core, RSI, 1);
    }
    if O != operation::LODS {
        pointers.advance(core, RDI, 1);
    }
    Ok(())
}

/// MOVS, STOS, LODS, CMPS and SCAS of `S` bytes, once or repeated.
pub fn string<const O: u8, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let pointers = Pointers::of::<S>(core, op);
    if !op.is_repeated() {
        element::<O, S>(core, &pointers)?;
        return Ok(Flow::Next);
    }
    let compares = matches!(O, operation::CMPS | operation::SCAS);
    let wanted = if op.instruction.has_repne_prefix() { 0 } else { ZF };
    let turn = turn(core);
    let mut left = turn;
    loop {
        let count = pointers.offset(core, RCX);
        if count == 0 {
            return Ok(Flow::Next);
        }
        if left == 0 {
            return Ok(again(core));
        }
        let done = bulk::<O, S>(core, &pointers, count, left)?;
        if done > 0 {
            left -= done;
            pointers.put(core, RCX, count - done);
            continue;
        }
        element::<O, S>(core, &pointers)?;
        pointers.put(core, RCX, count - 1);
        if compares && core.vcpu.cpu.rflags & ZF != wanted {
            return Ok(Flow::Next);
        }
        left -= 1;
    }
}

/// How many elements to do before the step loop looks around. Under single-step and breakpoints each is a step of its own.
pub fn turn(core: &Core<'_>) -> u64 {
    if core.vcpu.cpu.rflags & TF != 0 || core.vcpu.checks != 0 { 1 } else { TURN }
}

/// The instruction is not finished and runs again. RF keeps an instruction breakpoint from hitting it again: Intel SDM
/// (2024-12) Vol. 3B 19.3.1.1 "Instruction-Breakpoint Exception Condition".
pub fn again(core: &mut Core<'_>) -> Flow {
    if core.vcpu.checks != 0 {
        core.vcpu.cpu.rflags |= RF;
    }
    Flow::Jump(core.vcpu.cpu.rip)
}

/// Does many elements of MOVS or STOS at once inside one page (of each side), when that is the same as doing them one by one.
/// Says how many; 0 leaves it to the element loop, which also finds the faults.
fn bulk<const O: u8, const S: usize>(
    core: &mut Core<'_>,
    pointers: &Pointers,
    count: u64,
    left: u64,
) -> Result<u64, GuestFault> {
    let size = S as u64;
    if !matches!(O, operation::MOVS | operation::STOS) || core.vcpu.checks != 0 {
        return Ok(0);
    }
    let wanted = count.min(left);
    if wanted.saturating_mul(size) < BULK || !pointers.is_flat(core) {
        return Ok(0);
    }
    let down = pointers.step != size;
    // Whole elements from this one to the end of its page, in the direction of the walk.
    let room = |address: Gva| match (PAGE_SIZE - address.offset()) / size {
        0 => 0,
        _ if down => address.offset() / size + 1,
        elements => elements,
    };
    let (to, from) = (Gva(core.vcpu.cpu.gpr[RDI]), Gva(core.vcpu.cpu.gpr[RSI]));
    let mut elements = wanted.min(room(to));
    if O == operation::MOVS {
        elements = elements.min(room(from));
    }
    if elements * size < BULK {
        return Ok(0);
    }
    let bytes = (elements * size) as usize;
    let lowest = |address: Gva| if down { Gva(address.0.wrapping_sub((elements - 1) * size)) } else { address };
    let done = if O == operation::MOVS {
        core.copy_block(lowest(to), lowest(from), bytes, down)
    } else {
        let mut buffer = [0; PAGE_SIZE as usize];
        let value = core.vcpu.cpu.gpr[RAX].to_le_bytes();
        if value[..S].iter().all(|byte| *byte == value[0]) {
            // Clearing memory, what STOS is mostly for, as fast as the host can.
            buffer[..bytes].fill(value[0]);
        } else {
            for place in buffer[..bytes].chunks_exact_mut(S) {
                place.copy_from_slice(&value[..S]);
            }
        }
        core.store_block(lowest(to), &buffer[..bytes])
    };
    if !done {
        return Ok(0);
    }
    if O == operation::MOVS {
        pointers.advance(core, RSI, elements);
    }
    pointers.advance(core, RDI, elements);
    Ok(elements)
}

/// INS and OUTS: see `port.rs` for the check of the port.
pub fn port_string<const OUT: bool, const S: usize>(core: &mut Core<'_>, op: &Op) -> Result<Flow, GuestFault> {
    let pointers = Pointers::of::<S>(core, op);
    let port = core.vcpu.cpu.gpr[x86::state::gpr::RDX] as u16;
    super::port::check(core, port, S as u8)?;
    let mut left = turn(core).min(64);
    loop {
        let count = if op.is_repeated() { pointers.offset(core, RCX) } else { 1 };
        if count == 0 {
            return Ok(Flow::Next);
        }
        if left == 0 {
            return Ok(again(core));
        }
        if OUT {
            let from = pointers.source(core, S)?;
            let value = core.read(from, S)?;
            core.outside.port_write(port, S as u8, value as u32);
            pointers.advance(core, RSI, 1);
        } else {
            // A device's data must not be taken from it and then lost in a fault.
            let to = pointers.target(core, S, true)?;
            core.probe(to, S, true)?;
            let value = u64::from(core.outside.port_read(port, S as u8));
            core.write(to, S, value & ones::<S>())?;
            pointers.advance(core, RDI, 1);
        }
        if !op.is_repeated() {
            return Ok(Flow::Next);
        }
        pointers.put(core, RCX, count - 1);
        left -= 1;
    }
}
