//! Which processors of the host a thread may run on.

use std::io;
use std::mem::{MaybeUninit, size_of};

/// A set of processors.
#[derive(Clone, Copy)]
pub struct Set(libc::cpu_set_t);

impl std::fmt::Debug for Set {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Set")
    }
}

impl Set {
    /// # Panics
    /// Never: numbers beyond what the host's calls can name are left out.
    #[must_use]
    pub fn one(number: usize) -> Set {
        // SAFETY: a set of bits, of which none is set.
        let mut set: libc::cpu_set_t = unsafe { MaybeUninit::zeroed().assume_init() };
        if number < 8 * size_of::<libc::cpu_set_t>() {
            // SAFETY: the number is inside the set, as just checked.
            unsafe { libc::CPU_SET(number, &mut set) };
        }
        Set(set)
    }

    /// Where the calling thread may run.
    ///
    /// # Errors
    /// When the host does not say, e.g. because it has more processors than the set.
    pub fn of_thread() -> io::Result<Set> {
        let mut set = Set::one(usize::MAX);
        // SAFETY: the set is as large as it is said to be.
        let result = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set.0) };
        if result == 0 { Ok(set) } else { Err(io::Error::last_os_error()) }
    }

    /// Lets a thread (0: the calling one) run only there.
    ///
    /// # Errors
    /// When none of these processors is there, or the thread is not ours.
    pub fn apply(&self, thread: libc::pid_t) -> io::Result<()> {
        // SAFETY: as above.
        let result = unsafe { libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &raw const self.0) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// The processor that the calling thread runs on.
#[must_use]
pub fn current() -> Option<usize> {
    // SAFETY: plain call.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}
