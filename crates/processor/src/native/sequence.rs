//! Runs a whole sequence of user-mode code on the bare processor, for comparing engines with it.
//!
//! Contract (this file holds unsafe code): the code runs in an arena of its own, between a load of all registers from,
//! and a save of all registers to, one static context; a lock makes it one sequence at a time. The caller promises that
//! the code stores nowhere but to the data pages of the arena and leaves it only at its end or by a trap
//! ([`Arena::run`]); traps are caught by signal handlers that are in force only meanwhile, on a stack of their own,
//! because the stack pointer belongs to the sequence.

use std::cell::UnsafeCell;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::sync::{Mutex, MutexGuard, PoisonError};

use host::map::{self, Map, PAGE, Protection};
use x86::{FpuArea, GuestFault, Gva, vector};

/// Pages of the arena, in their order: code, a hole, data, constants that may not be written, a hole.
pub const CODE_SIZE: usize = 2 * PAGE;
pub const DATA_OFFSET: usize = CODE_SIZE + PAGE;
pub const DATA_SIZE: usize = 8 * PAGE;
pub const CONSTANT_OFFSET: usize = DATA_OFFSET + DATA_SIZE;
pub const CONSTANT_SIZE: usize = PAGE;
pub const ARENA_SIZE: usize = CONSTANT_OFFSET + CONSTANT_SIZE + PAGE;

/// What the host needs for the jump back at the end of a sequence.
const EPILOGUE: usize = 14;

/// What a sequence works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub fpu: FpuArea,
    /// The data pages.
    pub data: Vec<u8>,
}

/// How a sequence ended: at its end, or at a trap; `rip` is an offset in the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    pub rip: u64,
    pub trap: Option<GuestFault>,
}

#[repr(C, align(64))]
struct Context {
    fpu: FpuArea,
    gpr: [u64; 16],
    rflags: u64,
    target: u64,
    host_rsp: u64,
    host_mxcsr: u32,
    host_fcw: u32,
    /// Where the code is, so that the handlers know whose trap it is.
    code: u64,
    trapped: u64,
    trap_rip: u64,
    trap_vector: u64,
    trap_error: u64,
    trap_address: u64,
}

struct Shared(UnsafeCell<Context>);

// SAFETY: only touched by the thread that holds LOCK.
unsafe impl Sync for Shared {}

static LOCK: Mutex<()> = Mutex::new(());
static CONTEXT: Shared = Shared(UnsafeCell::new(Context {
    fpu: FpuArea { bytes: [0; FpuArea::SIZE] },
    gpr: [0; 16],
    rflags: 0,
    target: 0,
    host_rsp: 0,
    host_mxcsr: 0,
    host_fcw: 0,
    code: 0,
    trapped: 0,
    trap_rip: 0,
    trap_vector: 0,
    trap_error: 0,
    trap_address: 0,
}));

/// Loads everything from the context and jumps to its target.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter() {
    std::arch::naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15", "pushfq",
        "mov [rip + {c} + {host_rsp}], rsp",
        "stmxcsr [rip + {c} + {host_mxcsr}]",
        "fnstcw [rip + {c} + {host_fcw}]",
        "mov eax, 7",
        "xor edx, edx",
        "xrstor64 [rip + {c}]",
        "push qword ptr [rip + {c} + {rflags}]",
        "popfq",
        "mov rax, [rip + {c} + {gpr} + 0]",
        "mov rcx, [rip + {c} + {gpr} + 8]",
        "mov rdx, [rip + {c} + {gpr} + 16]",
        "mov rbx, [rip + {c} + {gpr} + 24]",
        "mov rsp, [rip + {c} + {gpr} + 32]",
        "mov rbp, [rip + {c} + {gpr} + 40]",
        "mov rsi, [rip + {c} + {gpr} + 48]",
        "mov rdi, [rip + {c} + {gpr} + 56]",
        "mov r8, [rip + {c} + {gpr} + 64]",
        "mov r9, [rip + {c} + {gpr} + 72]",
        "mov r10, [rip + {c} + {gpr} + 80]",
        "mov r11, [rip + {c} + {gpr} + 88]",
        "mov r12, [rip + {c} + {gpr} + 96]",
        "mov r13, [rip + {c} + {gpr} + 104]",
        "mov r14, [rip + {c} + {gpr} + 112]",
        "mov r15, [rip + {c} + {gpr} + 120]",
        "jmp [rip + {c} + {target}]",
        c = sym CONTEXT,
        host_rsp = const offset_of!(Context, host_rsp),
        host_mxcsr = const offset_of!(Context, host_mxcsr),
        host_fcw = const offset_of!(Context, host_fcw),
        rflags = const offset_of!(Context, rflags),
        gpr = const offset_of!(Context, gpr),
        target = const offset_of!(Context, target),
    )
}

