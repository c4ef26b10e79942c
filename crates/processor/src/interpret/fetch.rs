//! Fetching and decoding, and the cache of decoded instructions: pages of code, found by where they are in guest memory and
//! at which address and in which mode they run. Pages that the cache holds are traced, so that a store to them drops them.

use std::collections::HashMap;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use x86::{CpuState, Gpa, GuestFault, Gva, PAGE_MASK, PAGE_SIZE, Ppn, seg};

use super::op::Op;
use crate::core::Core;

/// Decoded instructions that the cache may hold, at about 120 bytes each; when there are more it starts over. A Debian boot
/// decodes half a million in all, but at any time runs in a small part of them.
const MOST_OPS: usize = 1 << 17;
/// Pages of code that the cache may hold, at 8 KiB each.
const MOST_PAGES: usize = 2048;
/// Pages that are found without a walk and a hash; a power of two.
const LINES: usize = 512;
/// A tag that no line of a real page has.
const EMPTY: u64 = 0xfff;
/// The longest instruction, Intel SDM (2024-12) Vol. 2A 2.3.11.
const LONGEST: usize = 15;

/// What of the processor's state changes the meaning of code bytes, or the right to run them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Mode {
    /// Bit 0: 64-bit code, bit 1: 32-bit defaults, bit 2: CPL 3.
    bits: u8,
    /// Base and limit of the code segment outside 64-bit code.
    base: u64,
    limit: u32,
}

impl Mode {
    const LONG: u8 = 1;
    const BIG: u8 = 2;
    const USER: u8 = 4;

    fn of(cpu: &CpuState) -> Mode {
        let code = &cpu.segments[seg::CS];
        let user = if cpu.cpl() == 3 { Mode::USER } else { 0 };
        if cpu.is_code64() {
            return Mode { bits: Mode::LONG | user, base: 0, limit: 0 };
        }
        let big = if code.is_big() { Mode::BIG } else { 0 };
        Mode { bits: big | user, base: code.base, limit: code.limit }
    }

    fn is_long(&self) -> bool {
        self.bits & Mode::LONG != 0
    }

    fn width(&self) -> u32 {
        if self.is_long() {
            64
        } else if self.bits & Mode::BIG != 0 {
            32
        } else {
            16
        }
    }

