//! Exceptions and interrupts: frames, privilege, stacks, and faults on the way.

use x86::state::gpr;
use x86::{GuestFault, Gva, dr6, dr7, rflags, seg, vector};

use super::machine::*;
use crate::deliver;
use crate::engine::Exit;

#[test]
fn an_interrupt_of_the_kernel_stays_on_its_stack() {
    let mut machine = Machine::new();
    machine.vcpu.cpu.gpr[gpr::RSP] = STACK + 5;
    machine.vcpu.cpu.rflags |= rflags::IF | rflags::TF | rflags::CF;
    machine.vcpu.cpu.interrupt_shadow = true;
    assert_eq!(deliver::interrupt(&mut machine.core(), 0x40), None);
    let cpu = &machine.vcpu.cpu;
    assert_eq!(cpu.rip, HANDLERS + 0x40);
    assert_eq!(cpu.gpr[gpr::RSP], STACK - 40, "aligned to 16 before the push");
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::CF, "an interrupt gate clears IF; TF always goes");
    assert!(!cpu.interrupt_shadow);
    assert_eq!(cpu.segments[seg::SS].selector, KERNEL_SS);
    let image = rflags::FIXED | rflags::IF | rflags::TF | rflags::CF;
    assert_eq!(machine.stack(), [CODE, u64::from(KERNEL_CS), image, STACK + 5, u64::from(KERNEL_SS)]);
}

#[test]
fn a_trap_gate_leaves_interrupts_on() {
    let mut machine = Machine::new();
    machine.gate(0x40, 0x8f00);
    machine.vcpu.cpu.rflags |= rflags::IF;
    deliver::interrupt(&mut machine.core(), 0x40);
    assert_ne!(machine.vcpu.cpu.rflags & rflags::IF, 0);
}

#[test]
fn a_page_fault_of_user_code_enters_the_kernel() {
    let mut machine = Machine::in_user_mode();
    machine.vcpu.cpu.rflags |= rflags::IF | rflags::AC;
    assert_eq!(deliver::fault(&mut machine.core(), GuestFault::page(Gva(0xdead_b000), 6)), None);
    let cpu = &machine.vcpu.cpu;
    assert_eq!((cpu.cr2, cpu.rip, cpu.cpl()), (0xdead_b000, HANDLERS + 14, 0));
    assert_eq!(cpu.segments[seg::CS].selector, KERNEL_CS);
    assert_eq!(cpu.segments[seg::SS].selector, 0, "a null selector with the RPL of the kernel");
    assert_eq!(cpu.gpr[gpr::RSP], (RSP0 & !15) - 48);
    let image = rflags::FIXED | rflags::IF | rflags::AC | rflags::RF;
    assert_eq!(machine.stack(), [6, USER, u64::from(USER_CS), image, USER_STACK, u64::from(USER_SS)]);
}

#[test]
fn a_gate_with_an_ist_changes_stacks_at_every_level() {
    let mut machine = Machine::new();
    machine.gate(2, 0x8e01);
    assert_eq!(deliver::nmi(&mut machine.core()), None);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RSP], IST1 - 40);
    assert!(machine.vcpu.cpu.nmi_blocked);
    assert_eq!(machine.stack::<4>()[3], STACK);
}

#[test]
fn software_interrupts_need_the_gate_to_admit_them() {
    let mut machine = Machine::in_user_mode();
    machine.gate(0x80, 0xee00);
    assert_eq!(machine.run(&[0xcd, 0x80]), Ran::Done);
    assert_eq!(machine.vcpu.cpu.rip, HANDLERS + 0x80);
    assert_eq!(machine.stack::<3>(), [USER + 2, u64::from(USER_CS), rflags::FIXED]);

    let mut machine = Machine::in_user_mode();
    assert_eq!(machine.run(&[0xcd, 0x81]), Ran::Done);
    assert_eq!(machine.vcpu.cpu.rip, HANDLERS + 13);
    assert_eq!(
        machine.stack::<2>(),
        [0x81 * 8 + 2, USER],
        "#GP names the gate, without EXT, at the instruction itself"
    );
}

