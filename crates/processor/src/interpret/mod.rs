//! The interpreter: the specification of what each instruction does. One instruction at a time, no cleverness beyond a
//! cache of decoded instructions.
//!
//! The way of an instruction: [`fetch`] finds it decoded or decodes it, [`dispatch`] has chosen its handler, [`op`] gives
//! the handler its operands, and [`step`] or [`Interpreter`] moves RIP and delivers what went wrong.

mod arithmetic;
mod bits;
mod branch;
mod decimal;
mod dispatch;
pub mod fetch;
pub mod flags;
mod multiply;
pub mod op;
pub mod operand;
mod other;
mod port;
mod shift;
pub mod stack;
mod string;
mod transfer;

#[cfg(test)]
mod tests;

use iced_x86::{Instruction, Mnemonic};
use x86::{Gpa, GuestFault, dr6, rflags};

pub(crate) use self::dispatch::condition_code;
pub use self::fetch::DecodeCache;
pub use self::op::Op;
pub(crate) use self::op::segment_index;
use crate::core::Core;
use crate::engine::{Engine, Exit};
use crate::profile::{self, Doing};
use crate::{debug, deliver};

/// Where an instruction leaves RIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Behind the instruction.
    Next,
    /// At this address, which is already checked and cut to the mode's width.
    Jump(u64),
    /// Where the handler has put it.
    Done,
    /// Where the handler has put it, and the engine must stop.
    Exit(Exit),
}

/// Executes one decoded instruction at RIP, which it leaves where it is; see [`Flow`] and [`op::Run`]. For callers that keep
/// the instruction, [`Op::new`] once and its `run` save the taking apart.
pub fn execute(core: &mut Core<'_>, instruction: &Instruction) -> Result<Flow, GuestFault> {
    let op = Op::new(instruction);
    (op.run)(core, &op)
}

/// Runs exactly one instruction (or one turn of a repeated string instruction) with everything that may come with it:
/// breakpoints, single-step, interrupt shadow, faults.
pub fn step(core: &mut Core<'_>, cache: &mut DecodeCache) -> Option<Exit> {
    cache.refresh(core);
    step_with(core, |core| cache.find(core))
}

/// As [`step`], for a caller that knows where the 64-bit code at RIP is.
pub fn step_at(core: &mut Core<'_>, cache: &mut DecodeCache, code: Gpa) -> Option<Exit> {
    step_with(core, |core| cache.find_at(core, code))
}

fn step_with<'a>(core: &mut Core<'_>, find: impl FnOnce(&mut Core<'_>) -> Result<&'a Op, GuestFault>) -> Option<Exit> {
    core.vcpu.sampler.now(Doing::Interpret.word());
    core.vcpu.interpreted += 1;
    let flags = core.vcpu.cpu.rflags;
    // An instruction breakpoint behind MOV SS or POP SS is lost: Intel SDM (2024-12) Vol. 3A 7.8.3.
    let resume = std::mem::take(&mut core.vcpu.behind_stack_load) || flags & rflags::RF != 0;
    core.vcpu.checks = debug::checks(&core.vcpu.cpu);
    if core.vcpu.checks & debug::check::BREAKPOINTS != 0 && !resume {
        let hits = debug::instruction_hits(&core.vcpu.cpu, core.vcpu.cpu.linear_rip());
        if hits != 0 {
            core.vcpu.checks = 0;
            return deliver::fault(core, GuestFault::debug(hits));
        }
    }
    let exit = match find(core) {
        Ok(op) => {
            core.vcpu.sampler.now(profile::interpreting(op.code()));
            complete(core, op, flags)
        }
        Err(fault) => {
            core.vcpu.checks = 0;
            deliver::fault(core, fault)
        }
    };
    core.vcpu.checks = 0;
    exit
}

/// Runs an instruction that started with these flags, and the traps behind it.
fn complete(core: &mut Core<'_>, op: &Op, before: u64) -> Option<Exit> {
    let shadow = std::mem::take(&mut core.vcpu.cpu.interrupt_shadow);
    // What is left of RF is what the instruction itself sets: IRET, or a string instruction between two turns.
    core.vcpu.cpu.rflags &= !rflags::RF;
    let outcome = (op.run)(core, op);
    // The accesses of a delivery are not the instruction's.
    core.vcpu.checks = 0;
    match outcome {
        Ok(Flow::Next) => core.vcpu.cpu.rip = op.next,
        Ok(Flow::Jump(target)) => core.vcpu.cpu.rip = target,
        Ok(Flow::Done) => {}
        // A trap behind HLT ends the halt at once.
        Ok(Flow::Exit(Exit::Halt)) if single_steps(core, op, before) => {}
        Ok(Flow::Exit(exit)) => {
            core.vcpu.hits = 0;
            return Some(exit);
        }
        Err(fault) => {
            core.vcpu.hits = 0;
            core.vcpu.cpu.rflags |= before & rflags::RF;
            return deliver::fault(core, fault);
        }
    }
    // MOV SS and POP SS hold debug traps back for one instruction, STI does not: Intel SDM (2024-12) Vol. 3A 7.8.3. What
    // their data breakpoints found is reported behind the next instruction, with what that one finds.
    if core.vcpu.cpu.interrupt_shadow && !shadow && loads_stack_segment(op) {
        core.vcpu.behind_stack_load = true;
        return None;
    }
    let mut cause = u64::from(std::mem::take(&mut core.vcpu.hits));
    if single_steps(core, op, before) {
        cause |= dr6::BS;
    }
    if cause == 0 {
        return None;
    }
    deliver::fault(core, GuestFault::debug(cause))
}

