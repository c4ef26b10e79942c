//! Far transfers of control: JMP, CALL and RET between segments, and IRET. Intel SDM (2024-12) Vol. 2, the operation
//! sections of these instructions, and Vol. 3A 6.8 "Privilege Level Checking When Transferring Program Control".

use iced_x86::{Code, Instruction};
use x86::{CpuState, GuestFault, Gva, Segment, cr0, rflags, seg, vector};

use crate::core::Core;
use crate::deliver;
use crate::engine::Exit;
use crate::interpret::{Flow, operand};
use crate::real;
use crate::segment::{self, Descriptor, Stack, is_null, rpl, selector_fault, system_type};

type Outcome = Result<Flow, GuestFault>;

fn unsupported(what: &str) -> Outcome {
    Ok(Flow::Exit(Exit::Unsupported(what.to_owned())))
}

/// The address of the instruction behind this one.
#[must_use]
pub fn next_rip(core: &Core<'_>, instruction: &Instruction) -> u64 {
    let next = core.vcpu.cpu.rip.wrapping_add(instruction.len() as u64);
    if core.vcpu.cpu.is_code64() { next } else { next & 0xffff_ffff }
}

/// Where a far JMP or CALL wants to go.
struct Pointer {
    selector: u16,
    offset: u64,
    /// Bytes of the offset, and of what CALL pushes: 2, 4 or 8.
    size: usize,
}

fn pointer(core: &mut Core<'_>, instruction: &Instruction) -> Result<Pointer, GuestFault> {
    let size = match instruction.code() {
        Code::Jmp_ptr1616 | Code::Call_ptr1616 | Code::Jmp_m1616 | Code::Call_m1616 => 2,
        Code::Jmp_m1664 | Code::Call_m1664 => 8,
        _ => 4,
    };
    let (selector, offset) = match instruction.code() {
        Code::Jmp_ptr1616 | Code::Call_ptr1616 => {
            (instruction.far_branch_selector(), u64::from(instruction.far_branch16()))
        }
        Code::Jmp_ptr1632 | Code::Call_ptr1632 => {
            (instruction.far_branch_selector(), u64::from(instruction.far_branch32()))
        }
        _ => {
            let address = operand::linear_address(core, instruction)?;
            let offset = core.read(address, size)?;
            (core.read(address.add(size as u64), 2)? as u16, offset)
        }
    };
    Ok(Pointer { selector, offset, size })
}

/// Checks that an offset lies in a code segment.
fn check_target(core: &Core<'_>, segment: &Segment, offset: u64) -> Result<(), GuestFault> {
    let long = core.vcpu.cpu.is_long_mode() && segment.is_long();
    let inside = if long { Gva(offset).is_canonical() } else { offset <= u64::from(segment.limit) };
    if inside { Ok(()) } else { Err(GuestFault::GP0) }
}

/// The checks of a code descriptor that a JMP or CALL names itself, without a gate.
fn check_direct_code(core: &Core<'_>, code: &Descriptor, selector: u16) -> Result<(), GuestFault> {
    let cpl = core.vcpu.cpu.cpl();
    let allowed = if code.is_conforming() { code.dpl() <= cpl } else { rpl(selector) <= cpl && code.dpl() == cpl };
    if !allowed || (core.vcpu.cpu.is_long_mode() && code.is_long() && code.is_big()) {
        return Err(selector_fault(vector::GP, selector));
    }
    if !code.is_present() {
        return Err(selector_fault(vector::NP, selector));
    }
    Ok(())
}

