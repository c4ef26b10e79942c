use super::*;
use crate::bus::AccessSize::Byte;
use crate::irq::pic::PicPort;
use crate::irq::{Fabric, Kick};
use crate::timer::TimerQueue;

struct Bench {
    uart: Uart,
    fabric: Arc<Fabric>,
    clock: Clock,
}

impl Bench {
    fn new() -> Self {
        let clock = Clock::manual(1_000_000_000);
        let counters = Arc::<Counters>::default();
        let timers = TimerQueue::new(clock.clone(), counters.clone());
        let kick: Kick = Arc::new(|_| {});
        let fabric = Fabric::new(1, 1_000_000_000, &timers, &kick, counters.clone());
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let mut uart = Uart::new(clock.clone(), fabric.line(4), doorbell, counters);
        uart.set_connected(true);
        Bench { uart, fabric, clock }
    }

    fn get(&mut self, register: u16) -> u32 {
        self.uart.read(register, Byte)
    }

    fn put(&mut self, register: u16, value: u32) {
        self.uart.write(register, Byte, value);
    }

    /// The line, as the PIC's request register shows it once it is a level.
    fn line(&self) -> bool {
        self.fabric.write_pic(PicPort::MasterElcr, 1 << 4);
        self.fabric.write_pic(PicPort::MasterCommand, 0x0a);
        self.fabric.read_pic(PicPort::MasterCommand) & 1 << 4 != 0
    }

    fn sent(&mut self) -> Vec<u8> {
        let mut buffer = Vec::new();
        self.uart.take_transmitted(&mut buffer);
        buffer
    }
}

const DATA: u16 = 0;
const IER: u16 = 1;
const IIR: u16 = 2;
const FCR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCRATCH: u16 = 7;

#[test]
fn linux_finds_a_16750() {
    // The steps of autoconfig() and autoconfig_16550a() in Linux 6.1, drivers/tty/serial/8250/8250_port.c.
    let mut bench = Bench::new();
    bench.put(IER, 0);
    assert_eq!(bench.get(IER) & 0x0f, 0);
    bench.put(IER, 0x0f);
    assert_eq!(bench.get(IER) & 0x0f, 0x0f);
    bench.put(IER, 0);
    bench.put(MCR, 0x10 | 0x0a);
    assert_eq!(bench.get(MSR) & 0xf0, 0x90, "loopback");
    bench.put(MCR, 0);
    // No enhanced feature register: what looks like one is not zero.
    bench.put(LCR, 0xbf);
    bench.put(2, 0);
    bench.put(LCR, 0);
    bench.put(FCR, 1);
    assert_eq!(bench.get(IIR) >> 6, 3, "a working FIFO");
    bench.put(LCR, 0x80);
    assert_ne!(bench.get(2), 0);
    bench.put(LCR, 0xbf);
    assert_ne!(bench.get(2), 0);
    bench.put(LCR, 0);
    bench.put(FCR, 1 | 0x20);
    let without = bench.get(IIR) >> 5;
    bench.put(FCR, 1);
    bench.put(LCR, 0x80);
    bench.put(FCR, 1 | 0x20);
    let with = bench.get(IIR) >> 5;
    bench.put(FCR, 1);
    bench.put(LCR, 0);
    assert_eq!((without, with), (6, 7), "a 16750 with its 64-byte FIFO");
    // No XScale port: bit 6 of the IER does not stick.
    bench.put(IER, 0x40);
    assert_eq!(bench.get(IER), 0);
    for value in [0x55, 0xaa] {
        bench.put(SCRATCH, value);
        assert_eq!(bench.get(SCRATCH), value);
    }
}

#[test]
fn the_transmit_interrupt_is_raised_again_as_linux_tests() {
    // serial8250_do_startup(): the THRE test and the TXEN test.
    let mut bench = Bench::new();
    assert_eq!(bench.get(LSR) & 0x60, 0x60);
    bench.put(IER, 2);
    assert!(bench.line());
    assert_eq!(bench.get(IIR), 2);
    assert!(!bench.line(), "reading the IIR takes it back");
    assert_eq!(bench.get(IIR), 1);
    bench.put(IER, 0);
    bench.put(IER, 2);
    assert_eq!(bench.get(IIR), 2);
    bench.put(IER, 0);
    bench.put(IER, 2);
    bench.put(DATA, 0x41);
    assert_eq!(bench.get(IIR), 2, "empty again at once");
    assert_eq!(bench.sent(), b"A");
}

#[test]
fn the_divisor_hides_two_registers() {
    let mut bench = Bench::new();
    bench.put(IER, 5);
    bench.put(LCR, 0x83);
    bench.put(0, 0x34);
    bench.put(1, 0x12);
    assert_eq!((bench.get(0), bench.get(1)), (0x34, 0x12));
    bench.put(LCR, 3);
    assert_eq!((bench.get(LCR), bench.get(IER)), (3, 5));
    assert!(bench.sent().is_empty());
}

