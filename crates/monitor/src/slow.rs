//! Slow devices: written in a language that needs a thread and a lock of its own (Python), so that a processor does not
//! call them but asks one dispatcher thread a machine and waits for the answer.
//!
//! A device that fails ends its machine with a sentence. When the machine ends, whoever waits for an answer gets all
//! ones at once, even while the device is still being called: so ending a machine never waits for a device.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use host::lock::{Rank, RankedMutex};
use io::bus::{AccessSize, PortDevice};

use crate::Error;

/// A device behind I/O ports that may take its time, and may fail.
pub trait SlowDevice: Send {
    /// For the sentence that a failure becomes.
    fn name(&self) -> String;
    /// The value of `size` (1, 2 or 4) bytes at `offset` from the device's first port.
    ///
    /// # Errors
    /// What went wrong, in a few words.
    fn read(&mut self, offset: u16, size: u8) -> Result<u32, String>;
    /// # Errors
    /// What went wrong, in a few words.
    fn write(&mut self, offset: u16, size: u8, value: u32) -> Result<(), String>;
}

/// What a failure of a device is told to: it ends the machine.
pub type Failed = Box<dyn Fn(String) + Send + Sync>;

#[derive(Clone, Copy, Debug)]
struct Request {
    device: usize,
    offset: u16,
    size: u8,
    /// The value to write; `None` asks for a read.
    value: Option<u32>,
}

#[derive(Default)]
struct Desk {
    requests: VecDeque<Request>,
    /// The answer for each device. One is enough: the bus calls a device for one processor at a time.
    answers: Vec<Option<u32>>,
    closed: bool,
    /// The dispatcher's thread has let go of the devices.
    left: bool,
}

/// Where processors put their requests and the dispatcher takes them.
struct Counter {
    desk: RankedMutex<Desk>,
    asked: Condvar,
    answered: Condvar,
}

/// The dispatcher thread of one machine and the devices that it serves.
pub struct Dispatcher {
    counter: Arc<Counter>,
    waiting: RankedMutex<Vec<Box<dyn SlowDevice>>>,
    thread: RankedMutex<Option<JoinHandle<()>>>,
}

/// What stands on the bus for a slow device.
pub struct Window {
    device: usize,
    counter: Arc<Counter>,
}

impl Window {
    fn ask(&self, offset: u16, size: AccessSize, value: Option<u32>) -> u32 {
        let mut desk = self.counter.desk.lock();
        if desk.closed {
            return u32::MAX;
        }
        desk.requests.push_back(Request { device: self.device, offset, size: size as u8, value });
        self.counter.asked.notify_one();
        loop {
            if desk.closed {
                return u32::MAX;
            }
            if let Some(answer) = desk.answers.get_mut(self.device).and_then(Option::take) {
                return answer;
            }
            desk = desk.wait(&self.counter.answered, None);
        }
    }
}

impl PortDevice for Window {
    fn read(&mut self, offset: u16, size: AccessSize) -> u32 {
        self.ask(offset, size, None)
    }

    fn write(&mut self, offset: u16, size: AccessSize, value: u32) {
        self.ask(offset, size, Some(value));
    }
}

impl Default for Dispatcher {
    fn default() -> Self {
        Self::new()
    }
}

impl Dispatcher {
    #[must_use]
    pub fn new() -> Dispatcher {
        Dispatcher {
            counter: Arc::new(Counter {
                desk: RankedMutex::new(Rank::Waiting, Desk::default()),
                asked: Condvar::new(),
                answered: Condvar::new(),
            }),
            waiting: RankedMutex::new(Rank::Waiting, Vec::new()),
            thread: RankedMutex::new(Rank::Waiting, None),
        }
    }

    /// Takes a device before the start; gives what to put on the bus for it.
    pub fn add(&self, device: Box<dyn SlowDevice>) -> Window {
        let mut waiting = self.waiting.lock();
        let number = waiting.len();
        waiting.push(device);
        Window { device: number, counter: Arc::clone(&self.counter) }
    }

    /// Takes back the device that was added last, because the bus had no place for it.
    pub fn withdraw(&self) {
        self.waiting.lock().pop();
    }

