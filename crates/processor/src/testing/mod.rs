//! Comparison of engines with the real processor: random instruction sequences run on the host and in a minimal guest,
//! and must leave the same registers, flags, FPU state, memory and traps.
//!
//! ```no_run
//! use processor::testing::{Campaign, Kinds, Ring, engine};
//! let mut campaign = Campaign::new(engine("interpret")?, Kinds::INTEGER, Ring::User)?;
//! for seed in 0..10_000 {
//!     campaign.check(seed)?; // the error prints seed, shortest failing sequence and the differences
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! From the shell, for as long as one likes, or one seed again (`--list` prints its sequence):
//! ```text
//! cargo run --release -p ringzero-processor --example fuzz -- --engine interpret --minutes 1 --kinds integer
//! cargo run --release -p ringzero-processor --example fuzz -- --engine translate --seed 4711 --count 1 --list
//! ```
//! How a sequence is judged: it starts from random registers with two of them pointing into data pages that host and
//! guest have at the same addresses; RSP points there too. Flags that the manual leaves undefined (as iced-x86 knows them) are
//! followed through the sequence: a sequence that reads one is not made, and those undefined at the end do not count.
//! Traps (#DE, #PF with address and error code, #GP of unaligned operands, #MF, #XM ...) are part of the result.

mod campaign;
mod flags;
mod generate;
mod guest;
pub(crate) mod random;
mod sequence;
mod special;

pub use campaign::{Campaign, Disagreement, Setup};
pub use guest::Ring;
pub use random::Random;
pub use sequence::{Kinds, Sequence};

use crate::Engine;

/// A fresh engine by its name.
///
/// # Errors
/// A sentence: there is no such engine, or the host does not let it be made.
pub fn engine(name: &str) -> Result<Box<dyn Engine>, String> {
    match name {
        "interpret" => Ok(Box::new(crate::interpret::Interpreter::new())),
        "translate" => translator(crate::direct::Choice::Never),
        "direct" => translator(crate::direct::Choice::Always),
        _ => Err(format!("no engine called {name}; there are interpret, translate and direct")),
    }
}

fn translator(direct: crate::direct::Choice) -> Result<Box<dyn Engine>, String> {
    let options = crate::translate::Options { direct, ..Default::default() };
    let made = crate::translate::Translator::new(options);
    Ok(Box::new(made.map_err(|why| format!("no translator: {why}"))?))
}
