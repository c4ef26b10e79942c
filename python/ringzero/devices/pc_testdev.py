"""What tests of a PC need besides the PC: the ports of QEMU's pc-testdev (hw/misc/pc-testdev.c).

- 0xE0-0xE3: four bytes that keep what is written to them
- 0xE4-0xE7: takes an address and does nothing: no page has to be dropped here for a fault to be seen
- 0x2000-0x200F: interrupt line N is raised by writing something else than zero to 0x2000 + N, and lowered by
  zero
- memory-mapped registers at 0xFF000000, 64 KiB, that keep what is written to them (the bus serves them itself)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ringzero.devices import ports as pc
from ringzero.devices.device import PortRange

__all__ = ["SCRATCH_MEMORY", "SCRATCH_MEMORY_SIZE", "PcTestdev"]

SCRATCH_MEMORY: Final = 0xFF00_0000
SCRATCH_MEMORY_SIZE: Final = 64 << 10
_SCRATCH_SIZE: Final = 4
_LINES: Final = 16


class PcTestdev:
    """The device; `raise_irq` drives an ISA interrupt line, by its number and level."""

    name = "pc-testdev"
    ports = (PortRange(pc.TESTDEV_SCRATCH, 2 * _SCRATCH_SIZE), PortRange(pc.TESTDEV_LINES, _LINES))

    def __init__(self, raise_irq: Callable[[int, bool], object]) -> None:
        self._raise_irq = raise_irq
        self._scratch = bytearray(_SCRATCH_SIZE)

    def read(self, port: int, size: int) -> int:
        """Return bytes that were kept; zeros elsewhere."""
        at = port - pc.TESTDEV_SCRATCH
        return int.from_bytes(self._scratch[at : at + size], "little") if 0 <= at < _SCRATCH_SIZE else 0

    def write(self, port: int, size: int, value: int) -> None:
        """Keep bytes, or drive a line."""
        line = port - pc.TESTDEV_LINES
        if 0 <= line < _LINES:
            self._raise_irq(line, value != 0)
            return
        for at, byte in enumerate(value.to_bytes(size, "little"), port - pc.TESTDEV_SCRATCH):
            if at < _SCRATCH_SIZE:
                self._scratch[at] = byte
