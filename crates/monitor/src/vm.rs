//! The assembly of one machine, in one order that is written out here, and the operator's calls on it.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use host::clock::Clock;
use host::counters::Counters;
use host::lock::{Rank, RankedMutex};
use io::platform::{Config, Platform};
use io::virtio::Backend;
use io::virtio::balloon::Balloon;
use io::virtio::entropy::Entropy;
use memory::GuestMemory;
use memory::pmap::{HOLE_END, HOLE_START};
use memory::worker::Worker;
use processor::cpuid::CpuidModel;
use processor::direct::Choice;
use processor::interpret::Interpreter;
use processor::translate::kept::Kept;
use processor::translate::{self, Translator};
use processor::{Engine, Vcpu};
use x86::paging::PHYSICAL_BITS;
use x86::{CpuState, Gpa, PAGE_SIZE};

use crate::Error;
use crate::control::Control;
use crate::hotplug::{Plugged, connect_pause};
use crate::kick::Kicker;
use crate::registers;
use crate::run::{self, Activity, Exits, Hall, Processor};
use crate::slow::{Dispatcher, SlowDevice};
use crate::trace::Tracer;

/// The engines that this build has; the first is the default.
pub const ENGINES: &[&str] = &["direct", "translate", "interpret"];

/// An environment variable: where it is set, all user code that can be run directly is, worth it or not.
const ALWAYS_DIRECT: &str = "RINGZERO_ALWAYS_DIRECT";

pub use memory::writers::MOST_PROCESSORS;

/// How long a device that is being called may keep its machine from being taken apart.
const DEVICE_PATIENCE: Duration = Duration::from_secs(2);

/// What a machine is made of.
#[derive(Clone)]
pub struct Options {
    /// Bytes of RAM.
    pub memory: u64,
    pub processors: usize,
    /// One of [`ENGINES`].
    pub engine: String,
    /// Features of the processors that are there on request only, as CPUID's model names them.
    pub cpu_features: Vec<String>,
    /// Count every instruction exactly, at some cost in speed.
    pub count_instructions: bool,
    /// Find out where each processor's time goes, by sampling it.
    pub profile: bool,
    /// Where the execution trace of processor 0 goes.
    pub trace: Option<PathBuf>,
    /// Bytes that translated code may take, with all that is known of it; by the size of RAM without a number.
    pub translation_bytes: Option<u64>,
    /// The folder of translations that are kept from run to run; none are kept without one.
    pub translations: Option<PathBuf>,
    /// Whether virtio devices are on the PCI bus, or else each at an address of its own.
    pub has_pci_devices: bool,
    /// Virtio devices, behind those that every machine has, in the order in which the guest finds them.
    pub devices: Vec<Arc<dyn Backend>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    Ram,
    Mmio,
}

impl RegionKind {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            RegionKind::Ram => "ram",
            RegionKind::Mmio => "mmio",
        }
    }
}

/// A row of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub first: Gpa,
    pub size: u64,
    pub kind: RegionKind,
}

/// One machine. Every call may come from any thread.
pub struct Vm {
    pub(crate) control: Arc<Control>,
    /// Changed only before the start, when nobody else knows it.
    pub(crate) hall: RankedMutex<Arc<Hall>>,
    /// Moves the guest's pages, one call at a time.
    pub(crate) worker: Mutex<Worker>,
    dispatcher: Dispatcher,
    balloon: Arc<Balloon>,
    pub(crate) plugged: Plugged,
    threads: RankedMutex<Vec<JoinHandle<()>>>,
    counters: Arc<Counters>,
}

fn engine(options: &Options, kept: Option<&Arc<Kept>>) -> Result<Box<dyn Engine>, Error> {
    match options.engine.as_str() {
        "interpret" => Ok(Box::new(Interpreter::new())),
        "translate" | "direct" => {
            let direct = match options.engine.as_str() {
                "direct" if std::env::var_os(ALWAYS_DIRECT).is_some() => Choice::Always,
                "direct" => Choice::Worthwhile,
                _ => Choice::Never,
            };
            let options = translate::Options {
                direct,
                count_instructions: options.count_instructions,
                single: options.trace.is_some(),
                budget: translation_budget(options),
            };
            let mut translator = Translator::new(options).map_err(host_error("memory for translated code"))?;
            if let Some(kept) = kept {
                translator.keep(Arc::clone(kept));
            }
            Ok(Box::new(translator))
        }
        name => Err(Error::Engine { name: name.into(), known: ENGINES.to_vec() }),
    }
}

