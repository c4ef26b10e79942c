//! An Ethernet frame on its way, with what a card may be asked to do to it. Source: VIRTIO 1.2, 5.1.6 "Device Operation".

use std::ops::Range;
use std::sync::Arc;

/// `struct virtio_net_hdr`, with its count of buffers.
pub const HEADER_BYTES: usize = 12;
/// Destination, source and type.
pub const ETHERNET_BYTES: usize = 14;
/// The largest IP packet in its frame, with one tag (IEEE 802.1Q) that a guest may have added.
pub const MOST_BYTES: usize = 65535 + ETHERNET_BYTES + 4;

/// Flags and kinds of segmentation, 5.1.6 "Device Operation".
const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCP6: u8 = 4;
/// Beside a kind: a packet with congestion marks, RFC 3168. Segments are marked as the whole was, so it tells us nothing.
const GSO_ECN: u8 = 0x80;

/// How a frame that is larger than its medium is to be cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cut {
    #[default]
    None,
    /// TCP segments.
    Tcp4,
    Tcp6,
    /// Fragments of a UDP datagram.
    Udp,
}

/// What is left to do to a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Where the bytes begin whose sum is missing, and where it goes, from there.
    pub checksum: Option<(u16, u16)>,
    pub cut: Cut,
    /// Bytes of payload that each piece may have.
    pub piece: u16,
}

impl Offload {
    /// Reads what a guest wrote before a frame of `length` bytes; `None` where it makes no sense.
    #[must_use]
    pub fn parse(header: [u8; HEADER_BYTES], length: usize) -> Option<Offload> {
        let [flags, kind, _, _, c, d, e, f, g, h, ..] = header;
        let piece = u16::from_le_bytes([c, d]);
        let (start, offset) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        let checksum = (flags & NEEDS_CHECKSUM != 0).then_some((start, offset));
        if checksum.is_some() && usize::from(start) + usize::from(offset) + 2 > length {
            return None;
        }
        let cut = match kind & !GSO_ECN {
            GSO_NONE => return Some(Offload { checksum, ..Offload::default() }),
            GSO_TCP4 => Cut::Tcp4,
            GSO_TCP6 => Cut::Tcp6,
            GSO_UDP => Cut::Udp,
            _ => return None,
        };
        // 5.1.6.2.1: a packet that is to be cut has a checksum to be finished, and pieces have a size.
        (checksum.is_some() && piece != 0).then_some(Offload { checksum, cut, piece })
    }

    /// What a driver finds before a frame, the headers of which have `headers` bytes, in `buffers` of its buffers.
    #[must_use]
    pub fn to_bytes(self, headers: u16, buffers: u16) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        if let Some((start, offset)) = self.checksum {
            bytes[0] = NEEDS_CHECKSUM;
            bytes[6..8].copy_from_slice(&start.to_le_bytes());
            bytes[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        bytes[1] = match self.cut {
            Cut::None => GSO_NONE,
            Cut::Tcp4 => GSO_TCP4,
            Cut::Tcp6 => GSO_TCP6,
            Cut::Udp => GSO_UDP,
        };
        if self.cut != Cut::None {
            bytes[2..4].copy_from_slice(&headers.to_le_bytes());
            bytes[4..6].copy_from_slice(&self.piece.to_le_bytes());
        }
        bytes[10..12].copy_from_slice(&buffers.to_le_bytes());
        bytes
    }
}

/// Bytes that several may hold: those that wait to be acknowledged are those that were sent.
#[derive(Clone, Debug)]
pub struct Payload {
    bytes: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Payload {
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Payload {
        let range = 0..bytes.len();
        Payload { bytes: Arc::new(bytes), range }
    }

    /// All but the first `count` bytes.
    #[must_use]
    pub fn without(&self, count: usize) -> Payload {
        let start = (self.range.start + count).min(self.range.end);
        Payload { bytes: Arc::clone(&self.bytes), range: start..self.range.end }
    }

    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.range.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

#[derive(Clone, Debug, Default)]
pub struct Frame {
    pub offload: Offload,
    /// The frame, or its beginning: all headers at least.
    pub head: Vec<u8>,
    /// What comes behind the head.
    pub tail: Option<Payload>,
}

impl Frame {
    /// A frame that needs nothing done.
    #[must_use]
    pub fn plain(head: Vec<u8>) -> Frame {
        Frame { offload: Offload::default(), head, tail: None }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.tail().len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[must_use]
    pub fn tail(&self) -> &[u8] {
        self.tail.as_ref().map_or(&[], Payload::bytes)
    }

    /// All of it in one piece.
    pub fn join(&mut self) -> &mut Vec<u8> {
        if let Some(tail) = self.tail.take() {
            self.head.extend_from_slice(tail.bytes());
        }
        &mut self.head
    }

    /// Where it goes; `None` for one that is too short to be a frame.
    #[must_use]
    pub fn target(&self) -> Option<super::Mac> {
        self.head.first_chunk().map(|target| super::Mac(*target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_asks_for_is_read_and_checked() {
        let tcp = Offload { checksum: Some((34, 16)), cut: Cut::Tcp4, piece: 1460 };
        assert_eq!(Offload::parse(tcp.to_bytes(54, 1), 3000), Some(tcp));
        // The checksum lies outside the frame.
        assert_eq!(Offload::parse(tcp.to_bytes(54, 1), 51), None);
        for broken in [
            Offload { piece: 0, ..tcp },
            Offload { checksum: None, ..tcp },
            Offload { checksum: Some((u16::MAX, u16::MAX)), ..tcp },
        ] {
            assert_eq!(Offload::parse(broken.to_bytes(54, 1), 3000), None, "{broken:?}");
        }
        let mut unknown = tcp.to_bytes(54, 1);
        unknown[1] = 77;
        assert_eq!(Offload::parse(unknown, 3000), None);
    }
}
