//! The requests of a queue whose back end takes several at once: a frame that fills many buffers is seen by the driver as a
//! whole, and many small ones cost one interrupt.

use memory::GuestMemory;

use super::queue::{Broken, Chain, Queue};

/// What a back end has done with its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It did something, and wants to be asked again at once.
    More,
    /// It needs requests of the driver's, and there are none, or too few.
    Empty,
    /// It has nothing for the driver. It will have the queue looked at when it does: the driver need not notify.
    Waits,
}

/// A queue in its back end's hands, for one turn.
#[derive(Debug)]
pub struct Requests<'a> {
    queue: &'a mut Queue,
    memory: &'a GuestMemory,
}

impl<'a> Requests<'a> {
    pub fn new(queue: &'a mut Queue, memory: &'a GuestMemory) -> Requests<'a> {
        Requests { queue, memory }
    }

    /// How many the queue holds at most.
    #[must_use]
    pub fn most(&self) -> u16 {
        self.queue.entries()
    }

    /// The next request; `None` when there is none for now. Each that is taken is finished, or put back, in this turn.
    ///
    /// # Errors
    /// [`Broken`], when the driver's index or its descriptors make no sense.
    pub fn take(&mut self) -> Result<Option<Chain<'a>>, Broken> {
        self.queue.pop(self.memory)
    }

    /// Those that were taken last stay in the queue.
    pub fn put_back(&mut self, count: u16) {
        self.queue.put_back_last(count);
    }

    /// Gives requests back: by their heads, with the bytes written to each. The driver sees all of them or none.
    ///
    /// # Errors
    /// [`Broken::Place`], when the used ring is not in memory any more.
    pub fn finish(&mut self, requests: &[(u16, u32)]) -> Result<(), Broken> {
        if requests.is_empty() { Ok(()) } else { self.queue.push_together(self.memory, requests) }
    }
}
