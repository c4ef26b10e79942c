//! The memory balloon: the guest's driver fills it with pages that the guest can do without, as many as the host asks for,
//! and their machine pages go back to the system. Source: VIRTIO 1.2, 5.5 "Traditional Memory Balloon Device"; sections below
//! are of it.
//!
//! A driver is believed in nothing. Page numbers that are no RAM, pages given twice or taken back unasked, pages that the
//! guest still uses: the memory knows which pages it has, takes no other, and gives a page that is touched back as zeroes. So
//! a lie costs the liar its data, and nobody else anything. What was refused is counted.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use memory::GuestMemory;
use x86::{PAGE_SIZE, Ppn};

use super::line::Line;
use super::queue::Chain;
use super::{Answer, Backend, BackendState};

const DEVICE_TYPE: u16 = 5;
const PCI_CLASS: u32 = 0xff_0000;

/// 5.5.3 "Feature bits".
mod offered {
    pub const STATISTICS: u64 = 1 << 1;
    pub const DEFLATE_ON_OUT_OF_MEMORY: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

/// 5.5.2 "Virtqueues". Free pages are reported on the last one; Linux (drivers/virtio/virtio_pci_common.c vp_find_vqs_msix,
/// 6.1 and 6.12) leaves out the numbers of queues that were not agreed on, and uses the first that is left.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const QUEUES: u16 = 5;

/// 5.5.4 "Device configuration layout": the number of pages wanted, and the number that the driver says it gave. Behind them
/// are fields of features that are not offered.
const CONFIG_BYTES: usize = 8;
const ACTUAL: u64 = 4;

/// Page numbers in a request have 4 bytes each, and name pages of 4 KiB.
const NUMBER_BYTES: usize = 4;
/// Numbers that are carried out at a time.
const PIECE: usize = 1024;
/// Pages of one request that are looked at: Linux sends 256, or reports 32 blocks of 4 MiB. So no request takes long.
const MOST_PAGES: usize = 1 << 16;

/// One of the guest's own statistics: a tag and a value.
const STATISTIC_BYTES: usize = 10;
const MOST_STATISTICS: usize = 64;
/// 5.5.6.4 "Memory Statistics Tags"; those from 10 on are Linux's own (include/uapi/linux/virtio_balloon.h, 6.12).
const STATISTICS_BY_TAG: [&str; 16] = [
    "guest_swap_in",
    "guest_swap_out",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free",
    "guest_total",
    "guest_available",
    "guest_caches",
    "guest_huge_allocations",
    "guest_huge_failures",
    "guest_oom_kills",
    "guest_allocation_stalls",
    "guest_background_scans",
    "guest_direct_scans",
    "guest_background_reclaims",
    "guest_direct_reclaims",
];

/// What a balloon does to its guest's memory. Each takes any numbers at all and says how many pages it was good for.
pub trait Reclaim: Send + Sync {
    /// The guest promises not to use these pages. Counts those that are RAM and were not in the balloon.
    fn balloon(&self, pages: &[Ppn]) -> usize;

    /// The guest will use these pages again. Counts those that were in the balloon.
    fn unballoon(&self, pages: &[Ppn]) -> usize;

    /// The guest does not need what is in these pages now, and may use them at any time. Counts those that had content.
    fn discard(&self, pages: &[Ppn]) -> usize;
}

impl Reclaim for GuestMemory {
    fn balloon(&self, pages: &[Ppn]) -> usize {
        GuestMemory::balloon(self, pages)
    }

    fn unballoon(&self, pages: &[Ppn]) -> usize {
        GuestMemory::unballoon(self, pages)
    }

    fn discard(&self, pages: &[Ppn]) -> usize {
        GuestMemory::discard(self, pages)
    }
}

/// What a saved machine keeps of a balloon; which pages are in it, the memory knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub target: u32,
    pub actual: u32,
}

#[derive(Debug, Default)]
struct Counts {
    inflated: AtomicU64,
    deflated: AtomicU64,
    /// Deflated although the host did not want it: the guest was out of memory.
    unasked: AtomicU64,
    /// Told of as free, and how many of them had content.
    reported: AtomicU64,
    discarded: AtomicU64,
    /// Numbers in requests that did nothing.
    refused_inflations: AtomicU64,
    refused_deflations: AtomicU64,
    /// Requests that are no list of numbers, or longer than any driver's.
    malformed: AtomicU64,
    /// Statistics that the guest sent, in all.
    updates: AtomicU64,
}

