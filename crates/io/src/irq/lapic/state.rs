//! The registers of one local APIC and what they mean. No locks and no time of its own: the caller brings both.
//! Source: Intel SDM (2024-12) Vol. 3A chapter 12 "Advanced Programmable Interrupt Controller (APIC)".

use super::countdown::{Countdown, TimerMode};
use crate::irq::message::{DeliveryMode, Message};

/// Register numbers: the offset in the page divided by 16, and the MSR number less 0x800 (12.12.1.2).
pub mod register {
    pub const ID: u8 = 0x02;
    pub const VERSION: u8 = 0x03;
    pub const TPR: u8 = 0x08;
    pub const APR: u8 = 0x09;
    pub const PPR: u8 = 0x0a;
    pub const EOI: u8 = 0x0b;
    pub const REMOTE_READ: u8 = 0x0c;
    pub const LDR: u8 = 0x0d;
    pub const DFR: u8 = 0x0e;
    pub const SVR: u8 = 0x0f;
    pub const ISR: u8 = 0x10;
    pub const TMR: u8 = 0x18;
    pub const IRR: u8 = 0x20;
    pub const ESR: u8 = 0x28;
    pub const ICR_LOW: u8 = 0x30;
    pub const ICR_HIGH: u8 = 0x31;
    pub const LVT_TIMER: u8 = 0x32;
    #[cfg(test)]
    pub const LVT_LINT0: u8 = 0x35;
    pub const LVT_ERROR: u8 = 0x37;
    pub const INITIAL_COUNT: u8 = 0x38;
    pub const CURRENT_COUNT: u8 = 0x39;
    pub const DIVIDE: u8 = 0x3e;
    pub const SELF_IPI: u8 = 0x3f;

    /// Whether reading or writing a register needs the time.
    pub fn is_timers(register: u8) -> bool {
        matches!(register, LVT_TIMER | INITIAL_COUNT | CURRENT_COUNT | DIVIDE)
    }
}
use register as r;

/// What waits for the processor, as bits of one word.
pub mod attention {
    pub const NMI: u32 = 1 << 0;
    pub const INIT: u32 = 1 << 1;
    pub const STARTUP: u32 = 1 << 2;
    /// A maskable interrupt whose vector the PIC will say.
    pub const PIC: u32 = 1 << 3;
    /// A maskable interrupt of the local APIC that the task priority lets through.
    pub const FIXED: u32 = 1 << 4;
    /// Either kind of maskable interrupt.
    pub const EXTERNAL: u32 = PIC | FIXED;
}

/// The six LVT entries from LVT_TIMER on, and the bits of each that can be written.
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
const LVT_MASKED: u32 = 1 << 16;
const LINT0: usize = 3;
const LINT1: usize = 4;
const ERROR: usize = 5;
/// Integrated APIC, six LVT entries, EOI broadcasts can be suppressed.
const VERSION: u32 = 0x14 | 5 << 16 | 1 << 24;
const SVR_ENABLED: u32 = 1 << 8;
const SVR_NO_EOI_BROADCAST: u32 = 1 << 12;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLED: u64 = 1 << 11;
pub const DEFAULT_PAGE: u64 = 0xfee0_0000;

const ESR_SEND_VECTOR: u32 = 1 << 5;
const ESR_RECEIVED_VECTOR: u32 = 1 << 6;
const ESR_REGISTER: u32 = 1 << 7;

/// Bits of the ICR that must be zero in x2APIC mode. Bit 12, delivery status, is gone there but may be written.
const X2APIC_ICR_RESERVED: u64 = 0xfff3_2000;

/// The guest used a register or value that does not exist: #GP(0) when it came by MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Illegal;

/// What a register write asks of the rest of the machine, to be done when no local APIC is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    /// Tell the I/O APIC that a level interrupt ended.
    EndOfLevel(u8),
    Send(Message, Shorthand),
    /// A message was for this processor itself, and has arrived.
    Kept,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// Whom the message names.
    Destination,
    Oneself,
    All,
    Others,
}

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default)]
struct Vectors([u64; 4]);

impl Vectors {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    fn has(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] & 1 << (vector & 63) != 0
    }

    #[inline]
    fn highest(&self) -> Option<u8> {
        let part = (0..4).rev().find(|part| self.0[*part] != 0)?;
        Some(part as u8 * 64 + 63 - self.0[part].leading_zeros() as u8)
    }

    /// One of the eight 32-bit registers that show the set.
    fn word(&self, index: u8) -> u32 {
        (self.0[usize::from(index >> 1 & 3)] >> (32 * (index & 1))) as u32
    }
}

