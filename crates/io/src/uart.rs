//! A 16550A serial port with the 64-byte FIFO of the TL16C750, joined to a byte stream.
//! Sources: National Semiconductor PC16550D data sheet (1995); Texas Instruments TL16C750 (SLLS191) for the FIFO.
//!
//! The line is infinitely fast and loses nothing. What the guest sends goes to a buffer that the serial thread empties;
//! while that has room, the transmitter is always empty, and when it has none the transmitter stays busy. What comes in
//! is handed over by the serial thread in bursts, when the guest has read the last one and its driver had time to
//! look after it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use host::clock::Clock;
use host::counters::Counters;
use host::events::EventFd;

use crate::bus::{AccessSize, PortDevice};
use crate::irq::IrqLine;

/// How much a guest can send ahead of the serial thread.
pub const TRANSMIT_BUFFER: usize = 16 * 1024;
/// The largest burst the guest may write when it sees the transmitter empty: a whole FIFO.
const FIFO: usize = 64;
/// How many bytes the guest finds at most when it looks: more would keep its interrupt handler from ever ending.
pub const BURST: usize = 1024;

/// Interrupt enable.
const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;
/// Interrupt identification.
const IIR_NONE: u8 = 1;
const IIR_MODEM: u8 = 0;
const IIR_TRANSMIT: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_TIMEOUT: u8 = 0xc;
const IIR_FIFO: u8 = 0xc0;
const IIR_FIFO_64: u8 = 0x20;
/// FIFO control.
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const FCR_64: u8 = 1 << 5;
/// Line control: the divisor latch takes the place of two registers.
const LCR_DIVISOR: u8 = 1 << 7;
/// Modem control.
const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
/// Line status.
const LSR_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_EMPTY: u8 = 1 << 5 | 1 << 6;
/// Modem status; the low four bits say which of the high ones have changed.
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// Wakes the serial thread, with a system call only when it sleeps.
pub struct Doorbell {
    state: AtomicU8,
    pub event: EventFd,
}

/// The thread is looking at all ports, or is about to.
const AWAKE: u8 = 0;
/// It will look again within a fraction of a millisecond.
const DOZING: u8 = 1;
/// It sleeps until it is woken.
const ASLEEP: u8 = 2;

impl Doorbell {
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Doorbell { state: AtomicU8::new(AWAKE), event: EventFd::new()? })
    }

    /// There is work that may wait while the thread dozes. True if it had to be woken.
    fn ring(&self) -> bool {
        self.state.load(Ordering::SeqCst) == ASLEEP && self.ring_at_once()
    }

    /// There is work that must not wait.
    pub fn ring_at_once(&self) -> bool {
        let woken = self.state.swap(AWAKE, Ordering::SeqCst) != AWAKE;
        if woken {
            self.event.signal();
        }
        woken
    }

    pub(crate) fn awake(&self) {
        self.state.store(AWAKE, Ordering::SeqCst);
    }

    /// Announced before the last look at the ports, so that nothing that comes after that look is missed.
    pub(crate) fn about_to_sleep(&self, doze: bool) {
        self.state.store(if doze { DOZING } else { ASLEEP }, Ordering::SeqCst);
    }
}

/// What the serial thread learns from one look at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receiver {
    /// It would take a burst now.
    Ready,
    /// It would take one at this time (nanoseconds).
    ReadyAt(u64),
    /// The guest has not read the last burst, or does not want any more. It will ring if asked to.
    Busy,
}

pub struct Uart {
    ier: u8,
    lcr: u8,
    mcr: u8,
    msr_changes: u8,
    scratch: u8,
    divisor: u16,
    fifo: bool,
    fifo_64: bool,
    trigger: u8,
    overrun: bool,
    /// The transmitter has become empty and the guest has not been told yet.
    transmit_event: bool,
    /// The guest has used RTS, or the received-data interrupt: from then on, without them it gets nothing.
    uses_rts: bool,
    uses_interrupt: bool,

    transmit: Vec<u8>,
    /// Somebody listens. If not, what is sent is gone.
    connected: bool,
    received: Vec<u8>,
    read_at: usize,
    /// When the present burst was handed over, and when the guest had read it.
    burst_began: u64,
    burst_ended: u64,
    /// The serial thread wants to know when the receiver becomes ready.
    ring_when_ready: bool,

    line: IrqLine,
    line_level: bool,
    clock: Clock,
    doorbell: Arc<Doorbell>,
    counters: Arc<Counters>,
}

