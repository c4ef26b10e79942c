//! System instructions one by one: who may use them, and what they refuse.

use x86::state::gpr;
use x86::{GuestFault, Gva, cr0, cr4, efer, msr, rflags, seg, vector};

use super::super::{check_io_permission, control};
use super::machine::*;
use crate::engine::Exit;
use crate::system::msr as registers;

const GP0: GuestFault = GuestFault::GP0;

fn gp(selector: u16) -> GuestFault {
    GuestFault::with_code(vector::GP, u32::from(selector & !3))
}

#[test]
fn user_code_may_not_touch_the_machine() {
    let mut machine = Machine::in_user_mode();
    let privileged: [&[u8]; 22] = [
        &[0xf4],                         // hlt
        &[0xfa],                         // cli
        &[0xfb],                         // sti
        &[0x0f, 0x20, 0xc0],             // mov rax, cr0
        &[0x0f, 0x22, 0xd8],             // mov cr3, rax
        &[0x44, 0x0f, 0x22, 0xc0],       // mov cr8, rax
        &[0x0f, 0x21, 0xc0],             // mov rax, dr0
        &[0x0f, 0x23, 0xf8],             // mov dr7, rax
        &[0x0f, 0x06],                   // clts
        &[0x0f, 0x01, 0xf0],             // lmsw ax
        &[0x0f, 0x32],                   // rdmsr
        &[0x0f, 0x30],                   // wrmsr
        &[0x0f, 0x33],                   // rdpmc
        &[0x0f, 0x01, 0x38],             // invlpg [rax]
        &[0x66, 0x0f, 0x38, 0x82, 0x08], // invpcid rcx, [rax]
        &[0x0f, 0x08],                   // invd
        &[0x0f, 0x09],                   // wbinvd
        &[0x0f, 0x01, 0x10],             // lgdt [rax]
        &[0x0f, 0x01, 0x18],             // lidt [rax]
        &[0x0f, 0x00, 0xd0],             // lldt ax
        &[0x0f, 0x00, 0xd8],             // ltr ax
        &[0x0f, 0x01, 0xf8],             // swapgs
    ];
    for code in privileged {
        machine.refuses(code, GP0);
    }
    let undefined: [&[u8]; 6] = [
        &[0x0f, 0x01, 0xca], // clac
        &[0x0f, 0x01, 0xcb], // stac
        &[0x0f, 0x0b],       // ud2
        &[0x0f, 0x01, 0xd9], // vmmcall
        &[0x0f, 0x01, 0xc8], // monitor
        &[0x0f, 0x01, 0xc9], // mwait
    ];
    for code in undefined {
        machine.refuses(code, GuestFault::UD);
    }
}

#[test]
fn umip_hides_the_tables_from_user_code() {
    let mut machine = Machine::in_user_mode();
    machine.vcpu.cpu.gpr[gpr::RAX] = USER + 0x100;
    // sgdt [rax], sidt [rax], sldt ax, str ax, smsw ax
    let curious: [&[u8]; 5] =
        [&[0x0f, 0x01, 0x00], &[0x0f, 0x01, 0x08], &[0x0f, 0x00, 0xc0], &[0x0f, 0x00, 0xc8], &[0x0f, 0x01, 0xe0]];
    assert_eq!(machine.run(curious[0]), Ran::Next);
    assert_eq!(machine.get(USER + 0x100), u64::from(BEYOND - 1) | GDT << 16);
    machine.vcpu.cpu.cr4 |= cr4::UMIP;
    for code in curious {
        machine.refuses(code, GP0);
    }
}

#[test]
fn sti_shields_one_instruction_and_halt_leaves() {
    let mut machine = Machine::new();
    assert_eq!(machine.run(&[0xfb]), Ran::Next);
    assert!(machine.vcpu.cpu.interrupt_shadow);
    assert!(!machine.vcpu.cpu.can_take_interrupt());
    assert_eq!(machine.run(&[0xf4]), Ran::Exit(Exit::Halt));
    assert!(machine.vcpu.cpu.can_take_interrupt());
    assert_eq!(machine.vcpu.cpu.rip, CODE + 2);
    assert_eq!(machine.run(&[0xfb]), Ran::Next);
    assert!(!machine.vcpu.cpu.interrupt_shadow, "interrupts were on already");
    assert_eq!(machine.run(&[0x0f, 0x01, 0xcb]), Ran::Next);
    assert_ne!(machine.vcpu.cpu.rflags & rflags::AC, 0);
}

