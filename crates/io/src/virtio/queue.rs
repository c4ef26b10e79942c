//! A split virtqueue, from the device's side, over one guest's memory. It knows neither the transport nor the back end.
//! Source: OASIS Virtual I/O Device (VIRTIO) Version 1.2, 2.7 "Split Virtqueues"; sections below are of it.
//!
//! All three parts of a queue are in memory that the guest writes at any time. So each value is read once, checked, and
//! used as it was read; what cannot be is [`Broken`], and the device then needs a reset (2.1.2).

use std::fs::File;
use std::io;
use std::sync::atomic::{Ordering, fence};

use memory::GuestMemory;
use x86::Gpa;

/// The longest queue that any device of ours offers.
pub const MOST_ENTRIES: u16 = 256;
/// How many requests of a queue can be under way at once, each in a thread of its own.
pub const MOST_KEPT: usize = 8;

/// 2.7.5 "The Virtqueue Descriptor Table".
const DESCRIPTOR_BYTES: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// 2.7.6 "The Virtqueue Available Ring", flags.
const NO_INTERRUPT: u64 = 1;
/// 2.7.8 "The Virtqueue Used Ring", flags.
const NO_NOTIFY: u64 = 1;
/// Flags and index come before the entries of both rings.
const RING_HEADER: u64 = 4;
const AVAILABLE_BYTES: u64 = 2;
const USED_BYTES: u64 = 8;

/// What the driver did that no device can work with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("a queue of {0} entries is not possible")]
    Size(u16),
    #[error("the part of a queue at {0} is not aligned, or not in memory")]
    Place(Gpa),
    #[error("the available index jumped from {from} to {to}")]
    Index { from: u16, to: u16 },
    #[error("there is no descriptor {0}")]
    Descriptor(u16),
    #[error("a chain of descriptors is longer than its queue")]
    Chain,
    #[error("an indirect table where none may be, or of {0} bytes")]
    Indirect(u32),
    #[error("a buffer to be read comes after one to be written")]
    Order,
    #[error("the buffers of a chain hold 4 GiB or more")]
    Length,
    #[error("a buffer of {size} bytes at {address} is not in memory")]
    Buffer { address: Gpa, size: u32 },
}

/// Where the driver put a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub entries: u16,
    pub descriptors: Gpa,
    /// The available ring.
    pub driver: Gpa,
    /// The used ring.
    pub device: Gpa,
}

/// What a driver may leave out or use, as it was negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// VIRTIO_F_INDIRECT_DESC, 2.7.5.3.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX, 2.7.7 and 2.7.10.
    pub event_index: bool,
}

/// How far the device has come; with [`Place`], all of a queue that is not in the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub available: u16,
    pub used: u16,
    /// The used index when the driver was last told, or would have been.
    pub told: u16,
    pub kept: Kept,
}

/// Requests that were taken and have not been done, by the heads of their chains, the oldest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    heads: [u16; MOST_KEPT],
    count: usize,
}

impl Kept {
    /// Takes one in; false when there is no place.
    fn push(&mut self, head: u16) -> bool {
        let Some(place) = self.heads.get_mut(self.count) else { return false };
        *place = head;
        self.count += 1;
        true
    }

    fn pop(&mut self) -> Option<u16> {
        let first = *self.heads[..self.count].first()?;
        self.heads.copy_within(1..self.count, 0);
        self.count -= 1;
        Some(first)
    }
}

#[derive(Clone, Copy, Debug)]
struct Buffer {
    address: Gpa,
    size: u32,
}

/// The buffers of one request: first those that the device reads, then those that it writes.
#[derive(Debug)]
pub struct Chain<'m> {
    memory: &'m GuestMemory,
    head: u16,
    buffers: Vec<Buffer>,
    /// How many of them are read.
    readable: usize,
}

#[derive(Debug)]
pub struct Queue {
    place: Place,
    rules: Rules,
    progress: Progress,
}

/// Whether all of a range is RAM.
fn is_ram(memory: &GuestMemory, address: Gpa, size: u64) -> bool {
    let ranges = memory.pmap().ranges();
    ranges.into_iter().any(|(first, pages)| {
        let (start, bytes) = (first.gpa().0, pages * x86::PAGE_SIZE);
        address.0 >= start && address.0 - start <= bytes && size <= bytes - (address.0 - start)
    })
}