impl Uart {
    #[must_use]
    pub fn new(clock: Clock, line: IrqLine, doorbell: Arc<Doorbell>, counters: Arc<Counters>) -> Self {
        Uart {
            ier: 0,
            lcr: 0,
            mcr: 0,
            msr_changes: 0,
            scratch: 0,
            divisor: 12,
            fifo: false,
            fifo_64: false,
            trigger: 1,
            overrun: false,
            transmit_event: false,
            uses_rts: false,
            uses_interrupt: false,
            transmit: Vec::new(),
            connected: false,
            received: Vec::with_capacity(BURST),
            read_at: 0,
            burst_began: 0,
            burst_ended: 0,
            ring_when_ready: false,
            line,
            line_level: false,
            clock,
            doorbell,
            counters,
        }
    }

    // ---- the serial thread's side ----------------------------------------------------------------------------------

    pub fn set_connected(&mut self, connected: bool) {
        self.connected = connected;
        if !connected {
            self.transmit.clear();
            self.transmitter_drained();
        }
    }

    /// Give what the guest has sent, in exchange for an empty buffer.
    pub fn take_transmitted(&mut self, buffer: &mut Vec<u8>) {
        debug_assert!(buffer.is_empty());
        if self.transmit.is_empty() {
            return;
        }
        let was_full = !self.has_room();
        std::mem::swap(&mut self.transmit, buffer);
        if was_full {
            self.transmitter_drained();
        }
    }

    pub fn receiver(&self, now: u64) -> Receiver {
        if !self.unread().is_empty() || !self.wants_bytes() {
            return Receiver::Busy;
        }
        // The guest gets as long as its handler took for the last burst to do something with it. Else a single
        // processor would never leave the handler, and its driver's buffers would overflow.
        let took = self.burst_ended.saturating_sub(self.burst_began);
        let ready = self.burst_ended.saturating_add(took.clamp(20_000, 1_000_000));
        if self.burst_ended == 0 || now >= ready { Receiver::Ready } else { Receiver::ReadyAt(ready) }
    }

    /// Hand over up to [`BURST`] bytes; returns how many. Only when the receiver is ready.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(BURST);
        self.received.clear();
        self.received.extend_from_slice(&bytes[..count]);
        self.read_at = 0;
        self.burst_began = self.clock.now();
        self.ring_when_ready = false;
        self.update_line();
        count
    }

    pub fn ring_when_ready(&mut self) {
        self.ring_when_ready = true;
    }

    // ---- inside ----------------------------------------------------------------------------------------------------

    #[inline]
    fn unread(&self) -> &[u8] {
        self.received.get(self.read_at..).unwrap_or_default()
    }

    /// A whole FIFO fits: the guest may be told that the transmitter is empty.
    #[inline]
    fn has_room(&self) -> bool {
        self.transmit.len() <= TRANSMIT_BUFFER - FIFO
    }

    /// Bytes wait outside until the guest's driver is open. Linux clears the receiver when it opens a port, and lowers
    /// RTS when it closes one or can take no more.
    fn wants_bytes(&self) -> bool {
        let (rts, interrupt) = (self.mcr & MCR_RTS != 0, self.ier & IER_RECEIVED != 0);
        self.mcr & MCR_LOOP == 0 && (rts || interrupt) && (rts || !self.uses_rts) && (interrupt || !self.uses_interrupt)
    }

    fn looping(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn transmitter_drained(&mut self) {
        self.transmit_event = true;
        self.update_line();
    }

    /// The receiver may have become ready: tell the thread, if it waits for that.
    fn tell_if_ready(&mut self) {
        if self.ring_when_ready && self.unread().is_empty() && self.wants_bytes() {
            self.ring_when_ready = false;
            self.count_wakeup(self.doorbell.ring());
        }
    }

    fn count_wakeup(&self, woken: bool) {
        if woken {
            self.counters.serial_wakeups.add(1);
        }
    }

    /// The most urgent reason for an interrupt, PC16550D table IV "Interrupt Control Functions".
    #[inline]
    fn reason(&self) -> u8 {
        let unread = self.unread().len();
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && unread != 0 {
            // Below the trigger level the bytes are announced as those of a sender that has paused.
            if !self.fifo || unread >= usize::from(self.trigger) { IIR_RECEIVED } else { IIR_TIMEOUT }
        } else if self.ier & IER_TRANSMIT != 0 && self.transmit_event {
            IIR_TRANSMIT
        } else if self.ier & IER_MODEM != 0 && self.msr_changes != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    #[inline]
    fn update_line(&mut self) {
        let level = self.reason() != IIR_NONE;
        if level != self.line_level {
            self.line_level = level;
            self.line.set(level);
        }
    }

    fn modem_status(&self) -> u8 {
        if !self.looping() {
            // The other end is always there and always ready.
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        let pairs = [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)];
        pairs.iter().filter(|(out, _)| self.mcr & out != 0).fold(0, |status, (_, input)| status | input)
    }

    fn write_modem_control(&mut self, value: u8) {
        let before = self.modem_status();
        self.mcr = value & 0x1f;
        if !self.looping() {
            self.uses_rts |= self.mcr & MCR_RTS != 0;
        }
        let after = self.modem_status();
        // The ring indicator counts when it ends, the others when they change.
        let changed = (before ^ after) & !MSR_RI | before & !after & MSR_RI;
        self.msr_changes |= changed >> 4;
        self.tell_if_ready();
    }

    fn write_fifo_control(&mut self, value: u8) {
        let enable = value & FCR_ENABLE != 0;
        if enable != self.fifo || enable && value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
            self.read_at = 0;
            self.burst_ended = self.clock.now();
        }
        self.fifo = enable;
        // TL16C750: the bit is protected by the divisor latch bit. Linux tells this chip by that.
        if !enable {
            self.fifo_64 = false;
        } else if self.lcr & LCR_DIVISOR != 0 {
            self.fifo_64 = value & FCR_64 != 0;
        }
        let levels = if self.fifo_64 { [1, 16, 32, 56] } else { [1, 4, 8, 14] };
        self.trigger = if enable { levels[usize::from(value >> 6)] } else { 1 };
        self.tell_if_ready();
    }

    #[inline]
    fn write_transmitter(&mut self, byte: u8) {
        if self.looping() {
            self.loop_back(byte);
        } else if self.connected {
            if self.transmit.len() < TRANSMIT_BUFFER {
                self.transmit.push(byte);
                match self.transmit.len() {
                    1 => self.count_wakeup(self.doorbell.ring()),
                    n if n == TRANSMIT_BUFFER / 2 => self.count_wakeup(self.doorbell.ring_at_once()),
                    _ => {}
                }
            } else {
                self.counters.serial_overrun.add(1);
            }
        }
        // Empty again at once, while there is room.
        self.transmit_event = self.has_room();
    }

    fn loop_back(&mut self, byte: u8) {
        let depth = match (self.fifo, self.fifo_64) {
            (false, _) => 1,
            (true, false) => 16,
            (true, true) => FIFO,
        };
        if self.unread().len() < depth {
            if self.unread().is_empty() {
                self.received.clear();
                self.read_at = 0;
            }
            self.received.push(byte);
        } else {
            self.overrun = true;
        }
    }

    #[inline]
    fn read_receiver(&mut self) -> u8 {
        let Some(byte) = self.received.get(self.read_at).copied() else { return 0 };
        self.read_at += 1;
        if self.read_at == self.received.len() {
            self.burst_ended = self.clock.now();
            self.tell_if_ready();
            self.update_line();
        }
        byte
    }

    fn write_interrupt_enable(&mut self, value: u8) {
        // Enabling the interrupt of an empty transmitter raises it: how Linux starts to send.
        if value & IER_TRANSMIT != 0 && self.ier & IER_TRANSMIT == 0 && self.has_room() {
            self.transmit_event = true;
        }
        self.ier = value & 0xf;
        self.uses_interrupt |= self.ier & IER_RECEIVED != 0;
        self.tell_if_ready();
    }
}

