//! Runs sequences on the host and in the guest, compares, and shrinks what disagrees.

use std::fmt;
use std::fmt::Write as _;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use iced_x86::{FastFormatter, Mnemonic, Register};
use x86::fault::page_fault;
use x86::{FpuArea, GuestFault, rflags, vector};

use super::generate::Generator;
use super::guest::{Guest, Ring};
use super::random::Random;
use super::sequence::{self, Kinds, Sequence};
use crate::Engine;
use crate::native::sequence::{Arena, CONSTANT_SIZE, DATA_SIZE, Ending, State};

/// Why a campaign could not begin.
#[derive(Debug, thiserror::Error)]
pub enum Setup {
    #[error("the host does not let us run sequences: {0}")]
    Host(#[from] io::Error),
    #[error("no memory for the guest: {0}")]
    Guest(#[from] memory::Error),
}

/// The engine and the host do not agree.
#[derive(Debug)]
pub struct Disagreement {
    pub seed: u64,
    pub report: String,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}\n{}", self.seed, self.report)
    }
}

impl std::error::Error for Disagreement {}

/// A series of comparisons with one engine.
pub struct Campaign {
    engine: Box<dyn Engine>,
    kinds: Kinds,
    ring: Ring,
    arena: Arena,
    guest: Guest,
    /// How many sequences ended in a trap, to see that most do not.
    pub traps: u64,
    /// Seeds whose disagreement did not come again.
    pub unsteady: u64,
    pub runs: u64,
    /// Arithmetic flags at a trap do not count.
    pub lenient: bool,
}

/// The pages that may not be written: first numbers of all kinds, then small indexes for gathers.
fn constants() -> Vec<u8> {
    let mut random = Random::new(1);
    let mut bytes = vec![0; CONSTANT_SIZE];
    for (index, chunk) in bytes.chunks_mut(8).enumerate() {
        let value = if index < 0x100 { number(&mut random) } else { random.byte() as i8 as i64 as u64 };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Eight bytes that are interesting as integers or as floating-point numbers.
fn number(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => f64::to_bits((random.word() as i64 >> random.below(64)) as f64),
        1 => {
            let value =
                |random: &mut Random| u64::from(f32::to_bits((random.word() as i32 >> random.below(32)) as f32));
            value(random) | value(random) << 32
        }
        2 => random.pick(&[
            0x7ff0_0000_0000_0000, // infinities
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0001, // quiet and signalling NaN
            0x7ff0_0000_0000_0001,
            0x0000_0000_0000_0001, // denormals
            0x8008_0000_0000_0000,
            0x7fef_ffff_ffff_ffff, // largest, smallest normal
            0x0010_0000_0000_0000,
            0x7f80_0000_ff80_0000, // the same in single precision
            0x7fc0_0001_7f80_0001,
            0x0000_0001_8040_0000,
            0x7f7f_ffff_0080_0000,
            0x8000_0000_0000_0000,
        ]),
        3 => f64::to_bits(random.word() as f64 / 1.8e19),
        4 => u64::from(f32::to_bits(random.word() as f32 / 1.8e19)) * 0x1_0000_0001,
        _ => random.value(),
    }
}

fn fpu(random: &mut Random) -> FpuArea {
    let mut area = FpuArea::initial();
    let bytes = &mut area.bytes;
    let control = if random.chance(70) { 0x37f } else { random.word() as u16 & 0xf3f | 0x40 };
    bytes[0..2].copy_from_slice(&control.to_le_bytes());
    let status = random.word() as u16 & 0x7f00 & !0x80;
    bytes[2..4].copy_from_slice(&status.to_le_bytes());
    let tags = random.byte();
    bytes[4] = random.pick(&[0, 0xff, tags, tags]);
    let control = match random.below(10) {
        0..6 => 0x1f80,
        6..9 => 0x1f80 | random.word() as u32 & 0xe07f,
        _ => random.word() as u32 & 0xffc0,
    };
    bytes[FpuArea::MXCSR..FpuArea::MXCSR + 4].copy_from_slice(&control.to_le_bytes());
    for st in 0..8 {
        let place = 32 + 16 * st;
        let mut fraction = number(random);
        let mut exponent = random.word() as u16;
        match random.below(6) {
            0 => exponent = random.pick(&[0, 0x8000, 0x7fff, 0xffff]),
            1 => (fraction, exponent) = (random.pick(&[0, 1 << 63]), random.pick(&[0, 0x7fff, 0x3fff, 0xbfff])),
            2 => exponent = 0x3fff - 40 + random.byte() as u16 % 80,
            3 => (fraction, exponent) = (fraction | 1 << 63, 0x3fff + random.byte() as u16 % 70),
            _ => {}
        }
        bytes[place..place + 8].copy_from_slice(&fraction.to_le_bytes());
        bytes[place + 8..place + 10].copy_from_slice(&exponent.to_le_bytes());
    }
    for chunk in bytes[FpuArea::XMM..FpuArea::XMM + 256].chunks_mut(8) {
        chunk.copy_from_slice(&number(random).to_le_bytes());
    }
    for chunk in bytes[FpuArea::YMM_HIGH..FpuArea::YMM_HIGH + 256].chunks_mut(8) {
        chunk.copy_from_slice(&number(random).to_le_bytes());
    }
    area
}

impl fmt::Display for Campaign {
    /// The options of `examples/fuzz.rs` that make it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ring = if self.ring == Ring::User { "user" } else { "kernel" };
        write!(f, "--engine {} --kinds {} --ring {ring}", self.engine.name(), self.kinds.name())
    }
}

