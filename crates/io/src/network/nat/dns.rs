//! The one name that is answered here and not by the host's name servers: that of the host itself. Source: RFC 1035, 4.
//! "Messages".

use std::net::IpAddr;

use super::config::{GATEWAY, GATEWAY6, HOST_NAME};

const HEADER_BYTES: usize = 12;
const ADDRESS: u16 = 1;
const ADDRESS6: u16 = 28;
const INTERNET: u16 = 1;
const SECONDS: u32 = 60;
/// A pointer to the name in the question, 4.1.4 "Message compression".
const NAME_OF_QUESTION: [u8; 2] = [0xc0, HEADER_BYTES as u8];

/// The answer to a query for our own name; `None` for every other message.
#[must_use]
pub fn answer(query: &[u8], has_ipv6: bool) -> Option<Vec<u8>> {
    // A standard query (QR and OPCODE zero) with one question.
    if query.len() < HEADER_BYTES || query[2] & 0xf8 != 0 || query[4..6] != [0, 1] {
        return None;
    }
    let mut rest = &query[HEADER_BYTES..];
    for label in HOST_NAME.split('.') {
        let (size, after) = rest.split_first()?;
        let (found, after) = after.split_at_checked(usize::from(*size))?;
        if !found.eq_ignore_ascii_case(label.as_bytes()) {
            return None;
        }
        rest = after;
    }
    let [0, a, b, c, d, ..] = rest else { return None };
    let (kind, class) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
    let address: Option<IpAddr> = match kind {
        ADDRESS if class == INTERNET => Some(GATEWAY.into()),
        ADDRESS6 if class == INTERNET && has_ipv6 => Some(GATEWAY6.into()),
        _ => None,
    };
    let question = query.len() - rest.len() + 5;
    let mut answer = query[..question].to_vec();
    // An answer, by somebody who knows; recursion as it was asked for, and to be had.
    answer[2] = 0x84 | query[2] & 1;
    answer[3] = 0x80;
    answer[6..12].copy_from_slice(&[0, u8::from(address.is_some()), 0, 0, 0, 0]);
    if let Some(address) = address {
        answer.extend(NAME_OF_QUESTION);
        answer.extend(kind.to_be_bytes());
        answer.extend(class.to_be_bytes());
        answer.extend(SECONDS.to_be_bytes());
        match address {
            IpAddr::V4(address) => {
                answer.extend([0, 4]);
                answer.extend(address.octets());
            }
            IpAddr::V6(address) => {
                answer.extend([0, 16]);
                answer.extend(address.octets());
            }
        }
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            query.push(label.len() as u8);
            query.extend(label.bytes());
        }
        query.push(0);
        query.extend(kind.to_be_bytes());
        query.extend(INTERNET.to_be_bytes());
        query
    }

    #[test]
    fn the_name_of_the_host_is_its_gateway() {
        let asked = query("Host.RingZero.internal", ADDRESS);
        let given = answer(&asked, true).unwrap();
        assert_eq!(given[..2], [0xab, 0xcd]);
        assert_eq!(given[2..12], [0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
        assert_eq!(given[given.len() - 4..], GATEWAY.octets());
        let given = answer(&query(HOST_NAME, ADDRESS6), true).unwrap();
        assert_eq!(given[given.len() - 16..], GATEWAY6.octets());
        // There is such a name, but nothing of that kind.
        assert_eq!(answer(&query(HOST_NAME, ADDRESS6), false).unwrap()[6..8], [0, 0]);
        assert_eq!(answer(&query(HOST_NAME, 16), true).unwrap()[6..8], [0, 0]);
    }

    #[test]
    fn other_names_and_nonsense_are_for_others() {
        assert_eq!(answer(&query("host.ringzero.example", ADDRESS), true), None);
        assert_eq!(answer(&query("a.host.ringzero.internal", ADDRESS), true), None);
        let whole = query(HOST_NAME, ADDRESS);
        for size in 0..whole.len() {
            assert_eq!(answer(&whole[..size], true), None, "{size}");
        }
    }
}
