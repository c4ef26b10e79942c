//! Virtio without a bus: each device is a page of registers at an address that the guest is told, for small kernels that
//! have no PCI. Source: VIRTIO 1.2, 4.2 "Virtio Over MMIO"; sections below are of it.
//!
//! The guest is told by the DSDT (python/ringzero/machine/firmware/virtio_mmio.py) and by words of the kernel's command line.

use std::sync::Arc;

use host::lock::RankedMutex;
use memory::GuestMemory;
use x86::Gpa;

use super::device::Device;
pub use super::device::State;
use super::queue::MOST_ENTRIES;
use super::service::Gate;
use super::{Backend, status};
use crate::bus::{AccessSize, MmioDevice, shared};
use crate::irq::Fabric;
use crate::pci::interrupts::{InterruptState, Interrupts};

/// Where the devices' registers are, a page each; python/ringzero/machine/address_map.py tells the same.
pub const FIRST: Gpa = Gpa(0xd000_0000);
pub const PAGE: u64 = 0x1000;
pub const MOST_DEVICES: usize = 16;
/// The ISA lines that they share, by turns, as levels: those of the PCI bus, which has next to nothing then.
const LINES: [u8; 2] = crate::pci::LINES;

/// 4.2.2 "MMIO Device Register Layout": "virt", and the version that is not the legacy one.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x1af4;
/// From here on it is the device's own configuration.
const CONFIG: u64 = 0x100;

/// The registers of one device.
pub struct Registers {
    device: Device,
}

/// Device `number` of a machine.
#[must_use]
pub fn registers(
    number: usize,
    backend: Arc<dyn Backend>,
    memory: Arc<GuestMemory>,
    gate: Arc<Gate>,
    fabric: &Arc<Fabric>,
) -> Arc<RankedMutex<Registers>> {
    let line = fabric.line(LINES[number % LINES.len()]);
    // There are no messages: each event asserts the line until it is acknowledged.
    let interrupts = Interrupts::new(Arc::clone(fabric), line, 0);
    shared(Registers { device: Device::new(backend, memory, gate, interrupts) })
}

/// The place of a register in PCI's common configuration, and how wide it is there: the fields are the same.
fn place_in_common(at: u64) -> Option<(u64, AccessSize)> {
    use AccessSize::{Byte, Dword, Word};
    Some(match at {
        0x014 => (0x00, Dword),
        0x024 => (0x08, Dword),
        0x020 => (0x0c, Dword),
        0x070 => (0x14, Byte),
        0x030 => (0x16, Word),
        0x038 => (0x18, Word),
        0x044 => (0x1c, Word),
        0x080 | 0x084 => (at - 0x080 + 0x20, Dword),
        0x090 | 0x094 => (at - 0x090 + 0x28, Dword),
        0x0a0 | 0x0a4 => (at - 0x0a0 + 0x30, Dword),
        _ => return None,
    })
}

impl Registers {
    fn read_register(&mut self, at: u64) -> u32 {
        let device = &mut self.device;
        match at {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => u32::from(device.backend.device_type()),
            0x00c => VENDOR,
            // DeviceFeatures.
            0x010 => device.read_common(0x04),
            // QueueNumMax: 0 for a queue that is not there.
            0x034 if usize::from(device.state.queue_select) < device.state.queues.len() => u32::from(MOST_ENTRIES),
            // QueueReady.
            0x044 => device.read_common(0x1c) & 1,
            // InterruptStatus.
            0x060 => u32::from(device.interrupts.causes()),
            // Status.
            0x070 => device.read_common(0x14) & 0xff,
            // SHMLen, SHMBase: "a non-existent region has a length of -1" (4.2.2.1).
            0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => u32::MAX,
            // ConfigGeneration.
            0x0fc => u32::from(device.line.generation()),
            _ => 0,
        }
    }

    fn write_register(&mut self, at: u64, value: u32) {
        let device = &mut self.device;
        match at {
            // QueueReady: the driver takes back what it has not used yet.
            0x044 if value == 0 => {
                let (selected, is_on) = (device.state.queue_select, device.state.status & status::DRIVER_OK != 0);
                if let Some(queue) = device.state.queues.get_mut(usize::from(selected)).filter(|_| !is_on) {
                    queue.is_enabled = false;
                }
            }
            // QueueNotify.
            0x050 => {
                if let Ok(number) = u16::try_from(value) {
                    device.notify(number);
                }
            }
            // InterruptACK.
            0x064 => device.interrupts.acknowledge(value as u8),
            _ => {
                let Some((place, size)) = place_in_common(at) else { return };
                // A number that is none in a narrower register must not become one.
                if u64::from(value) <= size.mask() {
                    device.write_common(place, size, value);
                }
            }
        }
    }

    /// What a saved machine keeps.
    #[must_use]
    pub fn state(&self) -> (State, InterruptState) {
        (self.device.state(), self.device.interrupts.state())
    }

    pub fn restore(&mut self, (state, interrupts): &(State, InterruptState)) {
        self.device.restore(state);
        self.device.interrupts.restore(interrupts);
        self.device.interrupts.acknowledge(0);
    }

    /// The machine has ended: lets go of what others may want.
    pub fn end(&mut self) {
        self.device.end();
    }
}

/// 4.2.2.2: registers are read and written by aligned doublewords, the configuration as its fields are wide.
impl MmioDevice for Registers {
    fn read(&mut self, offset: u64, size: AccessSize) -> u64 {
        match offset.checked_sub(CONFIG) {
            Some(at) => self.device.read_config(at, size),
            None if size == AccessSize::Dword => u64::from(self.read_register(offset)),
            None => 0,
        }
    }

    fn write(&mut self, offset: u64, size: AccessSize, value: u64) {
        match offset.checked_sub(CONFIG) {
            Some(at) => self.device.write_config(at, size, value),
            None if size == AccessSize::Dword => self.write_register(offset, value as u32),
            None => {}
        }
    }
}
