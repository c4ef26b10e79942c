//! The guest gets its address by DHCP: there is one to give, and it is always the same. Sources: RFC 2131, and RFC 2132 for
//! the options.

use super::config::{BROADCAST, GATEWAY, GUEST, NETMASK, RESOLVER};
use crate::network::packet::take;

pub const SERVER_PORT: u16 = 67;
pub const CLIENT_PORT: u16 = 68;

/// RFC 2131, 2. "Protocol Summary": the fixed part, and the cookie that options begin with.
const FIXED_BYTES: usize = 236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
/// RFC 951: no message is shorter.
const LEAST_BYTES: usize = 300;

const SUBNET_MASK: u8 = 1;
const ROUTER: u8 = 3;
const NAME_SERVER: u8 = 6;
const HOST_NAME: u8 = 12;
const INTERFACE_MTU: u8 = 26;
const BROADCAST_ADDRESS: u8 = 28;
const REQUESTED_ADDRESS: u8 = 50;
const LEASE_TIME: u8 = 51;
const MESSAGE_TYPE: u8 = 53;
const SERVER: u8 = 54;
const END: u8 = 255;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const ORDER: u8 = 3;
const ACKNOWLEDGED: u8 = 5;
const REFUSED: u8 = 6;
const INFORM: u8 = 8;

const LEASE_SECONDS: u32 = 86400;

/// The value of an option.
fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [END, ..] => return None,
            [kind, size, rest @ ..] => {
                let (value, rest) = rest.split_at_checked(usize::from(*size))?;
                if *kind == wanted {
                    return Some(value);
                }
                options = rest;
            }
            _ => return None,
        }
    }
}

/// The answer to a message of the guest's, if it gets one.
#[must_use]
pub fn answer(message: &[u8], name: &str, mtu: u16, names: bool) -> Option<Vec<u8>> {
    let options = message.get(FIXED_BYTES..)?.strip_prefix(&COOKIE)?;
    if message[0] != REQUEST {
        return None;
    }
    // RFC 2131, 4.3.2: a client that has chosen another server is not ours.
    let server = option(options, SERVER);
    if server.is_some_and(|server| server != GATEWAY.octets()) {
        return None;
    }
    let asked = option(options, REQUESTED_ADDRESS).map_or_else(|| take::<4>(message, 12), |asked| take::<4>(asked, 0));
    let kind = match option(options, MESSAGE_TYPE)? {
        [DISCOVER] => OFFER,
        [ORDER] if asked == GUEST.octets() => ACKNOWLEDGED,
        [ORDER] => REFUSED,
        [INFORM] => ACKNOWLEDGED,
        _ => return None,
    };
    let informs = option(options, MESSAGE_TYPE) == Some(&[INFORM]);
    let mut reply = vec![0; FIXED_BYTES];
    reply[0] = REPLY;
    // Kind of hardware, its length, and the transaction's number; then flags, relay and the client's hardware.
    reply[1..3].copy_from_slice(&message[1..3]);
    reply[4..8].copy_from_slice(&message[4..8]);
    reply[10..12].copy_from_slice(&message[10..12]);
    reply[24..44].copy_from_slice(&message[24..44]);
    if informs {
        reply[12..16].copy_from_slice(&message[12..16]);
    } else if kind != REFUSED {
        reply[16..20].copy_from_slice(&GUEST.octets());
    }
    reply.extend(COOKIE);
    let mut add = |kind: u8, value: &[u8]| {
        reply.extend([kind, value.len() as u8]);
        reply.extend(value);
    };
    add(MESSAGE_TYPE, &[kind]);
    add(SERVER, &GATEWAY.octets());
    if kind != REFUSED {
        if !informs {
            add(LEASE_TIME, &LEASE_SECONDS.to_be_bytes());
        }
        add(SUBNET_MASK, &NETMASK.octets());
        add(ROUTER, &GATEWAY.octets());
        add(BROADCAST_ADDRESS, &BROADCAST.octets());
        add(INTERFACE_MTU, &mtu.to_be_bytes());
        if names {
            add(NAME_SERVER, &RESOLVER.octets());
        }
        if !name.is_empty() && name.len() < 64 {
            add(HOST_NAME, name.as_bytes());
        }
    }
    reply.push(END);
    reply.resize(reply.len().max(LEAST_BYTES), 0);
    Some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(kind: u8, more: &[u8]) -> Vec<u8> {
        let mut message = vec![0; FIXED_BYTES];
        message[..3].copy_from_slice(&[REQUEST, 1, 6]);
        message[4..8].copy_from_slice(b"abcd");
        message[28..34].copy_from_slice(&[2, 1, 2, 3, 4, 5]);
        message.extend(COOKIE);
        message.extend([MESSAGE_TYPE, 1, kind]);
        message.extend(more);
        message.push(END);
        message
    }

    #[test]
    fn the_one_address_is_offered_and_given() {
        let offer = answer(&ask(DISCOVER, &[]), "web", 1500, true).unwrap();
        assert_eq!((offer[0], &offer[4..8], &offer[16..20]), (REPLY, &b"abcd"[..], &GUEST.octets()[..]));
        assert_eq!(offer[28..34], [2, 1, 2, 3, 4, 5]);
        let options = &offer[FIXED_BYTES + 4..];
        assert_eq!(option(options, MESSAGE_TYPE), Some(&[OFFER][..]));
        assert_eq!(option(options, ROUTER), Some(&GATEWAY.octets()[..]));
        assert_eq!(option(options, NAME_SERVER), Some(&RESOLVER.octets()[..]));
        assert_eq!(option(options, INTERFACE_MTU), Some(&[5, 220][..]));
        assert_eq!(option(options, HOST_NAME), Some(&b"web"[..]));
        let given = answer(&ask(ORDER, &[REQUESTED_ADDRESS, 4, 10, 0, 2, 15]), "", 1500, false).unwrap();
        let options = &given[FIXED_BYTES + 4..];
        assert_eq!(option(options, MESSAGE_TYPE), Some(&[ACKNOWLEDGED][..]));
        assert_eq!((option(options, NAME_SERVER), option(options, HOST_NAME)), (None, None));
        let refused = answer(&ask(ORDER, &[REQUESTED_ADDRESS, 4, 192, 168, 0, 7]), "", 1500, true).unwrap();
        assert_eq!(option(&refused[FIXED_BYTES + 4..], MESSAGE_TYPE), Some(&[REFUSED][..]));
    }

    #[test]
    fn nonsense_and_what_is_for_others_gets_no_answer() {
        assert_eq!(answer(&ask(DISCOVER, &[SERVER, 4, 1, 2, 3, 4]), "", 1500, true), None);
        assert_eq!(answer(&ask(77, &[]), "", 1500, true), None);
        let whole = ask(ORDER, &[REQUESTED_ADDRESS, 4, 10, 0, 2, 15]);
        for size in 0..whole.len() - 7 {
            assert!(answer(&whole[..size], "", 1500, true).is_none(), "{size}");
        }
        // Options that end in the middle.
        let _ = answer(&ask(DISCOVER, &[REQUESTED_ADDRESS, 200, 1]), "", 1500, true);
        let _ = answer(&ask(DISCOVER, &[REQUESTED_ADDRESS, 1, 9]), "", 1500, true);
    }
}
