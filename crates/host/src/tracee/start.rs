//! How a tracee comes to be empty: the program that it begins with is one page of ours, which then unmaps all else.

use std::fs::File;
use std::io::{self, Write};
use std::ptr;

use super::filter;
use super::spawn::{self, Wait};
use super::{Order, Registers, Tracee, VECTORS, XSTATE_BV};
use crate::map::{Map, PAGE, Protection, memfd};
use crate::random;

/// The tracee's descriptors: that of its orders, which it closes, and behind it the files whose pages it maps.
const ORDERS: i32 = 0;

/// The descriptor of a file, as an argument of a system call.
pub fn descriptor(file: usize) -> u64 {
    file as u64 + 1
}

/// Our own pages in it: the program, and the orders.
pub const PAGES: u64 = 2;

/// CS and SS of every 64-bit process under Linux.
pub const SELECTORS: (u64, u64) = (0x33, 0x2b);

/// Where the code begins in its page, behind the headers.
const CODE: u64 = 0x100;

/// Carries out R12 orders from RBX on, as far as none fails, then traps.
///
/// ```text
/// loop:  mov rax, [rbx]; mov rdi, [rbx+8]; mov rsi, [rbx+16]; mov rdx, [rbx+24]
///        mov r10, [rbx+32]; mov r8, [rbx+40]; mov r9, [rbx+48]
/// call:  syscall
///        cmp rax, -4096; ja end
///        add rbx, 56; dec r12; jnz loop
/// end:   int3
/// ```
const PROGRAM: [u8; 50] = [
    0x48, 0x8b, 0x03, 0x48, 0x8b, 0x7b, 0x08, 0x48, 0x8b, 0x73, 0x10, 0x48, 0x8b, 0x53, 0x18, 0x4c, 0x8b, 0x53, 0x20,
    0x4c, 0x8b, 0x43, 0x28, 0x4c, 0x8b, 0x4b, 0x30, 0x0f, 0x05, 0x48, 0x3d, 0x00, 0xf0, 0xff, 0xff, 0x77, 0x09, 0x48,
    0x83, 0xc3, 0x38, 0x49, 0xff, 0xcc, 0x75, 0xd2, 0xcc, 0xcc, 0xcc, 0xcc,
];
pub const LOOP: u64 = CODE;
const CALL: u64 = CODE + 27;

/// What the filter and the name need at the end of the page of orders.
const TAIL: usize = 256;
pub const MOST_ORDERS: usize = (PAGE - TAIL) / size_of::<Order>();

/// Components that a process may have though it never used them: PKRU, which Linux sets.
pub const INITIAL_COMPONENTS: u64 = 1 << 9;

/// Loads the first page of the file as code, at `base`.
fn image(base: u64) -> Vec<u8> {
    let mut image = vec![0; PAGE];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // The ELF header: 64 bit, little endian, version 1, executable, x86-64.
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &(base + CODE).to_le_bytes());
    // Program headers: from 64 on, one, of 56 bytes.
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1, 0]);
    // PT_LOAD, readable and executable, of the whole page.
    put(64, &[1, 0, 0, 0, 5, 0, 0, 0]);
    for (at, value) in [(72, 0), (80, base), (88, base), (96, PAGE as u64), (104, PAGE as u64), (112, PAGE as u64)] {
        put(at, &value.to_le_bytes());
    }
    put(CODE as usize, &PROGRAM);
    image
}

/// An address that no ordinary program has anything near: those have their code at the bottom, or in the last two of 128 TiB
/// and around 0x55..., and their stacks at the top.
fn base() -> u64 {
    let mut bytes = [0; 8];
    // Without randomness the place is always the same, which is as good.
    let _ = random::fill(&mut bytes);
    0x1000_0000_0000 + (u64::from_le_bytes(bytes) & 0xf_ffff_ffff & !(PAGE as u64 - 1))
}

pub fn no_registers() -> Registers {
    // SAFETY: a structure of integers.
    unsafe { std::mem::zeroed() }
}

/// Writes orders where the tracee reads them.
pub fn put(map: &Map, orders: &[Order]) {
    assert!(orders.len() <= MOST_ORDERS, "too many orders at once");
    // SAFETY: the map is ours, writable and large enough, as just checked; the tracee is stopped.
    unsafe { ptr::copy_nonoverlapping(orders.as_ptr(), map.base().as_ptr().cast(), orders.len()) };
}

fn put_bytes(map: &Map, at: usize, bytes: &[u8]) {
    assert!(at + bytes.len() <= map.size());
    // SAFETY: as above.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), map.base().as_ptr().add(at), bytes.len()) };
}

