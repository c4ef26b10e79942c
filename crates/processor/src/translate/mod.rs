//! The translator: guest code becomes host code, block by block, at run time.
//!
//! The way of a guest instruction: [`block`] decodes and classes it, [`lower`] emits host code for it with [`asm`] and
//! [`encode`], [`blocks`] remembers the result, [`enter`] runs it, [`left`] sees why it came back. What it cannot or need not do fast goes to the
//! interpreter, one instruction at a time, so there is one meaning of every instruction.

mod apart;
mod asm;
mod block;
mod blocks;
mod cold;
mod copy;
mod encode;
mod enter;
mod exits;
mod facts;
mod fetch;
mod flow;
pub mod frame;
mod groups;
mod idle;
mod iret;
pub mod kept;
mod left;
mod links;
mod liveness;
mod lower;
mod memory;
mod profile;
mod recall;
mod refill;
mod returns;
mod room;
mod short;
mod sites;
mod string;
mod system;
mod user;

use std::io;
use std::sync::Arc;

use ::memory::GuestMemory;
use ::memory::audit::Audit;
use host::clock::{host_tsc, host_tsc_hz, scale};
use host::signal::{self, Landing};
use x86::{CpuState, Gpa, GuestFault, PAGE_MASK, PAGE_SIZE, Ppn, cr0, cr4, dr7, registers::xcr0, rflags};

use self::asm::Asm;
use self::block::{BlockDecoder, Features};
use self::blocks::{Blocks, Key};
use self::cold::Cold;
pub(crate) use self::encode::make_tables;
use self::enter::Stubs;
use self::fetch::FetchCache;
use self::groups::Groups;
use self::kept::record::Span;
use self::links::Links;
use self::liveness::{Ahead, MOST_LOOKED};
use self::lower::{Mode, lower};
use self::sites::Sites;
use crate::code_cache::{CodeCache, Poll};
use crate::core::Core;
use crate::deliver;
use crate::direct::{Choice, Direct};
use crate::engine::{Engine, Exit};
use crate::interpret::{self, DecodeCache};
use crate::profile::{Doing, Part};
use crate::vcpu::{Stale, Vcpu};

/// Bytes of guest code that are read for a block at first, and at most.
const FEW_BYTES: usize = 192;
const MOST_BYTES: usize = 1024;
/// Ticks that no translation takes: the host ran something else meanwhile.
const TOO_LONG: u64 = 200_000;
/// Room that one block can need at most.
const BLOCK_ROOM: usize = 64 << 10;
/// Kernels use SIMD in short stretches; with its state in registers every leave costs more.
const KERNEL_SIMD_LEAVES: u32 = 16;
/// How often code is read again because another processor changed it meanwhile.
const READS: u32 = 4;

#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Count instructions in translated code: exact, and a little slower.
    pub count_instructions: bool,
    /// Leave after every instruction, for traces.
    pub single: bool,
    /// User code that is not translated at all.
    pub direct: Choice,
    /// Bytes that code and all that is known of it may take; 0 stands for [`room::BUDGET`].
    pub budget: usize,
}

#[derive(Debug, Default)]
struct Counters {
    translated_blocks: u64,
    translated_instructions: u64,
    translation_ticks: u64,
    recalled_instructions: u64,
    /// Whether code is still there is told by [`Translator::code_gone`], not by this.
    clears: u64,
    evictions: u64,
    exits_probe: u64,
    exits_interpret: u64,
    exits_short: u64,
    exits_link: u64,
    exits_lookup: u64,
    exits_simd: u64,
    exits_fault: u64,
    exits_poll: u64,
    probe_filled: u64,
    lookups: u64,
    user_forgets: u64,
    kernel_forgets: u64,
}

