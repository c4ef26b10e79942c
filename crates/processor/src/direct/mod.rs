//! Direct execution: the guest's user code runs as it stands, on the host's processor, in a process whose own page tables
//! are the shadow of the guest's. As VMware ESX did for user code; the kernel's code is translated all the same.
//!
//! An excursion into the process begins at an instruction of user code and ends at the first that needs somebody: a system
//! call, a fault, an interrupt. State goes over and comes back whole, so that direct execution is never more than another
//! way to run the same instructions: whatever stops it is done again by the interpreter, which knows all the rest. What the
//! process reaches is what the guest's page tables let user code reach, see [`space`]; what it may execute is looked
//! through before, see [`scan`]; and whether it is worth the way there and back is judged all the time, see [`pace`].

mod audit;
mod exact;
mod pace;
mod scan;
mod space;
mod switch;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use host::affinity::{self, Set};
use host::clock::{host_tsc, host_tsc_hz};
use host::tracee::{Kicker, Stop};
use x86::paging::ADDRESS;
use x86::{GuestFault, Gva, Ppn, cr0, cr4, dr6, efer, registers::xcr0, rflags, seg};

use self::exact::Exact;
use self::pace::Paces;
use self::scan::Telling;
use self::space::{Space, Want};
use crate::core::Core;
use crate::deliver;
use crate::engine::Exit;
use crate::profile::Doing;
use crate::vcpu::Vcpu;

/// Processes that one VCPU keeps, each with the address space of a guest process.
const SPACES: usize = 4;
/// A page whose code is written so often is left to the translator.
const MOST_WRITES: u8 = 8;
/// How many pages with written code are remembered.
const MOST_REMEMBERED: usize = 4096;
/// As many pages of an address space are mapped without counting what that takes.
const INVESTMENT: u64 = 8192;
/// The part of a second that is lost at a stop at most.
const MOST_LOST: u64 = 5_000;
/// Instructions on a page that may not run directly that are interpreted, in the hope that it is left again: as many as
/// the vDSO needs to read the clock, and the dynamic linker to find a function.
const STEPS: u32 = 200;
/// Not after so many stops, though: then it is in a loop.
const MOST_STOPS: u64 = 64;
/// So often in a second process and VCPU may go to another processor of the host; otherwise they share one, since to wake
/// somebody on a sleeping processor takes ten times as long as an excursion.
const MOVES: u64 = 20;

/// Which user code is run directly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// None.
    #[default]
    Never,
    /// That of processes which compute for a while between two calls of their kernel.
    Worthwhile,
    /// All that can be: for tests.
    Always,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    excursions: u64,
    calls: u64,
    faults: u64,
    fills: u64,
    steps: u64,
    pages: u64,
    checks: u64,
    resets: u64,
    processes: u64,
    breaks: u64,
    ticks: u64,
}

/// The direct execution of one VCPU.
#[derive(Debug)]
pub struct Direct {
    choice: Choice,
    kicker: Arc<Kicker>,
    spaces: Vec<Space>,
    /// Which thread the processes of the spaces obey.
    thread: Option<std::thread::ThreadId>,
    paces: Paces,
    codes: Codes,
    counters: Counters,
    /// Why the host lets no process be made.
    refusal: Option<std::io::Error>,
    place: Place,
    turn: u64,
    /// The guest's, for which code was looked through.
    tsc_offset: u64,
    /// The instruction that last left with a fault for the guest's kernel, and the address that it wanted.
    missing: Option<(Gva, Gva)>,
}

/// Pages of code: which were looked through, and with what result.
#[derive(Debug, Default)]
struct Codes {
    /// Traced for this VCPU since they were looked through.
    plain: HashSet<Ppn>,
    /// What the others have that tells of the host, if they can be run but for that.
    refused: HashMap<Ppn, Option<Arc<Telling>>>,
    /// Of those, the ones that ran so.
    exact: HashSet<Ppn>,
    writes: HashMap<Ppn, u8>,
    /// No more plain, but perhaps still mapped as code.
    stale: Vec<Ppn>,
    all_are_stale: bool,
}

/// Where on the host process and VCPU run.
#[derive(Debug, Default)]
struct Place {
    all: Option<Set>,
    on: Option<usize>,
    moved: u64,
}

/// How an excursion ended, for who had it made.
#[derive(Debug)]
pub enum Ended {
    /// There was none: the code at RIP is to be run otherwise.
    Refused,
    /// Look at everything again.
    Somewhere,
    Exit(Exit),
}

