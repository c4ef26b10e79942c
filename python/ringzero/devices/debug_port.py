"""The debug ports of Bochs (0xE9) and of firmware (0x402): a byte written there is a byte of text.

Early code prints there without setting anything up. Reads return 0xE9, by which such code knows that the port
is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ringzero.devices import ports as pc
from ringzero.devices.device import PortRange

__all__ = ["DebugPort"]

_PRESENT: Final = 0xE9


class DebugPort:
    """Collects what is written to it and hands it to `sink` a line at a time, or every `most` bytes."""

    name = "debug-port"
    ports = (PortRange(pc.DEBUG_PORT_BOCHS), PortRange(pc.DEBUG_PORT_FIRMWARE))

    def __init__(self, sink: Callable[[bytes], object], most: int = 1024) -> None:
        self._sink = sink
        self._most = most
        self._line = bytearray()

    def read(self, port: int, size: int) -> int:
        """Return the value that says "here"."""
        del port, size
        return _PRESENT

    def write(self, port: int, size: int, value: int) -> None:
        """Take `size` bytes of text, lowest first."""
        del port
        for byte in value.to_bytes(size, "little"):
            self._line.append(byte)
            if byte == 0x0A or len(self._line) >= self._most:
                self.flush()

    def flush(self) -> None:
        """Hand on what has been collected; call it when the machine has ended."""
        if self._line:
            line, self._line = bytes(self._line), bytearray()
            self._sink(line)
