//! System instructions: what an operating system uses to run the processor, and far transfers of control. One
//! implementation for both engines. Intel SDM (2024-12) Vol. 2 has each instruction, Vol. 3A 2.8 "System Instruction
//! Summary" lists them.

pub mod control;
pub mod debug;
pub mod fast;
mod keys;
pub mod msr;
pub mod paging;
pub mod ports;
pub mod tables;
#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use x86::state::gpr;
use x86::{CpuState, GuestFault, cr0, cr4, rflags, seg, vector};

use crate::core::Core;
use crate::deliver;
use crate::engine::Exit;
use crate::far::{self, next_rip};
use crate::interpret::{Flow, operand, segment_index};
use crate::segment;

pub use keys::set_pkru;
pub use ports::check_io_permission;

type Outcome = Result<Flow, GuestFault>;

/// #GP(0) unless the running code is at CPL 0.
fn supervisor(core: &Core<'_>) -> Result<(), GuestFault> {
    if core.vcpu.cpu.cpl() == 0 { Ok(()) } else { Err(GuestFault::GP0) }
}

/// #UD outside protected mode and long mode.
fn protected(core: &Core<'_>) -> Result<(), GuestFault> {
    if core.vcpu.cpu.cr0 & x86::cr0::PE != 0 { Ok(()) } else { Err(GuestFault::UD) }
}

/// #UD outside 64-bit mode.
fn long_code(core: &Core<'_>) -> Result<(), GuestFault> {
    if core.vcpu.cpu.is_code64() { Ok(()) } else { Err(GuestFault::UD) }
}

/// User-mode instruction prevention: SGDT, SIDT, SLDT, SMSW and STR fault at CPL above 0 when CR4.UMIP is set.
fn not_prevented(core: &Core<'_>) -> Result<(), GuestFault> {
    let prevented = core.vcpu.cpu.cr4 & cr4::UMIP != 0 && core.vcpu.cpu.cpl() > 0;
    if prevented { Err(GuestFault::GP0) } else { Ok(()) }
}

/// EDX:EAX as RDMSR, RDTSC and their like leave it: the upper halves of RAX and RDX become zero.
pub(crate) fn set_edx_eax(cpu: &mut CpuState, value: u64) {
    cpu.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.gpr[gpr::RDX] = value >> 32;
}

pub(crate) fn edx_eax(cpu: &CpuState) -> u64 {
    cpu.gpr[gpr::RAX] & 0xffff_ffff | cpu.gpr[gpr::RDX] << 32
}

/// How a delivery that set RIP itself ends the instruction.
fn delivered(exit: Option<Exit>) -> Outcome {
    Ok(exit.map_or(Flow::Done, Flow::Exit))
}