/// JMP ptr16:16/32 and m16:16/32/64.
pub fn jump(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    let to = pointer(core, instruction)?;
    if core.vcpu.cpu.cr0 & cr0::PE == 0 {
        return real::jump(core, to.selector, to.offset).map(|()| Flow::Done);
    }
    if is_null(to.selector) {
        return Err(GuestFault::GP0);
    }
    let descriptor = Descriptor::fetch(core, to.selector, vector::GP)?;
    let (code, selector, offset) = if descriptor.is_system() {
        if !core.vcpu.cpu.is_long_mode() {
            return unsupported("a far jump through a gate or to a task outside long mode is not supported");
        }
        let gate = call_gate(core, to.selector)?;
        let cpl = core.vcpu.cpu.cpl();
        let allowed = if gate.code.is_conforming() { gate.code.dpl() <= cpl } else { gate.code.dpl() == cpl };
        if !allowed {
            return Err(selector_fault(vector::GP, gate.selector));
        }
        (gate.code, gate.selector, gate.offset)
    } else {
        if !descriptor.is_code() {
            return Err(selector_fault(vector::GP, to.selector));
        }
        check_direct_code(core, &descriptor, to.selector)?;
        (descriptor, to.selector, to.offset)
    };
    let target = code.segment(selector & !3 | u16::from(core.vcpu.cpu.cpl()));
    check_target(core, &target, offset)?;
    code.touch(core)?;
    segment::set_code(core, target);
    core.vcpu.cpu.rip = offset;
    Ok(Flow::Done)
}

struct CallGate {
    code: Descriptor,
    selector: u16,
    offset: u64,
}

/// Finds and checks a 64-bit call gate and the code behind it, save for what differs between JMP and CALL.
fn call_gate(core: &mut Core<'_>, selector: u16) -> Result<CallGate, GuestFault> {
    let (gate, high) = Descriptor::fetch_system(core, selector, vector::GP)?;
    let cpl = core.vcpu.cpu.cpl();
    // In long mode TSSs and task gates cannot be jumped to, and the upper half has a type of zero (Figure 6-8).
    if gate.kind() != system_type::CALL_GATE || high >> 40 & 0x1f != 0 || gate.dpl() < cpl.max(rpl(selector)) {
        return Err(selector_fault(vector::GP, selector));
    }
    if !gate.is_present() {
        return Err(selector_fault(vector::NP, selector));
    }
    let target = (gate.raw >> 16) as u16;
    if is_null(target) {
        return Err(GuestFault::GP0);
    }
    let code = Descriptor::fetch(core, target, vector::GP)?;
    if !code.is_code() || code.dpl() > cpl || !code.is_long() || code.is_big() {
        return Err(selector_fault(vector::GP, target));
    }
    if !code.is_present() {
        return Err(selector_fault(vector::NP, target));
    }
    let offset = gate.raw & 0xffff | gate.raw >> 32 & 0xffff_0000 | high << 32;
    Ok(CallGate { code, selector: target, offset })
}

/// CALL ptr16:16/32 and m16:16/32/64.
pub fn call(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    let to = pointer(core, instruction)?;
    let return_to = next_rip(core, instruction);
    if core.vcpu.cpu.cr0 & cr0::PE == 0 {
        return real::call(core, to.selector, to.offset, to.size, return_to).map(|()| Flow::Done);
    }
    if is_null(to.selector) {
        return Err(GuestFault::GP0);
    }
    let descriptor = Descriptor::fetch(core, to.selector, vector::GP)?;
    if descriptor.is_system() {
        if !core.vcpu.cpu.is_long_mode() {
            return unsupported("a far call through a gate or to a task outside long mode is not supported");
        }
        let gate = call_gate(core, to.selector)?;
        return call_through(core, &gate, return_to);
    }
    if !descriptor.is_code() {
        return Err(selector_fault(vector::GP, to.selector));
    }
    check_direct_code(core, &descriptor, to.selector)?;
    let cpl = core.vcpu.cpu.cpl();
    let target = descriptor.segment(to.selector & !3 | u16::from(cpl));
    check_target(core, &target, to.offset)?;
    let mut stack = Stack::current(core);
    stack.push(core, to.size, u64::from(core.vcpu.cpu.segments[seg::CS].selector))?;
    stack.push(core, to.size, return_to)?;
    descriptor.touch(core)?;
    segment::set_code(core, target);
    stack.commit(&mut core.vcpu.cpu);
    core.vcpu.cpu.rip = to.offset;
    Ok(Flow::Done)
}

