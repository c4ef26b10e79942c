//! What code may be run as it stands. Some instructions work in user code and tell of the host, or do something else than the
//! guest's processor would: those pages are left to the translator. (SGDT and its kin, which x86 cannot trap without UMIP,
//! are why it is not virtualizable in Popek and Goldberg's sense.) Isolation does not depend on this: a program that hides such
//! an instruction learns a number of the host's, and can do nothing with it.

use iced_x86::{Decoder, DecoderOptions};
use x86::PAGE_SIZE;

/// The longest instruction: one that began in the page before may end in the first bytes of this one, and nobody knows.
const LONGEST: usize = 15;
/// How far before a suspicious place decoding begins, and how many beginnings are tried. Decoding soon falls into step
/// wherever it begins, so most of them come across the place if an instruction is there, and few if none is.
const FAR: usize = 96;
const BEGINNINGS: usize = 32;

/// Whether two bytes and what follows them may be the opcode of such an instruction.
fn is_suspicious(code: &[u8], has_f3: bool) -> bool {
    let modrm = code.get(2).copied();
    let field = modrm.map(|byte| byte >> 3 & 7);
    let is_register = modrm.is_some_and(|byte| byte >= 0xc0);
    match (code[0], code[1]) {
        // INT 0x80 and SYSENTER enter the host's kernel by its back doors, which keep less of the registers.
        (0xcd, 0x80) | (0x0f, 0x34) => true,
        // RDTSC, RDPMC, CPUID.
        (0x0f, 0x31 | 0x33 | 0xa2) => true,
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

/// Whether what begins at `place` is an instruction, and not part of one, as far as the code before it tells.
fn is_instruction(code: &[u8], place: usize) -> bool {
    let first = place.saturating_sub(FAR);
    let last = place.min(first + BEGINNINGS);
    let mut found = 0;
    for begin in first..=last {
        let mut decoder = Decoder::new(64, &code[begin..], DecoderOptions::NONE);
        let mut at = begin;
        while at < place {
            let instruction = decoder.decode();
            let end = at + instruction.len().max(1);
            // Prefixes of the instruction come before its opcode.
            if end > place && (at..place).all(|prefix| is_prefix(code[prefix])) {
                break;
            }
            at = end;
        }
        found += usize::from(at <= place);
    }
    2 * found > last - first
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x40..=0x4f | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65)
}

/// Whether the code of a page can be run as it stands.
#[must_use]
pub fn is_plain(code: &[u8; PAGE_SIZE as usize]) -> bool {
    let mut from = LONGEST;
    while let Some(step) = code[from..].iter().position(|byte| matches!(byte, 0x0f | 0xcd)) {
        let place = from + step;
        let rest = &code[place..];
        // Of one that goes on in the next page the first byte says too little; of two the worst is taken.
        let has_f3 = code[place - 2..place].contains(&0xf3);
        if rest.len() >= 2 && is_suspicious(rest, has_f3) && is_instruction(code, place) {
            return false;
        }
        from = place + 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(is_plain(&page(0, &[])));
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
            assert!(is_plain(&page(0x100, code)), "{code:x?}");
        }
    }

    #[test]
    fn what_tells_of_the_host_is_found_wherever_it_is() {
        let bad: [&[u8]; 16] = [
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
            for at in [0x10, 0x108, 0x10b, 0x777, PAGE_SIZE as usize - code.len()] {
                let mut page = page(at, code);
                if at % 8 != 0 {
                    // In the middle of an instruction of the text: give it a beginning of its own.
                    page[at - 8..at].fill(0x90);
                }
                assert!(!is_plain(&page), "{code:x?} at {at:#x}");
            }
        }
    }

    #[test]
    fn constants_that_look_like_one_are_none() {
        // mov ecx, 0x0f; mov eax, 0x80cd; jz +0x10f
        for code in [&[0xb9, 0x0f, 0, 0, 0][..], &[0xb8, 0xcd, 0x80, 0, 0], &[0x0f, 0x84, 0x0f, 0x01, 0, 0]] {
            assert!(is_plain(&page(0x108, code)), "{code:x?}");
        }
    }

    #[test]
    fn what_goes_on_in_the_next_page_is_judged_by_two_bytes() {
        let end = PAGE_SIZE as usize;
        assert!(is_plain(&page(end - 1, &[0x0f])));
        assert!(!is_plain(&page(end - 8, &[0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x01])));
        assert!(is_plain(&page(end - 8, &[0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x05])));
    }
}