/// What each processor's translations may take: together an eighth of the guest's memory, 32 MiB for 256, or what the
/// operator says; but with less than 8 MiB a processor would do little else than translate.
fn translation_budget(options: &Options) -> usize {
    let all = options.translation_bytes.unwrap_or_else(|| (options.memory / 8).clamp(16 << 20, 512 << 20));
    let each = all / options.processors.max(1) as u64;
    let least = if options.translation_bytes.is_some() { 1 } else { 8 << 20 };
    usize::try_from(each).unwrap_or(usize::MAX).clamp(least, 1 << 30)
}

impl Vm {
    /// Assembles a machine: what stands later in this function uses what stands before it.
    ///
    /// # Errors
    /// One sentence about the option that cannot be, or about what the host did not give.
    pub fn new(options: &Options) -> Result<Vm, Error> {
        if !(1..=MOST_PROCESSORS).contains(&options.processors) {
            return Err(Error::Processors { wanted: options.processors, most: MOST_PROCESSORS });
        }
        Vm::assemble(options)
    }

    pub(crate) fn assemble(options: &Options) -> Result<Vm, Error> {
        // 1. Memory: promised, not given.
        let memory = Arc::new(GuestMemory::new(options.memory)?);
        // 2. Processors, each with an engine of its own.
        let kept = options.translations.clone().map(|place| Arc::new(Kept::new(place)));
        let mut processors = Vec::with_capacity(options.processors);
        let mut kickers = Vec::with_capacity(options.processors);
        let features = &options.cpu_features;
        if let Some(wanted) = features.iter().find(|name| !CpuidModel::on_request().any(|known| known == **name)) {
            return Err(Error::Feature { name: wanted.clone(), known: CpuidModel::on_request().collect() });
        }
        let cpuid = match options.processors {
            1 if features.is_empty() => CpuidModel::shared(),
            count => Arc::new(CpuidModel::of_host(count as u32, features)),
        };
        for number in 0..options.processors {
            let engine = engine(options, kept.as_ref())?;
            let mut vcpu = Vcpu::place(CpuState::reset()).map_err(host_error("memory for a processor"))?;
            vcpu.number = number;
            vcpu.cpuid = Arc::clone(&cpuid);
            vcpu.profile = options.profile.then(Box::default);
            let sampler = Arc::clone(&vcpu.sampler);
            // 3. How to wake them.
            kickers.push(Kicker::new(Arc::clone(&vcpu.attention), engine.kicker()));
            let tracer = match &options.trace {
                Some(path) if number == 0 => Some(Tracer::new(path)?),
                _ => None,
            };
            let activity = if number == 0 { Activity::Running } else { Activity::WaitsForStartup };
            let (exits, visits) = Default::default();
            processors.push(Processor { vcpu, engine, activity, exits, visits, tracer, sampler, tsc_ahead: 0 });
        }
        let control = Arc::new(Control::new(kickers));
        let kicked = Arc::clone(&control);
        memory.seats.set_kick(Box::new(move |number| kicked.kick(number)));
        let ended = Arc::clone(&control);
        memory.set_on_loss(Box::new(move |sentence| {
            ended.end(format!("error: {sentence}"));
        }));
        // 4. The platform: interrupt hardware, timers, ports; it wakes processors and ends the machine.
        let (kicked, ended) = (Arc::clone(&control), Arc::clone(&control));
        let clock = Clock::new();
        let counters = Arc::<Counters>::default();
        let config = Config {
            cpus: options.processors,
            // CPUID leaf 0x15 names this frequency, and Linux believes it.
            apic_timer_hz: cpuid.apic_timer_hz(),
            address_bits: PHYSICAL_BITS,
        };
        let mut platform = Platform::new(
            config,
            clock.clone(),
            Arc::clone(&counters),
            Arc::new(move |number| kicked.kick(number)),
            Arc::new(move |reason| {
                ended.end(reason.into());
            }),
        )?;
        // 5. Virtio devices.
        let mut add = |device: &Arc<dyn Backend>| {
            if options.has_pci_devices {
                return platform.add_virtio(Arc::clone(device), Arc::clone(&memory)).map(Some);
            }
            platform.add_virtio_mmio(Arc::clone(device), Arc::clone(&memory)).map(|()| None)
        };
        add(&(Arc::new(Entropy) as Arc<dyn Backend>))?;
        let balloon = Arc::new(Balloon::new(memory.clone(), memory.pmap().pages()));
        add(&(balloon.clone() as Arc<dyn Backend>))?;
        let plugged = Plugged::default();
        for device in &options.devices {
            connect_pause(device.as_ref(), &control);
            if let Some(presence) = add(device)? {
                plugged.add(device, presence);
            }
        }
        for processor in &mut processors {
            // A kernel that is entered without firmware finds the MTRRs as firmware leaves them.
            processor::system::msr::set_firmware_memory_types(&mut processor.vcpu.cpu);
        }
        // 6. Slow devices: none yet, but whoever ends the machine must reach those that come.
        let dispatcher = Dispatcher::new();
        control.at_end(dispatcher.closer());
        let processors = processors.into_iter().map(|processor| RankedMutex::new(Rank::Processor, processor)).collect();
        // What the parts were made on.
        host::map::trim_stack();
        let worker = Mutex::new(Worker::new(Arc::clone(&memory)));
        let hall = Arc::new(Hall { memory, platform, control: Arc::clone(&control), processors });
        Ok(Vm {
            control,
            hall: RankedMutex::new(Rank::Machine, hall),
            worker,
            dispatcher,
            balloon,
            plugged,
            threads: RankedMutex::new(Rank::Waiting, Vec::new()),
            counters,
        })
    }

