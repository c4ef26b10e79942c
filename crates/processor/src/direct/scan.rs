//! What code may be run as it stands. Some instructions work in user code and tell of the host, or do something else than the
//! guest's processor would: pages with those are left to the translator, or run exactly, see [`super::exact`]. (SGDT and its kin, which x86 cannot trap without UMIP,
//! are why it is not virtualizable in Popek and Goldberg's sense.) Isolation does not depend on this: a program that hides such
//! an instruction learns a number of the host's, and can do nothing with it.

use iced_x86::{Decoder, DecoderOptions};
use x86::PAGE_SIZE;

/// The longest instruction: one that began in the page before may end in the first bytes of this one, and nobody knows.
const LONGEST: usize = 15;
const SIZE: usize = PAGE_SIZE as usize;

/// Whether two bytes and what follows them may be the opcode of such an instruction.
fn is_suspicious(code: &[u8], has_f3: bool, same_tsc: bool) -> bool {
    let modrm = code.get(2).copied();
    let field = modrm.map(|byte| byte >> 3 & 7);
    let is_register = modrm.is_some_and(|byte| byte >= 0xc0);
    match (code[0], code[1]) {
        // INT 0x80 and SYSENTER enter the host's kernel by its back doors, which keep less of the registers.
        (0xcd, 0x80) | (0x0f, 0x34) => true,
        // INT 4 is a trap of the host's: a fault with RIP behind it, which looks as if the next instruction had caused it.
        (0xcd, 0x04) => true,
        // RDTSC, RDPMC, CPUID.
        (0x0f, 0x31) => !same_tsc,
        (0x0f, 0x33 | 0xa2) => true,
        // SLDT, STR, VERR, VERW; LAR and LSL.
        (0x0f, 0x00) => field.is_none_or(|field| matches!(field, 0 | 1 | 4 | 5)),
        (0x0f, 0x02 | 0x03) => true,
        // SGDT, SIDT, SMSW; XGETBV, VMCALL, RDTSCP, RDPKRU and all others without a memory operand, but for SWAPGS, which faults,
        // and the XTEST and XEND with which libraries look for a transaction that never is.
        (0x0f, 0x01) => match (modrm, field) {
            (Some(0xd5 | 0xd6 | 0xf8), _) => false,
            (_, Some(field)) => is_register || matches!(field, 0 | 1 | 4),
            _ => true,
        },
        // RDPID, which RDSEED only differs from by a prefix; XSAVEC, XSAVES, XRSTORS.
        (0x0f, 0xc7) => match field {
            Some(7) => is_register && has_f3,
            Some(3..=5) => !is_register,
            Some(_) => false,
            None => true,
        },
        // XSAVE, XSAVEOPT and XRSTOR go by the host's XCR0, which may have more.
        (0x0f, 0xae) => field.is_none_or(|field| !is_register && matches!(field, 4..=6)),
        _ => false,
    }
}

/// Where instructions begin. A page is decoded from each of its first bytes on; these ways soon fall into step, so most of them
/// come across a place if an instruction begins there, and few if none does.
struct Ways {
    /// A bit for each way that comes across the place.
    across: Box<[u16; SIZE]>,
}

impl Ways {
    fn of(code: &[u8; SIZE]) -> Ways {
        let mut across = Box::new([0; SIZE]);
        (0..16).for_each(|way| across[way] = 1 << way);
        let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
        for at in 0..SIZE {
            if across[at] != 0 && decoder.set_position(at).is_ok() {
                let length = decoder.decode().len().max(1);
                if let Some(next) = across.get(at + length).copied() {
                    across[at + length] = next | across[at];
                }
            }
        }
        Ways { across }
    }

