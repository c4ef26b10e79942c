//! What makes a tracee stop before single instructions: breakpoints in the debug registers of the host's processor, and
//! CPUID forbidden.
//!
//! Contract: ptrace takes numbers here, and no memory of ours. The kernel lets a process have breakpoints on addresses of
//! its own alone.
//!
//! What it costs (a host that is a virtual machine itself): 0.5 microseconds more at every stop for one breakpoint, 1.4 for
//! four. Forbidding CPUID takes 14, since each switch to the process and back writes an MSR, which is an exit there.

use std::io;
use std::mem::offset_of;

use super::{Order, Tracee, spawn};

/// Breakpoints that a processor has (Intel SDM (2024-12) Vol. 3B 19.2.1 "Debug Address Registers (DR0-DR3)").
pub const BREAKS: usize = 4;

/// ARCH_CPUID of arch_prctl, which takes 0 to forbid the instruction; arch_prctl(2).
pub const ARCH_CPUID: u32 = 0x1012;

/// The local enable bits of DR7, two bits apart. All else stays 0: R/W and LEN of 0 mean execution (Intel SDM (2024-12) Vol. 3B 19.2.4
/// "Debug Control Register (DR7)").
const LOCAL: u64 = 1;

const fn place(register: usize) -> usize {
    offset_of!(libc::user, u_debugreg) + register * size_of::<u64>()
}

impl Tracee {
    /// Has it stop before the instructions that begin at `addresses`, at most [`BREAKS`], and at no others any more.
    ///
    /// # Errors
    /// When the host gives a process no breakpoints, or others have them all; none are set then.
    pub fn break_at(&mut self, addresses: &[u64]) -> io::Result<()> {
        assert!(addresses.len() <= BREAKS, "too many breakpoints");
        if self.breaks == addresses {
            return Ok(());
        }
        self.breaks.clear();
        self.set_debug_register(7, 0)?;
        for (register, address) in addresses.iter().enumerate() {
            self.set_debug_register(register, *address)?;
        }
        let enabled = (0..addresses.len()).map(|register| LOCAL << (2 * register)).sum();
        self.set_debug_register(7, enabled)?;
        self.breaks.extend_from_slice(addresses);
        Ok(())
    }

    fn set_debug_register(&self, register: usize, value: u64) -> io::Result<()> {
        let at = std::ptr::without_provenance_mut(place(register));
        spawn::request(self.process, libc::PTRACE_POKEUSER, at, std::ptr::without_provenance_mut(value as usize))
    }

    /// Whether CPUID faults in it from now on. Its registers are undefined afterwards.
    ///
    /// # Errors
    /// When the host's processor cannot do that.
    pub fn forbid_cpuid(&mut self, is_forbidden: bool) -> io::Result<()> {
        if self.forbids_cpuid == is_forbidden {
            return Ok(());
        }
        let arguments = [u64::from(ARCH_CPUID), u64::from(!is_forbidden), 0, 0, 0, 0];
        self.order(&[Order::new(libc::SYS_arch_prctl, arguments)])?;
        self.forbids_cpuid = is_forbidden;
        Ok(())
    }

    /// Whether each way to it and back takes so much longer.
    #[must_use]
    pub fn forbids_cpuid(&self) -> bool {
        self.forbids_cpuid
    }
}
