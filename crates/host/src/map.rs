//! Memory maps of the host: the memfd behind the machine-page pool, and the block in which a VCPU lives.
//!
//! Contract: a map owns its range of addresses until it is dropped and never moves. Pointers handed out are valid for
//! that long; who keeps one must keep the map.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

pub const PAGE: usize = 4096;

/// A range of addresses mapped by us, unmapped on drop.
#[derive(Debug)]
pub struct Map {
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: a Map is only an owned range of addresses; what is stored in it is shared under the rules of its users.
unsafe impl Send for Map {}
// SAFETY: as above; `&Map` gives out the base address and nothing else.
unsafe impl Sync for Map {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    None,
    Read,
    ReadWrite,
    ReadExecute,
}

impl Protection {
    fn bits(self) -> i32 {
        match self {
            Protection::None => libc::PROT_NONE,
            Protection::Read => libc::PROT_READ,
            Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
            Protection::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
        }
    }
}

impl Map {
    /// Maps `size` bytes of zeroes, private, without reserving memory for them.
    pub fn anonymous(size: usize) -> io::Result<Map> {
        Map::of_kernel(size, Protection::ReadWrite, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    /// Maps the first `size` bytes of `file`, shared with every other map of it.
    pub fn shared(file: &File, size: usize, protection: Protection) -> io::Result<Map> {
        Map::of_kernel(size, protection, libc::MAP_SHARED | libc::MAP_NORESERVE, file.as_raw_fd())
    }

    fn of_kernel(size: usize, protection: Protection, flags: i32, fd: i32) -> io::Result<Map> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, protection.bits(), flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap gave address zero"))?;
        Ok(Map { base, size })
    }

    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Changes what may be done with `size` bytes from `offset`; both are multiples of the page size.
    pub fn protect(&self, offset: usize, size: usize, protection: Protection) -> io::Result<()> {
        assert!(offset.checked_add(size).is_some_and(|end| end <= self.size), "protect outside the map");
        // SAFETY: the range is inside this map, which we own.
        let result = unsafe { libc::mprotect(self.base.as_ptr().add(offset).cast(), size, protection.bits()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Makes `size` bytes from `offset`, both multiples of the page size, resident: to be written where that is allowed, else
    /// to be read. One call costs a fraction of a fault for each page. A kernel that does not know it (before Linux 5.14) leaves
    /// things as they were: then each page faults at its first use.
    pub fn populate(&self, offset: usize, size: usize, write: bool) {
        assert!(offset.checked_add(size).is_some_and(|end| end <= self.size), "populate outside the map");
        let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        // SAFETY: advice on a range inside this map, which changes no content.
        unsafe { libc::madvise(self.base.as_ptr().add(offset).cast(), size, advice) };
    }

    /// Lets go of the memory that this map of a file holds resident; the file keeps the content. Only for shared maps.
    pub fn let_go(&self) {
        // SAFETY: advice on a range that we own; a shared map reads the same bytes again afterwards.
        unsafe { libc::madvise(self.base.as_ptr().cast(), self.size, libc::MADV_DONTNEED) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: we own the range, and by the contract nobody keeps a pointer past this.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
    }
}

/// Makes the heap return free memory at its end to the system at once. Without it, the C library raises that threshold
/// by itself to tens of MiB, and keeps as much in each thread's arena for ever. Tables get mappings of their own, which
/// leave no hole: from what size on, the library has raised by itself, too, in a process that had large ones before.
pub fn keep_heap_small() {
    // SAFETY: mallopt may be called at any time.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
    }
}

/// Makes all words of a large table of the heap zero, and gives its memory back to the system until they are used.
pub fn zero_and_let_go<const N: usize>(table: &mut [[u64; N]]) {
    let bytes = size_of_val(table);
    let start = table.as_mut_ptr() as usize;
    let (first, last) = (start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
    if first >= last {
        return table.fill([0; N]);
    }
    // SAFETY: whole pages of a slice that is ours alone, of plain integers; private memory without a file reads as zeroes
    // afterwards. What the heap knows of the block lies before it.
    let result = unsafe { libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_DONTNEED) };
    let whole = if result == 0 { first - start..last - start } else { 0..0 };
    for (index, row) in table.iter_mut().enumerate() {
        let at = index * size_of::<[u64; N]>();
        if !(whole.contains(&at) && at + size_of::<[u64; N]>() <= whole.end) {
            *row = [0; N];
        }
    }
}

/// Gives the part of the calling thread's stack that is not in use back to the system: what needed much of it is over.
pub fn trim_stack() {
    let here = 0_u8;
    // SAFETY: the attributes are filled by the call before they are read, and destroyed once. The advice concerns addresses of
    // our own stack well below the frame of this function, where nothing is that counts. The first thread's stack is asked
    // for in no file, which a jailed process could not read: below what is mapped of it the system keeps a gap, where the
    // advice fails and the walk ends.
    unsafe {
        if libc::gettid() == libc::getpid() {
            give_back_below((&raw const here) as usize, 0);
            return;
        }
        let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
        if libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) != 0 {
            return;
        }
        let (mut base, mut size) = (std::ptr::null_mut(), 0);
        let result = libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut base, &raw mut size);
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        let here = (&raw const here) as usize;
        if result == 0 && here < base as usize + size {
            give_back_below(here, base as usize);
        }
    }
}

/// Gives the pages of a stack back that lie well below a frame's address, down to `low` or to where nothing is mapped.
///
/// # Safety
/// All of what is mapped between them must be of the calling thread's stack.
unsafe fn give_back_below(frame: usize, low: usize) {
    let mut at = frame.saturating_sub(STACK_IN_USE) / PAGE * PAGE;
    let low = low.max(at.saturating_sub(MOST_STACK)).next_multiple_of(PAGE);
    // SAFETY: what the caller promised, and nothing lives below a frame.
    while at > low && unsafe { libc::madvise((at - PAGE) as *mut libc::c_void, PAGE, libc::MADV_DONTNEED) } == 0 {
        at -= PAGE;
    }
}

/// Bytes below a frame that signal handlers and the functions it calls may use meanwhile.
const STACK_IN_USE: usize = 64 << 10;
/// Bytes of a stack that are looked at.
const MOST_STACK: usize = 16 << 20;

/// Gives memory that the heap holds free back to the system.
pub fn trim_heap() {
    // SAFETY: malloc_trim may be called at any time.
    unsafe { libc::malloc_trim(0) };
}

/// Makes an anonymous file of `size` bytes that lives in memory. Pages cost nothing until they are written.
pub fn memfd(name: &std::ffi::CStr, size: u64) -> io::Result<File> {
    // SAFETY: plain system call on a valid C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    Ok(file)
}

/// Whether nobody can write to a file in memory any more, nor cut it: whoever maps it may rely on its content.
#[must_use]
pub fn is_sealed(file: &File) -> bool {
    // SAFETY: plain system call on a descriptor that we hold.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    let needed = libc::F_SEAL_SHRINK | libc::F_SEAL_WRITE;
    seals >= 0 && seals & needed == needed
}

/// Gives the memory behind `size` bytes of a memfd back to the system; they read as zeroes afterwards.
pub fn punch_hole(file: &File, offset: u64, size: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: plain system call on a descriptor that we hold.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, size as i64) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A value at a fixed address, with `below` bytes of its own before it and an inaccessible page on either side.
#[derive(Debug)]
pub struct Placed<T> {
    value: NonNull<T>,
    /// Owns the addresses; goes after the value.
    _map: Map,
}

// SAFETY: Placed owns its T as a Box would.
unsafe impl<T: Send> Send for Placed<T> {}

impl<T> Placed<T> {
    /// Moves a value to its place.
    pub fn new(below: usize, value: T) -> io::Result<Self> {
        let below = below.next_multiple_of(PAGE.max(align_of::<T>()));
        let middle = size_of::<T>().next_multiple_of(PAGE);
        let map = Map::anonymous(PAGE + below + middle + PAGE)?;
        map.protect(0, PAGE, Protection::None)?;
        map.protect(PAGE + below + middle, PAGE, Protection::None)?;
        // SAFETY: the offset is inside the map.
        let place: *mut T = unsafe { map.base().as_ptr().add(PAGE + below) }.cast();
        assert!(place.is_aligned());
        let slot = NonNull::new(place).ok_or_else(|| io::Error::other("null place"))?;
        // SAFETY: the place is aligned (checked), writable and as large as T.
        unsafe { place.write(value) };
        Ok(Placed { value: slot, _map: map })
    }
}

impl<T> std::ops::Deref for Placed<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: initialized in `new`, owned by us, not moved.
        unsafe { self.value.as_ref() }
    }
}

impl<T> std::ops::DerefMut for Placed<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in deref, and `&mut self` is exclusive.
        unsafe { self.value.as_mut() }
    }
}