    /// Whether an instruction has its opcode at `place`, and where it begins, if that is beyond doubt.
    fn meet(&self, code: &[u8; SIZE], place: usize) -> Option<Beginning> {
        let prefixes = code[..place].iter().rev().take_while(|byte| is_prefix(**byte)).count().min(LONGEST);
        let starts = place - prefixes..=place;
        let ways = self.across[starts.clone()].iter().fold(0, |all: u16, ways| all | ways);
        let mut met = starts.filter(|start| self.across[*start] != 0);
        let first = met.next().filter(|_| met.next().is_none());
        (ways.count_ones() > 8).then_some(first.map(|start| start as u16))
    }
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x40..=0x4f | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65)
}

/// Where in its page an instruction begins; `None` when the page can be read in several ways.
type Beginning = Option<u16>;

/// The instructions of a page that tell of the host.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Telling {
    /// Those of CPUID, which the host can have fault wherever they begin.
    pub cpuids: Vec<Beginning>,
    pub others: Vec<u16>,
}

/// How the code of a page can be run.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it stands.
    Plain,
    /// As it stands but for these.
    Telling(Telling),
    /// There is an instruction that tells of the host, and no telling where it begins.
    Unclear,
}

/// How the code of a page can be run, by a guest whose time stamp counter is the host's, or is not.
#[must_use]
pub fn judge(code: &[u8; SIZE], same_tsc: bool) -> Verdict {
    let mut from = LONGEST;
    let mut ways = None;
    let mut telling = Telling::default();
    while let Some(step) = code[from..].iter().position(|byte| matches!(byte, 0x0f | 0xcd)) {
        let place = from + step;
        let rest = &code[place..];
        // Of one that goes on in the next page the first byte says too little; of two the worst is taken.
        let has_f3 = code[place - 2..place].contains(&0xf3);
        if rest.len() >= 2 && is_suspicious(rest, has_f3, same_tsc) {
            let ways = ways.get_or_insert_with(|| Ways::of(code));
            match (ways.meet(code, place), &rest[..2]) {
                (None, _) => {}
                (Some(beginning), [0x0f, 0xa2]) => telling.cpuids.push(beginning),
                (Some(Some(start)), _) => telling.others.push(start),
                (Some(None), _) => return Verdict::Unclear,
            }
        }
        from = place + 1;
    }
    if telling == Telling::default() { Verdict::Plain } else { Verdict::Telling(telling) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_plain(code: &[u8; SIZE], same_tsc: bool) -> bool {
        judge(code, same_tsc) == Verdict::Plain
    }

    fn page(at: usize, bytes: &[u8]) -> [u8; PAGE_SIZE as usize] {
        // mov rax, [rbx+16]; add rax, rcx; ret: over and over.
        let text = [0x48, 0x8b, 0x43, 0x10, 0x48, 0x01, 0xc8, 0xc3];
        let mut page = [0; PAGE_SIZE as usize];
        page.iter_mut().zip(text.iter().cycle()).for_each(|(byte, text)| *byte = *text);
        page[at..at + bytes.len()].copy_from_slice(bytes);
        page
    }

    #[test]
    fn ordinary_code_is_plain() {
        assert!(is_plain(&page(0, &[]), false));
        let rdtsc = page(0x100, &[0x0f, 0x31]);
        assert!(is_plain(&rdtsc, true) && !is_plain(&rdtsc, false));
        // syscall; cmpxchg16b [rdi]; lfence; fxsave [rax]; swapgs; ud2: these stop it, or are harmless.
        for code in [
            &[0x0f, 0x05][..],
            &[0x48, 0x0f, 0xc7, 0x0f],
            &[0x0f, 0xae, 0xe8],
            &[0x0f, 0xae, 0x00],
            &[0x0f, 0x01, 0xf8],
            &[0x0f, 0x0b],
            &[0x0f, 0xc7, 0xf8],
        ] {
            assert!(is_plain(&page(0x100, code), false), "{code:x?}");
        }
    }

    #[test]
    fn what_tells_of_the_host_is_found_wherever_it_is() {
        let bad: [&[u8]; 17] = [
            &[0xcd, 0x04],
            &[0x0f, 0x31],
            &[0x0f, 0x01, 0xf9],
            &[0x0f, 0xa2],
            &[0xcd, 0x80],
            &[0x0f, 0x34],
            &[0x0f, 0x00, 0xc8],
            &[0x0f, 0x00, 0x00],
            &[0x0f, 0x03, 0xc0],
            &[0x0f, 0x01, 0x45, 0x00],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0x01, 0xe0],
            &[0xf3, 0x0f, 0xc7, 0xf8],
            &[0xf3, 0x41, 0x0f, 0xc7, 0xf8],
            &[0x0f, 0xc7, 0x27],
            &[0x48, 0x0f, 0xae, 0x27],
            &[0x0f, 0xae, 0x6c, 0x24, 0x40],
        ];
        for code in bad {
            for at in [0x100, 0x108, 0x10b, 0x777, PAGE_SIZE as usize - code.len()] {
                let mut page = page(at, code);
                if at % 8 != 0 {
                    // In the middle of an instruction of the text: give it a beginning of its own.
                    page[at - 8..at].fill(0x90);
                }
                assert!(!is_plain(&page, false), "{code:x?} at {at:#x}");
            }
        }
    }

    #[test]
    fn constants_that_look_like_one_are_none() {
        // mov ecx, 0x0f; mov eax, 0x80cd; jz +0x10f
        for code in [&[0xb9, 0x0f, 0, 0, 0][..], &[0xb8, 0xcd, 0x80, 0, 0], &[0x0f, 0x84, 0x0f, 0x01, 0, 0]] {
            assert!(is_plain(&page(0x108, code), false), "{code:x?}");
        }
    }

    #[test]
    fn jumps_to_far_below_are_no_system_instructions() {
        // mov eax, [rbx+0x90]; sub eax, 1; xor r14d, r14d; jmp +0xf0c2d: over and over, as interpreters in C have it.
        let text = [0x8b, 0x83, 0x90, 0, 0, 0, 0x83, 0xe8, 1, 0x45, 0x31, 0xf6, 0xe9, 0x2d, 0x0c, 0x0f, 0];
        let mut page = page(0, &[]);
        page[0x600..].iter_mut().zip(text.iter().cycle()).for_each(|(byte, text)| *byte = *text);
        assert!(is_plain(&page, false));
    }

    #[test]
    fn what_goes_on_in_the_next_page_is_judged_by_two_bytes() {
        let end = PAGE_SIZE as usize;
        assert!(is_plain(&page(end - 1, &[0x0f]), false));
        assert!(!is_plain(&page(end - 8, &[0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x01]), false));
        assert!(is_plain(&page(end - 8, &[0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x05]), false));
    }

    #[test]
    fn each_that_tells_is_named_by_where_it_begins() {
        let mut code = page(0x100, &[0x0f, 0xa2, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90]);
        code[0x208..0x210].copy_from_slice(&[0x0f, 0x01, 0xd0, 0x90, 0x90, 0x90, 0x90, 0x90]);
        // xsave64 [rdi], with its prefix
        code[0x310..0x318].copy_from_slice(&[0x48, 0x0f, 0xae, 0x27, 0x90, 0x90, 0x90, 0x90]);
        let telling = Telling { cpuids: vec![Some(0x100)], others: vec![0x208, 0x310] };
        assert_eq!(judge(&code, true), Verdict::Telling(telling));
    }

    #[test]
    fn where_code_can_be_read_in_two_ways_nothing_is_named() {
        // Most ways come to XSAVE [RDI] behind an immediate, and those that begin in the immediate to XSAVE64 at its last byte.
        let mut code = page(0, &[]);
        code[..0x20].fill(0x90);
        // mov eax, 0x48909090 from 12 on
        code[12..17].copy_from_slice(&[0xb8, 0x90, 0x90, 0x90, 0x48]);
        code[17..20].copy_from_slice(&[0x0f, 0xae, 0x27]);
        assert_eq!(judge(&code, true), Verdict::Unclear);
        code[17..20].copy_from_slice(&[0x0f, 0xa2, 0x90]);
        assert_eq!(judge(&code, true), Verdict::Telling(Telling { cpuids: vec![None], others: vec![] }));
    }
}
