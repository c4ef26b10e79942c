//! NETWORKS: what a network card of a guest can be connected to, without any right on the host.
//!
//! A frame from the guest: [`crate::virtio::net`] -> [`Wire::send`] -> the network. A frame to the guest: the network ->
//! [`inbox::Inbox`] -> the card's receive queue. docs/life-of-a-packet.md follows one each way.

pub mod cable;
pub mod checksum;
pub mod fit;
pub mod frame;
pub mod inbox;
pub mod nat;
pub mod packet;
pub mod switch;

use std::fmt;
use std::sync::Arc;

use frame::Frame;
use inbox::Inbox;

/// The address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    pub const BROADCAST: Mac = Mac([0xff; 6]);

    /// Whether it names several cards, broadcast among them: no card may have it.
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The far end of a card's cable. It is called by the card's transmit thread, and calls the inbox from threads of its own.
pub trait Wire: Send + Sync {
    /// Gives it the card's inbox, once, before anything else.
    fn connect(&self, inbox: &Arc<Inbox>);

    /// A frame from the guest, whose header has been checked against it. It never waits: what it has no room for is lost.
    fn send(&self, frame: &mut Frame);

    /// The guest has sent all that it had.
    fn flush(&self) {}

    /// The inbox was full, and has room again.
    fn has_room(&self) {}

    /// Whether frames for others may come along, so that the card looks at their addresses.
    fn is_shared(&self) -> bool;

    /// The machine has ended.
    fn end(&self) {}
}