#[test]
fn interrupts_have_priorities() {
    let mut bench = Bench::new();
    bench.put(MCR, 0x10);
    bench.put(IER, 0x0f);
    bench.put(DATA, 1);
    bench.put(DATA, 2);
    bench.put(MCR, 0x10 | 8);
    assert_eq!(bench.get(IIR), 6, "the second byte overran the first");
    assert_eq!(bench.get(LSR) & 3, 3);
    assert_eq!(bench.get(LSR) & 3, 1, "reading takes the error back");
    assert_eq!(bench.get(IIR), 4);
    assert_eq!(bench.get(DATA), 1);
    assert_eq!(bench.get(IIR), 2);
    assert_eq!(bench.get(IIR), 0);
    assert_eq!(bench.get(MSR), 0x8b, "loopback dropped CTS and DSR");
    assert_eq!(bench.get(IIR), 1);
    assert!(!bench.line());
}

#[test]
fn the_ring_indicator_counts_when_it_ends() {
    let mut bench = Bench::new();
    bench.put(MCR, 0x10);
    bench.get(MSR);
    bench.put(MCR, 0x14);
    assert_eq!(bench.get(MSR), 0x40);
    bench.put(MCR, 0x10);
    assert_eq!(bench.get(MSR), 0x04);
}

#[test]
fn a_full_buffer_keeps_the_transmitter_busy() {
    let mut bench = Bench::new();
    bench.put(FCR, 1);
    bench.put(IER, 2);
    let mut count = 0;
    while bench.get(LSR) & 0x20 != 0 {
        for _ in 0..64 {
            bench.put(DATA, 0x55);
            count += 1;
        }
    }
    assert_eq!(bench.get(LSR) & 0x60, 0);
    assert_eq!(bench.get(IIR) & 0xf, 1);
    assert!(!bench.line());
    assert_eq!(bench.sent().len(), count, "nothing lost");
    assert!(bench.line(), "there is room again");
    assert_eq!(bench.get(LSR) & 0x60, 0x60);
}

#[test]
fn bytes_come_in_bursts_and_the_guest_gets_time() {
    let mut bench = Bench::new();
    assert_eq!(bench.uart.receiver(0), Receiver::Busy, "nobody has opened the port");
    bench.put(FCR, 0x81);
    bench.put(IER, 1);
    bench.put(MCR, 0x0b);
    bench.clock.advance(1_000_000_000);
    assert_eq!(bench.uart.receiver(bench.clock.now()), Receiver::Ready);
    let bytes: Vec<u8> = (0..1200).map(|byte| byte as u8).collect();
    assert_eq!(bench.uart.receive(&bytes), BURST);
    assert!(bench.line());
    assert_eq!(bench.get(IIR), 0xc4);
    for expected in &bytes[..BURST - 1] {
        assert_eq!(bench.get(DATA), u32::from(*expected));
    }
    assert_eq!(bench.get(IIR), 0xcc, "below the trigger level");
    assert_eq!(bench.uart.receiver(bench.clock.now()), Receiver::Busy);
    bench.clock.advance(70_000);
    bench.get(DATA);
    assert!(!bench.line());
    assert_eq!(bench.get(LSR) & 1, 0);
    let now = bench.clock.now();
    assert_eq!(bench.uart.receiver(now), Receiver::ReadyAt(now + 70_000));
    assert_eq!(bench.uart.receiver(now + 70_000), Receiver::Ready);
}

#[test]
fn rts_and_a_closed_port_hold_bytes_back() {
    let mut bench = Bench::new();
    bench.put(IER, 1);
    assert_eq!(bench.uart.receiver(u64::MAX), Receiver::Ready, "a simple driver need not raise RTS");
    bench.put(MCR, 3);
    bench.put(MCR, 1);
    assert_eq!(bench.uart.receiver(u64::MAX), Receiver::Busy);
    bench.put(MCR, 3);
    assert_eq!(bench.uart.receiver(u64::MAX), Receiver::Ready);
    bench.put(IER, 0);
    assert_eq!(bench.uart.receiver(u64::MAX), Receiver::Busy);
    let mut polling = Bench::new();
    polling.put(MCR, 3);
    assert_eq!(polling.uart.receiver(u64::MAX), Receiver::Ready, "a driver that polls raises RTS");
}

#[test]
fn with_nobody_listening_the_guest_is_not_held_up() {
    let mut bench = Bench::new();
    bench.uart.set_connected(false);
    for _ in 0..100_000 {
        bench.put(DATA, 0x20);
    }
    assert_eq!(bench.get(LSR) & 0x60, 0x60);
    assert!(bench.sent().is_empty());
}

#[test]
fn any_register_takes_any_value() {
    let mut bench = Bench::new();
    let mut state = 1_u32;
    for _ in 0..200_000 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (register, value) = ((state >> 28) as u16 & 7, state >> 8);
        if state & 1 == 0 { bench.put(register, value) } else { _ = bench.get(register) }
    }
}
