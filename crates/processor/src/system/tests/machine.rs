//! A tiny machine in long mode for the tests: tables in guest memory, 2 MiB mapped to itself.

use iced_x86::{Decoder, DecoderOptions};
use memory::GuestMemory;
use x86::paging::entry;
use x86::state::gpr;
use x86::{CpuState, DescriptorTable, Gpa, GuestFault, Segment, cr0, cr4, efer, msr, seg};

use crate::core::Core;
use crate::engine::{Exit, Outside};
use crate::interpret::Flow;
use crate::vcpu::Vcpu;

pub const GDT: u64 = 0x5000;
pub const IDT: u64 = 0x6000;
pub const TSS: u64 = 0x7000;
pub const CODE: u64 = 0x8000;
pub const HANDLERS: u64 = 0x9000;
pub const STACK: u64 = 0x11000;
pub const RSP0: u64 = 0x12ff8;
pub const IST1: u64 = 0x14000;
pub const DATA: u64 = 0x18000;
/// Pages from here to `USER_END` are the user's.
pub const USER: u64 = 0x80000;
pub const USER_STACK: u64 = 0x90000;
const USER_END: u64 = 0xa0000;
/// Not present.
pub const HOLE: u64 = 0x30000;

pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_SS: u16 = 0x10;
pub const USER_CS32: u16 = 0x1b;
pub const USER_SS: u16 = 0x23;
pub const USER_CS: u16 = 0x2b;
pub const TSS_SELECTOR: u16 = 0x30;
pub const ABSENT: u16 = 0x40;
pub const CALL_GATE: u16 = 0x50;
pub const CONFORMING: u16 = 0x60;
pub const READ_ONLY: u16 = 0x68;
pub const LDT: u16 = 0x70;
pub const FRESH: u16 = 0x80;
/// The first selector beyond the GDT.
pub const BEYOND: u16 = 0x88;

#[derive(Default)]
pub struct Board {
    pub deadline: u64,
    pub priority: u8,
}

impl Outside for Board {
    fn port_read(&mut self, _: u16, _: u8) -> u32 {
        0
    }
    fn port_write(&mut self, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, address: Gpa, _: u8) -> u64 {
        address.0
    }
    fn mmio_write(&mut self, _: Gpa, _: u8, _: u64) {}
    fn apic_read(&mut self, number: u32) -> Option<u64> {
        match number {
            msr::TSC_DEADLINE => Some(self.deadline),
            msr::APIC_BASE => Some(0xfee0_0900),
            _ => None,
        }
    }
    fn apic_write(&mut self, number: u32, value: u64) -> bool {
        if number == msr::TSC_DEADLINE {
            self.deadline = value;
        }
        number == msr::TSC_DEADLINE
    }
    fn task_priority(&self) -> u8 {
        self.priority
    }
    fn set_task_priority(&mut self, value: u8) {
        self.priority = value;
    }
    fn apic_id(&self) -> u32 {
        0
    }
    fn apic_enabled(&self) -> bool {
        true
    }
}

pub struct Machine {
    pub memory: GuestMemory,
    pub vcpu: Box<Vcpu>,
    pub board: Board,
}

/// What executing one instruction came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Ran {
    Next,
    Done,
    Exit(Exit),
    Fault(GuestFault),
}

