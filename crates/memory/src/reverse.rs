//! Which translations lead to a page that others have, too: from the page to the places in the soft TLB and its shadow, so
//! that a store that breaks the page drops these alone. Private pages have none: they are taken by the hundred, and then
//! everything is looked through.

use std::collections::HashMap;

use x86::Gva;

use crate::tlb::Bank;

/// A translation: its bank, the generation of its address space, and the page.
pub type Place = (Bank, u64, Gva);

/// Places of a page that are listed; a page of the C library that a hundred processes map has more.
const MOST_PLACES: usize = 32;
/// Pages at most; when there are more, all translations go.
const MOST_PAGES: usize = 1 << 16;

/// By the host address of a page.
#[derive(Debug, Default)]
pub struct Reverse {
    places: HashMap<u64, Vec<Place>>,
}

/// What is known of the translations of a page.
#[derive(Debug, PartialEq, Eq)]
pub enum Known {
    /// All of them, and perhaps some that are gone.
    Places(Vec<Place>),
    /// There are more than are listed.
    TooMany,
}

impl Reverse {
    /// Notes a translation; false when there is no room for more pages.
    pub fn note(&mut self, page: u64, place: Place) -> bool {
        let has_room = self.places.len() < MOST_PAGES;
        match self.places.get_mut(&page) {
            Some(places) if places.len() > MOST_PLACES || places.contains(&place) => {}
            Some(places) => places.push(place),
            None if has_room => {
                self.places.insert(page, vec![place]);
            }
            None => return false,
        }
        true
    }

    /// Takes what is known of a page out.
    pub fn take(&mut self, page: u64) -> Known {
        match self.places.remove(&page) {
            Some(places) if places.len() > MOST_PLACES => Known::TooMany,
            Some(places) => Known::Places(places),
            None => Known::Places(Vec::new()),
        }
    }

    /// Forgets everything, because all translations are gone.
    pub fn clear(&mut self) {
        self.places = HashMap::new();
    }

    #[must_use]
    pub fn pages(&self) -> usize {
        self.places.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_knows_its_places_until_there_are_too_many() {
        let mut reverse = Reverse::default();
        let place = |number: u64| (Bank::User, 1, Gva(number << 12));
        assert!(reverse.note(0x7000, place(1)) && reverse.note(0x7000, place(1)) && reverse.note(0x7000, place(2)));
        assert_eq!(reverse.take(0x7000), Known::Places(vec![place(1), place(2)]));
        assert_eq!(reverse.take(0x7000), Known::Places(Vec::new()));
        (0..100).for_each(|number| assert!(reverse.note(0x8000, place(number))));
        assert_eq!(reverse.take(0x8000), Known::TooMany);
        assert!((0..1 << 16).all(|page| reverse.note(page << 12, place(1))));
        assert!(!reverse.note(u64::MAX << 12, place(1)) && reverse.note(0x9000, place(2)));
    }
}
