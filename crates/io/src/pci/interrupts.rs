//! The interrupts of one function: MSI-X, and INTA# for guests that do not switch that on.
//! Source: PCI Local Bus Specification 3.0, 6.8.2 "MSI-X Capability and Table Structures"; 2.2.6 "Interrupt Pins".
//!
//! Any thread may raise them: a queue's own as well as a processor's that reads a register.

use std::sync::Arc;

use host::lock::{Rank, RankedMutex};

use crate::bus::AccessSize;
use crate::irq::message::Message;
use crate::irq::{Fabric, IrqLine};

/// Bytes of one entry of the table: address (two doublewords), data, vector control.
const ENTRY_BYTES: u64 = 16;
/// Vector control: the guest does not want this message for now.
const MASKED: u32 = 1;
/// Message control, 6.8.2.3.
pub const ENABLED: u16 = 1 << 15;
pub const ALL_MASKED: u16 = 1 << 14;

/// One row of the MSI-X table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub address: u64,
    pub data: u32,
    pub control: u32,
}

/// What a saved machine keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterruptState {
    pub table: Vec<Entry>,
    /// One bit a message that waits for its mask to go.
    pub pending: Vec<u64>,
    /// Why INTA# is asserted: bits of the device's own meaning.
    pub causes: u8,
}

pub struct Interrupts {
    fabric: Arc<Fabric>,
    pins: RankedMutex<Pins>,
}

struct Pins {
    table: Vec<Entry>,
    pending: Vec<u64>,
    control: u16,
    causes: u8,
    line: IrqLine,
    line_disabled: bool,
    /// The line is asserted.
    level: bool,
}

impl Interrupts {
    /// `vectors` rows in the table, and a source on the line of INTA#.
    #[must_use]
    pub fn new(fabric: Arc<Fabric>, line: IrqLine, vectors: u16) -> Arc<Self> {
        let vectors = usize::from(vectors);
        let pins = Pins {
            // Masked after reset, all of them.
            table: vec![Entry { address: 0, data: 0, control: MASKED }; vectors],
            pending: vec![0; vectors.div_ceil(64)],
            control: 0,
            causes: 0,
            line,
            line_disabled: false,
            level: false,
        };
        Arc::new(Interrupts { fabric, pins: RankedMutex::new(Rank::FunctionInterrupts, pins) })
    }

    /// Sends message `vector` if MSI-X is on; otherwise notes `causes` and asserts INTA#. A vector that is not in the table
    /// is none: the device has no message for this.
    pub fn raise(&self, vector: u16, causes: u8) {
        let mut pins = self.pins.lock();
        pins.causes |= causes;
        if pins.control & ENABLED == 0 {
            pins.follow_line();
        } else {
            pins.send(usize::from(vector), &self.fabric);
        }
    }

    /// Why INTA# is asserted; it is not any more.
    #[must_use]
    pub fn take_causes(&self) -> u8 {
        let mut pins = self.pins.lock();
        let causes = std::mem::take(&mut pins.causes);
        pins.follow_line();
        causes
    }

    /// Why INTA# is asserted.
    #[must_use]
    pub fn causes(&self) -> u8 {
        self.pins.lock().causes
    }

    /// The guest has seen these causes.
    pub fn acknowledge(&self, causes: u8) {
        let mut pins = self.pins.lock();
        pins.causes &= !causes;
        pins.follow_line();
    }

