//! What a card does to frames: finish checksums, and cut what is larger than the medium. It is done here only for a guest
//! whose driver does not take a frame as it is. Sources: RFC 9293, 3.1 "Header Format"; RFC 791, 3.2 "Discussion"; RFC 8200,
//! 4.5 "Fragment Header"; VIRTIO 1.2, 5.1.6 "Device Operation".

use std::net::IpAddr;

use super::checksum::Sum;
use super::frame::{Cut, ETHERNET_BYTES, Frame, HEADER_BYTES, MOST_BYTES, Offload};
use super::packet::{self, FRAGMENT, TCP, UDP};

/// What a guest's driver takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// Frames whose checksum is not finished.
    pub checksum: bool,
    pub tcp4: bool,
    pub tcp6: bool,
    pub udp: bool,
}

const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;
/// Flags of TCP that only the last piece has (FIN, PSH), or the first (CWR, RFC 3168).
const LAST_ONLY: u8 = 0x09;
const FIRST_ONLY: u8 = 0x80;

/// A frame with the header that a guest wrote before it; `None` where they do not fit each other.
#[must_use]
pub fn checked(header: [u8; HEADER_BYTES], bytes: Vec<u8>) -> Option<Frame> {
    if !(ETHERNET_BYTES..=MOST_BYTES).contains(&bytes.len()) {
        return None;
    }
    let frame = Frame { offload: Offload::parse(header, bytes.len())?, head: bytes, tail: None };
    // Who gets it relies on what it says of itself.
    (frame.offload.cut == Cut::None || parts(&frame).is_some()).then_some(frame)
}

/// Where the parts of a frame begin that is to be cut: the transport's header, and the payload. `None` for one that is not
/// what its sender says.
#[must_use]
pub fn parts(frame: &Frame) -> Option<(usize, usize)> {
    let head = &frame.head;
    let ip = packet::Ip::parse(head.get(ETHERNET_BYTES..)?, frame.len() - ETHERNET_BYTES)?;
    let transport = ETHERNET_BYTES + ip.header;
    let (start, offset) = frame.offload.checksum?;
    let is_v4 = ip.source.is_ipv4();
    let is_ethernet = packet::ether_type(head)? == if is_v4 { packet::IPV4 } else { packet::IPV6 };
    let payload = match frame.offload.cut {
        Cut::Tcp4 | Cut::Tcp6 => {
            if ip.protocol != TCP || offset != TCP_CHECKSUM || is_v4 != (frame.offload.cut == Cut::Tcp4) {
                return None;
            }
            transport + usize::from(head.get(transport + 12)? >> 4) * 4
        }
        Cut::Udp if ip.protocol == UDP && offset == UDP_CHECKSUM => transport + 8,
        _ => return None,
    };
    let least = if ip.protocol == TCP { 20 } else { 8 };
    // The packet ends where the frame does: what a card cuts has nothing behind it.
    let is_whole = ip.header + ip.length == frame.len() - ETHERNET_BYTES && !ip.is_fragment;
    let fits = payload >= transport + least && payload <= head.len();
    (is_ethernet && usize::from(start) == transport && is_whole && fits).then_some((transport, payload))
}

/// Gives `each` the frames that a guest gets for this one.
pub fn fit(mut frame: Frame, abilities: Abilities, mut each: impl FnMut(Frame)) {
    let takes = abilities.checksum
        && match frame.offload.cut {
            Cut::None => true,
            Cut::Tcp4 => abilities.tcp4,
            Cut::Tcp6 => abilities.tcp6,
            Cut::Udp => abilities.udp,
        };
    if takes {
        return each(frame);
    }
    if frame.offload.cut == Cut::None {
        finish_checksum(&mut frame);
        return each(frame);
    }
    let Some((transport, payload)) = parts(&frame) else { return };
    let cut = frame.offload.cut;
    let piece = usize::from(frame.offload.piece);
    frame.join();
    if cut == Cut::Udp {
        finish_checksum(&mut frame);
        fragment(&frame.head, transport, piece, each);
    } else {
        segment(&frame.head, transport, payload, piece, each);
    }
}

