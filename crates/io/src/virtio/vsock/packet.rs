//! The header of a packet. Source: VIRTIO 1.2, 5.10.6 "Device Operation".

use crate::virtio::queue::Chain;

pub const HEADER_BYTES: usize = 44;
/// Streams are the one type of socket that is offered.
pub const STREAM: u16 = 1;

/// What a packet is about.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a shutdown: the sender receives no more, sends no more.
pub mod shutdown {
    pub const RECEIVE: u32 = 1;
    pub const SEND: u32 = 2;
    pub const BOTH: u32 = RECEIVE | SEND;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub source_cid: u64,
    pub target_cid: u64,
    pub source_port: u32,
    pub target_port: u32,
    /// Bytes that follow.
    pub size: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Room that the sender has for what it receives, in all, and how much it has passed on: its credit.
    pub room: u32,
    pub forwarded: u32,
}

fn four(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn eight(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(four(bytes, at)) | u64::from(four(bytes, at + 4)) << 32
}

impl Header {
    /// `None` when there is no whole one.
    pub fn read(chain: &Chain<'_>) -> Option<Header> {
        let mut bytes = [0; HEADER_BYTES];
        chain.read(0, &mut bytes).then(|| Header {
            source_cid: eight(&bytes, 0),
            target_cid: eight(&bytes, 8),
            source_port: four(&bytes, 16),
            target_port: four(&bytes, 20),
            size: four(&bytes, 24),
            kind: four(&bytes, 28) as u16,
            op: (four(&bytes, 28) >> 16) as u16,
            flags: four(&bytes, 32),
            room: four(&bytes, 36),
            forwarded: four(&bytes, 40),
        })
    }

    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &self.source_cid.to_le_bytes());
        put(8, &self.target_cid.to_le_bytes());
        put(16, &self.source_port.to_le_bytes());
        put(20, &self.target_port.to_le_bytes());
        put(24, &self.size.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.room.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }
}
