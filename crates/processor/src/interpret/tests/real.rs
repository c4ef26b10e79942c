//! Real mode: 16-bit code, segments without descriptors, and the way out of it.

use x86::rflags::{CF, FIXED, IF};
use x86::state::gpr::{RAX, RBX, RSP};
use x86::{CpuState, cr0, seg};

use super::machine::{CODE, DATA, Machine};
use crate::engine::Exit;
use crate::interpret::step;

/// Code at 1000:0000, data at 2000:0000, the stack below 3000:0100, the interrupt table at 0.
fn machine(code: &[u8]) -> Machine {
    let mut machine = Machine::new(code);
    let mut cpu = CpuState::reset();
    for (register, selector) in [(seg::CS, CODE >> 4), (seg::DS, DATA >> 4), (seg::SS, 0x3000)] {
        cpu.segments[register].selector = selector as u16;
        cpu.segments[register].base = selector << 4;
    }
    (cpu.rip, cpu.gpr[RSP]) = (0, 0x100);
    cpu.idtr.limit = 0x3ff;
    machine.vcpu.cpu = cpu;
    machine
}

fn code_segment(machine: &Machine) -> (u16, u64) {
    let code = &machine.vcpu.cpu.segments[seg::CS];
    (code.selector, code.base)
}

#[test]
fn operands_and_addresses_have_16_bits() {
    // mov ax, 0x1234; mov [bx+si+2], ax; mov eax, [2]
    let mut machine = machine(&[0xb8, 0x34, 0x12, 0x89, 0x40, 0x02, 0x66, 0xa1, 0x02, 0x00]);
    machine.set(RAX, 0xffff_0000).set(RBX, 0xffff_ffff_0001_0000);
    machine.step().step();
    assert_eq!(machine.peek::<2>(DATA + 2), [0x34, 0x12]);
    assert_eq!(machine.step().gpr(RAX), 0x1234);
}

#[test]
fn a_far_jump_takes_the_base_from_the_selector() {
    // jmp 0x2000:0x0010
    let mut machine = machine(&[0xea, 0x10, 0x00, 0x00, 0x20]);
    machine.step();
    assert_eq!((machine.rip(), code_segment(&machine)), (0x10, (0x2000, 0x2_0000)));
}

#[test]
fn a_far_call_comes_back() {
    // call 0x2000:0x0010 to: retf 2
    let mut machine = machine(&[0x9a, 0x10, 0x00, 0x00, 0x20]);
    machine.poke(DATA + 0x10, &[0xca, 2, 0]);
    machine.step();
    assert_eq!((machine.rip(), code_segment(&machine)), (0x10, (0x2000, 0x2_0000)));
    assert_eq!(machine.peek::<4>(0x3_00fc), [5, 0, 0x00, 0x10]);
    machine.step();
    assert_eq!((machine.rip(), code_segment(&machine)), (5, (0x1000, CODE)));
    assert_eq!(machine.gpr(RSP), 0x102);
}

#[test]
fn an_interrupt_goes_through_the_table_and_returns() {
    // int 0x21 to: iret
    let mut machine = machine(&[0xcd, 0x21]);
    machine.poke(4 * 0x21, &[0x10, 0x00, 0x00, 0x20]);
    machine.poke(DATA + 0x10, &[0xcf]);
    machine.cpu().rflags |= IF | CF;
    machine.step();
    assert_eq!((machine.rip(), code_segment(&machine)), (0x10, (0x2000, 0x2_0000)));
    assert_eq!(machine.vcpu.cpu.rflags, FIXED | CF);
    assert_eq!(machine.peek::<6>(0x3_00fa), [2, 0, 0x00, 0x10, 0x03, 0x02]);
    machine.step();
    assert_eq!((machine.rip(), code_segment(&machine)), (2, (0x1000, CODE)));
    assert_eq!((machine.vcpu.cpu.rflags, machine.gpr(RSP)), (FIXED | CF | IF, 0x100));
}

#[test]
fn exceptions_push_no_error_code_and_end_the_processor_without_a_table() {
    // jmp near beyond the limit of the segment: #GP
    let mut machine = machine(&[0x66, 0xe9, 0, 0, 1, 0]);
    machine.poke(4 * 13, &[0x10, 0x00, 0x00, 0x20]);
    machine.step();
    assert_eq!((machine.rip(), machine.gpr(RSP)), (0x10, 0xfa));
    assert_eq!(machine.peek::<2>(0x3_00fa), [0, 0]);
    // ud2
    let mut machine = self::machine(&[0x0f, 0x0b]);
    machine.cpu().idtr.limit = 0;
    let Machine { vcpu, memory, ports, cache } = &mut machine;
    let mut core = crate::Core { vcpu, memory, outside: ports };
    assert_eq!(step(&mut core, cache), Some(Exit::TripleFault));
}

#[test]
fn the_way_into_protected_mode() {
    // lgdt [0]; mov eax, cr0; or al, 1; mov cr0, eax; jmp 8:0x1_0100 (32 bits)
    let code =
        [0x66, 0x0f, 0x01, 0x16, 0, 0, 0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0, 0x66, 0xea, 0, 1, 1, 0, 8, 0];
    let mut machine = machine(&code);
    machine.poke(DATA, &[0x17, 0, 0x00, 0x01, 2, 0]);
    machine.poke(DATA + 0x108, &0x00cf_9b00_0000_ffff_u64.to_le_bytes());
    machine.step().step().step().step();
    assert_eq!((machine.vcpu.cpu.cr0 & cr0::PE, machine.vcpu.cpu.gdtr.base), (cr0::PE, DATA + 0x100));
    assert_eq!(code_segment(&machine), (0x1000, CODE), "16-bit code goes on until a far jump");
    machine.step();
    assert_eq!((machine.rip(), code_segment(&machine)), (0x1_0100, (8, 0)));
    assert!(machine.vcpu.cpu.segments[seg::CS].is_big());
}