/// A naturally aligned value of 2, 4 or 8 bytes, read in one go.
fn load(memory: &GuestMemory, address: Gpa, size: usize) -> Result<u64, Broken> {
    let pinned = memory.pin(address.ppn()).ok_or(Broken::Place(address))?;
    Ok(pinned.page().load(address.offset(), size))
}

fn store(memory: &GuestMemory, address: Gpa, size: usize, value: u64) -> Result<(), Broken> {
    memory.pin_to_write(address.ppn()).ok_or(Broken::Place(address))?.page().store(address.offset(), size, value);
    memory.note_store(address.ppn(), address.offset(), size as u64, None);
    Ok(())
}

impl Queue {
    /// # Errors
    /// [`Broken`], when the queue cannot be where the driver says.
    pub fn new(memory: &GuestMemory, place: Place, rules: Rules, progress: Progress) -> Result<Queue, Broken> {
        let entries = u64::from(place.entries);
        if !place.entries.is_power_of_two() || place.entries > MOST_ENTRIES {
            return Err(Broken::Size(place.entries));
        }
        // Each ring ends with the index that the other side wants to be told of, 2.7 "Split Virtqueues".
        for (address, alignment, size) in [
            (place.descriptors, 16, DESCRIPTOR_BYTES * entries),
            (place.driver, 2, RING_HEADER + AVAILABLE_BYTES * entries + 2),
            (place.device, 4, RING_HEADER + USED_BYTES * entries + 2),
        ] {
            if address.0 % alignment != 0 || !is_ram(memory, address, size) {
                return Err(Broken::Place(address));
            }
        }
        Ok(Queue { place, rules, progress })
    }

    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// The next request, a kept one before others; `None` when there is none for now.
    ///
    /// # Errors
    /// [`Broken`], when the driver's index or its descriptors make no sense.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, Broken> {
        if let Some(head) = self.progress.kept.pop() {
            return self.follow(memory, head).map(Some);
        }
        let index = load(memory, self.place.driver.add(2), 2)? as u16;
        let next = self.progress.available;
        match index.wrapping_sub(next) {
            0 => return Ok(None),
            waiting if waiting > self.place.entries => return Err(Broken::Index { from: next, to: index }),
            _ => {}
        }
        // What the index covers was written before it, and is read after it: loads keep their order (Intel SDM (2024-12)
        // Vol. 3A 9.2.2), and the compiler must keep it too.
        fence(Ordering::Acquire);
        let slot = u64::from(next % self.place.entries);
        let head = load(memory, self.place.driver.add(RING_HEADER + AVAILABLE_BYTES * slot), 2)? as u16;
        let chain = self.follow(memory, head)?;
        self.progress.available = next.wrapping_add(1);
        Ok(Some(chain))
    }

    /// The requests that were popped last, so many, have not been done: the next [`Queue::pop`]s give them again.
    pub fn put_back_last(&mut self, count: u16) {
        self.progress.available = self.progress.available.wrapping_sub(count);
    }

    /// A request that was popped has not been done: the next [`Queue::pop`] gives it again.
    ///
    /// # Errors
    /// [`Broken::Chain`], when as many as can be are kept already.
    pub fn keep(&mut self, head: u16) -> Result<(), Broken> {
        if self.progress.kept.push(head) { Ok(()) } else { Err(Broken::Chain) }
    }

    /// Whether there is more to pop than what was popped, as far as can be seen.
    #[must_use]
    pub fn has_more(&self, memory: &GuestMemory) -> bool {
        load(memory, self.place.driver.add(2), 2).is_ok_and(|index| index as u16 != self.progress.available)
    }

    /// How many requests the driver has not been told of as done.
    #[must_use]
    pub fn untold(&self) -> u16 {
        self.progress.used.wrapping_sub(self.progress.told)
    }

    /// Collects and checks the buffers of the chain that begins with descriptor `head`.
    fn follow<'m>(&self, memory: &'m GuestMemory, head: u16) -> Result<Chain<'m>, Broken> {
        let mut chain = Chain { memory, head, buffers: Vec::new(), readable: 0 };
        let (mut table, mut entries, mut index) = (self.place.descriptors, self.place.entries, head);
        let mut is_indirect = false;
        let mut total = 0_u64;
        loop {
            if index >= entries {
                return Err(Broken::Descriptor(index));
            }
            let mut bytes = [0; DESCRIPTOR_BYTES as usize];
            let at = table.add(DESCRIPTOR_BYTES * u64::from(index));
            memory.read(at, &mut bytes).map_err(|_| Broken::Place(at))?;
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
            let address = Gpa(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            let size = u32::from_le_bytes([i, j, k, l]);
            let (flags, next) = (u16::from_le_bytes([m, n]), u16::from_le_bytes([o, p]));
            if flags & INDIRECT != 0 {
                // 2.7.5.3.1: not beside NEXT, not within another, of whole descriptors, and 2.7.5.3.1 again: no longer
                // than the queue.
                let count = u64::from(size) / DESCRIPTOR_BYTES;
                let fits = u64::from(size).is_multiple_of(DESCRIPTOR_BYTES)
                    && (1..=u64::from(self.place.entries)).contains(&count);
                if !self.rules.indirect || is_indirect || flags & NEXT != 0 || !fits || !chain.buffers.is_empty() {
                    return Err(Broken::Indirect(size));
                }
                if !is_ram(memory, address, u64::from(size)) {
                    return Err(Broken::Buffer { address, size });
                }
                (table, entries, index, is_indirect) = (address, count as u16, 0, true);
                continue;
            }
            if chain.buffers.len() >= usize::from(self.place.entries) {
                return Err(Broken::Chain);
            }
            if flags & WRITE == 0 {
                // 2.7.4.2: what the device writes comes after what it reads.
                if chain.readable != chain.buffers.len() {
                    return Err(Broken::Order);
                }
                chain.readable += 1;
            }
            if !is_ram(memory, address, u64::from(size)) {
                return Err(Broken::Buffer { address, size });
            }
            total += u64::from(size);
            if total > u64::from(u32::MAX) {
                return Err(Broken::Length);
            }
            chain.buffers.push(Buffer { address, size });
            if flags & NEXT == 0 {
                return Ok(chain);
            }
            index = next;
        }
    }

    /// Gives the request that began with descriptor `head` back, with how many bytes were written to it.
    ///
    /// # Errors
    /// [`Broken::Place`], when the used ring is not in memory any more.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), Broken> {
        self.push_together(memory, &[(head, written)])
    }

    /// Gives requests back, no more than the queue has entries: the driver sees all of them or none.
    ///
    /// # Errors
    /// As [`Queue::push`].
    pub fn push_together(&mut self, memory: &GuestMemory, requests: &[(u16, u32)]) -> Result<(), Broken> {
        let mut next = self.progress.used;
        for (head, written) in requests {
            let slot = u64::from(next % self.place.entries);
            let at = self.place.device.add(RING_HEADER + USED_BYTES * slot);
            store(memory, at, 4, u64::from(*head))?;
            store(memory, at.add(4), 4, u64::from(*written))?;
            next = next.wrapping_add(1);
        }
        self.progress.used = next;
        // The driver sees the index after what it covers: stores keep their order.
        fence(Ordering::Release);
        store(memory, self.place.device.add(2), 2, u64::from(next))
    }

    /// How many entries the queue has.
    #[must_use]
    pub fn entries(&self) -> u16 {
        self.place.entries
    }

    /// Whether the driver wants to be told of what was used since this was last asked (2.7.7.2, 2.7.10.2).
    ///
    /// # Errors
    /// [`Broken::Place`], when the available ring is not in memory any more.
    pub fn wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, Broken> {
        let (old, new) = (self.progress.told, self.progress.used);
        self.progress.told = new;
        if old == new {
            return Ok(false);
        }
        // The driver publishes what it wants and then looks at the used index; we do it the other way round.
        fence(Ordering::SeqCst);
        if !self.rules.event_index {
            return Ok(load(memory, self.place.driver, 2)? & NO_INTERRUPT == 0);
        }
        let end = self.place.driver.add(RING_HEADER + AVAILABLE_BYTES * u64::from(self.place.entries));
        let event = load(memory, end, 2)? as u16;
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks the driver to notify of the next request, or not to. Before the device sleeps it looks once more: a request that
    /// came meanwhile was not told of.
    ///
    /// # Errors
    /// [`Broken::Place`], when the used ring is not in memory any more.
    pub fn want_notification(&mut self, memory: &GuestMemory, wanted: bool) -> Result<(), Broken> {
        if self.rules.event_index {
            if wanted {
                // Of what it adds to what is there now: requests that were put back are among that, and an index that has
                // been passed already is never passed again.
                let there = load(memory, self.place.driver.add(2), 2)?;
                let end = self.place.device.add(RING_HEADER + USED_BYTES * u64::from(self.place.entries));
                store(memory, end, 2, there)?;
            }
        } else {
            store(memory, self.place.device, 2, if wanted { 0 } else { NO_NOTIFY })?;
        }
        fence(Ordering::SeqCst);
        Ok(())
    }
}

