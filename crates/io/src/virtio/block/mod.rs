//! The block device: a disk of 512-byte sectors on a [`Medium`]. Source: VIRTIO 1.2, 5.2 "Block Device".
//!
//! A request that fails is the guest's to know of, unless the operator wants the machine paused ([`OnError`]): then it stays
//! in its queue until it is tried again. A flush that failed is never tried again: what it was to save may be gone from the
//! host's memory, and the next one would succeed.

mod pace;
mod requests;

use std::borrow::Cow;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use host::file;
use host::lock::{Rank, RankedMutex};

use super::line::Line;
use super::queue::Chain;
use super::{Answer, Backend, BackendState, Pause};
use crate::disk::Medium;
use crate::disk::limit::Rates;
use pace::Pace;
use requests::Failed;

const DEVICE_TYPE: u16 = 2;
/// A mass storage controller: what systems expect of a virtio disk.
const PCI_CLASS: u32 = 0x01_0000;
const SECTOR: u64 = 512;

/// 5.2.3 "Feature bits".
mod offered {
    pub const SEGMENTS: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const BLOCK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const QUEUES: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Statuses of requests, 5.2.6 "Device Operation".
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// How many segments a discard or write zeroes may have, and how many sectors each: 1 GiB whose space is given back, and
/// 16 MiB that may have to be written, in a fraction of a second.
const MOST_SEGMENTS: u32 = 16;
const MOST_DISCARDED: u32 = 1 << 21;
const MOST_ZEROED: u32 = 1 << 15;
/// What is discarded gives space back in pieces of this many sectors: the host's file systems have blocks of 4 KiB.
const DISCARD_ALIGNMENT: u32 = 8;
/// Buffers of a request beside its header and status: two less than a queue has descriptors.
const MOST_BUFFERS: u32 = super::queue::MOST_ENTRIES as u32 - 2;
const MOST_QUEUES: u16 = 16;
/// Requests that wait for the host's disk beside the first.
const HELPERS: usize = super::queue::MOST_KEPT - 1;

/// What becomes of a request that the host cannot do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The machine is paused when the host's disk is full, and the guest is told of everything else.
    #[default]
    Auto,
    /// The guest is told.
    Report,
    /// The machine is paused.
    Pause,
}

impl OnError {
    /// # Errors
    /// The names that there are.
    pub fn parse(name: &str) -> Result<OnError, &'static str> {
        match name {
            "auto" => Ok(OnError::Auto),
            "report" => Ok(OnError::Report),
            "pause" => Ok(OnError::Pause),
            _ => Err("auto, report, pause"),
        }
    }
}

/// What a disk is to its guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    pub read_only: bool,
    /// Up to 20 ASCII characters; the guest's system names the disk by it.
    pub serial: String,
    /// Queues, each with a thread of its own: one a processor.
    pub queues: u16,
    pub rates: Rates,
    pub on_error: OnError,
}

/// What a saved machine keeps of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// A flush has failed, so all do.
    pub lost: bool,
}

#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    failed: AtomicU64,
    delayed: AtomicU64,
    pauses: AtomicU64,
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

pub struct Block {
    medium: Box<dyn Medium>,
    disk: Disk,
    sectors: u64,
    config: Vec<u8>,
    pace: Pace,
    line: OnceLock<Arc<Line>>,
    pause: OnceLock<Pause>,
    /// Why requests are kept, until they are tried again.
    trouble: RankedMutex<Option<String>>,
    lost: AtomicBool,
    counts: Counts,
}

impl fmt::Debug for Block {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Block")
            .field("disk", &self.disk)
            .field("sectors", &self.sectors)
            .finish_non_exhaustive()
    }
}

impl Block {
    /// What lies behind the last whole sector of the medium is no part of the disk.
    #[must_use]
    pub fn new(medium: Box<dyn Medium>, mut disk: Disk) -> Block {
        disk.queues = disk.queues.clamp(1, MOST_QUEUES);
        let sectors = medium.size() / SECTOR;
        // 5.2.4 "Device configuration layout".
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &sectors.to_le_bytes());
        put(12, &MOST_BUFFERS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(34, &disk.queues.to_le_bytes());
        for (at, most) in [(36, MOST_DISCARDED), (48, MOST_ZEROED)] {
            put(at, &most.to_le_bytes());
            put(at + 4, &MOST_SEGMENTS.to_le_bytes());
        }
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(56, &[1]);
        Block {
            medium,
            pace: Pace::new(disk.rates),
            disk,
            sectors,
            config,
            line: OnceLock::new(),
            pause: OnceLock::new(),
            trouble: RankedMutex::new(Rank::Waiting, None),
            lost: AtomicBool::new(false),
            counts: Counts::default(),
        }
    }