/// Whether the instruction ends with a single-step trap. TF counts as it was before the instruction; SYSCALL looks at what it
/// left of it, and a software interrupt has cleared it for good. Intel SDM (2024-12) Vol. 3B 19.3.1.4.
fn single_steps(core: &Core<'_>, op: &Op, before: u64) -> bool {
    let flags = match op.mnemonic() {
        Mnemonic::Syscall => core.vcpu.cpu.rflags,
        Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Int3 => 0,
        Mnemonic::Into if before & rflags::OF != 0 => 0,
        _ => before,
    };
    flags & rflags::TF != 0
}

fn loads_stack_segment(op: &Op) -> bool {
    matches!(op.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
}

/// The engine that interprets everything.
#[derive(Debug, Default)]
pub struct Interpreter {
    cache: DecodeCache,
    instructions: u64,
}

impl Interpreter {
    #[must_use]
    pub fn new() -> Interpreter {
        Interpreter::default()
    }

    /// Takes note of what changed since the last instruction.
    fn drop_stale(&mut self, core: &mut Core<'_>) {
        core.vcpu.stale = crate::vcpu::Stale::default();
        if core.memory.code.is_pending(core.vcpu.number) {
            for write in core.memory.code.take(core.vcpu.number) {
                self.cache.drop_page(write.ppn);
            }
        }
    }

    /// Runs instructions as long as nothing but plain execution can happen between them. What an instruction makes a device
    /// want of this processor is seen before the next one, as on hardware that waits for the device.
    fn burst(&mut self, core: &mut Core<'_>) -> Option<Exit> {
        let mut count = 0;
        let exit = 'look: loop {
            let run = match self.cache.find_run(core) {
                Ok(run) => run,
                Err(fault) => break deliver::fault(core, fault),
            };
            let mut rip = core.vcpu.cpu.rip;
            for op in run {
                if op.start != rip {
                    continue 'look;
                }
                if core.vcpu.attention.is_raised() || core.memory.code.is_pending(core.vcpu.number) {
                    break 'look None;
                }
                count += 1;
                match (op.run)(core, op) {
                    Ok(Flow::Next) => {
                        rip = op.next;
                        core.vcpu.cpu.rip = rip;
                        if op.sensitive {
                            break 'look None;
                        }
                    }
                    Ok(Flow::Jump(target)) => {
                        core.vcpu.cpu.rip = target;
                        continue 'look;
                    }
                    Ok(Flow::Done) => break 'look None,
                    Ok(Flow::Exit(exit)) => break 'look Some(exit),
                    Err(fault) => break 'look deliver::fault(core, fault),
                }
            }
        };
        self.instructions += count;
        core.vcpu.interpreted += count;
        exit
    }
}

/// Whether something may happen between this instruction and the next that only [`step`] sees to.
fn needs_care(core: &Core<'_>) -> bool {
    let cpu = &core.vcpu.cpu;
    cpu.rflags & (rflags::TF | rflags::RF) != 0 || cpu.interrupt_shadow || debug::checks(cpu) != 0
}

impl Engine for Interpreter {
    fn name(&self) -> &'static str {
        "interpret"
    }

    fn run(&mut self, core: &mut Core<'_>) -> Exit {
        core.vcpu.sampler.now(Doing::Interpret.word());
        loop {
            if core.vcpu.attention.is_raised() {
                return Exit::Attention;
            }
            if core.vcpu.wants_interrupt_window && core.vcpu.cpu.can_take_interrupt() {
                return Exit::InterruptWindow;
            }
            self.drop_stale(core);
            let exit = if needs_care(core) {
                self.instructions += 1;
                step(core, &mut self.cache)
            } else {
                self.cache.refresh(core);
                self.burst(core)
            };
            if let Some(exit) = exit {
                return exit;
            }
        }
    }

    fn step(&mut self, core: &mut Core<'_>) -> Option<Exit> {
        self.drop_stale(core);
        self.instructions += 1;
        step(core, &mut self.cache)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("interpret.instructions", self.instructions),
            ("interpret.decoded", self.cache.decoded),
            ("interpret.dropped_pages", self.cache.dropped),
        ]
    }
}
