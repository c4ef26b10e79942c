//! Single-step, breakpoints, alignment checks, interrupt shadows.

use std::sync::Arc;

use x86::fault::page_fault::WRITE;
use x86::rflags::{AC, FIXED, IF, RF, TF};
use x86::state::gpr::{RAX, RBX, RCX, RDI, RSI, RSP};
use x86::{GuestFault, Gva, Segment, cr0, dr6, seg, vector};

use super::machine::{CODE, DATA, Machine, STACK, handler};
use crate::engine::{Engine, Exit};
use crate::interpret::Interpreter;

const DB: u64 = handler(vector::DB);

/// What a delivered #DB says: (RIP that was saved, the causes in DR6).
fn trapped(machine: &Machine) -> (u64, u64) {
    assert_eq!(machine.rip(), DB);
    (machine.word(machine.gpr(RSP)), machine.vcpu.cpu.dr[6] & (dr6::BS | 0xf))
}

/// DR7 with breakpoint 0 enabled: kind (0 execute, 1 write, 3 access) and length field.
fn control(kind: u64, length: u64) -> u64 {
    x86::dr7::FIXED | 2 | kind << 16 | length << 18
}

#[test]
fn single_step_traps_behind_the_instruction() {
    let mut machine = Machine::new(&[0x90, 0x90]);
    machine.cpu().rflags = FIXED | TF;
    machine.step();
    assert_eq!(trapped(&machine), (CODE + 1, dr6::BS));
    assert_eq!(machine.vcpu.cpu.rflags & TF, 0, "the handler is not stepped");
}

#[test]
fn an_interrupt_that_an_access_causes_comes_behind_it() {
    // nop; out 0x80, al; nop; nop; hlt, and: nop; mov [rdi], al; nop; nop; hlt
    for code in [&[0x90, 0xe6, 0x80, 0x90, 0x90, 0xf4][..], &[0x90, 0x88, 0x07, 0x90, 0x90, 0xf4]] {
        let mut machine = Machine::new(code);
        machine.set(RDI, 0xfec0_0000);
        machine.ports.interrupts = Some(Arc::clone(&machine.vcpu.attention));
        assert_eq!(Interpreter::new().run(&mut machine.core()), Exit::Attention);
        assert_eq!(machine.rip(), CODE + 3);
    }
}

#[test]
fn popf_that_sets_tf_traps_one_later() {
    // popf; nop
    let mut machine = Machine::new(&[0x9d, 0x90]);
    machine.poke(STACK, &(FIXED | TF).to_le_bytes());
    machine.step();
    assert_eq!(machine.rip(), CODE + 1);
    machine.step();
    assert_eq!(trapped(&machine), (CODE + 2, dr6::BS));
}

#[test]
fn the_engine_sees_tf_that_popf_sets() {
    // popf; nop; hlt, with hlt at the handler of #DB
    let mut machine = Machine::new(&[0x9d, 0x90, 0xf4]);
    machine.poke(DB, &[0xf4]);
    machine.poke(STACK, &(FIXED | TF).to_le_bytes());
    assert_eq!(Interpreter::new().run(&mut machine.core()), Exit::Halt);
    assert_eq!(machine.rip(), DB + 1);
    assert_eq!(machine.word(machine.gpr(RSP)), CODE + 2);
}

#[test]
fn each_turn_of_a_repeated_string_is_a_step() {
    // rep movsb
    let mut machine = Machine::new(&[0xf3, 0xa4]);
    machine.cpu().rflags = FIXED | TF;
    machine.set(RSI, DATA).set(RDI, DATA + 64).set(RCX, 3).step();
    assert_eq!(trapped(&machine), (CODE, dr6::BS));
    assert_eq!(machine.gpr(RCX), 2);
}

#[test]
fn loading_ss_holds_the_trap_back() {
    // mov ss, eax; nop
    let mut machine = Machine::new(&[0x8e, 0xd0, 0x90]);
    machine.cpu().rflags = FIXED | TF;
    machine.set(RAX, 16).step();
    assert_eq!(machine.rip(), CODE + 2);
    machine.step();
    assert_eq!(trapped(&machine), (CODE + 3, dr6::BS));
}

#[test]
fn loading_ss_delays_its_data_breakpoint() {
    // mov ss, [rbx]; nop
    let mut machine = Machine::new(&[0x8e, 0x13, 0x90]);
    machine.poke(DATA, &[16]);
    machine.cpu().dr[0] = DATA;
    machine.cpu().dr[7] = control(3, 0);
    machine.set(RBX, DATA).step();
    assert_eq!(machine.rip(), CODE + 2);
    machine.step();
    assert_eq!(trapped(&machine), (CODE + 3, 1));
}

#[test]
fn a_breakpoint_behind_a_load_of_ss_is_lost() {
    // mov ss, eax; nop; nop
    let with = |point: u64| {
        let mut machine = Machine::new(&[0x8e, 0xd0, 0x90, 0x90]);
        machine.cpu().dr[0] = point;
        machine.cpu().dr[7] = control(0, 0);
        machine.set(RAX, 16).step();
        assert_eq!(machine.rip(), CODE + 2);
        machine
    };
    assert_eq!(with(CODE + 2).step().rip(), CODE + 3);
    let mut machine = with(CODE + 3);
    machine.step();
    assert_eq!(trapped(machine.step()), (CODE + 3, 1), "the next one counts again");
}

