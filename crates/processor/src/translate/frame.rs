//! What translated code addresses from its base register (host RSP): the layout of [`Vcpu`] as displacements.

use std::mem::offset_of;

use host::map::zero_and_let_go;
use memory::SoftTlb;
use memory::tlb::{Bank, TlbBank, TlbEntry};
use x86::{CpuState, DescriptorTable, Segment};

use super::exits::jump_index;
use super::lower::Mode;
use super::returns::{LANDINGS, Returns};
use crate::vcpu::{TaskPriority, Vcpu};

/// Pointers to checked stack or structure pages that a block keeps at a time; see `groups`.
pub const GROUPS: usize = 8;

/// The fields that translated code touches most. Its size is the bias of the base register.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Hot {
    /// Fills the structure up to a multiple of its alignment, so that nothing is added behind `stack`.
    reserved: u64,
    /// Failed probes of the TLB, those that the shadow mended, and, where instructions are counted, accesses to memory.
    pub tlb_misses: u64,
    pub shadow_hits: u64,
    pub accesses: u64,
    /// The tables of the shadow, by bank.
    pub shadow: [u64; 3],
    /// Guest and host addresses of a string instruction in progress.
    pub string: [u64; 3],
    /// The host's stack while translated code runs.
    pub host_stack: u64,
    /// The return address of the call that left translated code: it names the site.
    pub site: u64,
    /// The host's flags at a fault of the host in translated code.
    pub fault_flags: u64,
    /// Instructions begun in translated code, where they are counted.
    pub instructions: u64,
    pub host_mxcsr: u32,
    /// The mode of the code that runs, where code changed it by itself (SYSCALL, SYSRET).
    pub mode: u32,
    pub is_placed: bool,
    /// Not zero: a return to user code leaves, since that code may run directly.
    pub direct: u8,
    // The last fields are nearest to the base register.
    /// The two scratch registers at the last leave.
    pub scratch: [u64; 2],
    /// Where a value survives a probe that needs both scratch registers.
    pub spill: u64,
    /// Guest arithmetic flags while they are not in the host's RFLAGS, as PUSHFQ stores them.
    pub flags: u64,
    /// Host addresses of what a base register of the guest points at.
    pub groups: [u64; GROUPS],
    /// The base register is the host's RSP: this is where calls and PUSHFQ in translated code write, three words at most.
    stack: [u64; 4],
}

// The stack must be the last field, without padding behind it.
const _: () = assert!(offset_of!(Hot, stack) + 32 == BIAS);

pub const BIAS: usize = size_of::<Hot>();

/// An access that crosses from one page into the next, while it is put together; see `refill`.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Across {
    /// The end of the first page and the start of the second.
    buffer: [u64; 16],
    /// Host addresses of the access's first byte and of the second page.
    first: u64,
    second: u64,
    /// Where in the buffer the access begins.
    offset: u64,
    /// The address of the access.
    address: u64,
    saved: [u64; 3],
}

/// Entries of a jump cache, as powers of two. Jumps of user code to other pages all go through it; those of kernel code are
/// links, but for indirect ones.
const KERNEL_JUMPS: u32 = 12;
const USER_JUMPS: u32 = 16;

/// Log2 of the entries of a mode's jump cache.
#[must_use]
pub const fn jump_bits(mode: Mode) -> u32 {
    if mode.is_user() { USER_JUMPS } else { KERNEL_JUMPS }
}

/// The place of a RIP in a jump cache is in the upper bits of its low half times this: return addresses lie at the same
/// offsets of different pages often enough to want a real hash.
pub const JUMP_MULTIPLIER: u32 = 0x9e37_79b1;

/// Guest RIP -> where its block is entered with the flags in memory. Tags of user code are mixed with the generation of
/// their address space, so that a load of CR3 empties nothing.
/// An entry is a tag and a host address, 0 when there is none.
pub type JumpEntry = [u64; 2];

/// A cache for each mode of translated code.
#[derive(Debug)]
#[repr(C)]
pub struct JumpCaches {
    /// The generation of the current address space, in bits 63:48.
    pub user_generation: u64,
    /// How often the generations had gone round.
    rounds: u64,
    pub returns: Returns,
    /// The addresses of `user`.
    user_tables: [u64; 2],
    /// By [`cache_number`].
    kernel: [[JumpEntry; 1 << KERNEL_JUMPS]; 4],
    /// Most programs use little of theirs, and memory that is not used need not be there.
    user: [Box<[JumpEntry]>; 2],
    /// Entries that were filled since the kernel's, or the user's, were last cleared: a kernel whose pages are not global
    /// clears its own at every load of CR3, and most are empty.
    filled: [Vec<(Mode, u16)>; 2],
}

