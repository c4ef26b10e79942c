//! A process of its own for code that is to run as it stands: an empty address space that we fill, whose every system call,
//! fault and trap stops it and comes to us.
//!
//! Contract: a [`Tracee`] is traced by the thread that made it, and only that thread may run it or change it. It has no
//! memory but the pages that [`Tracee::order`] maps from the file it was made for, and two pages of ours: a loop that carries
//! out orders, and the orders, which it can only read. It never carries out a system call while it runs for its owner
//! (PTRACE_SYSEMU), and a filter lets none through but those of our orders. It ends with its tracer.
//!
//! It can execute RDTSC and CPUID, as long as nothing else is asked for ([`Tracee::break_at`], [`Tracee::forbid_cpuid`]). To
//! forbid them always (PR_SET_TSC, ARCH_CPUID) would have every switch to the process and back write CR4 and an MSR, and
//! where the host is a virtual machine itself each of these is an exit: 24 microseconds instead of 4.

mod breaks;
mod filter;
mod spawn;
mod start;

use std::io;
use std::sync::atomic::{AtomicI32, Ordering, fence};
use std::sync::{Mutex, PoisonError};

pub use libc::user_regs_struct as Registers;

pub use self::breaks::BREAKS;
use crate::map::{Map, PAGE};

/// The first address that a tracee may map, and the first beyond: Linux gives a process no others.
pub const USER: std::ops::Range<u64> = 0x1_0000..0x7fff_ffff_f000;

/// What makes a tracee stop when somebody wants it to. It is never delivered.
const KICK: i32 = libc::SIGUSR1;

/// Codes of SIGSEGV: nothing is mapped there (SEGV_MAPERR), or not so (SEGV_ACCERR).
const MAPPING: i32 = 1;
const RIGHTS: i32 = 2;
/// The code of a SIGSYS that the filter has caused (SYS_SECCOMP); its address is where the call was made.
const FILTERED: i32 = 1;
/// The code of a SIGTRAP that TF has caused (TRAP_TRACE), and that of one by a breakpoint of ours (TRAP_HWBKPT).
const STEP: i32 = 2;
const BREAK: i32 = 4;

/// Why a tracee stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// At a system call, which was not carried out. RIP is behind it; RAX is in `orig_rax`.
    Call,
    /// At an instruction that accesses an address, or is to be fetched from there, against the rights of its page.
    Access(u64),
    /// By a trap: RIP is behind the instruction, which is INT3 or its like, or the first one after TF was set.
    Trap { is_step: bool },
    /// Before an instruction that [`Tracee::break_at`] named.
    Break,
    /// At an instruction that faults for another reason.
    Fault,
    /// Somebody called [`Kicker::kick`], now or some time ago.
    Kick,
    /// The process is gone, and what was in its registers, too.
    Gone,
}

/// Makes a running tracee stop, from any thread.
#[derive(Debug, Default)]
pub struct Kicker {
    /// The process that runs, or is about to; 0 for none.
    running: AtomicI32,
    /// Held while a signal is sent, so that the process is not gone meanwhile and its number another's.
    sending: Mutex<()>,
}

impl Kicker {
    /// Whoever runs a tracee looks for what is wanted of him after he announced it, so a kick after the wish was noted is never
    /// too early.
    pub fn kick(&self) {
        fence(Ordering::SeqCst);
        if self.running.load(Ordering::SeqCst) == 0 {
            return;
        }
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let process = self.running.load(Ordering::SeqCst);
        if process != 0 {
            // SAFETY: a signal to a child that was not waited for: it is announced, and the lock keeps it so.
            unsafe { libc::kill(process, KICK) };
        }
    }