/// Where a sequence goes at its end, and where the signal handlers send it after a trap.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave() {
    std::arch::naked_asm!(
        "mov [rip + {c} + {gpr} + 0], rax",
        "mov [rip + {c} + {gpr} + 8], rcx",
        "mov [rip + {c} + {gpr} + 16], rdx",
        "mov [rip + {c} + {gpr} + 24], rbx",
        "mov [rip + {c} + {gpr} + 32], rsp",
        "mov [rip + {c} + {gpr} + 40], rbp",
        "mov [rip + {c} + {gpr} + 48], rsi",
        "mov [rip + {c} + {gpr} + 56], rdi",
        "mov [rip + {c} + {gpr} + 64], r8",
        "mov [rip + {c} + {gpr} + 72], r9",
        "mov [rip + {c} + {gpr} + 80], r10",
        "mov [rip + {c} + {gpr} + 88], r11",
        "mov [rip + {c} + {gpr} + 96], r12",
        "mov [rip + {c} + {gpr} + 104], r13",
        "mov [rip + {c} + {gpr} + 112], r14",
        "mov [rip + {c} + {gpr} + 120], r15",
        "mov rsp, [rip + {c} + {host_rsp}]",
        "pushfq",
        "pop qword ptr [rip + {c} + {rflags}]",
        "cld",
        "mov eax, 7",
        "xor edx, edx",
        "xsave64 [rip + {c}]",
        "fninit",
        "fldcw [rip + {c} + {host_fcw}]",
        "vzeroupper",
        "ldmxcsr [rip + {c} + {host_mxcsr}]",
        "popfq", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        c = sym CONTEXT,
        host_rsp = const offset_of!(Context, host_rsp),
        host_mxcsr = const offset_of!(Context, host_mxcsr),
        host_fcw = const offset_of!(Context, host_fcw),
        rflags = const offset_of!(Context, rflags),
        gpr = const offset_of!(Context, gpr),
    )
}

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid ucontext to an SA_SIGINFO handler; the context belongs to this thread when RIP
    // lies in the arena's code, since only the holder of LOCK runs there.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let shared = &mut *CONTEXT.0.get();
        let rip = registers[libc::REG_RIP as usize] as u64;
        if rip.wrapping_sub(shared.code) > CODE_SIZE as u64 {
            pass_on(signal, info, context);
            return;
        }
        shared.trapped = 1;
        shared.trap_rip = rip - shared.code;
        shared.trap_vector = registers[libc::REG_TRAPNO as usize] as u64;
        shared.trap_error = registers[libc::REG_ERR as usize] as u64;
        shared.trap_address = registers[libc::REG_CR2 as usize] as u64;
        registers[libc::REG_RIP as usize] = leave as *const () as i64;
    }
}

/// The handlers that ours stand in for; written before ours are installed.
struct Old(UnsafeCell<[Option<libc::sigaction>; 5]>);

// SAFETY: only written by the holder of LOCK while none of our handlers is installed, and they only read it.
unsafe impl Sync for Old {}

static OLD: Old = Old(UnsafeCell::new([None; 5]));

