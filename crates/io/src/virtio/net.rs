//! The network card. Its cable leads to a [`Wire`]. Source: VIRTIO 1.2, 5.1 "Network Device"; sections below are of it.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use host::lock::{Rank, RankedMutex};

use super::line::Line;
use super::queue::{Broken, Chain};
use super::requests::{Requests, Turn};
use super::{Answer, Backend, BackendState};
use crate::network::fit::{self, Abilities};
use crate::network::frame::{ETHERNET_BYTES, Frame, HEADER_BYTES, MOST_BYTES};
use crate::network::inbox::Inbox;
use crate::network::{Mac, Wire};

const DEVICE_TYPE: u16 = 1;
/// An Ethernet controller.
const PCI_CLASS: u32 = 0x02_0000;

/// 5.1.2 "Virtqueues".
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL: u16 = 2;
const QUEUES: u16 = 3;

/// 5.1.3 "Feature bits".
mod offered {
    pub const CHECKSUM: u64 = 1 << 0;
    pub const GUEST_CHECKSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_UFO: u64 = 1 << 10;
    pub const TSO4: u64 = 1 << 11;
    pub const TSO6: u64 = 1 << 12;
    pub const UFO: u64 = 1 << 14;
    pub const MERGEABLE: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CONTROL: u64 = 1 << 17;
    pub const CONTROL_RECEIVE: u64 = 1 << 18;
    pub const CONTROL_MAC: u64 = 1 << 23;
}

/// 5.1.4 "Device configuration layout": the address, the status, the number of queue pairs, the MTU.
const CONFIG_BYTES: usize = 12;
const LINK_UP: u16 = 1;

/// 5.1.6.5 "Control Virtqueue": classes, commands and answers.
const CLASS_RECEIVE: u8 = 0;
const CLASS_MAC: u8 = 1;
const SET_TABLE: u8 = 0;
const SET_ADDRESS: u8 = 1;
const OK: u8 = 0;
const FAILED: u8 = 1;
/// Addresses that a table of the guest's may have, of one kind and of several; with more, all of that kind are let in.
const MOST_ADDRESSES: usize = 64;

/// Frames of a turn.
const MOST_FRAMES: usize = 64;

/// Which frames a guest wants beside those to its own address, 5.1.6.5.1 "Packet Receive Filtering".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Everything. A driver that has said nothing yet gets it.
    pub promiscuous: bool,
    pub all_groups: bool,
    pub addresses: Vec<Mac>,
}

impl Default for Filter {
    fn default() -> Self {
        Filter { promiscuous: true, all_groups: false, addresses: Vec::new() }
    }
}

/// What a saved machine keeps of a card. Where its cable leads is for whoever restores it to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub mac: Mac,
    pub filter: Filter,
}

#[derive(Debug)]
struct Driven {
    mac: Mac,
    filter: Filter,
    /// Pieces of a frame that the guest does not take whole.
    pieces: std::collections::VecDeque<Frame>,
}