    /// What the status register tells: INTA# would be asserted but for the disable bit.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        let pins = self.pins.lock();
        pins.causes != 0 && pins.control & ENABLED == 0
    }

    /// The guest has written the command register or MSI-X's message control.
    pub fn set_control(&self, msix: u16, line_disabled: bool) {
        let mut pins = self.pins.lock();
        pins.control = msix;
        pins.line_disabled = line_disabled;
        pins.follow_line();
        for vector in 0..pins.table.len() {
            pins.send_pending(vector, &self.fabric);
        }
    }

    /// Reads the table, by doublewords or quadwords.
    #[must_use]
    pub fn read_table(&self, offset: u64, size: AccessSize) -> u64 {
        let pins = self.pins.lock();
        let dword = |at: u64| {
            let entry = pins.table.get((at / ENTRY_BYTES) as usize).map_or([0; 4], Entry::words);
            u64::from(entry[(at / 4 % 4) as usize])
        };
        let low = dword(offset) >> (8 * (offset & 3));
        if size == AccessSize::Qword { low | dword(offset.wrapping_add(4)) << 32 } else { low }
    }

    /// Writes the table. "Software must use aligned DWORD or aligned QWORD": other accesses are undefined, and ignored.
    pub fn write_table(&self, offset: u64, size: AccessSize, value: u64) {
        let mut pins = self.pins.lock();
        match size {
            AccessSize::Dword if offset.is_multiple_of(4) => pins.write_word(offset, value as u32, &self.fabric),
            AccessSize::Qword if offset.is_multiple_of(8) => {
                pins.write_word(offset, value as u32, &self.fabric);
                pins.write_word(offset + 4, (value >> 32) as u32, &self.fabric);
            }
            _ => {}
        }
    }

    #[must_use]
    pub fn read_pending(&self, offset: u64, size: AccessSize) -> u64 {
        let pins = self.pins.lock();
        let word = pins.pending.get((offset / 8) as usize).copied().unwrap_or(0);
        (word >> (8 * (offset & 7))) & size.mask()
    }

    #[must_use]
    pub fn state(&self) -> InterruptState {
        let pins = self.pins.lock();
        InterruptState { table: pins.table.clone(), pending: pins.pending.clone(), causes: pins.causes }
    }

    /// Takes over a state; [`Interrupts::set_control`] follows, with what the configuration space says.
    pub fn restore(&self, state: &InterruptState) {
        let mut pins = self.pins.lock();
        let pins = &mut *pins;
        pins.table.iter_mut().zip(&state.table).for_each(|(entry, saved)| *entry = *saved);
        pins.pending.iter_mut().zip(&state.pending).for_each(|(word, saved)| *word = *saved);
        pins.causes = state.causes;
    }
}

impl Entry {
    fn words(&self) -> [u32; 4] {
        [self.address as u32, (self.address >> 32) as u32, self.data, self.control]
    }
}

impl Pins {
    fn follow_line(&mut self) {
        let level = self.causes != 0 && !self.line_disabled && self.control & ENABLED == 0;
        if level != self.level {
            self.level = level;
            self.line.set(level);
        }
    }

    fn is_masked(&self, vector: usize) -> bool {
        self.control & ALL_MASKED != 0 || self.table.get(vector).is_none_or(|entry| entry.control & MASKED != 0)
    }

    fn send(&mut self, vector: usize, fabric: &Fabric) {
        let Some(entry) = self.table.get(vector).copied() else { return };
        if self.is_masked(vector) {
            self.pending[vector / 64] |= 1 << (vector % 64);
        } else if let Some(message) = Message::signalled(entry.address, entry.data) {
            fabric.send(&message);
        }
    }

    fn send_pending(&mut self, vector: usize, fabric: &Fabric) {
        let bit = 1 << (vector % 64);
        if self.control & ENABLED != 0 && self.pending[vector / 64] & bit != 0 && !self.is_masked(vector) {
            self.pending[vector / 64] &= !bit;
            self.send(vector, fabric);
        }
    }

    fn write_word(&mut self, offset: u64, value: u32, fabric: &Fabric) {
        let vector = (offset / ENTRY_BYTES) as usize;
        let Some(entry) = self.table.get_mut(vector) else { return };
        match offset % ENTRY_BYTES {
            0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
            4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
            8 => entry.data = value,
            _ => {
                entry.control = value & MASKED;
                self.send_pending(vector, fabric);
            }
        }
    }
}
