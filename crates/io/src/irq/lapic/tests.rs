use super::countdown::Countdown;
use super::state::{Effect, State, register as r};
use super::*;
use crate::irq::message::{DeliveryMode, Message};
use crate::timer::NEVER;

fn fixed(vector: u8, level: bool) -> Message {
    Message { vector, mode: DeliveryMode::Fixed, destination: 0, logical: false, level }
}

fn enabled() -> State {
    let mut state = State::new(0, 1_000_000_000);
    state.write(r::SVR, 0x1ff, 0).unwrap();
    state
}

fn x2apic(id: u32) -> State {
    let mut state = State::new(id, 1_000_000_000);
    state.set_base(state.base() | 1 << 10, 46).unwrap();
    state.write(r::SVR, 0x1ff, 0).unwrap();
    state
}

#[test]
fn after_reset() {
    let mut state = State::new(3, 1);
    assert_eq!(state.base(), 0xfee0_0800);
    assert_eq!(State::new(0, 1).base(), 0xfee0_0900, "the first is the bootstrap processor");
    for (register, value) in [
        (r::ID, 3 << 24),
        (r::VERSION, 0x0105_0014),
        (r::TPR, 0),
        (r::LDR, 0),
        (r::DFR, u32::MAX),
        (r::SVR, 0xff),
        (r::LVT_LINT0, 0x1_0000),
        (r::LVT_ERROR, 0x1_0000),
        (r::CURRENT_COUNT, 0),
    ] {
        assert_eq!(state.read(register, 0), Ok(value), "register {register:#x}");
    }
}

#[test]
fn interrupts_nest_by_priority_class() {
    let mut state = enabled();
    assert!(state.accept(&fixed(0x31, false)));
    assert!(state.accept(&fixed(0x35, false)));
    assert_eq!(state.attention(), attention::FIXED);
    assert_eq!(state.acknowledge(), Some(0x35));
    assert_eq!(state.attention(), 0, "the same class waits");
    assert_eq!(state.read(r::PPR, 0), Ok(0x30));
    state.accept(&fixed(0xfd, false));
    assert_eq!(state.acknowledge(), Some(0xfd));
    assert_eq!(state.read(r::ISR + 7, 0), Ok(1 << 29));
    assert_eq!(state.read(r::IRR + 1, 0), Ok(1 << 17));
    assert_eq!(state.write(r::EOI, 0, 0), Ok(Effect::None));
    assert_eq!(state.attention(), 0);
    state.write(r::EOI, 0, 0).unwrap();
    assert_eq!(state.acknowledge(), Some(0x31));
    state.write(r::EOI, 0, 0).unwrap();
    assert_eq!(state.acknowledge(), None);
    assert_eq!(state.write(r::EOI, 0, 0), Ok(Effect::None), "one too many is nothing");
}

#[test]
fn the_task_priority_holds_back() {
    let mut state = enabled();
    state.set_task_priority(0x50);
    assert_eq!(state.read(r::TPR, 0), Ok(0x50));
    state.accept(&fixed(0x5f, false));
    assert_eq!(state.attention(), 0);
    state.write(r::TPR, 0x4f, 0).unwrap();
    assert_eq!(state.task_priority() >> 4, 4);
    assert_eq!(state.attention(), attention::FIXED);
    assert_eq!(state.acknowledge(), Some(0x5f));
}

#[test]
fn the_end_of_a_level_goes_to_the_ioapic_unless_suppressed() {
    let mut state = enabled();
    for (svr, effect) in [(0x1ff, Effect::EndOfLevel(0x41)), (0x11ff, Effect::None)] {
        state.write(r::SVR, svr, 0).unwrap();
        state.accept(&fixed(0x41, true));
        assert_eq!(state.read(r::TMR + 2, 0), Ok(2));
        assert_eq!(state.acknowledge(), Some(0x41));
        assert_eq!(state.write(r::EOI, 0, 0), Ok(effect));
    }
    state.accept(&fixed(0x41, false));
    assert_eq!(state.read(r::TMR + 2, 0), Ok(0), "an edge clears the trigger mode");
}