#[test]
fn control_registers_refuse_what_the_manual_refuses() {
    let mut machine = Machine::new();
    let (old_cr0, old_cr4) = (machine.vcpu.cpu.cr0, machine.vcpu.cpu.cr4);
    let mut set = |code: &[u8], value: u64| {
        machine.vcpu.cpu.gpr[gpr::RAX] = value;
        machine.refuses(code, GP0);
    };
    const CR0: &[u8] = &[0x0f, 0x22, 0xc0];
    const CR3: &[u8] = &[0x0f, 0x22, 0xd8];
    const CR4: &[u8] = &[0x0f, 0x22, 0xe0];
    set(CR0, old_cr0 & !cr0::PE);
    set(CR0, old_cr0 | cr0::NW);
    set(CR0, old_cr0 | 1 << 32);
    set(CR0, old_cr0 & !cr0::PG);
    set(CR3, 1 << 40);
    set(CR3, 1 << 63);
    set(CR4, old_cr4 | cr4::LA57);
    set(CR4, old_cr4 | cr4::VME);
    set(CR4, old_cr4 & !cr4::PAE);
    set(&[0x44, 0x0f, 0x22, 0xc0], 0x10);
    machine.vcpu.cpu.cr3 = 0x1001;
    machine.vcpu.cpu.gpr[gpr::RAX] = old_cr4 | cr4::PCIDE;
    machine.refuses(CR4, GP0);
    machine.vcpu.cpu.cr3 = 0x1000;
    machine.vcpu.stale = Default::default();
    assert_eq!(machine.run(CR4), Ran::Next);
    assert!(machine.vcpu.stale.mode && machine.vcpu.stale.all_mappings);
    machine.vcpu.cpu.gpr[gpr::RAX] = 0x1005 | 1 << 63;
    assert_eq!(machine.run(CR3), Ran::Next);
    assert_eq!(machine.vcpu.cpu.cr3, 0x1005, "bit 63 is not kept");
}

#[test]
fn cr8_is_the_apics_which_is_told_of_a_lower_one_at_once() {
    const TO: &[u8] = &[0x44, 0x0f, 0x22, 0xc0];
    const FROM: &[u8] = &[0x44, 0x0f, 0x20, 0xc1];
    let mut machine = Machine::new();
    machine.board.priority = 0x35;
    machine.core().learn_priority();
    // The value, and what the APIC knows then. The low bits of its register go with any store.
    for (value, told) in [(9, 0x35), (7, 0x35), (3, 0x30), (15, 0x30), (2, 0x20), (0, 0)] {
        machine.vcpu.cpu.gpr[gpr::RAX] = value;
        assert_eq!(machine.run(TO), Ran::Next);
        assert_eq!(machine.board.priority, told, "after {value}");
        assert_eq!(machine.run(FROM), Ran::Next);
        assert_eq!(machine.vcpu.cpu.gpr[gpr::RCX], value);
    }
    machine.vcpu.cpu.gpr[gpr::RAX] = 16;
    assert_eq!(machine.run(TO), Ran::Fault(GuestFault::GP0));
    machine.vcpu.cpu.gpr[gpr::RAX] = 12;
    machine.run(TO);
    machine.core().tell_priority();
    assert_eq!(machine.board.priority, 0xc0);
}