/// A signal that is not ours, perhaps of another thread, goes to the handler that would have got it.
///
/// # Safety
/// The arguments are those of a signal handler.
unsafe fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
    // SAFETY: our handlers are installed, so nobody writes OLD.
    let old = unsafe { &*OLD.0.get() };
    let place = SIGNALS.iter().position(|s| *s == signal);
    match place.and_then(|place| old[place]) {
        Some(action) if action.sa_flags & libc::SA_SIGINFO != 0 && action.sa_sigaction > 1 => {
            // SAFETY: the system gave us this address as that of an SA_SIGINFO handler.
            let next: Handler = unsafe { std::mem::transmute(action.sa_sigaction) };
            next(signal, info, context);
        }
        // A real crash: let it be one.
        // SAFETY: plain system call.
        _ => unsafe {
            libc::signal(signal, libc::SIG_DFL);
        },
    }
}

/// Signal handlers and their stack, in force until dropped.
struct Handlers {
    old: [libc::sigaction; 5],
    old_stack: libc::stack_t,
    _stack: Box<[u8]>,
}

impl Handlers {
    /// The caller holds LOCK.
    fn install() -> Handlers {
        let mut stack = vec![0_u8; 64 << 10].into_boxed_slice();
        // SAFETY: zero is a valid value of these plain structures; the stack outlives its use, because drop switches back.
        unsafe {
            let mut old_stack: libc::stack_t = std::mem::zeroed();
            let mut new_stack: libc::stack_t = std::mem::zeroed();
            new_stack.ss_sp = stack.as_mut_ptr().cast();
            new_stack.ss_size = stack.len();
            libc::sigaltstack(&raw const new_stack, &raw mut old_stack);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            let mut old: [libc::sigaction; 5] = std::mem::zeroed();
            for (signal, old) in SIGNALS.iter().zip(&mut old) {
                libc::sigaction(*signal, std::ptr::null(), old);
            }
            *OLD.0.get() = old.map(Some);
            for signal in SIGNALS {
                libc::sigaction(signal, &raw const action, std::ptr::null_mut());
            }
            Handlers { old, old_stack, _stack: stack }
        }
    }
}

impl Drop for Handlers {
    fn drop(&mut self) {
        for (signal, old) in SIGNALS.iter().zip(&self.old) {
            // SAFETY: puts back what sigaction gave us.
            unsafe { libc::sigaction(*signal, old, std::ptr::null_mut()) };
        }
        // SAFETY: puts back what sigaltstack gave us; no handler runs on ours any more.
        unsafe { libc::sigaltstack(&raw const self.old_stack, std::ptr::null_mut()) };
    }
}

/// The pages that sequences run in and on. Addresses stay the same for the arena's life, so that a guest can be given
/// the same ones.
pub struct Arena {
    map: Map,
    /// The same pages, all writable.
    alias: Map,
    _file: File,
}

impl Arena {
    /// # Errors
    /// The system's, when it refuses executable memory.
    pub fn new(constants: &[u8]) -> io::Result<Arena> {
        if !std::is_x86_feature_detected!("avx") {
            return Err(io::Error::other("comparison with the host needs a processor with AVX"));
        }
        // A translator's handlers must come first: those of a run are put in their place and taken away again, and would take
        // away what was installed meanwhile.
        let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        host::signal::install()?;
        drop(guard);
        let file = map::memfd(c"ringzero-sequences", ARENA_SIZE as u64)?;
        let alias = Map::shared(&file, ARENA_SIZE, Protection::ReadWrite)?;
        let map = Map::shared(&file, ARENA_SIZE, Protection::None)?;
        map.protect(0, CODE_SIZE, Protection::ReadExecute)?;
        map.protect(DATA_OFFSET, DATA_SIZE, Protection::ReadWrite)?;
        map.protect(CONSTANT_OFFSET, CONSTANT_SIZE, Protection::Read)?;
        let mut arena = Arena { map, alias, _file: file };
        arena.write(CONSTANT_OFFSET, &constants[..constants.len().min(CONSTANT_SIZE)]);
        // Pages that the host has not mapped yet would fault with another error code than mapped ones.
        arena.read_all();
        Ok(arena)
    }

