//! The operator's calls on a machine's memory: what is where, and what is to go elsewhere. They may wait for processors, and
//! are never made from a device.

use std::fs::File;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use memory::Paging;
use memory::audit::Audit;
use memory::pmap::State;
use memory::swap::{Statistics, Store};
use memory::worker::{Evicted, Scanned, Worker};
use x86::{Gpa, PAGE_SIZE};

use crate::Error;
use crate::run::Processor;
use crate::vm::Vm;

/// How many pages are where. The sum is the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    pub zero: u64,
    pub private: u64,
    pub shared: u64,
    pub image: u64,
    pub ballooned: u64,
    pub compressed: u64,
    pub swapped: u64,
}

impl Vm {
    fn worker(&self) -> MutexGuard<'_, Worker> {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many pages are in each state.
    #[must_use]
    pub fn page_counts(&self) -> PageCounts {
        let hall = self.hall();
        let [zero, private, shared, image, ballooned, stored] = hall.memory.pmap().counts();
        // The two are counted one after the other while the guest runs.
        let swapped = self.swap_statistics().in_file.min(stored);
        PageCounts { zero, private, shared, image, ballooned, compressed: stored - swapped, swapped }
    }

    /// The state of every page, in the order of guest physical addresses: its place among the fields of [`PageCounts`].
    #[must_use]
    pub fn page_states(&self) -> Vec<u8> {
        let hall = self.hall();
        let pmap = hall.memory.pmap();
        let swap = hall.memory.swap();
        let code = |index: usize| {
            let entry = pmap.get(pmap.at(index))?;
            let is_in_file = entry.slot().is_some_and(|slot| swap.is_some_and(|store| store.is_in_file(slot)));
            Some(if is_in_file { State::Swapped as u8 + 1 } else { entry.state() as u8 })
        };
        (0..pmap.pages() as usize).filter_map(code).collect()
    }

    /// Reads up to `pages` pages in search of zeroes and of pages that others have, too.
    ///
    /// # Errors
    /// [`Error::FromDevice`].
    pub fn scan(&self, pages: usize) -> Result<Scanned, Error> {
        self.not_from_device("memory_scan")?;
        Ok(self.worker().scan(pages))
    }

    /// Ends a period of sampling: pages touched, and sampled. Begins one with `pages` pages.
    ///
    /// # Errors
    /// [`Error::FromDevice`].
    pub fn sample(&self, pages: usize) -> Result<(u64, u64), Error> {
        self.not_from_device("memory_sample")?;
        Ok(self.worker().sample(pages))
    }

    /// Has pages of RAM begin as pages of a sealed file in memory, which many machines map: (address, page in the file, number
    /// of pages) of each run. Before the start, and before anything is written there.
    ///
    /// # Errors
    /// [`Error::Started`], [`Error::NotSealed`], [`Error::Memory`].
    pub fn map_image(&self, file: File, runs: &[(Gpa, u64, u64)]) -> Result<(), Error> {
        if !host::map::is_sealed(&file) {
            return Err(Error::NotSealed);
        }
        if self.control.has_started() {
            return Err(Error::Started);
        }
        let hall = self.hall();
        let pages = file.metadata().map_err(|error| Error::Host { what: "size of an image", error })?.len() / PAGE_SIZE;
        let machine = hall.memory.machine();
        let source = machine.free_source().ok_or(memory::Error::Source(memory::machine::MOST_SOURCES))?;
        machine.add_source(source, file, pages)?;
        for (address, page, count) in runs {
            if address.offset() != 0 {
                return Err(memory::Error::NotRam { address: *address, size: PAGE_SIZE }.into());
            }
            hall.memory.map_image(source, address.ppn(), *page, *count)?;
        }
        Ok(())
    }

    /// Puts up to `pages` pages into the swap store.
    ///
    /// # Errors
    /// [`Error::FromDevice`].
    pub fn evict(&self, pages: usize) -> Result<Evicted, Error> {
        self.not_from_device("memory_evict")?;
        Ok(self.worker().evict(pages))
    }

    /// Gives the machine a swap store of at most so many bytes in memory, and in a file in a folder.
    ///
    /// # Errors
    /// [`Error::SwapThere`] the second time; the host's.
    pub fn set_swap(&self, compressed_bytes: u64, file: Option<(&Path, u64)>) -> Result<(), Error> {
        let store = Store::new(compressed_bytes, file).map_err(|error| Error::Host { what: "swap store", error })?;
        if self.hall().memory.set_swap(store) { Ok(()) } else { Err(Error::SwapThere) }
    }

    #[must_use]
    pub fn swap_statistics(&self) -> Statistics {
        self.hall().memory.swap().map(Store::statistics).unwrap_or_default()
    }

    /// Gives memory back that the monitor took for the guest and does not need; says how many pages.
    ///
    /// # Errors
    /// The host's.
    pub fn trim(&self) -> Result<u64, Error> {
        let pages = self.hall().memory.pool().trim()?;
        host::map::trim_heap();
        host::map::trim_stack();
        Ok(pages)
    }

    /// Derives every invariant of the memory again, between two instructions of the guest; see [`Audit`].
    ///
    /// # Errors
    /// [`Error::FromDevice`].
    pub fn audit(&self) -> Result<Audit, Error> {
        self.not_from_device("memory_audit")?;
        // Nobody moves a page meanwhile.
        let _worker = self.worker();
        let hall = self.hall();
        Ok(self.control.between_instructions(|| {
            let _still = hall.platform.still();
            let mut audit = Audit::default();
            hall.memory.audit(&mut audit);
            for (number, processor) in hall.processors.iter().enumerate() {
                let Processor { vcpu, engine, .. } = &mut *processor.lock();
                vcpu.obey(&hall.memory);
                engine.audit(vcpu, &hall.memory, &mut audit);
                hall.memory.audit_translations(&vcpu.tlb, number, &Paging::of(&vcpu.cpu), &mut audit);
            }
            audit
        }))
    }
}
