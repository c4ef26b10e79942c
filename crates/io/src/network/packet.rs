//! The headers of packets, read and written. Sources: RFC 791 (IPv4), RFC 8200 (IPv6), RFC 768 (UDP), IEEE 802.3 (Ethernet).

use std::net::{IpAddr, SocketAddr};

use super::Mac;
use super::checksum::Sum;
use super::frame::{ETHERNET_BYTES, Offload};

/// Types of Ethernet frames.
pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const IPV6: u16 = 0x86dd;

/// Protocols over IP.
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const FRAGMENT: u8 = 44;
pub const ICMP6: u8 = 58;

pub const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_PLACE: u16 = 0x1fff;
const HOPS: u8 = 64;

/// `N` bytes at a place; zeroes where there are not so many.
#[must_use]
pub fn take<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

#[must_use]
pub fn ether_type(frame: &[u8]) -> Option<u16> {
    frame.get(12..14).map(|kind| u16::from_be_bytes([kind[0], kind[1]]))
}

/// The header of an IP packet, either version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    pub source: IpAddr,
    pub target: IpAddr,
    pub protocol: u8,
    /// Bytes of the header, and of what it carries.
    pub header: usize,
    pub length: usize,
    /// A part of a packet: where it belongs, whether others follow, and which packet it is of.
    pub is_fragment: bool,
    pub place: usize,
    pub has_more: bool,
    pub identity: u32,
}

impl Ip {
    /// Reads the header of a packet whose first bytes are here, of `length` that have come in all. Options of IPv4 are passed over;
    /// of the extension headers of IPv6, fragments are known.
    #[must_use]
    pub fn parse(bytes: &[u8], length: usize) -> Option<Ip> {
        match bytes.first()? >> 4 {
            4 => {
                let header = usize::from(bytes[0] & 0xf) * 4;
                let total = usize::from(u16::from_be_bytes(take(bytes, 2)));
                if header < 20 || bytes.len() < header || total < header || total > length {
                    return None;
                }
                let place = u16::from_be_bytes(take(bytes, 6));
                Some(Ip {
                    source: take::<4>(bytes, 12).into(),
                    target: take::<4>(bytes, 16).into(),
                    protocol: bytes[9],
                    header,
                    length: total - header,
                    is_fragment: place & (MORE_FRAGMENTS | FRAGMENT_PLACE) != 0,
                    place: usize::from(place & FRAGMENT_PLACE) * 8,
                    has_more: place & MORE_FRAGMENTS != 0,
                    identity: u32::from(u16::from_be_bytes(take(bytes, 4))),
                })
            }
            6 => {
                let payload = usize::from(u16::from_be_bytes(take(bytes, 4)));
                if bytes.len() < 40 || 40 + payload > length {
                    return None;
                }
                let mut ip = Ip {
                    source: take::<16>(bytes, 8).into(),
                    target: take::<16>(bytes, 24).into(),
                    protocol: bytes[6],
                    header: 40,
                    length: payload,
                    is_fragment: false,
                    place: 0,
                    has_more: false,
                    identity: 0,
                };
                if ip.protocol == FRAGMENT {
                    if payload < 8 || bytes.len() < 48 {
                        return None;
                    }
                    let place = u16::from_be_bytes(take(bytes, 42));
                    (ip.protocol, ip.header, ip.length, ip.is_fragment) = (bytes[40], 48, payload - 8, true);
                    (ip.place, ip.has_more) = (usize::from(place & !7), place & 1 != 0);
                    ip.identity = u32::from_be_bytes(take(bytes, 44));
                }
                Some(ip)
            }
            _ => None,
        }
    }
}

/// Begins a frame.
#[must_use]
pub fn ethernet(source: Mac, target: Mac, kind: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    bytes.extend(target.0);
    bytes.extend(source.0);
    bytes.extend(kind.to_be_bytes());
    bytes
}

/// Adds an IP header for `length` bytes; IPv4's checksum is done.
pub fn add_ip(bytes: &mut Vec<u8>, source: IpAddr, target: IpAddr, protocol: u8, length: usize) {
    match (source, target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            let total = (20 + length) as u16;
            // "Don't fragment", so that it needs no number of its own: RFC 6864, 4.1.
            let mut header = [0x45, 0, 0, 0, 0, 0, 0x40, 0, HOPS, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            header[2..4].copy_from_slice(&total.to_be_bytes());
            header[12..16].copy_from_slice(&source.octets());
            header[16..20].copy_from_slice(&target.octets());
            let sum = Sum::default().plus(&header).complement();
            header[10..12].copy_from_slice(&sum);
            bytes.extend(header);
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend((length as u16).to_be_bytes());
            // RFC 4861, 6.1 and 7.1: neighbours' messages have come over no router.
            bytes.extend([protocol, if protocol == ICMP6 { 255 } else { HOPS }]);
            bytes.extend(source.octets());
            bytes.extend(target.octets());
        }
        // Nobody asks for a packet between the two.
        _ => {}
    }
}

/// Makes the lengths in an IP header, before `transport`, those of the frame.
pub fn set_lengths(bytes: &mut [u8], transport: usize) {
    let total = (bytes.len() - ETHERNET_BYTES) as u16;
    if bytes[ETHERNET_BYTES] >> 4 == 4 {
        bytes[ETHERNET_BYTES + 2..ETHERNET_BYTES + 4].copy_from_slice(&total.to_be_bytes());
    } else {
        bytes[ETHERNET_BYTES + 4..ETHERNET_BYTES + 6].copy_from_slice(&(total - 40).to_be_bytes());
    }
    debug_assert!(transport <= bytes.len());
}

/// Makes the checksum of an IPv4 header right.
pub fn finish_ipv4(bytes: &mut [u8]) {
    let header = usize::from(bytes[ETHERNET_BYTES] & 0xf) * 4;
    let place = ETHERNET_BYTES + 10;
    bytes[place..place + 2].copy_from_slice(&[0; 2]);
    let sum = Sum::default().plus(&bytes[ETHERNET_BYTES..ETHERNET_BYTES + header]).complement();
    bytes[place..place + 2].copy_from_slice(&sum);
}

/// A UDP datagram as the guest sent it.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    pub source: SocketAddr,
    pub target: SocketAddr,
    pub data: &'a [u8],
}

impl<'a> Datagram<'a> {
    #[must_use]
    pub fn parse(ip: &Ip, bytes: &'a [u8]) -> Option<Datagram<'a>> {
        let length = usize::from(u16::from_be_bytes(take(bytes, 4)));
        let data = bytes.get(8..length)?;
        let port = |at| u16::from_be_bytes(take(bytes, at));
        let (source, target) = (SocketAddr::new(ip.source, port(0)), SocketAddr::new(ip.target, port(2)));
        Some(Datagram { source, target, data })
    }
}

/// Adds a UDP header for `data` bytes, with the sum that a card finishes. Begins where the IP header ends.
pub fn add_udp(bytes: &mut Vec<u8>, source: SocketAddr, target: SocketAddr, data: usize) -> Offload {
    let start = bytes.len() as u16;
    bytes.extend(source.port().to_be_bytes());
    bytes.extend(target.port().to_be_bytes());
    bytes.extend(((8 + data) as u16).to_be_bytes());
    bytes.extend(Sum::of_pseudo_header(source.ip(), target.ip(), UDP, 8 + data).partial());
    Offload { checksum: Some((start, 6)), ..Offload::default() }
}