#[test]
fn an_interrupt_through_an_absent_gate_is_a_fault_with_ext() {
    let mut machine = Machine::new();
    machine.gate(0x40, 0x0e00);
    deliver::interrupt(&mut machine.core(), 0x40);
    assert_eq!(machine.vcpu.cpu.rip, HANDLERS + 11);
    assert_eq!(machine.stack::<2>(), [0x40 * 8 + 3, CODE]);
    assert_ne!(machine.stack::<4>()[3] & rflags::RF, 0, "#NP is a fault");
}

#[test]
fn faults_combine_to_double_and_triple_faults() {
    // #PF in the delivery of #GP is delivered alone; #GP in the delivery of #PF is a double fault.
    let mut machine = Machine::new();
    machine.gate(14, 0x0e00);
    deliver::fault(&mut machine.core(), GuestFault::page(Gva(0x1234), 0));
    assert_eq!(machine.vcpu.cpu.rip, HANDLERS + 8);
    assert_eq!(machine.vcpu.cpu.cr2, 0x1234);
    assert_eq!(machine.stack::<2>(), [0, CODE]);

    // No gate at all.
    let mut machine = Machine::new();
    machine.vcpu.cpu.idtr.limit = 0;
    assert_eq!(deliver::fault(&mut machine.core(), GuestFault::UD), Some(Exit::TripleFault));
    assert_eq!(machine.vcpu.cpu.rip, CODE);

    // A page fault whose stack is not mapped, until #DF has a stack of its own.
    let mut machine = Machine::new();
    machine.vcpu.cpu.gpr[gpr::RSP] = HOLE + 0x100;
    assert_eq!(deliver::fault(&mut machine.core(), GuestFault::page(Gva(0), 0)), Some(Exit::TripleFault));
    machine.gate(8, 0x8e01);
    assert_eq!(deliver::fault(&mut machine.core(), GuestFault::page(Gva(0), 0)), None);
    assert_eq!(machine.vcpu.cpu.rip, HANDLERS + 8);
    assert_eq!(machine.vcpu.cpu.cr2, HOLE + 0x100 - 8);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RSP], IST1 - 48);
}

#[test]
fn a_benign_first_event_gives_way_to_the_second() {
    let mut machine = Machine::new();
    machine.vcpu.cpu.gpr[gpr::RSP] = HOLE + 0x100;
    machine.gate(14, 0x8e01);
    assert_eq!(deliver::interrupt(&mut machine.core(), 0x40), None);
    assert_eq!(machine.vcpu.cpu.rip, HANDLERS + 14);
    assert_eq!(machine.stack::<1>(), [2], "a write by the kernel to a page that is absent");
}

#[test]
fn bad_code_and_stacks_of_gates_are_named() {
    // A 32-bit code segment cannot handle an interrupt in long mode.
    let mut machine = Machine::new();
    machine.put(IDT + 0x400, 0x8e00_0018_9000);
    deliver::interrupt(&mut machine.core(), 0x40);
    assert_eq!((machine.vcpu.cpu.rip, machine.stack::<1>()), (HANDLERS + 13, [0x19]));
    // A TSS too small for the stack pointer.
    let mut machine = Machine::in_user_mode();
    machine.vcpu.cpu.tr.limit = 8;
    machine.gate(10, 0x8e00);
    assert_eq!(deliver::fault(&mut machine.core(), GuestFault::UD), Some(Exit::TripleFault));
    let mut machine = Machine::new();
    machine.gate(0x40, 0x8e02);
    machine.vcpu.cpu.tr.limit = 40;
    assert_eq!(deliver::interrupt(&mut machine.core(), 0x40), None);
    assert_eq!((machine.vcpu.cpu.rip, machine.stack::<1>()), (HANDLERS + 10, [0x31]));
    // A stack that is not canonical.
    let mut machine = Machine::new();
    machine.vcpu.cpu.gpr[gpr::RSP] = 1 << 50;
    machine.gate(12, 0x8e01);
    assert_eq!(deliver::interrupt(&mut machine.core(), 0x40), None);
    assert_eq!((machine.vcpu.cpu.rip, machine.stack::<1>()), (HANDLERS + 12, [1]));
}

