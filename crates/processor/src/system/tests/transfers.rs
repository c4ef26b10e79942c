//! IRET, far transfers, fast system calls, and loads of segment registers.

use x86::fault::page_fault;
use x86::state::gpr;
use x86::{GuestFault, Gva, Segment, rflags, seg, vector};

use super::machine::*;
use crate::segment;

const IRETQ: &[u8] = &[0x48, 0xcf];
const IRETD: &[u8] = &[0xcf];

fn gp(selector: u16) -> GuestFault {
    GuestFault::with_code(vector::GP, u32::from(selector & !3))
}

/// Puts a frame for IRETQ on the kernel's stack.
fn frame(machine: &Machine, rip: u64, cs: u16, flags: u64, rsp: u64, ss: u16) {
    for (index, word) in [rip, u64::from(cs), flags, rsp, u64::from(ss)].into_iter().enumerate() {
        machine.put(STACK + index as u64 * 8, word);
    }
}

#[test]
fn iret_goes_back_to_user_code() {
    let mut machine = Machine::new();
    let cpu = &mut machine.vcpu.cpu;
    cpu.nmi_blocked = true;
    cpu.segments[seg::DS] = Segment::flat_data(KERNEL_SS, 0);
    cpu.segments[seg::ES] = Segment::flat_data(USER_SS, 3);
    cpu.segments[seg::FS].base = 0x1234_5000;
    let flags = rflags::IF | rflags::TF | rflags::ID | rflags::IOPL | rflags::RF | rflags::CF;
    frame(&machine, USER, USER_CS, flags, USER_STACK, USER_SS);
    assert_eq!(machine.run(IRETQ), Ran::Done);
    let cpu = &machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[gpr::RSP]), (USER, 3, USER_STACK));
    assert_eq!(cpu.rflags, flags | rflags::FIXED);
    assert!(cpu.is_code64() && !cpu.nmi_blocked);
    assert!(!cpu.segments[seg::DS].is_present(), "the kernel's data segment is taken away");
    assert_eq!(cpu.segments[seg::ES].selector, USER_SS, "the user's stays");
    assert_eq!(cpu.segments[seg::FS].base, 0x1234_5000, "the base of a null segment stays");
}

#[test]
fn iret_reaches_compatibility_mode() {
    let mut machine = Machine::new();
    frame(&machine, USER, USER_CS32, rflags::FIXED, USER_STACK, USER_SS);
    assert_eq!(machine.run(IRETQ), Ran::Done);
    assert!(machine.vcpu.cpu.is_long_mode() && !machine.vcpu.cpu.is_code64());
    assert!(machine.vcpu.stale.mode);
    // IRETD with 32-bit words does it, too.
    let mut machine = Machine::new();
    let words = [USER, u64::from(USER_CS32), rflags::FIXED, USER_STACK, u64::from(USER_SS)];
    for (index, pair) in words.chunks(2).enumerate() {
        machine.put(STACK + index as u64 * 8, pair[0] | pair.get(1).copied().unwrap_or(0) << 32);
    }
    assert_eq!(machine.run(IRETD), Ran::Done);
    assert_eq!((machine.vcpu.cpu.rip, machine.vcpu.cpu.gpr[gpr::RSP]), (USER, USER_STACK));
    assert_eq!(machine.vcpu.cpu.segments[seg::CS].selector, USER_CS32);
}

#[test]
fn iret_in_the_kernel_restores_stack_and_flags() {
    let mut machine = Machine::new();
    frame(&machine, CODE + 0x10, KERNEL_CS, rflags::IF | rflags::DF, STACK + 0x123, 0);
    assert_eq!(machine.run(IRETQ), Ran::Done);
    let cpu = &machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.cpl()), (CODE + 0x10, STACK + 0x123, 0));
    assert_eq!(cpu.rflags, rflags::FIXED | rflags::IF | rflags::DF);
    assert_eq!(cpu.segments[seg::SS].selector, 0, "a null stack segment is fine below CPL 3");
}

