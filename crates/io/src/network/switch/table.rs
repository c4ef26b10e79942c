//! Where addresses are: what a switch has learned from what comes from its ports (IEEE 802.1D-2004, 7.8 "The Learning
//! Process"), in a bounded table. A port is named by the address of the card at its other end.

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::network::Mac;

/// Addresses that are learned, beside those of the cards themselves: a guest may have a bridge of its own.
pub const MOST_LEARNED: usize = 1024;

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// It stays on the side that it comes from.
    Nowhere,
    /// Its sender has given an address that is not its to use.
    Refused,
    Port(Mac),
    /// To all ports but its own.
    Others,
}

#[derive(Debug, Default)]
pub struct Table {
    ports: BTreeSet<Mac>,
    learned: HashMap<Mac, Mac>,
    /// Learned addresses, the oldest first.
    order: VecDeque<Mac>,
}

impl Table {
    /// Adds a port; false when there is one of its name.
    pub fn add(&mut self, port: Mac) -> bool {
        if self.learned.remove(&port).is_some() {
            self.order.retain(|known| *known != port);
        }
        self.ports.insert(port)
    }

    /// Forgets a port, and all that is behind it.
    pub fn remove(&mut self, port: Mac) {
        self.ports.remove(&port);
        self.learned.retain(|_, behind| *behind != port);
        let Table { learned, order, .. } = self;
        order.retain(|address| learned.contains_key(address));
    }

    /// Where a frame goes that comes from a port, and learns where its source is.
    pub fn route(&mut self, source: Mac, target: Mac, from: Mac) -> Route {
        if !self.learn(source, from) {
            return Route::Refused;
        }
        let port = if self.ports.contains(&target) { Some(target) } else { self.learned.get(&target).copied() };
        match port {
            Some(port) if port == from => Route::Nowhere,
            Some(port) => Route::Port(port),
            None => Route::Others,
        }
    }

    /// Notes that an address is behind a port; false when it is another card's.
    fn learn(&mut self, address: Mac, port: Mac) -> bool {
        if address == port {
            return true;
        }
        if address.is_group() || self.ports.contains(&address) {
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

    #[cfg(test)]
    pub fn learned(&self) -> (usize, usize) {
        (self.learned.len(), self.order.len())
    }
}