impl<T> Drop for Placed<T> {
    fn drop(&mut self) {
        // SAFETY: the value is valid and dropped just once; the map goes after it.
        unsafe { std::ptr::drop_in_place(self.value.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_zero_wherever_it_begins() {
        for skipped in [0, 1, 3] {
            let mut table = vec![[7_u64; 4]; 4096];
            zero_and_let_go(&mut table[skipped..]);
            assert!(table[..skipped].iter().all(|row| *row == [7; 4]));
            assert!(table[skipped..].iter().all(|row| *row == [0; 4]));
        }
        let mut small = [[7_u64; 3]; 5];
        zero_and_let_go(&mut small);
        assert_eq!(small, [[0; 3]; 5]);
    }

    #[test]
    fn what_is_on_the_stack_stays() {
        fn deep(depth: u64) -> u64 {
            let block = std::hint::black_box([depth; 1024]);
            if depth == 0 { 0 } else { deep(depth - 1) + block[17] }
        }
        let kept = std::hint::black_box([5_u8; 64 << 10]);
        for _ in 0..3 {
            assert_eq!(deep(100), 5050);
            trim_stack();
        }
        assert!(kept.iter().all(|byte| *byte == 5));
        std::thread::spawn(|| {
            assert_eq!(deep(50), 1275);
            trim_stack();
            assert_eq!(deep(50), 1275);
        })
        .join()
        .unwrap();
    }
}