#[test]
fn iret_by_user_code_keeps_what_it_may_not_change() {
    let mut machine = Machine::in_user_mode();
    machine.vcpu.cpu.rflags |= rflags::IF;
    let top = USER_STACK;
    let words = [USER + 8, u64::from(USER_CS), rflags::IOPL | rflags::ZF, top + 64, u64::from(USER_SS)];
    for (index, word) in words.into_iter().enumerate() {
        machine.put(top + index as u64 * 8, word);
    }
    assert_eq!(machine.run(IRETQ), Ran::Done);
    assert_eq!(machine.vcpu.cpu.rflags, rflags::FIXED | rflags::IF | rflags::ZF);
}

#[test]
fn iret_refuses_bad_frames_and_changes_nothing() {
    let mut machine = Machine::new();
    let cases = [
        ((USER, 0, 0, USER_STACK, USER_SS), GuestFault::GP0),
        ((USER, BEYOND | 3, 0, USER_STACK, USER_SS), gp(BEYOND)),
        ((USER, USER_SS, 0, USER_STACK, USER_SS), gp(USER_SS)),
        ((USER, KERNEL_CS | 3, 0, USER_STACK, USER_SS), gp(KERNEL_CS)),
        ((USER, USER_CS, 0, USER_STACK, 0), GuestFault::GP0),
        ((USER, USER_CS, 0, USER_STACK, KERNEL_SS), gp(KERNEL_SS)),
        ((USER, USER_CS, 0, USER_STACK, READ_ONLY | 3), gp(READ_ONLY)),
        ((USER, USER_CS, 0, USER_STACK, ABSENT | 3), GuestFault::with_code(vector::SS, u32::from(ABSENT))),
        ((1 << 47, USER_CS, 0, USER_STACK, USER_SS), GuestFault::GP0),
        ((1 << 33, USER_CS32, 0, USER_STACK, USER_SS), GuestFault::GP0),
        ((CODE, KERNEL_CS, 0, STACK, 3), GuestFault::GP0),
    ];
    for ((rip, cs, flags, rsp, ss), fault) in cases {
        frame(&machine, rip, cs, flags, rsp, ss);
        machine.refuses(IRETQ, fault);
    }
    machine.vcpu.cpu.rflags |= rflags::NT;
    machine.refuses(IRETQ, GuestFault::GP0);
    machine.vcpu.cpu.rflags = rflags::FIXED;
    machine.vcpu.cpu.gpr[gpr::RSP] = HOLE;
    machine.refuses(IRETQ, GuestFault::page(Gva(HOLE), 0));
    machine.vcpu.cpu.gpr[gpr::RSP] = 1 << 63;
    machine.refuses(IRETQ, GuestFault::SS0);
}

#[test]
fn a_call_gate_raises_the_privilege_and_retf_lowers_it() {
    let mut machine = Machine::in_user_mode();
    machine.put(USER + 0x100, 0);
    machine.put(USER + 0x108, u64::from(CALL_GATE));
    // call far [rdi], 16:64
    machine.vcpu.cpu.gpr[gpr::RDI] = USER + 0x100;
    assert_eq!(machine.run(&[0x48, 0xff, 0x1f]), Ran::Done);
    let cpu = &machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.cpl(), cpu.segments[seg::CS].selector), (0x9000, 0, KERNEL_CS));
    assert_eq!(machine.stack(), [USER + 3, u64::from(USER_CS), USER_STACK, u64::from(USER_SS)]);
    assert_eq!(machine.run(&[0x48, 0xcb]), Ran::Done);
    let cpu = &machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[gpr::RSP]), (USER + 3, 3, USER_STACK));

    // A gate that user code may not use, and a code segment in place of a gate.
    machine.vcpu.cpu.gpr[gpr::RDI] = USER + 0x100;
    machine.put(GDT + u64::from(CALL_GATE), 0x0000_8c00_0008_9000);
    machine.refuses(&[0x48, 0xff, 0x1f], gp(CALL_GATE));
    machine.put(USER + 0x108, u64::from(KERNEL_CS));
    machine.refuses(&[0x48, 0xff, 0x1f], gp(KERNEL_CS));
    machine.put(USER + 0x108, u64::from(TSS_SELECTOR));
    machine.refuses(&[0x48, 0xff, 0x2f], gp(TSS_SELECTOR));
}