#[test]
fn a_debug_exception_tells_its_cause_and_unlocks_the_registers() {
    let mut machine = Machine::new();
    machine.vcpu.cpu.dr[6] = dr6::FIXED | 0xf;
    machine.vcpu.cpu.dr[7] |= dr7::GD;
    machine.refuses(&[0x0f, 0x21, 0xf8], GuestFault::debug(dr6::BD));
    deliver::fault(&mut machine.core(), GuestFault::debug(dr6::BD));
    assert_eq!(machine.vcpu.cpu.dr[6], dr6::FIXED | dr6::BD);
    assert_eq!(machine.vcpu.cpu.dr[7] & dr7::GD, 0);
    assert_ne!(machine.stack::<3>()[2] & rflags::RF, 0, "general detect is a fault");
    deliver::fault(&mut machine.core(), GuestFault::debug(dr6::BS));
    assert_eq!(machine.vcpu.cpu.dr[6], dr6::FIXED | dr6::BD | dr6::BS, "only the breakpoint bits are replaced");
    assert_eq!(machine.stack::<3>()[2] & rflags::RF, 0, "single-step is a trap");
}

#[test]
fn breakpoint_and_icebp_are_traps() {
    let mut machine = Machine::in_user_mode();
    machine.gate(3, 0xee00);
    assert_eq!(machine.run(&[0xcc]), Ran::Done);
    assert_eq!((machine.vcpu.cpu.rip, machine.stack::<1>()), (HANDLERS + 3, [USER + 1]));
    let mut machine = Machine::in_user_mode();
    assert_eq!(machine.run(&[0xf1]), Ran::Done);
    assert_eq!((machine.vcpu.cpu.rip, machine.stack::<1>()), (HANDLERS + 1, [USER + 1]), "no check of the gate's DPL");
    let mut machine = Machine::in_compatibility_mode();
    machine.gate(4, 0xee00);
    assert_eq!(machine.run(&[0xce]), Ran::Next);
    machine.vcpu.cpu.rflags |= rflags::OF;
    assert_eq!(machine.run(&[0xce]), Ran::Done);
    assert_eq!((machine.vcpu.cpu.rip, machine.stack::<1>()), (HANDLERS + u64::from(vector::OF), [USER + 2]));
}

#[test]
fn thirty_two_bit_protected_mode_delivers_at_one_level() {
    let mut machine = Machine::new();
    let cpu = &mut machine.vcpu.cpu;
    cpu.cr0 &= !x86::cr0::PG;
    cpu.efer = 0;
    cpu.segments[seg::CS] = x86::Segment::flat_code32(0x18, 0);
    machine.put(GDT + 0x18, 0x00cf_9b00_0000_ffff);
    machine.put(IDT + 13 * 8, 0x0000_8e00_0018_9abc);
    machine.vcpu.cpu.rflags |= rflags::IF;
    assert_eq!(deliver::fault(&mut machine.core(), GuestFault::with_code(13, 0x48)), None);
    let cpu = &machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.rflags & rflags::IF), (0x9abc, STACK - 16, 0));
    let image = rflags::FIXED | rflags::IF | rflags::RF;
    assert_eq!(machine.stack(), [CODE << 32 | 0x48, image << 32 | 0x18]);
    // The handler takes the error code off and returns.
    machine.vcpu.cpu.gpr[gpr::RSP] += 4;
    assert_eq!(machine.run(&[0xcf]), Ran::Done);
    let cpu = &machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.rflags), (CODE, STACK, image));
}