impl Campaign {
    /// # Errors
    /// [`Setup`], when the host refuses executable memory or has no AVX, or memory is short.
    pub fn new(engine: Box<dyn Engine>, kinds: Kinds, ring: Ring) -> Result<Campaign, Setup> {
        let constants = constants();
        let arena = Arena::new(&constants)?;
        let guest = Guest::new(&arena, &constants, ring)?;
        Ok(Campaign { engine, kinds, ring, arena, guest, traps: 0, runs: 0, unsteady: 0, lenient: false })
    }

    fn state(&self, random: &mut Random, sequence: &Sequence) -> State {
        let mut gpr = [0; 16];
        for value in &mut gpr {
            *value = random.value();
        }
        let data = self.arena.data().0;
        gpr[sequence.pointers[0]] = data + 0x3000 + 64 * random.below(16) as u64;
        gpr[sequence.pointers[1]] = data + 0x5000 + 64 * random.below(16) as u64;
        gpr[4] = data + 0x6000 + 16 * random.below(16) as u64;
        let mut bytes = vec![0; DATA_SIZE];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&number(random).to_le_bytes());
        }
        let flags = random.word() & (rflags::ARITHMETIC | rflags::DF);
        let flags = if random.chance(90) { flags & !rflags::DF } else { flags };
        let mut fpu = fpu(random);
        if sequence.is_stepwise {
            fpu.bytes[FpuArea::MXCSR] |= 0x80;
            fpu.bytes[FpuArea::MXCSR + 1] |= 0x1f;
        }
        State { gpr, rflags: Guest::RFLAGS | flags, fpu, data: bytes }
    }

    /// The sequence that belongs to a seed, and the states that it is run from.
    fn case(&self, seed: u64) -> (Sequence, Vec<State>) {
        let sequence = Generator::new(seed, self.kinds).sequence();
        let mut random = Random::new(seed ^ 0x5eed << 40);
        // Twice: the second run meets code that an engine has seen before.
        let states = (0..2).map(|_| self.state(&mut random, &sequence)).collect();
        (sequence, states)
    }

    /// A counter of the engine's.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        self.engine.counters().iter().find(|(known, _)| *known == name).map_or(0, |(_, value)| *value)
    }

    /// Compares the engine with the host on the sequence of one seed.
    ///
    /// # Errors
    /// The shortest sequence found on which they disagree.
    pub fn check(&mut self, seed: u64) -> Result<(), Disagreement> {
        let (sequence, states) = self.case(seed);
        let Err(first) = self.compare(&sequence, &states) else { return Ok(()) };
        // Whether a state component counts as in its initial configuration depends on the host kernel, too: a context
        // switch at the right moment makes it so (Intel SDM (2024-12) Vol. 1 13.6 "Processor Tracking of XSAVE-Managed
        // State"). An error of an engine comes every time.
        if (0..3).any(|_| self.compare(&sequence, &states).is_ok()) {
            self.unsteady += 1;
            return Ok(());
        }
        let (sequence, report) = self.shrink(sequence, &states, first);
        let report = format!("{}{report}", self.listing(&sequence));
        Err(Disagreement { seed, report })
    }

    /// The instructions that belong to a seed.
    #[must_use]
    pub fn list(&self, seed: u64) -> String {
        self.listing(&self.case(seed).0)
    }

    fn listing(&self, sequence: &Sequence) -> String {
        let mut formatter = FastFormatter::new();
        let mut text = String::new();
        let base = self.arena.code();
        for instruction in sequence::decode(&sequence.code, base) {
            let start = (instruction.ip() - base.0) as usize;
            let mut line = String::new();
            formatter.format(&instruction, &mut line);
            let bytes: String =
                sequence.code[start..start + instruction.len()].iter().fold(String::new(), |mut text, byte| {
                    let _ = write!(text, "{byte:02x}");
                    text
                });
            let _ = writeln!(text, "  {start:4x}  {bytes:<30} {line}");
        }
        let _ = writeln!(text, "  code at {:#x}, data at {:#x}", base.0, self.arena.data().0);
        text
    }

    fn shrink(&mut self, mut sequence: Sequence, states: &[State], first: String) -> (Sequence, String) {
        let mut report = match self.compare(&sequence, states) {
            Err(again) => again,
            Ok(()) => format!("  it did not come a second time:\n{first}"),
        };
        let mut count = sequence.len() / 2;
        while count > 0 {
            let mut first = 0;
            while first < sequence.len() {
                let shorter = sequence.without(first, count);
                let failed = shorter.and_then(|s| self.compare(&s, states).err().map(|report| (s, report)));
                match failed {
                    Some((shorter, why)) => (sequence, report) = (shorter, why),
                    None => first += count,
                }
            }
            count /= 2;
        }
        (sequence, report)
    }

    /// Whether the host ended in a #GP of an FXRSTOR or XRSTOR that found reserved bits of MXCSR set. Processors (Sapphire
    /// Rapids for one) have loaded registers of the x87 and of SSE by then; our engines load none.
    fn restored_reserved_mxcsr(&self, sequence: &Sequence, end: Ending, host: &State) -> bool {
        use Mnemonic as M;
        if end.trap.is_none_or(|trap| trap.vector != vector::GP) {
            return false;
        }
        let ip = self.arena.code().0 + end.rip;
        let Some(i) = sequence::decode(&sequence.code, self.arena.code()).into_iter().find(|i| i.ip() == ip) else {
            return false;
        };
        if !matches!(i.mnemonic(), M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64) {
            return false;
        }
        let value = |register: Register| {
            if register.is_gpr() { host.gpr[register.full_register().number()] } else { 0 }
        };
        let Some(area) = i.virtual_address(0, 0, |register, _, _| Some(value(register))) else { return false };
        let offset = area.wrapping_sub(self.arena.data().0) as usize;
        let mxcsr = offset.checked_add(FpuArea::MXCSR).and_then(|at| host.data.get(at..at + 4));
        mxcsr.is_some_and(|bytes| bytes[2] | bytes[3] != 0)
    }

    fn compare(&mut self, sequence: &Sequence, states: &[State]) -> Result<(), String> {
        for state in states {
            let mut wanted = state.clone();
            let mut end = self.arena.run_generated(sequence, &mut wanted);
            if let (Ring::Kernel, Some(trap)) = (self.ring, &mut end.trap)
                && trap.vector == vector::PF
            {
                // The host ran it as a user.
                trap.error = trap.error.map(|code| code & !page_fault::USER);
            }
            self.runs += 1;
            self.traps += u64::from(end.trap.is_some());
            let mut got = state.clone();
            let (guest, engine) = (&mut self.guest, &mut *self.engine);
            let result = catch_unwind(AssertUnwindSafe(|| guest.run(engine, &sequence.code, &mut got)));
            let result = result.unwrap_or_else(|_| Err("the engine panicked".to_owned()));
            let name = self.engine.name();
            let scope = Scope {
                pointers: self.kinds.pointers,
                lenient: self.lenient,
                fpu: !self.restored_reserved_mxcsr(sequence, end, &wanted),
            };
            let differences = match result {
                Ok(ending) => differences(sequence, (end, &wanted), (ending, &got), name, scope),
                Err(why) => format!("  {name}: {why}\n"),
            };
            if !differences.is_empty() {
                return Err(format!("{differences}  from\n{}", registers(state)));
            }
        }
        Ok(())
    }
}