#[test]
fn entering_long_mode_needs_its_steps_in_order() {
    let mut machine = Machine::new();
    let cpu = &mut machine.vcpu.cpu;
    (cpu.cr0, cpu.cr4, cpu.efer) = (cr0::PE | cr0::ET, 0, 0);
    cpu.segments[seg::CS] = x86::Segment::flat_code32(0x18, 0);
    let on = cr0::PE | cr0::PG;
    let without_lme = control::set_cr0(&mut machine.core(), on);
    assert!(matches!(without_lme, Ok(Some(Exit::Unsupported(_)))));
    registers::write(&mut machine.core(), msr::EFER, efer::LME).unwrap();
    assert_eq!(control::set_cr0(&mut machine.core(), on), Err(GP0), "CR4.PAE is not set");
    control::set_cr4(&mut machine.core(), cr4::PAE).unwrap();
    assert_eq!(control::set_cr0(&mut machine.core(), on), Ok(None));
    assert!(machine.vcpu.cpu.is_long_mode() && !machine.vcpu.cpu.is_code64());
    assert_eq!(registers::write(&mut machine.core(), msr::EFER, 0), Err(GP0), "LME is locked while paging");
    assert_eq!(control::set_cr0(&mut machine.core(), cr0::PE), Ok(None));
    assert_eq!(machine.vcpu.cpu.efer, efer::LME, "LMA follows paging");
}

#[test]
fn debug_registers_have_aliases_and_fixed_bits() {
    let mut machine = Machine::new();
    machine.vcpu.cpu.gpr[gpr::RAX] = 0xffff_ffff;
    assert_eq!(machine.run(&[0x0f, 0x23, 0xe8]), Ran::Next, "dr5 is dr7");
    assert_eq!(machine.vcpu.cpu.dr[7], 0xffff_27ff);
    machine.vcpu.cpu.dr[7] = 0x400;
    assert_eq!(machine.run(&[0x0f, 0x23, 0xf0]), Ran::Next);
    assert_eq!(machine.vcpu.cpu.dr[6], 0xffff_efff);
    machine.vcpu.cpu.gpr[gpr::RAX] = 1 << 32;
    machine.refuses(&[0x0f, 0x23, 0xf0], GP0);
    machine.vcpu.cpu.cr4 |= cr4::DE;
    machine.refuses(&[0x0f, 0x23, 0xe8], GuestFault::UD);
}

#[test]
fn msrs_refuse_unknown_numbers_and_bad_values() {
    let mut machine = Machine::new();
    let mut core = machine.core();
    for number in [0, 0x34, 0xce, 0x140, 0x611, 0x400, msr::FLUSH_CMD, msr::PRED_CMD, 0xc001_0015] {
        assert_eq!(registers::read(&mut core, number), Err(GP0), "{number:#x}");
    }
    let refused = [
        (msr::PAT, 2),
        (msr::PAT, 0x0808_0808_0808_0808),
        (msr::LSTAR, 1 << 47),
        (msr::KERNEL_GS_BASE, 1 << 63),
        (msr::EFER, 1 << 12),
        (msr::SPEC_CTRL, 1 << 9),
        (msr::PRED_CMD, 2),
        (msr::TSC_AUX, 1 << 32),
        (msr::XSS, 1 << 8),
        (msr::MTRR_DEF_TYPE, 2),
        (msr::MTRR_PHYSBASE0, 1 << 40),
        (msr::MTRR_PHYSBASE0 + 1, 1),
        (msr::MTRR_FIX4K_C0000, 3),
        (msr::MTRRCAP, 0),
        (msr::ARCH_CAPABILITIES, 0),
        (msr::FEATURE_CONTROL, 5),
        (msr::MCG_STATUS, 1),
        (msr::MISC_ENABLE, 1 << 40),
        (msr::X2APIC_FIRST + 8, 0),
        (0x1234, 0),
    ];
    for (number, value) in refused {
        assert_eq!(registers::write(&mut core, number, value), Err(GP0), "{number:#x}");
    }
    let kept = [
        (msr::PAT, 0x0007_0406_0007_0106),
        (msr::LSTAR, 0xffff_ffff_8100_0000),
        (msr::FS_BASE, 0x7fff_0000_1000),
        (msr::MTRR_DEF_TYPE, 0xc06),
        (msr::MTRR_PHYSBASE0 + 15, 0xff_c000_0800),
        (msr::MTRR_FIX4K_F8000, 0x0505_0505_0505_0505),
        (msr::SPEC_CTRL, 0x401),
        (msr::TSC_AUX, 7),
    ];
    for (number, value) in kept {
        registers::write(&mut core, number, value).unwrap();
        assert_eq!(registers::read(&mut core, number), Ok(value), "{number:#x}");
    }
    assert_eq!(registers::read(&mut core, msr::APIC_BASE), Ok(0xfee0_0900));
}

