//! Files are read into the guest's memory and written from it, without a copy of ours between. The pages are pinned
//! meanwhile, so they stay where they are.

use std::fs::File;
use std::io;

use x86::{Gpa, PAGE_SIZE, Ppn};

use crate::bytes::{self, PageMut, PageRef};
use crate::guest::{GuestMemory, Pinned};

/// Pages that are pinned at a time: 1 MiB.
const MOST_PAGES: usize = 256;

/// A pinned page, and which bytes of it are meant.
struct Part<'m, Page> {
    pinned: Pinned<'m, Page>,
    ppn: Ppn,
    offset: u64,
    size: u64,
}

/// Ranges of memory, page by page.
struct Pages<Ranges> {
    ranges: Ranges,
    /// What is left of the range that was begun.
    address: Gpa,
    size: u64,
}

impl<Ranges: Iterator<Item = (Gpa, u64)>> Pages<Ranges> {
    fn new(ranges: Ranges) -> Self {
        Pages { ranges, address: Gpa(0), size: 0 }
    }

    fn next(&mut self) -> Option<(Gpa, u64)> {
        while self.size == 0 {
            (self.address, self.size) = self.ranges.next()?;
        }
        let (address, size) = (self.address, self.size.min(PAGE_SIZE - self.address.offset()));
        (self.address, self.size) = (Gpa(address.0.wrapping_add(size)), self.size - size);
        Some((address, size))
    }

    /// The next pages, each pinned by `pin`; none at the end.
    fn pinned<'m, Page>(&mut self, pin: impl Fn(Ppn) -> Option<Pinned<'m, Page>>) -> io::Result<Vec<Part<'m, Page>>> {
        let mut parts = Vec::with_capacity(8);
        while parts.len() < MOST_PAGES {
            let Some((address, size)) = self.next() else { break };
            let (ppn, offset) = (address.ppn(), address.offset());
            let pinned = pin(ppn).ok_or_else(|| io::Error::other("a page of the guest's cannot be had"))?;
            parts.push(Part { pinned, ppn, offset, size });
        }
        Ok(parts)
    }
}

fn bytes_of<Page>(parts: &[Part<'_, Page>]) -> u64 {
    parts.iter().map(|part| part.size).sum()
}

impl GuestMemory {
    /// Reads a file from `at` on into ranges of the guest's memory, one after the other, as a device writes.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] when the file ends before; the system's; and when a range is not in memory. Parts
    /// of the ranges may have been written then.
    pub fn read_file(&self, file: &File, mut at: u64, ranges: impl Iterator<Item = (Gpa, u64)>) -> io::Result<()> {
        let mut pages = Pages::new(ranges);
        loop {
            let parts: Vec<Part<'_, PageMut<'_>>> = pages.pinned(|ppn| self.pin_to_write(ppn))?;
            if parts.is_empty() {
                return Ok(());
            }
            let pieces = parts.iter().map(|part| (part.pinned.page(), part.offset, part.size));
            let result = bytes::read_file(file, at, pieces);
            for part in &parts {
                self.note_store(part.ppn, part.offset, part.size, None);
            }
            result?;
            at += bytes_of(&parts);
        }
    }

    /// Writes ranges of the guest's memory to a file from `at` on.
    ///
    /// # Errors
    /// The system's; and when a range is not in memory. Parts of the file may have been written then.
    pub fn write_file(&self, file: &File, mut at: u64, ranges: impl Iterator<Item = (Gpa, u64)>) -> io::Result<()> {
        let mut pages = Pages::new(ranges);
        loop {
            let parts: Vec<Part<'_, PageRef<'_>>> = pages.pinned(|ppn| self.pin(ppn))?;
            if parts.is_empty() {
                return Ok(());
            }
            let pieces = parts.iter().map(|part| (part.pinned.page(), part.offset, part.size));
            bytes::write_file(file, at, pieces)?;
            at += bytes_of(&parts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn ranges_go_to_a_file_and_come_back_across_pages_and_batches() {
        let memory = GuestMemory::new(8 << 20).unwrap();
        let file = host::nameless::nameless_file(&std::env::temp_dir()).unwrap();
        // More pages than a batch has, in ranges that begin and end anywhere.
        let sizes = [5, 4096, 700 * 4096 + 17, 0, 3];
        let mut ranges = Vec::new();
        let mut all = Vec::new();
        let mut address = Gpa(0x1ffe);
        for (index, size) in sizes.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..size).map(|at| (at * 7 + index as u64) as u8).collect();
            memory.write(address, &bytes).unwrap();
            ranges.push((address, size));
            all.extend(bytes);
            address = address.add(size + 9);
        }
        memory.write_file(&file, 11, ranges.iter().copied()).unwrap();
        let mut found = vec![0; all.len()];
        file.read_exact_at(&mut found, 11).unwrap();
        assert!(found == all);
        let other = GuestMemory::new(8 << 20).unwrap();
        other.read_file(&file, 11, ranges.iter().copied()).unwrap();
        let mut at = 0;
        for (address, size) in &ranges {
            let mut found = vec![0; *size as usize];
            other.read(*address, &mut found).unwrap();
            assert!(found == all[at..at + found.len()]);
            at += found.len();
        }
        // A file that ends too soon, and memory that does.
        let error = other.read_file(&file, 12, ranges.iter().copied()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(memory.write_file(&file, 0, [(Gpa((8 << 20) - 1), 2)].into_iter()).is_err());
    }

    #[test]
    fn code_in_a_page_that_is_read_from_a_file_is_stale() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let file = host::nameless::nameless_file(&std::env::temp_dir()).unwrap();
        file.write_all_at(&[0x90; 16], 0).unwrap();
        memory.write(Gpa(0x3000), &[0xcc; 16]).unwrap();
        let _ = memory.trace_code(0, Ppn(3), 0, 16);
        memory.read_file(&file, 0, [(Gpa(0x3008), 8)].into_iter()).unwrap();
        assert!(!memory.pmap().get(Ppn(3)).unwrap().is_traced(), "its trace has been hit");
    }
}
