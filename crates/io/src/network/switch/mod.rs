//! Switches. [`Switch`] joins the cards of several machines of this process; [`server`] joins those of several processes, whose
//! end of it is a [`super::cable`]. Both learn where addresses are in a [`table`].
//!
//! No machine is believed more than its own port: one that sends with the address of another's card is not heard, and one that
//! takes nothing loses its own frames only.

pub mod backlog;
pub mod server;
#[cfg(test)]
mod server_tests;
pub mod table;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use host::lock::{Rank, RankedMutex};

use super::frame::Frame;
use super::inbox::Inbox;
use super::{Mac, Wire, packet};
use table::{Route, Table};

/// A card with this address is on the switch already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another machine on this switch has a card with the address {0}: give each its own")]
pub struct Taken(pub Mac);

#[derive(Debug, Default)]
struct Ports {
    table: Table,
    /// By the address of the card. Without an inbox it is not connected yet.
    inboxes: BTreeMap<Mac, Option<Arc<Inbox>>>,
}

#[derive(Debug)]
pub struct Switch {
    ports: RankedMutex<Ports>,
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
        Switch { ports: RankedMutex::new(Rank::Network, Ports::default()) }
    }
}

impl Switch {
    /// A port for a card.
    ///
    /// # Errors
    /// [`Taken`].
    pub fn plug_in(self: &Arc<Switch>, card: Mac) -> Result<SwitchPort, Taken> {
        let mut ports = self.ports.lock();
        if !ports.table.add(card) {
            return Err(Taken(card));
        }
        ports.inboxes.insert(card, None);
        Ok(SwitchPort { switch: Arc::clone(self), card, is_out: OnceLock::new() })
    }
}

impl Ports {
    fn forward(&mut self, frame: &mut Frame, from: Mac) {
        let Some(target) = frame.target() else { return };
        // What finds no room in an inbox is lost, as on any switch.
        match self.table.route(Mac(packet::take(&frame.head, 6)), target, from) {
            Route::Nowhere | Route::Refused => {}
            Route::Port(port) => {
                if let Some(Some(inbox)) = self.inboxes.get(&port) {
                    let _ = inbox.offer(std::mem::take(frame));
                }
            }
            Route::Others => {
                let others = self.inboxes.iter().filter(|(port, _)| **port != from);
                for inbox in others.filter_map(|(_, inbox)| inbox.as_ref()) {
                    let _ = inbox.offer(frame.clone());
                }
            }
        }
    }
}

impl Wire for SwitchPort {
    fn connect(&self, inbox: &Arc<Inbox>) {
        if let Some(port) = self.switch.ports.lock().inboxes.get_mut(&self.card) {
            *port = Some(Arc::clone(inbox));
        }
    }

    fn send(&self, frame: &mut Frame) {
        if self.is_out.get().is_none() {
            self.switch.ports.lock().forward(frame, self.card);
        }
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn end(&self) {
        if self.is_out.set(()).is_ok() {
            let mut ports = self.switch.ports.lock();
            ports.inboxes.remove(&self.card);
            ports.table.remove(self.card);
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
        assert_eq!(switch.ports.lock().table.learned(), (table::MOST_LEARNED, table::MOST_LEARNED));
        // Who is unplugged is forgotten, with all behind it, and its address is free.
        drop(b);
        assert_eq!(switch.ports.lock().table.learned(), (0, 0));
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
