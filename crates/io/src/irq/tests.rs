use std::sync::Mutex;

use host::clock::Clock;

use super::*;

struct Bench {
    fabric: Arc<Fabric>,
    timers: Arc<TimerQueue>,
    clock: Clock,
    kicks: Arc<Mutex<Vec<usize>>>,
}

/// Registers of the local APIC's page.
const APIC_TPR: u64 = 0x80;
const APIC_EOI: u64 = 0xb0;
const APIC_LDR: u64 = 0xd0;
const APIC_SVR: u64 = 0xf0;
const APIC_ICR: u64 = 0x300;
const APIC_ICR_HIGH: u64 = 0x310;
const APIC_TIMER: u64 = 0x320;
const APIC_LINT0: u64 = 0x350;

impl Bench {
    fn new(cpus: usize) -> Self {
        let clock = Clock::manual(2_000_000_000);
        let counters = Arc::<Counters>::default();
        let timers = TimerQueue::new(clock.clone(), counters.clone());
        let kicks = Arc::new(Mutex::new(Vec::new()));
        let told = kicks.clone();
        let kick: Kick = Arc::new(move |cpu| told.lock().unwrap().push(cpu));
        let fabric = Fabric::new(cpus, 1_000_000_000, &timers, &kick, counters);
        Bench { fabric, timers, clock, kicks }
    }

    /// All local APICs software-enabled, logical identifier 1 << cpu, as Linux does in flat mode; all running.
    fn linux(cpus: usize) -> Self {
        let bench = Bench::new(cpus);
        for cpu in 0..cpus {
            bench.apic(cpu, APIC_SVR, 0x1ff);
            bench.apic(cpu, APIC_LDR, 1 << (24 + cpu));
            if cpu != 0 {
                bench.apic(0, APIC_ICR_HIGH, (cpu as u64) << 24);
                bench.apic(0, APIC_ICR, 0x4500);
                assert!(bench.fabric.take_init(cpu));
                bench.apic(cpu, APIC_SVR, 0x1ff);
                bench.apic(cpu, APIC_LDR, 1 << (24 + cpu));
                bench.apic(0, APIC_ICR, 0x4699);
                assert_eq!(bench.fabric.take_startup(cpu), Some(0x99));
            }
        }
        bench.take_kicks();
        bench
    }

    fn apic(&self, cpu: usize, register: u64, value: u64) {
        assert!(self.fabric.write_apic_page(cpu, Gpa(0xfee0_0000 + register), AccessSize::Dword, value));
    }

    fn apic_read(&self, cpu: usize, register: u64) -> u64 {
        self.fabric.read_apic_page(cpu, Gpa(0xfee0_0000 + register), AccessSize::Dword).unwrap()
    }

    fn ioapic(&self, register: u32, value: u32) {
        self.fabric.write_ioapic(0, register);
        self.fabric.write_ioapic(0x10, value);
    }

    fn redirect(&self, pin: u32, low: u32, destination: u32) {
        self.ioapic(0x11 + 2 * pin, destination << 24);
        self.ioapic(0x10 + 2 * pin, low);
    }

    fn pic(&self, vector: u8) {
        for (port, value) in [
            (PicPort::MasterCommand, 0x11),
            (PicPort::MasterData, vector),
            (PicPort::MasterData, 4),
            (PicPort::MasterData, 1),
            (PicPort::SlaveCommand, 0x11),
            (PicPort::SlaveData, vector + 8),
            (PicPort::SlaveData, 2),
            (PicPort::SlaveData, 1),
        ] {
            self.fabric.write_pic(port, value);
        }
    }

    fn take_kicks(&self) -> Vec<usize> {
        std::mem::take(&mut self.kicks.lock().unwrap())
    }
}