pub struct Translator {
    cache: CodeCache,
    poll: Poll,
    limits: room::Limits,
    stubs: Stubs,
    blocks: Blocks,
    sites: Sites,
    links: Links,
    asm: Asm,
    source: BlockDecoder,
    /// The guest's bytes of the block at work, and those that were looked at beyond it.
    bytes: Box<[u8; MOST_BYTES + MOST_LOOKED]>,
    /// Where in its page they are, one part after the other: first the block itself.
    parts: Vec<Span>,
    groups: Groups,
    scratch: lower::Scratch,
    recall: recall::Recall,
    cold: Cold,
    landing: Arc<Landing>,
    fetches: FetchCache,
    decoder: DecodeCache,
    features: Features,
    /// Whether the guest's SIMD state is put into host registers when code is entered.
    simd: bool,
    /// After so many more leaves, kernel code is taken not to use SIMD any more.
    kernel_simd: u32,
    idle: idle::Idle,
    /// How often the generations of address spaces had gone round.
    rounds: u64,
    /// What runs user code as it stands, if any is to be.
    direct: Option<Box<Direct>>,
    options: Options,
    counters: Counters,
}

/// What to do after translated code has left.
enum Next {
    /// Look at everything again.
    Dispatch,
    /// Enter again at this host address, in the same mode.
    Enter(u64),
    /// Run one instruction in the interpreter.
    Step,
    /// The instruction at RIP faults.
    Fault(GuestFault),
    /// The same, and enter again at `resume` if it leaves RIP at `next` and nothing else that matters here changed.
    Callout { resume: u64, next: u64 },
}

impl Translator {
    pub fn new(options: Options) -> io::Result<Translator> {
        if !std::is_x86_feature_detected!("avx") || !std::is_x86_feature_detected!("xsave") {
            return Err(io::Error::other("this processor has no AVX, so use --engine interpret"));
        }
        let limits = room::Limits::of(options.budget);
        let mut cache = CodeCache::new(limits.code)?;
        let stubs = Stubs::emit(&mut cache).ok_or_else(|| io::Error::other("the code cache is too small"))?;
        let range = cache.range();
        let landing = Arc::new(Landing::new(range));
        landing.set_place(stubs.fault());
        Ok(Translator {
            poll: cache.poll(),
            limits,
            cache,
            stubs,
            blocks: Blocks::default(),
            sites: Sites::default(),
            links: Links::default(),
            asm: Asm::default(),
            source: BlockDecoder::new(),
            bytes: Box::new([0; MOST_BYTES + MOST_LOOKED]),
            parts: Vec::new(),
            groups: Groups::default(),
            scratch: lower::Scratch::default(),
            recall: recall::Recall::default(),
            cold: Cold::default(),
            landing,
            fetches: FetchCache::new(),
            decoder: DecodeCache::new(),
            features: Features::default(),
            simd: false,
            kernel_simd: 0,
            idle: idle::Idle::new(),
            rounds: 0,
            // What counts or traces instructions must see them.
            direct: Direct::new(options.direct).filter(|_| !options.count_instructions && !options.single),
            options,
            counters: Counters::default(),
        })
    }

    fn interpret(&mut self, core: &mut Core<'_>) -> Option<Exit> {
        let exit = self.interpret_one(core);
        if let Some(profile) = &mut core.vcpu.profile {
            profile.count(&core.vcpu.sampler);
        }
        exit
    }

    fn interpret_one(&mut self, core: &mut Core<'_>) -> Option<Exit> {
        if !must_interpret(&core.vcpu.cpu) && !core.memory.code.is_pending(core.vcpu.number) {
            let mode = self.mode(&core.vcpu.cpu);
            if let Some(code) = self.fetches.find(core, core.vcpu.cpu.rip, mode) {
                return interpret::step_at(core, &mut self.decoder, code);
            }
        }
        interpret::step(core, &mut self.decoder)
    }

    /// Takes note of what went stale since translated code last ran.
    fn refresh(&mut self, core: &mut Core<'_>) {
        if core.vcpu.user_code.is_crowded() {
            core.vcpu.flush_local();
            core.vcpu.user_code.clear();
        }
        let stale = std::mem::take(&mut core.vcpu.stale);
        if stale.local_mappings || stale.all_mappings {
            self.counters.user_forgets += 1;
            let rounds = core.vcpu.tlb.shadow.rounds;
            if rounds != self.rounds {
                self.rounds = rounds;
                self.fetches.forget_user();
            }
        }
        if stale.all_mappings || (stale.local_mappings && self.fetches.has_local_kernel_code) {
            core.vcpu.kernel_code.clear();
            self.counters.kernel_forgets += 1;
            self.forget_kernel_jumps(core);
        }
        let features = features(&core.vcpu.cpu, core.vcpu.cpuid.cpus());
        if features != self.features {
            self.features = features;
            self.clear(core);
        }
        if core.memory.code.is_pending(core.vcpu.number) {
            for write in core.memory.code.take(core.vcpu.number) {
                self.drop_page(core, write.ppn);
                self.decoder.drop_page(write.ppn);
            }
        }
        // A change of privilege that the interpreter or a delivery made: the new code starts without SIMD state.
        let in_kernel = core.vcpu.cpu.cpl() != 3;
        if self.simd && in_kernel {
            self.kernel_simd = self.kernel_simd.saturating_sub(1);
            self.simd = self.kernel_simd > 0;
        }
        if self.simd && in_kernel == Mode(core.vcpu.hot.mode as u8).is_user() {
            self.simd = false;
        }
        if core.vcpu.cpu.cr0 & cr0::TS != 0 {
            self.simd = false;
        }
    }

