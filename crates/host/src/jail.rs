//! The jail of a process that runs one VM, and that of one that serves a folder to such a process.
//!
//! Of the first: from when it is entered the process makes only those system calls that a machine
//! needs while it runs, and gains no privileges. It opens no file, socket or other process, and starts no program but one that it
//! holds a descriptor of, as tracees are started. Only one whose guest has a network with a way out makes sockets: those of the
//! Internet, no others.
//!
//! Contract of the unsafe code: plain system calls on structures that outlive them.
//!
//! What is not allowed fails with EPERM, as if the system refused: a library that tries goes on without. seccomp(2) looks at
//! numbers alone, so what a number names (a process to be signalled, a range of memory) is not judged.

use std::io;

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter, sock_fprog};

/// Calls that any argument may be given to.
const ALLOWED: &[i64] = &[
    // Descriptors that are there, and pairs of new ones.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_listen,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_socketpair,
    libc::SYS_pipe2,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_memfd_create,
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    // Memory.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_msync,
    libc::SYS_brk,
    libc::SYS_membarrier,
    // Threads, time, signals.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_gettime,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_delete,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_wait4,
    libc::SYS_waitid,
    // What the process is.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_prlimit64,
    libc::SYS_setpgid,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_arch_prctl,
];

/// A call that is allowed when some bits of an argument's lower half are one of some values.
struct Limited {
    call: i64,
    argument: u32,
    bits: u32,
    values: &'static [u32],
}

/// CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET (Linux, include/uapi/linux/sched.h).
const NAMESPACES: u32 = 0x7e02_0080;

const LIMITED: &[Limited] = &[
    // Threads and tracees, which borrow our memory until they are another program: no copies, no namespaces of their own.
    Limited {
        call: libc::SYS_clone,
        argument: 0,
        bits: NAMESPACES | libc::CLONE_VM as u32,
        values: &[libc::CLONE_VM as u32],
    },
    // A program by its descriptor, and a file by its own.
    Limited { call: libc::SYS_execveat, argument: 4, bits: u32::MAX, values: &[libc::AT_EMPTY_PATH as u32] },
    Limited {
        call: libc::SYS_newfstatat,
        argument: 3,
        bits: libc::AT_EMPTY_PATH as u32,
        values: &[libc::AT_EMPTY_PATH as u32],
    },
    Limited {
        call: libc::SYS_statx,
        argument: 2,
        bits: libc::AT_EMPTY_PATH as u32,
        values: &[libc::AT_EMPTY_PATH as u32],
    },
    // FIONBIO and FIOCLEX, of all that an ioctl may be.
    Limited { call: libc::SYS_ioctl, argument: 1, bits: u32::MAX, values: &[0x5421, 0x5451] },
    Limited {
        call: libc::SYS_prctl,
        argument: 0,
        bits: u32::MAX,
        values: &[
            libc::PR_SET_NAME as u32,
            libc::PR_GET_NAME as u32,
            libc::PR_SET_TIMERSLACK as u32,
            libc::PR_SET_NO_NEW_PRIVS as u32,
            libc::PR_SET_SECCOMP as u32,
        ],
    },
    // Nobody is traced but who asked for it: no PTRACE_ATTACH, no PTRACE_SEIZE.
    Limited {
        call: libc::SYS_ptrace,
        argument: 0,
        bits: u32::MAX,
        values: &[
            libc::PTRACE_TRACEME,
            libc::PTRACE_PEEKUSER,
            libc::PTRACE_POKEUSER,
            libc::PTRACE_CONT,
            libc::PTRACE_GETREGS,
            libc::PTRACE_SETREGS,
            // PTRACE_SYSEMU and PTRACE_SYSEMU_SINGLESTEP.
            31,
            32,
            libc::PTRACE_SETOPTIONS,
            libc::PTRACE_GETSIGINFO,
            libc::PTRACE_GETREGSET,
            libc::PTRACE_SETREGSET,
        ],
    },
];