impl Chain<'_> {
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    #[must_use]
    pub fn readable_bytes(&self) -> u64 {
        sum(&self.buffers[..self.readable])
    }

    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        sum(&self.buffers[self.readable..])
    }

    /// The buffers that can be written, one after the other: address and size.
    pub fn writable(&self) -> impl Iterator<Item = (Gpa, u64)> + '_ {
        self.buffers[self.readable..].iter().map(|buffer| (buffer.address, u64::from(buffer.size)))
    }

    /// All bytes of its buffers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        sum(&self.buffers)
    }

    /// Reads a file from `at` on to `size` bytes of what the driver will read, from `offset` on.
    ///
    /// # Errors
    /// As [`GuestMemory::read_file`], and when there is no room for so much.
    pub fn take_from(&self, offset: u64, size: u64, file: &File, at: u64) -> io::Result<()> {
        self.memory.read_file(file, at, ranges(&self.buffers[self.readable..], offset, size)?)
    }

    /// Writes `size` bytes of what the driver wrote, from `offset` on, to a file from `at` on.
    ///
    /// # Errors
    /// As [`GuestMemory::write_file`], and when there is not so much.
    pub fn put_into(&self, offset: u64, size: u64, file: &File, at: u64) -> io::Result<()> {
        self.memory.write_file(file, at, ranges(&self.buffers[..self.readable], offset, size)?)
    }

    /// Copies what the driver wrote, from `offset` on; false, and nothing, when there is not so much.
    #[must_use]
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let pieces = &self.buffers[..self.readable];
        each_piece(pieces, offset, bytes.len(), |address, range| self.memory.read(address, &mut bytes[range]).is_ok())
    }

    /// Copies to what the driver will read, from `offset` on; false, and nothing, when there is no room for all of it.
    #[must_use]
    pub fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        let pieces = &self.buffers[self.readable..];
        each_piece(pieces, offset, bytes.len(), |address, range| self.memory.write(address, &bytes[range]).is_ok())
    }
}

