//! The seams of the processor: what runs guest code ([`Engine`]), what guest code may ask of the rest of the machine
//! ([`Outside`]), and why an engine stopped ([`Exit`]).

use memory::GuestMemory;
use memory::audit::Audit;
use x86::Gpa;

use crate::core::Core;
use crate::profile::Part;
use crate::vcpu::Vcpu;

/// Why [`Engine::run`] came back. RIP is that of the next instruction to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Somebody wants the VCPU: a timer, a device, the operator. [`crate::vcpu::Attention`] was raised.
    Attention,
    /// An interrupt that had to wait can be taken now.
    InterruptWindow,
    /// HLT with nothing to do until the next event.
    Halt,
    /// A fault while delivering a double fault: the processor shuts down.
    TripleFault,
    /// The guest did something that no engine of ours supports yet: one sentence for the operator.
    Unsupported(String),
}

/// The rest of the machine, as an instruction sees it. Sizes are 1, 2, 4 or 8 bytes; values are in the low bytes.
pub trait Outside {
    fn port_read(&mut self, port: u16, size: u8) -> u32;
    fn port_write(&mut self, port: u16, size: u8, value: u32);
    fn mmio_read(&mut self, address: Gpa, size: u8) -> u64;
    fn mmio_write(&mut self, address: Gpa, size: u8, value: u64);
    /// MSRs of the local APIC (0x1b, 0x6e0, 0x800-0x8ff); `None` makes the instruction fault with #GP(0).
    fn apic_read(&mut self, msr: u32) -> Option<u64>;
    /// Says whether the write was legal.
    fn apic_write(&mut self, msr: u32, value: u64) -> bool;
    /// The local APIC's task priority register; see [`crate::vcpu::TaskPriority`].
    fn task_priority(&self) -> u8;
    fn set_task_priority(&mut self, value: u8);
    /// The local APIC's ID and whether it is in x2APIC mode, for CPUID.
    fn apic_id(&self) -> u32;
    /// IA32_APIC_BASE bit 11: CPUID.1:EDX.APIC mirrors it.
    fn apic_enabled(&self) -> bool;
}

/// What runs guest code.
pub trait Engine: Send {
    fn name(&self) -> &'static str;

    /// Runs guest instructions from `core.vcpu.cpu.rip` until there is a reason to come back. Faults of the guest are
    /// delivered to the guest inside. On return the architectural state in `core.vcpu.cpu` is exact.
    fn run(&mut self, core: &mut Core<'_>) -> Exit;

    /// What makes a run in progress notice [`crate::vcpu::Attention`] soon, where a flag alone does not. Called by any
    /// thread, after the flag was raised.
    fn kicker(&self) -> Option<std::sync::Arc<dyn Fn() + Send + Sync>> {
        None
    }

    /// Runs one instruction, for traces and debuggers; `None` when the next one may follow at once.
    fn step(&mut self, _core: &mut Core<'_>) -> Option<Exit> {
        Some(Exit::Unsupported(format!("the engine '{}' cannot run one instruction at a time", self.name())))
    }

    /// Whose host code is at an address, when it is of the engine's making.
    fn part(&self, _host: u64) -> Option<Part> {
        None
    }

    /// Compares what the engine has mapped of the guest's pages with the pmap, while everything stands still.
    fn audit(&self, _vcpu: &Vcpu, _memory: &GuestMemory, _audit: &mut Audit) {}

    /// The machine has ended: nothing runs any more.
    fn finish(&mut self) {}

    /// Counters by dotted name, for `--stats`.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}