#[derive(Clone, Debug)]
pub struct State {
    id: u32,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    esr: u32,
    /// Errors since the last write of the ESR, which shows them.
    new_errors: u32,
    icr: u64,
    lvt: [u32; 6],
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    pub timer: Countdown,
    /// The level of the LINT0 pin: the PIC's output.
    lint0: bool,
    /// An I/O APIC pin in ExtINT mode has sent for the PIC.
    pic_message: bool,
    /// Waiting for the processor, 0 to 2.
    nmis: u8,
    /// The processor has seen one while it handled another: no more than that one waits.
    one_nmi: bool,
    init: bool,
    startup: Option<u8>,
    waits_for_startup: bool,
}

impl State {
    /// As after reset, 12.4.7.1 "Local APIC State After Power-Up or Reset".
    pub fn new(id: u32, timer_hz: u64) -> Self {
        let bootstrap = id == 0;
        State {
            id,
            base: DEFAULT_PAGE | BASE_ENABLED | if bootstrap { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            esr: 0,
            new_errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            timer: Countdown::new(timer_hz),
            lint0: false,
            pic_message: false,
            nmis: 0,
            one_nmi: false,
            init: false,
            startup: None,
            waits_for_startup: !bootstrap,
        }
    }

    /// What firmware leaves behind on the bootstrap processor: the PIC reaches it through LINT0 ("virtual wire mode",
    /// Intel MultiProcessor Specification 1.4, 3.6.2.2), and LINT1 is the NMI pin.
    pub fn set_virtual_wire(&mut self) {
        self.svr = SVR_ENABLED | 0xff;
        self.lvt[LINT0] = 0x700;
        self.lvt[LINT1] = 0x400;
    }

    pub fn is_x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    fn hardware_enabled(&self) -> bool {
        self.base & BASE_ENABLED != 0
    }

    /// The page of the xAPIC registers, if the guest has them mapped.
    pub fn page(&self) -> Option<u64> {
        (self.base & (BASE_ENABLED | BASE_X2APIC) == BASE_ENABLED).then_some(self.base & !0xfff)
    }

    // ---- what waits ----------------------------------------------------------------------------------------------

    #[inline]
    fn processor_priority(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The vector that the processor would get.
    #[inline]
    fn deliverable(&self) -> Option<u8> {
        if !self.hardware_enabled() {
            return None;
        }
        self.irr.highest().filter(|vector| vector & 0xf0 > self.processor_priority() & 0xf0)
    }

    fn pic_waits(&self) -> bool {
        if !self.hardware_enabled() {
            // Without its APIC the bootstrap processor's pin is INTR itself.
            return self.lint0 && self.base & BASE_BSP != 0;
        }
        let lint0 = self.lvt[LINT0];
        self.pic_message
            || self.lint0 && lint0 & LVT_MASKED == 0 && DeliveryMode::from_bits(lint0 >> 8) == DeliveryMode::ExtInt
    }

    /// The word of [`attention`] bits.
    #[inline]
    pub fn attention(&self) -> u32 {
        let mut word = 0;
        if self.init {
            word |= attention::INIT;
        }
        if self.startup.is_some() {
            word |= attention::STARTUP;
        }
        if !self.waits_for_startup {
            if self.nmis != 0 {
                word |= attention::NMI;
            }
            if self.pic_waits() {
                word |= attention::PIC;
            }
            if self.deliverable().is_some() {
                word |= attention::FIXED;
            }
        }
        word
    }

    /// Take the best vector into service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.clear(vector);
        self.isr.set(vector);
        Some(vector)
    }

    /// The PIC's vector is being fetched.
    pub fn take_pic(&mut self) {
        self.pic_message = false;
    }

    pub fn take_nmi(&mut self) -> bool {
        let waits = self.nmis != 0;
        self.nmis = self.nmis.saturating_sub(1);
        self.one_nmi = false;
        waits
    }

    /// Another NMI. A processor takes the first at its next instruction, and then has room for one more (Intel SDM (2024-12)
    /// Vol. 3A 7.7.1 "Handling Multiple NMIs"): ours may be late to take the first, and must not lose the second for that.
    fn latch_nmi(&mut self) {
        self.nmis = (self.nmis + 1).min(if self.one_nmi { 1 } else { 2 });
    }

    /// The processor handles an NMI: of those that come meanwhile one waits.
    pub fn merge_nmis(&mut self) {
        self.nmis = self.nmis.min(1);
        self.one_nmi = self.nmis == 1;
    }

    /// The processor obeys an INIT: the APIC is as after reset but for its identity and base (12.4.7.3), and it waits
    /// for a start-up message, which may be here already.
    pub fn take_init(&mut self) -> bool {
        if !self.init {
            return false;
        }
        let timer_hz = self.timer.hz();
        *self = State {
            base: self.base,
            lint0: self.lint0,
            startup: self.startup,
            waits_for_startup: self.base & BASE_BSP == 0,
            ..State::new(self.id, timer_hz)
        };
        true
    }

    pub fn take_startup(&mut self) -> Option<u8> {
        let vector = self.startup.take()?;
        self.waits_for_startup = false;
        Some(vector)
    }

    // ---- what comes in -------------------------------------------------------------------------------------------

    /// Take a message that is for this APIC. False if it cannot.
    pub fn accept(&mut self, message: &Message) -> bool {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.accept_vector(message.vector, message.level),
            DeliveryMode::Nmi => {
                self.latch_nmi();
                true
            }
            DeliveryMode::Init => {
                self.init = true;
                self.startup = None;
                true
            }
            DeliveryMode::StartUp => {
                // Only a processor that waits for it (or will, once it has seen the INIT) obeys; the second of the
                // usual two is ignored.
                if (self.waits_for_startup || self.init) && self.startup.is_none() {
                    self.startup = Some(message.vector);
                }
                true
            }
            DeliveryMode::ExtInt => {
                self.pic_message = true;
                true
            }
            DeliveryMode::Smi | DeliveryMode::Reserved => false,
        }
    }