#[test]
fn misc_enable_hides_features() {
    let mut machine = Machine::new();
    let mut core = machine.core();
    let all = 0x4_00c5_0889;
    registers::write(&mut core, msr::MISC_ENABLE, all | 0x1800).unwrap();
    assert_eq!(registers::read(&mut core, msr::MISC_ENABLE), Ok(all | 0x1800));
    registers::write(&mut core, msr::EFER, efer::LME).unwrap();
    assert_eq!(registers::write(&mut core, msr::EFER, efer::LME | efer::NXE), Err(GP0), "NXE is reserved now");
    let ask = |machine: &mut Machine, leaf| {
        machine.vcpu.cpu.gpr[gpr::RAX] = leaf;
        assert_eq!(machine.run(&[0x0f, 0xa2]), Ran::Next);
        (machine.vcpu.cpu.gpr[gpr::RAX], machine.vcpu.cpu.gpr[gpr::RDX] >> 20 & 1)
    };
    assert_eq!(ask(&mut machine, 0).0, 2, "Limit CPUID Maxval");
    assert_eq!(ask(&mut machine, 0x8000_0001).1, 0, "XD Bit Disable");
    registers::write(&mut machine.core(), msr::MISC_ENABLE, 1).unwrap();
    assert!(ask(&mut machine, 0).0 > 2);
    assert_eq!(ask(&mut machine, 0x8000_0001).1, 1);
}

#[test]
fn there_is_no_hypercall() {
    const VMCALL: &[u8] = &[0x0f, 0x01, 0xc1];
    let mut machine = Machine::new();
    assert_eq!(machine.run(VMCALL), Ran::Next);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RAX] as i64, -1000, "no such call");
    let mut machine = Machine::in_user_mode();
    assert_eq!(machine.run(VMCALL), Ran::Next);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RAX] as i64, -1, "not allowed");
    let mut machine = Machine::in_compatibility_mode();
    assert_eq!(machine.run(VMCALL), Ran::Next);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RAX], 0xffff_ffff);
}

#[test]
fn rdmsr_and_wrmsr_use_edx_eax() {
    let mut machine = Machine::new();
    let registers = &mut machine.vcpu.cpu.gpr;
    registers[gpr::RAX] = 0xffff_ffff_8123_4567;
    registers[gpr::RDX] = 0xaaaa_aaaa_ffff_ffff;
    registers[gpr::RCX] = 0x1_0000_0000 | u64::from(msr::CSTAR);
    assert_eq!(machine.run(&[0x0f, 0x30]), Ran::Next);
    assert_eq!(machine.vcpu.cpu.cstar, 0xffff_ffff_8123_4567);
    assert_eq!(machine.run(&[0x0f, 0x32]), Ran::Next);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RAX], 0x8123_4567);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RDX], 0xffff_ffff);
}

#[test]
fn the_time_stamp_counter_can_be_moved() {
    let mut machine = Machine::new();
    let mut core = machine.core();
    registers::write(&mut core, msr::TSC, 1 << 50).unwrap();
    let now = registers::read(&mut core, msr::TSC).unwrap();
    assert!((1 << 50..(1 << 50) + (1 << 40)).contains(&now));
    assert_eq!(core.vcpu.cpu.tsc_adjust, core.vcpu.cpu.tsc_offset, "both moved by the same");
    assert!(core.vcpu.attention.take(), "the run loop must move the deadlines");
    registers::write(&mut core, msr::TSC_ADJUST, 0).unwrap();
    assert_eq!(core.vcpu.cpu.tsc_offset, 0);
    registers::write(&mut core, msr::TSC_DEADLINE, 1 << 60).unwrap();
    assert_eq!(registers::read(&mut core, msr::TSC_DEADLINE), Ok(1 << 60));
    machine.vcpu.cpu.cr4 |= cr4::TSD;
    assert_eq!(machine.run(&[0x0f, 0x31]), Ran::Next, "CR4.TSD leaves the kernel alone");
}

