//! The assembly of the I/O side of a machine, in one written-out order, and its face to the monitor.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, RwLockWriteGuard};

use host::clock::Clock;
use host::counters::Counters;
use host::lock::RankedMutex;
use memory::GuestMemory;
use x86::{Gpa, GuestFault};

use crate::bus::{AccessSize, BusError, MmioBus, MmioDevice, PortBus, PortDevice, SharedPortDevice, shared};
use crate::irq::pic::PicPort;
use crate::irq::ports::{IoApicPage, PicPorts};
use crate::irq::{Fabric, IOAPIC_PAGE, Interrupt, IrqLine, Kick};
use crate::pci::hotplug::{EVENT_PORTS, Presence, SLOT_PORTS};
use crate::pci::{self, MOST_CARDS};
use crate::scratch::Scratch;
use crate::serial_service::{SerialError, SerialService};
use crate::timer::acpi::ACPI_PORTS;
use crate::timer::pit::SPEAKER_OFFSET;
use crate::timer::{AcpiPorts, EndRequest, FastControl, Pit, SCI_LINE, TimerQueue, TimerThread};
use crate::uart::{Doorbell, Uart};
use crate::virtio::service::Gate;
use crate::virtio::{Backend, mmio, transport};

/// First port and interrupt line of COM1 to COM4.
const SERIAL: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
const ACPI_FIRST: u16 = 0x600;
const ISA_LINES: u8 = 16;
pub const MOST_CPUS: usize = 16;

/// What can be chosen.
#[derive(Clone, Debug)]
pub struct Config {
    /// Processors, 1 to 16. Their APIC identifiers are their numbers.
    pub cpus: usize,
    /// Frequency of the local APIC's timer before its divider, in hertz. CPUID leaf 0x15, if the guest has it, must name
    /// the same as the crystal's frequency (ECX): Linux takes the one from the other.
    pub apic_timer_hz: u64,
    /// Bits of a guest physical address, as CPUID leaf 0x8000_0008 says.
    pub address_bits: u32,
}