    fn accept_vector(&mut self, vector: u8, level: bool) -> bool {
        if !self.hardware_enabled() || self.svr & SVR_ENABLED == 0 {
            return false;
        }
        if vector < 16 {
            self.report(ESR_RECEIVED_VECTOR);
            return true;
        }
        self.irr.set(vector);
        if level {
            self.tmr.set(vector)
        } else {
            self.tmr.clear(vector)
        }
        true
    }

    /// Whether a message with this destination is for this APIC: 12.6.2 "Determining IPI Destination".
    pub fn matches(&self, destination: u32, logical: bool) -> bool {
        if !self.hardware_enabled() {
            // It is deaf but for INIT and start-up by identifier.
            return !logical && (destination == self.id || destination == u32::MAX);
        }
        if !logical {
            return destination == self.id || destination == u32::MAX;
        }
        if self.is_x2apic() {
            let own = self.x2apic_ldr();
            return destination == u32::MAX || destination >> 16 == own >> 16 && destination & own & 0xffff != 0;
        }
        let (wanted, own) = (destination & 0xff, self.ldr >> 24);
        if wanted == 0xff {
            true
        } else if self.dfr >> 28 == 0xf {
            wanted & own != 0
        } else {
            wanted >> 4 == own >> 4 && wanted & own & 0xf != 0
        }
    }

    /// The priority by which "lowest priority" chooses.
    pub fn arbitration_priority(&self) -> u8 {
        self.processor_priority()
    }

    pub fn accepts_fixed(&self) -> bool {
        self.hardware_enabled() && self.svr & SVR_ENABLED != 0
    }

    /// The PIC's output has changed.
    pub fn set_lint0(&mut self, level: bool) {
        let rising = level && !self.lint0;
        self.lint0 = level;
        let entry = self.lvt[LINT0];
        if rising && self.hardware_enabled() && entry & LVT_MASKED == 0 {
            match DeliveryMode::from_bits(entry >> 8) {
                DeliveryMode::Fixed => {
                    self.accept_vector(entry as u8, false);
                }
                DeliveryMode::Nmi => self.latch_nmi(),
                _ => {}
            }
        }
    }

    /// Raise the timer interrupt if the timer has run out. True if it had.
    pub fn run_timer(&mut self, now: u64) -> bool {
        let expired = self.timer.expire(now);
        if expired && self.lvt[0] & LVT_MASKED == 0 {
            self.accept_vector(self.lvt[0] as u8, false);
        }
        expired
    }

    fn report(&mut self, error: u32) {
        let first = self.new_errors & error == 0;
        self.new_errors |= error;
        let entry = self.lvt[ERROR];
        // A bad vector in the error entry itself must not report itself for ever.
        if first && entry & LVT_MASKED == 0 {
            self.accept_vector(entry as u8, false);
        }
    }

    // ---- registers -----------------------------------------------------------------------------------------------