#[test]
fn int1_reports_what_the_breakpoint_of_the_ss_load_found() {
    // mov ss, [rbx]; int1
    let mut machine = Machine::new(&[0x8e, 0x13, 0xf1]);
    machine.poke(DATA, &[16]);
    machine.cpu().dr[0] = DATA;
    machine.cpu().dr[7] = control(3, 0);
    machine.set(RBX, DATA).step();
    machine.step();
    assert_eq!(trapped(&machine), (CODE + 3, 1), "one exception, not one inside the other");
}

#[test]
fn a_stepped_halt_does_not_wait() {
    let mut machine = Machine::new(&[0xf4]);
    machine.cpu().rflags = FIXED | TF;
    machine.step();
    assert_eq!(trapped(&machine), (CODE + 1, dr6::BS));
}

#[test]
fn sti_shields_one_instruction_from_interrupts() {
    // sti; nop; nop
    let mut machine = Machine::new(&[0xfb, 0x90, 0x90]);
    machine.vcpu.wants_interrupt_window = true;
    assert_eq!(Interpreter::new().run(&mut machine.core()), Exit::InterruptWindow);
    assert_eq!((machine.rip(), machine.vcpu.cpu.rflags & IF), (CODE + 2, IF));
}

#[test]
fn instruction_breakpoints_fault_before_and_resume_behind() {
    let mut machine = Machine::new(&[0x90, 0x90]);
    machine.cpu().dr[0] = CODE;
    machine.cpu().dr[7] = control(0, 0);
    machine.step();
    assert_eq!(trapped(&machine), (CODE, 1));
    let mut machine = Machine::new(&[0x90, 0x90]);
    machine.cpu().dr[0] = CODE;
    machine.cpu().dr[7] = control(0, 0);
    machine.cpu().rflags |= RF;
    machine.step();
    assert_eq!((machine.rip(), machine.vcpu.cpu.rflags & RF), (CODE + 1, 0));
}

#[test]
fn data_breakpoints_trap_behind_the_access() {
    // mov [rbx], eax; mov eax, [rbx]
    let code = [0x89, 0x03, 0x8b, 0x03];
    let with = |kind: u64, length: u64, address: u64| {
        let mut machine = Machine::new(&code);
        machine.cpu().dr[0] = DATA;
        machine.cpu().dr[7] = control(kind, length);
        machine.set(RBX, address);
        machine
    };
    assert_eq!(trapped(with(1, 0, DATA).step()), (CODE + 2, 1));
    assert_eq!(trapped(with(1, 0, DATA - 3).step()), (CODE + 2, 1), "the last byte of the access");
    assert_eq!(with(1, 0, DATA - 4).step().rip(), CODE + 2);
    assert_eq!(with(1, 0, DATA + 1).step().rip(), CODE + 2);
    assert_eq!(trapped(with(1, 2, DATA + 7).step()), (CODE + 2, 1), "length 8");
    let mut machine = with(1, 0, DATA);
    machine.cpu().rip = CODE + 2;
    assert_eq!(machine.step().rip(), CODE + 4, "a load does not hit a breakpoint on stores");
    let mut machine = with(3, 0, DATA);
    machine.cpu().rip = CODE + 2;
    assert_eq!(trapped(machine.step()), (CODE + 4, 1));
    let mut machine = with(1, 0, STACK);
    machine.cpu().dr[7] = x86::dr7::FIXED;
    assert_eq!(machine.step().rip(), CODE + 2, "not enabled");
}

#[test]
fn a_faulting_access_reports_the_fault_alone() {
    // mov [rbx], eax
    let mut machine = Machine::with_paging(&[0x89, 0x03]);
    machine.entry(DATA >> 12, 0);
    machine.cpu().dr[0] = DATA;
    machine.cpu().dr[7] = control(1, 0);
    machine.set(RBX, DATA).step();
    assert_eq!(machine.rip(), handler(vector::PF));
    assert_eq!(machine.vcpu.cpu.dr[6] & 0xf, 0);
    assert_eq!(machine.word(machine.gpr(RSP)), u64::from(WRITE));
}

#[test]
fn alignment_is_checked_for_users_who_ask() {
    // mov eax, [rbx]
    let with = |cpl: u8, flags: u64, address: u64| {
        let mut machine = Machine::new(&[0x8b, 0x03]);
        let cpu = machine.cpu();
        cpu.cr0 |= cr0::AM;
        cpu.rflags |= flags;
        cpu.segments[seg::SS] = Segment::flat_data(16, cpl);
        machine.vcpu.checks = crate::debug::checks(&machine.vcpu.cpu);
        machine.set(RBX, address).execute().err()
    };
    assert_eq!(with(3, AC, DATA + 2), Some(GuestFault::with_code(vector::AC, 0)));
    assert_eq!(with(3, AC, DATA + 4), None);
    assert_eq!(with(3, 0, DATA + 2), None);
    assert_eq!(with(0, AC, DATA + 2), None);
    assert_eq!(Gva(DATA).offset(), 0);
}
