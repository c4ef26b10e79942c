"""The slow devices, each with nothing around it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from ringzero.devices import (
    I8042,
    NAMES,
    DebugExit,
    DebugPort,
    Device,
    PcTestdev,
    PortRange,
    PvPanic,
    Rtc,
    attach,
    check_names,
    named,
)
from ringzero.devices.debug_exit import exit_status
from ringzero.errors import InputError

INDEX, DATA = 0x70, 0x71
COMMAND, KEYS = 0x64, 0x60


class Ends(list[str]):
    """Collects the reasons with which a device asked for the end."""

    def __call__(self, reason: str) -> None:
        self.append(reason)


class Board:
    """Collects what a device does to the machine around it."""

    def __init__(self) -> None:
        self.ends = Ends()
        self.lines: list[tuple[int, bool]] = []
        self.scratch: list[tuple[int, int]] = []

    def request_end(self, reason: str) -> None:
        self.ends(reason)

    def raise_irq(self, line: int, level: bool) -> None:
        self.lines.append((line, level))

    def add_scratch(self, first: int, size: int) -> None:
        self.scratch.append((first, size))


# --- the protocol ---


def test_every_device_follows_the_protocol() -> None:
    asked_for = [named(name, Board()) for name in NAMES]
    for device in (Rtc(), I8042(Ends()), PvPanic(Ends()), DebugPort(print), *asked_for):
        assert isinstance(device, Device)
        assert all(isinstance(window, PortRange) for window in device.ports)


def test_attach_turns_offsets_into_ports_and_cuts_values_to_size() -> None:
    class Bus:
        def __init__(self) -> None:
            self.windows: dict[int, tuple[int, object]] = {}

        def add_port_device(self, first: int, count: int, device: object) -> None:
            self.windows[first] = (count, device)

    class Echo:
        name = "echo"
        ports = (PortRange(0x100, 4), PortRange(0x200))

        def __init__(self) -> None:
            self.written: list[tuple[int, int, int]] = []

        def read(self, port: int, size: int) -> int:
            return 0xFFFF_0000 | port

        def write(self, port: int, size: int, value: int) -> None:
            self.written.append((port, size, value))

    bus, echo = Bus(), Echo()
    attach(bus, echo)
    assert {first: count for first, (count, _) in bus.windows.items()} == {0x100: 4, 0x200: 1}
    window = bus.windows[0x100][1]
    assert window.read(2, 1) == 0x02  # type: ignore[attr-defined]
    assert window.read(2, 2) == 0x102  # type: ignore[attr-defined]
    window.write(3, 1, 7)  # type: ignore[attr-defined]
    assert echo.written == [(0x103, 1, 7)]


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0xFFFF, 2), (0x10000, 1)])
def test_port_ranges_stay_within_64_k(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="within"):
        PortRange(first, count)


# --- RTC ---


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, *when: int) -> None:
        self.now = datetime(*when, tzinfo=UTC).timestamp()  # type: ignore[misc]

    def __call__(self) -> float:
        return self.now


def cmos(rtc: Rtc, index: int) -> int:
    rtc.write(INDEX, 1, index)
    return rtc.read(DATA, 1)


def set_cmos(rtc: Rtc, index: int, value: int) -> None:
    rtc.write(INDEX, 1, index)
    rtc.write(DATA, 1, value)


def test_time_in_bcd_by_default() -> None:
    rtc = Rtc(Clock(2026, 11, 22, 13, 45, 59))
    assert [cmos(rtc, i) for i in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [
        0x59,
        0x45,
        0x13,
        1,
        0x22,
        0x11,
        0x26,
        0x20,
    ]
    assert cmos(rtc, 0x0B) == 0x02
    assert cmos(rtc, 0x0D) == 0x80
    assert cmos(rtc, 0x0C) == 0


@pytest.mark.parametrize(
    ("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_twelve_hour_clock(hour: int, shown: int) -> None:
    rtc = Rtc(Clock(2026, 1, 2, hour, 0, 0))
    set_cmos(rtc, 0x0B, 0x00)
    assert cmos(rtc, 4) == shown
    set_cmos(rtc, 0x0B, 0x04)
    assert cmos(rtc, 4) == (hour % 12 or 12) | (0x80 if hour >= 12 else 0)


def test_binary_mode() -> None:
    rtc = Rtc(Clock(2026, 11, 22, 13, 45, 59))
    set_cmos(rtc, 0x0B, 0x06)
    assert [cmos(rtc, i) for i in (0, 2, 4, 7, 8, 9)] == [59, 45, 13, 22, 11, 26]


def test_update_in_progress_is_set_just_before_the_second_changes() -> None:
    clock = Clock(2026, 1, 1)
    rtc = Rtc(clock)
    start = clock.now
    for fraction, set_ in ((0.0, 0), (0.5, 0), (0.9990, 0), (0.9998, 0x80), (0.99999, 0x80), (1.0, 0)):
        clock.now = start + fraction
        assert cmos(rtc, 0x0A) & 0x80 == set_, fraction
    assert cmos(rtc, 0x0A) & 0x7F == 0x26


def test_setting_the_time_moves_the_guests_clock_and_it_goes_on() -> None:
    clock = Clock(2026, 1, 1, 0, 0, 0)
    rtc = Rtc(clock)
    set_cmos(rtc, 0x0B, 0x82)  # SET: the registers stand
    for index, value in ((0, 0x30), (2, 0x59), (4, 0x23), (7, 0x31), (8, 0x12), (9, 0x99), (0x32, 0x19)):
        set_cmos(rtc, index, value)
    clock.now += 100
    assert cmos(rtc, 0) == 0x30
    set_cmos(rtc, 0x0B, 0x02)
    assert [cmos(rtc, i) for i in (0, 2, 4, 7, 8, 9, 0x32)] == [0x30, 0x59, 0x23, 0x31, 0x12, 0x99, 0x19]
    clock.now += 31
    assert [cmos(rtc, i) for i in (0, 2, 4, 7, 8, 9, 0x32)] == [0x01, 0x00, 0x00, 0x01, 0x01, 0x00, 0x20]


def test_nonsense_leaves_the_time_as_it_was() -> None:
    rtc = Rtc(Clock(2026, 1, 1, 0, 0, 0))
    set_cmos(rtc, 8, 0x13)
    assert cmos(rtc, 8) == 0x01
    set_cmos(rtc, 0, 0xFF)
    assert cmos(rtc, 0) == 0


def test_any_guest_write_is_survived() -> None:
    """Every value to every register, with SET on and off, in every mode: reads stay bytes."""
    rtc = Rtc(Clock(2026, 2, 28, 23, 59, 59))
    for mode in (0x00, 0x02, 0x04, 0x06, 0x80, 0x86):
        set_cmos(rtc, 0x0B, mode)
        for index in (*range(0x10), 0x32):
            for value in (0, 1, 0x12, 0x29, 0x31, 0x7F, 0x80, 0x92, 0xFF):
                if index != 0x0B:
                    set_cmos(rtc, index, value)
                assert 0 <= cmos(rtc, index) <= 0xFF
        set_cmos(rtc, 0x0B, 0x02)
        assert all(0 <= cmos(rtc, i) <= 0xFF for i in range(128))


def test_memory_sizes_in_cmos() -> None:
    rtc = Rtc(low_memory=0xC000_0000, high_memory=1 << 30)
    assert cmos(rtc, 0x15) | cmos(rtc, 0x16) << 8 == 640
    assert cmos(rtc, 0x17) | cmos(rtc, 0x18) << 8 == 0xFFFF
    assert cmos(rtc, 0x34) | cmos(rtc, 0x35) << 8 == (0xC000_0000 - (16 << 20)) >> 16
    assert cmos(rtc, 0x5B) | cmos(rtc, 0x5C) << 8 | cmos(rtc, 0x5D) << 16 == (1 << 30) >> 16


def test_cmos_ram_keeps_what_is_written() -> None:
    rtc = Rtc()
    set_cmos(rtc, 0x0F, 0x5A)
    assert cmos(rtc, 0x8F) == 0x5A  # bit 7 of the index masks NMI, and nothing else
    rtc.write(INDEX, 2, 0x3340)  # index and data by one 16-bit write
    assert cmos(rtc, 0x40) == 0x33
    assert rtc.read(INDEX, 1) == 0xFF
    rtc.set_cmos(0x50, 9)
    assert cmos(rtc, 0x50) == 9
    with pytest.raises(ValueError, match="cannot be set"):
        rtc.set_cmos(0, 9)


# --- i8042 ---


def ask(keyboard: I8042, command: int, *data: int) -> int | None:
    """Send a command, and return its answer or None."""
    keyboard.write(COMMAND, 1, command)
    for byte in data:
        keyboard.write(KEYS, 1, byte)
    return keyboard.read(KEYS, 1) if keyboard.read(COMMAND, 1) & 1 else None


def test_linux_finds_a_controller_and_no_mouse() -> None:
    """The commands that i8042_probe sends, in its order; each is answered at once."""
    keyboard = I8042(Ends())
    assert keyboard.read(COMMAND, 1) & 0x01 == 0  # flush: nothing there
    assert ask(keyboard, 0xAA) == 0x55
    control = ask(keyboard, 0x20)
    assert control is not None
    assert ask(keyboard, 0x60, control | 0x10) is None
    assert ask(keyboard, 0x20) == control | 0x10
    assert ask(keyboard, 0xD3, 0x5A) == 0xA5  # not what was sent: no loop, no mouse
    assert ask(keyboard, 0xA9) not in (None, 0x00, 0xFA, 0xFF)
    assert keyboard.read(COMMAND, 1) & 0x02 == 0  # never busy


def test_a_byte_for_the_absent_keyboard_times_out_at_once() -> None:
    lines: list[tuple[int, bool]] = []
    keyboard = I8042(Ends(), lambda line, level: lines.append((line, level)))
    ask(keyboard, 0x60, 0x45)  # IRQ 1 on
    keyboard.write(KEYS, 1, 0xF2)
    status = keyboard.read(COMMAND, 1)
    assert status & 0x41 == 0x41  # full, timed out
    assert lines[-1] == (1, True)
    assert keyboard.read(KEYS, 1) == 0xFE
    assert lines[-1] == (1, False)
    assert keyboard.read(COMMAND, 1) & 0x41 == 0
    keyboard.write(COMMAND, 1, 0xD4)
    keyboard.write(KEYS, 1, 0xF2)  # to the mouse
    assert keyboard.read(COMMAND, 1) & 0x61 == 0x61


@pytest.mark.parametrize("writes", [[(COMMAND, 0xFE)], [(COMMAND, 0xF0)], [(COMMAND, 0xD1), (KEYS, 0xFE)]])
def test_reset_line_reboots(writes: list[tuple[int, int]]) -> None:
    ends = Ends()
    keyboard = I8042(ends)
    for port, value in writes:
        keyboard.write(port, 1, value)
    assert ends == ["reboot"]


def test_other_pulses_do_not_reboot() -> None:
    ends = Ends()
    keyboard = I8042(ends)
    for command in range(256):
        if command & 0xF1 != 0xF0:
            keyboard.write(COMMAND, 1, command)
            keyboard.write(KEYS, 1, 0xFF)
    assert ends == []


def test_a_guest_that_never_reads_does_not_fill_memory() -> None:
    keyboard = I8042(Ends())
    for _ in range(1000):
        keyboard.write(COMMAND, 1, 0xD2)
        keyboard.write(KEYS, 1, 0x11)
    count = 0
    while keyboard.read(COMMAND, 1) & 1:
        keyboard.read(KEYS, 1)
        count += 1
    assert count <= 16


# --- pvpanic and the debug ports ---


def test_pvpanic_offers_the_panic_event_and_ends_the_machine() -> None:
    ends = Ends()
    port = PvPanic(ends)
    assert port.read(0x505, 1) == 1
    port.write(0x505, 1, 2)
    assert ends == []
    port.write(0x505, 1, 1)
    assert ends == ["panic"]


def test_debug_port_hands_on_lines() -> None:
    lines: list[bytes] = []
    port = DebugPort(lines.append, most=8)
    assert port.read(0xE9, 1) == 0xE9
    for byte in b"hello\nworld, so long":
        port.write(0x402, 1, byte)
    assert lines == [b"hello\n", b"world, s"]
    port.flush()
    port.flush()
    assert lines[2:] == [b"o long"]
    port.write(0xE9, 4, 0x0A636261)
    assert lines[3:] == [b"abc\n"]


# --- what a machine only has when it is asked for ---


def test_debug_exit_ends_the_machine_with_its_number() -> None:
    board = Board()
    port = named("debug-exit", board)
    assert isinstance(port, DebugExit)
    assert port.read(0xF4, 4) == 0
    port.write(0xF4, 4, 0)
    port.write(0xF5, 1, 77)
    assert board.ends == ["debug-exit 0", "debug-exit 77"]
    assert [exit_status(reason) for reason in board.ends] == [1, 155]
    assert exit_status("debug-exit 4294967295") == 255
    assert exit_status("debug-exit -1") is exit_status("poweroff") is exit_status("5") is None


def test_testdev_keeps_bytes_and_drives_lines() -> None:
    board = Board()
    device = named("pc-testdev", board)
    assert isinstance(device, PcTestdev)
    device.write(0xE0, 4, 0x44332211)
    assert (device.read(0xE0, 1), device.read(0xE1, 2), device.read(0xE0, 4)) == (0x11, 0x3322, 0x44332211)
    device.write(0xE3, 2, 0xBBAA)
    assert (device.read(0xE3, 1), device.read(0xE4, 4)) == (0xAA, 0)
    device.write(0x200E, 1, 2)
    device.write(0x2000, 1, 0)
    assert board.lines == [(14, True), (0, False)]
    assert board.scratch == [(0xFF00_0000, 0x1_0000)]


def test_names_of_devices_are_checked() -> None:
    check_names(NAMES)
    with pytest.raises(InputError, match="no device 'floppy': choose from debug-exit, pc-testdev"):
        check_names(["floppy"])
    with pytest.raises(InputError, match="twice"):
        check_names(["debug-exit", "debug-exit"])
