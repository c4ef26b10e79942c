//! A switch: joins the cards of several machines of this process. It learns where addresses are from what comes from them
//! (IEEE 802.1D-2004, 7.8 "The Learning Process"), in a bounded table.
//!
//! No machine is believed more than its own port: one that sends with the address of another's card is not heard, and one that
//! takes nothing loses its own frames only.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, OnceLock};

use host::lock::{Rank, RankedMutex};

use super::frame::Frame;
use super::inbox::Inbox;
use super::{Mac, Wire, packet};

/// Addresses that are learned, beside those of the cards themselves: a guest may have a bridge of its own.
const MOST_LEARNED: usize = 1024;

/// A card with this address is on the switch already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another machine on this switch has a card with the address {0}: give each its own")]
pub struct Taken(pub Mac);

#[derive(Debug, Default)]
struct Table {
    /// By the address of the card. Without an inbox it is not connected yet.
    ports: BTreeMap<Mac, Option<Arc<Inbox>>>,
    learned: HashMap<Mac, Mac>,
    /// Learned addresses, the oldest first.
    order: VecDeque<Mac>,
}

#[derive(Debug)]
pub struct Switch {
    table: RankedMutex<Table>,
}

/// The end of a cable that is plugged into a switch.
#[derive(Debug)]
pub struct SwitchPort {
    switch: Arc<Switch>,
    card: Mac,
    is_out: OnceLock<()>,
}

impl Default for Switch {
    fn default() -> Switch {
        Switch { table: RankedMutex::new(Rank::Network, Table::default()) }
    }
}

impl Switch {
    /// A port for a card.
    ///
    /// # Errors
    /// [`Taken`].
    pub fn plug_in(self: &Arc<Switch>, card: Mac) -> Result<SwitchPort, Taken> {
        let mut table = self.table.lock();
        if table.ports.contains_key(&card) {
            return Err(Taken(card));
        }
        table.forget(card);
        table.ports.insert(card, None);
        Ok(SwitchPort { switch: Arc::clone(self), card, is_out: OnceLock::new() })
    }
}

impl Table {
    fn forget(&mut self, address: Mac) {
        if self.learned.remove(&address).is_some() {
            self.order.retain(|known| *known != address);
        }
    }

    /// Notes that an address is behind a port; false when it is another card's.
    fn learn(&mut self, address: Mac, port: Mac) -> bool {
        if address == port {
            return true;
        }
        if address.is_group() || self.ports.contains_key(&address) {
            return false;
        }
        if self.learned.insert(address, port).is_none() {
            self.order.push_back(address);
            if self.order.len() > MOST_LEARNED
                && let Some(oldest) = self.order.pop_front()
            {
                self.learned.remove(&oldest);
            }
        }
        true
    }

    fn forward(&mut self, frame: &mut Frame, from: Mac) {
        let Some(target) = frame.target() else { return };
        if !self.learn(Mac(packet::take(&frame.head, 6)), from) {
            return;
        }
        let port = if self.ports.contains_key(&target) { Some(target) } else { self.learned.get(&target).copied() };
        match port {
            Some(port) if port == from => {}
            // What finds no room in an inbox is lost, as on any switch.
            Some(port) => {
                if let Some(Some(inbox)) = self.ports.get(&port) {
                    let _ = inbox.offer(std::mem::take(frame));
                }
            }
            None => {
                let others = self.ports.iter().filter(|(port, _)| **port != from);
                for inbox in others.filter_map(|(_, inbox)| inbox.as_ref()) {
                    let _ = inbox.offer(frame.clone());
                }
            }
        }
    }
}

impl Wire for SwitchPort {
    fn connect(&self, inbox: &Arc<Inbox>) {
        if let Some(port) = self.switch.table.lock().ports.get_mut(&self.card) {
            *port = Some(Arc::clone(inbox));
        }
    }

    fn send(&self, frame: &mut Frame) {
        if self.is_out.get().is_none() {
            self.switch.table.lock().forward(frame, self.card);
        }
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn end(&self) {
        if self.is_out.set(()).is_ok() {
            let mut table = self.switch.table.lock();
            table.ports.remove(&self.card);
            let card = self.card;
            table.learned.retain(|_, port| *port != card);
            let Table { learned, order, .. } = &mut *table;
            order.retain(|address| learned.contains_key(address));
        }
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(number: u32) -> Mac {
        let [a, b, c, d] = number.to_be_bytes();
        Mac([2, 0, a, b, c, d])
    }

    struct Card {
        port: SwitchPort,
        inbox: Arc<Inbox>,
    }

    impl Card {
        fn new(switch: &Arc<Switch>, number: u32) -> Card {
            let (port, inbox) = (switch.plug_in(mac(number)).unwrap(), Inbox::new(0));
            port.connect(&inbox);
            Card { port, inbox }
        }

        fn send(&self, source: Mac, target: Mac) {
            self.port.send(&mut Frame::plain(packet::ethernet(source, target, 0x88b5)));
        }

        fn heard(&self) -> usize {
            std::iter::from_fn(|| self.inbox.take()).count()
        }
    }

    #[test]
    fn frames_go_where_they_belong() {
        let switch = Arc::new(Switch::default());
        let [a, b, c] = [1, 2, 3].map(|number| Card::new(&switch, number));
        a.send(mac(1), mac(2));
        assert_eq!((a.heard(), b.heard(), c.heard()), (0, 1, 0));
        a.send(mac(1), Mac::BROADCAST);
        assert_eq!((a.heard(), b.heard(), c.heard()), (0, 1, 1));
        // Nobody knows it; then it has spoken.
        a.send(mac(1), mac(77));
        assert_eq!((b.heard(), c.heard()), (1, 1));
        b.send(mac(77), mac(1));
        a.send(mac(1), mac(77));
        assert_eq!((a.heard(), b.heard(), c.heard()), (1, 1, 0));
        // Behind the port that it comes from.
        b.send(mac(2), mac(77));
        assert_eq!((a.heard(), b.heard(), c.heard()), (0, 0, 0));
    }

    #[test]
    fn nobody_speaks_for_another_or_floods_the_table() {
        let switch = Arc::new(Switch::default());
        let [a, b] = [1, 2].map(|number| Card::new(&switch, number));
        b.send(mac(1), Mac::BROADCAST);
        assert_eq!(a.heard(), 0, "that is another's address");
        assert_eq!(switch.plug_in(mac(1)).unwrap_err(), Taken(mac(1)));
        for number in 1000..10_000 {
            b.send(mac(number), mac(1));
            a.heard();
        }
        let table = switch.table.lock();
        assert_eq!((table.learned.len(), table.order.len()), (MOST_LEARNED, MOST_LEARNED));
        drop(table);
        // Who is unplugged is forgotten, with all behind it, and its address is free.
        drop(b);
        assert!(switch.table.lock().learned.is_empty());
        let _ = Card::new(&switch, 2);
    }

    #[test]
    fn who_takes_nothing_loses_its_own_frames_only() {
        let switch = Arc::new(Switch::default());
        let [a, b, c] = [1, 2, 3].map(|number| Card::new(&switch, number));
        for _ in 0..20_000 {
            a.send(mac(1), mac(2));
        }
        assert!(b.inbox.lost() > 10_000);
        a.send(mac(1), mac(3));
        assert_eq!(c.heard(), 1);
    }
}
