//! ACPI's fixed registers (PM1 events and control, the PM timer), and port 0x92, which resets the machine.
//! Source: ACPI Specification 6.5, 4.8.3 "Fixed Hardware Registers"; port 0x92: Intel ICH9 (316972) 13.7.3 "PORT92".

use std::sync::{Arc, Weak};

use host::clock::{Clock, scale};
use host::lock::RankedMutex;

use super::service::{NEVER, Timer, TimerTarget};
use crate::bus::{AccessSize, PortDevice, shared};
use crate::irq::IrqLine;

/// Called once or more with "poweroff" or "reboot" when the guest asks for it. Called with a device locked, so it must
/// not call back into the platform.
pub type EndRequest = Arc<dyn Fn(&'static str) + Send + Sync>;

/// The ISA line of ACPI's interrupt, as the FADT has it.
pub const SCI_LINE: u8 = 9;
pub const PM_TIMER_HZ: u64 = 3_579_545;
const NANOSECONDS: u64 = 1_000_000_000;

/// Bits of the PM1 status and enable registers.
const TIMER: u16 = 1 << 0;
const GLOBAL: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
const SLEEP_BUTTON: u16 = 1 << 9;
const CLOCK_ALARM: u16 = 1 << 10;
const EVENTS: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | CLOCK_ALARM;
const WAKE: u16 = 1 << 15;
/// Bits of PM1 control.
const SCI_ENABLED: u16 = 1 << 0;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;
/// The sleep type that our DSDT names for S5, soft off.
const SOFT_OFF: u16 = 5;

/// Offsets in the block.
const STATUS: u16 = 0;
const ENABLE: u16 = 2;
const CONTROL: u16 = 4;
const PM_TIMER: u16 = 8;
/// The block's length in ports.
pub const ACPI_PORTS: u16 = 12;

/// The block at port 0x600: status, enable, control and the 32-bit PM timer.
pub struct AcpiPorts {
    status: u16,
    enable: u16,
    control: u16,
    /// The count of the PM timer's top-bit changes up to which TMR_STS has been settled.
    half_turns: u64,
    clock: Clock,
    timer: Timer,
    sci: IrqLine,
    sci_level: bool,
    end: EndRequest,
}

impl AcpiPorts {
    #[must_use]
    pub fn new(clock: Clock, timer: Timer, sci: IrqLine, end: EndRequest) -> Arc<RankedMutex<Self>> {
        let acpi = shared(AcpiPorts {
            status: 0,
            enable: 0,
            // There is no SMI_CMD to switch ACPI on with: it is on.
            control: SCI_ENABLED,
            half_turns: 0,
            clock,
            timer,
            sci,
            sci_level: false,
            end,
        });
        let target: Weak<RankedMutex<Self>> = Arc::downgrade(&acpi);
        acpi.lock().timer.set_target(target);
        acpi
    }

    /// The power button is pressed: the guest's system will want to shut down.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
        self.follow();
    }

    fn ticks(&self) -> u64 {
        scale(self.clock.now(), PM_TIMER_HZ, NANOSECONDS)
    }

    /// Set TMR_STS if the timer's top bit has changed, and the SCI as status and enable say.
    fn follow(&mut self) {
        let half_turns = self.ticks() >> 31;
        if half_turns != self.half_turns {
            self.half_turns = half_turns;
            self.status |= TIMER;
        }
        let level = self.status & self.enable & EVENTS != 0;
        if level != self.sci_level {
            self.sci_level = level;
            self.sci.set(level);
        }
        // The top bit changes every ten minutes; only a guest that asked is told when.
        self.timer.arm(if self.enable & TIMER != 0 {
            scale((half_turns + 1) << 31, NANOSECONDS, PM_TIMER_HZ).saturating_add(1)
        } else {
            NEVER
        });
    }

    fn write_control(&mut self, value: u16) {
        self.control = value & !SLEEP_ENABLE | SCI_ENABLED;
        if value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & 7 == SOFT_OFF {
            (self.end)("poweroff");
        }
    }

    fn read_16(&mut self, offset: u16) -> u16 {
        match offset {
            STATUS => {
                self.follow();
                self.status
            }
            ENABLE => self.enable,
            CONTROL => self.control,
            _ => 0,
        }
    }

    /// Write the bits of a 16-bit register that `mask` selects.
    fn write_16(&mut self, offset: u16, value: u16, mask: u16) {
        match offset {
            STATUS => {
                self.follow();
                self.status &= !(value & mask & (EVENTS | WAKE));
                self.follow();
            }
            ENABLE => {
                self.enable = (self.enable & !mask | value & mask) & EVENTS;
                self.follow();
            }
            // A byte write must not act on the other half: the half with SLP_EN keeps it 0.
            CONTROL => self.write_control(self.control & !mask | value & mask),
            _ => {}
        }
    }
}

impl PortDevice for AcpiPorts {
    #[inline]
    fn read(&mut self, offset: u16, size: AccessSize) -> u32 {
        if offset >= PM_TIMER {
            return (self.ticks() as u32) >> (8 * (offset & 3));
        }
        let even = offset & !1;
        let pair = u32::from(self.read_16(even));
        let next = if size == AccessSize::Dword { u32::from(self.read_16(even + 2)) } else { 0 };
        (next << 16 | pair) >> (8 * (offset & 1))
    }

    fn write(&mut self, offset: u16, size: AccessSize, value: u32) {
        // The PM timer is read-only. A word or dword that is not aligned is taken byte by byte.
        let width = size.bytes() as u16;
        if size == AccessSize::Byte || !offset.is_multiple_of(2) {
            for byte in 0..width {
                let (at, part) = (offset + byte, (value >> (8 * byte)) as u16 & 0xff);
                let shift = 8 * (at & 1);
                self.write_16(at & !1, part << shift, 0xff << shift);
            }
        } else {
            self.write_16(offset, value as u16, 0xffff);
            if size == AccessSize::Dword {
                self.write_16(offset + 2, (value >> 16) as u16, 0xffff);
            }
        }
    }
}

