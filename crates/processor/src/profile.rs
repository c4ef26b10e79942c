//! Where a processor's time goes. While it runs it says in one word what it is doing (see [`host::sampler`]); a [`Profile`]
//! collects samples of that, and of which guest code the translated code was that ran.

use std::collections::HashMap;
use std::sync::Arc;

use host::sampler::Sampler;
use iced_x86::Code;

/// What a processor does: the low byte of its word. For [`Doing::Interpret`] the iced code of the instruction is above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Doing {
    /// The run loop: looks for what waits.
    Monitor,
    /// Translated code, or the host's signal handling for it.
    Translated,
    /// Between two pieces of translated code: finding the next, linking.
    Dispatch,
    /// Takes note of what went stale.
    Refresh,
    Translate,
    /// Takes in translations that an earlier machine kept, or keeps those of this one.
    Recall,
    /// A walk of the guest's page tables, and the fill of the TLB and the shadow.
    Walk,
    Interpret,
    /// Of a fault or an interrupt, through the guest's IDT.
    Deliver,
    Port,
    Mmio,
    /// MSRs and the task priority of the local APIC.
    Apic,
    /// User code as it stands, in a process of its own, and the way there and back.
    Direct,
    /// Asleep: the guest has nothing to do.
    Idle,
}

impl Doing {
    const ALL: [Doing; 14] = [
        Doing::Monitor,
        Doing::Translated,
        Doing::Dispatch,
        Doing::Refresh,
        Doing::Translate,
        Doing::Recall,
        Doing::Walk,
        Doing::Interpret,
        Doing::Deliver,
        Doing::Port,
        Doing::Mmio,
        Doing::Apic,
        Doing::Direct,
        Doing::Idle,
    ];

    #[must_use]
    pub fn word(self) -> u32 {
        self as u32
    }

    fn name(self) -> &'static str {
        match self {
            Doing::Monitor => "monitor",
            // What is left when its code is counted by itself.
            Doing::Translated => "signals",
            Doing::Dispatch => "dispatch",
            Doing::Refresh => "refresh",
            Doing::Translate => "translate",
            Doing::Recall => "recall",
            Doing::Walk => "walk",
            Doing::Interpret => "interpret",
            Doing::Deliver => "deliver",
            Doing::Port => "port",
            Doing::Mmio => "mmio",
            Doing::Apic => "apic",
            Doing::Direct => "direct",
            Doing::Idle => "idle",
        }
    }
}

/// The word of [`Doing::Interpret`] for one kind of instruction.
#[inline(always)]
#[must_use]
pub fn interpreting(code: Code) -> u32 {
    Doing::Interpret as u32 | (code as u32) << 8
}

/// A kind of host code in the code cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The block of guest code that begins at this RIP.
    Block { rip: u64, is_user: bool },
    /// A block that was dropped since.
    Gone,
    /// From the shadow into the TLB.
    Refill,
    /// Into translated code and out of it: registers, SIMD state.
    Switch,
}

/// Samples of one processor, classed.
#[derive(Debug, Default)]
pub struct Profile {
    /// By what the processor said, where it ran no translated code.
    doings: HashMap<u8, u64>,
    parts: HashMap<Part, u64>,
    /// Samples, and how often it ran on the translator's behalf, by instruction.
    interpreted: HashMap<u16, (u64, u64)>,
}

impl Profile {
    /// Takes in what the sampler has; `part` says whose host code an address is, if it is in a code cache.
    pub fn take(&mut self, sampler: &Arc<Sampler>, part: impl Fn(u64) -> Option<Part>) {
        sampler.take(|sample| {
            let doing = sample.doing as u8;
            match part(sample.rip) {
                Some(part) => *self.parts.entry(part).or_default() += 1,
                None => {
                    *self.doings.entry(doing).or_default() += 1;
                    if doing == Doing::Interpret as u8 {
                        self.interpreted.entry((sample.doing >> 8) as u16).or_default().0 += 1;
                    }
                }
            }
        });
    }

    /// Counts the instruction that was interpreted just now: its word is still the sampler's.
    pub fn count(&mut self, sampler: &Sampler) {
        self.interpreted.entry((sampler.doing() >> 8) as u16).or_default().1 += 1;
    }

    /// Everything, by dotted name.
    #[must_use]
    pub fn counters(&self, lost: u64) -> Vec<(String, u64)> {
        let samples = |one: Doing| self.doings.get(&(one as u8)).copied().unwrap_or(0);
        let mut list: Vec<_> =
            Doing::ALL.iter().map(|one| (format!("profile.{}", one.name()), samples(*one))).collect();
        let (mut user, mut kernel) = (0, 0);
        for name in ["refill", "switch", "gone"] {
            list.push((format!("profile.{name}"), 0));
        }
        for (part, samples) in &self.parts {
            let name = match part {
                Part::Refill => "profile.refill".into(),
                Part::Switch => "profile.switch".into(),
                Part::Gone => "profile.gone".into(),
                Part::Block { rip, is_user } => {
                    *(if *is_user { &mut user } else { &mut kernel }) += samples;
                    format!("profile.{}.{rip:x}", if *is_user { "user_block" } else { "kernel_block" })
                }
            };
            list.push((name, *samples));
        }
        list.extend([("profile.user".into(), user), ("profile.kernel".into(), kernel), ("profile.lost".into(), lost)]);
        for (code, (samples, count)) in &self.interpreted {
            let name = match Code::try_from(usize::from(*code)) {
                // Before the instruction is known.
                Ok(Code::INVALID) | Err(_) => "fetch".into(),
                Ok(code) => format!("{code:?}"),
            };
            list.push((format!("profile.instruction.{name}"), *samples));
            list.push((format!("interpreted.{name}"), *count));
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Lets a sampler see each of some words.
    fn sampled(words: &[u32]) -> Arc<Sampler> {
        let sampler = Arc::<Sampler>::default();
        let sampling = sampler.start(Duration::from_micros(100)).unwrap();
        for word in words {
            sampler.now(*word);
            let seen = sampler.waiting();
            while sampler.waiting() < seen + 3 {
                std::hint::spin_loop();
            }
        }
        drop(sampling);
        sampler
    }

    fn value(profile: &Profile, name: &str) -> u64 {
        let named = |list: Vec<(String, u64)>| list.into_iter().filter(|(one, _)| one == name).map(|(_, n)| n).sum();
        named(profile.counters(0))
    }

    #[test]
    fn samples_are_classed_by_what_the_processor_said() {
        let sampler = sampled(&[Doing::Walk.word(), interpreting(Code::Cpuid)]);
        let mut profile = Profile::default();
        profile.take(&sampler, |_| None);
        profile.count(&sampler);
        assert!(value(&profile, "profile.walk") > 0 && value(&profile, "profile.interpret") > 0);
        assert_eq!(value(&profile, "profile.instruction.Cpuid"), value(&profile, "profile.interpret"));
        assert_eq!((value(&profile, "interpreted.Cpuid"), value(&profile, "profile.idle")), (1, 0));
    }

    #[test]
    fn samples_in_the_code_cache_are_classed_by_whose_code_it_is() {
        let sampler = sampled(&[Doing::Translated.word()]);
        let mut profile = Profile::default();
        profile.take(&sampler, |_| Some(Part::Block { rip: 0x1000, is_user: true }));
        let samples = value(&profile, "profile.user_block.1000");
        assert!(samples > 0);
        assert_eq!((value(&profile, "profile.user"), value(&profile, "profile.signals")), (samples, 0));
    }
}
