//! Faults of the host processor inside translated code: a division by zero, a misaligned SSE operand, an armed poll page.
//! The handler sends the thread to a landing place of the code's owner instead of ending the process.
//!
//! Contract: a [`Landing`] names a range of executable addresses and a place inside it. While a thread has entered the
//! landing, a synchronous signal whose RIP is in the range stores that RIP in `fault_rip` and continues at the place
//! with all other registers as they were. All other signals go where they went before.

use std::cell::{Cell, OnceCell};
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::map::{Map, PAGE, Protection};

const SIGNALS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];
/// Room for the frame of a signal with AVX-512 and AMX state (about 11 KiB) and the handler.
const ALTERNATE_STACK: usize = 128 << 10;

/// Where a thread continues after a fault in a range of code.
#[derive(Debug, Default)]
pub struct Landing {
    /// First and last-plus-one address of the code.
    start: AtomicU64,
    end: AtomicU64,
    place: AtomicU64,
    fault_rip: AtomicU64,
    /// Faults since the owner last asked for the RIP: the code at `place` must not fault, and a loop of faults would never
    /// end.
    unanswered: AtomicU64,
}

const MOST_UNANSWERED: u64 = 3;

impl Landing {
    #[must_use]
    pub fn new(code: std::ops::Range<u64>) -> Landing {
        Landing { start: code.start.into(), end: code.end.into(), ..Landing::default() }
    }

    /// Says where to continue after the next fault: an address inside the code.
    pub fn set_place(&self, place: u64) {
        self.place.store(place, Ordering::Relaxed);
    }

    /// Where the last fault was.
    #[must_use]
    pub fn fault_rip(&self) -> u64 {
        self.unanswered.store(0, Ordering::Relaxed);
        self.fault_rip.load(Ordering::Relaxed)
    }
}

thread_local! {
    static CURRENT: Cell<*const Landing> = const { Cell::new(ptr::null()) };
    static STACK: OnceCell<Map> = const { OnceCell::new() };
}

static PREVIOUS: OnceLock<Vec<(i32, libc::sigaction)>> = OnceLock::new();

/// Makes `landing` the current thread's, until the guard is dropped.
pub fn enter(landing: &Landing) -> io::Result<Guard<'_>> {
    install()?;
    prepare_thread()?;
    let outer = CURRENT.with(|current| current.replace(landing));
    Ok(Guard { outer, landing: std::marker::PhantomData })
}

/// Whether `landing` is the current thread's.
#[must_use]
pub fn is_current(landing: &Landing) -> bool {
    CURRENT.with(|current| ptr::eq(current.get(), landing))
}

#[derive(Debug)]
pub struct Guard<'a> {
    outer: *const Landing,
    landing: std::marker::PhantomData<&'a Landing>,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        CURRENT.with(|current| current.set(self.outer));
    }
}

/// Gives the current thread an alternate stack for signals and keeps asynchronous ones from it, once.
pub fn prepare_thread() -> io::Result<()> {
    STACK.with(|cell| {
        if cell.get().is_some() {
            return Ok(());
        }
        let map = Map::anonymous(PAGE + ALTERNATE_STACK)?;
        map.protect(0, PAGE, Protection::None)?;
        let stack = libc::stack_t {
            // SAFETY: inside the map.
            ss_sp: unsafe { map.base().as_ptr().add(PAGE) }.cast(),
            ss_flags: 0,
            ss_size: ALTERNATE_STACK,
        };
        block_others();
        // SAFETY: the stack is mapped for as long as the thread lives.
        if unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // The map stays with the thread: it is unmapped when the thread ends, after its last signal.
        let _ = cell.set(map);
        Ok(())
    })
}

/// Keeps asynchronous signals from this thread: a handler of somebody else's that does not ask for the alternate stack
/// would write below the stack pointer of translated code, which is no stack.
fn block_others() {
    // SAFETY: the set is initialized by sigfillset; only this thread's mask changes.
    unsafe {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
        libc::sigfillset(&raw mut set);
        for signal in SIGNALS {
            libc::sigdelset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
    }
}

/// Installs the handlers, once for the process; [`enter`] does it, too.
pub fn install() -> io::Result<()> {
    if PREVIOUS.get().is_some() {
        return Ok(());
    }
    let mut previous = Vec::new();
    for signal in SIGNALS {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: `action` is fully initialized; the handler has the signature that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut action.sa_mask);
            if libc::sigaction(signal, &raw const action, old.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            previous.push((signal, old.assume_init()));
        }
    }
    // Two threads may race; both saw the same previous actions or ours, and only the first are kept.
    let _ = PREVIOUS.set(previous);
    Ok(())
}

extern "C" fn handler(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let landing = CURRENT.try_with(Cell::get).unwrap_or(ptr::null());
    if !landing.is_null() {
        // SAFETY: a non-null landing is borrowed by the guard for as long as it is current; the kernel passes a valid
        // context to a handler with SA_SIGINFO.
        let (landing, registers) = unsafe { (&*landing, &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs) };
        let rip = registers[libc::REG_RIP as usize] as u64;
        let code = landing.start.load(Ordering::Relaxed)..landing.end.load(Ordering::Relaxed);
        let unanswered = landing.unanswered.fetch_add(1, Ordering::Relaxed);
        if code.contains(&rip) && unanswered < MOST_UNANSWERED {
            landing.fault_rip.store(rip, Ordering::Relaxed);
            registers[libc::REG_RIP as usize] = landing.place.load(Ordering::Relaxed) as i64;
            return;
        }
    }
    pass_on(signal);
}

/// Not ours: puts the previous action back; the instruction faults again when the handler returns.
fn pass_on(signal: i32) {
    let known = PREVIOUS.get().and_then(|all| all.iter().find(|(number, _)| *number == signal));
    // SAFETY: restoring an action that the kernel gave us, or the default one; both are valid.
    unsafe {
        match known {
            Some((_, action)) if action.sa_sigaction != handler as *const () as usize => {
                libc::sigaction(signal, action, ptr::null_mut());
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}
