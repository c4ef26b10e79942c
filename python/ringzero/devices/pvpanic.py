"""pvpanic: the port by which a guest says that its kernel has panicked (QEMU docs/specs/pvpanic).

Linux's driver finds it by the ACPI id QEMU0001, reads which events the device takes, and writes an event's
bit from its panic notifier: before any reboot that `panic=` asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ringzero.devices import ports as pc
from ringzero.devices.device import PortRange

__all__ = ["PvPanic"]

_PANICKED: Final = 1 << 0


class PvPanic:
    """One port; bit 0 written to it ends the machine with `panic`."""

    name = "pvpanic"

    def __init__(self, request_end: Callable[[str], object], port: int = pc.PVPANIC) -> None:
        self.ports = (PortRange(port, 1),)
        self._request_end = request_end

    def read(self, port: int, size: int) -> int:
        """Return the events that are taken: a panic, but not a crash kernel's start."""
        del port, size
        return _PANICKED

    def write(self, port: int, size: int, value: int) -> None:
        """Take an event."""
        del port, size
        if value & _PANICKED:
            self._request_end("panic")