/// What is compared.
#[derive(Clone, Copy)]
struct Scope {
    /// The x87's instruction and operand pointers, too.
    pointers: bool,
    /// Not the arithmetic flags at a trap.
    lenient: bool,
    /// The registers of x87, SSE and AVX.
    fpu: bool,
}

fn register(number: usize) -> Register {
    Register::RAX + number as u32
}

fn registers(state: &State) -> String {
    let mut text = String::new();
    for (number, value) in state.gpr.iter().enumerate() {
        let end = if number % 4 == 3 { '\n' } else { ' ' };
        let _ = write!(text, "    {:>3?}={value:016x}{end}", register(number));
    }
    let control = u16::from_le_bytes([state.fpu.bytes[0], state.fpu.bytes[1]]);
    let status = u16::from_le_bytes([state.fpu.bytes[2], state.fpu.bytes[3]]);
    let _ = writeln!(
        text,
        "    rflags={:x} fcw={control:x} fsw={status:x} ftw={:x} mxcsr={:x}",
        state.rflags,
        state.fpu.bytes[4],
        word(&state.fpu.bytes[FpuArea::MXCSR..]) as u32
    );
    text
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}

/// What differs, a line each; empty when all agrees.
fn differences(
    sequence: &Sequence,
    wanted: (Ending, &State),
    got: (Ending, &State),
    name: &str,
    scope: Scope,
) -> String {
    let mut text = String::new();
    let mut differ = |what: &str, host: String, engine: String| {
        let _ = writeln!(text, "  {what}: host {host}, {name} {engine}");
    };
    let (host_end, host) = wanted;
    let (end, state) = got;
    if host_end != end {
        differ("end", format!("{host_end:x?}"), format!("{end:x?}"));
    }
    for number in 0..16 {
        if host.gpr[number] != state.gpr[number] {
            let show = |value: u64| format!("{value:016x}");
            differ(&format!("{:?}", register(number)), show(host.gpr[number]), show(state.gpr[number]));
        }
    }
    let mut defined = (rflags::ARITHMETIC | rflags::DF) & !sequence.undefined_at(host_end.rip);
    if scope.lenient && host_end.trap.is_some() {
        defined &= !rflags::ARITHMETIC;
    }
    if (host.rflags ^ state.rflags) & defined != 0 {
        let show = |flags: u64| format!("{:03x} (of {defined:03x})", flags & defined);
        differ("flags", show(host.rflags), show(state.rflags));
    }
    // Instruction and operand pointers of the x87 are the host's there, and are hidden here, if x87 instructions ran.
    let same = |range: std::ops::Range<usize>| host.fpu.bytes[range.clone()] == state.fpu.bytes[range];
    // With an unmasked overflow or underflow, the inexact flag is that of a result with unlimited exponent, which only the
    // exception itself shows: see simd/exceptions.rs.
    let mxcsr = |state: &State| word(&state.fpu.bytes[FpuArea::MXCSR..]) as u32;
    let (flags, masks) = (mxcsr(host) & 0x3f, mxcsr(host) >> 7 & 0x3f);
    let out_of_range = host_end.trap == Some(GuestFault::plain(vector::XM)) && flags & !masks & 0x18 != 0;
    let ignored = if out_of_range { 0x20 } else { 0 };
    if (mxcsr(host) ^ mxcsr(state)) & !ignored != 0 {
        differ("mxcsr", format!("{:x}", mxcsr(host)), format!("{:x}", mxcsr(state)));
    }
    let pieces = [("fcw", 0..2), ("fsw", 2..4), ("ftw", 4..5)].map(|(n, r)| (n.to_owned(), r));
    let st = (0..8).map(|n| (format!("st{n}"), 32 + 16 * n..42 + 16 * n));
    let xmm = (0..16).map(|n| (format!("xmm{n}"), FpuArea::XMM + 16 * n..FpuArea::XMM + 16 * n + 16));
    let ymm = (0..16).map(|n| (format!("ymm{n} high"), FpuArea::YMM_HIGH + 16 * n..FpuArea::YMM_HIGH + 16 * n + 16));
    let pieces = pieces.into_iter().chain(scope.pointers.then(|| ("fip, fdp".to_owned(), 6..24)));
    for (what, range) in pieces.chain(st).chain(xmm).chain(ymm).filter(|_| scope.fpu) {
        if !same(range.clone()) {
            let show = |state: &State| {
                state.fpu.bytes[range.clone()].iter().rev().fold(String::new(), |mut text, byte| {
                    let _ = write!(text, "{byte:02x}");
                    text
                })
            };
            differ(&what, show(host), show(state));
        }
    }
    let places = (0..DATA_SIZE).step_by(8).filter(|at| host.data[*at..at + 8] != state.data[*at..at + 8]);
    for at in places.take(8) {
        let show = |state: &State| format!("{:016x}", word(&state.data[at..]));
        differ(&format!("data+{at:#x}"), show(host), show(state));
    }
    text
}
