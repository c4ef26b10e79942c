use iced_x86::{Decoder, DecoderOptions};
use memory::GuestMemory;
use x86::registers::xcr0;
use x86::state::gpr;
use x86::{CpuState, FpuArea, Gpa, GuestFault, Segment, cr0, cr4, efer, seg, vector};

use super::*;
use crate::engine::Outside;
use crate::vcpu::Vcpu;

struct Nothing;

impl Outside for Nothing {
    fn port_read(&mut self, _: u16, _: u8) -> u32 {
        0
    }
    fn port_write(&mut self, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: Gpa, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: Gpa, _: u8, _: u64) {}
    fn apic_read(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn apic_write(&mut self, _: u32, _: u64) -> bool {
        false
    }
    fn task_priority(&self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: u8) {}
    fn apic_id(&self) -> u32 {
        0
    }
    fn apic_enabled(&self) -> bool {
        false
    }
}

/// 64-bit kernel code with all of SIMD enabled and paging off, so that addresses are physical.
fn machine() -> (Box<Vcpu>, GuestMemory) {
    let mut cpu = CpuState::reset();
    cpu.cr0 = cr0::PE | cr0::MP | cr0::NE;
    cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    cpu.efer = efer::LME | efer::LMA;
    cpu.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    cpu.segments[seg::CS] = Segment::flat_code64(8, 0);
    cpu.segments[seg::SS] = Segment::flat_data(16, 0);
    (Box::new(Vcpu::new(cpu)), GuestMemory::new(1 << 20).unwrap())
}

fn step(vcpu: &mut Vcpu, memory: &GuestMemory, code: &[u8]) -> Result<(), GuestFault> {
    let instruction = Decoder::with_ip(64, code, 0x1000, DecoderOptions::NONE).decode();
    let mut core = Core { vcpu, memory, outside: &mut Nothing };
    match execute(&mut core, &instruction).unwrap()? {
        Flow::Next => Ok(()),
        _ => panic!("SIMD instructions end at the next one"),
    }
}

const FLD1: &[u8] = &[0xd9, 0xe8];
const FWAIT: &[u8] = &[0x9b];
const FNSTSW_AX: &[u8] = &[0xdf, 0xe0];
const FDIV: &[u8] = &[0xdc, 0xf9]; // st1 /= st0
const FLDZ: &[u8] = &[0xd9, 0xee];
const EMMS: &[u8] = &[0x0f, 0x77];
const PXOR: &[u8] = &[0x66, 0x0f, 0xef, 0xc0];
const DIVSS: &[u8] = &[0xf3, 0x0f, 0x5e, 0xc8]; // xmm1 /= xmm0
const VPXOR: &[u8] = &[0xc5, 0xf9, 0xef, 0xc0];
const VADDPS_ZMM: &[u8] = &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc0];
const SSE4A: &[u8] = &[0x66, 0x0f, 0x79, 0xc0];

#[test]
fn control_bits_decide_who_faults_how() {
    let lazy = |code: &[u8], change: fn(&mut CpuState)| {
        let (mut vcpu, memory) = machine();
        change(&mut vcpu.cpu);
        let before = vcpu.cpu.fpu.clone();
        let result = step(&mut vcpu, &memory, code);
        assert!(result.is_ok() || vcpu.cpu.fpu == before, "a fault changes nothing");
        result
    };
    let switched: fn(&mut CpuState) = |cpu| cpu.cr0 |= cr0::TS;
    for code in [FLD1, FWAIT, EMMS, PXOR, VPXOR] {
        assert_eq!(lazy(code, |_| ()), Ok(()));
        assert_eq!(lazy(code, switched), Err(GuestFault::NM));
    }
    assert_eq!(lazy(FWAIT, |cpu| cpu.cr0 = cpu.cr0 & !cr0::MP | cr0::TS), Ok(()));
    let emulated: fn(&mut CpuState) = |cpu| cpu.cr0 |= cr0::EM;
    assert_eq!(lazy(FLD1, emulated), Err(GuestFault::NM));
    assert_eq!(lazy(EMMS, emulated), Err(GuestFault::UD));
    assert_eq!(lazy(PXOR, emulated), Err(GuestFault::UD));
    let no_sse: fn(&mut CpuState) = |cpu| cpu.cr4 &= !cr4::OSFXSR;
    assert_eq!(lazy(PXOR, no_sse), Err(GuestFault::UD));
    assert_eq!(lazy(VPXOR, no_sse), Ok(()));
    assert_eq!(lazy(VPXOR, |cpu| cpu.cr4 &= !cr4::OSXSAVE), Err(GuestFault::UD));
    assert_eq!(lazy(VPXOR, |cpu| cpu.xcr0 = 3), Err(GuestFault::UD));
    assert_eq!(lazy(VADDPS_ZMM, |_| ()), Err(GuestFault::UD));
    assert_eq!(lazy(SSE4A, |_| ()), Err(GuestFault::UD));
}

