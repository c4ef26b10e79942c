//! One virtual processor: its architectural state and what the engines keep beside it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use host::map::Placed;
use host::sampler::Sampler;
use memory::SoftTlb;
use memory::tlb::Bank;
use x86::{CpuState, Gva, cr4, rflags};

use crate::cpuid::CpuidModel;
use crate::profile::Profile;
use crate::translate::frame::{Across, Hot, JumpCaches};

/// A guard below a VCPU: translated code pushes a few words, into `Hot::stack`, and nothing may ever reach this.
const STACK_BELOW: usize = 64 << 10;

/// A request that a VCPU leave its engine soon. Raised by any thread; the run loop lowers it.
#[derive(Debug, Default)]
pub struct Attention {
    wanted: AtomicBool,
}

impl Attention {
    pub fn raise(&self) {
        self.wanted.store(true, Ordering::SeqCst);
    }

    /// The same for the VCPU's own thread, which needs no fence to see it.
    pub fn raise_here(&self) {
        self.wanted.store(true, Ordering::Relaxed);
    }

    /// Lowers the request; says whether there was one.
    pub fn take(&self) -> bool {
        self.wanted.swap(false, Ordering::SeqCst)
    }

    #[inline]
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }
}

/// Something in the translated world became stale; engines look at it between instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stale {
    /// Virtual-to-physical translations of code changed for non-global pages (a load of CR3).
    pub local_mappings: bool,
    /// ... for all pages (INVLPG, CR4, CR0, global flush).
    pub all_mappings: bool,
    /// Control bits on which translated code depends changed (CR0, CR4, EFER, XCR0).
    pub mode: bool,
}

/// Which pages translated code was looked up in, for code of one privilege: a filter that may say yes too often. It spares
/// most INVLPGs, which are about data, the loss of all that is known of code.
#[derive(Debug)]
pub struct CodePages {
    /// Two bits for each page.
    bits: Box<[u64; CODE_WORDS]>,
    /// Code ran from a page of 2 MiB or of 1 GiB, whose regions are in `bits`, too.
    has_large: bool,
    has_giant: bool,
    count: u32,
}

const CODE_WORDS: usize = 2048;
/// A large program runs code of some thousand pages. With so many, one INVLPG of other pages in twenty seems to be about code.
const MOST_CODE_PAGES: u32 = 16_384;

const LARGE_SHIFT: u32 = 21;
const GIANT_SHIFT: u32 = 30;

impl CodePages {
    fn new() -> CodePages {
        CodePages { bits: Box::new([0; CODE_WORDS]), has_large: false, has_giant: false, count: 0 }
    }

    /// The words and bits of a page.
    fn places(number: u64) -> [(usize, u64); 2] {
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // Both halves are well mixed, the upper better than the lower.
        [hash >> 47, hash >> 30].map(|place| ((place >> 6) as usize % CODE_WORDS, 1 << (place & 63)))
    }

    /// The numbers of large pages are told from those of small ones by bits that no such number has.
    fn large(address: Gva) -> u64 {
        address.0 >> LARGE_SHIFT | 1 << 63
    }

    fn giant(address: Gva) -> u64 {
        address.0 >> GIANT_SHIFT | 1 << 62
    }

    fn has(&self, number: u64) -> bool {
        Self::places(number).into_iter().all(|(word, bit)| self.bits[word] & bit != 0)
    }

    pub fn insert(&mut self, address: Gva, page_size: u64) {
        let number = match page_size {
            x86::PAGE_SIZE => address.0 >> x86::PAGE_SHIFT,
            size if size > 1 << LARGE_SHIFT => Self::giant(address),
            _ => Self::large(address),
        };
        self.count += u32::from(!self.has(number));
        for (word, bit) in Self::places(number) {
            self.bits[word] |= bit;
        }
        self.has_giant |= page_size > 1 << LARGE_SHIFT;
        self.has_large |= page_size == 1 << LARGE_SHIFT;
    }

    #[must_use]
    pub fn may_contain(&self, address: Gva) -> bool {
        self.has(address.0 >> x86::PAGE_SHIFT)
            || (self.has_large && self.has(Self::large(address)))
            || (self.has_giant && self.has(Self::giant(address)))
    }