/// Other processors see all earlier stores before this one reads anything later.
pub(crate) fn serialize(core: &Core<'_>) {
    // A processor that is alone sees its own stores in any case.
    if core.vcpu.cpuid.cpus() > 1 {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// Executes a system instruction; `None` says that it is not one.
pub fn execute(core: &mut Core<'_>, instruction: &Instruction) -> Option<Outcome> {
    use Mnemonic as M;
    if is_serializing(instruction.mnemonic()) {
        serialize(core);
    }
    let outcome = match instruction.mnemonic() {
        M::Mov => return moves(core, instruction),
        M::Jmp if is_far_branch(instruction.code()) => far::jump(core, instruction),
        M::Call if is_far_branch(instruction.code()) => far::call(core, instruction),
        M::Retf => far::ret(core, instruction),
        M::Iret => far::iret(core, 2),
        M::Iretd => far::iret(core, 4),
        M::Iretq => far::iret(core, 8),
        M::Int => software_interrupt(core, instruction, instruction.immediate8()),
        M::Int3 => software_interrupt(core, instruction, vector::BP),
        M::Into => into(core, instruction),
        M::Int1 => {
            let next = next_rip(core, instruction);
            delivered(deliver::int1(core, next))
        }
        M::Hlt => halt(core, instruction),
        M::Cli => interrupt_flag(core, false),
        M::Sti => interrupt_flag(core, true),
        M::Clac => alignment_flag(core, false),
        M::Stac => alignment_flag(core, true),
        M::Syscall => fast::syscall(core, instruction),
        M::Sysret | M::Sysretq => fast::sysret(core, instruction.mnemonic() == M::Sysretq),
        M::Sysenter => fast::sysenter(core),
        M::Sysexit | M::Sysexitq => fast::sysexit(core, instruction.mnemonic() == M::Sysexitq),
        M::Swapgs => fast::swapgs(core),
        M::Rdfsbase => fast::read_base(core, instruction, seg::FS),
        M::Rdgsbase => fast::read_base(core, instruction, seg::GS),
        M::Wrfsbase => fast::write_base(core, instruction, seg::FS),
        M::Wrgsbase => fast::write_base(core, instruction, seg::GS),
        M::Clts => control::clts(core),
        M::Smsw => control::smsw(core, instruction),
        M::Lmsw => control::lmsw(core, instruction),
        M::Rdmsr => msr::rdmsr(core),
        M::Wrmsr => msr::wrmsr(core),
        M::Rdtsc => msr::rdtsc(core, false),
        M::Rdtscp => msr::rdtsc(core, true),
        M::Rdpkru => keys::rdpkru(core),
        M::Wrpkru => keys::wrpkru(core),
        M::Rdpid => msr::rdpid(core, instruction),
        // There are no performance counters, so every index is out of range.
        M::Rdpmc => Err(GuestFault::GP0),
        M::Cpuid => cpuid(core),
        M::Invlpg => paging::invlpg(core, instruction),
        M::Invpcid => paging::invpcid(core, instruction),
        // Every instruction is complete before the next one is fetched.
        M::Serialize => Ok(Flow::Next),
        // Guest memory is coherent with the host's caches at all times: there is nothing to write back.
        M::Invd | M::Wbinvd => supervisor(core).map(|()| Flow::Next),
        M::Lgdt | M::Lidt => tables::load_table(core, instruction),
        M::Sgdt | M::Sidt => tables::store_table(core, instruction),
        M::Lldt => tables::lldt(core, instruction),
        M::Ltr => tables::ltr(core, instruction),
        M::Sldt => tables::store_selector(core, instruction, core.vcpu.cpu.ldtr.selector),
        M::Str => tables::store_selector(core, instruction, core.vcpu.cpu.tr.selector),
        M::Verr | M::Verw => tables::verify(core, instruction),
        M::Lar | M::Lsl => tables::load_attributes(core, instruction),
        M::Arpl => tables::arpl(core, instruction),
        M::Les | M::Lss | M::Lds | M::Lfs | M::Lgs => tables::load_far_pointer(core, instruction),
        M::Ud0 | M::Ud1 | M::Ud2 => Err(GuestFault::UD),
        // CPUID offers none of these.
        M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx | M::Umonitor | M::Umwait | M::Tpause => Err(GuestFault::UD),
        M::Vmcall => hypercall(core, instruction),
        M::Vmlaunch | M::Vmresume | M::Vmxoff | M::Vmxon | M::Vmclear | M::Vmptrld | M::Vmptrst => Err(GuestFault::UD),
        M::Vmread | M::Vmwrite | M::Vmfunc | M::Invept | M::Invvpid => Err(GuestFault::UD),
        M::Vmmcall | M::Vmrun | M::Vmload | M::Vmsave | M::Stgi | M::Clgi | M::Skinit | M::Invlpga => {
            Err(GuestFault::UD)
        }
        M::Getsec | M::Rsm | M::Encls | M::Enclu | M::Enclv | M::Rdpru => Err(GuestFault::UD),
        _ => return None,
    };
    Some(outcome)
}

/// Intel SDM (2024-12) Vol. 3A 9.3 "Serializing Instructions".
/// MOV to a control or debug register stands for all of MOV that comes here.
fn is_serializing(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cpuid
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Serialize
            | M::Mov
            | M::Wrmsr
            | M::Invlpg
            | M::Invpcid
            | M::Invd
            | M::Wbinvd
            | M::Lgdt
            | M::Lidt
            | M::Lldt
            | M::Ltr
    )
}

fn is_far_branch(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_ptr1616
            | Code::Jmp_ptr1632
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_ptr1616
            | Code::Call_ptr1632
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    )
}

/// MOV with control, debug or segment registers; all other forms are not ours.
fn moves(core: &mut Core<'_>, instruction: &Instruction) -> Option<Outcome> {
    let (to, from) = (instruction.op0_register(), instruction.op1_register());
    if to.is_cr() {
        Some(control::mov_to_control(core, to, from))
    } else if from.is_cr() {
        Some(control::mov_from_control(core, to, from))
    } else if to.is_dr() {
        Some(debug::mov_to_debug(core, to, from))
    } else if from.is_dr() {
        Some(debug::mov_from_debug(core, to, from))
    } else if instruction.op0_kind() == OpKind::Register
        && let Some(index) = segment_index(to)
    {
        Some(mov_to_segment(core, instruction, index))
    } else if instruction.op1_kind() == OpKind::Register
        && let Some(index) = segment_index(from)
    {
        let selector = u64::from(core.vcpu.cpu.segments[index].selector);
        Some(operand::write(core, instruction, 0, selector).map(|()| Flow::Next))
    } else {
        None
    }
}