fn call_through(core: &mut Core<'_>, gate: &CallGate, return_to: u64) -> Outcome {
    let cpl = core.vcpu.cpu.cpl();
    let level = if gate.code.is_conforming() { cpl } else { gate.code.dpl() };
    let target = gate.code.segment(gate.selector & !3 | u16::from(level));
    let cpu = &core.vcpu.cpu;
    let old = [
        u64::from(cpu.segments[seg::SS].selector),
        cpu.gpr[x86::state::gpr::RSP],
        u64::from(cpu.segments[seg::CS].selector),
        return_to,
    ];
    let mut stack = if level < cpl {
        let rsp = deliver::stack_for_level(core, level)?;
        if !Gva(rsp).is_canonical() {
            return Err(GuestFault::SS0);
        }
        Stack::fresh(rsp, level)
    } else {
        Stack::fresh(cpu.gpr[x86::state::gpr::RSP], level)
    };
    check_target(core, &target, gate.offset)?;
    let pushed = if level < cpl { &old[..] } else { &old[2..] };
    for &value in pushed {
        stack.push(core, 8, value)?;
    }
    gate.code.touch(core)?;
    segment::set_code(core, target);
    if level < cpl {
        core.vcpu.cpu.segments[seg::SS] = segment::null_segment(u16::from(level), level);
    }
    stack.commit(&mut core.vcpu.cpu);
    core.vcpu.cpu.rip = gate.offset;
    Ok(Flow::Done)
}

/// The code segment that RET or IRET goes back to.
fn code_to_return_to(core: &mut Core<'_>, selector: u16) -> Result<Descriptor, GuestFault> {
    if is_null(selector) {
        return Err(GuestFault::GP0);
    }
    let level = rpl(selector);
    if level < core.vcpu.cpu.cpl() {
        return Err(selector_fault(vector::GP, selector));
    }
    let code = Descriptor::fetch(core, selector, vector::GP)?;
    let admits = if code.is_conforming() { code.dpl() <= level } else { code.dpl() == level };
    let two_sizes = core.vcpu.cpu.is_long_mode() && code.is_long() && code.is_big();
    if !code.is_code() || !admits || two_sizes {
        return Err(selector_fault(vector::GP, selector));
    }
    if !code.is_present() {
        return Err(selector_fault(vector::NP, selector));
    }
    Ok(code)
}

/// The stack segment that goes with it; `None` stands for a null one.
fn stack_to_return_to(
    core: &mut Core<'_>,
    selector: u16,
    level: u8,
    to_long: bool,
) -> Result<Option<Descriptor>, GuestFault> {
    if is_null(selector) {
        let allowed = to_long && level != 3 && rpl(selector) == level;
        return if allowed { Ok(None) } else { Err(GuestFault::GP0) };
    }
    let stack = Descriptor::fetch(core, selector, vector::GP)?;
    if rpl(selector) != level || !stack.is_writable_data() || stack.dpl() != level {
        return Err(selector_fault(vector::GP, selector));
    }
    if !stack.is_present() {
        return Err(selector_fault(vector::SS, selector));
    }
    Ok(Some(stack))
}

/// Where RET or IRET goes, all read and checked.
struct Return {
    rip: u64,
    code: Descriptor,
    code_selector: u16,
    /// Stack pointer, selector and descriptor, when they come from the old stack.
    outer: Option<(u64, u16, Option<Descriptor>)>,
}

impl Return {
    fn commit(self, core: &mut Core<'_>, stack: &Stack, released: u64) -> Result<(), GuestFault> {
        let level = rpl(self.code_selector);
        let rises = level > core.vcpu.cpu.cpl();
        let target = self.code.segment(self.code_selector);
        check_target(core, &target, self.rip)?;
        self.code.touch(core)?;
        if let Some((_, _, Some(descriptor))) = &self.outer {
            descriptor.touch(core)?;
        }
        let to_long = core.vcpu.cpu.is_long_mode() && target.is_long();
        segment::set_code(core, target);
        match self.outer {
            Some((rsp, selector, descriptor)) => {
                let segment =
                    descriptor.map_or_else(|| segment::null_segment(selector, level), |found| found.segment(selector));
                segment::set(core, seg::SS, segment);
                let rsp = rsp.wrapping_add(released);
                core.vcpu.cpu.gpr[x86::state::gpr::RSP] = if to_long { rsp } else { rsp & 0xffff_ffff };
            }
            None => stack.commit(&mut core.vcpu.cpu),
        }
        if rises {
            segment::drop_private_segments(&mut core.vcpu.cpu, level);
        }
        core.vcpu.cpu.rip = self.rip;
        Ok(())
    }
}