#[test]
fn an_x87_exception_waits_for_the_next_waiting_instruction() {
    let (mut vcpu, memory) = machine();
    // Division by zero is unmasked.
    vcpu.cpu.fpu.bytes[0] = 0x7b;
    for code in [FLD1, FLDZ, FDIV] {
        step(&mut vcpu, &memory, code).unwrap();
    }
    assert_eq!(vcpu.cpu.fpu.bytes[2] & 0x84, 0x84, "ZE and the summary are set");
    assert_eq!(vcpu.cpu.fpu.bytes[6..24], [0; 18], "no host address");
    assert_eq!(step(&mut vcpu, &memory, FWAIT), Err(GuestFault::plain(vector::MF)));
    assert_eq!(step(&mut vcpu, &memory, FLD1), Err(GuestFault::plain(vector::MF)));
    assert_eq!(step(&mut vcpu, &memory, PXOR), Ok(()));
    assert_eq!(vcpu.cpu.fpu.bytes[2] & 0x84, 0x84, "SSE does not care");
    step(&mut vcpu, &memory, FNSTSW_AX).unwrap();
    assert_eq!(vcpu.cpu.gpr[gpr::RAX] & 0x84, 0x84);
}

#[test]
fn an_unmasked_simd_exception_is_xm_or_ud() {
    for (control, wanted) in [(cr4::OSXMMEXCPT, GuestFault::plain(vector::XM)), (0, GuestFault::UD)] {
        let (mut vcpu, memory) = machine();
        vcpu.cpu.cr4 = vcpu.cpu.cr4 & !cr4::OSXMMEXCPT | control;
        let one = 1_f32.to_bits().to_le_bytes();
        vcpu.cpu.fpu.bytes[FpuArea::XMM + 16..FpuArea::XMM + 20].copy_from_slice(&one);
        vcpu.cpu.fpu.bytes[FpuArea::MXCSR + 1] = 0x1d;
        assert_eq!(step(&mut vcpu, &memory, DIVSS), Err(wanted));
        assert_eq!(vcpu.cpu.fpu.bytes[FpuArea::MXCSR] & 0x3f, 4);
        assert_eq!(vcpu.cpu.fpu.bytes[FpuArea::XMM + 16..FpuArea::XMM + 20], one);
    }
}

#[test]
fn more_instructions_than_the_arena_holds() {
    let (mut vcpu, memory) = machine();
    for immediate in 0..=255 {
        for register in 0..8 {
            // pshufd xmm, xmm0, imm8
            vcpu.cpu.fpu.bytes[FpuArea::XMM..FpuArea::XMM + 16]
                .copy_from_slice(&0x0000_0003_0000_0002_0000_0001_0000_0000_u128.to_le_bytes());
            step(&mut vcpu, &memory, &[0x66, 0x0f, 0x70, 0xc0 | register << 3, immediate]).unwrap();
            let at = FpuArea::XMM + 16 * usize::from(register);
            let got: Vec<u8> = vcpu.cpu.fpu.bytes[at..at + 16].iter().step_by(4).copied().collect();
            assert_eq!(got, [0, 2, 4, 6].map(|shift| immediate >> shift & 3));
        }
    }
}

#[test]
fn xcr0_and_mxcsr_take_legal_values_only() {
    let (mut vcpu, memory) = machine();
    for (value, legal) in [(1, true), (3, true), (7, true), (0, false), (2, false), (5, false), (0xe7, false)] {
        vcpu.cpu.gpr[gpr::RAX] = value;
        vcpu.cpu.gpr[gpr::RCX] = 0;
        vcpu.cpu.gpr[gpr::RDX] = 0;
        let result = step(&mut vcpu, &memory, &[0x0f, 0x01, 0xd1]);
        assert_eq!(result, if legal { Ok(()) } else { Err(GuestFault::GP0) }, "{value:#x}");
        assert!(!legal || vcpu.cpu.xcr0 == value);
    }
    assert!(vcpu.stale.mode);
    vcpu.cpu.gpr[gpr::RAX] = 0x2000;
    memory.write(Gpa(0x2000), &0x1_1f80_u32.to_le_bytes()).unwrap();
    assert_eq!(step(&mut vcpu, &memory, &[0x0f, 0xae, 0x10]), Err(GuestFault::GP0));
    memory.write(Gpa(0x2000), &0x9fc0_u32.to_le_bytes()).unwrap();
    assert_eq!(step(&mut vcpu, &memory, &[0x0f, 0xae, 0x10]), Ok(()));
    assert_eq!(step(&mut vcpu, &memory, &[0x0f, 0xae, 0x58, 0x10]), Ok(()));
    let mut stored = [0; 4];
    memory.read(Gpa(0x2010), &mut stored).unwrap();
    assert_eq!(u32::from_le_bytes(stored), 0x9fc0);
}
