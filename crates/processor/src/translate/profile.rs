//! Whose code a host address in the code cache is, for the profile.

use super::Translator;
use crate::core::Core;
use crate::profile::Part;

impl Translator {
    pub(super) fn part_at(&self, host: u64) -> Option<Part> {
        if !self.cache.range().contains(&host) {
            return None;
        }
        let key = || self.blocks.holder(host).map(|block| block.key);
        Some(self.stubs.part(host).unwrap_or_else(|| match key() {
            Some(key) => Part::Block { rip: key.rip, is_user: key.mode.is_user() },
            None => Part::Gone,
        }))
    }

    /// Classes the samples that wait: before the blocks that they are of are gone, or when they become many.
    pub(super) fn take_samples(&self, core: &mut Core<'_>) {
        let vcpu = &mut *core.vcpu;
        if let Some(profile) = &mut vcpu.profile {
            profile.take(&vcpu.sampler, |host| self.part_at(host));
        }
    }
}