    /// Drops all translations.
    fn clear(&mut self, core: &mut Core<'_>) {
        self.counters.clears += 1;
        self.take_samples(core);
        self.cache.clear();
        self.blocks.clear();
        self.sites.clear();
        self.links.clear();
        self.recall.forget_all();
        core.memory.untrace_all(core.vcpu.number);
        if let Some(direct) = &mut self.direct {
            direct.forget_all_code();
        }
        self.decoder.clear();
        self.forget_all_jumps(core);
    }

    fn forget_kernel_jumps(&mut self, core: &mut Core<'_>) {
        self.fetches.forget_kernel();
        core.vcpu.jumps.clear(false);
        self.links.undo_all(&self.blocks, &mut self.cache);
    }

    fn forget_all_jumps(&mut self, core: &mut Core<'_>) {
        core.vcpu.jumps.clear(true);
        self.forget_kernel_jumps(core);
    }

    fn mode(&self, cpu: &CpuState) -> Mode {
        let mut mode = 0;
        if cpu.cpl() == 3 {
            mode |= Mode::USER;
        } else if cpu.rflags & rflags::AC != 0 {
            mode |= Mode::AC;
        }
        if self.simd {
            mode |= Mode::SIMD;
        }
        Mode(mode)
    }

    /// The host code for the guest's RIP: (entry with flags in host, entry with flags in memory). `None` when the
    /// interpreter must deal with it, e.g. because the fetch faults.
    fn find(&mut self, core: &mut Core<'_>) -> Option<(u64, u64)> {
        self.counters.lookups += 1;
        let rip = core.vcpu.cpu.rip;
        let mode = self.mode(&core.vcpu.cpu);
        let gpa = self.fetches.find(core, rip, mode)?;
        let key = Key { gpa, rip, mode };
        if let Some(known) = self.blocks.find(&key) {
            let (host, slot) = (known.entry_host, known.entry_slot);
            if known.is_single {
                return Some(self.remember(core, key, host, slot));
            }
            let second = self.blocks.by_index(known.index).and_then(|block| block.second);
            let next_page = (rip & !(PAGE_SIZE - 1)).wrapping_add(PAGE_SIZE);
            if Some(self.fetches.find(core, next_page, mode)?.ppn()) == second {
                return Some(self.remember(core, key, host, slot));
            }
            self.blocks.forget(&key);
        }
        if self.recall.is_asleep && self.cold.is_cold(&key) {
            return None;
        }
        let (host, slot) = self.translate(core, key)?;
        Some(self.remember(core, key, host, slot))
    }

    fn remember(&self, core: &mut Core<'_>, key: Key, host: u64, slot: u64) -> (u64, u64) {
        if self.options.single {
            // What is not remembered is not jumped to from translated code.
            return (host, slot);
        }
        core.vcpu.jumps.remember(key.rip, key.mode, slot);
        (host, slot)
    }