fn mov_to_segment(core: &mut Core<'_>, instruction: &Instruction, index: usize) -> Outcome {
    if index == seg::CS {
        return Err(GuestFault::UD);
    }
    let selector = operand::read(core, instruction, 1)? as u16;
    segment::load(core, index, selector)?;
    if index == seg::SS {
        core.vcpu.cpu.interrupt_shadow = true;
    }
    Ok(Flow::Next)
}

fn software_interrupt(core: &mut Core<'_>, instruction: &Instruction, vector: u8) -> Outcome {
    let next = next_rip(core, instruction);
    delivered(deliver::software(core, vector, next))
}

fn into(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    if core.vcpu.cpu.is_code64() {
        return Err(GuestFault::UD);
    }
    if core.vcpu.cpu.rflags & rflags::OF == 0 {
        return Ok(Flow::Next);
    }
    software_interrupt(core, instruction, vector::OF)
}

fn halt(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    supervisor(core)?;
    core.vcpu.cpu.rip = next_rip(core, instruction);
    // HLT itself was the one instruction that STI shields.
    core.vcpu.cpu.interrupt_shadow = false;
    Ok(Flow::Exit(Exit::Halt))
}

/// CLI and STI. (CR4.VME and PVI cannot be set.)
fn interrupt_flag(core: &mut Core<'_>, on: bool) -> Outcome {
    let cpu = &mut core.vcpu.cpu;
    let io_level = (cpu.rflags & rflags::IOPL) >> 12;
    if cpu.cr0 & x86::cr0::PE != 0 && u64::from(cpu.cpl()) > io_level {
        return Err(GuestFault::GP0);
    }
    if !on {
        cpu.rflags &= !rflags::IF;
    } else if cpu.rflags & rflags::IF == 0 {
        cpu.rflags |= rflags::IF;
        cpu.interrupt_shadow = true;
    }
    Ok(Flow::Next)
}

/// CLAC and STAC.
fn alignment_flag(core: &mut Core<'_>, on: bool) -> Outcome {
    let cpu = &mut core.vcpu.cpu;
    if cpu.cpl() > 0 {
        return Err(GuestFault::UD);
    }
    if on {
        cpu.rflags |= rflags::AC;
    } else {
        cpu.rflags &= !rflags::AC;
    }
    Ok(Flow::Next)
}

/// VMCALL, by the rules of the interface that CPUID's `KVM` leaves show (Documentation/virt/kvm/x86/hypercalls.rst): the
/// kernel gets "no such call", for there is none, and anybody else "not allowed".
fn hypercall(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    const NO_SUCH_CALL: i64 = -1000;
    const NOT_ALLOWED: i64 = -1;
    let cpu = &mut core.vcpu.cpu;
    if cpu.cr0 & cr0::PE == 0 || instruction.has_lock_prefix() {
        return Err(GuestFault::UD);
    }
    let answer = if cpu.cpl() == 0 { NO_SUCH_CALL } else { NOT_ALLOWED };
    let answer = answer as u64;
    cpu.gpr[gpr::RAX] = if cpu.is_code64() { answer } else { answer & 0xffff_ffff };
    Ok(Flow::Next)
}

fn cpuid(core: &mut Core<'_>) -> Outcome {
    let cpu = &core.vcpu.cpu;
    let (leaf, subleaf) = (cpu.gpr[gpr::RAX] as u32, cpu.gpr[gpr::RCX] as u32);
    let now = crate::cpuid::Now {
        osxsave: cpu.cr4 & cr4::OSXSAVE != 0,
        ospke: cpu.cr4 & cr4::PKE != 0,
        xcr0: cpu.xcr0,
        apic_id: core.outside.apic_id(),
        apic_enabled: core.outside.apic_enabled(),
        misc_enable: cpu.misc_enable,
    };
    let [eax, ebx, ecx, edx] = core.vcpu.cpuid.query(leaf, subleaf, now);
    let registers = &mut core.vcpu.cpu.gpr;
    registers[gpr::RAX] = u64::from(eax);
    registers[gpr::RBX] = u64::from(ebx);
    registers[gpr::RCX] = u64::from(ecx);
    registers[gpr::RDX] = u64::from(edx);
    Ok(Flow::Next)
}