/// With a way out: sockets of IPv4 and IPv6, where they are bound, and whom they are connected to. A pair of Unix sockets is
/// connected when it is made.
const NETWORK: &[i64] = &[libc::SYS_bind, libc::SYS_connect];
const NETWORK_LIMITED: &[Limited] = &[Limited {
    call: libc::SYS_socket,
    argument: 0,
    bits: u32::MAX,
    values: &[libc::AF_INET as u32, libc::AF_INET6 as u32],
}];

/// What a process makes that serves a folder: files by their names, which it has resolved below the folder, and one socket that
/// is there. It starts nothing, reaches no other process, and makes no sockets.
const FOLDER: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_getdents64,
    libc::SYS_openat2,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_readlinkat,
    libc::SYS_linkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_utimensat,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// AUDIT_ARCH_X86_64.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Places in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

/// Skips so many instructions when the value is `value`, or is not.
fn jump(value: u32, equal: usize, other: usize) -> sock_filter {
    sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt: equal as u8, jf: other as u8, k: value }
}

fn end(action: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: action }
}

fn of_vm(has_network: bool) -> Vec<sock_filter> {
    let network = if has_network { (NETWORK, NETWORK_LIMITED) } else { (&[][..], &[][..]) };
    program(&[ALLOWED, network.0], &[LIMITED, network.1])
}

fn program(allowed: &[&[i64]], limited: &[&[Limited]]) -> Vec<sock_filter> {
    let allow = end(libc::SECCOMP_RET_ALLOW);
    let refuse = |error: i32| end(libc::SECCOMP_RET_ERRNO | error as u32);
    let mut program = vec![load(ARCH), jump(ARCHITECTURE, 1, 0), end(libc::SECCOMP_RET_KILL_PROCESS), load(NUMBER)];
    for call in allowed.iter().copied().flatten() {
        program.extend([jump(*call as u32, 0, 1), allow]);
    }
    // The C library then uses clone, whose flags can be looked at.
    program.extend([jump(libc::SYS_clone3 as u32, 0, 1), refuse(libc::ENOSYS)]);
    for limited in limited.iter().copied().flatten() {
        let mut part = vec![
            load(ARGUMENTS + 8 * limited.argument),
            sock_filter { code: (BPF_ALU | BPF_AND | BPF_K) as u16, jt: 0, jf: 0, k: limited.bits },
        ];
        for value in limited.values {
            part.extend([jump(*value, 0, 1), allow]);
        }
        part.push(refuse(libc::EPERM));
        program.push(jump(limited.call as u32, 0, part.len()));
        program.extend(part);
    }
    program.push(refuse(libc::EPERM));
    program
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts all threads of this process into the jail, for ever, and what they start; with `has_network`, one that makes sockets
/// of the Internet.
///
/// # Errors
/// When the system has no such filters; then nothing is filtered.
pub fn enter(has_network: bool) -> io::Result<()> {
    close(of_vm(has_network))
}

/// Puts this process into the jail of one that serves a folder.
///
/// # Errors
/// As [`enter`].
pub fn enter_with_folder() -> io::Result<()> {
    close(program(&[FOLDER], &[]))
}

fn close(mut program: Vec<sock_filter>) -> io::Result<()> {
    let filter = sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: see the head of the file.
    unsafe {
        check(libc::setrlimit(libc::RLIMIT_CORE, &raw const none).into())?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        let flags = libc::SECCOMP_FILTER_FLAG_TSYNC;
        check(libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_of_the_filter_reach_their_targets() {
        for program in [of_vm(false), of_vm(true), program(&[FOLDER], &[])] {
            assert!(program.len() < 4096);
            for (at, instruction) in program.iter().enumerate() {
                if instruction.code & 7 == BPF_JMP as u16 {
                    assert!(at + 1 + usize::from(instruction.jt.max(instruction.jf)) < program.len());
                }
            }
        }
        // No part is so long that its skip does not fit into a byte.
        assert!(LIMITED.iter().all(|limited| 3 + 2 * limited.values.len() < 256));
    }
}