    /// Decodes the block at `key`, whose bytes go to `bytes`, and watches for stores to it; gives the second page that it reaches
    /// into, if it does. `None` when the code cannot be read, or another processor changes it all the time.
    fn read_block(&mut self, core: &mut Core<'_>, key: Key) -> Option<Option<Ppn>> {
        let most = if self.options.single { 1 } else { usize::MAX };
        let features = Features { user: key.mode.is_user(), ..self.features };
        let in_page = ((PAGE_SIZE - key.gpa.offset()) as usize).min(MOST_BYTES);
        for _ in 0..READS {
            let page = core.memory.page(key.gpa.ppn())?;
            let code = &mut self.bytes;
            // Most blocks are short.
            let few = in_page.min(FEW_BYTES);
            page.read(key.gpa.offset(), &mut code[..few]);
            let mut ahead = if self.options.single { Ahead::unknown() } else { Ahead::in_page(page, key.rip) };
            if !self.source.decode(&code[..few], key.rip, most, features, &mut ahead) && few < in_page {
                page.read(key.gpa.offset(), &mut code[..in_page]);
                self.source.decode(&code[..in_page], key.rip, most, features, &mut ahead);
            }
            let looked = ahead.looked;
            let mut second = None;
            if in_page < 15 && self.source.source.insns.first().is_none_or(|insn| insn.iced.is_invalid()) {
                let next = self.fetches.find(core, key.rip.wrapping_add(in_page as u64), key.mode)?;
                core.memory.page(next.ppn())?.read(0, &mut code[in_page..15]);
                self.source.decode(&code[..15], key.rip, 1, features, &mut Ahead::unknown());
                second = Some(next.ppn());
            }
            // Only what is read while the stores of all processors are watched can be kept.
            let size = self.source.source.size;
            let first = size.min(in_page);
            let mut same = core.trace_code(key.gpa, &code[..first]);
            if let Some(page) = second {
                same &= core.trace_code(page.gpa(), &code[first..size]);
            }
            self.parts.clear();
            self.parts.push(Span { offset: key.gpa.offset() as u16, size: size as u16 });
            let mut end = size;
            for look in looked {
                let bytes = &look.bytes[..look.part.size.into()];
                same &= core.trace_code(Gpa(key.gpa.0 & !PAGE_MASK | u64::from(look.part.offset)), bytes);
                self.parts.push(look.part);
                code[end..end + bytes.len()].copy_from_slice(bytes);
                end += bytes.len();
            }
            if same {
                return Some(second);
            }
        }
        None
    }

    /// Translates the block at `key`.
    fn translate(&mut self, core: &mut Core<'_>, key: Key) -> Option<(u64, u64)> {
        let before = core.vcpu.sampler.now(Doing::Translate.word());
        let start = host_tsc();
        let entries = self.translate_untold(core, key);
        let ticks = host_tsc().wrapping_sub(start);
        if ticks < TOO_LONG {
            self.counters.translation_ticks += ticks;
        }
        core.vcpu.sampler.now(before);
        entries
    }

    fn translate_untold(&mut self, core: &mut Core<'_>, key: Key) -> Option<(u64, u64)> {
        let before = core.vcpu.sampler.now(Doing::Recall.word());
        let known = self.recall(core, &key);
        core.vcpu.sampler.now(before);
        if known.is_some() {
            return known;
        }
        self.make_room(core);
        let second = self.read_block(core, key)?;
        let source = &self.source.source;
        let origin = self.cache.next_address();
        self.asm.restart(origin);
        let first_site = self.sites.next_number();
        self.groups.find(&source.insns, !key.mode.is_apart());
        let context = lower::Context {
            asm: &mut self.asm,
            stubs: &self.stubs,
            sites: &mut self.sites,
            base: self.cache.range().start,
            mode: key.mode.of_code(),
            block: self.blocks.next_index(),
            rip: key.rip,
            may_link: second.is_none() && !self.options.single,
            count: self.options.count_instructions,
        };
        let lowered = lower(context, source, &self.groups, &mut self.scratch);
        let insns = source.insns.len();
        let address = self.cache.add(&self.asm.code)?;
        self.note_unlinked(first_site);
        let end = address + self.asm.code.len() as u64;
        let entries = (address + u64::from(lowered.entry_host), address + u64::from(lowered.entry_slot));
        self.counters.translated_blocks += 1;
        if key.mode.is_user()
            && let Some(direct) = &mut self.direct
        {
            direct.translated(core.vcpu);
        }
        self.counters.translated_instructions += insns as u64;
        if second.is_none() {
            self.note(core, &key, first_site, insns, (lowered.entry_host, lowered.entry_slot));
        }
        self.blocks.add(key, second, address..end, entries, &self.scratch.map, first_site);
        Some(entries)
    }