/// More filled entries than this are not remembered one by one.
const MOST_FILLED: usize = 2048;

/// What no lookup matches. A lookup only compares tags whose low half names the entry's own place (that of 0 is 0, and that
/// of 1 is far from it) or its neighbour's, so the tag of another place is impossible, whatever address a guest jumps to.
fn impossible(place: usize) -> JumpEntry {
    [u64::from(place < 2), 0]
}

/// A cache of user code. No tag there is 0: generations begin at 1, and only addresses of the lower half are looked for.
fn user_cache() -> Box<[JumpEntry]> {
    vec![[0; 2]; 1 << USER_JUMPS].into_boxed_slice()
}

impl Default for JumpCaches {
    fn default() -> Self {
        Self::new()
    }
}

impl JumpCaches {
    pub fn new() -> JumpCaches {
        let kernel = [std::array::from_fn(impossible); 4];
        let user = [user_cache(), user_cache()];
        let user_tables = [user[0].as_ptr() as u64, user[1].as_ptr() as u64];
        let filled = std::array::from_fn(|_| Vec::with_capacity(MOST_FILLED));
        JumpCaches { user_generation: 1 << 48, rounds: 0, returns: Returns::new(), user_tables, kernel, user, filled }
    }

    /// What the tag of a RIP in a cache is now.
    #[must_use]
    fn tag(&self, rip: u64, is_user: bool) -> u64 {
        if is_user { rip ^ self.user_generation } else { rip }
    }

    /// Goes to another address space, or to another generation of the same.
    pub fn set_space(&mut self, generation: u64, rounds: u64) {
        self.user_generation = generation << 48;
        self.returns.clear(true);
        if rounds != self.rounds {
            self.rounds = rounds;
            self.clear(true);
        }
    }

    fn cache(&self, mode: Mode) -> &[JumpEntry] {
        let number = cache_number(mode);
        if mode.is_user() { &self.user[number] } else { &self.kernel[number] }
    }

    fn cache_mut(&mut self, mode: Mode) -> &mut [JumpEntry] {
        let number = cache_number(mode);
        if mode.is_user() { &mut self.user[number] } else { &mut self.kernel[number] }
    }

    /// Forgets one block in all address spaces.
    pub fn forget_block(&mut self, rip: u64, mode: Mode) {
        let place = jump_index(rip, mode);
        for place in [place, place ^ 1] {
            let entry = &mut self.cache_mut(mode)[place];
            if (entry[0] ^ rip) << 16 == 0 {
                *entry = none(mode, place);
            }
        }
    }

    /// Where the block at a RIP is entered with the flags in memory, as far as it is remembered.
    #[must_use]
    pub fn find(&self, rip: u64, mode: Mode) -> Option<u64> {
        if mode.is_user() && rip >> 47 != 0 {
            // The generation could make its tag that of another address.
            return None;
        }
        let (tag, place) = (self.tag(rip, mode.is_user()), jump_index(rip, mode));
        let cache = self.cache(mode);
        let [_, host] = [cache[place], cache[place ^ 1]].into_iter().find(|[known, _]| *known == tag)?;
        (host != 0).then_some(host)
    }

    /// Remembers a block; what was at its place moves to the neighbour, unless that belongs there.
    pub fn remember(&mut self, rip: u64, mode: Mode, host: u64) {
        let (tag, place) = (self.tag(rip, mode.is_user()), jump_index(rip, mode));
        let old = self.fill(mode, place, [tag, host]);
        let [beside, beside_host] = self.cache(mode)[place ^ 1];
        // Two blocks whose own places are side by side would else evict each other for the sake of a third that nobody needs.
        let is_at_home = beside_host != 0 && jump_index(beside, mode) == place ^ 1;
        if old[1] != 0 && old[0] != tag && !is_at_home {
            self.fill(mode, place ^ 1, old);
        }
    }

    /// Puts an entry at a place; gives what was there.
    fn fill(&mut self, mode: Mode, place: usize, entry: JumpEntry) -> JumpEntry {
        let old = std::mem::replace(&mut self.cache_mut(mode)[place], entry);
        let filled = &mut self.filled[usize::from(mode.is_user())];
        if old[1] == 0 && filled.len() < MOST_FILLED {
            filled.push((mode, place as u16));
        }
        old
    }

