//! Addresses, widths, locked and read-modify-write forms, division, branches.

use x86::fault::page_fault::{PRESENT, WRITE};
use x86::rflags::{AF, CF, OF, PF, SF, ZF};
use x86::state::gpr::{R8, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use x86::{GuestFault, Gva, vector};

use super::machine::{CODE, DATA, Machine, STACK, handler};
use crate::interpret::Flow;

#[test]
fn narrow_writes_keep_and_32_bit_writes_clear() {
    // mov al, 1; mov ah, 2; mov ax, 0x304; mov eax, 5
    let mut machine = Machine::new(&[0xb0, 1, 0xb4, 2, 0x66, 0xb8, 4, 3, 0xb8, 5, 0, 0, 0]);
    machine.set(RAX, u64::MAX).step();
    assert_eq!(machine.gpr(RAX), 0xffff_ffff_ffff_ff01);
    assert_eq!(machine.step().gpr(RAX), 0xffff_ffff_ffff_0201);
    assert_eq!(machine.step().gpr(RAX), 0xffff_ffff_ffff_0304);
    assert_eq!(machine.step().gpr(RAX), 5);
}

#[test]
fn high_bytes_and_rex_bytes_differ() {
    // mov ah, ch; mov spl, cl; movzx eax, dh
    let mut machine = Machine::new(&[0x88, 0xec, 0x40, 0x88, 0xcc, 0x0f, 0xb6, 0xc6]);
    machine.set(RCX, 0xaabb).set(RDX, 0xcc00).steps(3);
    assert_eq!(machine.gpr(RSP), STACK & !0xff | 0xbb);
    assert_eq!(machine.gpr(RAX), 0xcc);
    let mut machine = Machine::new(&[0x88, 0xec]);
    assert_eq!(machine.set(RCX, 0xaabb).step().gpr(RAX), 0xaa00);
}

#[test]
fn addresses() {
    // mov rax, [rbx + rcx*8 - 8]
    let mut machine = Machine::new(&[0x48, 0x8b, 0x44, 0xcb, 0xf8]);
    machine.poke(DATA + 16, &0x1122_3344_5566_7788_u64.to_le_bytes());
    machine.set(RBX, DATA).set(RCX, 3).step();
    assert_eq!(machine.gpr(RAX), 0x1122_3344_5566_7788);
    // mov eax, [rip + 0x10]: relative to the end of the instruction
    let mut machine = Machine::new(&[0x8b, 0x05, 0x10, 0, 0, 0]);
    machine.poke(CODE + 0x16, &[1, 2, 3, 4]);
    assert_eq!(machine.step().gpr(RAX), 0x0403_0201);
    // lea eax, [ebx + ecx] wraps at 32 bits; lea rax, [ebx + ecx], too
    for code in [&[0x67, 0x8d, 0x04, 0x0b][..], &[0x67, 0x48, 0x8d, 0x04, 0x0b]] {
        let mut machine = Machine::new(code);
        machine.set(RBX, 0xffff_ffff).set(RCX, 0xf_0000_0003).step();
        assert_eq!(machine.gpr(RAX), 2);
    }
    // mov rax, gs:[rbx]
    let mut machine = Machine::new(&[0x65, 0x48, 0x8b, 0x03]);
    machine.cpu().segments[x86::seg::GS].base = DATA;
    machine.poke(DATA + 8, &[9]);
    assert_eq!(machine.set(RBX, 8).step().gpr(RAX), 9);
    // movabs al, [DATA]
    let mut machine = Machine::new(&[0xa0, 0, 0, 2, 0, 0, 0, 0, 0]);
    machine.poke(DATA, &[7]);
    assert_eq!(machine.step().gpr(RAX), 7);
}

#[test]
fn addresses_that_are_not_canonical() {
    // mov al, [rbx]; mov al, [rbp]; mov al, fs:[rbp]
    for (code, fault) in [
        (&[0x8a, 0x03][..], GuestFault::GP0),
        (&[0x8a, 0x45, 0x00], GuestFault::SS0),
        (&[0x64, 0x8a, 0x45, 0x00], GuestFault::GP0),
    ] {
        let mut machine = Machine::new(code);
        machine.set(RBX, 1 << 47).set(RBP, 1 << 47);
        assert_eq!(machine.execute(), Err(fault), "{code:x?}");
    }
}

#[test]
fn what_changes_memory_faults_as_a_write() {
    // add [rbx], eax; cmp [rbx], eax; lock add [rbx], eax; xchg [rbx], eax; bts [rbx], rcx; shl dword [rbx], cl
    for (code, error) in [
        (&[0x01, 0x03][..], WRITE),
        (&[0x39, 0x03], 0),
        (&[0xf0, 0x01, 0x03], WRITE),
        (&[0x87, 0x03], WRITE),
        (&[0x48, 0x0f, 0xab, 0x0b], WRITE),
        (&[0xd3, 0x23], WRITE),
    ] {
        let mut machine = Machine::with_paging(code);
        machine.entry(DATA >> 12, 0);
        machine.set(RBX, DATA).set(RCX, 3);
        assert_eq!(machine.execute(), Err(GuestFault::page(Gva(DATA), error)), "{code:x?}");
        machine.entry(DATA >> 12, DATA | 5);
        let wanted = if error == 0 { Ok(Flow::Next) } else { Err(GuestFault::page(Gva(DATA), WRITE | PRESENT)) };
        assert_eq!(machine.execute(), wanted, "{code:x?}");
        assert_eq!(machine.word(DATA), 0);
        assert_eq!(machine.gpr(RAX), 0);
    }
}

#[test]
fn a_write_across_pages_is_done_whole_or_not() {
    // mov [rbx], rax
    let mut machine = Machine::with_paging(&[0x48, 0x89, 0x03]);
    machine.entry((DATA >> 12) + 1, 0);
    machine.set(RBX, DATA + 0xffc).set(RAX, u64::MAX);
    assert_eq!(machine.execute(), Err(GuestFault::page(Gva(DATA + 0x1000), WRITE)));
    assert_eq!(machine.peek::<4>(DATA + 0xffc), [0; 4]);
    machine.entry((DATA >> 12) + 1, (DATA + 0x1000) | 7);
    machine.step();
    assert_eq!(machine.word(DATA + 0xffc), u64::MAX);
}

#[test]
fn bit_offsets_reach_far() {
    // bts [rbx], rax; with a negative offset; bt [rbx], imm wraps in the operand
    let mut machine = Machine::new(&[0x48, 0x0f, 0xab, 0x03]);
    machine.set(RBX, DATA + 64).set(RAX, 64 * 3 + 5).step();
    assert_eq!(machine.word(DATA + 64 + 24), 1 << 5);
    let mut machine = Machine::new(&[0x48, 0x0f, 0xab, 0x03]);
    machine.set(RBX, DATA + 64).set(RAX, -1_i64 as u64).step();
    assert_eq!(machine.word(DATA + 56), 1 << 63);
    // bts word [rbx], ax: 16 bits of offset, signed
    let mut machine = Machine::new(&[0x66, 0x0f, 0xab, 0x03]);
    machine.set(RBX, DATA + 64).set(RAX, 0x5_fffe).step();
    assert_eq!(machine.peek::<2>(DATA + 62), [0, 0x40]);
    // lock btc dword [rbx], 33
    let mut machine = Machine::new(&[0xf0, 0x0f, 0xba, 0x3b, 33]);
    machine.set(RBX, DATA).step();
    assert_eq!(machine.word(DATA), 2);
    assert_eq!(machine.flags() & CF, 0);
}

#[test]
fn compare_and_exchange() {
    // lock cmpxchg [rbx], ecx: equal
    let code = [0xf0, 0x0f, 0xb1, 0x0b];
    let mut machine = Machine::new(&code);
    machine.poke(DATA, &[1, 0, 0, 0, 9]);
    machine.set(RBX, DATA).set(RCX, 0xf_0000_0077).set(RAX, 0xf_0000_0001).step();
    assert_eq!(machine.word(DATA), 0x9_0000_0077);
    assert_eq!(machine.gpr(RAX), 0xf_0000_0001, "an equal comparison leaves all of RAX");
    assert_eq!(machine.flags(), ZF | PF);
    // not equal: 1 - 2
    let mut machine = Machine::new(&code);
    machine.poke(DATA, &[2]);
    machine.set(RBX, DATA).set(RCX, 5).set(RAX, 0xf_0000_0001).step();
    assert_eq!((machine.word(DATA), machine.gpr(RAX)), (2, 2));
    assert_eq!(machine.flags(), CF | PF | AF | SF);
    // lock cmpxchg8b [rbx]
    let mut machine = Machine::new(&[0xf0, 0x0f, 0xc7, 0x0b]);
    machine.poke(DATA, &0x0000_0002_0000_0001_u64.to_le_bytes());
    machine.set_flags(CF | OF).set(RBX, DATA).set(RAX, 1).set(RDX, 2).set(RCX, 7).step();
    assert_eq!(machine.word(DATA), 7 << 32 | DATA);
    assert_eq!(machine.flags(), CF | OF | ZF);
    // lock cmpxchg16b [rsi]: equal, then not
    let code = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];
    let mut machine = Machine::new(&code);
    machine.poke(DATA, &[1]);
    machine.set(RSI, DATA).set(RAX, 1).set(RBX, 5).set(RCX, 6).step();
    assert_eq!((machine.word(DATA), machine.word(DATA + 8)), (5, 6));
    machine.cpu().rip = CODE;
    machine.step();
    assert_eq!((machine.gpr(RAX), machine.gpr(RDX), machine.flags() & ZF), (5, 6, 0));
    machine.set(RSI, DATA + 8).cpu().rip = CODE;
    assert_eq!(machine.execute(), Err(GuestFault::GP0));
}

