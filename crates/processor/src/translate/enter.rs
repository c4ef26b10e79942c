//! Into translated code and out of it.
//!
//! Contract: [`Stubs::enter`] is the only call from Rust into the code cache. Translated code keeps host RSP pointing into
//! a VCPU made by [`Vcpu::place`], reaches guest memory only through TLB entries, other fields of the VCPU only at the
//! displacements of `frame`, and comes back only through the leave stubs, which restore the host's registers.

use std::mem;

use memory::tlb::Bank;
use x86::FpuArea;

use super::asm::{Asm, Mem, R12, R13, R14, R15, RAX, RBP, RBX, RDI, RDX, RSI, Reg, T0, T1, cc};
use super::exits::{look_up, look_up_second};
use super::frame;
use super::lower::Mode;
use super::refill::{Crossing, refill, scatter};
use crate::code_cache::CodeCache;
use crate::profile::Part;
use crate::vcpu::Vcpu;

/// Where each guest register lives while translated code runs: itself in most cases, so that instructions can be copied.
/// Guest RSP is in R15, because host RSP is the base register. R10 and R11, which compilers use least, are scratch; with
/// R15 they live in the VCPU.
#[must_use]
pub fn home(guest: u8) -> Option<Reg> {
    match guest {
        4 => Some(R15),
        10 | 11 | 15 => None,
        other => Some(Reg(other)),
    }
}

/// Addresses of the stubs in the code cache.
#[derive(Debug, Default)]
pub struct Stubs {
    enter: [u64; 2],
    /// By whether the guest's flags are in RFLAGS (they are then saved), and whether SIMD state is in registers. Reached
    /// by `call`; the return address names the site.
    leave: [[u64; 2]; 2],
    /// Where the signal handler sends a faulting thread.
    fault: u64,
    /// What the fault stub's calls leave as their return address.
    fault_sites: [u64; 2],
    save_simd: u64,
    load_simd: u64,
    /// By mode.
    lookup: [u64; 8],
    /// What the lookups' calls leave as their return address.
    lookup_sites: [u64; 16],
    /// By bank, whether for stores, whether SIMD state is in registers, and what an access across pages does.
    refill: [[[[u64; 3]; 2]; 2]; 3],
    scatter: u64,
    /// Where the first refill stub begins, and where the stubs end.
    first_refill: u64,
    end: u64,
}

impl Stubs {
    #[must_use]
    pub fn leave(&self, flags_in_host: bool, simd: bool) -> u64 {
        self.leave[usize::from(flags_in_host)][usize::from(simd)]
    }

    #[must_use]
    pub fn fault(&self) -> u64 {
        self.fault
    }

    /// A subroutine that saves SIMD state and gives the registers the host's control words.
    #[must_use]
    pub fn save_simd(&self) -> u64 {
        self.save_simd
    }

    /// A subroutine that puts the guest's SIMD state into registers. Clobbers T0, T1 and flags.
    #[must_use]
    pub fn load_simd(&self) -> u64 {
        self.load_simd
    }

    /// What goes to the RIP in T0, whose code is of the given mode, by the jump cache; flags are in their slot.
    #[must_use]
    pub fn lookup(&self, mode: Mode) -> u64 {
        self.lookup[usize::from(mode.0)]
    }

    #[must_use]
    pub fn lookups(&self) -> &[u64; 8] {
        &self.lookup
    }

    /// Whether a return address is in a stub.
    #[must_use]
    pub fn contains(&self, site: u64) -> bool {
        site < self.end
    }

    /// Whether a return address says that code left through a lookup.
    #[must_use]
    pub fn is_lookup(&self, site: u64) -> bool {
        self.lookup_sites.contains(&site)
    }

    /// A subroutine that fills the TLB from the shadow for the address in T0, or leaves.
    #[must_use]
    pub fn refill(&self, bank: Bank, write: bool, simd: bool, crossing: Crossing) -> u64 {
        self.refill[bank as usize][usize::from(write)][usize::from(simd)][crossing as usize]
    }

    /// A subroutine that brings a store across pages from the buffer to its place.
    #[must_use]
    pub fn scatter(&self) -> u64 {
        self.scatter
    }

    /// Whether a return address says that code left through the fault stub.
    #[must_use]
    pub fn is_fault(&self, site: u64) -> bool {
        self.fault_sites.contains(&site)
    }

