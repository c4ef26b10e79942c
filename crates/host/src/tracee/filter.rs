//! The filter of a tracee's system calls (seccomp): should the tracer ever let it make one, it can only map, unmap and protect
//! memory of the files it holds, and say whether CPUID faults. The calls of the legacy vsyscall page, which Linux carries out
//! without a system call instruction, send it SIGSYS: were it stopped within one (SECCOMP_RET_TRACE), Linux would end it for
//! going on elsewhere.

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

use super::breaks::ARCH_CPUID;

const ALLOWED: [i64; 3] = [libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect];
const STOPPING: [i64; 3] = [libc::SYS_gettimeofday, libc::SYS_time, libc::SYS_getcpu];
/// The one that is allowed with one first argument alone.
const LIMITED: (i64, u32) = (libc::SYS_arch_prctl, ARCH_CPUID);
pub const LENGTH: usize = 5 + ALLOWED.len() + STOPPING.len() + 6;

/// AUDIT_ARCH_X86_64, which libc does not name on every target.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Places in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
/// The lower half, which is all that arch_prctl looks at.
const FIRST_ARGUMENT: u32 = 16;

const fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

const fn jump_if(value: u32, then: usize, other: usize) -> sock_filter {
    sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt: then as u8, jf: other as u8, k: value }
}

const fn end(action: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: action }
}

/// The program, for `PR_SET_SECCOMP`.
pub fn program() -> [sock_filter; LENGTH] {
    let kill = end(libc::SECCOMP_RET_KILL_PROCESS);
    let mut program = [kill; LENGTH];
    program[0] = load(ARCH);
    program[1] = jump_if(ARCHITECTURE, 1, 0);
    program[3] = load(NUMBER);
    // At the end: the limited call's argument is looked at, then what becomes of the call.
    let (limited, trap, allow) = (LENGTH - 5, LENGTH - 2, LENGTH - 1);
    let targets = ALLOWED.map(|call| (call, allow)).into_iter().chain(STOPPING.map(|call| (call, trap)));
    for ((call, target), at) in targets.chain([(LIMITED.0, limited)]).zip(4..) {
        program[at] = jump_if(call as u32, target - at - 1, 0);
    }
    program[limited] = load(FIRST_ARGUMENT);
    program[limited + 1] = jump_if(LIMITED.1, allow - limited - 2, 0);
    program[trap] = end(libc::SECCOMP_RET_TRAP);
    program[allow] = end(libc::SECCOMP_RET_ALLOW);
    program
}