    fn x2apic_ldr(&self) -> u32 {
        // 12.12.10.2 "Deriving Logical x2APIC ID from the Local x2APIC ID".
        self.id >> 4 << 16 | 1 << (self.id & 15)
    }

    fn lvt_index(register: u8) -> Option<usize> {
        (r::LVT_TIMER..=r::LVT_ERROR).contains(&register).then(|| usize::from(register - r::LVT_TIMER))
    }

    /// Read a register; `now` in nanoseconds.
    pub fn read(&mut self, register: u8, now: u64) -> Result<u32, Illegal> {
        let x2apic = self.is_x2apic();
        Ok(match register {
            r::ID if x2apic => self.id,
            r::ID => self.id << 24,
            r::VERSION => VERSION,
            r::TPR => u32::from(self.tpr),
            r::PPR => u32::from(self.processor_priority()),
            r::APR | r::REMOTE_READ if !x2apic => 0,
            // Write-only, but old code reads it back after writing, and the page answers.
            r::EOI if !x2apic => 0,
            r::LDR if x2apic => self.x2apic_ldr(),
            r::LDR => self.ldr,
            r::DFR if !x2apic => self.dfr,
            r::SVR => self.svr,
            r::ISR..r::TMR => self.isr.word(register - r::ISR),
            r::TMR..r::IRR => self.tmr.word(register - r::TMR),
            r::IRR..r::ESR => self.irr.word(register - r::IRR),
            r::ESR => self.esr,
            r::ICR_LOW => self.icr as u32,
            r::ICR_HIGH if !x2apic => (self.icr >> 32) as u32,
            r::LVT_TIMER..=r::LVT_ERROR => self.lvt[usize::from(register - r::LVT_TIMER)],
            r::INITIAL_COUNT => self.timer.initial(),
            r::CURRENT_COUNT => self.timer.current(now),
            r::DIVIDE => self.timer.divide_register(),
            _ => return Err(self.illegal_register()),
        })
    }

    /// 12.5.3 "Error Handling": the page reports it in the ESR; an MSR access faults instead.
    fn illegal_register(&mut self) -> Illegal {
        if !self.is_x2apic() {
            self.report(ESR_REGISTER);
        }
        Illegal
    }

    /// Write a register of the xAPIC page, or an MSR of x2APIC mode but for the ICR.
    pub fn write(&mut self, register: u8, value: u32, now: u64) -> Result<Effect, Illegal> {
        let x2apic = self.is_x2apic();
        let allowed = |bits: u32| if x2apic && value & !bits != 0 { Err(Illegal) } else { Ok(()) };
        match register {
            r::TPR => {
                allowed(0xff)?;
                self.tpr = value as u8;
            }
            r::EOI => {
                allowed(0)?;
                return Ok(self.end_of_interrupt());
            }
            r::LDR if !x2apic => self.ldr = value & 0xff00_0000,
            r::DFR if !x2apic => self.dfr = value | 0x0fff_ffff,
            r::SVR => {
                allowed(0x13ff)?;
                self.svr = value & 0x13ff;
                if self.svr & SVR_ENABLED == 0 {
                    // 12.4.7.2: all LVT entries are masked, and stay so.
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            r::ESR => {
                allowed(0)?;
                self.esr = std::mem::take(&mut self.new_errors);
            }
            r::ICR_LOW if !x2apic => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & !(1 << 12));
                return Ok(self.send(self.icr));
            }
            r::ICR_HIGH if !x2apic => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            r::INITIAL_COUNT => self.timer.set_initial(value, now),
            r::DIVIDE => {
                allowed(0xb)?;
                self.timer.set_divide_register(value, now);
            }
            r::SELF_IPI if x2apic => {
                allowed(0xff)?;
                return Ok(self.send(u64::from(value & 0xff) | 1 << 18));
            }
            _ => {
                let Some((index, writable)) =
                    Self::lvt_index(register).and_then(|index| Some((index, *LVT_WRITABLE.get(index)?)))
                else {
                    return Err(self.illegal_register());
                };
                // Delivery status and remote IRR are read-only, and writing them back is allowed.
                allowed(writable | 1 << 12 | 1 << 14)?;
                let enabled = self.svr & SVR_ENABLED != 0;
                self.lvt[index] = value & writable | if enabled { 0 } else { LVT_MASKED };
                if index == 0 {
                    self.timer.set_mode(value >> 17, now);
                }
            }
        }
        Ok(Effect::None)
    }

    pub fn read_icr(&self) -> u64 {
        self.icr
    }

