"""The real-time clock and its CMOS RAM: a Motorola MC146818 as PCs have it.

Index to port 0x70, data at 0x71. Registers 0-9 are the time, A-D control and status (MC146818A data sheet,
"Registers"), the rest is RAM with a PC's conventions for some bytes. The time is the host's; a guest that
sets it sets an offset.

No interrupt is raised: alarm, periodic and update-ended flags stay clear. Linux reads the time at boot and
with `hwclock`, and neither needs one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from ringzero.devices import ports as pc
from ringzero.devices.device import PortRange

__all__ = ["Rtc"]

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09
_A, _B, _C, _D = 0x0A, 0x0B, 0x0C, 0x0D
_TIME: Final = frozenset({_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, pc.CMOS_CENTURY})

_A_UPDATE_IN_PROGRESS: Final = 0x80
_A_RESET: Final = 0x26
"""32.768 kHz time base, 1024 Hz rate: what firmware leaves."""
_B_SET: Final = 0x80
_B_BINARY: Final = 0x04
_B_24_HOURS: Final = 0x02
_D_VALID: Final = 0x80
_PM: Final = 0x80
_MIB: Final = 1 << 20

UPDATE_WARNING: Final = 244e-6
"""Seconds for which UIP is set before the registers change: a reader that sees it clear has this long."""

# Where PC firmware keeps the memory size.
_BASE_MEMORY: Final = 0x15
_EXTENDED_MEMORY: Final = (0x17, 0x30)
_ABOVE_16_MIB: Final = 0x34
_ABOVE_4_GIB: Final = 0x5B
_EQUIPMENT: Final = 0x14
_EQUIPMENT_FPU: Final = 0x02


class Rtc:
    """The clock and 128 bytes of CMOS.

    `clock` returns seconds since 1970 in UTC, with fractions; `low_memory` and `high_memory` are the RAM
    below and above 4 GiB in bytes, for the CMOS bytes that say so.
    """

    name = "rtc"
    ports = (PortRange(pc.RTC_INDEX, 2),)

    def __init__(
        self, clock: Callable[[], float] = time.time, low_memory: int = 0, high_memory: int = 0
    ) -> None:
        self._clock = clock
        self._offset = 0.0
        self._frozen: dict[int, int] | None = None
        self._index = 0
        self._ram = bytearray(128)
        self._ram[_A] = _A_RESET
        self._ram[_B] = _B_24_HOURS
        self._ram[_EQUIPMENT] = _EQUIPMENT_FPU
        self._set_memory(low_memory, high_memory)

    def _set_memory(self, low: int, high: int) -> None:
        """Fill in the bytes that tell the memory size, each field at most its own largest value."""
        fields = [
            (_BASE_MEMORY, 2, min(low >> 10, 640)),
            (_EXTENDED_MEMORY[0], 2, max(0, low - _MIB) >> 10),
            (_EXTENDED_MEMORY[1], 2, max(0, low - _MIB) >> 10),
            (_ABOVE_16_MIB, 2, max(0, low - 16 * _MIB) >> 16),
            (_ABOVE_4_GIB, 3, high >> 16),
        ]
        for at, size, value in fields:
            self._ram[at : at + size] = min(value, (1 << 8 * size) - 1).to_bytes(size, "little")

    def set_cmos(self, index: int, value: int) -> None:
        """Set one byte of the RAM, before or while the machine runs. Raises ValueError for the time
        registers.
        """
        if not 0 <= index < len(self._ram) or index in _TIME or index in (_C, _D):
            raise ValueError(f"CMOS byte {index:#x} cannot be set")
        self._ram[index] = value & 0xFF

    # --- ports ---

    def read(self, port: int, size: int) -> int:
        """Return the byte that the index selects; the index port itself cannot be read."""
        del size
        if port == pc.RTC_INDEX:
            return 0xFF
        index = self._index
        if index in _TIME:
            return (self._frozen if self._frozen is not None else self._time_registers())[index]
        if index == _A:
            return self._ram[_A] | (_A_UPDATE_IN_PROGRESS if self._update_is_near() else 0)
        if index == _C:
            return 0  # reading clears the flags, and none is ever set
        if index == _D:
            return _D_VALID
        return self._ram[index]

    def write(self, port: int, size: int, value: int) -> None:
        """Select a byte, or write the selected one. A 16-bit write to the index port does both, as on a
        PC.
        """
        if port == pc.RTC_INDEX:
            self._index = value & 0x7F  # bit 7 masks NMI
            if size == 1:
                return
            value >>= 8
        value &= 0xFF
        index = self._index
        if index in _TIME:
            self._write_time(index, value)
        elif index == _A:
            self._ram[_A] = value & 0x7F
        elif index == _B:
            self._write_b(value)
        elif index not in (_C, _D):
            self._ram[index] = value

    # --- time ---

    def _now(self) -> float:
        return self._clock() + self._offset

    def _update_is_near(self) -> bool:
        """Say whether the registers change within 244 microseconds; never while the clock is set or its
        divider off.
        """
        if self._frozen is not None or self._ram[_A] & 0x60 == 0x60:
            return False
        return 1.0 - self._now() % 1.0 <= UPDATE_WARNING

    def _encode(self, value: int) -> int:
        return value if self._ram[_B] & _B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._ram[_B] & _B_BINARY else (value >> 4) * 10 + (value & 0xF)

    def _time_registers(self) -> dict[int, int]:
        """Return the time now, in the format that register B asks for."""
        now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=int(self._now()))
        hour = self._encode(now.hour)
        if not self._ram[_B] & _B_24_HOURS:
            hour = self._encode(now.hour % 12 or 12) | (_PM if now.hour >= 12 else 0)
        return {
            _SECONDS: self._encode(now.second),
            _MINUTES: self._encode(now.minute),
            _HOURS: hour,
            _WEEKDAY: self._encode(now.isoweekday() % 7 + 1),  # Sunday is 1
            _DAY: self._encode(now.day),
            _MONTH: self._encode(now.month),
            _YEAR: self._encode(now.year % 100),
            pc.CMOS_CENTURY: self._encode(now.year // 100),
        }

    def _write_b(self, value: int) -> None:
        """Take register B. SET stops the time registers, so that they can be written one by one; clearing it
        sets off.
        """
        was_set = self._frozen is not None
        if value & _B_SET and not was_set:
            self._ram[_B] = value
            self._frozen = self._time_registers()
        elif not value & _B_SET and self._frozen is not None:
            frozen, self._frozen = self._frozen, None
            self._ram[_B] = value
            self._set_time(frozen)
        else:
            self._ram[_B] = value

    def _write_time(self, index: int, value: int) -> None:
        if self._frozen is not None:
            self._frozen[index] = value
            return
        registers = self._time_registers()
        registers[index] = value
        self._set_time(registers)

    def _set_time(self, registers: dict[int, int]) -> None:
        """Make the clock show `registers` from now on; nonsense (a month 13) leaves it as it was."""
        raw_hour = registers[_HOURS]
        hour = self._decode(raw_hour & ~_PM if not self._ram[_B] & _B_24_HOURS else raw_hour)
        if not self._ram[_B] & _B_24_HOURS:
            hour = hour % 12 + (12 if raw_hour & _PM else 0)
        try:
            wanted = datetime(
                self._decode(registers[pc.CMOS_CENTURY]) * 100 + self._decode(registers[_YEAR]),
                self._decode(registers[_MONTH]),
                self._decode(registers[_DAY]),
                hour,
                self._decode(registers[_MINUTES]),
                self._decode(registers[_SECONDS]),
                tzinfo=UTC,
            )
        except ValueError:
            return
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        # Keep the fraction of the running second: the divider is not touched by a write.
        self._offset += (wanted - epoch).total_seconds() - int(self._now())
