"""A port by which a guest ends its machine with a number: what QEMU calls isa-debug-exit.

Test programs on bare hardware use it to say how they fared. It is no part of a PC, so a machine only has it
when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ringzero.devices import ports as pc
from ringzero.devices.device import PortRange

__all__ = ["END_REASON", "DebugExit", "exit_status"]

END_REASON: Final = "debug-exit "
"""How the reason of such an end begins; the number follows."""


class DebugExit:
    """Four ports; any write ends the machine with the reason "debug-exit N"."""

    name = "debug-exit"

    def __init__(self, request_end: Callable[[str], object], port: int = pc.DEBUG_EXIT) -> None:
        self.ports = (PortRange(port, 4),)
        self._request_end = request_end

    def read(self, port: int, size: int) -> int:
        """Return zero: there is nothing to read."""
        del port, size
        return 0

    def write(self, port: int, size: int, value: int) -> None:
        """End the machine with `value`."""
        del port, size
        self._request_end(f"{END_REASON}{value}")


def exit_status(reason: str) -> int | None:
    """Return the exit status for the end of a machine, N * 2 + 1 as QEMU has it, of which the system keeps 8
    bits; None when the machine ended otherwise.
    """
    number = reason.removeprefix(END_REASON)
    return (int(number) << 1 | 1) & 0xFF if reason != number and number.isdecimal() else None