    /// Other rates from now on.
    pub fn set_rates(&self, rates: Rates) {
        self.pace.set(rates);
    }

    /// Why requests wait for the operator, if they do.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().clone()
    }

    /// Tries the requests again that wait for the operator.
    pub fn retry(&self) {
        if self.trouble.lock().take().is_some()
            && let Some(line) = self.line.get()
        {
            (0..self.disk.queues).for_each(|queue| line.look_at(queue));
        }
    }

    /// What was done, by name.
    #[must_use]
    pub fn stats(&self) -> Vec<(&'static str, u64)> {
        let counts = &self.counts;
        let mut list = Vec::from(
            [
                ("reads", &counts.reads),
                ("writes", &counts.writes),
                ("flushes", &counts.flushes),
                ("discards", &counts.discards),
                ("bytes_read", &counts.bytes_read),
                ("bytes_written", &counts.bytes_written),
                ("failed", &counts.failed),
                ("delayed", &counts.delayed),
                ("pauses", &counts.pauses),
            ]
            .map(|(name, counter)| (name, counter.load(Ordering::Relaxed))),
        );
        list.extend(self.medium.stats());
        list
    }

    /// Whether a request that the host could not do waits for the operator; has the machine paused then.
    fn waits(&self, error: &std::io::Error) -> bool {
        let waits = match self.disk.on_error {
            OnError::Auto => file::is_full(error),
            OnError::Report => false,
            OnError::Pause => true,
        };
        if waits && self.trouble.lock().replace(error.to_string()).is_none() {
            count(&self.counts.pauses, 1);
            if let Some(pause) = self.pause.get() {
                pause();
            }
        }
        waits
    }
}

impl Backend for Block {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        let common = offered::SEGMENTS | offered::BLOCK_SIZE | offered::FLUSH | offered::QUEUES;
        common | if self.disk.read_only { offered::READ_ONLY } else { offered::WRITE_ZEROES | offered::DISCARD }
    }

    fn queues(&self) -> u16 {
        self.disk.queues
    }

    fn helpers(&self) -> usize {
        HELPERS
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.config)
    }

    fn connect(&self, line: &Arc<Line>) {
        let _ = self.line.set(Arc::clone(line));
        self.pace.connect(line);
    }

    fn connect_pause(&self, pause: Pause) {
        let _ = self.pause.set(pause);
    }

    fn state(&self) -> BackendState {
        BackendState::Block(State { lost: self.lost.load(Ordering::SeqCst) })
    }

    fn restore(&self, state: &BackendState) {
        if let BackendState::Block(state) = state {
            self.lost.store(state.lost, Ordering::SeqCst);
        }
    }

    fn end(&self) {
        self.pace.end();
        self.medium.close();
    }

    fn serve(&self, queue: u16, features: u64, chain: &Chain<'_>) -> Answer {
        // Without room for the status, there is nobody to tell of anything.
        let Some(room) = chain.writable_bytes().checked_sub(1) else { return Answer::Done(0) };
        if self.pace.delays(queue, chain.bytes()) {
            count(&self.counts.delayed, 1);
            return Answer::Kept;
        }
        let (status, written) = match self.carry_out(features, chain, room) {
            Ok(written) => (OK, written),
            Err(Failed::Guest(status)) => (status, 0),
            Err(Failed::Host(error)) if self.waits(&error) => return Answer::Kept,
            Err(Failed::Host(_) | Failed::Flush) => {
                count(&self.counts.failed, 1);
                (FAILED, 0)
            }
        };
        if !chain.write(room, &[status]) {
            return Answer::Done(0);
        }
        // 2.7.8.2: the length covers what was written from the first byte on.
        Answer::Done(if written == room { (room + 1) as u32 } else { written as u32 })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pace.end();
    }
}

#[cfg(test)]
mod tests;