    /// Forgets all user code, and gives the memory back until it is used.
    pub fn rest(&mut self) {
        self.returns.clear(true);
        self.user.iter_mut().for_each(|cache| zero_and_let_go(cache));
        self.filled[1].clear();
    }

    /// Forgets all user code, or all kernel code.
    pub fn clear(&mut self, user: bool) {
        self.returns.clear(user);
        let mut filled = std::mem::take(&mut self.filled[usize::from(user)]);
        if filled.len() < MOST_FILLED {
            for (mode, place) in &filled {
                self.cache_mut(*mode)[usize::from(*place)] = none(*mode, (*place).into());
            }
        } else if user {
            self.user = [user_cache(), user_cache()];
            self.user_tables = [self.user[0].as_ptr() as u64, self.user[1].as_ptr() as u64];
        } else {
            self.kernel = [std::array::from_fn(impossible); 4];
        }
        filled.clear();
        self.filled[usize::from(user)] = filled;
    }
}

/// What a place holds that was emptied.
fn none(mode: Mode, place: usize) -> JumpEntry {
    if mode.is_user() { [0; 2] } else { impossible(place) }
}

/// The number of a mode's cache among those of its privilege. User code is of one mode whether AC is set or not.
const fn cache_number(mode: Mode) -> usize {
    let simd = (mode.0 & Mode::SIMD != 0) as usize;
    if mode.is_user() { simd } else { simd << 1 | (mode.0 & Mode::AC != 0) as usize }
}

/// Displacement from the base register of an offset in [`Vcpu`].
const fn disp(offset: usize) -> i32 {
    offset as i32 - BIAS as i32
}

const CPU: usize = offset_of!(Vcpu, cpu);
const ACROSS: usize = offset_of!(Vcpu, across);

pub const FLAGS: i32 = disp(offset_of!(Hot, flags));
pub const SCRATCH: i32 = disp(offset_of!(Hot, scratch));
pub const DIRECT: i32 = disp(offset_of!(Hot, direct));
pub const SPILL: i32 = disp(offset_of!(Hot, spill));
pub const MODE: i32 = disp(offset_of!(Hot, mode));
pub const STAR: i32 = disp(CPU + offset_of!(CpuState, star));
pub const LSTAR: i32 = disp(CPU + offset_of!(CpuState, lstar));
pub const SFMASK: i32 = disp(CPU + offset_of!(CpuState, sfmask));
pub const STRING: i32 = disp(offset_of!(Hot, string));
pub const GDT_BASE: i32 = disp(CPU + offset_of!(CpuState, gdtr) + offset_of!(DescriptorTable, base));
pub const GDT_LIMIT: i32 = disp(CPU + offset_of!(CpuState, gdtr) + offset_of!(DescriptorTable, limit));
pub const DR7: i32 = disp(CPU + offset_of!(CpuState, dr) + 8 * 7);
pub const NMI_BLOCKED: i32 = disp(CPU + offset_of!(CpuState, nmi_blocked));
pub const HOST_STACK: i32 = disp(offset_of!(Hot, host_stack));
pub const SITE: i32 = disp(offset_of!(Hot, site));
pub const FAULT_FLAGS: i32 = disp(offset_of!(Hot, fault_flags));
pub const TLB_MISSES: i32 = disp(offset_of!(Hot, tlb_misses));
pub const SHADOW_HITS: i32 = disp(offset_of!(Hot, shadow_hits));
pub const ACCESSES: i32 = disp(offset_of!(Hot, accesses));
pub const INSTRUCTIONS: i32 = disp(offset_of!(Hot, instructions));
pub const HOST_MXCSR: i32 = disp(offset_of!(Hot, host_mxcsr));
pub const RFLAGS: i32 = disp(CPU + offset_of!(CpuState, rflags));
pub const FPU: i32 = disp(CPU + offset_of!(CpuState, fpu));
pub const KERNEL_GS_BASE: i32 = disp(CPU + offset_of!(CpuState, kernel_gs_base));
pub const TSC_AUX: i32 = disp(CPU + offset_of!(CpuState, tsc_aux));
pub const TSC_OFFSET: i32 = disp(CPU + offset_of!(CpuState, tsc_offset));
pub const WANTS_WINDOW: i32 = disp(offset_of!(Vcpu, wants_interrupt_window));
pub const PRIORITY: i32 = disp(offset_of!(Vcpu, priority) + offset_of!(TaskPriority, value));
pub const PRIORITY_TOLD: i32 = disp(offset_of!(Vcpu, priority) + offset_of!(TaskPriority, told));
pub const USER_GENERATION: i32 = disp(offset_of!(Vcpu, jumps) + offset_of!(JumpCaches, user_generation));
pub const CROSSING_BUFFER: i32 = disp(ACROSS + offset_of!(Across, buffer));
pub const CROSSING_FIRST: i32 = disp(ACROSS + offset_of!(Across, first));
pub const CROSSING_SECOND: i32 = disp(ACROSS + offset_of!(Across, second));
pub const CROSSING_OFFSET: i32 = disp(ACROSS + offset_of!(Across, offset));
pub const CROSSING_ADDRESS: i32 = disp(ACROSS + offset_of!(Across, address));
pub const CROSSING_SAVED: i32 = disp(ACROSS + offset_of!(Across, saved));
pub const TLB_READ: i32 = offset_of!(TlbEntry, read) as i32;
pub const TLB_WRITE: i32 = offset_of!(TlbEntry, write) as i32;
pub const TLB_PAGE: i32 = offset_of!(TlbEntry, page) as i32;