fn count(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

pub struct Balloon {
    memory: Arc<dyn Reclaim>,
    /// Pages of RAM: no target is larger.
    most: u32,
    line: OnceLock<Arc<Line>>,
    target: AtomicU32,
    /// As the driver says.
    actual: AtomicU32,
    /// Fresh statistics are wanted.
    asked: AtomicBool,
    /// The next statistics are new ones.
    expected: AtomicBool,
    /// The last statistics, by tag, and which of them there are.
    statistics: [AtomicU64; STATISTICS_BY_TAG.len()],
    known: AtomicU32,
    counts: Counts,
}

impl Balloon {
    /// A balloon of a guest with `most` pages of RAM.
    #[must_use]
    pub fn new(memory: Arc<dyn Reclaim>, most: u64) -> Balloon {
        Balloon {
            memory,
            most: u32::try_from(most).unwrap_or(u32::MAX),
            line: OnceLock::new(),
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            asked: AtomicBool::new(false),
            expected: AtomicBool::new(true),
            statistics: Default::default(),
            known: AtomicU32::new(0),
            counts: Counts::default(),
        }
    }

    /// Asks the guest to have this many pages in the balloon, all of its RAM at most. A guest without a driver is asked when it
    /// gets one.
    pub fn set_target(&self, pages: u64) {
        let target = u32::try_from(pages).unwrap_or(u32::MAX).min(self.most);
        if self.target.swap(target, Ordering::SeqCst) != target
            && let Some(line) = self.line.get()
        {
            line.config_changed();
        }
    }

    /// Asks the guest for fresh statistics, which come when it has the time.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Some(line) = self.line.get() {
            line.look_at(STATISTICS);
        }
    }

    /// What is known, by name: pages, and the guest's own statistics as far as it sent them, in its units: bytes of memory, or
    /// numbers of events.
    #[must_use]
    pub fn stats(&self) -> Vec<(&'static str, u64)> {
        let counts = &self.counts;
        let mut list = vec![
            ("target", u64::from(self.target.load(Ordering::SeqCst))),
            ("actual", u64::from(self.actual.load(Ordering::SeqCst))),
            ("driver", u64::from(self.line.get().is_some_and(|line| line.has_driver()))),
        ];
        list.extend(
            [
                ("inflated", &counts.inflated),
                ("deflated", &counts.deflated),
                ("unasked", &counts.unasked),
                ("reported", &counts.reported),
                ("discarded", &counts.discarded),
                ("refused_inflations", &counts.refused_inflations),
                ("refused_deflations", &counts.refused_deflations),
                ("malformed", &counts.malformed),
                ("updates", &counts.updates),
            ]
            .map(|(name, counter)| (name, counter.load(Ordering::Relaxed))),
        );
        let known = self.known.load(Ordering::Acquire);
        let there = STATISTICS_BY_TAG.iter().zip(&self.statistics).enumerate();
        list.extend(
            there
                .filter(|(tag, _)| known & 1 << tag != 0)
                .map(|(_, (name, value))| (*name, value.load(Ordering::Relaxed))),
        );
        list
    }

    /// Does something with each piece of a request's page numbers, in ascending order: neighbours are best treated together.
    /// Gives how many pages it was good for, and how many it was not.
    fn each_number(&self, chain: &Chain<'_>, act: impl Fn(&[Ppn]) -> usize) -> (usize, usize) {
        let bytes = chain.readable_bytes();
        let numbers = (bytes / NUMBER_BYTES as u64).min(MOST_PAGES as u64) as usize;
        if bytes != (numbers * NUMBER_BYTES) as u64 || numbers == 0 {
            count(&self.counts.malformed, 1);
        }
        let (mut good, mut bad) = (0, 0);
        let mut buffer = vec![0; PIECE.min(numbers) * NUMBER_BYTES];
        let mut pages = Vec::with_capacity(PIECE.min(numbers));
        for first in (0..numbers).step_by(PIECE) {
            let piece = &mut buffer[..(numbers - first).min(PIECE) * NUMBER_BYTES];
            if !chain.read((first * NUMBER_BYTES) as u64, piece) {
                count(&self.counts.malformed, 1);
                break;
            }
            pages.clear();
            let (list, _) = piece.as_chunks::<NUMBER_BYTES>();
            pages.extend(list.iter().map(|number| Ppn(u64::from(u32::from_le_bytes(*number)))));
            pages.sort_unstable();
            let done = act(&pages);
            good += done;
            bad += pages.len() - done;
        }
        (good, bad)
    }

    fn inflate(&self, chain: &Chain<'_>) {
        let (good, bad) = self.each_number(chain, |pages| self.memory.balloon(pages));
        count(&self.counts.inflated, good);
        count(&self.counts.refused_inflations, bad);
    }

    fn deflate(&self, chain: &Chain<'_>) {
        let (good, bad) = self.each_number(chain, |pages| self.memory.unballoon(pages));
        count(&self.counts.deflated, good);
        count(&self.counts.refused_deflations, bad);
        // 5.5.6.1: a driver may deflate below what is wanted when its guest is out of memory.
        if self.actual.load(Ordering::SeqCst) <= self.target.load(Ordering::SeqCst) {
            count(&self.counts.unasked, good);
        }
    }

    /// 5.5.6.7 "Free Page Reporting": the buffers are the pages themselves.
    fn report(&self, chain: &Chain<'_>) {
        let mut left = MOST_PAGES as u64;
        for (address, size) in chain.writable() {
            // Only pages that are free as a whole.
            let first = address.0.div_ceil(PAGE_SIZE);
            let end = ((address.0 + size) / PAGE_SIZE).clamp(first, first + left);
            left -= end - first;
            for start in (first..end).step_by(PIECE) {
                let pages: Vec<Ppn> = (start..end.min(start + PIECE as u64)).map(Ppn).collect();
                count(&self.counts.reported, pages.len());
                count(&self.counts.discarded, self.memory.discard(&pages));
            }
        }
        if chain.readable_bytes() > 0 || left == MOST_PAGES as u64 || left == 0 {
            count(&self.counts.malformed, 1);
        }
    }

    /// 5.5.6.3 "Memory Statistics": the driver leaves a buffer with statistics here. It gets it back when fresh ones are wanted,
    /// fills it anew and leaves it again.
    fn take_statistics(&self, chain: &Chain<'_>) -> Answer {
        if self.asked.swap(false, Ordering::SeqCst) {
            self.expected.store(true, Ordering::SeqCst);
            return Answer::Done(0);
        }
        let mut bytes = [0; STATISTIC_BYTES * MOST_STATISTICS];
        let size = chain.readable_bytes().min(bytes.len() as u64) as usize;
        if chain.readable_bytes() > bytes.len() as u64
            || !size.is_multiple_of(STATISTIC_BYTES)
            || !chain.read(0, &mut bytes[..size])
        {
            count(&self.counts.malformed, 1);
            return Answer::Kept;
        }
        let (list, _) = bytes[..size].as_chunks::<STATISTIC_BYTES>();
        for [a, b, value @ ..] in list {
            // A tag that is not known belongs to a driver that knows more than we do.
            let tag = usize::from(u16::from_le_bytes([*a, *b]));
            if let Some(place) = self.statistics.get(tag) {
                place.store(u64::from_le_bytes(*value), Ordering::Relaxed);
                self.known.fetch_or(1 << tag, Ordering::Release);
            }
        }
        if self.expected.swap(false, Ordering::SeqCst) {
            count(&self.counts.updates, 1);
        }
        Answer::Kept
    }
}