    /// Starts the thread, if there is a device to serve.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn start(&self, failed: Failed) -> Result<(), Error> {
        let devices = std::mem::take(&mut *self.waiting.lock());
        if devices.is_empty() {
            return Ok(());
        }
        self.counter.desk.lock().answers.resize(devices.len(), None);
        let counter = Arc::clone(&self.counter);
        let thread = std::thread::Builder::new()
            .name("rz-devices".into())
            .spawn(move || serve(&counter, devices, &failed))
            .map_err(|error| Error::Host { what: "thread for devices", error })?;
        *self.thread.lock() = Some(thread);
        Ok(())
    }

    /// Answers everyone with all ones from now on; the thread ends after the call that it is in.
    pub fn close(&self) {
        self.counter.close();
    }

    /// What [`Dispatcher::close`] does, for whoever outlives this.
    #[must_use]
    pub fn closer(&self) -> Box<dyn Fn() + Send + Sync> {
        let counter = Arc::clone(&self.counter);
        Box::new(move || counter.close())
    }

    /// Whether the calling thread is the dispatcher's: then a device is being called.
    #[must_use]
    pub fn is_caller(&self) -> bool {
        let current: ThreadId = std::thread::current().id();
        self.thread.lock().as_ref().is_some_and(|thread| thread.thread().id() == current)
    }

    /// Closes and waits for the thread, but not longer than `patience`: a device that hangs keeps its thread, not us.
    pub fn join(&self, patience: Duration) {
        self.close();
        if self.is_caller() {
            return;
        }
        let Some(thread) = self.thread.lock().take() else { return };
        let deadline = Instant::now() + patience;
        let mut desk = self.counter.desk.lock();
        while !desk.left {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            desk = desk.wait(&self.counter.answered, Some(left));
        }
        drop(desk);
        // A panic in it has been told to the machine already.
        let _ = thread.join();
    }
}

impl Counter {
    fn close(&self) {
        let mut desk = self.desk.lock();
        desk.closed = true;
        self.asked.notify_all();
        self.answered.notify_all();
    }

    /// The next request; `None` when there will be no more.
    fn next(&self) -> Option<Request> {
        let mut desk = self.desk.lock();
        loop {
            if desk.closed {
                return None;
            }
            if let Some(request) = desk.requests.pop_front() {
                return Some(request);
            }
            desk = desk.wait(&self.asked, None);
        }
    }

    fn answer(&self, device: usize, value: u32) {
        if let Some(answer) = self.desk.lock().answers.get_mut(device) {
            *answer = Some(value);
        }
        self.answered.notify_all();
    }
}

/// Tells those who wait that the devices are gone, however the thread ends.
struct Leaving<'a>(&'a Counter);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.desk.lock().left = true;
        self.0.close();
    }
}

fn serve(counter: &Counter, mut devices: Vec<Box<dyn SlowDevice>>, failed: &Failed) {
    let leaving = Leaving(counter);
    while let Some(request) = counter.next() {
        let Some(device) = devices.get_mut(request.device) else { continue };
        let Request { offset, size, value, .. } = request;
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match value {
            Some(value) => device.write(offset, size, value).map(|()| 0),
            None => device.read(offset, size),
        }));
        let answer = result.unwrap_or_else(|_| Err("the binding panicked".into()));
        match answer {
            Ok(value) => counter.answer(request.device, value),
            Err(problem) => {
                // The machine is told before the processor goes on, so that it does not run on with a wrong answer.
                failed(format!("error: device {}: {problem}", device.name()));
                counter.answer(request.device, u32::MAX);
            }
        }
    }
    drop(devices);
    drop(leaving);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    /// Answers reads with offset and size; a write of 0xbad fails, and a read at 9 waits until the test says so.
    struct Device(Receiver<()>);

    impl SlowDevice for Device {
        fn name(&self) -> String {
            "Test".into()
        }
        fn read(&mut self, offset: u16, size: u8) -> Result<u32, String> {
            if offset == 9 {
                let _ = self.0.recv();
            }
            Ok(u32::from(offset) << 8 | u32::from(size))
        }
        fn write(&mut self, _: u16, _: u8, value: u32) -> Result<(), String> {
            if value == 0xbad { Err("no".into()) } else { Ok(()) }
        }
    }

    #[test]
    fn requests_are_answered_and_a_failure_is_told() {
        let dispatcher = Dispatcher::new();
        let (_go, wait) = channel();
        let (told, hear) = channel();
        let mut window = dispatcher.add(Box::new(Device(wait)));
        let closer = dispatcher.closer();
        let told = RankedMutex::new(Rank::Waiting, told);
        dispatcher
            .start(Box::new(move |sentence| {
                told.lock().send(sentence).unwrap();
                closer();
            }))
            .unwrap();
        assert_eq!(window.read(2, AccessSize::Dword), 0x204);
        window.write(0, AccessSize::Byte, 7);
        assert_eq!(window.read(0, AccessSize::Byte), 1);
        window.write(0, AccessSize::Word, 0xbad);
        assert_eq!(hear.recv().unwrap(), "error: device Test: no");
        assert_eq!(window.read(0, AccessSize::Byte), u32::MAX);
        dispatcher.join(Duration::from_secs(20));
    }

    #[test]
    fn closing_lets_a_waiter_go_while_the_device_hangs() {
        let dispatcher = Dispatcher::new();
        let (go, wait) = channel();
        let mut window = dispatcher.add(Box::new(Device(wait)));
        dispatcher.start(Box::new(|_| {})).unwrap();
        let waiter = std::thread::spawn(move || window.read(9, AccessSize::Byte));
        std::thread::sleep(Duration::from_millis(20));
        dispatcher.close();
        assert_eq!(waiter.join().unwrap(), u32::MAX);
        dispatcher.join(Duration::from_millis(1));
        drop(go);
    }
}