    /// Runs until something has to be looked at again, or the monitor is needed.
    fn advance(&mut self, core: &mut Core<'_>) -> Option<Exit> {
        if must_interpret(&core.vcpu.cpu) {
            return self.interpret(core);
        }
        if core.vcpu.hot.direct != 0
            && let Some(ended) = self.run_user(core)
        {
            return ended;
        }
        let cpu = &core.vcpu.cpu;
        if let Some(slot) = core.vcpu.jumps.find(cpu.rip, self.mode(cpu)) {
            return self.execute(core, slot);
        }
        match self.find(core) {
            Some((_, slot)) => self.execute(core, slot),
            None => self.interpret(core),
        }
    }

    /// Runs translated code from `target` until something needs the monitor.
    fn execute(&mut self, core: &mut Core<'_>, mut target: u64) -> Option<Exit> {
        loop {
            let obeyed = core.vcpu.obeyed;
            let vcpu = &mut *core.vcpu;
            vcpu.hot.flags = vcpu.cpu.rflags;
            vcpu.hot.mode = self.mode(&vcpu.cpu).0.into();
            vcpu.sampler.now(Doing::Translated.word());
            self.stubs.enter(vcpu, target, self.simd);
            vcpu.sampler.now(Doing::Dispatch.word());
            self.simd = Mode(vcpu.hot.mode as u8).is_simd();
            match self.left(core) {
                Next::Dispatch => return None,
                // The block may keep the address of a page that is elsewhere by now: RIP stands where it would go on.
                Next::Enter(_) if core.vcpu.obeyed != obeyed => return None,
                Next::Enter(again) => target = again,
                Next::Step => return self.interpret(core),
                Next::Fault(fault) => return deliver::fault(core, fault),
                Next::Callout { resume, next } => {
                    if let Some(exit) = self.interpret(core) {
                        return Some(exit);
                    }
                    if core.vcpu.obeyed != obeyed || !self.may_resume(core, next) {
                        return None;
                    }
                    target = resume;
                }
            }
        }
    }

    /// Whether the block that called out to the interpreter may go on at `next`: nothing wants the run loop, and the block
    /// still is what would be found there.
    fn may_resume(&mut self, core: &mut Core<'_>, next: u64) -> bool {
        let vcpu = &*core.vcpu;
        let cpu = &vcpu.cpu;
        if cpu.rip != next
            || self.options.single
            || vcpu.attention.is_raised()
            || (vcpu.wants_interrupt_window && cpu.can_take_interrupt())
            || must_interpret(cpu)
            || core.memory.code.is_pending(core.vcpu.number)
        {
            return false;
        }
        let forgets = (self.counters.clears, self.counters.kernel_forgets);
        if vcpu.stale != Stale::default() {
            self.refresh(core);
        }
        let mode = self.mode(&core.vcpu.cpu);
        forgets == (self.counters.clears, self.counters.kernel_forgets) && u32::from(mode.0) == core.vcpu.hot.mode
    }
}

/// Whether the interpreter has to run the next instruction: modes and states that translated code does not keep.
fn must_interpret(cpu: &CpuState) -> bool {
    !cpu.is_code64()
        || cpu.rflags & rflags::TF != 0
        || cpu.dr[7] & dr7::ANY_ENABLED != 0
        || cpu.interrupt_shadow
        || matches!(cpu.cpl(), 1 | 2)
        || (cpu.cpl() == 3 && cpu.rflags & rflags::AC != 0 && cpu.cr0 & cr0::AM != 0)
}

fn features(cpu: &CpuState, processors: u32) -> Features {
    let sse = cpu.cr4 & cr4::OSFXSR != 0 && cpu.cr0 & cr0::EM == 0;
    let all = xcr0::X87 | xcr0::SSE | xcr0::AVX;
    Features {
        sse,
        avx: sse && cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & all == all,
        user: false,
        tsc_disabled: cpu.cr4 & cr4::TSD != 0,
        fsgsbase: cpu.cr4 & cr4::FSGSBASE != 0,
        syscall: cpu.efer & x86::efer::SCE != 0,
        is_alone: processors == 1,
    }
}

