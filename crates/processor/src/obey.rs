//! What a processor forgets because others ask for it: pages that are elsewhere now, and the right to store to pages of which
//! others make code.

use memory::GuestMemory;
use memory::machine::source_of;
use memory::writers::Requests;
use x86::{Mpn, Ppn};

use crate::vcpu::Vcpu;

/// To give up the right to store to more pages at once, it is cheaper to forget the whole TLB.
const MANY_PAGES: usize = 16;

impl Vcpu {
    /// Does what others have asked for, if anything. Only the processor's own thread may, or one for which it stands still.
    pub fn obey(&mut self, memory: &GuestMemory) {
        if !memory.seats.is_asked(self.number) {
            return;
        }
        let Requests { protect, forget, forget_all } = memory.seats.take(self.number);
        self.obeyed += 1;
        if !protect.is_empty() {
            self.forget_stores(memory, protect);
        }
        if forget_all {
            self.tlb.flush_all();
            self.tlb.dropped.all_moved = true;
        } else {
            self.forget_pages(memory, &forget);
        }
    }

    fn forget_pages(&mut self, memory: &GuestMemory, pages: &[(Ppn, Mpn)]) {
        let host = |mpn: Mpn| memory.machine().page(mpn).host_address();
        let (own, common): (Vec<_>, Vec<_>) = pages.iter().map(|(_, mpn)| *mpn).partition(|mpn| source_of(*mpn) == 0);
        for mpn in common {
            self.tlb.forget_common(host(mpn));
        }
        if !own.is_empty() {
            self.tlb.forget_pages(&own.into_iter().map(host).collect());
        }
        self.tlb.dropped.note_moved(pages);
    }

    /// Gives up the right to store to pages without a trap.
    pub(crate) fn forget_stores(&mut self, memory: &GuestMemory, pages: impl IntoIterator<Item = Ppn>) {
        let pages: Vec<Ppn> = pages.into_iter().collect();
        if pages.len() > MANY_PAGES {
            self.tlb.flush_all();
        } else {
            self.tlb.protect(pages.iter().filter_map(|ppn| memory.resident(*ppn)));
        }
        for ppn in pages {
            memory.pmap().withdraw_store(ppn, self.number);
        }
    }
}
