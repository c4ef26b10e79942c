//! The system calls behind a tracee: clone, execve of a file in memory, ptrace, wait.
//!
//! Contract: between clone and execve the child only makes system calls, on memory that was made before.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::map::Map;

/// PTRACE_SYSEMU: run until a system call, and do not carry it out.
pub const SYSEMU: libc::c_uint = 31;
/// NT_X86_XSTATE.
const XSTATE: usize = 0x202;
/// How waitpid tells a system call from a SIGTRAP, with PTRACE_O_TRACESYSGOOD.
const CALL: i32 = libc::SIGTRAP | 0x80;

/// Why a tracee stopped, as waitpid says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    Call,
    Signal(i32),
}

pub fn request(
    process: libc::pid_t,
    request: libc::c_uint,
    address: *mut libc::c_void,
    data: *mut libc::c_void,
) -> io::Result<()> {
    // SAFETY: the callers pass what the request asks for: structures that outlive the call, or none.
    let result = unsafe { libc::ptrace(request, process, address, data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads or writes the extended state of a stopped tracee; gives the number of bytes.
pub fn register_set(process: libc::pid_t, direction: libc::c_uint, area: &mut [u8]) -> io::Result<usize> {
    let mut vector = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    request(process, direction, ptr::without_provenance_mut(XSTATE), (&raw mut vector).cast())?;
    Ok(vector.iov_len)
}

/// The code and the address of the signal that a tracee stopped with.
pub fn signal_of(process: libc::pid_t) -> Option<(i32, u64)> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    request(process, libc::PTRACE_GETSIGINFO, ptr::null_mut(), info.as_mut_ptr().cast()).ok()?;
    // SAFETY: zeroed, then filled by the kernel: plain data in either case.
    let info = unsafe { info.assume_init() };
    // SAFETY: for the signals of faults the union holds an address; for others it is a number that nobody uses.
    Some((info.si_code, unsafe { info.si_addr() } as u64))
}

/// Waits for the next stop; `None` when the process has ended.
pub fn wait(process: libc::pid_t) -> Option<Wait> {
    let mut status = 0;
    loop {
        // SAFETY: plain system call; the status is ours.
        let result = unsafe { libc::waitpid(process, &raw mut status, libc::__WALL) };
        if result == process {
            break;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
    if !libc::WIFSTOPPED(status) {
        return None;
    }
    Some(match status >> 8 {
        CALL => Wait::Call,
        other => Wait::Signal(other & 0xff),
    })
}

/// A descriptor of the same file that is not among the first ten.
fn high(file: &File) -> io::Result<OwnedFd> {
    // SAFETY: plain system call on a descriptor that we hold.
    let fd = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 10) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What the child needs, made by the parent.
struct Beginning<'a> {
    program: OwnedFd,
    files: Vec<OwnedFd>,
    empty: &'a CStr,
    arguments: [*const libc::c_char; 2],
    environment: [*const libc::c_char; 1],
}

/// Has the system not tell this process of children that stop. It would send SIGCHLD at every stop of a tracee, and some
/// other thread would be woken for that, in which a signal that comes then may get lost: Python sees signals in its first
/// thread only.
fn silence_stops() -> io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: reads the action, and writes it back with a flag more; both structures are ours.
    unsafe {
        if libc::sigaction(libc::SIGCHLD, ptr::null(), action.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut action = action.assume_init();
        if action.sa_flags & libc::SA_NOCLDSTOP == 0 {
            action.sa_flags |= libc::SA_NOCLDSTOP;
            if libc::sigaction(libc::SIGCHLD, &raw const action, ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// Bytes of the child's stack until it is another program.
const STACK: usize = 64 << 10;

/// Starts `program` as a traced child in a process group of its own, with `files` as its only descriptors, from 0 on.
/// It is stopped at its first instruction.
pub fn spawn(program: &File, files: &[&File]) -> io::Result<libc::pid_t> {
    silence_stops()?;
    let beginning = Beginning {
        program: high(program)?,
        files: files.iter().map(|file| high(file)).collect::<io::Result<Vec<OwnedFd>>>()?,
        empty: c"",
        arguments: [c"ringzero-user".as_ptr(), ptr::null()],
        environment: [ptr::null()],
    };
    let stack = Map::anonymous(STACK)?;
    let data = ptr::from_ref(&beginning).cast_mut().cast();
    // The child borrows our memory until it is another program, as with vfork: nothing of ours is copied.
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: this thread waits until the child has another program or has ended, so stack and data outlive its use of them;
    // it runs on a stack of its own and makes system calls alone, see `child`.
    let process = unsafe { libc::clone(child, stack.base().as_ptr().add(STACK).cast(), flags, data) };
    if process < 0 {
        return Err(io::Error::last_os_error());
    }
    match wait(process) {
        Some(Wait::Signal(libc::SIGTRAP)) => Ok(process),
        Some(_) => {
            // SAFETY: a signal to a child that was not waited for.
            unsafe { libc::kill(process, libc::SIGKILL) };
            while wait(process).is_some() {}
            Err(io::Error::other("a traced child did not begin with a trap"))
        }
        None => Err(io::Error::other("the host does not let a child be traced")),
    }
}

extern "C" fn child(data: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the parent passes what it keeps until we are another program. Only system calls follow, on descriptors and
    // memory that it made; none of them changes that memory, but for the signals that are let through.
    unsafe {
        let beginning = &*data.cast::<Beginning<'_>>();
        // What is typed at the terminal is not for it. But it stays in the session: Linux shares processors out by session first
        // (sched_autogroup), and whoever waits for a process of another one waits until its turn comes.
        libc::setpgid(0, 0);
        let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
        for (number, file) in beginning.files.iter().enumerate() {
            libc::dup2(file.as_raw_fd(), number as i32);
        }
        // All others, the program's but for a moment.
        libc::syscall(libc::SYS_close_range, beginning.files.len(), u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) == 0 {
            // A handler of the parent's that ran here would run in its memory: signals come through where there is none.
            let mut none = MaybeUninit::<libc::sigset_t>::zeroed();
            libc::sigemptyset(none.as_mut_ptr());
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGCHLD, libc::SIGUSR1, libc::SIGUSR2] {
                libc::signal(signal, libc::SIG_DFL);
            }
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
            let (arguments, environment) = (beginning.arguments.as_ptr(), beginning.environment.as_ptr());
            let program = beginning.program.as_raw_fd();
            libc::syscall(libc::SYS_execveat, program, beginning.empty.as_ptr(), arguments, environment, 0x1000);
        }
        libc::_exit(127)
    }
}
