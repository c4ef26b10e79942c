//! Randomness from the kernel.
//!
//! Contract of the unsafe code: the kernel writes at most as many bytes as the buffer has.

/// Fills the buffer; false when the kernel gives less, which it does only before its generator is seeded.
#[must_use]
pub fn fill(buffer: &mut [u8]) -> bool {
    // SAFETY: pointer and length are those of the buffer.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), libc::GRND_NONBLOCK) };
    usize::try_from(got) == Ok(buffer.len())
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_draws_differ() {
        let (mut first, mut second) = ([0; 16], [0; 16]);
        assert!(super::fill(&mut first) && super::fill(&mut second));
        assert_ne!(first, second);
    }
}