    pub(crate) fn hall(&self) -> Arc<Hall> {
        Arc::clone(&self.hall.lock())
    }

    /// A device that is being called must not wait for its own processor.
    pub(crate) fn not_from_device(&self, call: &'static str) -> Result<(), Error> {
        if self.dispatcher.is_caller() { Err(Error::FromDevice(call)) } else { Ok(()) }
    }

    // ---- before the start ------------------------------------------------------------------------------------------

    /// Gives `count` ports from `first` to a slow device.
    ///
    /// # Errors
    /// [`Error::Started`], and [`Error::Bus`] when a port is taken.
    pub fn add_port_device(&self, first: u16, count: u16, device: Box<dyn SlowDevice>) -> Result<(), Error> {
        let mut hall = self.hall.lock();
        let hall = Arc::get_mut(&mut hall).ok_or(Error::Started)?;
        let window = self.dispatcher.add(device);
        hall.platform.add_port_device(first, count, window).inspect_err(|_| self.dispatcher.withdraw())?;
        Ok(())
    }

    /// Gives `size` bytes of guest physical addresses from `first`, where there is no RAM, to registers that keep what is
    /// written to them.
    ///
    /// # Errors
    /// [`Error::Started`], and [`Error::Platform`] when the range is taken or is none.
    pub fn add_scratch(&self, first: Gpa, size: u64) -> Result<(), Error> {
        let mut hall = self.hall.lock();
        let hall = Arc::get_mut(&mut hall).ok_or(Error::Started)?;
        Ok(hall.platform.add_scratch(first, size)?)
    }

    /// Our end of a serial port's line.
    ///
    /// # Errors
    /// [`Error::Platform`] when there is no such port, or it was given out before.
    pub fn serial(&self, index: usize) -> Result<OwnedFd, Error> {
        Ok(self.hall().platform.serial_fd(index)?)
    }

    /// Starts the threads of the platform and those of the processors.
    ///
    /// # Errors
    /// [`Error::Started`], [`Error::Ended`], and when the host gives no thread.
    pub fn start(&self) -> Result<(), Error> {
        let hall = self.hall();
        let count = hall.processors.len();
        self.control.start(count)?;
        let control = Arc::clone(&self.control);
        let mut result = self.dispatcher.start(Box::new(move |sentence| {
            control.end(sentence);
        }));
        for number in 0..count {
            let spawned = match &result {
                Ok(()) => {
                    let hall = Arc::clone(&hall);
                    std::thread::Builder::new()
                        .name(format!("rz-cpu{number}"))
                        .spawn(move || run::run(&hall, number))
                        .map_err(host_error("thread for a processor"))
                }
                Err(_) => {
                    // Its thread will never be: it counts as gone, so that nobody waits for it.
                    self.control.leave();
                    continue;
                }
            };
            match spawned {
                Ok(thread) => self.threads.lock().push(thread),
                Err(error) => {
                    self.control.stop(format!("error: {error}"));
                    self.control.leave();
                    result = Err(error);
                }
            }
        }
        result
    }

    // ---- while it runs ---------------------------------------------------------------------------------------------

    /// Stops the processors between two instructions; returns when they stand still.
    ///
    /// # Errors
    /// [`Error::NotStarted`], [`Error::FromDevice`].
    pub fn pause(&self) -> Result<(), Error> {
        self.not_from_device("pause")?;
        self.control.pause()
    }