/// RETF and RETF imm16; `size` is that of the popped words.
pub fn ret(core: &mut Core<'_>, instruction: &Instruction) -> Outcome {
    let size = match instruction.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfq | Code::Retfq_imm16 => 8,
        _ => 4,
    };
    let parameters = match instruction.op_count() {
        0 => 0,
        _ => u64::from(instruction.immediate16()),
    };
    if core.vcpu.cpu.cr0 & cr0::PE == 0 {
        return real::ret(core, size, parameters).map(|()| Flow::Done);
    }
    let mut stack = Stack::current(core);
    let rip = stack.pop(core, size)?;
    let code_selector = stack.pop(core, size)? as u16;
    let code = code_to_return_to(core, code_selector)?;
    stack.release(parameters);
    let mut outer = None;
    if rpl(code_selector) > core.vcpu.cpu.cpl() {
        let rsp = stack.pop(core, size)?;
        let selector = stack.pop(core, size)? as u16;
        let to_long = core.vcpu.cpu.is_long_mode() && code.is_long();
        outer = Some((rsp, selector, stack_to_return_to(core, selector, rpl(code_selector), to_long)?));
    }
    let released = if outer.is_some() { parameters } else { 0 };
    Return { rip, code, code_selector, outer }.commit(core, &stack, released)?;
    Ok(Flow::Done)
}

/// What IRET makes of RFLAGS, SDM Vol. 2A IRET and Vol. 3A 2.3.
fn returned_flags(cpu: &CpuState, image: u64, size: usize) -> u64 {
    let cpl = cpu.cpl();
    let mut taken = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        taken |= rflags::RF | rflags::AC | rflags::ID;
    }
    if u64::from(cpl) <= (cpu.rflags & rflags::IOPL) >> 12 {
        taken |= rflags::IF;
    }
    if cpl == 0 {
        taken |= rflags::IOPL;
        if size > 2 {
            taken |= rflags::VIF | rflags::VIP;
        }
    }
    cpu.rflags & !taken | image & taken | rflags::FIXED
}

/// IRET, IRETD and IRETQ; `size` is that of the popped words.
pub fn iret(core: &mut Core<'_>, size: usize) -> Outcome {
    let cpu = &mut core.vcpu.cpu;
    if cpu.cr0 & cr0::PE == 0 {
        cpu.nmi_blocked = false;
        return real::iret(core, size, |cpu, image| returned_flags(cpu, image, size)).map(|()| Flow::Done);
    }
    if cpu.rflags & rflags::VM != 0 {
        return unsupported("virtual-8086 mode is not supported");
    }
    // "IRET unblocks NMIs even if it faults": SDM Vol. 3A 7.7.1 "Handling Multiple NMIs".
    if std::mem::take(&mut cpu.nmi_blocked) {
        // One may have come meanwhile: the run loop has to look.
        core.vcpu.attention.raise();
    }
    let cpu = &mut core.vcpu.cpu;
    if cpu.rflags & rflags::NT != 0 {
        return if cpu.is_long_mode() {
            Err(GuestFault::GP0)
        } else {
            unsupported("a return to a task outside long mode is not supported")
        };
    }
    let (cpl, from_long) = (cpu.cpl(), cpu.is_code64());
    let mut stack = Stack::current(core);
    let rip = stack.pop(core, size)?;
    let code_selector = stack.pop(core, size)? as u16;
    let image = stack.pop(core, size)?;
    if image & rflags::VM != 0 && size > 2 && cpl == 0 && !core.vcpu.cpu.is_long_mode() {
        return unsupported("virtual-8086 mode is not supported");
    }
    let code = code_to_return_to(core, code_selector)?;
    let level = rpl(code_selector);
    let mut outer = None;
    if level > cpl || from_long {
        let rsp = stack.pop(core, size)?;
        let selector = stack.pop(core, size)? as u16;
        let to_long = core.vcpu.cpu.is_long_mode() && code.is_long();
        outer = Some((rsp, selector, stack_to_return_to(core, selector, level, to_long)?));
    }
    let flags = returned_flags(&core.vcpu.cpu, image, size);
    Return { rip, code, code_selector, outer }.commit(core, &stack, 0)?;
    core.vcpu.cpu.rflags = flags;
    Ok(Flow::Done)
}