fn sum(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.size)).sum()
}

/// The ranges of memory that are `size` bytes of some buffers, from `offset` on.
fn ranges(buffers: &[Buffer], mut offset: u64, mut size: u64) -> io::Result<impl Iterator<Item = (Gpa, u64)>> {
    if sum(buffers).checked_sub(offset).is_none_or(|left| left < size) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(buffers.iter().filter_map(move |buffer| {
        let skipped = offset.min(buffer.size.into());
        let count = (u64::from(buffer.size) - skipped).min(size);
        offset -= skipped;
        size -= count;
        (count > 0).then(|| (buffer.address.add(skipped), count))
    }))
}

/// Calls `copy` with each piece of `size` bytes from `offset` of some buffers: its address, and the range of the bytes.
fn each_piece(
    buffers: &[Buffer],
    mut offset: u64,
    size: usize,
    mut copy: impl FnMut(Gpa, std::ops::Range<usize>) -> bool,
) -> bool {
    if sum(buffers).checked_sub(offset).is_none_or(|left| left < size as u64) {
        return false;
    }
    let mut done = 0;
    for buffer in buffers {
        let length = u64::from(buffer.size);
        if offset < length && done < size {
            let count = (length - offset).min((size - done) as u64) as usize;
            if !copy(buffer.address.add(offset), done..done + count) {
                return false;
            }
            done += count;
            offset = 0;
        } else {
            offset = offset.saturating_sub(length);
        }
    }
    done == size
}