impl Backend for Balloon {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        offered::STATISTICS | offered::DEFLATE_ON_OUT_OF_MEMORY | offered::REPORTING
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn shares_thread(&self) -> bool {
        true
    }

    fn config(&self) -> Cow<'_, [u8]> {
        let mut config = [0; CONFIG_BYTES];
        config[..4].copy_from_slice(&self.target.load(Ordering::SeqCst).to_le_bytes());
        config[4..].copy_from_slice(&self.actual.load(Ordering::SeqCst).to_le_bytes());
        Cow::Owned(config.into())
    }

    fn write_config(&self, at: u64, bytes: &[u8]) {
        // 4.1.3.1: a driver writes a field of 4 bytes as one.
        if let (ACTUAL, Ok(value)) = (at, bytes.try_into()) {
            self.actual.store(u32::from_le_bytes(value), Ordering::SeqCst);
        }
    }

    fn connect(&self, line: &Arc<Line>) {
        let _ = self.line.set(Arc::clone(line));
    }

    fn reset(&self) {
        // The next driver begins with nothing. Pages that the last one left in the balloon come back when they are touched.
        self.actual.store(0, Ordering::SeqCst);
        self.expected.store(true, Ordering::SeqCst);
        self.known.store(0, Ordering::Release);
    }

    fn state(&self) -> BackendState {
        let (target, actual) = (self.target.load(Ordering::SeqCst), self.actual.load(Ordering::SeqCst));
        BackendState::Balloon(State { target, actual })
    }

    fn restore(&self, state: &BackendState) {
        let BackendState::Balloon(State { target, actual }) = state else { return };
        self.target.store(*target.min(&self.most), Ordering::SeqCst);
        self.actual.store(*actual, Ordering::SeqCst);
    }

    fn serve(&self, queue: u16, features: u64, chain: &Chain<'_>) -> Answer {
        match queue {
            INFLATE => self.inflate(chain),
            DEFLATE => self.deflate(chain),
            STATISTICS if features & offered::STATISTICS != 0 => return self.take_statistics(chain),
            _ if features & offered::REPORTING != 0 => self.report(chain),
            _ => count(&self.counts.malformed, 1),
        }
        // 2.7.8.2: nothing was written.
        Answer::Done(0)
    }
}
