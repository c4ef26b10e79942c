//! The one raw accessor of guest memory.
//!
//! Contract: guest memory is shared with the guest (and, through devices, with other threads), so there are never
//! references into it; every access is volatile or atomic, and every pointer is made here from a machine page of a file
//! that is still mapped. A [`PageRef`] borrows that map, so it cannot outlive the mapping. Pages that others have, too, are
//! mapped read-only, and there is no [`PageMut`] of them.
//!
//! Accesses of 1, 2, 4 and 8 bytes are one host instruction each. So they are as atomic, and as ordered against those of
//! other processors, as the guest's own would be: Intel SDM (2024-12) Vol. 3A 9.1.1 "Guaranteed Atomic Operations" and
//! 9.2.2 "Memory Ordering in P6 and More Recent Processor Families".

use std::arch::asm;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ptr;

use host::file::{self, Run};
use host::map::Map;
use x86::{PAGE_SHIFT, PAGE_SIZE};

/// One machine page, to read.
#[derive(Clone, Copy, Debug)]
pub struct PageRef<'memory> {
    base: *mut u8,
    memory: PhantomData<&'memory ()>,
}

/// One machine page of the VM's own, to read and write.
#[derive(Clone, Copy, Debug)]
pub struct PageMut<'memory>(PageRef<'memory>);

impl<'memory> PageRef<'memory> {
    /// A page of a map, which is mapped as long as its owner lives, at least readable.
    pub(crate) fn in_map(map: &'memory Map, page: u64) -> Self {
        let offset = (page as usize) << PAGE_SHIFT;
        assert!(offset < map.size(), "machine page outside its source");
        // SAFETY: inside the map (checked), and the result borrows the map.
        PageRef { base: unsafe { map.base().as_ptr().add(offset) }, memory: PhantomData }
    }
}

impl<'memory> PageMut<'memory> {
    /// A page of a map that is mapped readable and writable.
    pub(crate) fn in_map(map: &'memory Map, page: u64) -> Self {
        PageMut(PageRef::in_map(map, page))
    }

    #[must_use]
    pub fn to_read(self) -> PageRef<'memory> {
        self.0
    }
}

impl<'memory> std::ops::Deref for PageMut<'memory> {
    type Target = PageRef<'memory>;

    fn deref(&self) -> &PageRef<'memory> {
        &self.0
    }
}

impl PageRef<'_> {
    /// The host address of the page: for addends of the soft TLB.
    #[must_use]
    pub fn host_address(self) -> u64 {
        self.base as u64
    }

    fn at(self, offset: u64, size: usize) -> *mut u8 {
        assert!(offset + size as u64 <= PAGE_SIZE, "access beyond the page");
        // SAFETY: checked against the page's size just above.
        unsafe { self.base.add(offset as usize) }
    }

    pub fn read(self, offset: u64, buffer: &mut [u8]) {
        let from = self.at(offset, buffer.len());
        // SAFETY: `from` has buffer.len() mapped bytes; the buffer is ours and does not overlap guest memory.
        unsafe { ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), buffer.len()) };
    }

    /// The whole page, as it is now: others may write to it meanwhile.
    #[must_use]
    pub fn copy(self) -> [u8; PAGE_SIZE as usize] {
        let mut content = [0; PAGE_SIZE as usize];
        self.read(0, &mut content);
        content
    }

    /// Whether these bytes are there.
    #[must_use]
    pub fn holds(self, offset: u64, data: &[u8]) -> bool {
        let mut now = [0; 64];
        data.chunks(now.len()).zip((offset..).step_by(now.len())).all(|(wanted, at)| {
            let now = &mut now[..wanted.len()];
            self.read(at, now);
            now == wanted
        })
    }

    /// Loads 1, 2, 4 or 8 bytes in one go.
    #[must_use]
    pub fn load(self, offset: u64, size: usize) -> u64 {
        let from = self.at(offset, size);
        // SAFETY: `size` bytes inside one mapped page, as `at` checked.
        unsafe { load(from as u64, size) }
    }

    /// Reads an aligned 8-byte word in one go, as a page-table walk must.
    #[must_use]
    pub fn read_u64(self, offset: u64) -> u64 {
        self.load(offset & !7, 8)
    }
}