impl Default for Config {
    fn default() -> Self {
        Config { cpus: 1, apic_timer_hz: 1_000_000_000, address_bits: 46 }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a machine has 1 to {MOST_CPUS} processors, not {0}")]
    Cpus(usize),
    #[error("the host gives no more threads or descriptors: {0}")]
    Host(#[from] io::Error),
    #[error("the PCI bus is full: it has room for {MOST_CARDS} devices")]
    PciFull,
    #[error("there is room for {} virtio devices without a bus", mmio::MOST_DEVICES)]
    MmioFull,
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Serial(#[from] SerialError),
}

/// Everything between the processors and the outside. Dropping it stops its threads.
pub struct Platform {
    config: Config,
    clock: Clock,
    ports: PortBus,
    mmio: MmioBus,
    fabric: Arc<Fabric>,
    timers: Arc<TimerQueue>,
    acpi: Arc<RankedMutex<AcpiPorts>>,
    /// The lines as devices outside this crate drive them.
    outside_lines: Vec<IrqLine>,
    pci: Arc<RankedMutex<pci::Host>>,
    /// Virtio devices that are on no bus.
    virtio_mmio: Vec<Arc<RankedMutex<mmio::Registers>>>,
    /// Closed while the guest's memory must stand still.
    gate: Arc<Gate>,
    // Dropped last: each stops its thread.
    serial: SerialService,
    _timer_thread: TimerThread,
}

impl Platform {
    /// Assemble the platform. `kick` and `end_request` are called with locks held: see [`Kick`] and [`EndRequest`].
    ///
    /// # Errors
    /// [`Error`], for a wrong number of processors or a host that has nothing left.
    pub fn new(
        config: Config,
        clock: Clock,
        counters: Arc<Counters>,
        kick: Kick,
        end_request: EndRequest,
    ) -> Result<Self, Error> {
        if config.cpus == 0 || config.cpus > MOST_CPUS {
            return Err(Error::Cpus(config.cpus));
        }
        use AccessSize::{Byte, Dword};
        let mut ports = PortBus::new();
        let mut mmio = MmioBus::default();

        // 1. Time, then interrupts: everything else has deadlines and lines.
        let timers = TimerQueue::new(clock.clone(), Arc::clone(&counters));
        let fabric = Fabric::new(config.cpus, config.apic_timer_hz, &timers, &kick, Arc::clone(&counters));
        fabric.set_up_as_firmware();
        for (first, registers) in [
            (0x20, [PicPort::MasterCommand, PicPort::MasterData]),
            (0xa0, [PicPort::SlaveCommand, PicPort::SlaveData]),
            (0x4d0, [PicPort::MasterElcr, PicPort::SlaveElcr]),
        ] {
            ports.claim(first, 2, Byte, shared(PicPorts { fabric: Arc::clone(&fabric), registers }))?;
        }
        mmio.claim(IOAPIC_PAGE, 0x1000, shared(IoApicPage(Arc::clone(&fabric))))?;

        // 2. Timers and power.
        let pit = Pit::new(clock.clone(), timers.timer(), fabric.line(0));
        ports.claim(0x40, 4, Byte, pit.clone())?;
        ports.claim_part(0x61, 1, SPEAKER_OFFSET, Byte, pit)?;
        let acpi = AcpiPorts::new(clock.clone(), timers.timer(), fabric.line(SCI_LINE), Arc::clone(&end_request));
        ports.claim(ACPI_FIRST, ACPI_PORTS, Dword, acpi.clone())?;
        ports.claim(0x92, 1, Byte, shared(FastControl::new(Arc::clone(&end_request))))?;

        // 3. The PCI bus: its bridge, whose chipset has the reset register too.
        let pci = pci::Host::new(Arc::clone(&fabric), end_request);
        ports.claim(pci::CONFIG_PORTS.0, pci::CONFIG_PORTS.1, Dword, pci.clone())?;
        mmio.claim(pci::WINDOW, pci::WINDOW_BYTES, pci.clone())?;
        ports.claim_part(EVENT_PORTS.0, EVENT_PORTS.1, pci::EVENT_OFFSET, Byte, pci.clone())?;
        ports.claim_part(SLOT_PORTS.0, SLOT_PORTS.1, pci::SLOTS_OFFSET, Dword, pci.clone())?;

        // 4. Serial ports.
        let doorbell = Arc::new(Doorbell::new()?);
        let mut uarts = Vec::new();
        for (first, line) in SERIAL {
            let (clock, line) = (clock.clone(), fabric.line(line));
            let uart = shared(Uart::new(clock, line, Arc::clone(&doorbell), Arc::clone(&counters)));
            ports.claim(first, 8, Byte, uart.clone())?;
            uarts.push(uart);
        }

        // 5. The threads, when all they serve is there. Port 0x80 has no device: what nobody claims swallows writes.
        let serial = SerialService::start(uarts, doorbell, clock.clone(), counters)?;
        let timer_thread = TimerThread::start(Arc::clone(&timers))?;
        let outside_lines = (0..ISA_LINES).map(|line| fabric.line(line)).collect();
        Ok(Platform {
            config,
            clock,
            ports,
            mmio,
            fabric,
            timers,
            acpi,
            outside_lines,
            pci,
            virtio_mmio: Vec::new(),
            gate: Arc::default(),
            serial,
            _timer_thread: timer_thread,
        })
    }

    // ---- before the start ------------------------------------------------------------------------------------------

    /// Give `count` I/O ports from `first` to a device of the caller's. It gets each access that lies within them whole.
    ///
    /// # Errors
    /// [`Error::Bus`] when a port is taken or does not exist.
    pub fn add_port_device(&mut self, first: u16, count: u16, device: impl PortDevice + 'static) -> Result<(), Error> {
        let device: SharedPortDevice = shared(device);
        Ok(self.ports.claim(first, count, AccessSize::Dword, device)?)
    }

    /// Give `size` bytes of guest physical addresses from `first` to a device of the caller's.
    ///
    /// # Errors
    /// [`Error::Bus`] when the range is taken or is none.
    pub fn add_mmio_device(&mut self, first: Gpa, size: u64, device: impl MmioDevice + 'static) -> Result<(), Error> {
        Ok(self.mmio.claim(first, size, shared(device))?)
    }

    /// Give `size` bytes of guest physical addresses from `first` to registers that keep what is written to them.
    ///
    /// # Errors
    /// [`Error::Bus`] when the range is taken, is none or is too large.
    pub fn add_scratch(&mut self, first: Gpa, size: u64) -> Result<(), Error> {
        let scratch = Scratch::new(size).ok_or(BusError::Mmio { first })?;
        self.add_mmio_device(first, size, scratch)
    }

    /// Puts a virtio device on the PCI bus, in the next slot.
    ///
    /// # Errors
    /// [`Error::PciFull`].
    pub fn add_virtio(&mut self, backend: Arc<dyn Backend>, memory: Arc<GuestMemory>) -> Result<Arc<Presence>, Error> {
        let mut pci = self.pci.lock();
        let slot = pci.free_slot().ok_or(Error::PciFull)?;
        Ok(pci.insert(&slot, transport::card(backend, memory, Arc::clone(&self.gate), &slot)))
    }

    /// Gives a virtio device a page of registers, on no bus.
    ///
    /// # Errors
    /// [`Error::MmioFull`].
    pub fn add_virtio_mmio(&mut self, backend: Arc<dyn Backend>, memory: Arc<GuestMemory>) -> Result<(), Error> {
        let number = self.virtio_mmio.len();
        if number == mmio::MOST_DEVICES {
            return Err(Error::MmioFull);
        }
        let registers = mmio::registers(number, backend, memory, Arc::clone(&self.gate), &self.fabric);
        self.mmio.claim(mmio::FIRST.add(number as u64 * mmio::PAGE), mmio::PAGE, registers.clone())?;
        self.virtio_mmio.push(registers);
        Ok(())
    }

    /// Returns when no device touches guest memory any more; none does before the guard is dropped.
    pub fn still(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.close()
    }

    /// A stream socket joined to serial port `index` (0-3), which the caller owns. Once a port.
    ///
    /// # Errors
    /// [`Error::Serial`] when there is no such port, or its socket has been given already.
    pub fn serial_fd(&self, index: usize) -> Result<OwnedFd, Error> {
        Ok(self.serial.connect(index)?)
    }

    /// The processors have ended: the far end of each serial port reads what is still on its way and then the end of the
    /// stream.
    pub fn finish_serial(&self) {
        self.serial.finish();
    }

    /// The processors have ended: the threads of devices end, too, and files are free for other machines.
    pub fn end_devices(&self) {
        self.virtio_mmio.iter().for_each(|device| device.lock().end());
        let leaving = self.pci.lock().end();
        for thread in leaving {
            // It has told nobody of a panic but the standard error; its device is gone.
            let _ = thread.join();
        }
    }

    // ---- while the guest runs --------------------------------------------------------------------------------------

    /// Puts a virtio device on the PCI bus, in a free slot, and tells the guest.
    ///
    /// # Errors
    /// [`Error::PciFull`].
    pub fn plug_in(&self, backend: Arc<dyn Backend>, memory: Arc<GuestMemory>) -> Result<Arc<Presence>, Error> {
        let mut pci = self.pci.lock();
        let slot = pci.free_slot().ok_or(Error::PciFull)?;
        Ok(pci.plug_in(&slot, transport::card(backend, memory, Arc::clone(&self.gate), &slot)))
    }

    /// Asks the guest for a device; false when it is gone already.
    #[must_use]
    pub fn want_back(&self, presence: &Arc<Presence>) -> bool {
        self.pci.lock().want_back(presence)
    }

    // ---- what the processors reach ---------------------------------------------------------------------------------

    #[inline]
    #[must_use]
    pub fn port_read(&self, port: u16, size: AccessSize) -> u32 {
        self.ports.read(port, size)
    }

    #[inline]
    pub fn port_write(&self, port: u16, size: AccessSize, value: u32) {
        self.ports.write(port, size, value);
    }

    /// Read device registers as processor `cpu`: each sees its own local APIC.
    #[must_use]
    pub fn mmio_read(&self, cpu: usize, address: Gpa, size: AccessSize) -> u64 {
        self.fabric.read_apic_page(cpu, address, size).unwrap_or_else(|| self.mmio.read(address, size))
    }

    pub fn mmio_write(&self, cpu: usize, address: Gpa, size: AccessSize, value: u64) {
        if !self.fabric.write_apic_page(cpu, address, size, value) {
            self.mmio.write(address, size, value);
        }
    }

    /// Read IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0) or an x2APIC register (0x800 to 0x8ff).
    ///
    /// # Errors
    /// #GP(0) for others, and as the mode of the APIC demands.
    pub fn msr_read(&self, cpu: usize, number: u32) -> Result<u64, GuestFault> {
        self.fabric.read_msr(cpu, number)
    }

    /// Write one of the same.
    ///
    /// # Errors
    /// #GP(0) for others, for reserved bits, and as the mode of the APIC demands.
    pub fn msr_write(&self, cpu: usize, number: u32, value: u64) -> Result<(), GuestFault> {
        self.fabric.write_msr(cpu, number, value, self.config.address_bits)
    }

    /// The task priority register of a processor's local APIC; CR8 is its bits 7:4.
    #[inline]
    #[must_use]
    pub fn task_priority(&self, cpu: usize) -> u8 {
        self.fabric.task_priority(cpu)
    }

    pub fn set_task_priority(&self, cpu: usize, value: u8) {
        self.fabric.set_task_priority(cpu, value);
    }

    /// The guest has moved this processor's TSC: it reads [`Clock::tsc`] plus `ahead` (wrapping).
    pub fn set_tsc_ahead(&self, cpu: usize, ahead: u64) {
        self.fabric.set_tsc_ahead(cpu, ahead);
    }

    // ---- interrupts ------------------------------------------------------------------------------------------------

    /// What waits for a processor, as bits of [`crate::irq::attention`]; 0 for nothing. One atomic load.
    #[inline]
    #[must_use]
    pub fn attention(&self, cpu: usize) -> u32 {
        self.fabric.attention(cpu)
    }

    /// What a processor should take next.
    #[inline]
    #[must_use]
    pub fn pending(&self, cpu: usize) -> Option<Interrupt> {
        self.fabric.pending(cpu)
    }

    /// Take the maskable interrupt that is pending into service: its vector, or None if it is gone.
    #[must_use]
    pub fn acknowledge(&self, cpu: usize) -> Option<u8> {
        self.fabric.acknowledge(cpu)
    }

    /// Confirm [`Interrupt::Nmi`].
    #[must_use]
    pub fn take_nmi(&self, cpu: usize) -> bool {
        self.fabric.take_nmi(cpu)
    }

    /// The processor cannot take [`Interrupt::Nmi`] since it handles one.
    pub fn merge_nmis(&self, cpu: usize) {
        self.fabric.merge_nmis(cpu);
    }

    /// Confirm [`Interrupt::Init`].
    #[must_use]
    pub fn take_init(&self, cpu: usize) -> bool {
        self.fabric.take_init(cpu)
    }

    /// Confirm [`Interrupt::Startup`]: the address to start at, divided by 4096.
    #[must_use]
    pub fn take_startup(&self, cpu: usize) -> Option<u8> {
        self.fabric.take_startup(cpu)
    }

    /// Drive an ISA line (0-15) from outside, as one more source on it. Others are wired to nothing.
    pub fn set_isa_line(&self, line: u8, level: bool) {
        if let Some(line) = self.outside_lines.get(usize::from(line)) {
            line.set(level);
        }
    }

    pub fn press_power_button(&self) {
        self.acpi.lock().press_power_button();
    }

    // ---- time ------------------------------------------------------------------------------------------------------

    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// When the next timer of the platform is due, in nanoseconds of [`Clock::now`]; None if none is armed.
    #[must_use]
    pub fn next_event(&self) -> Option<u64> {
        Some(self.timers.next_deadline()).filter(|deadline| *deadline != crate::timer::NEVER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use AccessSize::{Byte, Dword, Word};
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    fn platform(cpus: usize) -> (Platform, std::sync::mpsc::Receiver<usize>) {
        let (sender, receiver) = channel();
        let kick: Kick = Arc::new(move |cpu| _ = sender.send(cpu));
        let config = Config { cpus, ..Config::default() };
        let platform = Platform::new(config, Clock::new(), Arc::default(), kick, Arc::new(|_| {})).unwrap();
        (platform, receiver)
    }

    #[test]
    fn a_timer_tick_reaches_the_processor() {
        let (platform, kicks) = platform(1);
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1)] {
            platform.port_write(port, Byte, value);
        }
        platform.port_write(0x43, Byte, 0x30);
        platform.port_write(0x40, Byte, 0x00);
        platform.port_write(0x40, Byte, 0x08);
        assert!(platform.next_event().is_some());
        assert_eq!(kicks.recv_timeout(Duration::from_secs(10)), Ok(0));
        assert_eq!(platform.pending(0), Some(Interrupt::External));
        assert_eq!(platform.acknowledge(0), Some(0x30));
        assert_eq!(platform.next_event(), None);
    }

    #[test]
    fn the_serial_console_speaks() {
        let (platform, _kicks) = platform(1);
        let mut far = UnixStream::from(platform.serial_fd(0).unwrap());
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        for byte in b"ready\n" {
            platform.port_write(0x3f8, Byte, u32::from(*byte));
        }
        let mut got = [0; 6];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"ready\n");
        assert!(platform.serial_fd(0).is_err());
        assert!(platform.serial_fd(4).is_err());
    }

    #[test]
    fn each_processor_sees_its_own_apic_and_all_the_ioapic() {
        let (platform, _kicks) = platform(2);
        assert_eq!(platform.mmio_read(1, Gpa(0xfee0_0020), Dword), 1 << 24);
        platform.mmio_write(0, Gpa(0xfec0_0000), Dword, 1);
        assert_eq!(platform.mmio_read(1, Gpa(0xfec0_0010), Dword), 0x0017_0020);
        assert_eq!(platform.mmio_read(0, Gpa(0xfed0_0000), Dword), 0xffff_ffff);
    }

    #[test]
    fn devices_of_others() {
        struct Echo(u32);
        impl PortDevice for Echo {
            fn read(&mut self, offset: u16, _size: AccessSize) -> u32 {
                self.0 + u32::from(offset)
            }
            fn write(&mut self, _offset: u16, _size: AccessSize, value: u32) {
                self.0 = value;
            }
        }
        let (mut platform, _kicks) = platform(1);
        platform.add_port_device(0x505, 4, Echo(0)).unwrap();
        assert!(platform.add_port_device(0x60, 2, Echo(0)).is_err(), "0x61 is the timer's");
        platform.port_write(0x505, Dword, 0x1234_5678);
        assert_eq!(platform.port_read(0x507, Word), 0x567a);
        platform.set_isa_line(8, true);
        platform.set_isa_line(99, true);
        assert_eq!(platform.attention(0) & crate::attention::PIC, crate::attention::PIC);
    }

    #[test]
    fn a_wrong_number_of_processors_is_refused() {
        for cpus in [0, 17] {
            let config = Config { cpus, ..Config::default() };
            let result = Platform::new(config, Clock::new(), Arc::default(), Arc::new(|_| {}), Arc::new(|_| {}));
            assert!(matches!(result, Err(Error::Cpus(count)) if count == cpus));
        }
    }

    #[test]
    fn every_port_takes_every_width() {
        let (platform, _kicks) = platform(1);
        for port in 0..=u16::MAX {
            for size in [Byte, Word, Dword] {
                let _ = platform.port_read(port, size);
                platform.port_write(port, size, 0xa5a5_a5a5);
            }
        }
    }
}
