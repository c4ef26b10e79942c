//! The two 8259A interrupt controllers of a PC, the second cascaded to line 2 of the first.
//! Source: Intel 8259A data sheet (order number 231468-003); edge/level registers: Intel PIIX3 (82371SB) 3.2.6.
//!
//! One deliberate difference: a request seen as an edge stays latched when its line falls before the acknowledgement,
//! where the data sheet would answer with a spurious IR7. The chipsets since then latch it, and nothing is lost.

/// Level-triggered operation is not possible for the timer, the keyboard, the cascade, the clock and the FPU.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];
const CASCADE: u8 = 1 << 2;

/// Which initialization command word the chip waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Await {
    Nothing,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Debug)]
struct Chip {
    /// Interrupt request, mask and in-service registers.
    irr: u8,
    imr: u8,
    isr: u8,
    /// The lines as they stand.
    levels: u8,
    /// Lines that are level-triggered.
    elcr: u8,
    elcr_writable: u8,
    vector_base: u8,
    /// The line with the highest priority.
    first: u8,
    awaits: Await,
    single: bool,
    icw4_needed: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_isr: bool,
    polled: bool,
}

impl Chip {
    fn new(elcr_writable: u8) -> Self {
        Chip {
            irr: 0,
            imr: 0,
            isr: 0,
            levels: 0,
            elcr: 0,
            elcr_writable,
            vector_base: 0,
            first: 0,
            awaits: Await::Nothing,
            single: false,
            icw4_needed: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            read_isr: false,
            polled: false,
        }
    }

    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << (line & 7);
        let rising = level && self.levels & bit == 0;
        self.levels = if level { self.levels | bit } else { self.levels & !bit };
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.levels & bit;
        } else if rising {
            self.irr |= bit;
        }
    }

    /// The place of the first of `lines` in the order of priority; 8 if there is none.
    fn priority(&self, lines: u8) -> u32 {
        lines.rotate_right(u32::from(self.first)).trailing_zeros()
    }

    /// The line whose request would interrupt what is in service.
    fn requested(&self) -> Option<u8> {
        let request = self.priority(self.irr & !self.imr);
        // Special mask mode: a masked line in service does not hold back the ones below it (data sheet, "Special Mask
        // Mode"). Special fully nested mode: the slave may interrupt itself with a better request.
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested {
            in_service &= !CASCADE;
        }
        (request < self.priority(in_service)).then_some((request as u8).wrapping_add(self.first) & 7)
    }

    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (line + 1) & 7;
        }
    }

    fn end_of_interrupt(&mut self, command: u8) {
        let rotate = command & 0x80 != 0;
        let line = if command & 0x40 != 0 {
            command & 7
        } else {
            // The non-specific EOI ends the best line in service; one that special mask mode hides is not ended by it.
            let in_service = if self.special_mask { self.isr & !self.imr } else { self.isr };
            let place = self.priority(in_service);
            if place == 8 {
                return;
            }
            (place as u8).wrapping_add(self.first) & 7
        };
        self.isr &= !(1 << line);
        if rotate {
            self.first = (line + 1) & 7;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1 clears all but the lines themselves; edges must rise again to be seen.
            let (levels, elcr, elcr_writable) = (self.levels, self.elcr, self.elcr_writable);
            *self = Chip { levels, elcr, irr: levels & elcr, awaits: Await::Icw2, ..Chip::new(elcr_writable) };
            self.single = value & 2 != 0;
            self.icw4_needed = value & 1 != 0;
        } else if value & 8 != 0 {
            // OCW3.
            self.polled = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            // OCW2.
            match value >> 5 {
                0 => self.rotate_on_auto_eoi = false,
                4 => self.rotate_on_auto_eoi = true,
                1 | 3 | 5 | 7 => self.end_of_interrupt(value),
                6 => self.first = (value + 1) & 7,
                _ => {}
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        self.awaits = match self.awaits {
            Await::Nothing => {
                self.imr = value;
                Await::Nothing
            }
            Await::Icw2 => {
                self.vector_base = value & 0xf8;
                match (self.single, self.icw4_needed) {
                    (false, _) => Await::Icw3,
                    (true, true) => Await::Icw4,
                    (true, false) => Await::Nothing,
                }
            }
            // How the chips are wired is not the guest's to choose.
            Await::Icw3 if self.icw4_needed => Await::Icw4,
            Await::Icw3 => Await::Nothing,
            Await::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                Await::Nothing
            }
        };
    }

    fn read_command(&self) -> u8 {
        if self.read_isr { self.isr } else { self.irr }
    }

    fn set_elcr(&mut self, value: u8) {
        self.elcr = value & self.elcr_writable;
        self.irr = self.irr & !self.elcr | self.levels & self.elcr;
    }
}

