//! The interrupt controllers as the buses see them.

use std::sync::Arc;

use super::Fabric;
use super::pic::PicPort;
use crate::bus::{AccessSize, MmioDevice, PortDevice};

/// A pair of PIC registers at adjacent ports.
pub struct PicPorts {
    pub fabric: Arc<Fabric>,
    pub registers: [PicPort; 2],
}

impl PortDevice for PicPorts {
    fn read(&mut self, offset: u16, _size: AccessSize) -> u32 {
        self.registers.get(usize::from(offset)).map_or(0xff, |port| u32::from(self.fabric.read_pic(*port)))
    }

    fn write(&mut self, offset: u16, _size: AccessSize, value: u32) {
        if let Some(port) = self.registers.get(usize::from(offset)) {
            self.fabric.write_pic(*port, value as u8);
        }
    }
}

/// The I/O APIC's page. Registers are whole 32-bit words; parts of one can be read.
pub struct IoApicPage(pub Arc<Fabric>);

impl MmioDevice for IoApicPage {
    fn read(&mut self, offset: u64, _size: AccessSize) -> u64 {
        u64::from(self.0.read_ioapic(offset & !3)) >> (8 * (offset & 3))
    }

    fn write(&mut self, offset: u64, _size: AccessSize, value: u64) {
        self.0.write_ioapic(offset, value as u32);
    }
}