impl Machine {
    /// In the kernel, with interrupts off.
    pub fn new() -> Machine {
        let memory = GuestMemory::new(2 << 20).unwrap();
        let machine = Machine { memory, vcpu: Box::new(Vcpu::new(kernel())), board: Board::default() };
        let open = entry::PRESENT | entry::WRITABLE | entry::USER;
        for (table, next) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)] {
            machine.put(table, next | open);
        }
        for page in 0..512 {
            let address = page << 12;
            let user = if (USER..USER_END).contains(&address) { entry::USER } else { 0 };
            machine.put(0x4000 + page * 8, address | entry::PRESENT | entry::WRITABLE | user);
        }
        machine.put(0x4000 + (HOLE >> 12) * 8, 0);
        let descriptors = [
            (KERNEL_CS, 0x00af_9b00_0000_ffff),
            (KERNEL_SS, 0x00cf_9300_0000_ffff),
            (USER_CS32, 0x00cf_fb00_0000_ffff),
            (USER_SS, 0x00cf_f300_0000_ffff),
            (USER_CS, 0x00af_fb00_0000_ffff),
            (TSS_SELECTOR, 0x0000_8900_7000_0000 | 0x77),
            (ABSENT, 0x00cf_7300_0000_ffff),
            (CALL_GATE, 0x0000_ec00_0008_9000),
            (CONFORMING, 0x00af_9f00_0000_ffff),
            (READ_ONLY, 0x00cf_f100_0000_ffff),
            (LDT, 0x0000_8201_8000_0017),
            (FRESH, 0x00cf_f200_0000_ffff),
        ];
        for (selector, raw) in descriptors {
            machine.put(GDT + u64::from(selector & !7), raw);
        }
        machine.put(TSS + 4, RSP0);
        machine.put(TSS + 36, IST1);
        for vector in 0..256 {
            machine.gate(vector, 0x8e00);
        }
        machine
    }

    /// The same machine, running user code.
    pub fn in_user_mode() -> Machine {
        let mut machine = Machine::new();
        let cpu = &mut machine.vcpu.cpu;
        cpu.segments[seg::CS] = Segment::flat_code64(USER_CS, 3);
        cpu.segments[seg::SS] = Segment::flat_data(USER_SS, 3);
        cpu.rip = USER;
        cpu.gpr[gpr::RSP] = USER_STACK;
        machine
    }

    /// ... 32-bit user code.
    pub fn in_compatibility_mode() -> Machine {
        let mut machine = Machine::in_user_mode();
        machine.vcpu.cpu.segments[seg::CS] = Segment::flat_code32(USER_CS32, 3);
        machine
    }

    pub fn put(&self, address: u64, value: u64) {
        self.memory.write(Gpa(address), &value.to_le_bytes()).unwrap();
    }

    pub fn get(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(Gpa(address), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Words on the stack, from its top.
    pub fn stack<const N: usize>(&self) -> [u64; N] {
        std::array::from_fn(|index| self.get(self.vcpu.cpu.gpr[gpr::RSP] + index as u64 * 8))
    }

    /// Makes the gate of a vector; `kind` holds its access byte and IST.
    pub fn gate(&self, vector: u64, kind: u64) {
        let entry = HANDLERS + vector;
        let low = entry & 0xffff | u64::from(KERNEL_CS) << 16 | kind << 32 | (entry >> 16 & 0xffff) << 48;
        self.put(IDT + vector * 16, low);
        self.put(IDT + vector * 16 + 8, 0);
    }

    pub fn core(&mut self) -> Core<'_> {
        Core { vcpu: &mut self.vcpu, memory: &self.memory, outside: &mut self.board }
    }

    /// Executes one instruction and moves RIP on, as an engine would; faults are not delivered.
    pub fn run(&mut self, code: &[u8]) -> Ran {
        let cpu = &self.vcpu.cpu;
        let bits = if cpu.is_code64() { 64 } else { 32 };
        let instruction = Decoder::with_ip(bits, code, cpu.rip, DecoderOptions::NONE).decode();
        assert_eq!(instruction.len(), code.len(), "{code:x?} is not one instruction");
        let outcome = super::super::execute(&mut self.core(), &instruction);
        match outcome.expect("the instruction is ours") {
            Ok(Flow::Next) => {
                self.vcpu.cpu.rip += code.len() as u64;
                Ran::Next
            }
            Ok(Flow::Done) => Ran::Done,
            Ok(Flow::Exit(exit)) => Ran::Exit(exit),
            Ok(_) => panic!("no near branch is ours"),
            Err(fault) => Ran::Fault(fault),
        }
    }

    /// As `run`, and says that nothing changed when it faulted.
    pub fn refuses(&mut self, code: &[u8], fault: GuestFault) {
        let image = |cpu: &CpuState| {
            let segments = cpu.segments;
            (cpu.gpr, cpu.rip, cpu.rflags, segments, (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer), cpu.ldtr, cpu.tr)
        };
        let before = image(&self.vcpu.cpu);
        assert_eq!(self.run(code), Ran::Fault(fault), "{code:x?}");
        assert_eq!(image(&self.vcpu.cpu), before, "{code:x?} changed something");
    }
}

fn kernel() -> CpuState {
    let mut cpu = CpuState::reset();
    cpu.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::ET | cr0::NE;
    cpu.cr3 = 0x1000;
    cpu.cr4 = cr4::PAE | cr4::PGE | cr4::FSGSBASE | cr4::SMAP | cr4::SMEP | cr4::OSFXSR;
    cpu.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    cpu.segments = [Segment::default(); 6];
    cpu.segments[seg::CS] = Segment::flat_code64(KERNEL_CS, 0);
    cpu.segments[seg::SS] = Segment::flat_data(KERNEL_SS, 0);
    cpu.gdtr = DescriptorTable { base: GDT, limit: BEYOND - 1 };
    cpu.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    cpu.tr = Segment { base: TSS, limit: 0x77, selector: TSS_SELECTOR, attributes: 0x8b };
    cpu.rip = CODE;
    cpu.gpr[gpr::RSP] = STACK;
    cpu
}