/// Replaces a sum that was begun by the checksum.
pub fn finish_checksum(frame: &mut Frame) {
    let Some((start, offset)) = frame.offload.checksum.take() else { return };
    let (start, place) = (usize::from(start), usize::from(start) + usize::from(offset));
    let bytes = frame.join();
    if place + 2 > bytes.len() {
        return;
    }
    let mut sum = Sum::default().plus(&bytes[start..]).complement();
    // RFC 768: a checksum of zero would say that there is none.
    if sum == [0, 0] && usize::from(offset) == usize::from(UDP_CHECKSUM) {
        sum = [0xff; 2];
    }
    bytes[place..place + 2].copy_from_slice(&sum);
}

fn segment(whole: &[u8], transport: usize, payload: usize, piece: usize, mut each: impl FnMut(Frame)) {
    let first_number = u32::from_be_bytes(packet::take(whole, transport + 4));
    let flags = whole[transport + 13];
    let is_v4 = whole[ETHERNET_BYTES] >> 4 == 4;
    let count = (whole.len() - payload).div_ceil(piece).max(1);
    for number in 0..count {
        let from = payload + number * piece;
        let data = &whole[from..(from + piece).min(whole.len())];
        let mut bytes = Vec::with_capacity(payload + data.len());
        bytes.extend_from_slice(&whole[..payload]);
        bytes.extend_from_slice(data);
        let sequence = first_number.wrapping_add((number * piece) as u32);
        bytes[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
        let dropped = if number == 0 { 0 } else { FIRST_ONLY } | if number + 1 == count { 0 } else { LAST_ONLY };
        bytes[transport + 13] = flags & !dropped;
        packet::set_lengths(&mut bytes, transport);
        if is_v4 {
            let id = u16::from_be_bytes(packet::take(whole, ETHERNET_BYTES + 4)).wrapping_add(number as u16);
            bytes[ETHERNET_BYTES + 4..ETHERNET_BYTES + 6].copy_from_slice(&id.to_be_bytes());
            packet::finish_ipv4(&mut bytes);
        }
        let (source, target) = addresses(&bytes);
        let length = bytes.len() - transport;
        let place = transport + usize::from(TCP_CHECKSUM);
        bytes[place..place + 2].copy_from_slice(&[0; 2]);
        let sum = Sum::of_pseudo_header(source, target, TCP, length).plus(&bytes[transport..]).complement();
        bytes[place..place + 2].copy_from_slice(&sum);
        each(Frame::plain(bytes));
    }
}

fn addresses(bytes: &[u8]) -> (IpAddr, IpAddr) {
    let ip = ETHERNET_BYTES;
    if bytes[ip] >> 4 == 4 {
        (packet::take::<4>(bytes, ip + 12).into(), packet::take::<4>(bytes, ip + 16).into())
    } else {
        (packet::take::<16>(bytes, ip + 8).into(), packet::take::<16>(bytes, ip + 24).into())
    }
}

/// Cuts an IP packet, whose payload begins at `transport`.
fn fragment(whole: &[u8], transport: usize, piece: usize, mut each: impl FnMut(Frame)) {
    let is_v4 = whole[ETHERNET_BYTES] >> 4 == 4;
    let piece = (piece / 8 * 8).max(8);
    let payload = &whole[transport..];
    for from in (0..payload.len()).step_by(piece) {
        let data = &payload[from..(from + piece).min(payload.len())];
        let is_last = from + data.len() == payload.len();
        let mut bytes = whole[..transport].to_vec();
        if is_v4 {
            let place = (from / 8) as u16 | if is_last { 0 } else { packet::MORE_FRAGMENTS };
            bytes[ETHERNET_BYTES + 6..ETHERNET_BYTES + 8].copy_from_slice(&place.to_be_bytes());
        } else {
            let place = (from as u16) & !7 | u16::from(!is_last);
            let mut header = [bytes[ETHERNET_BYTES + 6], 0, 0, 0, 0, 0, 0, 0];
            header[2..4].copy_from_slice(&place.to_be_bytes());
            // All fragments of a packet have one number: its checksum will do.
            header[4..6].copy_from_slice(&packet::take::<2>(whole, transport + usize::from(UDP_CHECKSUM)));
            bytes[ETHERNET_BYTES + 6] = FRAGMENT;
            bytes.extend(header);
        }
        bytes.extend_from_slice(data);
        packet::set_lengths(&mut bytes, transport);
        if is_v4 {
            packet::finish_ipv4(&mut bytes);
        }
        each(Frame::plain(bytes));
    }
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;
