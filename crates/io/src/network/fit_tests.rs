use std::net::SocketAddr;

use super::*;
use crate::network::Mac;
use crate::network::frame::{Offload, Payload};
use crate::network::packet::{IPV4, IPV6};

const CARD: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn ends(is_v4: bool) -> (SocketAddr, SocketAddr) {
    if is_v4 {
        ("192.0.2.1:80".parse().unwrap(), "10.0.2.15:4000".parse().unwrap())
    } else {
        ("[2001:db8::1]:80".parse().unwrap(), "[2001:db8::2]:4000".parse().unwrap())
    }
}

/// A TCP packet that a card is to cut, with its payload behind the head.
fn tcp(is_v4: bool, data: &[u8], piece: u16, flags: u8) -> Frame {
    let (source, target) = ends(is_v4);
    let mut head = packet::ethernet(CARD, CARD, if is_v4 { IPV4 } else { IPV6 });
    packet::add_ip(&mut head, source.ip(), target.ip(), TCP, 20 + data.len());
    let start = head.len() as u16;
    head.extend([0, 80, 15, 160, 0, 0, 0, 100, 0, 0, 0, 7, 5 << 4, flags, 1, 0]);
    head.extend(Sum::of_pseudo_header(source.ip(), target.ip(), TCP, 20 + data.len()).partial());
    head.extend([0, 0]);
    let cut = if is_v4 { Cut::Tcp4 } else { Cut::Tcp6 };
    let tail = Some(Payload::new(data.to_vec()));
    Frame { offload: Offload { checksum: Some((start, 16)), cut, piece }, head, tail }
}

fn udp(is_v4: bool, data: &[u8], piece: u16) -> Frame {
    let (source, target) = ends(is_v4);
    let mut head = packet::ethernet(CARD, CARD, if is_v4 { IPV4 } else { IPV6 });
    packet::add_ip(&mut head, source.ip(), target.ip(), UDP, 8 + data.len());
    let mut offload = packet::add_udp(&mut head, source, target, data.len());
    (offload.cut, offload.piece) = (Cut::Udp, piece);
    Frame { offload, head, tail: Some(Payload::new(data.to_vec())) }
}

fn fitted(frame: Frame, abilities: Abilities) -> Vec<Frame> {
    let mut all = Vec::new();
    fit(frame, abilities, |piece| all.push(piece));
    all
}

/// The header of a packet and what it carries; all its checksums are right.
fn checked(frame: &Frame) -> (packet::Ip, &[u8]) {
    assert_eq!((frame.offload, frame.tail.is_none()), (Offload::default(), true));
    let bytes = &frame.head[ETHERNET_BYTES..];
    let ip = packet::Ip::parse(bytes, bytes.len()).unwrap();
    assert_eq!(ip.header + ip.length, bytes.len());
    if ip.source.is_ipv4() {
        assert_eq!(Sum::default().plus(&bytes[..ip.header]).partial(), [0xff; 2]);
    }
    let data = &bytes[ip.header..];
    if !ip.is_fragment {
        let sum = Sum::of_pseudo_header(ip.source, ip.target, ip.protocol, data.len()).plus(data);
        assert_eq!(sum.partial(), [0xff; 2]);
    }
    (ip, data)
}

#[test]
fn a_driver_that_takes_it_gets_the_frame_as_it_is() {
    let all = Abilities { checksum: true, tcp4: true, tcp6: true, udp: true };
    for frame in [tcp(true, &[1; 3000], 1000, 0x18), tcp(false, &[1; 3000], 1000, 0x18), udp(true, &[1; 3000], 1000)] {
        assert!(parts(&frame).is_some());
        let same = fitted(frame.clone(), all);
        assert_eq!((same.len(), same[0].offload, same[0].len()), (1, frame.offload, frame.len()));
    }
}

#[test]
fn segments_carry_it_all_and_their_sums_are_right() {
    let data: Vec<u8> = (0..3001_u32).map(|number| number as u8).collect();
    for is_v4 in [true, false] {
        for abilities in [Abilities::default(), Abilities { checksum: true, ..Abilities::default() }] {
            let pieces = fitted(tcp(is_v4, &data, 1000, 0x99), abilities);
            let mut carried: Vec<u8> = Vec::new();
            for (number, piece) in pieces.iter().enumerate() {
                let (_, segment) = checked(piece);
                assert_eq!(u32::from_be_bytes(packet::take(segment, 4)), 100 + 1000 * number as u32);
                // CWR on the first, FIN and PSH on the last.
                assert_eq!(segment[13], [0x90, 0x10, 0x10, 0x19][number]);
                carried.extend(&segment[20..]);
            }
            assert_eq!((pieces.len(), carried == data), (4, true));
        }
    }
}

#[test]
fn datagrams_go_in_fragments() {
    let data: Vec<u8> = (0..5000_u32).map(|number| number as u8).collect();
    for is_v4 in [true, false] {
        let pieces = fitted(udp(is_v4, &data, 1481), Abilities { checksum: true, ..Abilities::default() });
        let mut carried: Vec<u8> = Vec::new();
        for (number, piece) in pieces.iter().enumerate() {
            let (ip, part) = checked(piece);
            assert!(ip.is_fragment && ip.protocol == UDP && ip.place == carried.len());
            assert_eq!(ip.has_more, number + 1 != pieces.len());
            carried.extend(part);
        }
        let (source, target) = ends(is_v4);
        assert_eq!(
            Sum::of_pseudo_header(source.ip(), target.ip(), UDP, carried.len()).plus(&carried).partial(),
            [0xff; 2]
        );
        assert_eq!(carried[8..], data);
    }
}

#[test]
fn what_is_not_what_it_says_is_not_cut() {
    let good = tcp(true, &[1; 3000], 1000, 0x18);
    let with = |change: &dyn Fn(&mut Frame)| {
        let mut frame = good.clone();
        change(&mut frame);
        parts(&frame)
    };
    assert!(with(&|_| {}).is_some());
    assert_eq!(with(&|frame| frame.offload.cut = Cut::Tcp6), None);
    assert_eq!(with(&|frame| frame.offload.cut = Cut::Udp), None);
    assert_eq!(with(&|frame| frame.offload.checksum = Some((35, 16))), None);
    assert_eq!(with(&|frame| frame.offload.checksum = Some((34, 6))), None);
    assert_eq!(with(&|frame| frame.head[13] = 6), None);
    assert_eq!(with(&|frame| frame.head[14] = 0x46), None);
    assert_eq!(with(&|frame| frame.head[17] ^= 1), None, "a length that is not the frame's");
    assert_eq!(with(&|frame| frame.head[20] = 0x20), None, "a fragment");
    assert_eq!(with(&|frame| frame.head[23] = UDP), None);
    assert_eq!(with(&|frame| frame.head[46] = 0xf0), None, "a header beyond the head");
    assert_eq!(with(&|frame| frame.head[46] = 0x10), None);
    assert_eq!(with(&|frame| frame.head.truncate(40)), None);
}