#[must_use]
pub fn group(slot: usize) -> i32 {
    disp(offset_of!(Hot, groups) + 8 * slot)
}

#[must_use]
pub fn gpr(guest: usize) -> i32 {
    disp(CPU + offset_of!(CpuState, gpr) + 8 * guest)
}

/// A control register, of those that are plain fields.
#[must_use]
pub fn control(number: u8) -> i32 {
    disp(
        CPU + match number {
            0 => offset_of!(CpuState, cr0),
            2 => offset_of!(CpuState, cr2),
            3 => offset_of!(CpuState, cr3),
            _ => offset_of!(CpuState, cr4),
        },
    )
}

/// Where the selector of a segment register is; the attributes follow it.
#[must_use]
pub fn selector(segment: usize) -> i32 {
    disp(CPU + offset_of!(CpuState, segments) + segment * size_of::<Segment>() + offset_of!(Segment, selector))
}

#[must_use]
pub fn segment_base(segment: usize) -> i32 {
    disp(CPU + offset_of!(CpuState, segments) + segment * size_of::<Segment>() + offset_of!(Segment, base))
}

#[must_use]
pub fn tlb(bank: Bank) -> i32 {
    disp(offset_of!(Vcpu, tlb) + offset_of!(SoftTlb, banks) + bank as usize * size_of::<TlbBank>())
}

/// The word of dirty bits of a bank.
#[must_use]
pub fn dirty(bank: Bank) -> i32 {
    disp(offset_of!(Vcpu, tlb) + offset_of!(SoftTlb, dirty) + 8 * bank as usize)
}

/// The generation of a bank in the shadow.
#[must_use]
pub fn generation(bank: Bank) -> i32 {
    disp(offset_of!(Vcpu, tlb) + offset_of!(SoftTlb, generations) + 8 * bank as usize)
}

/// Where the host address of a bank's shadow table is.
#[must_use]
pub fn shadow(bank: Bank) -> i32 {
    disp(offset_of!(Hot, shadow) + 8 * bank as usize)
}

/// The table of landings of a mode.
#[must_use]
pub fn returns(mode: usize) -> i32 {
    let tables = offset_of!(JumpCaches, returns) + offset_of!(Returns, landings);
    disp(offset_of!(Vcpu, jumps) + tables + mode * size_of::<[u64; LANDINGS]>())
}

/// Where the jump cache of a mode is: from the base register, or where its address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JumpCache {
    Here(i32),
    At(i32),
}

#[must_use]
pub const fn jump_cache(mode: Mode) -> JumpCache {
    let (jumps, number) = (offset_of!(Vcpu, jumps), cache_number(mode));
    if mode.is_user() {
        JumpCache::At(disp(jumps + offset_of!(JumpCaches, user_tables) + 8 * number))
    } else {
        let size = size_of::<[JumpEntry; 1 << KERNEL_JUMPS]>();
        JumpCache::Here(disp(jumps + offset_of!(JumpCaches, kernel) + number * size))
    }
}

const fn jump_place(mode: Mode) -> i32 {
    match jump_cache(mode) {
        JumpCache::Here(place) | JumpCache::At(place) => place,
    }
}