/// Both chips. Lines 0 to 7 are the master's, 8 to 15 the slave's.
#[derive(Clone, Debug)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

/// One of the registers that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PicPort {
    MasterCommand,
    MasterData,
    SlaveCommand,
    SlaveData,
    MasterElcr,
    SlaveElcr,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    #[must_use]
    pub fn new() -> Self {
        Pic { master: Chip::new(ELCR_WRITABLE[0]), slave: Chip::new(ELCR_WRITABLE[1]) }
    }

    /// Drive one of the 16 lines. Line 2 is the cascade and cannot be driven.
    pub fn set_line(&mut self, line: u8, level: bool) {
        match line {
            0..8 if line != 2 => self.master.set_line(line, level),
            8..16 => self.slave.set_line(line - 8, level),
            _ => {}
        }
        self.cascade();
    }

    /// The slave's output is the master's line 2. It is followed as a level, so that a second request of the slave is
    /// seen when the first is done.
    fn cascade(&mut self) {
        let request = self.slave.requested().is_some();
        self.master.irr = if request { self.master.irr | CASCADE } else { self.master.irr & !CASCADE };
    }

    /// Whether the INTR output is high.
    #[must_use]
    pub fn output(&self) -> bool {
        self.master.requested().is_some()
    }

    /// The processor's acknowledge cycle: returns the vector, a spurious one (line 7 of the chip) if no request is left.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.requested() {
            None => self.master.vector_base | 7,
            Some(2) => {
                self.master.acknowledge(2);
                match self.slave.requested() {
                    None => self.slave.vector_base | 7,
                    Some(line) => {
                        self.slave.acknowledge(line);
                        self.slave.vector_base | line
                    }
                }
            }
            Some(line) => {
                self.master.acknowledge(line);
                self.master.vector_base | line
            }
        };
        self.cascade();
        vector
    }

    /// A read after a poll command is an acknowledge cycle: bit 7 says whether there was a request.
    fn poll(chip: &mut Chip) -> u8 {
        chip.polled = false;
        match chip.requested() {
            None => 0,
            Some(line) => {
                chip.acknowledge(line);
                0x80 | line
            }
        }
    }

    pub fn read(&mut self, port: PicPort) -> u8 {
        let value = match port {
            PicPort::MasterElcr => self.master.elcr,
            PicPort::SlaveElcr => self.slave.elcr,
            PicPort::MasterCommand | PicPort::MasterData if self.master.polled => Self::poll(&mut self.master),
            PicPort::SlaveCommand | PicPort::SlaveData if self.slave.polled => Self::poll(&mut self.slave),
            PicPort::MasterCommand => self.master.read_command(),
            PicPort::SlaveCommand => self.slave.read_command(),
            PicPort::MasterData => self.master.imr,
            PicPort::SlaveData => self.slave.imr,
        };
        self.cascade();
        value
    }

    pub fn write(&mut self, port: PicPort, value: u8) {
        match port {
            PicPort::MasterCommand => self.master.write_command(value),
            PicPort::SlaveCommand => self.slave.write_command(value),
            PicPort::MasterData => self.master.write_data(value),
            PicPort::SlaveData => self.slave.write_data(value),
            PicPort::MasterElcr => self.master.set_elcr(value),
            PicPort::SlaveElcr => self.slave.set_elcr(value),
        }
        self.cascade();
    }
}

#[cfg(test)]
mod tests {
    use super::PicPort::*;
    use super::*;

    /// As Linux does in init_8259A: vectors 0x30 and 0x38, all but the cascade masked afterwards by `mask`.
    fn linux(auto_eoi: bool) -> Pic {
        let mut pic = Pic::new();
        let icw4 = if auto_eoi { 3 } else { 1 };
        for (port, value) in [
            (MasterData, 0xff),
            (MasterCommand, 0x11),
            (MasterData, 0x30),
            (MasterData, 4),
            (MasterData, icw4),
            (SlaveCommand, 0x11),
            (SlaveData, 0x38),
            (SlaveData, 2),
            (SlaveData, icw4),
            (MasterData, 0),
            (SlaveData, 0),
        ] {
            pic.write(port, value);
        }
        pic
    }

    #[test]
    fn linux_probes_the_mask_register() {
        let mut pic = Pic::new();
        pic.write(SlaveData, 0xff);
        pic.write(MasterData, 0xfb);
        assert_eq!(pic.read(MasterData), 0xfb);
    }