#[test]
fn tables_are_loaded_from_memory() {
    let mut machine = Machine::new();
    machine.vcpu.cpu.gpr[gpr::RAX] = DATA;
    machine.put(DATA, 0x8000_0000_0000_03ff);
    machine.put(DATA + 8, 0xffff);
    assert_eq!(machine.run(&[0x0f, 0x01, 0x18]), Ran::Next);
    assert_eq!((machine.vcpu.cpu.idtr.limit, machine.vcpu.cpu.idtr.base), (0x3ff, 0xffff_8000_0000_0000));
    machine.put(DATA + 8, 0x1234);
    machine.refuses(&[0x0f, 0x01, 0x18], GP0);
}

#[test]
fn task_and_local_tables_check_their_descriptors() {
    let mut machine = Machine::new();
    let mut with = |code: &[u8], selector: u16| {
        machine.vcpu.cpu.gpr[gpr::RAX] = u64::from(selector);
        machine.run(code)
    };
    const LLDT: &[u8] = &[0x0f, 0x00, 0xd0];
    const LTR: &[u8] = &[0x0f, 0x00, 0xd8];
    assert_eq!(with(LTR, 0), Ran::Fault(GP0));
    assert_eq!(with(LTR, TSS_SELECTOR), Ran::Next);
    assert_eq!(with(LTR, TSS_SELECTOR), Ran::Fault(gp(TSS_SELECTOR)), "it is busy now");
    assert_eq!(with(LTR, TSS_SELECTOR | 4), Ran::Fault(gp(TSS_SELECTOR | 4)));
    assert_eq!(with(LTR, KERNEL_SS), Ran::Fault(gp(KERNEL_SS)));
    assert_eq!(with(LTR, FRESH), Ran::Fault(gp(FRESH)), "sixteen bytes do not fit before the end of the table");
    assert_eq!(with(LLDT, TSS_SELECTOR), Ran::Fault(gp(TSS_SELECTOR)));
    assert_eq!(with(LLDT, LDT), Ran::Next);
    assert_eq!(with(&[0x0f, 0x00, 0xc0], 0xffff), Ran::Next);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RAX], u64::from(LDT), "SLDT r32 clears the rest");
    assert_eq!((machine.vcpu.cpu.ldtr.base, machine.vcpu.cpu.ldtr.limit), (DATA, 0x17));
    // A data segment in the LDT.
    machine.put(DATA + 8, 0x0040_9312_3400_0fff);
    machine.vcpu.cpu.gpr[gpr::RAX] = 0xc;
    assert_eq!(machine.run(&[0x8e, 0xe0]), Ran::Next, "mov fs, eax");
    assert_eq!(machine.vcpu.cpu.segments[seg::FS].base, 0x0012_3400);
    assert_eq!(machine.vcpu.cpu.segments[seg::FS].limit, 0xfff);
    assert_eq!(machine.get(GDT + u64::from(TSS_SELECTOR)) >> 40 & 0xf, 11);
}

#[test]
fn questions_about_selectors_answer_in_the_zero_flag() {
    let mut machine = Machine::in_user_mode();
    let mut ask = |code: &[u8], selector: u16| {
        machine.vcpu.cpu.gpr[gpr::RAX] = u64::from(selector);
        machine.vcpu.cpu.gpr[gpr::RCX] = 0x5555;
        assert_eq!(machine.run(code), Ran::Next);
        (machine.vcpu.cpu.rflags & rflags::ZF != 0, machine.vcpu.cpu.gpr[gpr::RCX])
    };
    const VERR: &[u8] = &[0x0f, 0x00, 0xe0];
    const VERW: &[u8] = &[0x0f, 0x00, 0xe8];
    const LAR: &[u8] = &[0x0f, 0x02, 0xc8];
    const LSL: &[u8] = &[0x0f, 0x03, 0xc8];
    assert!(ask(VERR, READ_ONLY | 3).0);
    assert!(!ask(VERW, READ_ONLY | 3).0);
    assert!(ask(VERW, USER_SS).0);
    assert!(!ask(VERW, KERNEL_SS).0);
    assert!(!ask(VERR, BEYOND).0);
    assert!(!ask(VERR, 0).0);
    assert_eq!(ask(LAR, USER_SS), (true, 0x00c0_f300));
    assert_eq!(ask(LSL, USER_SS), (true, 0xffff_ffff));
    assert_eq!(ask(LAR, KERNEL_CS), (false, 0x5555));
    assert_eq!(ask(LAR, CALL_GATE), (true, 0xec00));
    assert_eq!(ask(LSL, CALL_GATE), (false, 0x5555));
}

