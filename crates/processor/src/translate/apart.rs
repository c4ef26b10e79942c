//! Blocks whose accesses are checked one by one: where the check of a group found the end of a page among its bytes. The rest
//! of the block runs in such a one, and the next time round the group may lie in one page again.

use x86::Ppn;

use super::blocks::Key;
use super::lower::Mode;
use super::{Next, Translator};
use crate::core::Core;

impl Translator {
    /// The block at the guest's RIP that checks each access by itself: its page, and its entry with flags in memory.
    fn find_apart(&mut self, core: &mut Core<'_>) -> Option<(Ppn, u64)> {
        let rip = core.vcpu.cpu.rip;
        let mode = self.mode(&core.vcpu.cpu);
        let gpa = self.fetches.find(core, rip, mode)?;
        let key = Key { gpa, rip, mode: Mode(mode.0 | Mode::APART) };
        match self.blocks.find(&key) {
            Some(block) if block.is_single => Some((gpa.ppn(), block.entry_slot)),
            Some(_) => None,
            None => self.translate(core, key).map(|(_, slot)| (gpa.ppn(), slot)),
        }
    }

    pub(super) fn enter_apart(&mut self, core: &mut Core<'_>) -> Next {
        self.find_apart(core).map_or(Next::Step, |(_, slot)| Next::Enter(slot))
    }

    /// Goes on apart at an instruction of `block`, and makes the jump whose displacement is at `at` lead there.
    pub(super) fn go_apart(&mut self, core: &mut Core<'_>, block: u32, at: u32, guest: u16) -> Next {
        self.counters.exits_link += 1;
        core.vcpu.cpu.rip = self.blocks.rip(block, guest);
        let from = self.blocks.by_index(block).map(|block| block.key.gpa.ppn());
        let gone = self.code_gone();
        let Some((page, slot)) = self.find_apart(core) else { return Next::Step };
        // The two blocks go together, unless the page was mapped anew since the first was translated.
        if self.code_gone() == gone && !core.memory.code.is_pending(core.vcpu.number) && from == Some(page) {
            self.cache.set_displacement(self.cache.range().start + u64::from(at), slot);
        }
        Next::Enter(slot)
    }
}