#[test]
fn exchange_and_add() {
    // lock xadd [rbx], rax; xchg [rbx], al
    let mut machine = Machine::new(&[0xf0, 0x48, 0x0f, 0xc1, 0x03, 0x86, 0x03]);
    machine.poke(DATA, &[40]);
    machine.set(RBX, DATA).set(RAX, 2).step();
    assert_eq!((machine.word(DATA), machine.gpr(RAX)), (42, 40));
    machine.step();
    assert_eq!((machine.word(DATA), machine.gpr(RAX)), (40, 42));
}

#[test]
fn lock_where_it_may_not_be() {
    // lock mov [rbx], eax; lock add eax, ebx; lock nop; lock cmp [rbx], eax
    for code in [&[0xf0, 0x89, 0x03][..], &[0xf0, 0x01, 0xd8], &[0xf0, 0x90], &[0xf0, 0x39, 0x03]] {
        let mut machine = Machine::new(code);
        assert_eq!(machine.step().rip(), handler(vector::UD), "{code:x?}");
    }
}

#[test]
fn fifteen_bytes_are_the_most() {
    let mut code = vec![0x66; 14];
    code.push(0x90);
    let mut machine = Machine::new(&code);
    assert_eq!(machine.step().rip(), CODE + 15);
    code.insert(0, 0x66);
    let mut machine = Machine::new(&code);
    assert_eq!(machine.step().rip(), handler(vector::GP));
}

