//! Debug registers at work: instruction and data breakpoints, single-step, and alignment checks, which share the hook in
//! the access path. Intel SDM (2024-12) Vol. 3B ch. 19 "Debug, Branch Profile, TSC, and Intel RDT Features".

use x86::{CpuState, GuestFault, Gva, cr0, cr4, dr7, rflags, vector};

use crate::core::Core;

/// Bits of [`crate::Vcpu::checks`].
pub mod check {
    pub const BREAKPOINTS: u8 = 1 << 0;
    pub const ALIGNMENT: u8 = 1 << 1;
}

/// The R/W fields of DR7.
mod kind {
    pub const EXECUTE: u64 = 0;
    pub const WRITE: u64 = 1;
    pub const IO: u64 = 2;
    pub const ACCESS: u64 = 3;
}

/// What accesses must be looked at with these registers.
#[must_use]
pub fn checks(cpu: &CpuState) -> u8 {
    let mut checks = 0;
    if cpu.dr[7] & dr7::ANY_ENABLED != 0 {
        checks |= check::BREAKPOINTS;
    }
    if cpu.cr0 & cr0::AM != 0 && cpu.rflags & rflags::AC != 0 && cpu.cpl() == 3 {
        checks |= check::ALIGNMENT;
    }
    checks
}

/// A breakpoint that DR7 enables.
struct Breakpoint {
    index: u32,
    address: u64,
    kind: u64,
    length: u64,
}

fn enabled(cpu: &CpuState) -> impl Iterator<Item = Breakpoint> {
    let control = cpu.dr[7];
    let addresses = [cpu.dr[0], cpu.dr[1], cpu.dr[2], cpu.dr[3]];
    addresses.into_iter().zip(0..).filter(move |&(_, index)| control >> (2 * index) & 3 != 0).map(
        move |(address, index)| Breakpoint {
            index,
            address,
            kind: control >> (16 + 4 * index) & 3,
            length: match control >> (18 + 4 * index) & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            },
        },
    )
}

/// The breakpoints on executing the instruction at `address`, as bits of DR6.
#[must_use]
pub fn instruction_hits(cpu: &CpuState, address: Gva) -> u64 {
    enabled(cpu)
        .filter(|point| point.kind == kind::EXECUTE && point.address == address.0)
        .fold(0, |hits, point| hits | 1 << point.index)
}

fn overlaps(point: &Breakpoint, address: u64, size: u64) -> bool {
    let start = point.address & !(point.length - 1);
    address.wrapping_sub(start) < point.length || start.wrapping_sub(address) < size
}

impl Core<'_> {
    /// Looks at an access of the running code: notes the breakpoints that it hits, and faults when it is misaligned where
    /// that is an error.
    #[cold]
    pub(crate) fn check_access(&mut self, address: Gva, size: usize, write: bool) -> Result<(), GuestFault> {
        let misaligned = size.is_power_of_two() && address.0 & (size as u64 - 1) != 0;
        if self.vcpu.checks & check::ALIGNMENT != 0 && misaligned {
            return Err(GuestFault::with_code(vector::AC, 0));
        }
        if self.vcpu.checks & check::BREAKPOINTS != 0 {
            for point in enabled(&self.vcpu.cpu) {
                let watched = point.kind == kind::ACCESS || (point.kind == kind::WRITE && write);
                if watched && overlaps(&point, address.0, size as u64) {
                    self.vcpu.hits |= 1 << point.index;
                }
            }
        }
        Ok(())
    }

    /// Notes the I/O breakpoints that an access to `size` ports from `port` hits; they exist with CR4.DE only.
    pub(crate) fn check_port(&mut self, port: u16, size: u8) {
        if self.vcpu.checks & check::BREAKPOINTS == 0 || self.vcpu.cpu.cr4 & cr4::DE == 0 {
            return;
        }
        for point in enabled(&self.vcpu.cpu) {
            if point.kind == kind::IO && overlaps(&point, u64::from(port), u64::from(size)) {
                self.vcpu.hits |= 1 << point.index;
            }
        }
    }
}