    /// Whether so many pages are noted that yes says little.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.count > MOST_CODE_PAGES
    }

    pub fn clear(&mut self) {
        if self.count != 0 {
            self.bits.fill(0);
            (self.has_large, self.has_giant, self.count) = (false, false, 0);
        }
    }
}

/// The task priority, bits 7:4 of which are CR8: Intel SDM (2024-12) Vol. 3A 12.8.3.1 "Task and Processor Priorities".
///
/// The local APIC needs it to know whether an interrupt may disturb the processor, and systems that use it change it all
/// the time. So the APIC is told of a lower priority at once, and of a higher one when it matters: it may believe that an
/// interrupt can be taken, and finds out when one is about to be. Registers of the APIC are read and written between
/// [`crate::Core::tell_priority`] and [`crate::Core::learn_priority`].
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct TaskPriority {
    pub value: u32,
    /// What the APIC knows: never more than `value` while guest code runs.
    pub told: u32,
}

/// `repr(C)`, at a fixed place: translated code addresses it from one base register, which points just behind `hot`, so
/// that the most used fields have one-byte displacements.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Vcpu {
    pub(crate) hot: Hot,
    pub cpu: CpuState,
    /// The run loop has an interrupt that waits for IF or for the end of an interrupt shadow: an instruction that
    /// may open the window makes the engine exit with [`crate::Exit::InterruptWindow`].
    pub wants_interrupt_window: bool,
    pub priority: TaskPriority,
    pub stale: Stale,
    pub attention: Arc<Attention>,
    /// What the VCPU does just now, as [`crate::profile::Activity`] says it.
    pub sampler: Arc<Sampler>,
    /// Where its time went, when somebody wants to know.
    pub profile: Option<Box<Profile>>,
    /// Instructions that the interpreter ran.
    pub interpreted: u64,
    /// What [`crate::Core`] looks for at every access of the running code, as `debug.rs` sets it for one instruction; 0 while
    /// the guest uses neither data breakpoints nor alignment checks.
    pub checks: u8,
    /// Breakpoints (bits 0-3 as in DR6) that the accesses of this instruction hit.
    pub hits: u8,
    /// The last instruction was a MOV SS or POP SS that shields the next one.
    pub behind_stack_load: bool,
    /// Counts changes of the guest's mappings: who remembers where code is compares it.
    pub mappings: u64,
    /// How often something was forgotten because others asked for it: addresses from the TLB that were kept are stale then.
    pub obeyed: u64,
    /// Which of the machine's processors this is.
    pub number: usize,
    /// PAUSE instructions that ran, where the machine has several processors.
    pub pauses: u64,
    /// User code of some address space is to be run directly.
    has_direct: bool,
    /// What CPUID tells this guest.
    pub cpuid: Arc<CpuidModel>,
    pub kernel_code: CodePages,
    pub user_code: CodePages,
    pub(crate) across: Across,
    pub(crate) jumps: JumpCaches,
    pub tlb: SoftTlb,
}

impl Vcpu {
    /// Makes a VCPU at a place where translated code can run on it.
    pub fn place(cpu: CpuState) -> io::Result<Placed<Vcpu>> {
        let mut vcpu = Placed::new(STACK_BELOW, Vcpu::new(cpu))?;
        for bank in [Bank::Kernel, Bank::User, Bank::KernelAc] {
            vcpu.hot.shadow[bank as usize] = vcpu.tlb.shadow.table_address(bank);
        }
        vcpu.hot.is_placed = true;
        vcpu.hot.host_mxcsr = 0x1f80;
        Ok(vcpu)
    }

    /// A VCPU for the interpreter alone; see [`Vcpu::place`].
    #[must_use]
    pub fn new(cpu: CpuState) -> Vcpu {
        Vcpu {
            hot: Hot::default(),
            cpu,
            wants_interrupt_window: false,
            priority: TaskPriority::default(),
            stale: Stale::default(),
            attention: Arc::default(),
            sampler: Arc::default(),
            profile: None,
            interpreted: 0,
            checks: 0,
            mappings: 0,
            hits: 0,
            behind_stack_load: false,
            obeyed: 0,
            number: 0,
            pauses: 0,
            has_direct: false,
            cpuid: CpuidModel::shared(),
            kernel_code: CodePages::new(),
            user_code: CodePages::new(),
            across: Across::default(),
            jumps: JumpCaches::new(),
            tlb: SoftTlb::new(),
        }
    }

