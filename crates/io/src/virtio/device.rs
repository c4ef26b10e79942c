//! A device as its driver sets it up, whatever the transport: status, features, queues, and the threads that serve them.
//! Source: VIRTIO 1.2, 2.1 "Device Status Field", 3.1 "Device Initialization".

use std::sync::Arc;

use memory::GuestMemory;
use x86::Gpa;

use super::line::Line;
use super::queue::{Broken, MOST_ENTRIES, Place, Progress, Queue, Rules};
use super::service::{Gate, Service, Work};
use super::{Backend, BackendState, feature, status};
use crate::bus::AccessSize;
use crate::pci::interrupts::Interrupts;

/// No message is chosen.
pub const NO_VECTOR: u16 = 0xffff;

/// One queue as the driver has set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    pub place: Place,
    pub vector: u16,
    pub is_enabled: bool,
    pub progress: Progress,
}

/// What a saved machine keeps of a device: all that is not in the guest's memory or in the back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub status: u8,
    pub driver_features: u64,
    pub feature_select: [u32; 2],
    pub queue_select: u16,
    pub config_vector: u16,
    pub queues: Vec<QueueState>,
    pub backend: BackendState,
}

pub(super) struct Device {
    pub backend: Arc<dyn Backend>,
    memory: Arc<GuestMemory>,
    gate: Arc<Gate>,
    pub interrupts: Arc<Interrupts>,
    pub line: Arc<Line>,
    pub state: State,
    /// While the driver is on.
    service: Option<Service>,
    /// After a reset, until its last request is done.
    ending: Option<Service>,
}

fn fresh_state(queues: u16) -> State {
    let place = Place { entries: MOST_ENTRIES, ..Place::default() };
    let queue = QueueState { place, vector: NO_VECTOR, is_enabled: false, progress: Progress::default() };
    State {
        status: 0,
        driver_features: 0,
        feature_select: [0; 2],
        queue_select: 0,
        config_vector: NO_VECTOR,
        queues: vec![queue; usize::from(queues)],
        backend: BackendState::Plain,
    }
}

impl Device {
    pub fn new(
        backend: Arc<dyn Backend>,
        memory: Arc<GuestMemory>,
        gate: Arc<Gate>,
        interrupts: Arc<Interrupts>,
    ) -> Device {
        let line = Arc::default();
        backend.connect(&line);
        let state = fresh_state(backend.queues());
        Device { backend, memory, gate, interrupts, line, state, service: None, ending: None }
    }

    fn offered(&self) -> u64 {
        feature::VERSION_1 | feature::INDIRECT_DESCRIPTORS | feature::EVENT_INDEX | self.backend.features()
    }

    fn queue(&mut self) -> Option<&mut QueueState> {
        self.state.queues.get_mut(usize::from(self.state.queue_select))
    }

    /// 2.1: a reset is over when the status reads 0, and then no request is under way any more.
    fn status(&mut self) -> u8 {
        if self.ending.as_ref().is_some_and(|service| !service.has_stopped()) {
            return status::DRIVER_OK | status::FEATURES_OK;
        }
        self.ending = None;
        if self.service.as_ref().is_some_and(Service::is_broken) {
            self.state.status |= status::NEEDS_RESET;
        }
        self.state.status
    }

    fn set_status(&mut self, value: u8) {
        let now = self.status();
        if value == 0 {
            self.reset();
            return;
        }
        if self.ending.is_some() {
            // The driver does not wait for its reset to be over (2.1.1): nothing can begin meanwhile.
            return;
        }
        // 2.1.1: a driver sets bits and clears none; the device alone says that it needs a reset.
        let mut new = now | value & !status::NEEDS_RESET;
        if new & !now & status::FEATURES_OK != 0 && !self.agrees() {
            new &= !status::FEATURES_OK;
        }
        self.state.status = new;
        if new & !now & status::DRIVER_OK != 0 && new & status::FEATURES_OK != 0 {
            self.start();
        }
    }

    /// 3.1.1, 6.1: nothing that was not offered, and this version of virtio.
    fn agrees(&self) -> bool {
        let chosen = self.state.driver_features;
        chosen & !self.offered() == 0 && chosen & feature::VERSION_1 != 0
    }

