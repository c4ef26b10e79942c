//! Where the translator hands user code over to direct execution: at returns to it, and wherever it looks for code anyway.

use crate::core::Core;
use crate::direct::{Choice, Ended};
use crate::engine::Exit;

use super::Translator;

impl Translator {
    /// Runs user code as it stands, if that is wanted; `None` when it is to be translated.
    pub(super) fn run_user(&mut self, core: &mut Core<'_>) -> Option<Option<Exit>> {
        if core.vcpu.cpu.cpl() != 3 {
            return None;
        }
        let rip = core.vcpu.cpu.rip;
        let mode = self.mode(&core.vcpu.cpu);
        let page = self.fetches.find(core, rip, mode)?.ppn();
        // It needs the rest of us for single instructions.
        let mut direct = self.direct.take()?;
        let ended = match direct.refuses(core.vcpu, page) {
            true => Ended::Refused,
            false => direct.run(core, &mut |core| self.interpret(core)),
        };
        self.direct = Some(direct);
        match ended {
            Ended::Refused => None,
            Ended::Somewhere => Some(None),
            Ended::Exit(exit) => Some(Some(exit)),
        }
    }

    pub(super) fn begin_user(&mut self, core: &mut Core<'_>) {
        if self.options.direct == Choice::Always && self.direct.is_some() {
            core.vcpu.wants_direct(true);
        }
    }

    /// An event has interrupted the VCPU at RIP.
    pub(super) fn sample_user(&mut self, core: &mut Core<'_>) {
        if let Some(direct) = &mut self.direct {
            direct.sampled(core.vcpu);
        }
    }

    /// The VCPU halts.
    pub(super) fn rest_user(&mut self) {
        if let Some(direct) = &mut self.direct {
            direct.rest();
        }
    }
}