impl PortDevice for Uart {
    #[inline]
    fn read(&mut self, offset: u16, _size: AccessSize) -> u32 {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        let value = match offset {
            0 if divisor => self.divisor as u8,
            0 => self.read_receiver(),
            1 if divisor => (self.divisor >> 8) as u8,
            1 => self.ier,
            2 => {
                let reason = self.reason();
                if reason == IIR_TRANSMIT {
                    self.transmit_event = false;
                    self.update_line();
                }
                reason | if self.fifo { IIR_FIFO } else { 0 } | if self.fifo_64 { IIR_FIFO_64 } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let mut status = 0;
                if !self.unread().is_empty() {
                    status |= LSR_READY;
                }
                if self.has_room() {
                    status |= LSR_EMPTY;
                }
                if self.overrun {
                    status |= LSR_OVERRUN;
                    self.overrun = false;
                    self.update_line();
                }
                status
            }
            6 => {
                let changes = std::mem::take(&mut self.msr_changes);
                self.update_line();
                self.modem_status() | changes
            }
            _ => self.scratch,
        };
        u32::from(value)
    }

    #[inline]
    fn write(&mut self, offset: u16, _size: AccessSize, value: u32) {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        let value = value as u8;
        match offset {
            0 if divisor => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => self.write_transmitter(value),
            1 if divisor => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            1 => self.write_interrupt_enable(value),
            2 => self.write_fifo_control(value),
            3 => self.lcr = value,
            4 => self.write_modem_control(value),
            // Line and modem status are read-only (the data sheet allows writes for factory tests only).
            5 | 6 => {}
            _ => self.scratch = value,
        }
        self.update_line();
    }
}

#[cfg(test)]
#[path = "uart_tests.rs"]
mod tests;
