//! The one raw accessor of guest memory.
//!
//! Contract: guest memory is shared with the guest (and, through devices, with other threads), so there are never
//! references into it; every access is volatile or atomic, and every pointer is made here from a machine page of a pool
//! that is still mapped. A [`PageRef`] borrows the pool, so it cannot outlive the mapping.

use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use host::map::Map;
use x86::{Mpn, PAGE_SHIFT, PAGE_SIZE};

/// One machine page.
#[derive(Clone, Copy, Debug)]
pub struct PageRef<'pool> {
    base: *mut u8,
    pool: PhantomData<&'pool ()>,
}

impl<'pool> PageRef<'pool> {
    /// The machine page of a pool's map, which is mapped readable and writable as long as the pool lives.
    pub(crate) fn in_map(map: &'pool Map, mpn: Mpn) -> Self {
        let offset = (mpn.0 as usize) << PAGE_SHIFT;
        assert!(offset < map.size(), "machine page outside the pool");
        // SAFETY: inside the map (checked), and the result borrows the map.
        PageRef { base: unsafe { map.base().as_ptr().add(offset) }, pool: PhantomData }
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

    pub fn write(self, offset: u64, data: &[u8]) {
        let to = self.at(offset, data.len());
        // SAFETY: as in `read`, the other way.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    /// Reads an aligned 8-byte word in one go, as a page-table walk must.
    #[must_use]
    pub fn read_u64(self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Sets bits of an aligned 8-byte word if it still is `expected`; says whether it did.
    pub fn replace_u64(self, offset: u64, expected: u64, new: u64) -> bool {
        self.word(offset).compare_exchange(expected, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn word(self, offset: u64) -> &'static AtomicU64 {
        let place = self.at(offset & !7, 8);
        // SAFETY: aligned, mapped, and only accessed atomically or volatile; the reference does not leave this file.
        unsafe { AtomicU64::from_ptr(place.cast()) }
    }
}

/// Loads `size` (1, 2, 4, 8) bytes at a host address inside one guest page.
///
/// # Safety
/// `address` .. `address + size` lies inside one mapped page of a pool.
#[inline]
pub(crate) unsafe fn load(address: u64, size: usize) -> u64 {
    // SAFETY: by the caller's promise; unaligned volatile reads of a few bytes, which x86 allows.
    unsafe {
        match size {
            1 => u64::from(ptr::read_volatile(address as *const u8)),
            2 => u64::from(u16::from_le_bytes(ptr::read_volatile(address as *const [u8; 2]))),
            4 => u64::from(u32::from_le_bytes(ptr::read_volatile(address as *const [u8; 4]))),
            _ => u64::from_le_bytes(ptr::read_volatile(address as *const [u8; 8])),
        }
    }
}

/// Stores the low `size` (1, 2, 4, 8) bytes of `value`.
///
/// # Safety
/// As for [`load`], and the page is writable.
#[inline]
pub(crate) unsafe fn store(address: u64, size: usize, value: u64) {
    // SAFETY: by the caller's promise.
    unsafe {
        match size {
            1 => ptr::write_volatile(address as *mut u8, value as u8),
            2 => ptr::write_volatile(address as *mut [u8; 2], (value as u16).to_le_bytes()),
            4 => ptr::write_volatile(address as *mut [u8; 4], (value as u32).to_le_bytes()),
            _ => ptr::write_volatile(address as *mut [u8; 8], value.to_le_bytes()),
        }
    }
}

/// Replaces `size` bytes if they equal `expected`, in one atomic step; gives back what was there.
///
/// # Safety
/// As for [`store`]. An access that is not naturally aligned is done under no lock: x86 would split-lock it, and
/// guests of one processor cannot tell.
pub(crate) unsafe fn compare_exchange(address: u64, size: usize, expected: u64, new: u64) -> u64 {
    if !address.is_multiple_of(size as u64) {
        // SAFETY: by the caller's promise.
        unsafe {
            let old = load(address, size);
            if old == expected {
                store(address, size, new);
            }
            return old;
        }
    }
    // SAFETY: mapped by the caller's promise and aligned as checked.
    unsafe {
        macro_rules! exchange {
            ($atomic:ty, $int:ty) => {
                match <$atomic>::from_ptr(address as *mut $int).compare_exchange(
                    expected as $int,
                    new as $int,
                    Ordering::SeqCst,
                    Ordering::SeqCst,
                ) {
                    Ok(old) | Err(old) => old as u64,
                }
            };
        }
        match size {
            1 => exchange!(AtomicU8, u8),
            2 => exchange!(AtomicU16, u16),
            4 => exchange!(AtomicU32, u32),
            _ => exchange!(AtomicU64, u64),
        }
    }
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
            std::arch::asm!(
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