    /// What the host code at an address in the code cache does, if it is that of a stub.
    #[must_use]
    pub fn part(&self, host: u64) -> Option<Part> {
        match host {
            _ if host < self.first_refill => Some(Part::Switch),
            _ if host < self.end => Some(Part::Refill),
            _ => None,
        }
    }

    /// Emits all stubs; `None` when the cache is too small for them.
    pub fn emit(cache: &mut CodeCache) -> Option<Stubs> {
        let mut stubs = Stubs::default();
        let mut asm = Asm::default();
        for simd in [false, true] {
            asm.restart(cache.next_address());
            enter(&mut asm, simd);
            asm.finish();
            stubs.enter[usize::from(simd)] = cache.add(&asm.code)?;
            for flags in [false, true] {
                asm.restart(cache.next_address());
                leave(&mut asm, flags, simd);
                asm.finish();
                stubs.leave[usize::from(flags)][usize::from(simd)] = cache.add(&asm.code)?;
            }
        }
        asm.restart(cache.next_address());
        // The same way out, but the flags go to a slot of their own: which of the two is right depends on the site.
        asm.byte(0x9c);
        asm.pop_mem(Mem::vcpu(frame::FAULT_FLAGS));
        asm.test_byte_mem(Mem::vcpu(frame::MODE), Mode::SIMD);
        let simd = asm.label();
        asm.jcc(cc::NZ, simd);
        asm.call_address(stubs.leave(false, false));
        let plain_site = asm.position() as u64;
        asm.bind(simd);
        asm.call_address(stubs.leave(false, true));
        let simd_site = asm.position() as u64;
        asm.finish();
        stubs.fault = cache.add(&asm.code)?;
        stubs.fault_sites = [stubs.fault + plain_site, stubs.fault + simd_site];
        asm.restart(cache.next_address());
        save_simd(&mut asm);
        asm.finish();
        stubs.save_simd = cache.add(&asm.code)?;
        asm.restart(cache.next_address());
        load_simd(&mut asm);
        asm.finish();
        stubs.load_simd = cache.add(&asm.code)?;
        for mode in 0..stubs.lookup.len() {
            asm.restart(cache.next_address());
            let sites = lookup(&mut asm, Mode(mode as u8), stubs.leave(false, Mode(mode as u8).is_simd()));
            asm.finish();
            stubs.lookup[mode] = cache.add(&asm.code)?;
            stubs.lookup_sites[2 * mode..2 * mode + 2].copy_from_slice(&sites);
        }
        stubs.first_refill = cache.next_address();
        for bank in [Bank::Kernel, Bank::User, Bank::KernelAc] {
            for (write, simd) in [(false, false), (false, true), (true, false), (true, true)] {
                for crossing in Crossing::ALL {
                    asm.restart(cache.next_address());
                    refill(&mut asm, bank, write, crossing, stubs.leave(false, simd));
                    asm.finish();
                    let stub = cache.add(&asm.code)?;
                    stubs.refill[bank as usize][usize::from(write)][usize::from(simd)][crossing as usize] = stub;
                }
            }
        }
        asm.restart(cache.next_address());
        scatter(&mut asm);
        asm.finish();
        stubs.scatter = cache.add(&asm.code)?;
        stubs.end = cache.next_address();
        cache.keep_from_here();
        Some(stubs)
    }

    /// Runs translated code from `target` until it leaves.
    pub fn enter(&self, vcpu: &mut Vcpu, target: u64, simd: bool) {
        assert!(vcpu.hot.is_placed, "this VCPU was not made by Vcpu::place");
        // SAFETY: the address is that of the enter stub for this build of the frame; the stub follows the System V
        // calling convention; `vcpu` is exclusive and placed with stack room below; `target` came from the translator.
        unsafe {
            let stub: extern "sysv64" fn(*mut u8, u64) = mem::transmute(self.enter[usize::from(simd)]);
            let base = std::ptr::from_mut(vcpu).cast::<u8>().add(frame::BIAS);
            stub(base, target);
        }
    }
}

const SAVED: [Reg; 6] = [RBP, RBX, R12, R13, R14, R15];