#[test]
fn the_pic_reaches_the_first_processor_by_virtual_wire() {
    let bench = Bench::new(2);
    bench.fabric.set_up_as_firmware();
    bench.pic(0x30);
    let line = bench.fabric.line(4);
    line.set(true);
    assert_eq!(bench.take_kicks(), [0]);
    assert_eq!(bench.fabric.pending(0), Some(Interrupt::External));
    assert_eq!(bench.fabric.pending(1), None);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x34));
    assert_eq!(bench.fabric.pending(0), None);
    // A better one while this is in service, and one that was acknowledged late.
    let timer = bench.fabric.line(0);
    timer.set(true);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x30));
    bench.apic(0, APIC_LINT0, 0x1_0700);
    bench.fabric.write_pic(PicPort::MasterCommand, 0x20);
    assert_eq!(bench.fabric.pending(0), None, "the wire is masked");
}

#[test]
fn a_line_is_shared_by_its_sources() {
    let bench = Bench::linux(1);
    bench.redirect(4, 0x8031, 0);
    let (com1, com3) = (bench.fabric.line(4), bench.fabric.line(4));
    com1.set(true);
    com3.set(true);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x31));
    com1.set(false);
    bench.apic(0, APIC_EOI, 0);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x31), "COM3 still asserts it");
    com3.set(false);
    bench.apic(0, APIC_EOI, 0);
    assert_eq!(bench.fabric.pending(0), None);
    // A line that does not exist.
    bench.fabric.line(200).set(true);
}

#[test]
fn the_timer_is_pin_2_and_line_2_is_nothing() {
    let bench = Bench::linux(1);
    bench.redirect(2, 0x0030, 0);
    bench.fabric.line(2).set(true);
    assert_eq!(bench.fabric.pending(0), None);
    bench.fabric.line(0).set(true);
    assert_eq!(bench.take_kicks(), [0]);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x30));
}

#[test]
fn the_pic_through_the_ioapic() {
    let bench = Bench::linux(1);
    bench.pic(0x40);
    bench.redirect(0, 0x0700, 0);
    let (first, second) = (bench.fabric.line(3), bench.fabric.line(1));
    first.set(true);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x43));
    second.set(true);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x41));
    assert_eq!(bench.fabric.acknowledge(0), None);
}

#[test]
fn two_pic_requests_give_two_edges() {
    // LINT0 as an ordinary edge: it must see the second request after the first was acknowledged.
    let bench = Bench::linux(1);
    bench.pic(0x40);
    bench.redirect(0, 0x0700, 0);
    bench.fabric.line(3).set(true);
    bench.fabric.line(1).set(true);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x41), "the better one");
    assert_eq!(bench.fabric.pending(0), None, "the other waits for the EOI");
    bench.fabric.write_pic(PicPort::MasterCommand, 0x20);
    assert_eq!(bench.fabric.acknowledge(0), Some(0x43));
}

#[test]
fn logical_lowest_priority_goes_to_the_idle_one_in_turn() {
    let bench = Bench::linux(4);
    bench.redirect(4, 0x0951, 0x0e);
    bench.apic(2, APIC_TPR, 0x60);
    let line = bench.fabric.line(4);
    let mut hits = [0; 4];
    for _ in 0..8 {
        line.set(true);
        line.set(false);
        for (cpu, hit) in hits.iter_mut().enumerate() {
            while bench.fabric.acknowledge(cpu).is_some() {
                *hit += 1;
                bench.apic(cpu, APIC_EOI, 0);
            }
        }
    }
    assert_eq!((hits[0], hits[2]), (0, 0), "not addressed, and busy");
    assert!(hits[1] > 0 && hits[3] > 0, "{hits:?}");
    assert_eq!(hits.iter().sum::<i32>(), 8);
}

#[test]
fn interprocessor_interrupts() {
    let bench = Bench::linux(3);
    bench.apic(1, APIC_ICR_HIGH, 2 << 24);
    bench.apic(1, APIC_ICR, 0x40fb);
    assert_eq!(bench.take_kicks(), [2]);
    assert_eq!(bench.fabric.acknowledge(2), Some(0xfb));
    bench.apic(2, APIC_EOI, 0);
    bench.apic(1, APIC_ICR, 0xc_40fc);
    assert_eq!(bench.take_kicks(), [0, 2], "all but itself");
    bench.apic(1, APIC_ICR, 0x4_40fd);
    assert_eq!(bench.fabric.acknowledge(1), Some(0xfd));
    bench.apic(1, APIC_ICR_HIGH, 0);
    bench.apic(1, APIC_ICR, 0x4400);
    assert_eq!(bench.fabric.pending(0), Some(Interrupt::Nmi), "before the vector that waits too");
    assert!(bench.fabric.take_nmi(0));
    assert_eq!(bench.fabric.acknowledge(0), Some(0xfc));
    // Nobody there.
    bench.apic(1, APIC_ICR_HIGH, 0x77 << 24);
    bench.apic(1, APIC_ICR, 0x40fb);
}