#[test]
fn division() {
    // div rcx
    let div = [0x48, 0xf7, 0xf1];
    let mut machine = Machine::new(&div);
    machine.set(RDX, 1).set(RAX, 0).set(RCX, 3).step();
    assert_eq!((machine.gpr(RAX), machine.gpr(RDX)), (0x5555_5555_5555_5555, 1));
    let mut machine = Machine::new(&div);
    machine.set(RDX, 3).set(RCX, 3);
    assert_eq!(machine.execute(), Err(GuestFault::DE), "the quotient needs 65 bits");
    assert_eq!(Machine::new(&div).execute(), Err(GuestFault::DE), "by zero");
    // idiv rcx: -7 / 2, and the most negative number by -1
    let idiv = [0x48, 0xf7, 0xf9];
    let mut machine = Machine::new(&idiv);
    machine.set(RDX, u64::MAX).set(RAX, -7_i64 as u64).set(RCX, 2).step();
    assert_eq!((machine.gpr(RAX) as i64, machine.gpr(RDX) as i64), (-3, -1));
    let mut machine = Machine::new(&idiv);
    machine.set(RDX, u64::MAX).set(RAX, 1 << 63).set(RCX, u64::MAX);
    assert_eq!(machine.execute(), Err(GuestFault::DE));
    let mut machine = Machine::new(&idiv);
    machine.set(RDX, 1 << 63).set(RCX, u64::MAX);
    assert_eq!(machine.execute(), Err(GuestFault::DE), "the most negative of 128 bits");
    // idiv cl: AX by CL into AL, AH
    let mut machine = Machine::new(&[0xf6, 0xf9]);
    machine.set(RAX, 0x7777_0000_0000_ff80).set(RCX, 0x10).step();
    assert_eq!(machine.gpr(RAX), 0x7777_0000_0000_00f8);
}