#[test]
fn bases_of_fs_and_gs() {
    let mut machine = Machine::in_user_mode();
    machine.vcpu.cpu.gpr[gpr::RAX] = 0x7f00_0000_1000;
    // wrfsbase rax; rdfsbase ecx; wrgsbase rax
    assert_eq!(machine.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), Ran::Next);
    assert_eq!(machine.run(&[0xf3, 0x0f, 0xae, 0xc1]), Ran::Next);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RCX], 0x1000);
    machine.vcpu.cpu.gpr[gpr::RAX] = 1 << 47;
    machine.refuses(&[0xf3, 0x48, 0x0f, 0xae, 0xd8], GP0);
    machine.vcpu.cpu.cr4 &= !cr4::FSGSBASE;
    machine.refuses(&[0xf3, 0x48, 0x0f, 0xae, 0xd0], GuestFault::UD);

    let mut machine = Machine::new();
    machine.vcpu.cpu.kernel_gs_base = 5;
    assert_eq!(machine.run(&[0x0f, 0x01, 0xf8]), Ran::Next);
    assert_eq!((machine.vcpu.cpu.segments[seg::GS].base, machine.vcpu.cpu.kernel_gs_base), (5, 0));
}

#[test]
fn invpcid_checks_its_descriptor() {
    let mut machine = Machine::new();
    const INVPCID: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x08];
    machine.vcpu.cpu.gpr[gpr::RAX] = DATA;
    // Translated code came from one page, and only that page's invalidation concerns it.
    const CODE_PAGE: u64 = 0x5000;
    machine.vcpu.kernel_code.insert(Gva(CODE_PAGE), 4096);
    let mut with = |kind, pcid, address| {
        machine.vcpu.cpu.gpr[gpr::RCX] = kind;
        machine.put(DATA, pcid);
        machine.put(DATA + 8, address);
        machine.vcpu.stale = Default::default();
        let ran = machine.run(INVPCID);
        (ran, machine.vcpu.stale.local_mappings, machine.vcpu.stale.all_mappings)
    };
    let refused = (Ran::Fault(GP0), false, false);
    assert_eq!(with(0, 0, CODE_PAGE), (Ran::Next, false, true));
    assert_eq!(with(0, 0, CODE_PAGE + 0x1000), (Ran::Next, false, false));
    assert_eq!(with(0, 0, 1 << 47), refused);
    assert_eq!(with(0, 1, 0), refused, "PCIDs are off");
    assert_eq!(with(1, 0, 1 << 47), (Ran::Next, true, false));
    assert_eq!(with(2, 0, 0), (Ran::Next, true, true));
    assert_eq!(with(3, 0x1000, 0), refused);
    assert_eq!(with(4, 0, 0), refused);
}

#[test]
fn the_permission_map_guards_ports() {
    let mut machine = Machine::in_user_mode();
    machine.put(TSS + 0x66, 0x100);
    assert_eq!(check_io_permission(&mut machine.core(), 0x60, 1), Err(GP0), "the map lies beyond the limit");
    machine.vcpu.cpu.tr.limit = 0x200;
    machine.put(TSS + 0x66, 0x68);
    machine.put(TSS + 0x68 + 0x60 / 8, !0b1_1110);
    let mut allowed = |port, size| check_io_permission(&mut machine.core(), port, size);
    assert_eq!(allowed(0x61, 1), Ok(()));
    assert_eq!(allowed(0x61, 4), Ok(()));
    assert_eq!(allowed(0x60, 1), Err(GP0));
    assert_eq!(allowed(0x62, 4), Err(GP0));
    assert_eq!(allowed(0x2000, 1), Err(GP0));
    machine.vcpu.cpu.rflags |= rflags::IOPL;
    assert_eq!(check_io_permission(&mut machine.core(), 0x60, 4), Ok(()));
}