    fn reset(&mut self) {
        self.state = fresh_state(self.backend.queues());
        let _ = self.interrupts.take_causes();
        self.line.clear();
        if let Some(service) = self.service.take() {
            service.stop();
            self.ending = Some(service);
        }
        self.backend.reset();
    }

    /// Starts the threads of the enabled queues.
    fn start(&mut self) {
        let features = self.state.driver_features;
        let rules = Rules {
            indirect: features & feature::INDIRECT_DESCRIPTORS != 0,
            event_index: features & feature::EVENT_INDEX != 0,
        };
        let enabled = self.state.queues.iter().enumerate().filter(|(_, queue)| queue.is_enabled);
        let queues: Result<Vec<_>, _> = enabled
            .map(|(number, queue)| {
                let made = Queue::new(&self.memory, queue.place, rules, queue.progress)?;
                Ok::<_, Broken>((number as u16, queue.vector, made))
            })
            .collect();
        let work = Work {
            backend: Arc::clone(&self.backend),
            memory: Arc::clone(&self.memory),
            gate: Arc::clone(&self.gate),
            interrupts: Arc::clone(&self.interrupts),
            line: Arc::clone(&self.line),
            features,
            config_vector: self.state.config_vector,
        };
        match queues.ok().and_then(|queues| Service::start(work, queues).ok()) {
            Some(service) => self.service = Some(service),
            None => self.state.status |= status::NEEDS_RESET,
        }
    }

    pub fn read_config(&self, at: u64, size: AccessSize) -> u64 {
        let mut value = [0; 8];
        let config = self.backend.config();
        for (byte, place) in value.iter_mut().zip(at..).take(size.bytes()) {
            *byte = usize::try_from(place).ok().and_then(|place| config.get(place)).copied().unwrap_or(0);
        }
        u64::from_le_bytes(value)
    }

    pub fn write_config(&self, at: u64, size: AccessSize, value: u64) {
        self.backend.write_config(at, &value.to_le_bytes()[..size.bytes()]);
    }

    /// The driver says that there is something in a queue.
    pub fn notify(&self, number: u16) {
        if let Some(service) = &self.service {
            service.notify(number);
        }
    }

    /// The fields of a device by their places in 4.1.4.3 "Common configuration structure layout", by doublewords: each of
    /// the guest's accesses is a part of one. Other transports have the same fields elsewhere.
    pub fn read_common(&mut self, at: u64) -> u32 {
        let queues = self.state.queues.len() as u32;
        let selected = u32::from(self.state.queue_select);
        let status = if at == 0x14 { u32::from(self.status()) } else { 0 };
        let [feature_select, driver_select] = self.state.feature_select;
        let offered = self.offered();
        let driver_features = self.state.driver_features;
        let config_vector = u32::from(self.state.config_vector);
        let queue = self.queue().copied();
        let of_queue =
            |value: &dyn Fn(QueueState) -> u64, shift: u32| queue.map_or(0, |queue| value(queue) >> shift) as u32;
        match at {
            0x00 => feature_select,
            0x04 => half(offered, feature_select),
            0x08 => driver_select,
            0x0c => half(driver_features, driver_select),
            0x10 => config_vector | queues << 16,
            0x14 => status | u32::from(self.line.generation()) << 8 | selected << 16,
            0x18 => queue.map_or(0, |queue| u32::from(queue.place.entries) | u32::from(queue.vector) << 16),
            // The doorbell of a queue has the queue's number.
            0x1c => queue.map_or(0, |queue| u32::from(queue.is_enabled) | selected << 16),
            0x20 => of_queue(&|queue| queue.place.descriptors.0, 0),
            0x24 => of_queue(&|queue| queue.place.descriptors.0, 32),
            0x28 => of_queue(&|queue| queue.place.driver.0, 0),
            0x2c => of_queue(&|queue| queue.place.driver.0, 32),
            0x30 => of_queue(&|queue| queue.place.device.0, 0),
            0x34 => of_queue(&|queue| queue.place.device.0, 32),
            _ => 0,
        }
    }

