//! The smallest guest that can run a sequence: flat long mode, the arena's pages at the same virtual addresses as on the
//! host, and an IDT whose handlers are one HLT each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use host::map::Placed;
use memory::GuestMemory;
use x86::paging::entry;
use x86::registers::xcr0;
use x86::state::gpr;
use x86::{CpuState, DescriptorTable, Gpa, GuestFault, Gva, Segment, cr0, cr4, efer, rflags, seg, vector};

use super::campaign::Setup;
use crate::native::sequence::{
    Arena, CODE_SIZE, CONSTANT_OFFSET, CONSTANT_SIZE, DATA_OFFSET, DATA_SIZE, Ending, State,
};
use crate::{Core, Engine, Exit, Outside, Vcpu};

/// The privilege at which sequences run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    Kernel,
    User,
}

const MEMORY: u64 = 4 << 20;
const HIGH: u64 = 0xffff_8000_0000_0000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
const STACK_TOP: u64 = 0x6000;
const ARENA: u64 = 0x10000;
const TABLES: u64 = 0x10_0000;
/// A sequence takes microseconds; one that takes this long hangs, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(20);

/// No devices: sequences do no I/O.
struct Nothing;

impl Outside for Nothing {
    fn port_read(&mut self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }
    fn port_write(&mut self, _port: u16, _size: u8, _value: u32) {}
    fn mmio_read(&mut self, _address: Gpa, _size: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, _address: Gpa, _size: u8, _value: u64) {}
    fn apic_read(&mut self, _msr: u32) -> Option<u64> {
        None
    }
    fn apic_write(&mut self, _msr: u32, _value: u64) -> bool {
        false
    }
    fn task_priority(&self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _value: u8) {}
    fn apic_id(&self) -> u32 {
        0
    }
    fn apic_enabled(&self) -> bool {
        false
    }
}

/// Raises the VCPU's attention when a run takes too long.
struct Watchdog {
    /// Milliseconds after `start` at which the run is overdue; zero when none runs.
    deadline: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    overdue: Arc<AtomicBool>,
    start: Instant,
}