impl TimerTarget for RankedMutex<AcpiPorts> {
    fn expired(&self, _now: u64) {
        self.lock().follow();
    }
}

/// Port 0x92: fast reset and the A20 gate. The gate has no effect: address line 20 is always on.
pub struct FastControl {
    value: u8,
    end: EndRequest,
}

impl FastControl {
    #[must_use]
    pub fn new(end: EndRequest) -> Self {
        FastControl { value: 2, end }
    }
}

impl PortDevice for FastControl {
    fn read(&mut self, _offset: u16, _size: AccessSize) -> u32 {
        u32::from(self.value)
    }

    fn write(&mut self, _offset: u16, _size: AccessSize, value: u32) {
        let rises = value & 1 != 0 && self.value & 1 == 0;
        self.value = value as u8 & 3;
        if rises {
            (self.end)("reboot");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::AccessSize::{Byte, Dword, Word};
    use crate::irq::pic::PicPort;
    use crate::irq::{Fabric, Kick};
    use crate::timer::TimerQueue;
    use std::sync::Mutex;

    struct Bench {
        acpi: Arc<RankedMutex<AcpiPorts>>,
        fabric: Arc<Fabric>,
        timers: Arc<TimerQueue>,
        clock: Clock,
        reasons: Arc<Mutex<Vec<&'static str>>>,
        end: EndRequest,
    }

    fn bench() -> Bench {
        let clock = Clock::manual(1_000_000_000);
        let timers = TimerQueue::new(clock.clone(), Arc::default());
        let kick: Kick = Arc::new(|_| {});
        let fabric = Fabric::new(1, 1_000_000_000, &timers, &kick, Arc::default());
        fabric.set_up_as_firmware();
        let reasons = Arc::new(Mutex::new(Vec::new()));
        let told = reasons.clone();
        let end: EndRequest = Arc::new(move |reason| told.lock().unwrap().push(reason));
        let acpi = AcpiPorts::new(clock.clone(), timers.timer(), fabric.line(9), end.clone());
        Bench { acpi, fabric, timers, clock, reasons, end }
    }

    impl Bench {
        fn sci(&self) -> bool {
            self.fabric.write_pic(PicPort::SlaveCommand, 0x0a);
            self.fabric.read_pic(PicPort::SlaveCommand) & 2 != 0
        }
    }

    #[test]
    fn soft_off_as_linux_does_it() {
        let bench = bench();
        let mut acpi = bench.acpi.lock();
        assert_eq!(acpi.read(CONTROL, Word), 1, "ACPI mode is on");
        acpi.write(CONTROL, Word, 5 << 10 | 1);
        assert!(bench.reasons.lock().unwrap().is_empty());
        acpi.write(CONTROL, Word, 4 << 10 | 1 << 13);
        assert!(bench.reasons.lock().unwrap().is_empty(), "another sleep type");
        acpi.write(CONTROL, Word, 5 << 10 | 1 << 13 | 1);
        assert_eq!(*bench.reasons.lock().unwrap(), ["poweroff"]);
        assert_eq!(acpi.read(CONTROL, Word), 5 << 10 | 1, "SLP_EN reads 0");
        acpi.write(CONTROL + 1, Byte, 0x34);
        assert_eq!(bench.reasons.lock().unwrap().len(), 2, "the high byte alone does it too");
    }

    #[test]
    fn the_pm_timer_runs() {
        let bench = bench();
        bench.clock.advance(2 * NANOSECONDS);
        let mut acpi = bench.acpi.lock();
        assert_eq!(acpi.read(PM_TIMER, Dword), 2 * 3_579_545);
        assert_eq!(acpi.read(PM_TIMER + 1, Byte) & 0xff, ((2 * 3_579_545) >> 8) & 0xff);
    }

    #[test]
    fn the_timer_event() {
        let bench = bench();
        bench.acpi.lock().write(ENABLE, Word, 1);
        bench.clock.advance(599 * NANOSECONDS);
        bench.timers.run_due();
        assert!(!bench.sci());
        bench.clock.advance(NANOSECONDS);
        bench.timers.run_due();
        assert!(bench.sci());
        bench.acpi.lock().write(STATUS, Word, 1);
        assert!(!bench.sci());
        bench.acpi.lock().write(ENABLE, Word, 0);
        assert_eq!(bench.timers.next_deadline(), NEVER);
    }

    #[test]
    fn the_power_button() {
        let bench = bench();
        bench.acpi.lock().press_power_button();
        assert!(!bench.sci(), "not enabled");
        let mut acpi = bench.acpi.lock();
        acpi.write(STATUS, Dword, 0x0100_0000);
        assert_eq!(acpi.read(STATUS, Dword), 0x0100_0100);
        drop(acpi);
        assert!(bench.sci());
        bench.acpi.lock().write(STATUS + 1, Byte, 1);
        assert!(!bench.sci());
        assert_eq!(bench.acpi.lock().read(STATUS, Word), 0);
    }

    #[test]
    fn fast_reset() {
        let bench = bench();
        let mut port = FastControl::new(bench.end.clone());
        assert_eq!(port.read(0, Byte), 2);
        port.write(0, Byte, 2);
        assert!(bench.reasons.lock().unwrap().is_empty());
        port.write(0, Byte, 3);
        assert_eq!(*bench.reasons.lock().unwrap(), ["reboot"]);
    }
}
