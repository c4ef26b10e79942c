//! String instructions: repetition, direction, faults in the middle, overlaps.

use x86::fault::page_fault::WRITE;
use x86::rflags::{CF, DF, PF, SF, ZF};
use x86::state::gpr::{RAX, RCX, RDI, RDX, RSI};
use x86::{GuestFault, Gva, vector};

use super::machine::{CODE, DATA, Machine, handler};
use crate::interpret::Flow;

fn numbered<const N: usize>() -> [u8; N] {
    core::array::from_fn(|index| index as u8)
}

#[test]
fn rep_movs_copies_across_pages() {
    // rep movsb
    let mut machine = Machine::new(&[0xf3, 0xa4, 0xf4]);
    let bytes: [u8; 9000] = core::array::from_fn(|index| (index % 251) as u8);
    machine.poke(DATA + 5, &bytes);
    machine.set(RSI, DATA + 5).set(RDI, DATA + 0x8003).set(RCX, 9000).run_to_halt();
    assert_eq!(machine.peek::<9000>(DATA + 0x8003), bytes);
    assert_eq!((machine.gpr(RSI), machine.gpr(RDI), machine.gpr(RCX)), (DATA + 9005, DATA + 0x8003 + 9000, 0));
}

#[test]
fn overlapping_copies_go_element_by_element() {
    // rep movsb with the target one byte behind the source spreads the first byte
    let mut machine = Machine::new(&[0xf3, 0xa4, 0xf4]);
    machine.poke(DATA, &numbered::<200>());
    machine.poke(DATA, &[7]);
    machine.set(RSI, DATA).set(RDI, DATA + 1).set(RCX, 199).run_to_halt();
    assert_eq!(machine.peek::<200>(DATA), [7; 200]);
    // rep movsq, one quadword behind
    let mut machine = Machine::new(&[0xf3, 0x48, 0xa5, 0xf4]);
    machine.poke(DATA, &numbered::<128>());
    machine.set(RSI, DATA).set(RDI, DATA + 8).set(RCX, 15).run_to_halt();
    assert_eq!(machine.word(DATA + 120), 0x0706_0504_0302_0100);
    // downwards, target above: a proper memmove
    let mut machine = Machine::new(&[0xf3, 0xa4, 0xf4]);
    machine.poke(DATA, &numbered::<200>());
    machine.set_flags(DF).set(RSI, DATA + 199).set(RDI, DATA + 204).set(RCX, 200).run_to_halt();
    assert_eq!(machine.peek::<200>(DATA + 5), numbered::<200>());
    assert_eq!(machine.gpr(RSI), DATA - 1);
}

#[test]
fn copies_between_addresses_that_share_a_tlb_entry() {
    const FAR: u64 = 4 << 20;
    let bytes: [u8; 9000] = core::array::from_fn(|index| (index % 251) as u8);
    let (first, last) = (DATA + 0x3ff, DATA + 0x3ff + 8992);
    // rep movsq, upwards and downwards: the way in which Linux moves its compressed image out of its own way
    for (flags, from) in [(0, first), (DF, last)] {
        let mut machine = Machine::new(&[0xf3, 0x48, 0xa5, 0xf4]);
        machine.poke(first, &bytes);
        machine.set_flags(flags).set(RSI, from).set(RDI, from + FAR).set(RCX, 1125).run_to_halt();
        assert_eq!(machine.peek::<9000>(first + FAR), bytes);
        let end = if flags == 0 { first + 9000 } else { first - 8 };
        assert_eq!((machine.gpr(RSI), machine.gpr(RDI), machine.gpr(RCX)), (end, end + FAR, 0));
        assert!(machine.vcpu.tlb.fills < 100, "{} fills for 9000 bytes", machine.vcpu.tlb.fills);
    }
}

#[test]
fn downward_stores_and_overlaps() {
    // rep stosd, downwards over a page boundary that cuts an element
    let mut machine = Machine::new(&[0xf3, 0xab, 0xf4]);
    machine.set_flags(DF).set(RAX, 0x0403_0201).set(RDI, DATA + 0x1ffe).set(RCX, 1500).run_to_halt();
    let (low, high) = (DATA + 0x1ffe - 1499 * 4, DATA + 0x2002);
    assert_eq!(machine.peek::<6000>(low), core::array::from_fn(|index| (index % 4 + 1) as u8));
    assert_eq!((machine.peek::<1>(low - 1), machine.peek::<1>(high)), ([0], [0]));
    // rep movsb, downwards, target one byte below: the last byte is spread
    let mut machine = Machine::new(&[0xf3, 0xa4, 0xf4]);
    machine.poke(DATA + 1, &numbered::<200>());
    machine.set_flags(DF).set(RSI, DATA + 200).set(RDI, DATA + 199).set(RCX, 200).run_to_halt();
    assert_eq!(machine.peek::<201>(DATA), [199; 201]);
}

#[test]
fn the_same_page_twice_overlaps_too() {
    let mut machine = Machine::with_paging(&[0xf3, 0xa4, 0xf4]);
    machine.entry((DATA >> 12) + 4, DATA | 7);
    machine.poke(DATA, &numbered::<200>());
    machine.poke(DATA, &[7]);
    machine.set(RSI, DATA).set(RDI, DATA + 0x4001).set(RCX, 199).run_to_halt();
    assert_eq!(machine.peek::<200>(DATA), [7; 200]);
}