    /// Announces that a tracee is about to run.
    pub fn announce(&self, tracee: &Tracee) {
        self.running.store(tracee.process, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Takes the announcement back.
    pub fn withdraw(&self) {
        self.running.store(0, Ordering::SeqCst);
        drop(self.sending.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// An order to a tracee: a system call that it carries out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Order {
    number: u64,
    arguments: [u64; 6],
}

/// What may be done with mapped pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    Read,
    Write,
    Execute,
}

impl Order {
    fn new(number: i64, arguments: [u64; 6]) -> Order {
        Order { number: number as u64, arguments }
    }

    /// Maps `size` bytes at `offset` of one of the tracee's files, in place of what was there.
    #[must_use]
    pub fn map(address: u64, size: u64, rights: Rights, file: usize, offset: u64) -> Order {
        let rights = match rights {
            Rights::Read => libc::PROT_READ,
            Rights::Write => libc::PROT_READ | libc::PROT_WRITE,
            Rights::Execute => libc::PROT_READ | libc::PROT_EXEC,
        };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        let arguments = [address, size, rights as u64, flags as u64, start::descriptor(file), offset];
        Order::new(libc::SYS_mmap, arguments)
    }

    /// Leaves nothing mapped in a range.
    #[must_use]
    pub fn unmap(address: u64, size: u64) -> Order {
        Order::new(libc::SYS_munmap, [address, size, 0, 0, 0, 0])
    }
}

/// Bytes that the x87, SSE and AVX state takes in the standard XSAVE format.
pub const VECTORS: usize = 832;

/// XSAVE components x87, SSE and AVX.
const COMPONENTS: u64 = 7;
const XSTATE_BV: usize = 512;

#[derive(Debug)]
pub struct Tracee {
    process: libc::pid_t,
    /// Where the loop that carries out orders is, and behind it the orders.
    base: u64,
    orders: Map,
    /// The whole XSAVE area of the host, of which ours is the first part.
    vectors: Vec<u8>,
    /// That part is what the tracee has.
    has_vectors: bool,
    /// The processor that it was last told to stay on.
    on: Option<usize>,
    /// Where it stops.
    breaks: Vec<u64>,
    forbids_cpuid: bool,
    is_gone: bool,
}

impl Tracee {
    /// Makes a tracee that can map pages of these files, as each was opened.
    ///
    /// # Errors
    /// When the host allows no such process: no tracing of children, no executable files in memory, no more processes.
    pub fn new(files: &[&std::fs::File]) -> io::Result<Tracee> {
        start::start(files)
    }

    /// Pages that the tracee's own machinery takes: nothing of the owner's may be mapped there.
    #[must_use]
    pub fn reserved(&self) -> std::ops::Range<u64> {
        self.base..self.base + start::PAGES * PAGE as u64
    }

    /// How many orders can be given at once.
    #[must_use]
    pub const fn most_orders() -> usize {
        start::MOST_ORDERS
    }

    /// Has the tracee carry out orders, at most [`Tracee::most_orders`]. Its registers are undefined afterwards.
    ///
    /// # Errors
    /// When the host refuses one (mostly: too many mappings); those behind it were not carried out.
    pub fn order(&mut self, orders: &[Order]) -> io::Result<()> {
        if orders.is_empty() {
            return Ok(());
        }
        start::put(&self.orders, orders);
        start::carry_out(self.process, self.base, start::LOOP, orders.len() as u64)
    }

    fn request(&self, request: libc::c_uint, data: *mut libc::c_void) -> io::Result<()> {
        spawn::request(self.process, request, std::ptr::null_mut(), data)
    }

    /// The registers at the last stop.
    ///
    /// # Errors
    /// Only when the process is gone.
    pub fn registers(&self) -> io::Result<Registers> {
        let mut registers = start::no_registers();
        self.request(libc::PTRACE_GETREGS, (&raw mut registers).cast())?;
        Ok(registers)
    }

    /// Sets the registers for the next run, but for the segment registers, which are those of any process.
    ///
    /// # Errors
    /// When the process is gone, or a value is one that no register can have.
    pub fn set_registers(&self, registers: &Registers) -> io::Result<()> {
        let mut registers = *registers;
        (registers.cs, registers.ss) = start::SELECTORS;
        (registers.ds, registers.es, registers.fs, registers.gs) = (0, 0, 0, 0);
        // It is not in a system call that could be begun again.
        registers.orig_rax = u64::MAX;
        self.request(libc::PTRACE_SETREGS, (&raw mut registers).cast())
    }

    /// Reads the x87, SSE and AVX state, all components present; false when the tracee has used others (AVX-512, AMX).
    ///
    /// # Errors
    /// Only when the process is gone.
    pub fn vectors(&mut self, area: &mut [u8; VECTORS]) -> io::Result<bool> {
        spawn::register_set(self.process, libc::PTRACE_GETREGSET, area)?;
        let mut present = [0; 8];
        present.copy_from_slice(&area[XSTATE_BV..XSTATE_BV + 8]);
        area[XSTATE_BV..XSTATE_BV + 64].fill(0);
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&COMPONENTS.to_le_bytes());
        // Bytes for software, of no meaning to the processor.
        area[464..XSTATE_BV].fill(0);
        let is_plain = u64::from_le_bytes(present) & !(COMPONENTS | start::INITIAL_COMPONENTS) == 0;
        self.vectors[..VECTORS].copy_from_slice(area);
        self.has_vectors = is_plain;
        Ok(is_plain)
    }

    /// Sets the x87, SSE and AVX state; the other components begin anew.
    ///
    /// # Errors
    /// When the process is gone, or MXCSR has a bit that the host's has not.
    pub fn set_vectors(&mut self, area: &[u8; VECTORS]) -> io::Result<()> {
        if self.has_vectors && self.vectors[..VECTORS] == area[..] {
            return Ok(());
        }
        self.vectors[..VECTORS].copy_from_slice(area);
        spawn::register_set(self.process, libc::PTRACE_SETREGSET, &mut self.vectors).map(drop)
    }

    /// Lets it run until it stops.
    pub fn run(&mut self) -> Stop {
        self.has_vectors = false;
        if self.is_gone || self.request(spawn::SYSEMU, std::ptr::null_mut()).is_err() {
            return self.lost();
        }
        match spawn::wait(self.process) {
            Some(spawn::Wait::Call) => Stop::Call,
            Some(spawn::Wait::Signal(KICK)) => Stop::Kick,
            Some(spawn::Wait::Signal(signal)) => {
                let (code, address) = spawn::signal_of(self.process).unwrap_or((0, 0));
                match (signal, code) {
                    (libc::SIGSEGV, MAPPING | RIGHTS) => Stop::Access(address),
                    (libc::SIGTRAP, BREAK) => Stop::Break,
                    (libc::SIGTRAP, _) => Stop::Trap { is_step: code == STEP },
                    (libc::SIGSYS, FILTERED) => self.back_to_vsyscall(address),
                    _ => Stop::Fault,
                }
            }
            None => self.lost(),
        }
    }

    /// A call of the legacy vsyscall page, which the host would serve, has returned without having done anything: takes the
    /// return back. RAX is lost, which the call returns its result in.
    fn back_to_vsyscall(&mut self, called: u64) -> Stop {
        let Ok(mut registers) = self.registers() else { return self.lost() };
        (registers.rip, registers.rsp) = (called, registers.rsp.wrapping_sub(8));
        match self.request(libc::PTRACE_SETREGS, (&raw mut registers).cast()) {
            Ok(()) => Stop::Fault,
            Err(_) => self.lost(),
        }
    }

    fn lost(&mut self) -> Stop {
        self.is_gone = true;
        Stop::Gone
    }

    /// Keeps it on one processor of the host, or lets it go to any.
    pub fn stay(&mut self, on: Option<usize>, all: &crate::affinity::Set) {
        if self.on != on {
            self.on = on;
            // A refusal costs time, nothing else.
            let _ = match on {
                Some(number) => crate::affinity::Set::one(number).apply(self.process),
                None => all.apply(self.process),
            };
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if !self.is_gone {
            // SAFETY: a signal to a child of ours that was not waited for.
            unsafe { libc::kill(self.process, libc::SIGKILL) };
            while spawn::wait(self.process).is_some() {}
        }
    }
}

#[cfg(test)]
mod tests;