impl Direct {
    /// Direct execution for one VCPU; `None` when no code is to be run so.
    #[must_use]
    pub fn new(choice: Choice) -> Option<Box<Direct>> {
        (choice != Choice::Never).then(|| {
            Box::new(Direct {
                choice,
                kicker: Arc::default(),
                spaces: Vec::new(),
                thread: None,
                paces: Paces::default(),
                codes: Codes::default(),
                counters: Counters::default(),
                refusal: None,
                place: Place::default(),
                turn: 0,
                tsc_offset: 0,
                missing: None,
            })
        })
    }

    /// What makes an excursion in progress end soon.
    #[must_use]
    pub fn kicker(&self) -> Arc<Kicker> {
        Arc::clone(&self.kicker)
    }

    /// User code was at work when something came up: whose it is may be worth direct execution from now on.
    pub fn sampled(&mut self, vcpu: &mut Vcpu) {
        if self.refusal.is_some() || vcpu.cpu.cpl() != 3 {
            return;
        }
        if self.choice == Choice::Always || self.paces.sampled(vcpu.cpu.cr3 & ADDRESS, host_tsc()) {
            vcpu.wants_direct(true);
        }
    }

    /// User code had to be translated, which takes longer than to map it.
    pub fn translated(&mut self, vcpu: &mut Vcpu) {
        if self.refusal.is_none() && self.paces.translated(vcpu.cpu.cr3 & ADDRESS, host_tsc()) {
            vcpu.wants_direct(true);
        }
    }

    /// Stores have hit code of this page, or it is not traced any more.
    pub fn forget_code(&mut self, ppn: Ppn) {
        if self.codes.plain.remove(&ppn) | self.codes.exact.remove(&ppn) {
            self.codes.stale.push(ppn);
            if self.codes.writes.len() >= MOST_REMEMBERED {
                self.codes.writes.clear();
            }
            let writes = self.codes.writes.entry(ppn).or_default();
            *writes = writes.saturating_add(1);
        }
        self.codes.refused.remove(&ppn);
    }

    /// No code of this VCPU is traced any more.
    pub fn forget_all_code(&mut self) {
        self.codes.plain.clear();
        self.codes.refused.clear();
        self.codes.exact.clear();
        self.codes.all_are_stale = true;
    }

    /// The VCPU goes to sleep: its thread may be woken on any processor.
    pub fn rest(&mut self) {
        if self.place.on.take().is_some()
            && let Some(all) = &self.place.all
        {
            // A refusal costs time, nothing else.
            let _ = all.apply(0);
        }
    }

    /// Nobody has run for long: the processes go, which cost the host memory. They come back when they are wanted.
    pub fn let_go(&mut self) {
        self.spaces.clear();
    }

    /// Whether the code on a page, which is to be run next, is to be run otherwise.
    pub fn refuses(&mut self, vcpu: &Vcpu, ppn: Ppn) -> bool {
        let Some(telling) = self.codes.refused.get(&ppn) else { return false };
        let root = vcpu.cpu.cr3 & ADDRESS;
        let space = self.spaces.iter_mut().find(|space| space.root == root && telling.is_some());
        space.is_none_or(|space| !space.exact.is_hot(ppn, host_tsc()))
    }

