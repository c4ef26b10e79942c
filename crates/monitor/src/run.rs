//! The run loop of one processor, in a host thread of its own: events in, the engine, and THE match on [`Exit`].

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use host::lock::RankedMutex;
use host::map::Placed;
use host::sampler::Sampler;
use io::irq::attention;
use io::platform::Platform;
use memory::GuestMemory;
use processor::profile::Doing;
use processor::{Core, Engine, Exit, Vcpu, deliver};
use x86::{CpuState, Segment, cr0, seg};

use crate::control::Control;
use crate::outside::{View, Visits};
use crate::trace::Tracer;

/// How far samples of a profile are apart: five thousand a second, and no multiple of any guest's clock tick.
const SAMPLE_PERIOD: Duration = Duration::from_micros(197);

/// What a processor does when nobody wants it to stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    Running,
    /// In HLT, until an interrupt that it may take, an NMI or an INIT.
    Halted,
    /// Not the bootstrap processor, and not started yet: until a start-up message.
    WaitsForStartup,
}

/// Why the engine came back, counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exits {
    pub attention: u64,
    pub window: u64,
    pub halt: u64,
}

/// One virtual processor and what runs it. Its thread holds it while it runs; see [`crate::control`].
pub struct Processor {
    pub vcpu: Placed<Vcpu>,
    pub engine: Box<dyn Engine>,
    pub activity: Activity,
    pub exits: Exits,
    pub visits: Visits,
    pub tracer: Option<Tracer>,
    /// The VCPU's, for what is done on its behalf while it is borrowed.
    pub sampler: Arc<Sampler>,
    /// How far the guest's time stamp counter is ahead of the machine's clock, as the platform knows it.
    pub tsc_ahead: u64,
}

/// What all processors of a machine share.
pub struct Hall {
    pub memory: Arc<GuestMemory>,
    pub platform: Platform,
    pub control: Arc<Control>,
    pub processors: Vec<RankedMutex<Processor>>,
}

/// How an attempt to run ended.
enum Outcome {
    /// Look again whether to stand still.
    GoOn,
    /// Sleep until a kick.
    Sleep,
    /// The machine ends.
    End(String),
}

/// The body of a processor's thread. A panic of ours ends only this machine.
pub fn run(hall: &Hall, number: usize) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        if let Some(reason) = serve(hall, number) {
            hall.control.end(reason);
        }
    }));
    if let Err(panic) = result {
        hall.control.end(format!("error: ringzero has a defect, processor {number}: {}", message(&*panic)));
    }
    if hall.control.leave() {
        hall.platform.finish_serial();
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without words")
}

/// Runs the processor until the machine ends; the reason, when it is this processor's doing.
fn serve(hall: &Hall, number: usize) -> Option<String> {
    let place = hall.processors.get(number)?;
    hall.control.serve(number);
    let (sampler, is_profiled) = {
        let processor = place.lock();
        (Arc::clone(&processor.sampler), processor.vcpu.profile.is_some())
    };
    let _sampling = match is_profiled.then(|| sampler.start(SAMPLE_PERIOD)).transpose() {
        Ok(sampling) => sampling,
        Err(error) => return Some(format!("error: the host gives no timer to take a profile with: {error}")),
    };
    // The lock is let go before anything that may wait for long.
    while !hall.control.is_ordered() || hall.control.stand() {
        let mut processor = place.lock();
        let outcome = loop {
            let outcome = turn(hall, number, &mut processor);
            if !matches!(outcome, Outcome::GoOn) || hall.control.is_ordered() {
                break outcome;
            }
        };
        match outcome {
            Outcome::GoOn => {}
            Outcome::Sleep => {
                drop(processor);
                sampler.now(Doing::Idle.word());
                hall.control.sleep(number);
                sampler.now(Doing::Monitor.word());
            }
            Outcome::End(reason) => {
                return Some(finish(&mut processor).unwrap_or(reason));
            }
        }
    }
    finish(&mut place.lock())
}

/// Writes out what is kept, and the trace; a sentence when that fails.
fn finish(processor: &mut Processor) -> Option<String> {
    processor.sampler.now(Doing::Recall.word());
    processor.engine.finish();
    let error = processor.tracer.as_mut()?.finish().err()?;
    Some(format!("error: {error}"))
}

/// Takes what waits for the processor, then runs it once.
fn turn(hall: &Hall, number: usize, processor: &mut Processor) -> Outcome {
    let Processor { vcpu, engine, activity, exits, visits, tracer, sampler, tsc_ahead } = processor;
    // Lowered before the events are looked at: what comes after this raises it again.
    vcpu.attention.take();
    if hall.control.is_ordered() {
        return Outcome::GoOn;
    }
    if vcpu.cpu.tsc_offset != *tsc_ahead {
        // The guest has written its time stamp counter: its deadlines mean other moments now.
        *tsc_ahead = vcpu.cpu.tsc_offset;
        hall.platform.set_tsc_ahead(number, *tsc_ahead);
    }
    let mut view = View { platform: &hall.platform, processor: number, visits, sampler };
    let _running = hall.memory.seats.enter(number);
    let mut core = Core { vcpu, memory: &hall.memory, outside: &mut view };
    core.obey();
    core.learn_priority();
    let exit = match take_events(&mut core, &hall.platform, number, activity) {
        Some(exit) => exit,
        None if *activity != Activity::Running => return Outcome::Sleep,
        None if tracer.is_none() && behind_shadow(core.vcpu, &hall.platform, number) => {
            core.vcpu.attention.raise();
            engine.step(&mut core).unwrap_or(Exit::Attention)
        }
        None => match tracer {
            None => engine.run(&mut core),
            Some(tracer) => match step(&mut core, &mut **engine, tracer) {
                Ok(exit) => exit,
                Err(error) => return Outcome::End(format!("error: {error}")),
            },
        },
    };
    core.tell_priority();
    sampler.now(Doing::Monitor.word());
    match exit {
        Exit::Attention => exits.attention += 1,
        Exit::InterruptWindow => exits.window += 1,
        Exit::Halt => {
            exits.halt += 1;
            *activity = Activity::Halted;
        }
        Exit::TripleFault => return Outcome::End("triple-fault".into()),
        Exit::Unsupported(sentence) => return Outcome::End(format!("error: {sentence}")),
    }
    Outcome::GoOn
}

