//! The Internet checksum: RFC 1071 "Computing the Internet Checksum", and the pseudo-headers that TCP and UDP begin theirs
//! with: RFC 9293, 3.1 "Header Format", RFC 768, and RFC 8200, 8.1 "Upper-Layer Checksums".

use std::net::IpAddr;

/// A sum of 16-bit words, not folded yet. Bytes are summed as they lie in memory: the sum of swapped words is the swapped sum
/// (RFC 1071, 2. (B)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes, an odd last one as if a zero followed: only the last piece of a packet may have one.
    #[must_use]
    pub fn plus(self, bytes: &[u8]) -> Sum {
        let mut sum = u128::from(self.0);
        let mut eights = bytes.chunks_exact(8);
        for eight in &mut eights {
            let mut word = [0; 8];
            word.copy_from_slice(eight);
            sum += u128::from(u64::from_ne_bytes(word));
        }
        let mut word = [0; 8];
        word[..eights.remainder().len()].copy_from_slice(eights.remainder());
        sum += u128::from(u64::from_ne_bytes(word));
        // Folded by halves: 2^64 counts as 1, as 2^16 does.
        let folded = (sum as u64) as u128 + (sum >> 64);
        Sum((folded as u64).wrapping_add((folded >> 64) as u64))
    }

    /// What TCP and UDP add to theirs: both addresses, the protocol and the length.
    #[must_use]
    pub fn of_pseudo_header(source: IpAddr, target: IpAddr, protocol: u8, length: usize) -> Sum {
        let sum = match (source, target) {
            (IpAddr::V4(source), IpAddr::V4(target)) => Sum::default().plus(&source.octets()).plus(&target.octets()),
            (source, target) => Sum::default().plus(&octets(source)).plus(&octets(target)),
        };
        sum.plus(&(length as u32).to_be_bytes()).plus(&[0, protocol])
    }

    /// The sum itself, as it stands in a packet whose checksum a card is to finish.
    #[must_use]
    pub fn partial(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum: the sum's complement.
    #[must_use]
    pub fn complement(self) -> [u8; 2] {
        let [a, b] = self.partial();
        [!a, !b]
    }
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum word by word, as RFC 1071 has it.
    fn plain(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_be_bytes()
    }

    #[test]
    fn the_sum_is_that_of_the_words() {
        // RFC 1071, 3. "Numerical Examples".
        assert_eq!(Sum::default().plus(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]).partial(), [0xdd, 0xf2]);
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for length in 0..200 {
            let bytes: Vec<u8> = (0..length)
                .map(|_| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random as u8
                })
                .collect();
            assert_eq!(Sum::default().plus(&bytes).partial(), plain(&bytes), "{length} bytes");
            let ones = vec![0xff; length];
            assert_eq!(Sum::default().plus(&ones).partial(), plain(&ones), "{length} ones");
        }
    }
}