#[test]
fn cpuid_fills_four_registers() {
    let mut machine = Machine::in_user_mode();
    machine.vcpu.cpu.gpr = [u64::MAX; 16];
    machine.vcpu.cpu.gpr[gpr::RAX] = 0;
    assert_eq!(machine.run(&[0x0f, 0xa2]), Ran::Next);
    assert_eq!(machine.vcpu.cpu.gpr[gpr::RBX], u64::from(u32::from_le_bytes(*b"Genu")));
    machine.vcpu.cpu.cr4 |= cr4::OSXSAVE;
    machine.vcpu.cpu.gpr[gpr::RAX] = 1;
    assert_eq!(machine.run(&[0x0f, 0xa2]), Ran::Next);
    let shown = machine.vcpu.cpu.gpr[gpr::RCX] >> 27 & 1 == 1;
    assert_eq!(shown, machine.vcpu.cpuid.has("xsave"));
}

#[test]
fn invlpg_forgets_the_page() {
    let mut machine = Machine::new();
    machine.put(DATA, 1);
    let mut core = machine.core();
    assert_eq!(core.read(Gva(DATA), 8), Ok(1));
    machine.put(0x4000 + (DATA >> 12) * 8, 0);
    assert_eq!(machine.core().read(Gva(DATA), 8), Ok(1), "the TLB remembers");
    machine.vcpu.cpu.gpr[gpr::RAX] = DATA + 0x10;
    assert_eq!(machine.run(&[0x0f, 0x01, 0x38]), Ran::Next);
    assert_eq!(machine.core().read(Gva(DATA), 8), Err(GuestFault::page(Gva(DATA), 0)));
}

#[test]
fn a_page_of_registers_is_remembered_as_long_as_one_of_memory() {
    const REGISTERS: u64 = 0xfee0_0000;
    const LOAD_CR3: &[u8] = &[0x0f, 0x22, 0xd8];
    let entry = 0x4000 + (DATA >> 12) * 8;
    let mut machine = Machine::new();
    machine.put(DATA, 1);
    machine.vcpu.cpu.gpr[gpr::RAX] = DATA;
    machine.put(entry, REGISTERS | 1);
    assert_eq!(machine.core().read(Gva(DATA + 8), 4), Ok(REGISTERS + 8));
    assert_eq!(machine.core().write(Gva(DATA), 4, 0), Err(GuestFault::page(Gva(DATA), 3)), "it is read-only");
    machine.put(entry, DATA | 3);
    assert_eq!(machine.core().read(Gva(DATA), 4), Ok(REGISTERS), "it is remembered");
    assert_eq!(machine.run(&[0x0f, 0x01, 0x38]), Ran::Next);
    assert_eq!(machine.core().read(Gva(DATA), 4), Ok(1));
    // A load of CR3 forgets all but global pages.
    for (global, seen) in [(0, 1), (1 << 8, REGISTERS)] {
        machine.put(entry, REGISTERS | 3 | global);
        machine.vcpu.flush_all();
        assert_eq!(machine.core().read(Gva(DATA), 4), Ok(REGISTERS));
        machine.put(entry, DATA | 3);
        machine.vcpu.cpu.gpr[gpr::RAX] = machine.vcpu.cpu.cr3;
        assert_eq!(machine.run(LOAD_CR3), Ran::Next);
        assert_eq!(machine.core().read(Gva(DATA), 4), Ok(seen));
    }
}

#[test]
fn invlpg_forgets_every_piece_of_a_large_page() {
    let mut machine = Machine::new();
    // 0x20_0000 and 0x4000_0000 are the 2 MiB from zero, once as one page and once as part of 1 GiB.
    machine.put(0x3008, 0x80 | 3);
    machine.put(0x2008, 0x80 | 3);
    for (base, entry) in [(0x20_0000, 0x3008), (0x4000_0000, 0x2008)] {
        let (first, last) = (Gva(base + DATA), Gva(base + 0x1f_f000));
        assert_eq!(machine.core().read(first, 8), Ok(0));
        assert_eq!(machine.core().read(last, 8), Ok(0));
        machine.put(entry, 0);
        assert_eq!(machine.core().read(last, 8), Ok(0), "the TLB remembers");
        machine.vcpu.cpu.gpr[gpr::RAX] = first.0;
        assert_eq!(machine.run(&[0x0f, 0x01, 0x38]), Ran::Next);
        assert_eq!(machine.core().read(last, 8), Err(GuestFault::page(last, 0)));
    }
}