#[test]
fn software_disabled_takes_no_vectors_and_masks_its_own() {
    let mut state = enabled();
    state.write(r::LVT_LINT0, 0x700, 0).unwrap();
    state.write(r::SVR, 0xff, 0).unwrap();
    assert_eq!(state.read(r::LVT_LINT0, 0), Ok(0x1_0700));
    state.write(r::LVT_LINT0, 0x700, 0).unwrap();
    assert_eq!(state.read(r::LVT_LINT0, 0), Ok(0x1_0700), "cannot be unmasked");
    assert!(!state.accept(&fixed(0x40, false)));
    assert!(state.accept(&Message { mode: DeliveryMode::Nmi, ..fixed(0, false) }));
    assert_eq!(state.attention(), attention::NMI);
    assert!(state.take_nmi());
    assert!(!state.take_nmi());
    let nmi = Message { mode: DeliveryMode::Nmi, ..fixed(0, false) };
    let taken = |state: &mut State| std::iter::from_fn(|| state.take_nmi().then_some(())).count();
    (0..3).for_each(|_| assert!(state.accept(&nmi)));
    assert_eq!(taken(&mut state), 2, "one for the next instruction, and one behind it");
    (0..2).for_each(|_| assert!(state.accept(&nmi)));
    state.merge_nmis();
    assert!(state.accept(&nmi));
    assert_eq!(taken(&mut state), 1, "one is handled, so one waits");
}

#[test]
fn errors_show_after_a_write() {
    let mut state = enabled();
    state.write(r::LVT_ERROR, 0xfe, 0).unwrap();
    state.accept(&fixed(3, false));
    assert_eq!(state.read(r::ESR, 0), Ok(0));
    assert_eq!(state.acknowledge(), Some(0xfe));
    state.write(r::ESR, 0, 0).unwrap();
    assert_eq!(state.read(r::ESR, 0), Ok(1 << 6));
    assert!(state.read(0x01, 0).is_err());
    assert_eq!(state.write(r::ICR_LOW, 0x0000_4005, 0), Ok(Effect::None), "vector 5 cannot be sent");
    state.write(r::ESR, 0, 0).unwrap();
    assert_eq!(state.read(r::ESR, 0), Ok(1 << 7 | 1 << 5));
    state.write(r::LVT_ERROR, 3, 0).unwrap();
    state.accept(&fixed(3, false));
    state.write(r::ESR, 0, 0).unwrap();
    assert_eq!(state.read(r::ESR, 0), Ok(1 << 6), "a bad vector for the error itself ends there");
}

#[test]
fn destinations() {
    let mut state = State::new(2, 1);
    assert!(state.matches(2, false) && state.matches(u32::MAX, false) && !state.matches(1, false));
    state.write(r::LDR, 0x0400_0000, 0).unwrap();
    assert!(state.matches(0x06, true) && !state.matches(0x03, true) && state.matches(0xff, true));
    state.write(r::DFR, 0x0fff_ffff, 0).unwrap();
    state.write(r::LDR, 0x2400_0000, 0).unwrap();
    assert!(state.matches(0x2c, true) && !state.matches(0x3c, true) && !state.matches(0x23, true));

    let state = x2apic(0x12);
    assert!(state.matches(0x12, false) && !state.matches(0x112, false));
    assert!(state.matches(0x0001_0006, true) && !state.matches(0x0000_0004, true));
    assert!(!state.matches(0x0001_0008, true) && state.matches(u32::MAX, true));
}

