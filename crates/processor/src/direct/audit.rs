//! The audit of what processes have mapped: nothing that the pmap does not know of, and nothing that others have can be stored to.

use std::collections::HashSet;

use host::tracee::Rights;
use memory::GuestMemory;
use memory::audit::Audit;
use x86::{Gva, PAGE_SIZE, Ppn};

use super::Direct;
use super::space::{Space, generation};
use crate::vcpu::Vcpu;

impl Direct {
    /// Compares what is mapped with the pmap. The VCPU stands still, and has obeyed its requests.
    pub fn audit(&self, vcpu: &Vcpu, memory: &GuestMemory, audit: &mut Audit) {
        let dropped = &vcpu.tlb.dropped;
        if dropped.all_moved || dropped.are_many {
            // Everything is looked at before a process runs again.
            return;
        }
        let moved: HashSet<Ppn> = dropped.moved.iter().map(|(ppn, _)| *ppn).collect();
        for space in &self.spaces {
            space.audit(vcpu, memory, &moved, audit);
        }
    }
}

impl Space {
    fn audit(&self, vcpu: &Vcpu, memory: &GuestMemory, moved: &HashSet<Ppn>, audit: &mut Audit) {
        // Of another address space, or of an earlier generation, rights are compared when the process is to run.
        let is_current = self.generation == generation(vcpu);
        for (page, ppn, rights) in self.mapped() {
            audit.translations += 1;
            if moved.contains(&ppn) {
                continue;
            }
            let Some(entry) = memory.pmap().get(ppn) else {
                audit.find(format!("the process of {:#x} has {page} mapped, which is no RAM", self.root));
                continue;
            };
            let is_listed = self.common.get(&ppn).is_some_and(|pages| pages.contains(&page));
            let sentence = match (entry.state().is_read_only(), rights) {
                _ if entry.mpn().is_none() => "is not in memory",
                (true, Rights::Write) => "can be stored to, and others have the page",
                (true, _) if !is_listed => "is not listed, and others have the page",
                (true, _) if !entry.holders().has(vcpu.number) => {
                    "is held by a processor that the pmap does not know of"
                }
                (false, Rights::Write) if is_current && (entry.is_traced() || !entry.writers().has(vcpu.number)) => {
                    "can be stored to, and that would be noticed by nobody"
                }
                _ => continue,
            };
            audit.find(format!("the process of {:#x}: {page} of page {ppn} {sentence}", self.root));
        }
    }

    /// Every page that is mapped: its address, the guest's page, and the rights.
    fn mapped(&self) -> impl Iterator<Item = (Gva, Ppn, Rights)> {
        self.regions.iter().flat_map(|(first, held)| {
            held.rights.iter().enumerate().filter_map(move |(index, rights)| {
                let ppn = held.region.reached(held.entries[index]).ppn;
                Some((Gva(first + index as u64 * PAGE_SIZE), ppn, (*rights)?))
            })
        })
    }
}
