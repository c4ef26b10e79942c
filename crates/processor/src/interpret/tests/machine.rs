//! A machine of one flat address space for tests: code at [`CODE`], an IDT whose handler for vector V is at [`handler`].

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions};
use memory::GuestMemory;
use x86::state::gpr::RSP;
use x86::{CpuState, DescriptorTable, Gpa, GuestFault, Gva, Segment, cr0, efer, rflags, seg};

use crate::engine::{Engine, Exit, Outside};
use crate::interpret::{DecodeCache, Flow, Interpreter, execute, step};
use crate::vcpu::Attention;
use crate::{Core, Vcpu};

pub const CODE: u64 = 0x1_0000;
pub const DATA: u64 = 0x2_0000;
pub const STACK: u64 = 0x3_0000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const HANDLERS: u64 = 0x7000;
const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 16;

pub const fn handler(vector: u8) -> u64 {
    HANDLERS + 16 * vector as u64
}

/// Ports remember what was written, and read as a counter.
#[derive(Default)]
pub struct Ports {
    pub written: Vec<(u16, u8, u32)>,
    pub reads: u32,
    /// Whom writes interrupt, if anybody.
    pub interrupts: Option<Arc<Attention>>,
}

impl Ports {
    fn interrupt(&self) {
        if let Some(attention) = &self.interrupts {
            attention.raise();
        }
    }
}

impl Outside for Ports {
    fn port_read(&mut self, _: u16, _: u8) -> u32 {
        self.reads += 1;
        0x4030_2010 + self.reads
    }
    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.written.push((port, size, value));
        self.interrupt();
    }
    fn mmio_read(&mut self, _: Gpa, _: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, _: Gpa, _: u8, _: u64) {
        self.interrupt();
    }
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

pub struct Machine {
    pub vcpu: Box<Vcpu>,
    pub memory: GuestMemory,
    pub ports: Ports,
    pub cache: DecodeCache,
}

impl Machine {
    /// 64-bit code at CPL 0, without paging (which no processor allows, and no test here notices).
    pub fn new(code: &[u8]) -> Machine {
        let memory = GuestMemory::new(12 << 20).unwrap();
        let mut cpu = CpuState::reset();
        cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
        cpu.efer = efer::LME | efer::LMA;
        cpu.segments = [Segment::flat_data(DATA_SELECTOR, 0); 6];
        cpu.segments[seg::CS] = Segment::flat_code64(CODE_SELECTOR, 0);
        cpu.rip = CODE;
        cpu.gpr[RSP] = STACK;
        cpu.gdtr = DescriptorTable { base: GDT, limit: 0xff };
        cpu.idtr = DescriptorTable { base: IDT, limit: 0xfff };
        memory.write(Gpa(GDT + 8), &0x00af_9b00_0000_ffff_u64.to_le_bytes()).unwrap();
        memory.write(Gpa(GDT + 16), &0x00cf_9300_0000_ffff_u64.to_le_bytes()).unwrap();
        for vector in 0..=255 {
            let gate = handler(vector) & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32;
            memory.write(Gpa(IDT + 16 * u64::from(vector)), &gate.to_le_bytes()).unwrap();
        }
        memory.write(Gpa(CODE), code).unwrap();
        Machine { vcpu: Box::new(Vcpu::new(cpu)), memory, ports: Ports::default(), cache: DecodeCache::new() }
    }

    /// Compatibility mode: 32-bit code at CPL 0.
    pub fn new32(code: &[u8]) -> Machine {
        let mut machine = Machine::new(code);
        machine.vcpu.cpu.segments[seg::CS] = Segment::flat_code32(CODE_SELECTOR, 0);
        machine
    }

    /// Pages 0 to 511 mapped to themselves for everybody, writable; single entries can be changed with [`Machine::entry`].
    pub fn with_paging(code: &[u8]) -> Machine {
        const TABLES: u64 = 0x10_0000;
        let mut machine = Machine::new(code);
        for level in 0..3 {
            let entry = (TABLES + (level + 1) * 0x1000) | 7;
            machine.memory.write(Gpa(TABLES + level * 0x1000), &entry.to_le_bytes()).unwrap();
        }
        let cpu = &mut machine.vcpu.cpu;
        cpu.cr3 = TABLES;
        cpu.cr0 |= cr0::PG | cr0::WP;
        cpu.cr4 |= x86::cr4::PAE;
        for page in 0..512 {
            machine.entry(page, page << 12 | 7);
        }
        machine
    }

    /// Sets the page-table entry of a page.
    pub fn entry(&mut self, page: u64, value: u64) {
        self.memory.write(Gpa(0x10_3000 + 8 * page), &value.to_le_bytes()).unwrap();
        self.vcpu.flush_all();
    }

    pub fn core(&mut self) -> Core<'_> {
        Core { vcpu: &mut self.vcpu, memory: &self.memory, outside: &mut self.ports }
    }

    pub fn cpu(&mut self) -> &mut CpuState {
        &mut self.vcpu.cpu
    }

    pub fn set(&mut self, register: usize, value: u64) -> &mut Machine {
        self.vcpu.cpu.gpr[register] = value;
        self
    }

    pub fn gpr(&self, register: usize) -> u64 {
        self.vcpu.cpu.gpr[register]
    }

    pub fn flags(&self) -> u64 {
        self.vcpu.cpu.rflags & rflags::ARITHMETIC
    }

    pub fn set_flags(&mut self, flags: u64) -> &mut Machine {
        self.vcpu.cpu.rflags = flags | rflags::FIXED;
        self
    }

    pub fn poke(&mut self, address: u64, bytes: &[u8]) {
        self.memory.write(Gpa(address), bytes).unwrap();
    }

    pub fn peek<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read(Gpa(address), &mut bytes).unwrap();
        bytes
    }

    pub fn word(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.peek(address))
    }

    /// One step, which must not leave the engine.
    pub fn step(&mut self) -> &mut Machine {
        let mut core = Core { vcpu: &mut self.vcpu, memory: &self.memory, outside: &mut self.ports };
        assert_eq!(step(&mut core, &mut self.cache), None);
        self
    }

    pub fn steps(&mut self, count: usize) -> &mut Machine {
        for _ in 0..count {
            self.step();
        }
        self
    }

    /// Runs the engine until HLT.
    pub fn run_to_halt(&mut self) -> &mut Machine {
        let exit = Interpreter::new().run(&mut self.core());
        assert_eq!(exit, Exit::Halt);
        self
    }

    /// Executes the instruction at RIP without its consequences.
    pub fn execute(&mut self) -> Result<Flow, GuestFault> {
        let cpu = &self.vcpu.cpu;
        let width = if cpu.is_code64() { 64 } else { 32 };
        let mut bytes = [0; 15];
        self.memory.read(Gpa(cpu.linear_rip().0), &mut bytes).unwrap();
        let instruction = Decoder::with_ip(width, &bytes, cpu.rip, DecoderOptions::NONE).decode();
        execute(&mut self.core(), &instruction)
    }

    pub fn rip(&self) -> u64 {
        self.vcpu.cpu.rip
    }
}

#[test]
fn faults_reach_their_handlers() {
    let mut machine = Machine::new(&[0x0f, 0x0b]);
    machine.step();
    assert_eq!(machine.rip(), handler(6));
    assert_eq!(machine.word(machine.gpr(RSP)), CODE);
    assert_eq!(Gva(CODE).offset(), 0);
}