impl Watchdog {
    fn new(attention: Arc<crate::vcpu::Attention>) -> Watchdog {
        let dog =
            Watchdog { deadline: Arc::default(), stop: Arc::default(), overdue: Arc::default(), start: Instant::now() };
        let (deadline, stop, overdue, start) = (dog.deadline.clone(), dog.stop.clone(), dog.overdue.clone(), dog.start);
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let due = deadline.load(Ordering::Relaxed);
                if due != 0 && start.elapsed().as_millis() as u64 > due {
                    overdue.store(true, Ordering::SeqCst);
                    attention.raise();
                }
                std::thread::sleep(Duration::from_millis(250));
            }
        });
        dog
    }

    fn begin(&self) {
        self.overdue.store(false, Ordering::SeqCst);
        self.deadline.store((self.start.elapsed() + PATIENCE).as_millis() as u64, Ordering::Relaxed);
    }

    fn end(&self) {
        self.deadline.store(0, Ordering::Relaxed);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

pub struct Guest {
    memory: GuestMemory,
    vcpu: Placed<Vcpu>,
    start: CpuState,
    code: Gva,
    ring: Ring,
    next_table: u64,
    dog: Watchdog,
}

impl Guest {
    pub fn new(arena: &Arena, constants: &[u8], ring: Ring) -> Result<Guest, Setup> {
        let memory = GuestMemory::new(MEMORY)?;
        let vcpu = Vcpu::place(CpuState::reset())?;
        let dog = Watchdog::new(vcpu.attention.clone());
        let next_table = TABLES + 0x1000;
        let mut guest = Guest { memory, vcpu, start: CpuState::reset(), code: arena.code(), ring, next_table, dog };
        guest.lay_out(constants)?;
        guest.start = guest.start_state();
        Ok(guest)
    }

    fn read_u64(&self, address: u64) -> Result<u64, memory::Error> {
        let mut bytes = [0; 8];
        self.memory.read(Gpa(address), &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write_u64(&self, address: u64, value: u64) -> Result<(), memory::Error> {
        self.memory.write(Gpa(address), &value.to_le_bytes())
    }

    /// Maps pages; `rights` are the leaf's bits.
    fn map(&mut self, from: u64, to: u64, size: u64, rights: u64) -> Result<(), memory::Error> {
        for offset in (0..size).step_by(0x1000) {
            let address = from + offset;
            let mut table = TABLES;
            for level in (1..4).rev() {
                let place = table + (address >> (12 + 9 * level) & 0x1ff) * 8;
                let mut value = self.read_u64(place)?;
                if value == 0 {
                    value = self.next_table | entry::PRESENT | entry::WRITABLE | entry::USER;
                    self.next_table += 0x1000;
                    self.write_u64(place, value)?;
                }
                table = value & !0xfff;
            }
            self.write_u64(table + (address >> 12 & 0x1ff) * 8, (to + offset) | entry::PRESENT | rights)?;
        }
        Ok(())
    }

    fn lay_out(&mut self, constants: &[u8]) -> Result<(), memory::Error> {
        self.map(HIGH, 0, 0x8000, entry::WRITABLE)?;
        let base = self.code.0;
        let user = entry::USER;
        self.map(base, ARENA, CODE_SIZE as u64, user)?;
        let data = DATA_OFFSET as u64;
        self.map(base + data, ARENA + data, DATA_SIZE as u64, user | entry::WRITABLE | entry::NX)?;
        let fixed = CONSTANT_OFFSET as u64;
        self.map(base + fixed, ARENA + fixed, CONSTANT_SIZE as u64, user | entry::NX)?;
        self.memory.write(Gpa(ARENA + fixed), &constants[..constants.len().min(CONSTANT_SIZE)])?;
        // Null, kernel code and data, two unused, user data 0x2b and code 0x33 as under Linux, unused, TSS at 0x40.
        let tss = HIGH + TSS;
        let low = 0x67 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
        let descriptors = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0,
            0,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0,
            low,
            tss >> 32,
        ];
        for (index, value) in descriptors.into_iter().enumerate() {
            self.write_u64(GDT + 8 * index as u64, value)?;
        }
        self.write_u64(TSS + 4, HIGH + STACK_TOP)?;
        self.write_u64(TSS + 36, HIGH + STACK_TOP)?;
        for vector in 0..256 {
            let handler = HIGH + HANDLERS + 16 * vector;
            let dpl = if vector == u64::from(vector::BP) { 3 } else { 0 };
            let low = handler & 0xffff | 8 << 16 | 1 << 32 | (0x8e | dpl << 5) << 40 | (handler >> 16 & 0xffff) << 48;
            self.write_u64(IDT + 16 * vector, low)?;
            self.write_u64(IDT + 16 * vector + 8, handler >> 32)?;
            self.memory.write(Gpa(HANDLERS + 16 * vector), &[0xf4])?;
        }
        Ok(())
    }

    fn start_state(&self) -> CpuState {
        let mut cpu = CpuState::reset();
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        cpu.cr3 = TABLES;
        cpu.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        cpu.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        cpu.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        let unusable = Segment { base: 0, limit: 0, selector: 0, attributes: 0 };
        cpu.segments = [unusable; 6];
        match self.ring {
            Ring::User => {
                cpu.segments[seg::CS] = Segment::flat_code64(0x33, 3);
                cpu.segments[seg::SS] = Segment::flat_data(0x2b, 3);
            }
            Ring::Kernel => {
                cpu.segments[seg::CS] = Segment::flat_code64(0x08, 0);
                cpu.segments[seg::SS] = Segment::flat_data(0x10, 0);
            }
        }
        cpu.gdtr = DescriptorTable { base: HIGH + GDT, limit: 0x4f };
        cpu.idtr = DescriptorTable { base: HIGH + IDT, limit: 0xfff };
        cpu.tr = Segment { base: HIGH + TSS, limit: 0x67, selector: 0x40, attributes: 0x8b };
        cpu.rip = self.code.0;
        cpu
    }

    /// Runs `code` under `engine`; the error is a sentence on what went wrong besides traps.
    pub fn run(&mut self, engine: &mut dyn Engine, code: &[u8], state: &mut State) -> Result<Ending, String> {
        self.attempt(engine, code, state).map_err(|e| e.to_string())?
    }

    fn attempt(
        &mut self,
        engine: &mut dyn Engine,
        code: &[u8],
        state: &mut State,
    ) -> Result<Result<Ending, String>, memory::Error> {
        let data = Gpa(ARENA + DATA_OFFSET as u64);
        let mut text = code.to_vec();
        text.push(0xf4);
        self.memory.write(Gpa(ARENA), &text)?;
        self.memory.write(data, &state.data)?;
        self.vcpu.cpu = self.start.clone();
        self.vcpu.cpu.gpr = state.gpr;
        self.vcpu.cpu.rflags = state.rflags;
        self.vcpu.cpu.fpu = state.fpu.clone();
        self.dog.begin();
        let exit = loop {
            let mut core = Core { vcpu: &mut self.vcpu, memory: &self.memory, outside: &mut Nothing };
            match engine.run(&mut core) {
                Exit::Attention if self.dog.overdue.load(Ordering::SeqCst) => break Err("it hangs".to_owned()),
                Exit::Attention | Exit::InterruptWindow => {
                    self.vcpu.attention.take();
                }
                Exit::Halt => break Ok(()),
                other => break Err(format!("exit {other:?}")),
            }
        };
        self.dog.end();
        self.vcpu.attention.take();
        if let Err(why) = exit {
            return Ok(Err(format!("{why} at rip {:#x}", self.vcpu.cpu.rip.wrapping_sub(self.code.0))));
        }
        let cpu = &self.vcpu.cpu;
        state.gpr = cpu.gpr;
        state.rflags = cpu.rflags;
        state.fpu = cpu.fpu.clone();
        self.memory.read(data, &mut state.data)?;
        let end = code.len() as u64;
        let handler = cpu.rip.wrapping_sub(HIGH + HANDLERS + 1);
        if handler >= 0x1000 {
            let rip = cpu.rip.wrapping_sub(self.code.0 + 1);
            return Ok(Ok(Ending { rip, trap: None }));
        }
        let (ending, interrupted) = self.trap((handler / 16) as u8)?;
        state.rflags = interrupted.rflags;
        state.gpr[gpr::RSP] = interrupted.rsp;
        // At CPL 3 the HLT at the end is a #GP(0): that is the regular end.
        if self.ring == Ring::User && ending == (Ending { rip: end, trap: Some(GuestFault::GP0) }) {
            return Ok(Ok(Ending { rip: end, trap: None }));
        }
        Ok(Ok(ending))
    }

    /// Reads the frame that delivery pushed.
    fn trap(&self, number: u8) -> Result<(Ending, Interrupted), memory::Error> {
        let has_code = matches!(number, 8 | 10..=14 | 17 | 21);
        let mut frame = self.vcpu.cpu.gpr[gpr::RSP].wrapping_sub(HIGH);
        let mut error = 0;
        if has_code {
            error = self.read_u64(frame)? as u32;
            frame += 8;
        }
        let trap = match number {
            vector::PF => GuestFault::page(Gva(self.vcpu.cpu.cr2), error),
            _ if has_code => GuestFault::with_code(number, error),
            _ => GuestFault::plain(number),
        };
        let rip = self.read_u64(frame)?.wrapping_sub(self.code.0);
        let interrupted = Interrupted { rflags: self.read_u64(frame + 16)?, rsp: self.read_u64(frame + 24)? };
        Ok((Ending { rip, trap: Some(trap) }, interrupted))
    }

    /// What RFLAGS holds beside arithmetic flags when a sequence starts.
    pub const RFLAGS: u64 = rflags::FIXED | rflags::IF;
}

struct Interrupted {
    rflags: u64,
    rsp: u64,
}