#[test]
fn commands_become_messages() {
    let mut state = enabled();
    state.write(r::ICR_HIGH, 0x0300_0000, 0).unwrap();
    let sent = state.write(r::ICR_LOW, 0x0000_40fb, 0).unwrap();
    let expected = Message { destination: 3, ..fixed(0xfb, false) };
    assert_eq!(sent, Effect::Send(expected, Shorthand::Destination));
    assert_eq!(state.read(r::ICR_LOW, 0), Ok(0x40fb), "sent: delivery status is idle");
    // The INIT that Linux sends, and the de-assert that it may send after it.
    assert!(matches!(
        state.write(r::ICR_LOW, 0xc500, 0).unwrap(),
        Effect::Send(Message { mode: DeliveryMode::Init, .. }, Shorthand::Destination)
    ));
    assert_eq!(state.write(r::ICR_LOW, 0x8500, 0), Ok(Effect::None));
    state.write(r::ICR_HIGH, 0xff00_0000, 0).unwrap();
    assert!(matches!(
        state.write(r::ICR_LOW, 0x0030, 0).unwrap(),
        Effect::Send(Message { destination: u32::MAX, .. }, _)
    ));
    for (bits, shorthand) in [(1, Shorthand::Oneself), (2, Shorthand::All), (3, Shorthand::Others)] {
        let Ok(Effect::Send(_, got)) = state.write(r::ICR_LOW, bits << 18 | 0x30, 0) else { panic!() };
        assert_eq!(got, shorthand);
    }
}

#[test]
fn x2apic_mode_is_entered_and_left_by_the_rules() {
    let mut state = State::new(1, 1);
    let (off, xapic, both) = (0xfee0_0000_u64, 0xfee0_0800_u64, 0xfee0_0c00_u64);
    assert!(state.set_base(off | 1 << 10, 46).is_err(), "x2APIC without enable");
    assert!(state.set_base(xapic | 1 << 46, 46).is_err(), "beyond the physical address");
    assert!(state.set_base(xapic | 1, 46).is_err(), "reserved");
    assert_eq!(state.page(), Some(off));
    state.set_base(both, 46).unwrap();
    assert_eq!(state.page(), None);
    assert!(state.set_base(xapic, 46).is_err(), "not back to xAPIC directly");
    state.set_base(off, 46).unwrap();
    assert!(state.set_base(both, 46).is_err(), "not from disabled directly");
    state.set_base(xapic, 46).unwrap();
    assert_eq!(state.base(), xapic, "the bootstrap bit is read-only");
}

#[test]
fn x2apic_registers() {
    let mut state = x2apic(0x25);
    assert_eq!(state.read(r::ID, 0), Ok(0x25));
    assert_eq!(state.read(r::LDR, 0), Ok(0x0002_0020));
    assert!(state.write(r::LDR, 0, 0).is_err());
    assert!(state.read(r::DFR, 0).is_err());
    assert!(state.read(r::EOI, 0).is_err());
    assert!(state.write(r::EOI, 1, 0).is_err());
    assert!(state.write(r::TPR, 0x100, 0).is_err());
    assert!(state.write(r::SVR, 1 << 9 | 1 << 10, 0).is_err());
    assert!(state.write_icr(1 << 20).is_err());
    let Ok(Effect::Send(message, Shorthand::Destination)) = state.write_icr(0x0001_0006_0000_08f0) else { panic!() };
    assert_eq!((message.destination, message.logical, message.vector), (0x0001_0006, true, 0xf0));
    let Ok(Effect::Send(message, Shorthand::Oneself)) = state.write(r::SELF_IPI, 0x77, 0) else { panic!() };
    assert_eq!(message.vector, 0x77);
}