#[test]
fn branches() {
    // jz +2, at ZF clear and set
    assert_eq!(Machine::new(&[0x74, 2]).step().rip(), CODE + 2);
    assert_eq!(Machine::new(&[0x74, 2]).set_flags(ZF).step().rip(), CODE + 4);
    // jl: SF != OF; jg: not ZF and SF == OF
    assert_eq!(Machine::new(&[0x7c, 2]).set_flags(OF).step().rip(), CODE + 4);
    assert_eq!(Machine::new(&[0x7c, 2]).set_flags(OF | SF).step().rip(), CODE + 2);
    assert_eq!(Machine::new(&[0x7f, 2]).set_flags(OF | SF | ZF).step().rip(), CODE + 2);
    // loop: RCX 1 falls through; loopne with ZF; the 32-bit count clears the upper half
    assert_eq!(Machine::new(&[0xe2, 0xfe]).set(RCX, 1).step().rip(), CODE + 2);
    assert_eq!(Machine::new(&[0xe2, 0xfe]).step().gpr(RCX), u64::MAX);
    assert_eq!(Machine::new(&[0xe0, 0xfe]).set(RCX, 9).set_flags(ZF).step().rip(), CODE + 2);
    let mut machine = Machine::new(&[0x67, 0xe2, 0xfd]);
    machine.set(RCX, 0x7_0000_0002).step();
    assert_eq!((machine.rip(), machine.gpr(RCX)), (CODE, 1));
    // jrcxz, jecxz
    assert_eq!(Machine::new(&[0xe3, 2]).set(RCX, 1 << 32).step().rip(), CODE + 2);
    assert_eq!(Machine::new(&[0x67, 0xe3, 2]).set(RCX, 1 << 32).step().rip(), CODE + 5);
    // jmp rax to where no code can be: the fault is at the jump
    let mut machine = Machine::new(&[0xff, 0xe0]);
    assert_eq!(machine.set(RAX, 1 << 62).execute(), Err(GuestFault::GP0));
}

#[test]
fn calls_check_the_target_before_they_push() {
    // call rax
    let mut machine = Machine::new(&[0xff, 0xd0]);
    assert_eq!(machine.set(RAX, 1 << 62).execute(), Err(GuestFault::GP0));
    assert_eq!((machine.gpr(RSP), machine.word(STACK - 8)), (STACK, 0));
    // call [rsp + 8] uses RSP from before; ret 16
    let mut machine = Machine::new(&[0xff, 0x54, 0x24, 8, 0x90, 0xc2, 16, 0]);
    machine.poke(STACK + 8, &(CODE + 5).to_le_bytes());
    machine.step();
    assert_eq!((machine.rip(), machine.word(STACK - 8)), (CODE + 5, CODE + 4));
    machine.step();
    assert_eq!((machine.rip(), machine.gpr(RSP)), (CODE + 4, STACK + 16));
}

#[test]
fn code_is_fetched_across_pages() {
    // mov eax, imm32, whose last two bytes are in the next page
    let mut machine = Machine::with_paging(&[]);
    machine.poke(CODE + 0xffd, &[0xb8, 1, 2, 3, 4]);
    machine.cpu().rip = CODE + 0xffd;
    assert_eq!(machine.step().gpr(RAX), 0x0403_0201);
    machine.entry((CODE >> 12) + 1, 0);
    machine.cpu().rip = CODE + 0xffd;
    machine.step();
    assert_eq!((machine.rip(), machine.vcpu.cpu.cr2), (handler(vector::PF), CODE + 0x1000));
}

#[test]
fn a_loop_that_rewrites_itself_runs_what_it_wrote() {
    // loop: mov al, 0; add bl, al; inc byte [rip + (imm of mov)]; dec ecx; jnz loop; hlt
    let code = [0xb0, 0, 0x00, 0xc3, 0xfe, 0x05, 0xf7, 0xff, 0xff, 0xff, 0xff, 0xc9, 0x75, 0xf2, 0xf4];
    let mut machine = Machine::new(&code);
    machine.set(RCX, 10).run_to_halt();
    assert_eq!(machine.gpr(RBX), 45);
}