impl PageMut<'_> {
    pub fn write(self, offset: u64, data: &[u8]) {
        let to = self.0.at(offset, data.len());
        // SAFETY: as in `read`, the other way, and the page is writable.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    /// Stores the low 1, 2, 4 or 8 bytes of a value in one go.
    pub fn store(self, offset: u64, size: usize, value: u64) {
        let to = self.0.at(offset, size);
        // SAFETY: as in `load`, and the page is writable.
        unsafe { store(to as u64, size, value) }
    }

    /// Replaces 1, 2, 4 or 8 bytes if they equal `expected`, in one atomic step; gives back what was there.
    #[must_use]
    pub fn compare_exchange(self, offset: u64, size: usize, expected: u64, new: u64) -> u64 {
        let at = self.0.at(offset, size);
        // SAFETY: as in `store`.
        unsafe { compare_exchange(at as u64, size, expected, new) }
    }

    /// As [`PageMut::compare_exchange`], of 16 bytes at a multiple of 16.
    #[must_use]
    pub fn compare_exchange16(self, offset: u64, expected: u128, new: u128) -> u128 {
        let at = self.0.at(offset & !15, 16);
        // SAFETY: as in `store`, and aligned.
        unsafe { compare_exchange16(at as u64, expected, new) }
    }

    /// Replaces an aligned 8-byte word if it still is `expected`; says whether it did.
    pub fn replace_u64(self, offset: u64, expected: u64, new: u64) -> bool {
        self.compare_exchange(offset & !7, 8, expected, new) == expected
    }
}

/// Some bytes of pages as runs of memory: pages that are neighbours in the host, too, make one.
fn runs<'m>(pieces: impl Iterator<Item = (PageRef<'m>, u64, u64)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(8);
    for (page, offset, size) in pieces {
        let (address, size) = (page.at(offset, size as usize), size as usize);
        match runs.last_mut() {
            Some(last) if last.address as usize + last.size == address as usize => last.size += size,
            _ => runs.push(Run { address, size }),
        }
    }
    runs
}

/// Takes `count` bytes off the front of some runs.
fn advance(runs: &mut Vec<Run>, mut count: usize) {
    let done = runs
        .iter()
        .take_while(|run| {
            count >= run.size && {
                count -= run.size;
                true
            }
        })
        .count();
    runs.drain(..done);
    if let Some(first) = runs.first_mut() {
        first.address = first.address.wrapping_add(count);
        first.size -= count;
    }
}

/// Calls `transfer` until all runs are done: it may do less than it was asked for.
fn each_run(mut at: u64, mut runs: Vec<Run>, transfer: impl Fn(u64, &[Run]) -> io::Result<usize>) -> io::Result<()> {
    while !runs.is_empty() {
        match transfer(at, &runs) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                at += count as u64;
                advance(&mut runs, count);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads a file from `at` on into pieces of pages: page, offset in it, size.
pub(crate) fn read_file<'m>(
    source: &File,
    at: u64,
    pieces: impl Iterator<Item = (PageMut<'m>, u64, u64)>,
) -> io::Result<()> {
    let runs = runs(pieces.map(|(page, offset, size)| (page.to_read(), offset, size)));
    // SAFETY: each run is inside pages that are mapped and writable as long as 'm, which is past this call.
    each_run(at, runs, |at, runs| unsafe { file::read_runs(source, at, runs) })
}

/// Writes pieces of pages to a file from `at` on.
pub(crate) fn write_file<'m>(
    target: &File,
    at: u64,
    pieces: impl Iterator<Item = (PageRef<'m>, u64, u64)>,
) -> io::Result<()> {
    // SAFETY: as in `read_file`; they are only read.
    each_run(at, runs(pieces), |at, runs| unsafe { file::write_runs(target, at, runs) })
}

/// Whether an access stays in one cache line: whether LOCK is one step without locking the bus.
#[inline]
#[must_use]
pub fn in_line(address: u64, size: usize) -> bool {
    address % 64 + size as u64 <= 64
}

/// Loads `size` (1, 2, 4, 8) bytes at a host address inside one guest page.
///
/// # Safety
/// `address` .. `address + size` lies inside one mapped page of a pool.
#[inline(always)]
pub(crate) unsafe fn load(address: u64, size: usize) -> u64 {
    let value: u64;
    // SAFETY: mapped by the caller's promise. Nobody has references into the page, and the compiler takes it that any
    // memory may be read.
    unsafe {
        match size {
            1 => {
                asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags, readonly))
            }
            2 => {
                asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags, readonly))
            }
            4 => asm!("mov {0:e}, [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags, readonly)),
            _ => asm!("mov {0}, [{1}]", out(reg) value, in(reg) address, options(nostack, preserves_flags, readonly)),
        }
    }
    value
}