    /// Runs user code from RIP on, if it can be and is worth it. `interpret` runs one instruction.
    pub fn run(&mut self, core: &mut Core<'_>, interpret: &mut dyn FnMut(&mut Core<'_>) -> Option<Exit>) -> Ended {
        let root = core.vcpu.cpu.cr3 & ADDRESS;
        let is_wanted = self.choice == Choice::Always || self.paces.is_wanted(root);
        if !is_wanted || self.refusal.is_some() || !is_ordinary(core.vcpu) {
            core.vcpu.hot.direct = 0;
            return Ended::Refused;
        }
        if core.vcpu.cpu.tsc_offset != self.tsc_offset {
            self.tsc_offset = core.vcpu.cpu.tsc_offset;
            self.forget_all_code();
        }
        let start = host_tsc();
        if self.choice == Choice::Worthwhile && self.paces.breathes(root, start) {
            return Ended::Refused;
        }
        let index = match self.space_of(core, root) {
            Ok(index) => index,
            Err(error) => {
                self.refusal = Some(error);
                core.vcpu.wants_direct(false);
                return Ended::Refused;
            }
        };
        let created = host_tsc();
        let before = self.counters.ticks;
        let mut spent = Spent::default();
        let ended = self.excursion(core, index, interpret, &mut spent);
        let end = host_tsc();
        let useful = self.counters.ticks - before;
        // What is there for long does not count, unless it goes again all the time.
        let is_new = self.spaces.get(index).is_some_and(|space| space.filled < INVESTMENT);
        let invested = if is_new { spent.filling } else { 0 };
        let lost = end.wrapping_sub(created).saturating_sub(useful + invested);
        // Who takes longer was interrupted by others of the host, which says nothing about this guest.
        let lost = lost.min(host_tsc_hz() / MOST_LOST * spent.stops);
        if self.choice == Choice::Worthwhile && !self.paces.judge(root, useful, lost, end) {
            core.vcpu.wants_direct(self.paces.any_wanted());
            core.vcpu.hot.direct = 0;
        }
        if self.choice == Choice::Worthwhile
            && let Some(space) = self.spaces.get_mut(index)
            && space.exact.is_too_dear(end)
            && space.unmap_exact().is_err()
        {
            return self.give_up(core, index);
        }
        ended
    }

    /// The space of a guest's address space, with a process that is ours.
    fn space_of(&mut self, core: &mut Core<'_>, root: u64) -> std::io::Result<usize> {
        let thread = std::thread::current().id();
        if self.thread != Some(thread) {
            self.spaces.clear();
            self.thread = Some(thread);
            self.place = Place { all: Set::of_thread().ok(), ..Place::default() };
        }
        self.turn += 1;
        let turn = self.turn;
        let known = self.spaces.iter().position(|space| space.root == root);
        let index = match known {
            Some(index) => index,
            None if self.spaces.len() < SPACES => {
                self.counters.processes += 1;
                let exact = Exact::new(self.choice == Choice::Always);
                self.spaces.push(Space::new(root, core.memory, exact)?);
                core.vcpu.tlb.dropped.is_wanted = true;
                self.spaces.len() - 1
            }
            None => {
                let oldest = self.spaces.iter().enumerate().min_by_key(|(_, space)| space.used);
                let index = oldest.map_or(0, |(index, _)| index);
                self.spaces[index].begin_anew(root)?;
                index
            }
        };
        self.spaces[index].used = turn;
        Ok(index)
    }

    /// Tells the spaces what was dropped since, and brings one up to date.
    fn bring_up_to_date(&mut self, core: &mut Core<'_>, index: usize) -> std::io::Result<()> {
        let dropped = &mut core.vcpu.tlb.dropped;
        let are_many = std::mem::take(&mut dropped.are_many);
        let pages = std::mem::take(&mut dropped.pages);
        let moved = std::mem::take(&mut dropped.moved);
        let all_moved = std::mem::take(&mut dropped.all_moved);
        for space in &mut self.spaces {
            if are_many {
                space.doubt();
            }
            for (generation, page) in &pages {
                space.drop_page(*generation, *page);
            }
            if all_moved {
                space.unmap_all();
            } else if !moved.is_empty() {
                space.drop_moved(&moved);
            }
            if self.codes.all_are_stale {
                space.drop_code(|_| true);
            } else if !self.codes.stale.is_empty() {
                space.drop_code(|ppn| self.codes.stale.contains(&ppn));
            }
        }
        core.vcpu.tlb.dropped.pages = pages;
        core.vcpu.tlb.dropped.pages.clear();
        self.codes.stale.clear();
        self.codes.all_are_stale = false;
        self.counters.checks += u64::from(self.spaces[index].bring_up_to_date(core)?);
        Ok(())
    }

    fn excursion(
        &mut self,
        core: &mut Core<'_>,
        index: usize,
        interpret: &mut dyn FnMut(&mut Core<'_>) -> Option<Exit>,
        spent: &mut Spent,
    ) -> Ended {
        self.counters.excursions += 1;
        if let Some((rip, address)) = self.missing.take()
            && rip.0 == core.vcpu.cpu.rip
        {
            // The guest's kernel has mapped it by now. That page alone: no investment.
            match self.fill(core, index, rip, address) {
                Ok(true) => {}
                Ok(false) => return Ended::Refused,
                Err(_) => return self.give_up(core, index),
            }
        }
        loop {
            let (begun, before) = (host_tsc(), self.counters.ticks);
            if self.bring_up_to_date(core, index).is_err() {
                return self.give_up(core, index);
            }
            let stop = match self.go(core, index) {
                Ok(Some(stop)) => stop,
                // Somebody wants the VCPU; it stands where it stood.
                Ok(None) => return Ended::Somewhere,
                Err(_) => return self.give_up(core, index),
            };
            spent.stops += 1;
            let mut wanted = None;
            match stop {
                Stop::Kick => return Ended::Somewhere,
                Stop::Gone => return self.give_up(core, index),
                Stop::Call => self.counters.calls += 1,
                Stop::Fault => self.counters.faults += 1,
                Stop::Access(address) => {
                    self.counters.faults += 1;
                    wanted = Some(Gva(address));
                }
                Stop::Trap { is_step: true } => {
                    let exit = deliver::fault(core, GuestFault::debug(dr6::BS));
                    return exit.map_or(Ended::Somewhere, Ended::Exit);
                }
                Stop::Trap { is_step: false } => switch::back_to_trap(core),
                Stop::Break => self.counters.breaks += 1,
            }
            let space = &mut self.spaces[index];
            let forbids_cpuid = space.tracee.forbids_cpuid();
            space.exact.has_stopped(stop == Stop::Break || stop == Stop::Fault && forbids_cpuid, forbids_cpuid);
            let rip = Gva(core.vcpu.cpu.rip);
            if let Some(exit) = interpret(core) {
                return Ended::Exit(exit);
            }
            if core.vcpu.cpu.cpl() != 3 {
                self.missing = wanted.map(|address| (rip, address));
                return Ended::Somewhere;
            }
            if core.vcpu.attention.is_raised()
                || core.vcpu.cpu.cr3 & ADDRESS != self.spaces[index].root
                || core.memory.code.is_pending(core.vcpu.number)
                || !is_ordinary(core.vcpu)
            {
                return Ended::Somewhere;
            }
            if let Some(address) = wanted {
                match self.fill(core, index, rip, address) {
                    Ok(true) => {
                        // With the way there and back.
                        let useful = self.counters.ticks - before;
                        spent.filling += host_tsc().wrapping_sub(begun).saturating_sub(useful);
                    }
                    Ok(false) if spent.stops > MOST_STOPS => return Ended::Somewhere,
                    Ok(false) => match self.step_off(core, rip, interpret) {
                        None => {}
                        Some(ended) => return ended,
                    },
                    Err(_) => return self.give_up(core, index),
                }
            }
        }
    }

    /// Interprets what may not run directly, as long as it is little; `None` when RIP has left the page of `rip`.
    fn step_off(
        &mut self,
        core: &mut Core<'_>,
        rip: Gva,
        interpret: &mut dyn FnMut(&mut Core<'_>) -> Option<Exit>,
    ) -> Option<Ended> {
        for _ in 0..STEPS {
            if let Some(exit) = interpret(core) {
                return Some(Ended::Exit(exit));
            }
            if core.vcpu.attention.is_raised()
                || core.memory.code.is_pending(core.vcpu.number)
                || !is_ordinary(core.vcpu)
            {
                break;
            }
            self.counters.steps += 1;
            if Gva(core.vcpu.cpu.rip).page() != rip.page() {
                return None;
            }
        }
        Some(Ended::Somewhere)
    }

    /// Maps what an instruction at `rip` wanted at `address`; false when the code there is not to be run so.
    fn fill(&mut self, core: &mut Core<'_>, index: usize, rip: Gva, address: Gva) -> std::io::Result<bool> {
        self.counters.fills += 1;
        // A page must be marked as code before it is filled as data, which may take rights away.
        self.bring_up_to_date(core, index)?;
        let space = &mut self.spaces[index];
        let is_code = address.page() == rip.page() || address.page() == rip.add(14).page();
        let want = if is_code && !space.executes(address) { Want::Code } else { Want::Data };
        self.counters.pages += space.fill(core, address, want, &mut self.codes)?;
        Ok(want == Want::Data || space.executes(address))
    }

    /// Sets the process going with the VCPU's state, until it stops for a reason of the guest's or the VCPU is wanted; takes the
    /// state back.
    fn go(&mut self, core: &mut Core<'_>, index: usize) -> std::io::Result<Option<Stop>> {
        self.settle(index);
        let tracee = &mut self.spaces[index].tracee;
        switch::put(&core.vcpu.cpu, tracee)?;
        let mut has_run = false;
        let stop = loop {
            self.kicker.announce(tracee);
            if core.vcpu.attention.is_raised() {
                self.kicker.withdraw();
                if !has_run {
                    return Ok(None);
                }
                break Stop::Kick;
            }
            core.vcpu.sampler.now(Doing::Direct.word());
            let begun = host_tsc();
            let stop = tracee.run();
            let ticks = host_tsc().wrapping_sub(begun);
            core.vcpu.sampler.now(Doing::Dispatch.word());
            self.kicker.withdraw();
            has_run = true;
            self.counters.ticks += self.paces.without_switch(ticks, tracee.forbids_cpuid());
            if stop != Stop::Kick {
                break stop;
            }
        };
        if stop != Stop::Gone && !switch::take(core, tracee, stop)? {
            self.paces.ban(self.spaces[index].root);
        }
        Ok(Some(stop))
    }

    /// Puts process and VCPU on the same processor of the host, or lets the host find better ones from time to time.
    fn settle(&mut self, index: usize) {
        let (place, tracee) = (&mut self.place, &mut self.spaces[index].tracee);
        let Some(all) = place.all else { return };
        let now = host_tsc();
        if place.on.is_some() && now.wrapping_sub(place.moved) > host_tsc_hz() / MOVES {
            place.moved = now;
            place.on = None;
            let _ = all.apply(0);
            tracee.stay(None, &all);
            return;
        }
        if place.on.is_none() {
            let Some(current) = affinity::current() else { return };
            if Set::one(current).apply(0).is_err() {
                return;
            }
            place.on = Some(current);
        }
        tracee.stay(place.on, &all);
    }

    /// The host has refused something: most likely there are too many mappings, or too little memory for them.
    fn give_up(&mut self, core: &mut Core<'_>, index: usize) -> Ended {
        self.counters.resets += 1;
        let root = self.spaces[index].root;
        if self.spaces[index].is_gone() {
            self.spaces.clear();
            return Ended::Exit(Exit::Unsupported(
                "the host has ended the process that ran the guest's user code; if it lacks memory give it more, or use \
                 --engine translate"
                    .into(),
            ));
        }
        if self.spaces[index].begin_anew(root).is_err() {
            self.spaces.clear();
        }
        self.paces.ban(root);
        core.vcpu.hot.direct = 0;
        Ended::Somewhere
    }

    /// Counters by dotted name.
    pub fn counters(&self, counters: &mut Vec<(&'static str, u64)>) {
        let c = &self.counters;
        counters.extend([
            ("direct.excursions", c.excursions),
            ("direct.calls", c.calls),
            ("direct.faults", c.faults),
            ("direct.fills", c.fills),
            ("direct.pages", c.pages),
            ("direct.steps", c.steps),
            ("direct.breaks", c.breaks),
            ("direct.checks", c.checks),
            ("direct.resets", c.resets),
            ("direct.processes", c.processes),
            ("direct.refused_pages", self.codes.refused.len() as u64),
            ("direct.exact_pages", self.codes.exact.len() as u64),
            ("direct.given_up", self.paces.given_up),
            ("direct.nanoseconds", host::clock::scale(c.ticks, 1_000_000_000, host_tsc_hz())),
            ("direct.impossible", u64::from(self.refusal.is_some())),
        ]);
    }
}

/// Time of an excursion that may be an investment: pages mapped once are there for long.
#[derive(Debug, Default)]
struct Spent {
    filling: u64,
    stops: u64,
}

/// Whether the VCPU is in a state that a process of the host can have: 64-bit user code under Linux's selectors, with no
/// flag, no breakpoint and no control bit that makes instructions mean something else than they do there.
fn is_ordinary(vcpu: &Vcpu) -> bool {
    const FLAGS: u64 = rflags::ARITHMETIC | rflags::DF | rflags::IF | rflags::FIXED;
    const NEEDED0: u64 = cr0::PE | cr0::PG | cr0::NE;
    const NEEDED4: u64 = cr4::OSFXSR | cr4::OSXSAVE | cr4::FSGSBASE | cr4::OSXMMEXCPT;
    let cpu = &vcpu.cpu;
    let selector = |segment: usize| cpu.segments[segment].selector;
    cpu.cpl() == 3
        && cpu.is_code64()
        && cpu.rflags & !FLAGS == 0
        && cpu.rflags & rflags::IF != 0
        && (selector(seg::CS), selector(seg::SS)) == switch::SELECTORS
        && [seg::DS, seg::ES, seg::FS, seg::GS].iter().all(|segment| selector(*segment) == 0)
        && cpu.cr0 & NEEDED0 == NEEDED0
        && cpu.cr0 & (cr0::TS | cr0::EM) == 0
        && cpu.cr4 & NEEDED4 == NEEDED4
        && cpu.cr4 & (cr4::PKE | cr4::TSD) == 0
        && cpu.efer & efer::NXE != 0
        && cpu.xcr0 == xcr0::X87 | xcr0::SSE | xcr0::AVX
        && cpu.dr[7] & x86::dr7::ANY_ENABLED == 0
        && cpu.debugctl == 0
        && !cpu.interrupt_shadow
        && !vcpu.behind_stack_load
        && !vcpu.wants_interrupt_window
}
