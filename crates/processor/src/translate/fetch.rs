//! Where code is: guest RIP -> guest physical address, remembered by page so that following a jump needs no walk.

use memory::Access;
use x86::{Gpa, Gva, PAGE_MASK};

use super::lower::Mode;
use crate::core::Core;

const ENTRIES: usize = 512;

#[derive(Clone, Copy, Debug)]
struct Entry {
    page: u64,
    /// Of the jump caches: when it has moved on, so may the page have.
    generation: u64,
    gpa: u64,
}

#[derive(Debug)]
pub struct FetchCache {
    entries: [Box<[Entry]>; 2],
    /// Counts changes of kernel mappings.
    kernel_generation: u64,
    /// Kernel code ran from a page that is not global, so that a load of CR3 may move it.
    pub has_local_kernel_code: bool,
}

impl FetchCache {
    pub fn new() -> FetchCache {
        let entries = || vec![Entry { page: 1, generation: 0, gpa: 0 }; ENTRIES].into_boxed_slice();
        FetchCache { entries: [entries(), entries()], kernel_generation: 1, has_local_kernel_code: false }
    }

    pub fn forget_kernel(&mut self) {
        self.kernel_generation += 1;
        self.has_local_kernel_code = false;
    }

    /// Forgets user code: the generations of address spaces went round.
    pub fn forget_user(&mut self) {
        for entry in &mut self.entries[1] {
            entry.page = 1;
        }
    }

    /// Translates a code address; `None` when the fetch faults.
    pub fn find(&mut self, core: &mut Core<'_>, rip: u64, mode: Mode) -> Option<Gpa> {
        let user = mode.is_user();
        let page = rip & !PAGE_MASK;
        let now = if user { core.vcpu.jumps.user_generation } else { self.kernel_generation };
        let entry = &mut self.entries[usize::from(user)][(page >> 12) as usize % ENTRIES];
        if entry.page == page && entry.generation == now {
            return Some(Gpa(entry.gpa | rip & PAGE_MASK));
        }
        let address = Gva(rip);
        if !address.is_canonical() {
            return None;
        }
        let translation = core.translate(address, Access::fetch(user)).ok()?;
        let pages = if user { &mut core.vcpu.user_code } else { &mut core.vcpu.kernel_code };
        pages.insert(address, translation.page_size);
        self.has_local_kernel_code |= !user && !translation.global;
        *entry = Entry { page, generation: now, gpa: translation.gpa.0 & !PAGE_MASK };
        Some(translation.gpa)
    }
}