    /// Instructions that translated code ran, where it was told to count them.
    #[must_use]
    pub fn translated(&self) -> u64 {
        self.hot.instructions
    }

    /// What the TLB and the shadow did for translated code, by dotted name. Probes are counted where instructions are.
    #[must_use]
    pub fn tlb_counters(&self) -> [(&'static str, u64); 4] {
        let hot = &self.hot;
        [
            ("tlb.probes", hot.accesses),
            ("tlb.misses", hot.tlb_misses),
            ("shadow.hits", hot.shadow_hits),
            ("shadow.misses", hot.tlb_misses - hot.shadow_hits),
        ]
    }

    /// The TLB bank for explicit accesses of the running code.
    #[inline]
    #[must_use]
    pub fn bank(&self) -> Bank {
        if self.cpu.cpl() == 3 {
            Bank::User
        } else if self.cpu.rflags & rflags::AC != 0 {
            Bank::KernelAc
        } else {
            Bank::Kernel
        }
    }

    /// After a load of CR3: drops translations of pages that are not global.
    pub fn flush_local(&mut self) {
        self.tlb.flush_local();
        self.space_changed();
    }

    /// After a load of CR3 with PCIDs: the new space's translations are as they were, if they may be kept.
    pub fn switch_space(&mut self, pcid: u16, keep: bool) {
        self.tlb.switch_space(pcid, keep);
        self.space_changed();
    }

    /// The current PCID; `None` without CR4.PCIDE.
    #[must_use]
    pub fn pcid(&self) -> Option<u16> {
        (self.cpu.cr4 & cr4::PCIDE != 0).then_some((self.cpu.cr3 & 0xfff) as u16)
    }

    /// Drops the translations of the current address space.
    pub fn flush_space(&mut self) {
        match self.pcid() {
            Some(pcid) => self.switch_space(pcid, false),
            None => self.flush_local(),
        }
    }

    /// Says whether whoever returns to user code is to look first whether it can run directly.
    pub fn wants_direct(&mut self, wanted: bool) {
        self.has_direct = wanted;
        self.hot.direct = wanted.into();
    }

    fn space_changed(&mut self) {
        self.hot.direct = self.has_direct.into();
        self.mappings += 1;
        self.stale.local_mappings = true;
        let generation = self.tlb.generations[Bank::User as usize];
        let rounds = self.tlb.shadow.rounds;
        self.jumps.set_space(generation, rounds);
    }

    /// After a change of paging mode or a global invalidation.
    pub fn flush_all(&mut self) {
        self.tlb.flush_all();
        self.space_changed();
        self.stale.all_mappings = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_program_leaves_most_other_pages_alone() {
        let (mut pages, code) = (CodePages::new(), 0x40_0000);
        for page in 0..8192 {
            pages.insert(Gva(code + (page << 12)), x86::PAGE_SIZE);
        }
        assert!(!pages.is_crowded());
        assert!((0..8192).all(|page| pages.may_contain(Gva(code + (page << 12)))));
        let wrong = (0..10_000).filter(|page| pages.may_contain(Gva(0x7f00_0000_0000 + (page << 12)))).count();
        assert!(wrong < 500, "{wrong} of 10000 pages of data");
        pages.clear();
        assert!(!pages.may_contain(Gva(code)));
    }

    #[test]
    fn code_on_a_large_page_concerns_its_region_alone() {
        for (size, inside, outside) in
            [(1 << 12, 0xfff, 1 << 12), (1 << 21, 0x1f_ffff, 1 << 21), (1 << 30, 0x3fff_ffff, 1 << 39)]
        {
            let mut pages = CodePages::new();
            pages.insert(Gva(0x10), size);
            assert!(pages.may_contain(Gva(inside)), "{size:#x}");
            assert!(!pages.may_contain(Gva(outside)), "{size:#x}");
        }
    }
}
