//! Packets of the guest's that come in fragments: RFC 791, 3.2 "An Example Reassembly Procedure", and RFC 5722, by which
//! fragments that overlap are none.

use std::collections::VecDeque;
use std::net::IpAddr;

use crate::network::packet::Ip;

/// Packets that are incomplete, at most: the oldest goes first.
const MOST_PACKETS: usize = 16;
const MOST_FRAGMENTS: usize = 64;
const MOST_BYTES: usize = 65535;

type Name = (IpAddr, IpAddr, u8, u32);

#[derive(Debug)]
struct Packet {
    name: Name,
    /// In their order, with their places.
    pieces: Vec<(usize, Vec<u8>)>,
    /// Known when the last one has come.
    length: Option<usize>,
}

#[derive(Debug, Default)]
pub struct Fragments {
    packets: VecDeque<Packet>,
}

impl Fragments {
    #[cfg(any(test, feature = "testing"))]
    pub fn bytes(&self) -> usize {
        let pieces = self.packets.iter().flat_map(|packet| &packet.pieces);
        pieces.map(|(_, piece)| piece.len()).sum()
    }

    /// Takes a fragment; gives what the packet carries, when it was the one that was missing.
    pub fn take(&mut self, ip: &Ip, data: &[u8]) -> Option<Vec<u8>> {
        let name = (ip.source, ip.target, ip.protocol, ip.identity);
        let end = ip.place + data.len();
        // All but the last are of whole eights. A packet of IPv4 counts its header (RFC 791, 3.1 "Total Length").
        let most = if ip.source.is_ipv4() { MOST_BYTES - ip.header } else { MOST_BYTES };
        if end > most || data.is_empty() || ip.has_more && !data.len().is_multiple_of(8) {
            return None;
        }
        let at = self.packets.iter().position(|packet| packet.name == name).unwrap_or_else(|| {
            if self.packets.len() == MOST_PACKETS {
                self.packets.pop_front();
            }
            self.packets.push_back(Packet { name, pieces: Vec::new(), length: None });
            self.packets.len() - 1
        });
        let packet = &mut self.packets[at];
        let place = packet.pieces.partition_point(|(place, _)| *place < ip.place);
        let before = place.checked_sub(1).map(|before| &packet.pieces[before]);
        let overlaps = before.is_some_and(|(start, piece)| start + piece.len() > ip.place)
            || packet.pieces.get(place).is_some_and(|(start, _)| *start < end)
            || packet.length.is_some_and(|length| end > length || !ip.has_more)
            || !ip.has_more && packet.pieces.get(place).is_some();
        if overlaps || packet.pieces.len() == MOST_FRAGMENTS {
            self.packets.remove(at);
            return None;
        }
        packet.pieces.insert(place, (ip.place, data.to_vec()));
        if !ip.has_more {
            packet.length = Some(end);
        }
        let have: usize = packet.pieces.iter().map(|(_, piece)| piece.len()).sum();
        if packet.length != Some(have) {
            return None;
        }
        let packet = self.packets.remove(at)?;
        Some(packet.pieces.into_iter().flat_map(|(_, piece)| piece).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(identity: u32, place: usize, has_more: bool) -> Ip {
        Ip {
            source: [10, 0, 2, 15].into(),
            target: [192, 0, 2, 1].into(),
            protocol: 17,
            header: 20,
            length: 0,
            is_fragment: true,
            place,
            has_more,
            identity,
        }
    }

    #[test]
    fn fragments_come_together_in_any_order() {
        let whole: Vec<u8> = (0..100).collect();
        let pieces = [(0, 40, true), (40, 80, true), (80, 100, false)];
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1]] {
            let mut fragments = Fragments::default();
            let mut done = None;
            for index in order {
                let (from, to, more) = pieces[index];
                assert!(done.is_none());
                done = fragments.take(&ip(7, from, more), &whole[from..to]);
            }
            assert_eq!(done.as_ref(), Some(&whole), "{order:?}");
            assert!(fragments.packets.is_empty());
        }
    }

    #[test]
    fn what_overlaps_or_floods_is_dropped() {
        let mut fragments = Fragments::default();
        assert_eq!(fragments.take(&ip(1, 0, true), &[0; 16]), None);
        assert_eq!(fragments.take(&ip(1, 8, false), &[1; 16]), None);
        assert!(fragments.packets.is_empty(), "an overlap ends the packet");
        assert_eq!(fragments.take(&ip(2, 65528, false), &[0; 16]), None);
        assert_eq!(fragments.take(&ip(2, 0, true), &[0; 7]), None);
        assert!(fragments.packets.is_empty());
        for identity in 0..1000 {
            assert_eq!(fragments.take(&ip(identity, 0, true), &[0; 1480]), None);
        }
        assert_eq!(fragments.packets.len(), MOST_PACKETS);
        for number in 0..1000 {
            let _ = fragments.take(&ip(5000, number * 8, true), &[0; 8]);
            let all: usize = fragments.packets.iter().map(|packet| packet.pieces.len()).sum();
            assert!(all <= MOST_FRAGMENTS + MOST_PACKETS);
        }
    }
}
