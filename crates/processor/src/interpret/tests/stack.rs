//! Pushes, pops, frames and flags.

use x86::rflags::{AC, CF, DF, FIXED, ID, IF, IOPL, NT, RF, TF, ZF};
use x86::state::gpr::{RAX, RBP, RBX, RSP};
use x86::{GuestFault, Segment, seg};

use super::machine::{CODE, Machine, STACK};
use crate::interpret::Flow;

#[test]
fn the_stack_pointer_itself() {
    // push rsp pushes the old value; pop rsp loads what was there
    let mut machine = Machine::new(&[0x54, 0x5c]);
    machine.step();
    assert_eq!((machine.gpr(RSP), machine.word(STACK - 8)), (STACK - 8, STACK));
    assert_eq!(machine.step().gpr(RSP), STACK);
    // pop [rsp]: the address uses the pointer after the pop; push [rsp] that before
    let mut machine = Machine::new(&[0x8f, 0x04, 0x24, 0xff, 0x34, 0x24]);
    machine.poke(STACK, &[5]);
    machine.step();
    assert_eq!((machine.gpr(RSP), machine.word(STACK + 8)), (STACK + 8, 5));
    machine.step();
    assert_eq!((machine.gpr(RSP), machine.word(STACK)), (STACK, 5));
}

#[test]
fn widths() {
    // push -1 (imm8); push ax; pop bx; push fs
    let mut machine = Machine::new(&[0x6a, 0xff, 0x66, 0x50, 0x66, 0x5b, 0x0f, 0xa0]);
    machine.poke(STACK - 16, &[0xff; 8]);
    machine.set(RAX, 0x1234).set(RBX, u64::MAX).step();
    assert_eq!(machine.word(STACK - 8), u64::MAX);
    machine.step();
    assert_eq!(machine.gpr(RSP), STACK - 10);
    assert_eq!(machine.step().gpr(RBX), 0xffff_ffff_ffff_1234);
    machine.step();
    assert_eq!((machine.gpr(RSP), machine.word(STACK - 16)), (STACK - 16, 16));
}

#[test]
fn faults_leave_the_pointer() {
    // pop [rbx] to an address that is not canonical; push with such a pointer
    let mut machine = Machine::new(&[0x8f, 0x03]);
    assert_eq!(machine.set(RBX, 1 << 50).execute(), Err(GuestFault::GP0));
    assert_eq!(machine.gpr(RSP), STACK);
    let mut machine = Machine::new(&[0x50]);
    assert_eq!(machine.set(RSP, 1 << 50).execute(), Err(GuestFault::SS0));
}

#[test]
fn frames() {
    // enter 32, 0; leave
    let mut machine = Machine::new(&[0xc8, 32, 0, 0, 0xc9]);
    machine.set(RBP, 0x1111).step();
    assert_eq!((machine.gpr(RBP), machine.gpr(RSP), machine.word(STACK - 8)), (STACK - 8, STACK - 40, 0x1111));
    machine.step();
    assert_eq!((machine.gpr(RBP), machine.gpr(RSP)), (0x1111, STACK));
    // enter 8, 2 copies one outer frame pointer and its own
    let mut machine = Machine::new(&[0xc8, 8, 0, 2]);
    machine.poke(STACK + 0x100 - 8, &0x7777_u64.to_le_bytes());
    machine.set(RBP, STACK + 0x100).step();
    assert_eq!(machine.word(STACK - 8), STACK + 0x100);
    assert_eq!(machine.word(STACK - 16), 0x7777);
    assert_eq!(machine.word(STACK - 24), STACK - 8);
    assert_eq!((machine.gpr(RBP), machine.gpr(RSP)), (STACK - 8, STACK - 32));
}

#[test]
fn flags_that_popf_may_change() {
    let popf = |cpl: u8, iopl: u64, code: &[u8]| {
        let mut machine = Machine::new(code);
        machine.poke(STACK, &u64::MAX.to_le_bytes());
        let cpu = machine.cpu();
        cpu.rflags = FIXED | iopl << 12;
        cpu.segments[seg::SS] = Segment::flat_data(16, cpl);
        assert_eq!(machine.execute(), Ok(Flow::Next));
        machine.vcpu.cpu.rflags
    };
    let quad = [0x9d];
    let all = x86::rflags::ARITHMETIC | TF | DF | NT | AC | ID | FIXED;
    assert_eq!(popf(0, 0, &quad), all | IF | IOPL);
    assert_eq!(popf(3, 0, &quad), all, "IF stays as it is, silently");
    assert_eq!(popf(3, 3, &quad), all | IF | IOPL, "CPL 3 with IOPL 3: IF, but not IOPL, which stays 3");
    assert_eq!(popf(1, 2, &quad), all | IF | 2 << 12);
    let word = [0x66, 0x9d];
    assert_eq!(popf(0, 0, &word), all & !(AC | ID) | IF | IOPL);
}

#[test]
fn pushed_flags_show_no_rf() {
    let mut machine = Machine::new(&[0x9c]);
    machine.cpu().rflags = FIXED | RF | CF | ZF;
    machine.step();
    assert_eq!(machine.word(STACK - 8), FIXED | CF | ZF);
    assert_eq!((machine.rip(), machine.vcpu.cpu.rflags & RF), (CODE + 1, 0));
}
