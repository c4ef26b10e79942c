//! Which arithmetic flags an instruction leaves to others: in a block, and a few instructions beyond its end.
//!
//! Looking beyond the end is right as long as the code there is what was looked at. It is in the block's own page, so that
//! whoever writes it drops the block, too; [`Ahead::looked`] are the places that have to be traced for that.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, RflagsBits};
use memory::bytes::PageRef;
use x86::{PAGE_MASK, PAGE_SIZE};

use super::block::{Features, Kind, MOST_SIDE_EXITS, Source, is_division, kind_of};
use super::facts::Table;
use super::kept::record::Span;

pub const ALL_FLAGS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Bytes that are looked at where a jump leads, at most.
pub const LOOK: usize = 32;

/// Bytes that are looked at for one block, at most: where its side exits lead, and its end.
pub const MOST_LOOKED: usize = (MOST_SIDE_EXITS as usize + 2) * LOOK;

/// The flags of most code are overwritten after so many instructions, or not soon.
const MOST_INSTRUCTIONS: usize = 6;

/// Finds the live flags of the block at `rip`.
pub fn find_live_flags(source: &mut Source, rip: u64, features: Features, facts: &mut Table, ahead: &mut Ahead<'_>) {
    // The block may be decoded for the second time, with more bytes.
    ahead.looked.clear();
    let mut live = match source.insns.last().map(|insn| insn.kind) {
        Some(Kind::Jump(target) | Kind::CallNear(target)) => ahead.live_at(target, features, facts),
        Some(kind) if !kind.ends_block() => ahead.live_at(rip + source.size as u64, features, facts),
        _ => ALL_FLAGS,
    };
    for insn in source.insns.iter_mut().rev() {
        if let Some(target) = insn.kind.side_exit() {
            insn.live_taken = ahead.live_at(target, features, facts);
        }
        insn.live_out = live | insn.live_taken;
        live = insn.live_in();
    }
}

/// Shifts and rotates by CL leave the flags alone when the count is zero.
pub fn changes_flags_for_sure(iced: &Instruction) -> bool {
    use Mnemonic as M;
    match iced.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd => {
            let last = iced.op_count() - 1;
            iced.op_kind(last) == OpKind::Immediate8 && iced.immediate8() & 31 != 0
        }
        _ => true,
    }
}

/// The code around a block.
pub struct Ahead<'a> {
    /// The block's page and its virtual address; `None` when nothing shall be known of other code.
    page: Option<(PageRef<'a>, u64)>,
    pub looked: Vec<Look>,
}

/// Bytes of the page that something was concluded from.
pub struct Look {
    pub part: Span,
    /// As many of them as `part` says.
    pub bytes: [u8; LOOK],
}

impl<'a> Ahead<'a> {
    /// Other code of the page that holds the instruction at `rip`.
    pub fn in_page(page: PageRef<'a>, rip: u64) -> Ahead<'a> {
        Ahead { page: Some((page, rip & !PAGE_MASK)), looked: Vec::new() }
    }

    /// Nothing is known of other code.
    pub fn unknown() -> Ahead<'a> {
        Ahead { page: None, looked: Vec::new() }
    }

    /// The flags that the code at `rip` may read before it overwrites them.
    pub fn live_at(&mut self, rip: u64, features: Features, facts: &mut Table) -> u32 {
        let Some((page, address)) = self.page else { return ALL_FLAGS };
        if rip & !PAGE_MASK != address {
            return ALL_FLAGS;
        }
        let offset = rip & PAGE_MASK;
        let mut bytes = [0; LOOK];
        let size = ((PAGE_SIZE - offset) as usize).min(LOOK);
        page.read(offset, &mut bytes[..size]);
        let (live, size) = live_in(&bytes[..size], features, facts);
        if live != ALL_FLAGS {
            self.looked.push(Look { part: Span { offset: offset as u16, size: size as u16 }, bytes });
        }
        live
    }
}

/// The flags that code may read before it overwrites them, and how many bytes say so.
fn live_in(code: &[u8], features: Features, facts: &mut Table) -> (u32, usize) {
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let (mut live, mut open) = (0, ALL_FLAGS);
    for _ in 0..MOST_INSTRUCTIONS {
        if open == 0 || !decoder.can_decode() {
            break;
        }
        let iced = decoder.decode();
        if iced.is_invalid() || is_division(&iced) {
            break;
        }
        match kind_of(&iced, facts.of(&iced), features) {
            Some(
                Kind::Plain
                | Kind::Lea
                | Kind::Nop
                | Kind::PushReg(_)
                | Kind::PushImm(_)
                | Kind::PushMem
                | Kind::PopReg(_)
                | Kind::Leave,
            ) => {}
            _ => {
                live |= iced.rflags_read() & open;
                break;
            }
        }
        live |= iced.rflags_read() & open;
        if changes_flags_for_sure(&iced) {
            open &= !iced.rflags_modified();
        }
    }
    (live | open, decoder.position())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(code: &[u8]) -> u32 {
        live_in(code, Features::default(), &mut Table::new()).0
    }

    #[test]
    fn code_that_overwrites_all_flags_first_reads_none() {
        // mov rax, rbx; push rcx; sub rsp, 8
        assert_eq!(live(&[0x48, 0x89, 0xd8, 0x51, 0x48, 0x83, 0xec, 0x08]), 0);
        // endbr64; xor eax, eax
        assert_eq!(live(&[0xf3, 0x0f, 0x1e, 0xfa, 0x31, 0xc0]), 0);
    }

    #[test]
    fn what_is_read_or_left_alone_stays_live() {
        // adc rax, rbx; cmp rax, rbx
        assert_eq!(live(&[0x48, 0x11, 0xd8, 0x48, 0x39, 0xd8]), RflagsBits::CF);
        // inc rax; ret: only CF is left alone, and then nothing is known
        assert_eq!(live(&[0x48, 0xff, 0xc0, 0xc3]), RflagsBits::CF);
        // shl eax, cl may change nothing
        assert_eq!(live(&[0xd3, 0xe0, 0xc3]), ALL_FLAGS);
        // A division may fault, and shows the flags before it: div ecx; xor eax, eax
        assert_eq!(live(&[0xf7, 0xf1, 0x31, 0xc0]), ALL_FLAGS);
        // jz over to nowhere; hlt; pushfq; an instruction that is cut off; nothing at all
        for code in [&[0x74, 0x02, 0x31, 0xc0][..], &[0xf4], &[0x9c, 0x31, 0xc0], &[0x48, 0x83], &[]] {
            assert_eq!(live(code), ALL_FLAGS);
        }
    }
}
