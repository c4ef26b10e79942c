//! Sequences of instructions, put together from parts that can be left out one by one.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};
use x86::Gva;

use super::flags;

/// Which instructions a sequence is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds {
    pub integer: bool,
    pub x87: bool,
    /// MMX and SSE.
    pub sse: bool,
    pub avx: bool,
    /// FXSAVE, the XSAVE family, x87 environments. Not together with x87: images would hold instruction pointers.
    pub state: bool,
    /// Images that are loaded may hold x87 instruction pointers, which an engine may forget, but the interpreter does not.
    pub pointers: bool,
}

impl Kinds {
    pub const NONE: Kinds = Kinds { integer: false, x87: false, sse: false, avx: false, state: false, pointers: false };
    pub const INTEGER: Kinds = Kinds { integer: true, ..Kinds::NONE };
    pub const SIMD: Kinds = Kinds { x87: true, sse: true, avx: true, ..Kinds::NONE };
    pub const ALL: Kinds = Kinds { integer: true, ..Kinds::SIMD };
    pub const STATE: Kinds = Kinds { integer: true, state: true, ..Kinds::NONE };
    pub const POINTERS: Kinds = Kinds { pointers: true, ..Kinds::STATE };
    const X87: Kinds = Kinds { x87: true, ..Kinds::NONE };
    const SSE: Kinds = Kinds { sse: true, ..Kinds::NONE };
    const AVX: Kinds = Kinds { avx: true, ..Kinds::NONE };

    /// The names of the kinds that have one.
    pub const NAMES: [(&'static str, Kinds); 8] = [
        ("integer", Kinds::INTEGER),
        ("x87", Kinds::X87),
        ("sse", Kinds::SSE),
        ("avx", Kinds::AVX),
        ("simd", Kinds::SIMD),
        ("all", Kinds::ALL),
        ("state", Kinds::STATE),
        ("pointers", Kinds::POINTERS),
    ];

    #[must_use]
    pub fn named(name: &str) -> Option<Kinds> {
        Kinds::NAMES.iter().find(|(known, _)| *known == name).map(|(_, kinds)| *kinds)
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        Kinds::NAMES.iter().find(|(_, known)| *known == self).map_or("other", |(name, _)| name)
    }
}

/// Something in an item that depends on where it comes to lie.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fix {
    /// A 32-bit displacement at `at`, relative to `end`, that names a place in the arena.
    Place { at: usize, end: usize, arena: i64 },
    /// An 8-bit displacement in the last byte, over the next `items` items.
    Skip { items: usize },
}

/// One or a few instructions that belong together.
#[derive(Clone, Debug, Default)]
pub(super) struct Item {
    pub bytes: Vec<u8>,
    pub fixes: Vec<Fix>,
}

impl Item {
    pub fn append(&mut self, other: &Item) {
        let base = self.bytes.len();
        self.bytes.extend_from_slice(&other.bytes);
        self.fixes.extend(other.fixes.iter().map(|fix| match *fix {
            Fix::Place { at, end, arena } => Fix::Place { at: at + base, end: end + base, arena },
            skip @ Fix::Skip { .. } => skip,
        }));
    }

    pub fn of(bytes: &[u8]) -> Item {
        Item { bytes: bytes.to_vec(), fixes: Vec::new() }
    }
}

/// A sequence that keeps the promise of [`crate::native::sequence::Arena::run`]: only the generator makes one.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub(super) items: Vec<Item>,
    /// Numbers of the two registers that hold pointers into the data.
    pub pointers: [usize; 2],
    pub code: Vec<u8>,
    /// Where each instruction starts, and the end; and the flags that are undefined there.
    pub undefined: Vec<(u64, u64)>,
    /// Has an instruction of several roundings (DPPS, DPPD), whose flags are not exact when exceptions are unmasked.
    pub is_stepwise: bool,
}

impl Sequence {
    /// The number of parts that can be left out one by one.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The same without `count` parts from `first`; `None` if that would read undefined flags.
    #[must_use]
    pub fn without(&self, first: usize, count: usize) -> Option<Sequence> {
        let mut items = self.items.clone();
        items.drain(first..(first + count).min(self.items.len()));
        Sequence::assemble(items, self.pointers)
    }

    pub(super) fn assemble(items: Vec<Item>, pointers: [usize; 2]) -> Option<Sequence> {
        let mut starts = vec![0_usize];
        for item in &items {
            starts.push(starts.last()? + item.bytes.len());
        }
        let mut code = Vec::with_capacity(*starts.last()?);
        for (index, item) in items.iter().enumerate() {
            let start = starts[index];
            code.extend_from_slice(&item.bytes);
            for fix in &item.fixes {
                match *fix {
                    Fix::Place { at, end, arena } => {
                        let displacement = (arena - (start + end) as i64) as i32;
                        code[start + at..start + at + 4].copy_from_slice(&displacement.to_le_bytes());
                    }
                    Fix::Skip { items: over } => {
                        let end = starts[index + 1];
                        let mut target = (index + 1 + over).min(items.len());
                        while starts[target] - end > 127 {
                            target -= 1;
                        }
                        code[end - 1] = (starts[target] - end) as u8;
                    }
                }
            }
        }
        let instructions = decode(&code, Gva(0));
        let entry = flags::undefined(&instructions)?;
        let mut undefined: Vec<_> = instructions.iter().zip(&entry).map(|(i, flags)| (i.ip(), *flags)).collect();
        undefined.push((code.len() as u64, *entry.last()?));
        let has = |wanted: &[Mnemonic]| instructions.iter().any(|i| wanted.contains(&i.mnemonic()));
        let is_stepwise = has(&[Mnemonic::Dpps, Mnemonic::Dppd, Mnemonic::Vdpps, Mnemonic::Vdppd]);
        if is_stepwise && has(&[Mnemonic::Ldmxcsr, Mnemonic::Vldmxcsr]) {
            return None;
        }
        Some(Sequence { items, pointers, code, undefined, is_stepwise })
    }

    /// The undefined flags when control is at `rip`, an offset in the code.
    #[must_use]
    pub fn undefined_at(&self, rip: u64) -> u64 {
        self.undefined.iter().find(|(start, _)| *start == rip).map_or(0, |(_, flags)| *flags)
    }
}

/// All instructions of `code`.
#[must_use]
pub fn decode(code: &[u8], base: Gva) -> Vec<Instruction> {
    Decoder::with_ip(64, code, base.0, DecoderOptions::NONE).iter().collect()
}