#[test]
fn x2apic_by_msr() {
    let bench = Bench::new(2);
    let fabric = &bench.fabric;
    assert_eq!(fabric.read_msr(0, 0x802), Err(GuestFault::GP0), "not in x2APIC mode");
    for cpu in 0..2 {
        let base = fabric.read_msr(cpu, 0x1b).unwrap();
        fabric.write_msr(cpu, 0x1b, base | 1 << 10, 46).unwrap();
        fabric.write_msr(cpu, 0x80f, 0x1ff, 46).unwrap();
    }
    assert!(fabric.read_apic_page(0, Gpa(0xfee0_0020), AccessSize::Dword).is_none());
    assert_eq!(fabric.read_msr(1, 0x802), Ok(1));
    assert_eq!(fabric.write_msr(0, 0x808, 1 << 32, 46), Err(GuestFault::GP0));
    assert_eq!(fabric.write_msr(0, 0x831, 0, 46), Err(GuestFault::GP0), "no ICR high");
    fabric.write_msr(0, 0x83f, 0x66, 46).unwrap();
    assert_eq!(fabric.acknowledge(0), Some(0x66));
    fabric.write_msr(0, 0x80b, 0, 46).unwrap();
    // Start the other one.
    fabric.write_msr(0, 0x830, 1 << 32 | 0x4500, 46).unwrap();
    assert_eq!(fabric.pending(1), Some(Interrupt::Init));
    assert!(fabric.take_init(1));
    fabric.write_msr(0, 0x830, 1 << 32 | 0x4608, 46).unwrap();
    assert_eq!(fabric.pending(1), Some(Interrupt::Startup));
    assert_eq!(fabric.take_startup(1), Some(8));
    assert_eq!(fabric.read_msr(0, 0x830), Ok(1 << 32 | 0x4608));
    assert_eq!(fabric.read_msr(0, 0x123), Err(GuestFault::GP0));
    assert_eq!(fabric.read_msr(9, 0x1b), Err(GuestFault::GP0));
}

#[test]
fn the_apic_timer_interrupts() {
    let bench = Bench::linux(1);
    bench.apic(0, 0x3e0, 0xb);
    bench.apic(0, APIC_TIMER, 0x2_00ec);
    bench.apic(0, 0x380, 1_000_000);
    for _ in 0..3 {
        assert_eq!(bench.fabric.pending(0), None);
        bench.clock.advance(1_000_001);
        bench.timers.run_due();
        assert_eq!(bench.fabric.acknowledge(0), Some(0xec));
        bench.apic(0, APIC_EOI, 0);
    }
    // Masked, it counts on without a word.
    bench.apic(0, APIC_TIMER, 0x3_00ec);
    bench.clock.advance(3_000_000);
    bench.timers.run_due();
    assert_eq!(bench.fabric.pending(0), None);
    assert!(bench.apic_read(0, 0x390) > 0);
    bench.apic(0, 0x380, 0);
    assert_eq!(bench.timers.next_deadline(), crate::timer::NEVER);
}

