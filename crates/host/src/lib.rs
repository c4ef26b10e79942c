//! THE GROUND: what the host system gives us. Memory maps, signals, clocks, events, ranked locks, and the one list of
//! counters. Knows nothing of guests.

pub mod affinity;
pub mod arena;
pub mod clock;
pub mod counters;
pub mod events;
pub mod file;
pub mod folder;
pub mod jail;
pub mod local;
pub mod lock;
pub mod map;
pub mod medium;
pub mod nameless;
pub mod passing;
pub mod private;
pub mod random;
pub mod sampler;
pub mod signal;
pub mod socket;
pub mod tracee;