fn set_flags(cpu: &mut CpuState, flags: u64) {
    cpu.rflags = cpu.rflags & !rflags::ARITHMETIC | flags & rflags::ARITHMETIC;
}

impl Engine for Translator {
    fn name(&self) -> &'static str {
        if self.options.direct == Choice::Never { "translate" } else { "direct" }
    }

    fn run(&mut self, core: &mut Core<'_>) -> Exit {
        let landing = Arc::clone(&self.landing);
        let _guard = match signal::enter(&landing) {
            Ok(guard) => guard,
            Err(error) => return Exit::Unsupported(format!("the host refuses signal handlers: {error}")),
        };
        self.poll.disarm();
        core.vcpu.jumps.returns.prepare(self.stubs.lookups());
        if core.vcpu.sampler.is_crowded() {
            self.take_samples(core);
        }
        self.begin_user(core);
        loop {
            if core.vcpu.attention.is_raised() {
                self.sample_user(core);
                return Exit::Attention;
            }
            if core.vcpu.wants_interrupt_window && core.vcpu.cpu.can_take_interrupt() {
                return Exit::InterruptWindow;
            }
            core.vcpu.sampler.now(Doing::Refresh.word());
            self.refresh(core);
            core.vcpu.sampler.now(Doing::Dispatch.word());
            if let Some(exit) = self.advance(core) {
                if exit == Exit::Halt {
                    self.rest_user();
                    self.idle(core);
                }
                return exit;
            }
        }
    }

    /// Needs [`Options::single`]: a block of several instructions is one step otherwise.
    fn step(&mut self, core: &mut Core<'_>) -> Option<Exit> {
        let landing = Arc::clone(&self.landing);
        let _guard = match signal::enter(&landing) {
            Ok(guard) => guard,
            Err(error) => return Some(Exit::Unsupported(format!("the host refuses signal handlers: {error}"))),
        };
        self.poll.disarm();
        core.vcpu.jumps.returns.prepare(self.stubs.lookups());
        loop {
            self.refresh(core);
            let simd = self.simd;
            let exit = self.advance(core);
            // To find that the guest's SIMD state has to be loaded first is no step.
            if exit.is_some() || self.simd == simd || core.vcpu.attention.is_raised() {
                return exit;
            }
        }
    }

    fn finish(&mut self) {
        self.leave_kept();
    }

    fn kicker(&self) -> Option<Arc<dyn Fn() + Send + Sync>> {
        let (poll, landing) = (self.poll.clone(), Arc::clone(&self.landing));
        let direct = self.direct.as_ref().map(|direct| direct.kicker());
        Some(Arc::new(move || {
            // What the running processor does to itself it sees when it is back here, before it goes on.
            if !signal::is_current(&landing) {
                poll.arm();
                if let Some(direct) = &direct {
                    direct.kick();
                }
            }
        }))
    }

    fn part(&self, host: u64) -> Option<Part> {
        self.part_at(host)
    }

    fn audit(&self, vcpu: &Vcpu, memory: &GuestMemory, audit: &mut Audit) {
        if let Some(direct) = &self.direct {
            direct.audit(vcpu, memory, audit);
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counters;
        let mut counters = vec![
            ("translate.blocks", c.translated_blocks),
            ("translate.instructions", c.translated_instructions),
            ("translate.nanoseconds", scale(c.translation_ticks, 1_000_000_000, host_tsc_hz())),
            ("translate.code_bytes", self.cache.used() as u64),
            ("translate.cache_clears", c.clears),
            ("translate.evictions", c.evictions),
            ("translate.blocks_dropped", self.blocks.dropped),
            ("translate.lookups", c.lookups),
            ("translate.user_forgets", c.user_forgets),
            ("translate.kernel_forgets", c.kernel_forgets),
            ("exits.probe", c.exits_probe),
            ("exits.probe_filled", c.probe_filled),
            ("exits.interpret", c.exits_interpret),
            ("exits.short", c.exits_short),
            ("exits.link", c.exits_link),
            ("exits.lookup", c.exits_lookup),
            ("exits.simd", c.exits_simd),
            ("exits.fault", c.exits_fault),
            ("exits.poll", c.exits_poll),
        ];
        self.recall_counters(&mut counters);
        if let Some(direct) = &self.direct {
            direct.counters(&mut counters);
        }
        counters
    }
}
