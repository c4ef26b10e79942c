//! The second look after a TLB miss, in host code: from the shadow into the TLB without leaving translated code.

use memory::shadow;
use memory::tlb::{Bank, ENTRIES, GROUP};

use super::asm::{Alu, Asm, Mem, RAX, RCX, T0, T1, cc};
use super::frame;

/// Emits the subroutine for a bank and kind of access. The address is in T0; the return address names a probe's site.
/// Returns with the TLB filled, or goes to `leave` with everything as it came. Clobbers T1 and flags.
pub fn refill(asm: &mut Asm, bank: Bank, write: bool, leave: u64) {
    // RSP is 8 below the base on entry, and 24 below after two pushes.
    const MOVED: i32 = 24;
    let at = |disp: i32| Mem::vcpu(disp + MOVED);
    let word = |index: i32| Mem::base(RCX, 8 * index);
    let miss = asm.label();
    asm.push(RAX);
    asm.push(RCX);
    asm.increment(at(frame::TLB_MISSES));
    // rcx = the shadow's entry; rax = the tag that it should have
    asm.mov(RAX, T0);
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
    // r11 = the TLB's entry
    asm.mov(T1, T0);
    asm.shr(T1, 7);
    asm.alu_imm32(Alu::And, T1, ((ENTRIES - 1) << 5) as i32);
    asm.lea(T1, Mem::indexed(super::asm::BASE, T1, 0, frame::tlb(bank) + MOVED));
    // It is there already: the access failed because it crosses a page.
    asm.alu_load(Alu::Cmp, RAX, Mem::base(T1, if write { frame::TLB_WRITE } else { frame::TLB_READ }));
    asm.jcc(cc::Z, miss);
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
    asm.pop(RCX);
    asm.pop(RAX);
    asm.byte(0xc3);
    asm.bind(miss);
    asm.pop(RCX);
    asm.pop(RAX);
    asm.jmp_address(leave);
}
