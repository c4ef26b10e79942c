"""The ports and interrupt lines of a PC's slow devices: what `ringzero.machine.address_map` draws."""

from __future__ import annotations

from typing import Final

KEYBOARD_DATA: Final = 0x60
KEYBOARD_COMMAND: Final = 0x64
KEYBOARD_IRQ: Final = 1
RTC_INDEX: Final = 0x70
RTC_DATA: Final = 0x71
RTC_IRQ: Final = 8
CMOS_CENTURY: Final = 0x32
"""The CMOS byte that holds the century; the FADT says so to the guest."""
TESTDEV_SCRATCH: Final = 0xE0
DEBUG_PORT_BOCHS: Final = 0xE9
DEBUG_EXIT: Final = 0xF4
DEBUG_PORT_FIRMWARE: Final = 0x402
PVPANIC: Final = 0x505
TESTDEV_LINES: Final = 0x2000