    #[test]
    fn an_edge_is_served_once() {
        let mut pic = linux(false);
        pic.set_line(4, true);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x34);
        assert!(!pic.output());
        pic.write(MasterCommand, 0x64);
        assert!(!pic.output(), "the line is still high, but it did not rise again");
        pic.set_line(4, false);
        pic.set_line(4, true);
        assert!(pic.output());
    }

    #[test]
    fn a_level_is_served_until_it_falls() {
        let mut pic = linux(false);
        pic.write(SlaveElcr, 0xff);
        assert_eq!(pic.read(SlaveElcr), 0xde, "lines 8 and 13 are always edges");
        pic.set_line(9, true);
        assert_eq!(pic.acknowledge(), 0x39);
        pic.write(SlaveCommand, 0x61);
        pic.write(MasterCommand, 0x62);
        assert!(pic.output(), "still high");
        pic.set_line(9, false);
        assert!(!pic.output());
    }

    #[test]
    fn priorities_nest() {
        let mut pic = linux(false);
        pic.set_line(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.set_line(5, true);
        assert!(!pic.output(), "below what is in service");
        pic.set_line(8, true);
        assert_eq!(pic.acknowledge(), 0x38, "the cascade is line 2, above 4");
        pic.write(MasterCommand, 0x0b);
        assert_eq!(pic.read(MasterCommand), 0x14, "in service: 2 and 4");
        pic.write(SlaveCommand, 0x20);
        pic.write(MasterCommand, 0x20);
        assert_eq!(pic.read(MasterCommand), 0x10, "the non-specific EOI ended the best one");
        pic.write(MasterCommand, 0x20);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn masked_lines_wait() {
        let mut pic = linux(false);
        pic.write(MasterData, 0x10);
        pic.set_line(4, true);
        assert!(!pic.output());
        pic.write(MasterCommand, 0x0a);
        assert_eq!(pic.read(MasterCommand), 0x10);
        pic.write(MasterData, 0);
        assert!(pic.output());
    }

    #[test]
    fn acknowledging_nothing_is_spurious() {
        let mut pic = linux(false);
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(MasterCommand, 0x0b);
        assert_eq!(pic.read(MasterCommand), 0, "a spurious interrupt is not in service");
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let mut pic = linux(true);
        pic.set_line(0, true);
        assert_eq!(pic.acknowledge(), 0x30);
        pic.set_line(1, true);
        assert_eq!(pic.acknowledge(), 0x31);
        pic.write(MasterCommand, 0x80);
        pic.set_line(3, true);
        assert_eq!(pic.acknowledge(), 0x33);
        // Rotated: 4 is now the best line, 3 the last.
        pic.set_line(0, false);
        pic.set_line(0, true);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = linux(false);
        pic.set_line(6, true);
        pic.write(MasterCommand, 0x0c);
        assert_eq!(pic.read(MasterCommand), 0x86);
        pic.write(MasterCommand, 0x0f);
        assert_eq!(pic.read(MasterCommand), 0, "nothing more");
        assert_eq!(pic.read(MasterCommand), 0x40, "6 is in service");
    }

    #[test]
    fn special_mask_mode_lets_lower_lines_through() {
        let mut pic = linux(false);
        pic.set_line(3, true);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.set_line(5, true);
        assert!(!pic.output());
        pic.write(MasterData, 0x08);
        pic.write(MasterCommand, 0x68);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(MasterCommand, 0x48);
        pic.write(MasterCommand, 0x63);
        pic.write(MasterCommand, 0x0b);
        assert_eq!(pic.read(MasterCommand), 0x20);
    }

    #[test]
    fn priority_can_be_set() {
        let mut pic = linux(false);
        pic.write(MasterCommand, 0xc0 | 4);
        pic.set_line(0, true);
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(MasterCommand, 0xa0);
        assert_eq!(pic.acknowledge(), 0x30, "5 rotated to the end");
    }

    #[test]
    fn initialization_forgets_edges_but_not_levels() {
        let mut pic = linux(false);
        pic.write(MasterElcr, 0xff);
        assert_eq!(pic.read(MasterElcr), 0xf8);
        pic.set_line(0, true);
        pic.set_line(5, true);
        pic.write(MasterCommand, 0x11);
        pic.write(MasterData, 0x20);
        pic.write(MasterData, 4);
        pic.write(MasterData, 1);
        assert_eq!(pic.acknowledge(), 0x25);
    }
}
