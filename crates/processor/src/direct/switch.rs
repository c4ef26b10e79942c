//! The VCPU's state goes to a process and comes back.

use host::tracee::{Registers, Stop, Tracee};
use x86::state::gpr;
use x86::{CpuState, Gva, Segment, rflags, seg};

use crate::core::Core;
use crate::segment;

/// CS and SS of 64-bit user code, under Linux as guest and as host.
pub const SELECTORS: (u16, u16) = (0x33, 0x2b);
/// CS of 32-bit code, which a far jump leads to.
const CODE32: u64 = 0x23;

/// Flags that user code can change. Those that it cannot (IF, IOPL) are the VCPU's.
const CHANGEABLE: u64 = rflags::ARITHMETIC | rflags::DF | rflags::TF | rflags::NT | rflags::AC | rflags::ID;

pub fn put(cpu: &CpuState, tracee: &mut Tracee) -> std::io::Result<()> {
    let registers = Registers {
        r15: cpu.gpr[gpr::R15],
        r14: cpu.gpr[gpr::R14],
        r13: cpu.gpr[gpr::R13],
        r12: cpu.gpr[gpr::R12],
        rbp: cpu.gpr[gpr::RBP],
        rbx: cpu.gpr[gpr::RBX],
        r11: cpu.gpr[gpr::R11],
        r10: cpu.gpr[gpr::R10],
        r9: cpu.gpr[gpr::R9],
        r8: cpu.gpr[gpr::R8],
        rax: cpu.gpr[gpr::RAX],
        rcx: cpu.gpr[gpr::RCX],
        rdx: cpu.gpr[gpr::RDX],
        rsi: cpu.gpr[gpr::RSI],
        rdi: cpu.gpr[gpr::RDI],
        orig_rax: 0,
        rip: cpu.rip,
        cs: 0,
        eflags: cpu.rflags,
        rsp: cpu.gpr[gpr::RSP],
        ss: 0,
        fs_base: cpu.segments[seg::FS].base,
        gs_base: cpu.segments[seg::GS].base,
        ds: 0,
        es: 0,
        fs: 0,
        gs: 0,
    };
    tracee.set_registers(&registers)?;
    tracee.set_vectors(&cpu.fpu.bytes)
}

/// Takes the state back. At a system call RIP is put back to it. False when the code has used what a guest's code should
/// not, so that it had better not run so again.
pub fn take(core: &mut Core<'_>, tracee: &mut Tracee, stop: Stop) -> std::io::Result<bool> {
    let registers = tracee.registers()?;
    let cpu = &mut core.vcpu.cpu;
    let is_plain = tracee.vectors(&mut cpu.fpu.bytes)?;
    cpu.gpr = [
        registers.rax,
        registers.rcx,
        registers.rdx,
        registers.rbx,
        registers.rsp,
        registers.rbp,
        registers.rsi,
        registers.rdi,
        registers.r8,
        registers.r9,
        registers.r10,
        registers.r11,
        registers.r12,
        registers.r13,
        registers.r14,
        registers.r15,
    ];
    cpu.rip = registers.rip;
    cpu.rflags = cpu.rflags & !CHANGEABLE | registers.eflags & CHANGEABLE;
    cpu.segments[seg::FS].base = registers.fs_base;
    cpu.segments[seg::GS].base = registers.gs_base;
    if stop == Stop::Call {
        // SYSCALL has left the next RIP in RCX and the flags in R11, as it will again.
        cpu.gpr[gpr::RAX] = registers.orig_rax;
        cpu.rip = cpu.rip.wrapping_sub(2);
    }
    let mut has_selectors = false;
    if registers.cs == CODE32 {
        has_selectors = true;
        segment::set_code(core, Segment::flat_code32(CODE32 as u16, 3));
    }
    let selectors =
        [(seg::DS, registers.ds), (seg::ES, registers.es), (seg::FS, registers.fs), (seg::GS, registers.gs)];
    for (register, selector) in selectors {
        if selector != 0 {
            has_selectors = true;
            let base = core.vcpu.cpu.segments[register].base;
            // What the host's tables have and the guest's have not stays null.
            if segment::load(core, register, selector as u16).is_ok() && register >= seg::FS {
                core.vcpu.cpu.segments[register].base = base;
            }
        }
    }
    Ok(is_plain && !has_selectors)
}

/// Puts RIP back to the INT3 (or INT 3, or INT1) that it is behind.
pub fn back_to_trap(core: &mut Core<'_>) {
    let rip = core.vcpu.cpu.rip;
    let mut code = [0];
    if core.read_bytes(Gva(rip.wrapping_sub(1)), &mut code).is_ok() {
        // INT 3 has two bytes, the others one.
        core.vcpu.cpu.rip = rip.wrapping_sub(if code == [3] { 2 } else { 1 });
    }
}