#[test]
fn init_and_startup() {
    let mut state = State::new(1, 1);
    let message = |mode, vector| Message { mode, ..fixed(vector, false) };
    state.accept(&message(DeliveryMode::Nmi, 0));
    assert_eq!(state.attention(), 0, "waits for start-up, not for that");
    state.accept(&message(DeliveryMode::Init, 0));
    state.accept(&message(DeliveryMode::StartUp, 0x99));
    state.accept(&message(DeliveryMode::StartUp, 0x98));
    assert_eq!(state.attention(), attention::INIT | attention::STARTUP);
    assert!(state.take_init());
    assert_eq!(state.attention(), attention::STARTUP);
    assert_eq!(state.take_startup(), Some(0x99), "the second is ignored");
    state.accept(&message(DeliveryMode::StartUp, 0x97));
    assert_eq!(state.attention(), 0, "it runs");
    state.write(r::SVR, 0x1ff, 0).unwrap();
    state.accept(&message(DeliveryMode::Init, 0));
    assert!(state.take_init());
    assert_eq!(state.read(r::SVR, 0), Ok(0xff));
}

#[test]
fn lint0_carries_the_pic() {
    let mut state = State::new(0, 1);
    state.set_virtual_wire();
    state.set_lint0(true);
    assert_eq!(state.attention(), attention::PIC);
    state.set_lint0(false);
    assert_eq!(state.attention(), 0);
    // As a local interrupt of its own (check_timer() in Linux tries this).
    state.write(r::LVT_LINT0, 0x31, 0).unwrap();
    state.set_lint0(true);
    assert_eq!(state.acknowledge(), Some(0x31));
    state.write(r::LVT_LINT0, 0x1_0700, 0).unwrap();
    assert_eq!(state.attention(), 0);
    // Disabled, the pin is INTR itself.
    state.set_base(0xfee0_0000, 46).unwrap();
    assert_eq!(state.attention(), attention::PIC);
}

// ---- the timer -----------------------------------------------------------------------------------------------------

#[test]
fn one_shot_counts_down_once() {
    let mut timer = Countdown::new(1_000_000_000);
    timer.set_divide_register(3, 0);
    timer.set_initial(1000, 0);
    assert_eq!(timer.current(8_000), 500, "divided by 16");
    assert_eq!(timer.due, 16_001);
    assert!(!timer.expire(16_000));
    assert!(timer.expire(16_001));
    assert_eq!((timer.current(20_000), timer.due), (0, NEVER));
    timer.set_initial(1000, 20_000);
    timer.set_initial(0, 21_000);
    assert_eq!(timer.due, NEVER);
}

#[test]
fn all_divisors() {
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let mut timer = Countdown::new(1_000_000_000);
        timer.set_divide_register(code, 0);
        timer.set_initial(10, 0);
        assert_eq!(timer.due, 10 * divisor + 1, "code {code}");
    }
}

#[test]
fn periodic_keeps_its_phase_and_merges_missed_periods() {
    let mut timer = Countdown::new(1_000_000_000);
    timer.set_divide_register(11, 0);
    timer.set_mode(1, 0);
    timer.set_initial(1_000_000, 0);
    assert!(timer.expire(1_000_001));
    assert_eq!(timer.due, 2_000_001);
    assert_eq!(timer.current(1_250_000), 750_000);
    assert!(timer.expire(5_300_000));
    assert!(!timer.expire(5_300_000));
    assert_eq!(timer.due, 6_000_001);
    // A period that nobody could serve does not spin the thread.
    timer.set_initial(1, 6_000_000);
    assert!(timer.expire(6_000_010));
    assert_eq!(timer.due, 6_050_010);
}

#[test]
fn deadline_mode_is_apart() {
    let mut timer = Countdown::new(1_000_000_000);
    timer.set_deadline(5, 5);
    assert_eq!(timer.due, NEVER, "not in this mode");
    timer.set_initial(100, 0);
    timer.set_mode(2, 0);
    assert_eq!(timer.due, NEVER);
    timer.set_initial(100, 0);
    assert_eq!((timer.initial(), timer.due), (0, NEVER));
    timer.set_deadline(500, 250);
    assert!(timer.expire(250));
    assert_eq!(timer.deadline(), 0, "disarmed when it has fired");
    timer.set_deadline(900, 450);
    timer.set_mode(0, 0);
    assert_eq!(timer.due, NEVER);
}