#[test]
fn far_jumps_change_the_width_of_code() {
    let mut machine = Machine::in_user_mode();
    machine.put(USER + 0x100, (USER + 0x200) | u64::from(USER_CS32) << 32);
    machine.vcpu.cpu.gpr[gpr::RDI] = USER + 0x100;
    assert_eq!(machine.run(&[0xff, 0x2f]), Ran::Done);
    assert_eq!(machine.vcpu.cpu.rip, USER + 0x200);
    assert!(!machine.vcpu.cpu.is_code64());
    // And back, with an immediate pointer, which 32-bit code has.
    assert_eq!(machine.run(&[0xea, 0x10, 0x00, 0x08, 0x00, USER_CS as u8, 0x00]), Ran::Done);
    assert_eq!(machine.vcpu.cpu.rip, USER + 0x10);
    assert!(machine.vcpu.cpu.is_code64());
}

#[test]
fn far_calls_and_returns_of_32_bit_code_use_32_bit_words() {
    let mut machine = Machine::in_compatibility_mode();
    assert_eq!(machine.run(&[0x9a, 0x00, 0x01, 0x08, 0x00, USER_CS32 as u8, 0x00]), Ran::Done);
    assert_eq!((machine.vcpu.cpu.rip, machine.vcpu.cpu.gpr[gpr::RSP]), (USER + 0x100, USER_STACK - 8));
    assert_eq!(machine.stack(), [(USER + 7) | u64::from(USER_CS32) << 32]);
    assert_eq!(machine.run(&[0xca, 0x10, 0x00]), Ran::Done);
    assert_eq!((machine.vcpu.cpu.rip, machine.vcpu.cpu.gpr[gpr::RSP]), (USER + 7, USER_STACK + 16));
}

#[test]
fn syscall_and_sysret() {
    let mut machine = Machine::in_user_mode();
    let cpu = &mut machine.vcpu.cpu;
    cpu.star = u64::from(KERNEL_CS) << 32 | 0x1b << 48;
    cpu.lstar = CODE;
    cpu.sfmask = rflags::IF | rflags::TF | rflags::AC;
    cpu.rflags |= rflags::IF | rflags::CF;
    assert_eq!(machine.run(&[0x0f, 0x05]), Ran::Done);
    let cpu = &mut machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.cpl(), cpu.rflags), (CODE, 0, rflags::FIXED | rflags::CF));
    assert_eq!(cpu.gpr[gpr::RCX], USER + 2);
    assert_eq!(cpu.gpr[gpr::R11], rflags::FIXED | rflags::IF | rflags::CF);
    assert_eq!(cpu.segments[seg::SS].selector, KERNEL_SS);
    assert_eq!(cpu.gpr[gpr::RSP], USER_STACK, "the stack is the kernel's business");
    assert_eq!(machine.run(&[0x48, 0x0f, 0x07]), Ran::Done);
    let cpu = &mut machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.cpl()), (USER + 2, 3));
    assert_eq!(cpu.segments[seg::CS].selector, USER_CS);
    assert_eq!(cpu.segments[seg::SS].selector, USER_SS);
    machine.refuses(&[0x48, 0x0f, 0x07], GuestFault::GP0);

    let mut machine = Machine::new();
    machine.vcpu.cpu.star = 0x1b << 48;
    machine.vcpu.cpu.gpr[gpr::RCX] = 1 << 47;
    machine.refuses(&[0x48, 0x0f, 0x07], GuestFault::GP0);
    assert_eq!(machine.run(&[0x0f, 0x07]), Ran::Done);
    assert!(!machine.vcpu.cpu.is_code64(), "SYSRET without REX.W goes to 32-bit code");
    machine.refuses(&[0x0f, 0x05], GuestFault::UD);
}

