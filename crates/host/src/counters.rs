//! The one list of counters: what `--stats` prints and what policies may read.
//!
//! One [`Counters`] a VM. Add a line to the list to add a counter; nothing else is needed. Counters that translated
//! code or every port access would touch belong to their own thread and are summed into these when it stops.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident => $name:literal,)*) => {
        /// All counters of one VM.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $field: Counter,)*
        }

        impl Counters {
            /// Every counter as (dotted name, value), in the order of the list.
            #[must_use]
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$(($name, self.$field.get()),)*]
            }
        }
    };
}

/// A number that only grows, or is set by its one owner.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    // I/O virtualization.
    /// Interrupts that a processor took from its local APIC.
    interrupts_apic => "interrupts.apic",
    /// Interrupts that a processor took from the PIC.
    interrupts_pic => "interrupts.pic",
    /// Interprocessor interrupts sent, one a command.
    interrupts_ipi => "interrupts.ipi",
    /// Times that the timer thread woke up.
    timer_wakeups => "timer.wakeups",
    /// Deadlines that passed and were served.
    timer_expirations => "timer.expirations",
    /// Bytes that guests sent through serial ports.
    serial_sent => "serial.sent_bytes",
    /// Bytes that guests received through serial ports.
    serial_received => "serial.received_bytes",
    /// Bytes that a guest wrote to a full transmitter, which loses them as hardware does.
    serial_overrun => "serial.overrun_bytes",
    /// Times that the serial thread had to be woken by a processor.
    serial_wakeups => "serial.wakeups",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_values_show() {
        let counters = Counters::default();
        counters.serial_sent.add(3);
        counters.serial_sent.add(4);
        let all = counters.all();
        assert!(all.contains(&("serial.sent_bytes", 7)));
        let mut names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }
}