/// Whether an NMI waits for the end of an interrupt shadow, which is the end of the next instruction: no interrupt window
/// tells of it when IF is clear.
fn behind_shadow(vcpu: &Vcpu, platform: &Platform, number: usize) -> bool {
    let cpu = &vcpu.cpu;
    cpu.interrupt_shadow && !cpu.nmi_blocked && platform.attention(number) & attention::NMI != 0
}

/// Runs one instruction and traces it. `Attention` also when there was no reason to come back.
fn step(core: &mut Core<'_>, engine: &mut dyn Engine, tracer: &mut Tracer) -> Result<Exit, crate::Error> {
    loop {
        if core.vcpu.attention.is_raised() {
            return Ok(Exit::Attention);
        }
        if core.vcpu.wants_interrupt_window && core.vcpu.cpu.can_take_interrupt() {
            return Ok(Exit::InterruptWindow);
        }
        tracer.before(&core.vcpu.cpu);
        let exit = engine.step(core);
        tracer.after(&core.vcpu.cpu)?;
        if let Some(exit) = exit {
            return Ok(exit);
        }
    }
}

/// Gives the processor what waits for it, in the order of Intel SDM (2024-12) Vol. 3A 7.9 "Priority Among Concurrent
/// Events": INIT, NMI, then maskable interrupts. An exit means that its delivery failed for good.
fn take_events(core: &mut Core<'_>, platform: &Platform, number: usize, activity: &mut Activity) -> Option<Exit> {
    core.vcpu.wants_interrupt_window = false;
    loop {
        let waiting = platform.attention(number);
        if waiting == 0 {
            return None;
        }
        if waiting & attention::INIT != 0 && platform.take_init(number) {
            initialize(core.vcpu);
            core.learn_priority();
            // Table 10-1: the bootstrap processor runs from the reset vector, the others wait.
            *activity = if number == 0 { Activity::Running } else { Activity::WaitsForStartup };
            continue;
        }
        if waiting & attention::STARTUP != 0 {
            // Start-up messages are ignored by a processor that does not wait for one (10.4.3).
            if let (Some(vector), Activity::WaitsForStartup) = (platform.take_startup(number), *activity) {
                start_up(&mut core.vcpu.cpu, vector);
                *activity = Activity::Running;
            }
            continue;
        }
        if *activity == Activity::WaitsForStartup {
            return None;
        }
        let cpu = &core.vcpu.cpu;
        if waiting & attention::NMI != 0 && !cpu.nmi_blocked && !cpu.interrupt_shadow && platform.take_nmi(number) {
            *activity = Activity::Running;
            if let Some(exit) = deliver::nmi(core) {
                return Some(exit);
            }
            continue;
        }
        if waiting & attention::NMI != 0 && core.vcpu.cpu.nmi_blocked {
            platform.merge_nmis(number);
        }
        if waiting & attention::EXTERNAL == 0 {
            return None;
        }
        if core.is_priority_untold() {
            core.tell_priority();
            continue;
        }
        if !core.vcpu.cpu.can_take_interrupt() {
            core.vcpu.wants_interrupt_window = true;
            return None;
        }
        // Another processor may have been faster, or the line fell.
        let vector = platform.acknowledge(number)?;
        *activity = Activity::Running;
        if let Some(exit) = deliver::interrupt(core, vector) {
            return Some(exit);
        }
    }
}

/// The state after INIT: that after reset, but for what Table 10-1 says is kept: the x87, SSE and AVX registers, the
/// TSC, the MTRRs and the other MSRs, and CR0.CD and CR0.NW.
fn initialize(vcpu: &mut Vcpu) {
    let old = vcpu.cpu.clone();
    vcpu.cpu = CpuState {
        cr0: cr0::ET | old.cr0 & (cr0::CD | cr0::NW),
        xcr0: old.xcr0,
        xss: old.xss,
        tsc_offset: old.tsc_offset,
        tsc_adjust: old.tsc_adjust,
        tsc_aux: old.tsc_aux,
        pat: old.pat,
        misc_enable: old.misc_enable,
        spec_ctrl: old.spec_ctrl,
        star: old.star,
        lstar: old.lstar,
        cstar: old.cstar,
        sfmask: old.sfmask,
        kernel_gs_base: old.kernel_gs_base,
        sysenter_cs: old.sysenter_cs,
        sysenter_esp: old.sysenter_esp,
        sysenter_eip: old.sysenter_eip,
        mtrr_def_type: old.mtrr_def_type,
        mtrr_fixed: old.mtrr_fixed,
        mtrr_variable: old.mtrr_variable,
        fpu: old.fpu,
        ..CpuState::reset()
    };
    vcpu.flush_all();
    vcpu.stale.mode = true;
}

/// A start-up message: real mode at `vector` * 4096.
fn start_up(cpu: &mut CpuState, vector: u8) {
    let old = cpu.segments[seg::CS];
    let selector = u16::from(vector) << 8;
    cpu.segments[seg::CS] = Segment { base: u64::from(selector) << 4, limit: 0xffff, selector, ..old };
    cpu.rip = 0;
}
