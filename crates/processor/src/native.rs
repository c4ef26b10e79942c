//! Runs guest instructions on the host's processor, exactly.

#[cfg(feature = "testing")]
pub mod sequence;
