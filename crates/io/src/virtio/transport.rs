//! Virtio over PCI: the registers by which a driver finds a device, agrees with it on features, places its queues and
//! notifies it. Source: VIRTIO 1.2, 4.1 "Virtio Over PCI Bus"; sections below are of it.
//!
//! BAR 0 has a page for each structure: common configuration, ISR status, device configuration, notifications, the MSI-X
//! table and its pending bits.

use std::sync::Arc;

use memory::GuestMemory;

use super::Backend;
use super::device::Device;
pub use super::device::{QueueState, State};
use super::service::Gate;
use crate::bus::AccessSize;
use crate::pci::config::{Config, Identity};
use crate::pci::{Card, Function, FunctionState, MsixPlace, Slot};

/// 4.1.2 "PCI Device Discovery".
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;

const BAR: usize = 0;
const BAR_BYTES: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const NOTIFY: u64 = 3 * PAGE;
const MSIX_TABLE: u64 = 4 * PAGE;
const MSIX_PENDING: u64 = 5 * PAGE;
/// Bytes between the doorbells of two queues.
const NOTIFY_STEP: u32 = 4;

/// 4.1.4 "Virtio Structure PCI Capabilities".
const VENDOR_CAPABILITY: u8 = 0x09;
const COMMON_TYPE: u8 = 1;
const NOTIFY_TYPE: u8 = 2;
const ISR_TYPE: u8 = 3;
const DEVICE_TYPE: u8 = 4;
const PCI_TYPE: u8 = 5;

/// The device's side of the transport.
pub struct Transport {
    device: Device,
    /// Where in the configuration space the window to the BAR is.
    window: Option<u8>,
}

/// A card with this device, for a slot of the bus.
#[must_use]
pub fn card(backend: Arc<dyn Backend>, memory: Arc<GuestMemory>, gate: Arc<Gate>, slot: &Slot) -> Card {
    let mut config = Config::new(Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + backend.device_type(),
        // 4.1.2.1: one at least.
        revision: 1,
        class: backend.pci_class(),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    });
    config.add_memory_bar(BAR, BAR_BYTES, slot.window);
    config.set_interrupt(slot.line);
    let capability = |config: &mut Config, kind: u8, offset: u64, length: u32, more: &[u8], writable: &[u8]| {
        // From the third byte on: length, type, BAR, identifier, padding, offset, length.
        let mut body = vec![16 + more.len() as u8, kind, BAR as u8, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(more);
        config.add_capability(VENDOR_CAPABILITY, &body, writable)
    };
    let queues = backend.queues();
    capability(&mut config, COMMON_TYPE, COMMON, 60, &[], &[]);
    capability(&mut config, ISR_TYPE, ISR, 1, &[], &[]);
    if !backend.config().is_empty() {
        capability(&mut config, DEVICE_TYPE, DEVICE, backend.config().len() as u32, &[], &[]);
    }
    let step = NOTIFY_STEP.to_le_bytes();
    capability(&mut config, NOTIFY_TYPE, NOTIFY, NOTIFY_STEP * u32::from(queues), &step, &[]);
    // 4.1.4.9: the BAR, offset and length are the driver's to choose, and the data.
    let writable = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let window = capability(&mut config, PCI_TYPE, 0, 0, &[0; 4], &writable);
    // One message for each queue, and one for changes of the configuration.
    let msix = MsixPlace { bar: BAR, table: MSIX_TABLE, pending: MSIX_PENDING, vectors: queues + 1 };
    let interrupts = slot.interrupts(msix.vectors);
    let device = Device::new(backend, memory, gate, Arc::clone(&interrupts));
    let transport = Transport { device, window };
    Card::new(config, interrupts, Some(msix), Box::new(transport))
}

impl Transport {
    /// 4.1.4.9 "PCI configuration access capability": where in the BAR the window looks, and how wide.
    fn window_target(&self, config: &Config, at: u8) -> Option<(u64, AccessSize)> {
        let window = self.window.filter(|window| at == window + 16)?;
        let field = |offset: u8, size| config.read(window + offset, size);
        let offset = u64::from(field(8, AccessSize::Dword));
        let size = AccessSize::from_bytes(field(12, AccessSize::Dword) as usize)?;
        let fits = size != AccessSize::Qword && offset.is_multiple_of(size.bytes() as u64);
        (field(4, AccessSize::Byte) == BAR as u32 && fits).then_some((offset, size))
    }
}

impl Function for Transport {
    fn read(&mut self, _bar: usize, offset: u64, size: AccessSize) -> u64 {
        let at = offset % PAGE;
        match offset - at {
            COMMON => {
                let low = u64::from(self.device.read_common(at & !3)) >> (8 * (at & 3));
                if size == AccessSize::Qword { low | u64::from(self.device.read_common(at + 4)) << 32 } else { low }
            }
            ISR if at == 0 => u64::from(self.device.interrupts.take_causes()),
            DEVICE => self.device.read_config(at, size),
            _ => 0,
        }
    }

    fn write(&mut self, _bar: usize, offset: u64, size: AccessSize, value: u64) {
        let at = offset % PAGE;
        match offset - at {
            COMMON if size == AccessSize::Qword => {
                self.device.write_common(at, AccessSize::Dword, value as u32);
                self.device.write_common(at + 4, AccessSize::Dword, (value >> 32) as u32);
            }
            COMMON => self.device.write_common(at, size, value as u32),
            DEVICE => self.device.write_config(at, size, value),
            NOTIFY => {
                if let Ok(number) = u16::try_from(at / u64::from(NOTIFY_STEP)) {
                    self.device.notify(number);
                }
            }
            _ => {}
        }
    }

    fn read_config(&mut self, config: &Config, at: u8, _size: AccessSize) -> Option<u32> {
        let (offset, size) = self.window_target(config, at)?;
        Some(Function::read(self, BAR, offset, size) as u32)
    }

    fn config_written(&mut self, config: &Config, at: u8, _size: AccessSize, value: u32) {
        if let Some((offset, size)) = self.window_target(config, at) {
            Function::write(self, BAR, offset, size, u64::from(value) & size.mask());
        }
    }

    fn state(&self) -> FunctionState {
        FunctionState::Virtio(self.device.state())
    }

    fn end(&mut self) {
        self.device.end();
    }

    fn restore(&mut self, state: &FunctionState) {
        if let FunctionState::Virtio(saved) = state {
            self.device.restore(saved);
        }
    }
}
