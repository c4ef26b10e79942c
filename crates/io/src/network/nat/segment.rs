//! TCP segments, read and written. Source: RFC 9293, 3.1 "Header Format", and RFC 7323 for the scale of windows.

use std::net::SocketAddr;

use crate::network::checksum::Sum;
use crate::network::frame::{Cut, Frame, Offload, Payload};
use crate::network::packet::{self, TCP};

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;

const END: u8 = 0;
const NOTHING: u8 = 1;
const MAXIMUM: u8 = 2;
const SCALE: u8 = 3;
/// RFC 7323, 2.3: a larger one is taken as this.
const MOST_SCALE: u8 = 14;
/// RFC 9293, 3.7.1: for a peer that says nothing; and what no path is below (RFC 791, 3.2 less headers).
const DEFAULT_MAXIMUM: u16 = 536;
const LEAST_MAXIMUM: u16 = 64;

/// A segment as it came from the guest.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    pub source: SocketAddr,
    pub target: SocketAddr,
    pub number: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
    /// Of a SYN: the most that its sender takes in one segment, and the scale of its windows.
    pub maximum: u16,
    pub scale: Option<u8>,
    pub data: &'a [u8],
}

impl<'a> Segment<'a> {
    #[must_use]
    pub fn parse(ip: &packet::Ip, bytes: &'a [u8]) -> Option<Segment<'a>> {
        let header = usize::from(bytes.get(12)? >> 4) * 4;
        if header < 20 {
            return None;
        }
        let (options, data) = (bytes.get(20..header)?, bytes.get(header..)?);
        let port = |at| u16::from_be_bytes(packet::take(bytes, at));
        let mut segment = Segment {
            source: SocketAddr::new(ip.source, port(0)),
            target: SocketAddr::new(ip.target, port(2)),
            number: u32::from_be_bytes(packet::take(bytes, 4)),
            acknowledged: u32::from_be_bytes(packet::take(bytes, 8)),
            flags: bytes[13],
            window: port(14),
            maximum: DEFAULT_MAXIMUM,
            scale: None,
            data,
        };
        if segment.flags & SYN != 0 {
            segment.read_options(options);
        }
        Some(segment)
    }

    fn read_options(&mut self, mut options: &[u8]) {
        while let [kind, rest @ ..] = options {
            options = match (*kind, rest) {
                (END, _) => return,
                (NOTHING, rest) => rest,
                (kind, [size, rest @ ..]) => {
                    let Some((value, rest)) =
                        usize::from(*size).checked_sub(2).and_then(|size| rest.split_at_checked(size))
                    else {
                        return;
                    };
                    match (kind, value) {
                        (MAXIMUM, [a, b]) => self.maximum = u16::from_be_bytes([*a, *b]).max(LEAST_MAXIMUM),
                        (SCALE, [scale]) => self.scale = Some((*scale).min(MOST_SCALE)),
                        _ => {}
                    }
                    rest
                }
                _ => return,
            };
        }
    }

    #[must_use]
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// How many numbers it takes up.
    #[must_use]
    pub fn span(&self) -> u32 {
        self.data.len() as u32 + u32::from(self.has(SYN)) + u32::from(self.has(FIN))
    }
}

/// What a segment to the guest says.
#[derive(Clone, Copy, Debug)]
pub struct Say {
    pub source: SocketAddr,
    pub target: SocketAddr,
    pub number: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
    /// Of a SYN: what we take in one segment, and the scale of our windows if the guest knows of such.
    pub maximum: Option<u16>,
    pub scale: Option<u8>,
}

impl Say {
    /// A frame with this segment behind `ethernet`; data that is more than `maximum` bytes is for the guest's card to cut.
    #[must_use]
    pub fn frame(&self, mut head: Vec<u8>, data: Option<Payload>, maximum: u16) -> Frame {
        let mut options = Vec::new();
        if let Some(maximum) = self.maximum {
            let [a, b] = maximum.to_be_bytes();
            options.extend([MAXIMUM, 4, a, b]);
            if let Some(scale) = self.scale {
                options.extend([SCALE, 3, scale, NOTHING]);
            }
        }
        let header = 20 + options.len();
        let length = header + data.as_ref().map_or(0, Payload::len);
        packet::add_ip(&mut head, self.source.ip(), self.target.ip(), TCP, length);
        let start = head.len() as u16;
        head.extend(self.source.port().to_be_bytes());
        head.extend(self.target.port().to_be_bytes());
        head.extend(self.number.to_be_bytes());
        head.extend(self.acknowledged.to_be_bytes());
        head.extend([(header as u8 / 4) << 4, self.flags]);
        head.extend(self.window.to_be_bytes());
        head.extend(Sum::of_pseudo_header(self.source.ip(), self.target.ip(), TCP, length).partial());
        head.extend([0, 0]);
        head.extend(options);
        let cut = match data.as_ref().map_or(0, Payload::len) {
            size if size <= usize::from(maximum) => Cut::None,
            _ if self.source.is_ipv4() => Cut::Tcp4,
            _ => Cut::Tcp6,
        };
        let piece = if cut == Cut::None { 0 } else { maximum };
        Frame { offload: Offload { checksum: Some((start, 16)), cut, piece }, head, tail: data }
    }
}
