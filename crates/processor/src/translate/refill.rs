//! What happens after a probe of the TLB has failed, as far as host code can mend it without leaving translated code: the
//! TLB is filled from the shadow, and an access that crosses from one page into the next is put together in a buffer.

use memory::shadow;
use memory::tlb::{Bank, ENTRIES, GROUP};

use super::asm::{Alu, Asm, BASE, Label, Mem, RAX, RCX, RDI, RSI, Reg, T0, T1, cc};
use super::frame;

/// What a failed probe does when the page is in the TLB: then the bytes that it checked reach into the next page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// Leaves, and the interpreter runs the instruction.
    Leave,
    /// Goes on behind the jump that follows the site: the code there checks the accesses one by one.
    Apart,
    /// Goes on there, too, with T1 + T0 the address of a buffer that holds the bytes of both pages.
    Buffer,
}

impl Crossing {
    pub const ALL: [Crossing; 3] = [Crossing::Leave, Crossing::Apart, Crossing::Buffer];
}

/// The page's address is in RAX, the TLB's entry for it is at T1, the address in T0. Fills the entry from the shadow or
/// goes to `miss`. Clobbers RAX, RCX and flags. RSP is `moved` below the base.
fn fill(asm: &mut Asm, bank: Bank, write: bool, moved: i32, miss: Label) {
    let at = |disp: i32| Mem::vcpu(disp + moved);
    let word = |index: i32| Mem::base(RCX, 8 * index);
    // rcx = the shadow's entry; rax = the tag that it should have
    asm.shr(RAX, 12);
    // imul rcx, generation, stride
    asm.op_mem_raw(true, &[0x69], RCX.0, at(frame::generation(bank)));
    asm.dword(shadow::STRIDE as u32);
    asm.alu(Alu::Add, RCX, RAX);
    asm.alu_imm32(Alu::And, RCX, (shadow::ENTRIES - 1) as i32);
    asm.shl(RCX, 5);
    asm.alu_load(Alu::Add, RCX, at(frame::shadow(bank)));
    asm.shl(RAX, 12);
    asm.alu_load(Alu::Or, RAX, at(frame::generation(bank)));
    asm.alu_load(Alu::Cmp, RAX, word(0));
    asm.jcc(cc::NZ, miss);
    asm.alu_imm(Alu::And, RAX, -4096);
    if write {
        asm.alu_load(Alu::Cmp, RAX, word(1));
        asm.jcc(cc::NZ, miss);
    }
    asm.store(Mem::base(T1, frame::TLB_READ), RAX);
    for (index, field) in [(1, frame::TLB_WRITE), (2, frame::TLB_PAGE), (3, frame::TLB_PAGE + 8)] {
        asm.load(RAX, word(index));
        asm.store(Mem::base(T1, field), RAX);
    }
    asm.increment(at(frame::SHADOW_HITS));
    // A bit for each group of entries.
    asm.mov(RAX, T0);
    asm.shr(RAX, 12 + GROUP.trailing_zeros() as u8);
    asm.load(RCX, at(frame::dirty(bank)));
    // bts rcx, rax: the offset is taken modulo 64
    asm.bytes(&[0x48, 0x0f, 0xab, 0xc1]);
    asm.store(at(frame::dirty(bank)), RCX);
}

/// Behind the site of a probe comes a jump back to it; RET goes there, or past it after this many bytes more.
const PAST_THE_SITE: i32 = 10;

/// Emits the subroutine for a bank and kind of access. The address is in T0; the return address names a probe's site.
/// Returns with the TLB filled, or as `crossing` says, or goes to `leave` with everything as it came. Clobbers T1 and
/// flags.
pub fn refill(asm: &mut Asm, bank: Bank, write: bool, crossing: Crossing, leave: u64) {
    // RSP is 8 below the base on entry, and 24 below after two pushes.
    const MOVED: i32 = 24;
    let at = |disp: i32| Mem::vcpu(disp + MOVED);
    let tag = if write { frame::TLB_WRITE } else { frame::TLB_READ };
    let miss = asm.label();
    let crosses = asm.label();
    asm.push(RAX);
    asm.push(RCX);
    asm.increment(at(frame::TLB_MISSES));
    asm.mov(T1, T0);
    asm.shr(T1, 7);
    asm.alu_imm32(Alu::And, T1, ((ENTRIES - 1) << 5) as i32);
    asm.lea(T1, Mem::indexed(BASE, T1, 0, frame::tlb(bank) + MOVED));
    asm.mov(RAX, T0);
    asm.alu_imm(Alu::And, RAX, -4096);
    asm.alu_load(Alu::Cmp, RAX, Mem::base(T1, tag));
    asm.jcc(cc::Z, if crossing == Crossing::Leave { miss } else { crosses });
    fill(asm, bank, write, MOVED, miss);
    asm.pop(RCX);
    asm.pop(RAX);
    asm.byte(0xc3);
    if crossing != Crossing::Leave {
        asm.bind(crosses);
        if crossing == Crossing::Buffer {
            gather(asm, bank, write, MOVED, miss);
        }
        asm.pop(RCX);
        asm.pop(RAX);
        asm.alu_mem_imm(Alu::Add, Mem::vcpu(0), PAST_THE_SITE);
        asm.byte(0xc3);
    }
    asm.bind(miss);
    asm.pop(RCX);
    asm.pop(RAX);
    asm.jmp_address(leave);
}