/// Stores the low `size` (1, 2, 4, 8) bytes of `value`.
///
/// # Safety
/// As for [`load`], and the page is writable.
#[inline(always)]
pub(crate) unsafe fn store(address: u64, size: usize, value: u64) {
    // SAFETY: by the caller's promise, and as in `load`.
    unsafe {
        match size {
            1 => asm!("mov [{0}], {1}", in(reg) address, in(reg_byte) value as u8, options(nostack, preserves_flags)),
            2 => asm!("mov [{0}], {1:x}", in(reg) address, in(reg) value, options(nostack, preserves_flags)),
            4 => asm!("mov [{0}], {1:e}", in(reg) address, in(reg) value, options(nostack, preserves_flags)),
            _ => asm!("mov [{0}], {1}", in(reg) address, in(reg) value, options(nostack, preserves_flags)),
        }
    }
}

/// Replaces `size` bytes if they equal `expected`, in one atomic step; gives back what was there.
///
/// # Safety
/// As for [`store`]. An access across cache lines is a split lock, which hosts may punish: callers keep guests' away.
pub(crate) unsafe fn compare_exchange(address: u64, size: usize, expected: u64, new: u64) -> u64 {
    let mut old = expected;
    // SAFETY: by the caller's promise, and as in `load`.
    unsafe {
        match size {
            1 => {
                asm!("lock cmpxchg [{0}], {1}", in(reg) address, in(reg_byte) new as u8, inout("rax") old, options(nostack))
            }
            2 => asm!("lock cmpxchg [{0}], {1:x}", in(reg) address, in(reg) new, inout("rax") old, options(nostack)),
            4 => asm!("lock cmpxchg [{0}], {1:e}", in(reg) address, in(reg) new, inout("rax") old, options(nostack)),
            _ => asm!("lock cmpxchg [{0}], {1}", in(reg) address, in(reg) new, inout("rax") old, options(nostack)),
        }
    }
    old & u64::MAX >> (64 - 8 * size.clamp(1, 8))
}

/// As [`compare_exchange`], of 16 bytes.
///
/// # Safety
/// `address` .. `address + 16` lies inside one mapped, writable page of a pool and `address` is a multiple of 16.
pub(crate) unsafe fn compare_exchange16(address: u64, expected: u128, new: u128) -> u128 {
    if std::arch::is_x86_feature_detected!("cmpxchg16b") {
        let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
        // The standard library's function may become a call of a routine that nobody links. RBX belongs to the compiler
        // and is given back.
        // SAFETY: by the caller's promise, and the processor has the instruction.
        unsafe {
            asm!(
                "xchg rbx, rsi",
                "lock cmpxchg16b [rdi]",
                "mov rbx, rsi",
                in("rdi") address,
                inout("rsi") new as u64 => _,
                in("rcx") (new >> 64) as u64,
                inout("rax") low,
                inout("rdx") high,
                options(nostack),
            );
        }
        return u128::from(high) << 64 | u128::from(low);
    }
    // Processors without the instruction are older than any that can run a guest of several processors at speed; a guest of
    // one cannot tell.
    // SAFETY: by the caller's promise.
    unsafe {
        let old = ptr::read_volatile(address as *const u128);
        if old == expected {
            ptr::write_volatile(address as *mut u128, new);
        }
        old
    }
}

/// Copies upwards between host addresses.
///
/// # Safety
/// Both ranges are mapped for `size` bytes and the target is writable. One may be guest memory that others write at the same
/// time: no references to it exist.
pub(crate) unsafe fn copy(to: u64, from: u64, size: usize) {
    // SAFETY: by the caller's promise.
    unsafe { ptr::copy(from as *const u8, to as *mut u8, size) };
}