    /// The 64-bit ICR of x2APIC mode.
    pub fn write_icr(&mut self, value: u64) -> Result<Effect, Illegal> {
        if value & X2APIC_ICR_RESERVED != 0 {
            return Err(Illegal);
        }
        self.icr = value & !(1 << 12);
        Ok(self.send(self.icr))
    }

    fn send(&mut self, icr: u64) -> Effect {
        let low = icr as u32;
        let mode = DeliveryMode::from_bits(low >> 8);
        let vector = low as u8;
        let shorthand = match low >> 18 & 3 {
            0 => Shorthand::Destination,
            1 => Shorthand::Oneself,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        let fixed = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if fixed && vector < 16 {
            self.report(ESR_SEND_VECTOR);
            return Effect::None;
        }
        // INIT level de-assert only synchronized arbitration on old systems: 12.6.1, "INIT Level De-assert".
        let deassert = mode == DeliveryMode::Init && low & 1 << 14 == 0 && low & 1 << 15 != 0;
        if deassert || matches!(mode, DeliveryMode::ExtInt | DeliveryMode::Reserved) {
            return Effect::None;
        }
        let logical = low & 1 << 11 != 0;
        let destination = (icr >> 32) as u32;
        let destination = match (self.is_x2apic(), destination >> 24) {
            (true, _) => destination,
            (false, 0xff) => u32::MAX,
            (false, id) => id,
        };
        // An IPI is an edge, whatever the trigger bit says (12.6.1, "Trigger Mode").
        Effect::Send(Message { vector, mode, destination, logical, level: false }, shorthand)
    }

    /// Takes a message to oneself at once, and leaves any other effect to the caller.
    pub fn keep(&mut self, effect: Effect) -> Effect {
        let Effect::Send(message, shorthand) = effect else { return effect };
        let is_own = !message.logical && message.destination == self.id;
        if shorthand == Shorthand::Oneself || (shorthand == Shorthand::Destination && is_own) {
            self.accept(&message);
            return Effect::Kept;
        }
        effect
    }

    fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.clear(vector);
        if self.tmr.has(vector) && self.svr & SVR_NO_EOI_BROADCAST == 0 {
            Effect::EndOfLevel(vector)
        } else {
            Effect::None
        }
    }

    /// The task priority; CR8 is its bits 7:4, and a store to CR8 makes the others 0 (12.8.6 "Task Priority in IA-32e
    /// Mode").
    pub fn task_priority(&self) -> u8 {
        self.tpr
    }

    pub fn set_task_priority(&mut self, value: u8) {
        self.tpr = value;
    }

    // ---- IA32_APIC_BASE and IA32_TSC_DEADLINE --------------------------------------------------------------------

    pub fn base(&self) -> u64 {
        self.base
    }

    /// 12.12.5 "x2APIC State Transitions". Physical addresses have `bits` bits.
    pub fn set_base(&mut self, value: u64, bits: u32) -> Result<(), Illegal> {
        let reserved = !((1_u64 << bits.clamp(32, 52)) - 1) | 0xff | 1 << 9;
        let (enabled, x2apic) = (value & BASE_ENABLED != 0, value & BASE_X2APIC != 0);
        let legal = match (self.hardware_enabled(), self.is_x2apic()) {
            _ if value & reserved != 0 || x2apic && !enabled => false,
            // Disabled: x2APIC only by way of xAPIC.
            (false, _) => !x2apic,
            (true, false) => true,
            // Out of x2APIC only by way of disabled.
            (true, true) => x2apic || !enabled,
        };
        if !legal {
            return Err(Illegal);
        }
        let was_x2apic = self.is_x2apic();
        if !enabled {
            // 12.4.3: after it is enabled again it is as after reset.
            let hz = self.timer.hz();
            let kept = (self.lint0, self.nmis, self.init, self.startup, self.waits_for_startup, self.base);
            *self = State::new(self.id, hz);
            (self.lint0, self.nmis, self.init, self.startup, self.waits_for_startup, self.base) = kept;
        }
        self.base = value & !BASE_BSP | self.base & BASE_BSP;
        if self.is_x2apic() && !was_x2apic {
            // 12.12.5.1: the destination half of the ICR does not survive; the logical identifier is derived.
            self.icr &= 0xffff_ffff;
        }
        Ok(())
    }

    pub fn tsc_deadline(&self) -> u64 {
        if self.timer.mode() == TimerMode::TscDeadline { self.timer.deadline() } else { 0 }
    }
}