#[test]
fn a_fault_in_the_middle_keeps_what_was_done() {
    // rep stosd into a page whose successor is absent
    let mut machine = Machine::with_paging(&[0xf3, 0xab]);
    machine.entry((DATA >> 12) + 1, 0);
    machine.set(RAX, 0x0403_0201).set(RDI, DATA + 0xf00).set(RCX, 100);
    assert_eq!(machine.execute(), Err(GuestFault::page(Gva(DATA + 0x1000), WRITE)));
    assert_eq!((machine.gpr(RCX), machine.gpr(RDI), machine.rip()), (36, DATA + 0x1000, CODE));
    assert_eq!(machine.peek::<4>(DATA + 0xffc), [1, 2, 3, 4]);
    machine.step();
    assert_eq!((machine.rip(), machine.vcpu.cpu.cr2), (handler(vector::PF), DATA + 0x1000));
    machine.entry((DATA >> 12) + 1, (DATA + 0x1000) | 7);
    machine.cpu().rip = CODE;
    assert_eq!(machine.execute(), Ok(Flow::Next));
    assert_eq!(machine.gpr(RCX), 0);
}

#[test]
fn compares_stop_where_they_should() {
    // repe cmpsb; repne scasb
    let mut machine = Machine::new(&[0xf3, 0xa6]);
    machine.poke(DATA, b"hello world");
    machine.poke(DATA + 0x100, b"hello there");
    machine.set(RSI, DATA).set(RDI, DATA + 0x100).set(RCX, 11).step();
    assert_eq!((machine.gpr(RCX), machine.gpr(RSI)), (4, DATA + 7));
    // 'w' - 't' = 3
    assert_eq!(machine.flags(), PF);
    let mut machine = Machine::new(&[0xf2, 0xae]);
    machine.poke(DATA, b"text\0more");
    machine.set(RDI, DATA).set(RCX, u64::MAX).step();
    assert_eq!((!machine.gpr(RCX), machine.gpr(RDI)), (5, DATA + 5));
    assert_eq!(machine.flags(), ZF | PF);
    // a count of zero changes nothing, not even flags
    let mut machine = Machine::new(&[0xf3, 0xa6]);
    machine.set_flags(CF | SF).set(RSI, 1 << 63).set(RDI, 1 << 63).step();
    assert_eq!((machine.flags(), machine.rip()), (CF | SF, CODE + 2));
}

#[test]
fn small_addresses_wrap_and_clear() {
    // addr32 rep stosb: the pointer is EDI, and a 32-bit result clears the upper halves
    let mut machine = Machine::new(&[0x67, 0xf3, 0xaa]);
    machine.set(RAX, 0x55).set(RDI, 0x7_0002_0000).set(RCX, 0x7_0000_0003).step();
    assert_eq!(machine.word(DATA), 0x55_5555);
    assert_eq!((machine.gpr(RDI), machine.gpr(RCX)), (DATA + 3, 0));
    // lodsw; fs lodsb
    let mut machine = Machine::new(&[0x66, 0xad, 0x64, 0xac]);
    machine.poke(DATA, &[1, 2, 3]);
    machine.set(RSI, DATA).set(RAX, u64::MAX).step();
    assert_eq!((machine.gpr(RAX), machine.gpr(RSI)), (0xffff_ffff_ffff_0201, DATA + 2));
    machine.cpu().segments[x86::seg::FS].base = DATA;
    assert_eq!(machine.set(RSI, 2).step().gpr(RAX), 0xffff_ffff_ffff_0203);
}

#[test]
fn a_long_repetition_lets_others_in() {
    let mut machine = Machine::new(&[0xf3, 0xac]);
    machine.set(RSI, DATA).set(RCX, 10_000);
    assert_eq!(machine.execute(), Ok(Flow::Jump(CODE)));
    assert!((1..10_000).contains(&machine.gpr(RCX)));
    assert_eq!(machine.gpr(RSI) - DATA, 10_000 - machine.gpr(RCX));
}

#[test]
fn port_strings() {
    // rep outsb; rep insw
    let mut machine = Machine::new(&[0xf3, 0x6e, 0x66, 0xf3, 0x6d]);
    machine.poke(DATA, b"ab");
    machine.set(RDX, 0x3f8).set(RSI, DATA).set(RCX, 2).step();
    assert_eq!(machine.ports.written, [(0x3f8, 1, 0x61), (0x3f8, 1, 0x62)]);
    machine.set(RDI, DATA).set(RCX, 2).step();
    assert_eq!(machine.peek::<4>(DATA), [0x11, 0x20, 0x12, 0x20]);
}

#[test]
fn no_data_is_taken_from_a_port_that_cannot_be_stored() {
    let mut machine = Machine::with_paging(&[0x6c]);
    machine.entry(DATA >> 12, 0);
    machine.set(RDI, DATA);
    assert_eq!(machine.execute(), Err(GuestFault::page(Gva(DATA), WRITE)));
    assert_eq!(machine.ports.reads, 0);
}
