//! How the guest finds the gateway's card, and over IPv6 its own address. Sources: RFC 826 (ARP), RFC 4861 (neighbour
//! discovery), RFC 8106 (name servers in router advertisements).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Common;
use super::config::{GATEWAY, GATEWAY6, PREFIX6, RESOLVER, RESOLVER6, ROUTER, ROUTER6};
use super::udp::message;
use crate::network::Mac;
use crate::network::frame::{ETHERNET_BYTES, Frame};
use crate::network::packet::{self, ARP, ICMP6, take};

/// Ethernet and IPv4, with addresses of 6 and 4 bytes, and a request.
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const OTHER_CONFIGURATION: u8 = 0x40;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Options: who says it, a prefix, the MTU, name servers.
const SOURCE_CARD: u8 = 1;
const TARGET_CARD: u8 = 2;
const PREFIX: u8 = 3;
const MTU: u8 = 5;
const NAME_SERVERS: u8 = 25;
const LIFETIME_SECONDS: u32 = 86400;

/// The answer to a guest that asks whose an address is. Those of services are ours, too: a guest may take them for near ones.
#[must_use]
pub fn answer_arp(frame: &[u8], common: &Common) -> Option<Frame> {
    let body = frame.get(ETHERNET_BYTES..ETHERNET_BYTES + 28)?;
    let asked = Ipv4Addr::from(take::<4>(body, 24));
    let is_service = common.config.services.iter().any(|service| service.address.ip() == IpAddr::V4(asked));
    if body[..8] != REQUEST || ![GATEWAY, RESOLVER].contains(&asked) && !is_service {
        return None;
    }
    let mut reply = packet::ethernet(ROUTER, Mac(take(body, 8)), ARP);
    reply.extend(REPLY);
    reply.extend(ROUTER.0);
    reply.extend(asked.octets());
    reply.extend(&body[8..18]);
    Some(Frame::plain(reply))
}

/// The answer to a message of neighbour discovery; `None` where there is none.
#[must_use]
pub fn answer_icmp6(source: IpAddr, data: &[u8], common: &Common) -> Option<Frame> {
    if !common.config.has_ipv6 {
        return None;
    }
    let is_nobody = source.is_unspecified();
    let target = if is_nobody { ALL_NODES.into() } else { source };
    match *data.first()? {
        SOLICITATION => {
            let asked = Ipv6Addr::from(take::<16>(data, 8));
            if ![GATEWAY6, RESOLVER6, ROUTER6].contains(&asked) || data.len() < 24 {
                return None;
            }
            // A router, that was asked, and the last word: flags of 4.4.
            let flags = if is_nobody { 0xa0 } else { 0xe0 };
            let mut reply = vec![ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
            reply.extend(asked.octets());
            reply.extend([TARGET_CARD, 1]);
            reply.extend(ROUTER.0);
            Some(message(asked.into(), target, ICMP6, reply, common))
        }
        ROUTER_SOLICITATION => {
            let lifetime = 1800_u16.to_be_bytes();
            // RFC 4861, 4.2: who wants to know more may ask by DHCPv6.
            let flags = if common.config.policy.names { OTHER_CONFIGURATION } else { 0 };
            let mut reply =
                vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, flags, lifetime[0], lifetime[1], 0, 0, 0, 0, 0, 0, 0, 0];
            reply.extend([SOURCE_CARD, 1]);
            reply.extend(ROUTER.0);
            reply.extend([MTU, 1, 0, 0]);
            reply.extend(u32::from(common.config.mtu).to_be_bytes());
            // On this link, and for addresses of one's own making.
            reply.extend([PREFIX, 4, 64, 0xc0]);
            reply.extend(LIFETIME_SECONDS.to_be_bytes());
            reply.extend(LIFETIME_SECONDS.to_be_bytes());
            reply.extend([0; 4]);
            reply.extend(PREFIX6.octets());
            if common.config.policy.names {
                reply.extend([NAME_SERVERS, 3, 0, 0]);
                reply.extend(LIFETIME_SECONDS.to_be_bytes());
                reply.extend(RESOLVER6.octets());
            }
            Some(message(ROUTER6.into(), target, ICMP6, reply, common))
        }
        _ => None,
    }
}