/// XSAVE components x87, SSE and AVX.
fn select_components(asm: &mut Asm) {
    asm.mov_imm(RAX, 7);
    asm.mov_imm(RDX, 0);
}

fn enter(asm: &mut Asm, simd: bool) {
    for reg in SAVED {
        asm.push(reg);
    }
    let at = |disp| Mem::base(RDI, disp);
    asm.store(at(frame::HOST_STACK), Reg(4));
    asm.mov(T0, RSI);
    if simd {
        select_components(asm);
        // xrstor64
        asm.op_mem_raw(true, &[0x0f, 0xae], 5, at(frame::FPU));
    }
    asm.mov(Reg(4), RDI);
    for guest in 0..16 {
        if let Some(host) = home(guest) {
            asm.load(host, Mem::vcpu(frame::gpr(guest.into())));
        }
    }
    asm.jmp_reg(T0);
}

/// Gives the return addresses of its two calls of `leave`.
fn lookup(asm: &mut Asm, mode: Mode, leave: u64) -> [u64; 2] {
    let (strange, miss) = (asm.label(), asm.label());
    look_up(asm, mode, strange, miss);
    asm.bind(miss);
    look_up_second(asm, mode, None);
    asm.call_address(leave);
    let first = asm.address();
    asm.bind(strange);
    asm.call_address(leave);
    [first, asm.address()]
}

fn leave(asm: &mut Asm, flags_in_host: bool, simd: bool) {
    if flags_in_host {
        asm.byte(0x9c);
        // RSP is 16 below the base when POP computes its address, after the increment 8.
        asm.pop_mem(Mem::vcpu(frame::FLAGS + 8));
    }
    asm.pop_mem(Mem::vcpu(frame::SITE));
    for guest in 0..16 {
        if let Some(host) = home(guest) {
            asm.store(Mem::vcpu(frame::gpr(guest.into())), host);
        }
    }
    asm.store(Mem::vcpu(frame::SCRATCH), T0);
    asm.store(Mem::vcpu(frame::SCRATCH + 8), T1);
    if simd {
        select_components(asm);
        store_components(asm, 0);
    }
    asm.load(Reg(4), Mem::vcpu(frame::HOST_STACK));
    for reg in SAVED.iter().rev() {
        asm.pop(*reg);
    }
    // The host's predictor of returns expects one to the site: a jump is right each time.
    asm.pop(T0);
    asm.jmp_reg(T0);
}

/// XSAVE64, then VZEROUPPER, LDMXCSR and FNINIT for the host's code. `moved` is how far RSP is below the base.
fn store_components(asm: &mut Asm, moved: i32) {
    let at = |disp: i32| Mem::vcpu(disp + moved);
    asm.op_mem_raw(true, &[0x0f, 0xae], 4, at(frame::FPU));
    asm.bytes(&[0xc5, 0xf8, 0x77]);
    asm.op_mem_raw(false, &[0x0f, 0xae], 2, at(frame::HOST_MXCSR));
    asm.bytes(&[0xdb, 0xe3]);
    // The state as `CpuState::fpu` promises it: all components present, no addresses of the host.
    let fpu = frame::FPU + moved;
    asm.store_imm32(Mem::vcpu(fpu + FpuArea::XSTATE_BV as i32), 7);
    asm.store_imm(Mem::vcpu(fpu + 8), 0);
    asm.store_imm(Mem::vcpu(fpu + 16), 0);
    // mov word [..], 0: the last opcode
    asm.byte(0x66);
    asm.op_mem_raw(false, &[0xc7], 0, Mem::vcpu(fpu + 6));
    asm.bytes(&[0, 0]);
}

fn save_simd(asm: &mut Asm) {
    asm.mov(T0, RAX);
    asm.mov(T1, RDX);
    select_components(asm);
    store_components(asm, 8);
    asm.mov(RAX, T0);
    asm.mov(RDX, T1);
    asm.byte(0xc3);
}

fn load_simd(asm: &mut Asm) {
    asm.mov(T0, RAX);
    asm.mov(T1, RDX);
    select_components(asm);
    // xrstor64; RSP is 8 below the base
    asm.op_mem_raw(true, &[0x0f, 0xae], 5, Mem::vcpu(frame::FPU + 8));
    asm.mov(RAX, T0);
    asm.mov(RDX, T1);
    asm.byte(0xc3);
}