/// The most bytes of an access, on either side of the boundary.
const HALF: i32 = 64;

/// Puts the end of the first page and the start of the second side by side into the buffer, from where T1 + T0 is the
/// address of the access: as far from a multiple of 64 as the guest's own, so that alignment is checked as it would be. T1 is
/// the first page's entry, T0 the address. Goes to `miss` when the second page is not to be had.
fn gather(asm: &mut Asm, bank: Bank, write: bool, moved: i32, miss: Label) {
    let at = |disp: i32| Mem::vcpu(disp + moved);
    let tag = if write { frame::TLB_WRITE } else { frame::TLB_READ };
    let lost = asm.label();
    let both = asm.label();
    asm.store(at(frame::CROSSING_ADDRESS), T0);
    asm.load(RAX, Mem::base(T1, frame::TLB_PAGE));
    asm.store(at(frame::CROSSING_FIRST), RAX);
    // From here on T0 is the second page's address. At the end of the address space it is 0, as for the processor.
    asm.alu_imm(Alu::And, T0, -4096);
    asm.alu_imm(Alu::Sub, T0, -4096);
    asm.mov(T1, T0);
    asm.shr(T1, 7);
    asm.alu_imm32(Alu::And, T1, ((ENTRIES - 1) << 5) as i32);
    asm.lea(T1, Mem::indexed(BASE, T1, 0, frame::tlb(bank) + moved));
    asm.mov(RAX, T0);
    asm.alu_load(Alu::Cmp, RAX, Mem::base(T1, tag));
    asm.jcc(cc::Z, both);
    // Neighbours never displace each other, so the first page's entry stays.
    fill(asm, bank, write, moved, lost);
    asm.bind(both);
    asm.load(RCX, Mem::base(T1, frame::TLB_PAGE));
    asm.store(at(frame::CROSSING_SECOND), RCX);
    for offset in (0..HALF).step_by(8) {
        asm.load(RAX, Mem::base(RCX, offset));
        asm.store(at(frame::CROSSING_BUFFER + HALF + offset), RAX);
    }
    asm.load(RCX, at(frame::CROSSING_FIRST));
    for offset in (0..HALF).step_by(8) {
        asm.load(RAX, Mem::base(RCX, 4096 - HALF + offset));
        asm.store(at(frame::CROSSING_BUFFER + offset), RAX);
    }
    asm.load(T0, at(frame::CROSSING_ADDRESS));
    asm.alu_imm32(Alu::And, T0, 4095);
    asm.alu(Alu::Add, RCX, T0);
    asm.store(at(frame::CROSSING_FIRST), RCX);
    asm.alu_imm(Alu::Sub, T0, 4096 - HALF);
    asm.lea(T1, at(frame::CROSSING_BUFFER));
    let past = asm.label();
    asm.jmp(past);
    asm.bind(lost);
    asm.load(T0, at(frame::CROSSING_ADDRESS));
    asm.jmp(miss);
    asm.bind(past);
    asm.store(at(frame::CROSSING_OFFSET), T0);
}

/// Emits the subroutine that brings a store from the buffer to its two pages: T0 bytes. Clobbers T0 and T1, but no flags.
pub fn scatter(asm: &mut Asm) {
    let at = |disp: i32| Mem::vcpu(disp + 8);
    let saved = |index: i32| at(frame::CROSSING_SAVED + 8 * index);
    let copy = |asm: &mut Asm| asm.bytes(&[0xf3, 0xa4]);
    for (index, reg) in [(0, RSI), (1, RDI), (2, RCX)] {
        asm.store(saved(index), reg);
    }
    asm.load(RDI, at(frame::CROSSING_OFFSET));
    asm.lea(RSI, Mem::indexed(BASE, RDI, 0, frame::CROSSING_BUFFER + 8));
    // t1 = minus the bytes in the first page, rcx = these bytes
    asm.lea(T1, Mem::base(RDI, -HALF));
    asm.mov(RCX, T1);
    negate(asm, RCX);
    asm.load(RDI, at(frame::CROSSING_FIRST));
    copy(asm);
    asm.lea(RCX, Mem::indexed(T0, T1, 0, 0));
    asm.load(RDI, at(frame::CROSSING_SECOND));
    copy(asm);
    for (index, reg) in [(0, RSI), (1, RDI), (2, RCX)] {
        asm.load(reg, saved(index));
    }
    asm.byte(0xc3);
}

/// NEG without flags: the complement plus one.
fn negate(asm: &mut Asm, reg: Reg) {
    asm.op_reg_raw(true, &[0xf7], Reg(2), reg);
    asm.lea(reg, Mem::base(reg, 1));
}