    #[inline(always)]
    fn linear(&self, rip: u64) -> u64 {
        let sum = rip.wrapping_add(self.base);
        if self.bits & Mode::LONG != 0 { sum } else { sum & 0xffff_ffff }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    ppn: Ppn,
    /// RIP-relative operands and branch targets are decoded for one address.
    page: Gva,
    mode: Mode,
}

#[derive(Clone, Copy, Debug)]
struct Line {
    /// The linear address of the page, with the bits of the mode in its low bits.
    tag: u64,
    page: u32,
    ppn: Ppn,
}

impl Line {
    const NONE: Line = Line { tag: EMPTY, page: 0, ppn: Ppn(0) };
}

/// The decoded instructions of one page.
#[derive(Debug)]
struct CodePage {
    key: Key,
    /// By offset of the first byte: one more than the index in `ops`, or 0.
    slots: Box<[u16; PAGE_SIZE as usize]>,
    ops: Vec<Op>,
}

/// The cache of decoded instructions of one VCPU.
#[derive(Debug)]
pub struct DecodeCache {
    lines: Box<[Line; LINES]>,
    pages: Vec<CodePage>,
    free: Vec<u32>,
    index: HashMap<Key, u32>,
    mode: Mode,
    /// The generation of mappings (of the VCPU) that `lines` belongs to.
    mappings: u64,
    ops: usize,
    /// The last instruction that the cache does not keep.
    loose: Op,
    pub decoded: u64,
    pub dropped: u64,
}

/// Where [`DecodeCache::find`] found an instruction: (page, index in it), or the loose one.
type Place = (usize, usize);
const LOOSE: usize = usize::MAX;

impl Default for DecodeCache {
    fn default() -> Self {
        Self::new()
    }
}

impl DecodeCache {
    #[must_use]
    pub fn new() -> DecodeCache {
        DecodeCache {
            lines: Box::new([Line::NONE; LINES]),
            pages: Vec::new(),
            free: Vec::new(),
            index: HashMap::new(),
            mode: Mode::default(),
            mappings: 0,
            ops: 0,
            loose: Op::new(&Instruction::default()),
            decoded: 0,
            dropped: 0,
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.lines.fill(Line::NONE);
        self.pages.clear();
        self.free.clear();
        self.index.clear();
        self.ops = 0;
    }

    /// Forgets the code of a page, because it was written.
    pub fn drop_page(&mut self, ppn: Ppn) {
        let stale: Vec<Key> = self.index.keys().filter(|key| key.ppn == ppn).copied().collect();
        for key in stale {
            if let Some(number) = self.index.remove(&key) {
                let page = &mut self.pages[number as usize];
                self.ops -= page.ops.len();
                page.ops.clear();
                page.slots.fill(0);
                self.free.push(number);
                self.dropped += 1;
            }
        }
        self.lines.fill(Line::NONE);
    }

    /// Brings the cache up to the processor's mode and mappings; to be called before [`DecodeCache::find`] whenever they may
    /// have changed.
    #[inline]
    pub fn refresh(&mut self, core: &Core<'_>) {
        let mode = Mode::of(&core.vcpu.cpu);
        let moved = (mode.base, mode.limit) != (self.mode.base, self.mode.limit);
        if moved || self.mappings != core.vcpu.mappings || core.memory.code.is_pending(core.vcpu.number) {
            self.mappings = core.vcpu.mappings;
            self.lines.fill(Line::NONE);
        }
        self.mode = mode;
    }

    /// The instruction at RIP.
    #[inline(always)]
    pub fn find(&mut self, core: &mut Core<'_>) -> Result<&Op, GuestFault> {
        let (page, slot) = self.locate(core)?;
        Ok(self.at(page, slot))
    }

    /// The instruction at RIP, in 64-bit code that is known to be at `gpa` and not to have been written: spares what
    /// [`DecodeCache::refresh`] costs when mappings change all the time.
    pub fn find_at(&mut self, core: &mut Core<'_>, gpa: Gpa) -> Result<&Op, GuestFault> {
        let rip = core.vcpu.cpu.rip;
        let mode = Mode::of(&core.vcpu.cpu);
        let line = &self.lines[(rip >> 12) as usize % LINES];
        if line.tag == rip & !PAGE_MASK | u64::from(mode.bits) && line.ppn == gpa.ppn() {
            let number = line.page as usize;
            let slot = self.pages.get(number).map_or(0, |page| page.slots[(rip & PAGE_MASK) as usize]);
            if slot != 0 {
                return Ok(self.at(number, usize::from(slot) - 1));
            }
        }
        // What is found slowly is found for the mappings of now; what other lines hold is still of those before.
        self.mode = mode;
        let (page, slot) = self.locate_slowly(core, Gva(rip))?;
        Ok(self.at(page, slot))
    }

    /// The instruction at RIP, and those behind it in the cache: mostly, and where `start` says so, the next ones to run.
    #[inline(always)]
    pub fn find_run(&mut self, core: &mut Core<'_>) -> Result<&[Op], GuestFault> {
        let (page, slot) = self.locate(core)?;
        let run = self.pages.get(page).and_then(|page| page.ops.get(slot..));
        Ok(run.unwrap_or(std::slice::from_ref(&self.loose)))
    }

    #[inline(always)]
    fn at(&self, page: usize, slot: usize) -> &Op {
        self.pages.get(page).and_then(|page| page.ops.get(slot)).unwrap_or(&self.loose)
    }

    #[inline(always)]
    fn locate(&mut self, core: &mut Core<'_>) -> Result<Place, GuestFault> {
        let linear = self.mode.linear(core.vcpu.cpu.rip);
        let line = &self.lines[(linear >> 12) as usize % LINES];
        if line.tag == linear & !PAGE_MASK | u64::from(self.mode.bits) {
            let number = line.page as usize;
            if let Some(page) = self.pages.get(number) {
                let slot = page.slots[(linear & PAGE_MASK) as usize];
                if slot != 0 {
                    return Ok((number, usize::from(slot) - 1));
                }
            }
        }
        self.locate_slowly(core, Gva(linear))
    }

    #[cold]
    #[inline(never)]
    fn locate_slowly(&mut self, core: &mut Core<'_>, linear: Gva) -> Result<Place, GuestFault> {
        let gpa = core.translate_fetch(linear)?;
        if core.memory.code.is_pending(core.vcpu.number) || !core.memory.is_ram(gpa.ppn()) {
            // Code was written and whoever takes note of that has not yet, or the code is not in memory.
            self.loose = Op::new(&decode(core, self.mode, linear, gpa)?.instruction);
            return Ok((LOOSE, 0));
        }
        let number = self.page_of(Key { ppn: gpa.ppn(), page: linear.page(), mode: self.mode });
        let tag = linear.page().0 | u64::from(self.mode.bits);
        self.lines[(linear.0 >> 12) as usize % LINES] = Line { tag, page: number, ppn: gpa.ppn() };
        let page = number as usize;
        let slot = self.pages[page].slots[linear.offset() as usize];
        if slot != 0 {
            return Ok((page, usize::from(slot) - 1));
        }
        let decoded = decode(core, self.mode, linear, gpa)?;
        self.decoded += 1;
        let op = Op::new(&decoded.instruction);
        // The second page of an instruction across pages may be mapped elsewhere the next time. What another processor
        // changes while we look may run as it was, but not be kept.
        if decoded.crosses || !core.trace_code(gpa, &decoded.bytes[..decoded.instruction.len().min(LONGEST)]) {
            self.loose = op;
            return Ok((LOOSE, 0));
        }
        let ops = &mut self.pages[page].ops;
        ops.push(op);
        let count = ops.len();
        self.ops += 1;
        self.pages[page].slots[linear.offset() as usize] = count as u16;
        Ok((page, count - 1))
    }

    fn page_of(&mut self, key: Key) -> u32 {
        if let Some(number) = self.index.get(&key) {
            return *number;
        }
        if self.ops >= MOST_OPS || self.index.len() >= MOST_PAGES {
            self.clear();
        }
        let number = self.free.pop().unwrap_or_else(|| {
            let slots = Box::new([0; PAGE_SIZE as usize]);
            self.pages.push(CodePage { key, slots, ops: Vec::new() });
            self.pages.len() as u32 - 1
        });
        self.pages[number as usize].key = key;
        self.index.insert(key, number);
        number
    }
}

/// Reads up to the end of the page.
fn read_code(core: &mut Core<'_>, gpa: Gpa, buffer: &mut [u8]) -> usize {
    let count = buffer.len().min((PAGE_SIZE - gpa.offset()) as usize);
    match core.memory.page(gpa.ppn()) {
        Some(page) => page.read(gpa.offset(), &mut buffer[..count]),
        None => {
            for (byte, at) in buffer[..count].iter_mut().zip(0..) {
                *byte = core.outside.mmio_read(gpa.add(at), 1) as u8;
            }
        }
    }
    count
}

struct Decoded {
    instruction: Instruction,
    bytes: [u8; LONGEST],
    /// It goes on in the next page.
    crosses: bool,
}

/// Decodes the instruction at RIP.
fn decode(core: &mut Core<'_>, mode: Mode, linear: Gva, gpa: Gpa) -> Result<Decoded, GuestFault> {
    let rip = core.vcpu.cpu.rip;
    let mut bytes = [0; LONGEST];
    let first = read_code(core, gpa, &mut bytes);
    let (mut instruction, mut error) = decode_bytes(mode, rip, &bytes[..first]);
    let crosses = error == DecoderError::NoMoreBytes && first < LONGEST;
    if crosses {
        let next = Gva(mode.linear(rip.wrapping_add(first as u64)));
        debug_assert_eq!(next.offset(), 0, "{linear:?} and {first} bytes");
        let gpa = core.translate_fetch(next)?;
        read_code(core, gpa, &mut bytes[first..]);
        (instruction, error) = decode_bytes(mode, rip, &bytes);
    }
    let length = instruction.len() as u64;
    // The decoder gives up at 15 bytes, whatever more it wanted.
    let too_long = error != DecoderError::None && instruction.len() == LONGEST;
    let beyond_limit = !mode.is_long() && rip.wrapping_add(length.max(1) - 1) > u64::from(mode.limit);
    if too_long || beyond_limit {
        return Err(GuestFault::GP0);
    }
    Ok(Decoded { instruction, bytes, crosses })
}

fn decode_bytes(mode: Mode, rip: u64, bytes: &[u8]) -> (Instruction, DecoderError) {
    let mut decoder = Decoder::with_ip(mode.width(), bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (instruction, decoder.last_error())
}