#[test]
fn the_tsc_deadline() {
    let bench = Bench::linux(1);
    let fabric = &bench.fabric;
    bench.clock.advance(1_000);
    fabric.write_msr(0, 0x6e0, 5_000, 46).unwrap();
    assert_eq!(fabric.read_msr(0, 0x6e0), Ok(0), "not in this mode");
    bench.apic(0, APIC_TIMER, 0x4_00ec);
    fabric.write_msr(0, 0x6e0, 5_000, 46).unwrap();
    assert_eq!(fabric.read_msr(0, 0x6e0), Ok(5_000));
    // The counter runs at 2 GHz: 5000 is 2500 ns.
    bench.clock.advance(1_400);
    bench.timers.run_due();
    assert_eq!(fabric.pending(0), None);
    bench.clock.advance(101);
    bench.timers.run_due();
    assert_eq!(fabric.acknowledge(0), Some(0xec));
    assert_eq!(fabric.read_msr(0, 0x6e0), Ok(0));
    bench.apic(0, APIC_EOI, 0);
    // One that has passed fires at once.
    fabric.write_msr(0, 0x6e0, 1, 46).unwrap();
    assert_eq!(fabric.acknowledge(0), Some(0xec));
    bench.apic(0, APIC_EOI, 0);
    // A guest that has set its counter ahead: its deadline is nearer.
    fabric.write_msr(0, 0x6e0, 1_000_000, 46).unwrap();
    fabric.set_tsc_ahead(0, 999_000);
    assert_eq!(fabric.acknowledge(0), Some(0xec));
    bench.apic(0, APIC_EOI, 0);
    fabric.write_msr(0, 0x6e0, u64::MAX, 46).unwrap();
    assert_eq!(fabric.pending(0), None);
}

#[test]
fn the_page_takes_whole_words_and_gives_parts() {
    let bench = Bench::linux(1);
    let page = |offset: u64, size| bench.fabric.read_apic_page(0, Gpa(0xfee0_0000 + offset), size).unwrap();
    assert_eq!(page(0x30, AccessSize::Dword), 0x0105_0014);
    assert_eq!(page(0x32, AccessSize::Word), 0x0105);
    assert_eq!(page(0x34, AccessSize::Dword), 0);
    bench.fabric.write_apic_page(0, Gpa(0xfee0_0080), AccessSize::Byte, 0x50);
    bench.fabric.write_apic_page(0, Gpa(0xfee0_0084), AccessSize::Dword, 0x50);
    assert_eq!(bench.fabric.task_priority(0), 0);
    bench.fabric.set_task_priority(0, 0x70);
    assert_eq!(bench.apic_read(0, APIC_TPR), 0x70);
}

#[test]
fn registers_take_any_value() {
    let bench = Bench::new(3);
    let lines: Vec<_> = (0..16).map(|line| bench.fabric.line(line)).collect();
    let mut state = 7_u64;
    for _ in 0..100_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (cpu, what, value) = ((state >> 60) as usize % 3, state >> 56 & 15, state >> 20);
        let ports = [
            PicPort::MasterCommand,
            PicPort::MasterData,
            PicPort::SlaveCommand,
            PicPort::SlaveData,
            PicPort::MasterElcr,
            PicPort::SlaveElcr,
        ];
        match what {
            0..4 => {
                _ = bench.fabric.write_apic_page(cpu, Gpa(0xfee0_0000 | value & 0xff0), AccessSize::Dword, state >> 32)
            }
            4 => _ = bench.fabric.read_apic_page(cpu, Gpa(0xfee0_0000 | value & 0xfff), AccessSize::Dword),
            5 => _ = bench.fabric.write_msr(cpu, 0x800 | (value & 0x3f) as u32, state >> 32, 46),
            6 => _ = bench.fabric.read_msr(cpu, 0x800 | (value & 0xff) as u32),
            7 => _ = bench.fabric.write_msr(cpu, 0x1b, 0xfee0_0000 | value & 0xd00, 46),
            8 => bench.fabric.write_ioapic(value & 0x40 | 0x10 & value, (state >> 32) as u32),
            9 => bench.fabric.write_ioapic(0, (value & 0x3f) as u32),
            10 => bench.fabric.write_pic(ports[(value % 6) as usize], (state >> 40) as u8),
            11 => _ = bench.fabric.read_pic(ports[(value % 6) as usize]),
            12 => lines[(value & 15) as usize].set(state >> 40 & 1 != 0),
            13 => _ = bench.fabric.acknowledge(cpu),
            14 => {
                bench.clock.advance(value & 0xffff);
                bench.timers.run_due();
            }
            _ => _ = (bench.fabric.take_init(cpu), bench.fabric.take_nmi(cpu), bench.fabric.take_startup(cpu)),
        }
    }
}