/// Has a stopped tracee run its program until it traps.
pub fn carry_out(process: libc::pid_t, base: u64, from: u64, count: u64) -> io::Result<()> {
    let mut registers = no_registers();
    (registers.rip, registers.rbx, registers.r12) = (base + from, base + PAGE as u64, count);
    run_program(process, &mut registers)
}

fn run_program(process: libc::pid_t, registers: &mut Registers) -> io::Result<()> {
    (registers.cs, registers.ss) = SELECTORS;
    registers.orig_rax = u64::MAX;
    spawn::request(process, libc::PTRACE_SETREGS, ptr::null_mut(), ptr::from_mut(registers).cast())?;
    loop {
        spawn::request(process, libc::PTRACE_CONT, ptr::null_mut(), ptr::null_mut())?;
        match spawn::wait(process) {
            Some(Wait::Signal(libc::SIGTRAP)) => break,
            // A kick: whoever sent it is told when the tracee is next to run.
            Some(Wait::Signal(super::KICK)) => {}
            Some(_) => return Err(io::Error::other("a traced child left its orders")),
            None => return Err(io::Error::other("a traced child has ended")),
        }
    }
    spawn::request(process, libc::PTRACE_GETREGS, ptr::null_mut(), ptr::from_mut(registers).cast())?;
    if registers.r12 == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-(registers.rax as i32))) }
}

pub fn start(files: &[&File]) -> io::Result<Tracee> {
    let base = base();
    let mut program = memfd(c"ringzero-user", 0)?;
    program.write_all(&image(base))?;
    let orders_file = memfd(c"ringzero-orders", PAGE as u64)?;
    let orders = Map::shared(&orders_file, PAGE, Protection::ReadWrite)?;
    let process = spawn::spawn(&program, &[&[&orders_file], files].concat())?;
    // From here on the process goes when the tracee is dropped.
    let mut tracee = Tracee {
        process,
        base,
        orders,
        vectors: Vec::new(),
        has_vectors: false,
        on: None,
        breaks: Vec::new(),
        forbids_cpuid: false,
        is_gone: false,
    };
    let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
    spawn::request(process, libc::PTRACE_SETOPTIONS, ptr::null_mut(), ptr::without_provenance_mut(options as usize))?;

    let mut registers = no_registers();
    let page = PAGE as u64;
    let shared = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
    registers.rip = base + CALL;
    registers.r12 = 1;
    registers.rax = libc::SYS_mmap as u64;
    (registers.rdi, registers.rsi, registers.rdx) = (base + page, page, libc::PROT_READ as u64);
    (registers.r10, registers.r8, registers.r9) = (shared, ORDERS as u64, 0);
    run_program(process, &mut registers)?;

    // At the end of the page: the filter, and what names it.
    let filter = filter::program();
    // SAFETY: sock_filter is plain data without padding.
    let bytes = unsafe { std::slice::from_raw_parts(filter.as_ptr().cast::<u8>(), size_of_val(&filter)) };
    let (name_at, filter_at) = (PAGE - TAIL, PAGE - TAIL + 16);
    let at = |offset: usize| base + page + offset as u64;
    put_bytes(&tracee.orders, filter_at, &(filter::LENGTH as u64).to_le_bytes());
    put_bytes(&tracee.orders, filter_at + 8, &at(filter_at + 16).to_le_bytes());
    put_bytes(&tracee.orders, filter_at + 16, bytes);
    put_bytes(&tracee.orders, name_at, b"ringzero-user\0");
    let control = |what: i32, arguments: [u64; 2]| {
        Order::new(libc::SYS_prctl, [what as u64, arguments[0], arguments[1], 0, 0, 0])
    };
    let end = base + PAGES * page;
    tracee.order(&[
        Order::new(libc::SYS_close, [ORDERS as u64, 0, 0, 0, 0, 0]),
        Order::unmap(0, base),
        Order::unmap(end, super::USER.end - end),
        control(libc::PR_SET_NAME, [at(name_at), 0]),
        control(libc::PR_SET_NO_NEW_PRIVS, [1, 0]),
        control(libc::PR_SET_SECCOMP, [libc::SECCOMP_MODE_FILTER as u64, at(filter_at)]),
    ])?;

    let mut area = vec![0; 64 << 10];
    let size = spawn::register_set(process, libc::PTRACE_GETREGSET, &mut area)?;
    if size < VECTORS {
        return Err(io::Error::other("the host keeps no AVX state"));
    }
    area.truncate(size);
    // All but the first three components begin anew at every run; PKRU must be what the kernel set.
    let mut present = [0; 8];
    present.copy_from_slice(&area[XSTATE_BV..XSTATE_BV + 8]);
    area[VECTORS..].iter_mut().filter(|_| u64::from_le_bytes(present) & INITIAL_COMPONENTS == 0).for_each(|it| *it = 0);
    tracee.vectors = area;
    Ok(tracee)
}