#[test]
fn sysenter_and_sysexit() {
    let mut machine = Machine::in_compatibility_mode();
    machine.refuses(&[0x0f, 0x34], GuestFault::GP0);
    let cpu = &mut machine.vcpu.cpu;
    (cpu.sysenter_cs, cpu.sysenter_esp, cpu.sysenter_eip) = (u64::from(KERNEL_CS), STACK, CODE);
    cpu.rflags |= rflags::IF;
    assert_eq!(machine.run(&[0x0f, 0x34]), Ran::Done);
    let cpu = &mut machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.cpl(), cpu.rflags), (CODE, STACK, 0, rflags::FIXED));
    assert!(cpu.is_code64());
    (cpu.gpr[gpr::RDX], cpu.gpr[gpr::RCX]) = (USER, USER_STACK);
    assert_eq!(machine.run(&[0x0f, 0x35]), Ran::Done);
    let cpu = &machine.vcpu.cpu;
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSP], cpu.cpl(), cpu.is_code64()), (USER, USER_STACK, 3, false));
    assert_eq!(cpu.segments[seg::CS].selector, USER_CS32);
    machine.refuses(&[0x0f, 0x35], GuestFault::GP0);
}

#[test]
fn segment_loads_check_privilege_type_and_presence() {
    let mut machine = Machine::in_user_mode();
    let load = |machine: &mut Machine, register, selector| segment::load(&mut machine.core(), register, selector);
    assert_eq!(load(&mut machine, seg::DS, USER_SS), Ok(()));
    assert_eq!(load(&mut machine, seg::DS, 3), Ok(()), "null");
    assert!(!machine.vcpu.cpu.segments[seg::DS].is_present());
    assert_eq!(load(&mut machine, seg::DS, KERNEL_SS), Err(gp(KERNEL_SS)));
    assert_eq!(load(&mut machine, seg::DS, BEYOND), Err(gp(BEYOND)));
    assert_eq!(load(&mut machine, seg::DS, 0x0c), Err(gp(0x0c)), "there is no LDT");
    assert_eq!(load(&mut machine, seg::DS, TSS_SELECTOR), Err(gp(TSS_SELECTOR)));
    assert_eq!(load(&mut machine, seg::ES, ABSENT | 3), Err(GuestFault::with_code(vector::NP, ABSENT.into())));
    assert_eq!(load(&mut machine, seg::ES, CONFORMING), Ok(()), "conforming code that can be read");
    assert_eq!(load(&mut machine, seg::SS, 0), Err(GuestFault::GP0));
    assert_eq!(load(&mut machine, seg::SS, READ_ONLY | 3), Err(gp(READ_ONLY)));
    assert_eq!(load(&mut machine, seg::SS, USER_SS & !3), Err(gp(USER_SS)));
    assert_eq!(load(&mut machine, seg::SS, ABSENT | 3), Err(GuestFault::with_code(vector::SS, ABSENT.into())));

    machine.vcpu.cpu.gdtr.base = HOLE;
    let error = GuestFault::page(Gva(HOLE + 0x20), 0);
    assert_eq!(error.error.unwrap() & page_fault::USER, 0, "tables are read with the rights of the kernel");
    assert_eq!(load(&mut machine, seg::DS, USER_SS), Err(error));
}

#[test]
fn a_load_sets_the_accessed_bit_once() {
    let mut machine = Machine::in_user_mode();
    let place = GDT + u64::from(FRESH);
    // mov ds, eax
    machine.vcpu.cpu.gpr[gpr::RAX] = u64::from(FRESH | 3);
    assert_eq!(machine.run(&[0x8e, 0xd8]), Ran::Next);
    assert_eq!(machine.get(place) >> 40 & 0xff, 0xf3);
    assert_eq!(machine.vcpu.cpu.segments[seg::DS].attributes & 0xff, 0xf3);
    assert_eq!(machine.vcpu.cpu.segments[seg::DS].limit, u32::MAX);
    // mov ss, eax opens the shadow; mov cs is no instruction.
    assert_eq!(machine.run(&[0x8e, 0xd0]), Ran::Next);
    assert!(machine.vcpu.cpu.interrupt_shadow);
    // mov eax, ds; mov [rdi], ds
    machine.vcpu.cpu.gpr[gpr::RAX] = u64::MAX;
    assert_eq!(machine.run(&[0x8c, 0xd8]), Ran::Next);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RAX], u64::from(FRESH | 3));
    machine.vcpu.cpu.gpr[gpr::RDI] = USER + 0x100;
    machine.put(USER + 0x100, u64::MAX);
    assert_eq!(machine.run(&[0x8c, 0x1f]), Ran::Next);
    assert_eq!(machine.get(USER + 0x100), !0xffff | u64::from(FRESH | 3), "memory gets 16 bits");
}
