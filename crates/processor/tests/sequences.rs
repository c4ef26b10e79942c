//! Random instruction sequences run on the host's processor and under an engine, and must end alike: the quick pass. For
//! longer ones `tools/dev fuzz` runs `examples/fuzz.rs`.

use processor::Engine;
use processor::interpret::Interpreter;
use processor::testing::{Campaign, Kinds, Ring, engine};

fn agree(engine: Box<dyn Engine>, kinds: Kinds, ring: Ring, seeds: std::ops::Range<u64>) {
    let mut campaign = Campaign::new(engine, kinds, ring).unwrap();
    for seed in seeds {
        if let Err(disagreement) = campaign.check(seed) {
            panic!("{disagreement}");
        }
    }
    assert!(campaign.traps * 2 < campaign.runs, "most sequences should reach their end");
}

fn interpreter() -> Box<dyn Engine> {
    Box::new(Interpreter::new())
}

#[test]
fn interpreted_integer_instructions() {
    agree(interpreter(), Kinds::INTEGER, Ring::User, 0..4000);
}

#[test]
fn interpreted_simd_instructions() {
    agree(interpreter(), Kinds::SIMD, Ring::User, 0..2500);
}

#[test]
fn interpreted_mixture_in_kernel_mode() {
    agree(interpreter(), Kinds::ALL, Ring::Kernel, 10_000..13_000);
}

/// FXSAVE, the XSAVE family, environments; most of these fault for one reason or another.
#[test]
fn interpreted_state_instructions() {
    let mut campaign = Campaign::new(interpreter(), Kinds::POINTERS, Ring::User).unwrap();
    for seed in 0..2500 {
        if let Err(disagreement) = campaign.check(seed) {
            panic!("{disagreement}");
        }
    }
    assert!(campaign.traps * 4 < campaign.runs * 3, "a good part should reach their end");
}

/// Sequences that end in an XRSTOR or FXRSTOR of an MXCSR with reserved bits: a processor may have loaded the other
/// registers by then.
#[test]
fn what_a_refused_mxcsr_leaves_in_other_registers_does_not_count() {
    for ring in [Ring::User, Ring::Kernel] {
        let mut campaign = Campaign::new(interpreter(), Kinds::POINTERS, ring).unwrap();
        for seed in [1_795_415_033, 1_795_428_258, 1_795_433_551] {
            if let Err(disagreement) = campaign.check(seed) {
                panic!("{disagreement}");
            }
        }
        assert_eq!(campaign.traps, campaign.runs, "each of them ends in a trap");
    }
}

/// The translator does not keep arithmetic flags for a trap when a later instruction of the block overwrites them before
/// any reads them: to keep them would cost every block, and nothing that handles a trap looks at them. So flags at traps do not
/// count here; all else does, and flags at the end of a sequence do.
fn agree_but_for_flags_at_traps(kinds: Kinds, ring: Ring, seeds: std::ops::Range<u64>) {
    let mut campaign = Campaign::new(engine("translate").unwrap(), kinds, ring).unwrap();
    campaign.lenient = true;
    for seed in seeds {
        if let Err(disagreement) = campaign.check(seed) {
            panic!("{disagreement}");
        }
    }
    assert!(campaign.traps * 2 < campaign.runs, "most sequences should reach their end");
}

#[test]
fn translated_integer_instructions() {
    agree_but_for_flags_at_traps(Kinds::INTEGER, Ring::User, 0..4000);
}

#[test]
fn translated_simd_instructions() {
    agree_but_for_flags_at_traps(Kinds::SIMD, Ring::User, 0..2500);
}

#[test]
fn translated_mixture_in_kernel_mode() {
    agree_but_for_flags_at_traps(Kinds::ALL, Ring::Kernel, 10_000..13_000);
}

/// User code as it stands: the host's processor against itself, but for the way there and back, the page tables, and all that
/// the interpreter does between.
fn agree_directly(kinds: Kinds, seeds: std::ops::Range<u64>) {
    let mut campaign = Campaign::new(engine("direct").unwrap(), kinds, Ring::User).unwrap();
    campaign.lenient = true;
    for seed in seeds {
        if let Err(disagreement) = campaign.check(seed) {
            panic!("{disagreement}");
        }
    }
    if campaign.counter("direct.impossible") != 0 {
        eprintln!("skipped: this host lets no process be traced");
        return;
    }
    assert!(campaign.counter("direct.excursions") > campaign.runs / 2, "most sequences should run directly");
    assert_eq!(campaign.counter("direct.processes"), 1);
}

#[test]
fn integer_instructions_as_they_stand() {
    agree_directly(Kinds::INTEGER, 0..1500);
}

#[test]
fn simd_instructions_as_they_stand() {
    agree_directly(Kinds::SIMD, 0..1500);
}

#[test]
fn state_instructions_as_they_stand() {
    agree_directly(Kinds::STATE, 0..1000);
}

/// A harness that sees nothing would agree with everything.
#[test]
fn an_engine_that_does_nothing_is_found_out() {
    struct Idle;
    impl Engine for Idle {
        fn name(&self) -> &'static str {
            "idle"
        }
        fn run(&mut self, core: &mut processor::Core<'_>) -> processor::Exit {
            core.vcpu.cpu.rip += 1;
            processor::Exit::Halt
        }
        fn counters(&self) -> Vec<(&'static str, u64)> {
            Vec::new()
        }
    }
    let mut campaign = Campaign::new(Box::new(Idle), Kinds::INTEGER, Ring::User).unwrap();
    let found = (0..50).filter(|seed| campaign.check(*seed).is_err()).count();
    assert_eq!(found, 50);
}
