//! 32-bit code: segments with bases and limits, the instructions that 64-bit code lost.

use x86::rflags::{AF, CF, PF, SF, ZF};
use x86::state::gpr::{RAX, RBX, RCX, RDX, RSP};
use x86::{GuestFault, Segment, seg, vector};

use super::machine::{CODE, DATA, Machine, STACK, handler};

#[test]
fn segments_have_bases_and_limits() {
    // mov eax, [ebx]
    let mut machine = Machine::new32(&[0x8b, 0x03]);
    machine.cpu().segments[seg::DS] = Segment { base: DATA, limit: 0xff, ..Segment::flat_data(16, 0) };
    machine.poke(DATA + 0xfc, &[1, 2, 3, 4]);
    assert_eq!(machine.set(RBX, 0xfc).step().gpr(RAX), 0x0403_0201);
    machine.set(RBX, 0xfd).cpu().rip = CODE;
    assert_eq!(machine.execute(), Err(GuestFault::GP0));
    // through SS (mov eax, [esp + ebx]) it is #SS
    let mut machine = Machine::new32(&[0x8b, 0x04, 0x1c]);
    machine.cpu().segments[seg::SS].limit = 0xffff;
    assert_eq!(machine.set(RBX, 0xffff_0000).execute(), Err(GuestFault::SS0));
}

#[test]
fn kinds_of_segment_are_checked() {
    // mov [ebx], eax into a read-only segment, an unusable one, an expand-down one
    let store = [0x89, 0x03];
    let with = |attributes: u16, limit: u32, offset: u64| {
        let mut machine = Machine::new32(&store);
        machine.cpu().segments[seg::DS] = Segment { base: 0, limit, selector: 16, attributes };
        machine.set(RBX, offset).execute().err()
    };
    assert_eq!(with(0xc091, u32::MAX, DATA), Some(GuestFault::GP0));
    assert_eq!(with(0, 0, DATA), Some(GuestFault::GP0));
    assert_eq!(with(0xc097, 0xffff, 0x1000), Some(GuestFault::GP0), "below the limit of an expand-down segment");
    assert_eq!(with(0xc097, 0xffff, DATA), None);
    assert_eq!(with(0xc093, u32::MAX, DATA), None);
}

#[test]
fn the_code_segment_has_a_base_and_a_limit() {
    // mov eax, 1 at CS base
    let mut machine = Machine::new32(&[0xb8, 1, 0, 0, 0]);
    machine.cpu().segments[seg::CS].base = CODE;
    machine.cpu().rip = 0;
    machine.step();
    assert_eq!((machine.gpr(RAX), machine.rip()), (1, 5));
    let mut machine = Machine::new32(&[0xb8, 1, 0, 0, 0]);
    machine.cpu().segments[seg::CS] = Segment { base: CODE, limit: 3, ..Segment::flat_code32(8, 0) };
    machine.cpu().rip = 0;
    assert_eq!(machine.step().rip(), handler(vector::GP));
}

#[test]
fn all_registers_at_once() {
    // pusha; popa
    let mut machine = Machine::new32(&[0x60, 0x61]);
    machine.set(RAX, 1).set(RCX, 2).set(RDX, 3).set(RBX, 4).step();
    assert_eq!(machine.gpr(RSP), STACK - 32);
    assert_eq!(machine.peek::<4>(STACK - 4), 1_u32.to_le_bytes());
    assert_eq!(machine.peek::<4>(STACK - 20), (STACK as u32).to_le_bytes());
    machine.set(RAX, 0).set(RBX, 0).step();
    assert_eq!((machine.gpr(RAX), machine.gpr(RBX), machine.gpr(RSP)), (1, 4, STACK));
}

#[test]
fn near_branches_are_32_bits_wide() {
    // call +0; push cs is 4 bytes
    let mut machine = Machine::new32(&[0xe8, 0, 0, 0, 0, 0x0e]);
    machine.step();
    assert_eq!((machine.rip(), machine.gpr(RSP)), (CODE + 5, STACK - 4));
    assert_eq!(machine.step().gpr(RSP), STACK - 8);
    assert_eq!(machine.peek::<4>(STACK - 8), [8, 0, 0, 0]);
}

#[test]
fn decimal_adjustments() {
    // Examples of the manual: 0x79 + 0x35 is 0xae, DAA makes it 0x14 with carry; 0x35 - 0x47 is 0xee, DAS makes it 0x88.
    for (code, ax, before, wanted, after) in [
        (&[0x27][..], 0xae, SF, 0x14, AF | CF | PF),
        (&[0x2f], 0xee, CF | SF | AF | PF, 0x88, AF | CF | SF | PF),
        (&[0x27], 0x2e, 0, 0x34, AF),
        (&[0x37], 0x000b, 0, 0x0101, AF | CF),
        (&[0x3f], 0x02fa, AF, 0x0104, AF | CF),
        (&[0x37], 0x0009, 0, 0x0009, PF),
        (&[0xd4, 10], 0x0053, 0, 0x0803, PF),
        (&[0xd5, 10], 0x0803, 0, 0x0053, PF),
        (&[0xd4, 16], 0x0030, 0, 0x0300, PF | ZF),
    ] {
        let mut machine = Machine::new32(code);
        machine.set_flags(before).set(RAX, ax).step();
        assert_eq!((machine.gpr(RAX), machine.flags()), (wanted, after), "{code:x?} of {ax:#x}");
    }
    assert_eq!(Machine::new32(&[0xd4, 0]).execute(), Err(GuestFault::DE));
}

#[test]
fn bounds() {
    // bound eax, [ebx]
    let code = [0x62, 0x03];
    for (index, inside) in [(0xffff_fffe, true), (5, true), (6, false), (0xffff_fffd, false)] {
        let mut machine = Machine::new32(&code);
        machine.poke(DATA, &[0xfe, 0xff, 0xff, 0xff, 5]);
        let outcome = machine.set(RBX, DATA).set(RAX, index).execute();
        assert_eq!(outcome.is_ok(), inside, "{index:#x}");
        if !inside {
            assert_eq!(outcome, Err(GuestFault::plain(vector::BR)));
        }
    }
}

#[test]
fn lost_instructions_are_invalid_in_64_bit_code() {
    // pusha, popa, aaa, daa, push cs, into, bound/EVEX, aam
    for code in [0x60, 0x61, 0x37, 0x27, 0x0e, 0xce, 0xd4] {
        let mut machine = Machine::new(&[code, 0, 0]);
        assert_eq!(machine.step().rip(), handler(vector::UD), "{code:#x}");
    }
}
