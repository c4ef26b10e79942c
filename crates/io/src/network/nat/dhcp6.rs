//! What a guest may ask for over IPv6 beside its address, which it makes itself: who the name server is. Source: RFC 8415, of
//! which this is the stateless part (6.1 "Stateless DHCP"), and RFC 3646 for name servers.

use super::config::{RESOLVER6, ROUTER};

pub const SERVER_PORT: u16 = 547;

/// 7.3 "DHCP Message Types".
const REPLY: u8 = 7;
const INFORMATION_REQUEST: u8 = 11;
/// A type, and the transaction's number, 8. "Client/Server Message Formats".
const HEADER_BYTES: usize = 4;

/// 21. "DHCP Options".
const CLIENT: u16 = 1;
const SERVER: u16 = 2;
const ADDRESSES: [u16; 3] = [3, 4, 25];
const NAME_SERVERS: u16 = 23;
/// 11.4 "DUID Based on Link-Layer Address", on Ethernet.
const DUID_OF_A_CARD: [u8; 4] = [0, 3, 0, 1];
/// 11.1 "DUID Contents".
const MOST_DUID: usize = 130;

fn add(reply: &mut Vec<u8>, kind: u16, value: &[u8]) {
    reply.extend(kind.to_be_bytes());
    reply.extend((value.len() as u16).to_be_bytes());
    reply.extend(value);
}

/// The answer to a guest's message, if it gets one.
#[must_use]
pub fn answer(message: &[u8], names: bool) -> Option<Vec<u8>> {
    let (header, mut options) = message.split_at_checked(HEADER_BYTES)?;
    if header[0] != INFORMATION_REQUEST {
        return None;
    }
    let own = [&DUID_OF_A_CARD[..], &ROUTER.0].concat();
    let mut reply = vec![REPLY, header[1], header[2], header[3]];
    add(&mut reply, SERVER, &own);
    while !options.is_empty() {
        let (kind, rest) = options.split_first_chunk()?;
        let (size, rest) = rest.split_first_chunk()?;
        let (value, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*size)))?;
        match u16::from_be_bytes(*kind) {
            CLIENT if value.len() <= MOST_DUID => add(&mut reply, CLIENT, value),
            CLIENT => return None,
            // 16.12 "Information-request Message": what is for another server, or asks for addresses.
            SERVER if value != own => return None,
            kind if ADDRESSES.contains(&kind) => return None,
            _ => {}
        }
        options = rest;
    }
    if names {
        add(&mut reply, NAME_SERVERS, &RESOLVER6.octets());
    }
    // With two identities it would be longer than a message may be.
    (reply.len() <= 512).then_some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(options: &[(u16, &[u8])]) -> Vec<u8> {
        let mut message = vec![INFORMATION_REQUEST, 1, 2, 3];
        for (kind, value) in options {
            add(&mut message, *kind, value);
        }
        message
    }

    #[test]
    fn who_asks_is_told_the_name_server() {
        let reply = answer(&asked(&[(CLIENT, b"who"), (6, &[0, 23])]), true).unwrap();
        let mut expected = vec![REPLY, 1, 2, 3];
        add(&mut expected, SERVER, &[0, 3, 0, 1, 2, 0x72, 0x7a, 0, 0, 1]);
        add(&mut expected, CLIENT, b"who");
        add(&mut expected, NAME_SERVERS, &RESOLVER6.octets());
        assert_eq!(reply, expected);
        let without = answer(&asked(&[]), false).unwrap();
        assert!(!without.windows(2).any(|two| two == NAME_SERVERS.to_be_bytes()));
    }

    #[test]
    fn nonsense_and_what_is_for_others_gets_no_answer() {
        assert_eq!(answer(&asked(&[(SERVER, b"another")]), true), None);
        assert_eq!(answer(&asked(&[(3, &[0; 12])]), true), None);
        assert_eq!(answer(&asked(&[(CLIENT, &[0; MOST_DUID + 1])]), true), None);
        assert_eq!(answer(&asked(&[(CLIENT, &[0; MOST_DUID][..]); 8]), true), None);
        let mut solicit = asked(&[]);
        solicit[0] = 1;
        assert_eq!(answer(&solicit, true), None);
        let whole = asked(&[(CLIENT, b"who")]);
        for size in (0..HEADER_BYTES).chain(HEADER_BYTES + 1..whole.len()) {
            assert_eq!(answer(&whole[..size], true), None, "{size}");
        }
    }
}