    /// # Errors
    /// [`Error::NotStarted`].
    pub fn resume(&self) -> Result<(), Error> {
        self.control.resume()
    }

    /// Ends the machine; the first reason counts. Does not wait.
    pub fn end(&self, reason: String) {
        self.control.stop(reason);
        if self.control.has_ended() {
            // It never ran: nobody else tells those who listen.
            self.hall().platform.finish_serial();
        }
    }

    /// Waits until the machine has ended and says why; `None` when `timeout` passed first.
    ///
    /// # Errors
    /// [`Error::NotStarted`], [`Error::FromDevice`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<String>, Error> {
        self.not_from_device("wait")?;
        let reason = self.control.wait(timeout)?;
        if reason.is_some() {
            // Its disks are free for the next machine, although this one may still be looked at.
            self.hall().platform.end_devices();
        }
        Ok(reason)
    }

    /// Moves a page to another machine page while the guest runs; false when it is in use all the time.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is no RAM, [`Error::FromDevice`].
    pub fn remap_page(&self, address: Gpa) -> Result<bool, Error> {
        self.not_from_device("remap_page")?;
        Ok(self.hall().memory.remap(address.ppn())?)
    }

    /// Asks the guest to put this many pages into its balloon; a guest with a driver does it when it can.
    pub fn set_balloon_target(&self, pages: u64) {
        self.balloon.set_target(pages);
    }

    /// What is known of the balloon, by name; with `ask`, the guest's own statistics are asked for, for the next time.
    #[must_use]
    pub fn balloon_stats(&self, ask: bool) -> Vec<(&'static str, u64)> {
        // Looked at first: the answer may come before this returns, and whoever waits for it must see a change.
        let stats = self.balloon.stats();
        if ask {
            self.balloon.ask();
        }
        stats
    }

    /// Drives an ISA interrupt line.
    ///
    /// # Errors
    /// [`Error::Line`].
    pub fn raise_irq(&self, line: usize, level: bool) -> Result<(), Error> {
        let wire = u8::try_from(line).ok().filter(|line| *line < 16).ok_or(Error::Line(line))?;
        self.hall().platform.set_isa_line(wire, level);
        Ok(())
    }

    // ---- while it stands still -------------------------------------------------------------------------------------

    #[must_use]
    pub fn memory_map(&self) -> Vec<Region> {
        let hall = self.hall();
        let mut rows: Vec<Region> = hall
            .memory
            .pmap()
            .ranges()
            .into_iter()
            .map(|(first, pages)| Region { first: first.gpa(), size: pages * PAGE_SIZE, kind: RegionKind::Ram })
            .collect();
        let hole = Region { first: Gpa(HOLE_START), size: HOLE_END - HOLE_START, kind: RegionKind::Mmio };
        rows.insert(1.min(rows.len()), hole);
        rows
    }

    /// # Errors
    /// [`Error::Running`], [`Error::Memory`].
    pub fn read_memory(&self, address: Gpa, size: usize) -> Result<Vec<u8>, Error> {
        let hall = self.hall();
        if size as u64 > hall.memory.pmap().pages() * PAGE_SIZE {
            // Refused before so many bytes are asked of the host.
            return Err(memory::Error::NotRam { address, size: size as u64 }.into());
        }
        self.control.while_still(|| {
            let mut bytes = vec![0; size];
            hall.memory.read(address, &mut bytes)?;
            Ok(bytes)
        })?
    }

    /// # Errors
    /// [`Error::Running`], [`Error::Memory`].
    pub fn write_memory(&self, address: Gpa, data: &[u8]) -> Result<(), Error> {
        let hall = self.hall();
        self.control.while_still(|| Ok(hall.memory.write(address, data)?))?
    }

    /// All registers of a processor, by name.
    ///
    /// # Errors
    /// [`Error::Running`], [`Error::NoProcessor`].
    pub fn registers(&self, number: usize) -> Result<Vec<(String, u64)>, Error> {
        let hall = self.hall();
        self.control.while_still(|| {
            let processor = processor_of(&hall, number)?.lock();
            let mut list = registers::all(&processor.vcpu.cpu);
            list.push(("cr8".into(), u64::from(hall.platform.task_priority(number) >> 4)));
            Ok(list)
        })?
    }

    /// Sets registers of a processor: all of them, or, with an error, none.
    ///
    /// # Errors
    /// [`Error::Running`], [`Error::NoProcessor`], [`Error::NoRegister`], [`Error::RegisterValue`].
    pub fn set_registers(&self, number: usize, values: &[(String, u64)]) -> Result<(), Error> {
        let hall = self.hall();
        self.control.while_still(|| {
            let mut processor = processor_of(&hall, number)?.lock();
            let mut cpu = processor.vcpu.cpu.clone();
            let mut priority = None;
            for (name, value) in values {
                match name.as_str() {
                    "cr8" if *value < 16 => priority = Some(*value as u8),
                    "cr8" => return Err(Error::RegisterValue { name: name.clone(), value: *value }),
                    name => registers::set(&mut cpu, name, *value)?,
                }
            }
            registers::settle(&mut cpu);
            let vcpu = &mut processor.vcpu;
            vcpu.cpu = cpu;
            // Any of them may change what an address means.
            vcpu.flush_all();
            vcpu.stale.mode = true;
            if let Some(priority) = priority {
                hall.platform.set_task_priority(number, priority << 4);
            }
            Ok(())
        })?
    }

    /// All counters, by dotted name. A running machine is stopped for it, between two instructions.
    #[must_use]
    pub fn stats(&self) -> Vec<(String, u64)> {
        let hall = self.hall();
        if self.dispatcher.is_caller() {
            // Its processor waits for the device and cannot be looked at.
            return self.counters_of_machine(&hall);
        }
        self.control.between_instructions(|| {
            let mut list = self.counters_of_machine(&hall);
            let mut sums = std::collections::BTreeMap::<String, u64>::new();
            for processor in &hall.processors {
                for (name, value) in counters_of_processor(&mut processor.lock()) {
                    *sums.entry(name).or_default() += value;
                }
            }
            list.extend(sums);
            list
        })
    }

    fn counters_of_machine(&self, hall: &Hall) -> Vec<(String, u64)> {
        let mut list: Vec<(String, u64)> =
            self.counters.all().into_iter().map(|(name, value)| (name.into(), value)).collect();
        list.push(("memory.ram_bytes".into(), hall.memory.pmap().pages() * PAGE_SIZE));
        list.push(("memory.touched_bytes".into(), hall.memory.pool().in_use() * PAGE_SIZE));
        let (traced, hits) = hall.memory.code.counts();
        list.extend([("memory.traced_pages".into(), traced), ("memory.stores_to_code".into(), hits)]);
        list.extend(hall.memory.counts.list().map(|(name, value)| (name.into(), value)));
        list.push(("memory.waits_for_processors".into(), hall.memory.seats.waits()));
        list
    }

    /// Ends the machine and waits for its threads. The GIL must be free.
    pub fn shut_down(&self) {
        self.end("stopped".into());
        self.dispatcher.join(DEVICE_PATIENCE);
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // What it panicked of was told as the machine's reason to end.
            let _ = thread.join();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.shut_down();
    }
}