#[test]
fn conversions_and_moves() {
    // movsx rax, cl; movsxd r8, eax; cbw; cwd; cdq; cqo; cwde; cdqe
    let mut machine = Machine::new(&[0x48, 0x0f, 0xbe, 0xc1, 0x4c, 0x63, 0xc0]);
    machine.set(RCX, 0x80).steps(2);
    assert_eq!((machine.gpr(RAX), machine.gpr(R8)), (0xffff_ffff_ffff_ff80, 0xffff_ffff_ffff_ff80));
    for (code, rax, rdx, wanted) in [
        (&[0x66, 0x98][..], 0x1280, 0, (0xff80, 0)),
        (&[0x98], 0xf_0000_8000, 0, (0xffff_8000, 0)),
        (&[0x48, 0x98], 0x8000_0000, 0, (0xffff_ffff_8000_0000, 0)),
        (&[0x66, 0x99], 0x8000, 0x7_0000, (0x8000, 0x7_ffff)),
        (&[0x99], 0x8000_0000, u64::MAX, (0x8000_0000, 0xffff_ffff)),
        (&[0x48, 0x99], 1, u64::MAX, (1, 0)),
    ] {
        let mut machine = Machine::new(code);
        machine.set(RAX, rax).set(RDX, rdx).step();
        assert_eq!((machine.gpr(RAX), machine.gpr(RDX)), wanted, "{code:x?}");
    }
    // movbe [rbx], eax; xlatb
    let mut machine = Machine::new(&[0x0f, 0x38, 0xf1, 0x03, 0xd7]);
    machine.set(RBX, DATA).set(RAX, 0x0102_0304).step();
    assert_eq!(machine.peek::<4>(DATA), [1, 2, 3, 4]);
    machine.set(RAX, 0xff02).step();
    assert_eq!(machine.gpr(RAX), 0xff03);
}

#[test]
fn ports() {
    // in eax, dx; out 0x80, al; in ax, 0x60
    let mut machine = Machine::new(&[0xed, 0xe6, 0x80, 0x66, 0xe5, 0x60]);
    machine.set(RAX, u64::MAX).set(RDX, 0x1_03f8).step();
    assert_eq!(machine.gpr(RAX), 0x4030_2011);
    machine.steps(2);
    assert_eq!(machine.ports.written, [(0x80, 1, 0x11)]);
    assert_eq!(machine.gpr(RAX), 0x4030_2012);
    assert_eq!(machine.gpr(RDI), 0);
}

#[test]
fn hints_of_all_ages_do_nothing() {
    for code in [
        &[0x0f, 0x1a, 0xc0][..],         // BNDLDX without MPX
        &[0xf3, 0x0f, 0x1a, 0xc0],       // BNDCL
        &[0x66, 0x0f, 0x1b, 0x03],       // BNDMOV
        &[0xf3, 0x0f, 0x1e, 0xc8],       // RDSSPD
        &[0xf3, 0x48, 0x0f, 0x1e, 0xc8], // RDSSPQ
        &[0xf3, 0x0f, 0x1e, 0xfa],       // ENDBR64
        &[0x0f, 0x0d, 0x0b],             // PREFETCHW
        &[0x0f, 0x0d, 0x03],             // PREFETCH
        &[0x0f, 0x0d, 0x1b],             // reserved prefetch
        &[0x0f, 0x0d, 0xc0],
        &[0x0f, 0x18, 0x23], // reserved hint
        &[0x0f, 0x18, 0xe0],
        &[0x0f, 0x19, 0x03],
        &[0x0f, 0x1c, 0x03], // CLDEMOTE
        &[0x0f, 0x1d, 0x03],
        &[0x0f, 0x1e, 0x03],
        &[0x0f, 0x1f, 0x44, 0, 0],
        &[0xf3, 0x90],
        &[0x66, 0x90],
        &[0x41, 0x90], // XCHG R8D, EAX, but both are zero
    ] {
        let mut machine = Machine::new(code);
        machine.set(RBX, 1 << 62);
        machine.step();
        assert_eq!(machine.rip(), CODE + code.len() as u64, "{code:x?}");
        assert_eq!((machine.gpr(RAX), machine.gpr(RBX)), (0, 1 << 62));
    }
}