    /// Writes one field. 4.1.3.1: a driver uses accesses as wide as the field, or halves of a 64-bit one.
    pub fn write_common(&mut self, at: u64, size: AccessSize, value: u32) {
        let is_set_up = self.state.status & status::FEATURES_OK != 0;
        let vectors = self.backend.queues() + 1;
        let vector = if value as u16 >= vectors { NO_VECTOR } else { value as u16 };
        match (at, size) {
            (0x00, AccessSize::Dword) => self.state.feature_select[0] = value,
            (0x08, AccessSize::Dword) => self.state.feature_select[1] = value,
            (0x0c, AccessSize::Dword) if !is_set_up && self.state.feature_select[1] < 2 => {
                let shift = 32 * self.state.feature_select[1];
                let kept = self.state.driver_features & !(0xffff_ffff << shift);
                self.state.driver_features = kept | u64::from(value) << shift;
            }
            (0x10, AccessSize::Word) => self.state.config_vector = vector,
            (0x14, AccessSize::Byte) => self.set_status(value as u8),
            (0x16, AccessSize::Word) => self.state.queue_select = value as u16,
            (0x1a, AccessSize::Word) => {
                let number = self.state.queue_select;
                if let Some(queue) = self.queue() {
                    queue.vector = vector;
                }
                if let Some(service) = &self.service {
                    service.set_vector(number, vector);
                }
            }
            _ => self.write_queue(at, size, value),
        }
    }

    /// Fields of the selected queue that stand still once it is enabled.
    fn write_queue(&mut self, at: u64, size: AccessSize, value: u32) {
        let is_on = self.state.status & status::DRIVER_OK != 0;
        let Some(queue) = self.queue().filter(|queue| !queue.is_enabled && !is_on) else { return };
        let value16 = value as u16;
        match (at, size) {
            (0x18, AccessSize::Word) if value16.is_power_of_two() && value16 <= MOST_ENTRIES => {
                queue.place.entries = value16;
            }
            (0x1c, AccessSize::Word) if value == 1 => queue.is_enabled = true,
            (0x20, AccessSize::Dword) => set_half(&mut queue.place.descriptors, 0, value),
            (0x24, AccessSize::Dword) => set_half(&mut queue.place.descriptors, 32, value),
            (0x28, AccessSize::Dword) => set_half(&mut queue.place.driver, 0, value),
            (0x2c, AccessSize::Dword) => set_half(&mut queue.place.driver, 32, value),
            (0x30, AccessSize::Dword) => set_half(&mut queue.place.device, 0, value),
            (0x34, AccessSize::Dword) => set_half(&mut queue.place.device, 32, value),
            _ => {}
        }
    }

    pub fn state(&self) -> State {
        let mut state = State { backend: self.backend.state(), ..self.state.clone() };
        if let Some(service) = &self.service {
            for (number, progress) in service.progress() {
                if let Some(queue) = state.queues.get_mut(usize::from(number)) {
                    queue.progress = progress;
                }
            }
            if service.is_broken() {
                state.status |= status::NEEDS_RESET;
            }
        }
        state
    }

    pub fn end(&mut self) {
        self.backend.finish();
        // What a saved machine would keep stays.
        self.state = self.state();
        self.line.clear();
        (self.service, self.ending) = (None, None);
        self.backend.end();
    }

    pub fn restore(&mut self, saved: &State) {
        self.reset();
        self.ending = None;
        let mut queues = saved.queues.clone();
        queues.resize(self.state.queues.len(), fresh_state(1).queues[0]);
        self.state = State { queues, ..saved.clone() };
        self.backend.restore(&saved.backend);
        let is_on = status::DRIVER_OK | status::FEATURES_OK;
        if saved.status & (is_on | status::NEEDS_RESET) == is_on {
            self.start();
        }
    }
}

/// The half of 64 feature bits that a select register chooses; there are no more.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_half(address: &mut Gpa, shift: u32, value: u32) {
    address.0 = address.0 & !(0xffff_ffff << shift) | u64::from(value) << shift;
}