fn processor_of(hall: &Hall, number: usize) -> Result<&RankedMutex<Processor>, Error> {
    let count = hall.processors.len();
    hall.processors.get(number).ok_or(Error::NoProcessor { wanted: number, count })
}

fn host_error(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |error| Error::Host { what, error }
}

fn counters_of_processor(processor: &mut Processor) -> Vec<(String, u64)> {
    let Processor { vcpu, engine, exits: Exits { attention, window, halt }, visits, .. } = processor;
    let mut list: Vec<(String, u64)> =
        engine.counters().into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    list.extend(
        [
            ("exits.attention", *attention),
            ("exits.interrupt_window", *window),
            ("exits.halt", *halt),
            ("outside.port_reads", visits.port_reads),
            ("outside.port_writes", visits.port_writes),
            ("outside.mmio_reads", visits.mmio_reads),
            ("outside.mmio_writes", visits.mmio_writes),
            ("outside.apic_msrs", visits.apic),
            ("tlb.fills", vcpu.tlb.fills),
            ("tlb.flushes", vcpu.tlb.flushes),
            ("tlb.forgotten_pages", vcpu.tlb.forgotten),
            ("tlb.common_pages", vcpu.tlb.common_pages() as u64),
            ("shadow.evictions", vcpu.tlb.shadow.evictions),
            ("processor.interpreted", vcpu.interpreted),
            // Zero unless [`Options::count_instructions`] asked for it.
            ("processor.translated", vcpu.translated()),
        ]
        .into_iter()
        .chain(vcpu.tlb_counters())
        .map(|(name, value)| (name.to_string(), value)),
    );
    let vcpu = &mut **vcpu;
    if let Some(profile) = &mut vcpu.profile {
        profile.take(&vcpu.sampler, |host| engine.part(host));
        list.extend(profile.counters(vcpu.sampler.lost()));
    }
    list
}