    fn base(&self) -> u64 {
        self.map.base().as_ptr() as u64
    }

    #[must_use]
    pub fn code(&self) -> Gva {
        Gva(self.base())
    }

    #[must_use]
    pub fn data(&self) -> Gva {
        Gva(self.base() + DATA_OFFSET as u64)
    }

    #[must_use]
    pub fn constants(&self) -> Gva {
        Gva(self.base() + CONSTANT_OFFSET as u64)
    }

    fn read_all(&self) {
        for (offset, size) in [(0, CODE_SIZE), (DATA_OFFSET, DATA_SIZE), (CONSTANT_OFFSET, CONSTANT_SIZE)] {
            for page in (offset..offset + size).step_by(PAGE) {
                // SAFETY: inside the map, readable.
                unsafe { self.map.base().as_ptr().add(page).read_volatile() };
            }
        }
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= ARENA_SIZE);
        // SAFETY: inside the alias, which is writable, and nobody runs in the arena while we hold it exclusively.
        unsafe { self.alias.base().as_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= ARENA_SIZE);
        // SAFETY: inside the alias.
        unsafe { self.alias.base().as_ptr().add(offset).copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Runs a generated sequence on the host; `state` becomes the state at its end.
    pub fn run_generated(&mut self, sequence: &crate::testing::Sequence, state: &mut State) -> Ending {
        // SAFETY: the generator admits only instructions that keep the promise, and nobody else can make a Sequence; the
        // campaign makes the state with pointers into the data pages.
        unsafe { self.run(&sequence.code, state) }
    }

    /// Runs `code` at [`Arena::code`] on the host, from `state`, which becomes the state at the end or at the trap.
    ///
    /// # Safety
    /// Whatever its input registers are, the code stores only to the data pages, makes no system call, and leaves only
    /// at its end or by a trap. RSP, RFLAGS.TF and AC, and the FPU area of `state` are valid for user mode.
    pub unsafe fn run(&mut self, code: &[u8], state: &mut State) -> Ending {
        assert!(code.len() + EPILOGUE <= CODE_SIZE && state.data.len() == DATA_SIZE);
        self.write(0, code);
        // jmp [rip+0] and the address.
        let mut epilogue = [0xff, 0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        epilogue[6..].copy_from_slice(&(leave as *const () as u64).to_le_bytes());
        self.write(code.len(), &epilogue);
        self.write(DATA_OFFSET, &state.data);
        let guard: MutexGuard<'_, ()> = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let handlers = Handlers::install();
        let context = CONTEXT.0.get();
        // SAFETY: we hold LOCK, and by the caller's promise the code comes back through `leave`. Between the accesses to the
        // context stands a call that the compiler cannot look into.
        unsafe {
            (*context).fpu = state.fpu.clone();
            (*context).gpr = state.gpr;
            (*context).rflags = state.rflags;
            (*context).target = self.base();
            (*context).code = self.base();
            (*context).trapped = 0;
            enter();
            state.fpu = (*context).fpu.clone();
            state.gpr = (*context).gpr;
            state.rflags = (*context).rflags;
        }
        state.fpu.bytes[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
        state.fpu.bytes[FpuArea::XSTATE_BV] = 7;
        // SAFETY: as above.
        let context = unsafe { &*context };
        let ending = if context.trapped == 0 {
            Ending { rip: code.len() as u64, trap: None }
        } else {
            Ending { rip: context.trap_rip, trap: Some(fault(context)) }
        };
        drop(handlers);
        drop(guard);
        let mut data = std::mem::take(&mut state.data);
        self.read(DATA_OFFSET, &mut data);
        state.data = data;
        ending
    }
}

/// The trap as a guest would see it.
fn fault(context: &Context) -> GuestFault {
    let vector = context.trap_vector as u8;
    let error = context.trap_error as u32;
    match vector {
        vector::PF => GuestFault::page(Gva(context.trap_address), error),
        vector::TS | vector::NP | vector::SS | vector::GP | vector::AC => GuestFault::with_code(vector, error),
        _ => GuestFault::plain(vector),
    }
}