pub struct Net {
    wire: Arc<dyn Wire>,
    inbox: Arc<Inbox>,
    /// The address that the card was made with.
    mac: Mac,
    mtu: u16,
    is_up: AtomicBool,
    driven: RankedMutex<Driven>,
    line: std::sync::OnceLock<Arc<Line>>,
    /// Frames of the guest that made no sense.
    refused: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Net {
    /// A card, with its cable plugged into `wire`.
    #[must_use]
    pub fn new(wire: Arc<dyn Wire>, mac: Mac, mtu: u16) -> Net {
        let driven = Driven { mac, filter: Filter::default(), pieces: std::collections::VecDeque::new() };
        let inbox = Inbox::new(RECEIVE);
        wire.connect(&inbox);
        Net {
            wire,
            inbox,
            mac,
            mtu,
            is_up: AtomicBool::new(true),
            driven: RankedMutex::new(Rank::Network, driven),
            line: std::sync::OnceLock::new(),
            refused: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }
    }

    /// Plugs the cable in, or pulls it out: the guest is told, and nothing goes over it.
    pub fn set_link(&self, is_up: bool) {
        if self.is_up.swap(is_up, Ordering::SeqCst) != is_up
            && let Some(line) = self.line.get()
        {
            line.config_changed();
        }
    }

    /// Frames and bytes, by name.
    #[must_use]
    pub fn counters(&self) -> [(&'static str, u64); 4] {
        [
            ("sent_bytes", self.sent.load(Ordering::Relaxed)),
            ("received_bytes", self.received.load(Ordering::Relaxed)),
            ("lost_frames", self.inbox.lost()),
            ("refused_frames", self.refused.load(Ordering::Relaxed)),
        ]
    }

    /// A frame of the guest's with its header; `None` for one that makes no sense.
    fn read(chain: &Chain<'_>, buffer: &mut Vec<u8>) -> Option<Frame> {
        let size = usize::try_from(chain.readable_bytes()).ok()?.checked_sub(HEADER_BYTES)?;
        if !(ETHERNET_BYTES..=MOST_BYTES).contains(&size) {
            return None;
        }
        let mut header = [0; HEADER_BYTES];
        buffer.resize(size, 0);
        if !chain.read(0, &mut header) || !chain.read(HEADER_BYTES as u64, buffer) {
            return None;
        }
        fit::checked(header, std::mem::take(buffer))
    }

    fn transmit(&self, requests: &mut Requests<'_>) -> Result<Turn, Broken> {
        let (mut done, mut buffer) = (Vec::with_capacity(MOST_FRAMES), Vec::new());
        let is_up = self.is_up.load(Ordering::SeqCst);
        while done.len() < MOST_FRAMES {
            let Some(chain) = requests.take()? else { break };
            done.push((chain.head(), 0));
            match Net::read(&chain, &mut buffer) {
                Some(mut frame) if is_up => {
                    self.sent.fetch_add(frame.len() as u64, Ordering::Relaxed);
                    self.wire.send(&mut frame);
                    // The next frame goes where this one was.
                    buffer = frame.head;
                }
                Some(_) => {}
                None => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        requests.finish(&done)?;
        if done.len() == MOST_FRAMES {
            return Ok(Turn::More);
        }
        self.wire.flush();
        Ok(if done.is_empty() { Turn::Empty } else { Turn::More })
    }

    /// 5.1.6.5.1, 5.1.6.5.2: whether the guest wants a frame.
    fn wants(driven: &Driven, frame: &Frame) -> bool {
        let Some(target) = frame.target() else { return false };
        driven.filter.promiscuous
            || target == driven.mac
            || target == Mac::BROADCAST
            || target.is_group() && driven.filter.all_groups
            || driven.filter.addresses.contains(&target)
    }

    /// The next frame as the driver takes it.
    fn next(&self, abilities: Abilities) -> Option<Frame> {
        let mut driven = self.driven.lock();
        loop {
            if let Some(piece) = driven.pieces.pop_front() {
                return Some(piece);
            }
            let (frame, tell) = self.inbox.take()?;
            if tell {
                // It takes locks that come before ours.
                drop(driven);
                self.wire.has_room();
                driven = self.driven.lock();
            }
            let is_up = self.is_up.load(Ordering::SeqCst);
            if is_up && (!self.wire.is_shared() || Net::wants(&driven, &frame)) {
                let pieces = &mut driven.pieces;
                fit::fit(frame, abilities, |piece| pieces.push_back(piece));
            }
        }
    }

    fn receive(&self, features: u64, requests: &mut Requests<'_>) -> Result<Turn, Broken> {
        let has = |feature| features & feature != 0;
        let abilities = Abilities {
            checksum: has(offered::GUEST_CHECKSUM),
            tcp4: has(offered::GUEST_TSO4),
            tcp6: has(offered::GUEST_TSO6),
            udp: has(offered::GUEST_UFO),
        };
        let most = if has(offered::MERGEABLE) { requests.most() } else { 1 };
        for _ in 0..MOST_FRAMES {
            let Some(frame) = self.next(abilities) else { return Ok(Turn::Waits) };
            let wanted = (HEADER_BYTES + frame.len()) as u64;
            let (mut chains, mut room) = (Vec::with_capacity(17), 0);
            while room < wanted && chains.len() < usize::from(most) {
                let Some(chain) = requests.take()? else { break };
                room += chain.writable_bytes();
                chains.push(chain);
            }
            if room < wanted && chains.len() < usize::from(most) {
                requests.put_back(chains.len() as u16);
                self.driven.lock().pieces.push_front(frame);
                return Ok(Turn::Empty);
            }
            let done = fill(&frame, &chains, room >= wanted);
            self.received.fetch_add(frame.len() as u64, Ordering::Relaxed);
            requests.finish(&done)?;
        }
        Ok(Turn::More)
    }

    /// 5.1.6.5: class, command, data, and a byte for the answer.
    fn control(&self, chain: &Chain<'_>) -> Answer {
        let size = chain.readable_bytes().saturating_sub(2).min(8 + 12 * 1024) as usize;
        let (mut order, mut data) = ([0; 2], vec![0; size]);
        let is_whole = chain.read(0, &mut order) && chain.read(2, &mut data);
        let answer = if is_whole && self.obey(order, &data) { OK } else { FAILED };
        Answer::Done(u32::from(chain.write(0, &[answer])))
    }

    fn obey(&self, [class, command]: [u8; 2], data: &[u8]) -> bool {
        let mut driven = self.driven.lock();
        match (class, command, data) {
            (CLASS_RECEIVE, 0, [on]) => driven.filter.promiscuous = *on != 0,
            (CLASS_RECEIVE, 1, [on]) => driven.filter.all_groups = *on != 0,
            (CLASS_MAC, SET_TABLE, data) => {
                let Some((singles, rest)) = table(data) else { return false };
                let Some((groups, [])) = table(rest) else { return false };
                let filter = &mut driven.filter;
                filter.addresses.clear();
                if singles.len() > MOST_ADDRESSES {
                    filter.promiscuous = true;
                }
                filter.all_groups |= groups.len() > MOST_ADDRESSES;
                filter.addresses.extend(singles.iter().chain(&groups).take(2 * MOST_ADDRESSES));
            }
            (CLASS_MAC, SET_ADDRESS, data) => {
                let Ok(address) = data.try_into().map(Mac) else { return false };
                if address.is_group() {
                    return false;
                }
                driven.mac = address;
            }
            _ => return false,
        }
        true
    }
}

/// 5.1.6.5.2: a count, and so many addresses; and what follows.
fn table(data: &[u8]) -> Option<(Vec<Mac>, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let bytes = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (addresses, rest) = rest.split_at_checked(bytes)?;
    Some((addresses.as_chunks().0.iter().copied().map(Mac).collect(), rest))
}

/// Writes a frame to the buffers of some chains, and says how much each got. A frame that does not fit is lost, and its
/// buffers go back empty.
fn fill(frame: &Frame, chains: &[Chain<'_>], fits: bool) -> Vec<(u16, u32)> {
    // 5.1.6.4: without mergeable buffers there is one.
    let header = frame.offload.to_bytes(frame.head.len() as u16, chains.len() as u16);
    let mut done = Vec::with_capacity(chains.len());
    let parts: [&[u8]; 3] = [&header, &frame.head, frame.tail()];
    let (mut part, mut at) = (0, 0);
    for chain in chains {
        let (room, mut filled) = (chain.writable_bytes(), 0);
        while fits && filled < room && part < parts.len() {
            let rest = &parts[part][at..];
            let piece = &rest[..rest.len().min((room - filled) as usize)];
            if !chain.write(filled, piece) {
                break;
            }
            filled += piece.len() as u64;
            at += piece.len();
            if at == parts[part].len() {
                (part, at) = (part + 1, 0);
            }
        }
        done.push((chain.head(), filled as u32));
    }
    done
}

impl Backend for Net {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn features(&self) -> u64 {
        use offered::{
            CHECKSUM, CONTROL, CONTROL_MAC, CONTROL_RECEIVE, GUEST_CHECKSUM, GUEST_TSO4, GUEST_TSO6, GUEST_UFO, MAC,
            MERGEABLE, MTU, STATUS, TSO4, TSO6, UFO,
        };
        let control = CONTROL | CONTROL_RECEIVE | CONTROL_MAC;
        let to_guest = GUEST_CHECKSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | MERGEABLE;
        CHECKSUM | TSO4 | TSO6 | UFO | to_guest | MTU | MAC | STATUS | control
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn config(&self) -> Cow<'_, [u8]> {
        let mut config = Vec::with_capacity(CONFIG_BYTES);
        config.extend(self.mac.0);
        config.extend(if self.is_up.load(Ordering::SeqCst) { LINK_UP } else { 0 }.to_le_bytes());
        config.extend(1_u16.to_le_bytes());
        config.extend(self.mtu.to_le_bytes());
        Cow::Owned(config)
    }

    fn connect(&self, line: &Arc<Line>) {
        self.inbox.connect(line);
        let _ = self.line.set(Arc::clone(line));
    }

    fn reset(&self) {
        let mut driven = self.driven.lock();
        (driven.mac, driven.filter) = (self.mac, Filter::default());
        driven.pieces.clear();
        drop(driven);
        self.inbox.clear();
        self.wire.has_room();
    }

    fn state(&self) -> BackendState {
        let driven = self.driven.lock();
        BackendState::Net(State { mac: driven.mac, filter: driven.filter.clone() })
    }

    fn restore(&self, state: &BackendState) {
        if let BackendState::Net(State { mac, filter }) = state {
            let mut driven = self.driven.lock();
            (driven.mac, driven.filter) = (*mac, filter.clone());
        }
    }

    fn end(&self) {
        self.wire.end();
    }

    fn serve(&self, queue: u16, _features: u64, chain: &Chain<'_>) -> Answer {
        if queue == CONTROL { self.control(chain) } else { Answer::Done(0) }
    }

    fn serves_together(&self, queue: u16) -> bool {
        queue == RECEIVE || queue == TRANSMIT
    }

    fn serve_together(&self, queue: u16, features: u64, requests: &mut Requests<'_>) -> Result<Turn, Broken> {
        if queue == RECEIVE { self.receive(features, requests) } else { self.transmit(requests) }
    }
}