/// The places of all that translated code reaches: a kept translation is only right where they are the same.
#[must_use]
pub fn layout() -> Vec<u64> {
    let fields = [
        FLAGS,
        SCRATCH,
        DIRECT,
        SPILL,
        MODE,
        STAR,
        LSTAR,
        SFMASK,
        STRING,
        GDT_BASE,
        GDT_LIMIT,
        DR7,
        NMI_BLOCKED,
        HOST_STACK,
        SITE,
        FAULT_FLAGS,
        TLB_MISSES,
        SHADOW_HITS,
        ACCESSES,
        INSTRUCTIONS,
        HOST_MXCSR,
        RFLAGS,
        FPU,
        KERNEL_GS_BASE,
        TSC_AUX,
        TSC_OFFSET,
        WANTS_WINDOW,
        PRIORITY,
        PRIORITY_TOLD,
        USER_GENERATION,
        TLB_READ,
        TLB_WRITE,
        TLB_PAGE,
    ];
    let computed = [
        group(0),
        gpr(0),
        selector(0),
        segment_base(0),
        jump_place(Mode(0)),
        jump_place(Mode(Mode::USER)),
        returns(0),
        shadow(Bank::Kernel),
    ];
    let banks = [Bank::Kernel, Bank::User, Bank::KernelAc].map(|bank| [tlb(bank), dirty(bank), generation(bank)]);
    let controls = [0, 2, 3, 4].map(control);
    let all = fields.into_iter().chain(computed).chain(banks.into_iter().flatten()).chain(controls);
    all.map(|place| place as u64).chain([size_of::<Vcpu>() as u64]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(jumps: &JumpCaches, rip: u64, mode: u8) -> Option<u64> {
        jumps.find(rip, Mode(mode))
    }

    #[test]
    fn jumps_are_found_in_their_mode_and_space_until_cleared() {
        let mut jumps = Box::new(JumpCaches::new());
        let kernel = 0xffff_ffff_8100_0000;
        jumps.remember(kernel, Mode(0), 0x1000);
        jumps.remember(0x40_0000, Mode(Mode::USER), 0x2000);
        assert_eq!(find(&jumps, kernel, 0), Some(0x1000));
        assert_eq!(find(&jumps, kernel, Mode::AC), None);
        assert_eq!(find(&jumps, 0x40_0000, Mode::USER), Some(0x2000));
        jumps.set_space(2, 0);
        assert_eq!(find(&jumps, 0x40_0000, Mode::USER), None);
        jumps.set_space(1, 0);
        assert_eq!(find(&jumps, 0x40_0000, Mode::USER), Some(0x2000));
        jumps.clear(false);
        assert_eq!((find(&jumps, kernel, 0), find(&jumps, 0x40_0000, Mode::USER)), (None, Some(0x2000)));
        // An address that differs from a known one by two generations is none.
        assert_eq!(find(&jumps, 0x40_0000 ^ 3 << 48, Mode::USER), None);
    }

    #[test]
    fn blocks_whose_places_are_neighbours_do_not_evict_each_other() {
        for mode in [Mode(0), Mode(Mode::USER)] {
            let mut jumps = Box::new(JumpCaches::new());
            let at = |place: usize| (1..).map(|n| n << 4).filter(move |rip| jump_index(*rip, mode) == place);
            let (mut here, beside) = (at(6), at(7).next().unwrap());
            let (one, other) = (here.next().unwrap(), here.next().unwrap());
            for rip in [one, beside, other, beside, other] {
                jumps.remember(rip, mode, rip);
                assert_eq!(find(&jumps, rip, mode.0), Some(rip));
            }
            assert_eq!(find(&jumps, beside, mode.0), Some(beside));
            // Where nobody is at home, there is room for two.
            jumps.forget_block(beside, mode);
            jumps.remember(one, mode, one);
            assert_eq!((find(&jumps, one, mode.0), find(&jumps, other, mode.0)), (Some(one), Some(other)));
        }
    }

    #[test]
    fn a_full_cache_is_cleared_whole() {
        let mut jumps = Box::new(JumpCaches::new());
        for round in 0..2 {
            for (mode, start) in [(Mode(0), 0xffff_8000_0000_0000), (Mode(Mode::USER | Mode::SIMD), 0)] {
                let entries = 1 << jump_bits(mode);
                for page in 0..3 * entries {
                    jumps.remember(start + (page << 12) + round, mode, 0x1000);
                }
                let filled = |jumps: &JumpCaches| jumps.cache(mode).iter().filter(|[_, host]| *host != 0).count();
                assert!(filled(&jumps) as u64 > entries / 2);
                jumps.clear(mode.is_user());
                assert_eq!(filled(&jumps), 0);
            }
        }
    }
}
