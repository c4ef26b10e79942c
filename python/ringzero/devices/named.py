"""Devices that a machine only has when they are asked for by name: `ringzero run --device NAME`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Protocol

from ringzero.devices.debug_exit import DebugExit
from ringzero.devices.device import Device
from ringzero.devices.pc_testdev import SCRATCH_MEMORY, SCRATCH_MEMORY_SIZE, PcTestdev
from ringzero.errors import InputError

__all__ = ["NAMES", "Board", "check_names", "named"]


class Board(Protocol):
    """What such a device needs of the machine around it; `ringzero._core.Vm` is one."""

    def request_end(self, reason: str) -> None:
        """End the machine."""

    def raise_irq(self, line: int, level: bool) -> None:
        """Drive an ISA interrupt line."""

    def add_scratch(self, first: int, size: int) -> None:
        """Give a range of addresses to registers that keep what is written to them."""


def pc_testdev(board: Board) -> PcTestdev:
    """Return a pc-testdev; its memory-mapped registers are the board's own, since no Python is as fast."""
    board.add_scratch(SCRATCH_MEMORY, SCRATCH_MEMORY_SIZE)
    return PcTestdev(board.raise_irq)


_MAKERS: Final[dict[str, Callable[[Board], Device]]] = {
    DebugExit.name: lambda board: DebugExit(board.request_end),
    PcTestdev.name: pc_testdev,
}
NAMES: Final = tuple(_MAKERS)


def check_names(names: Iterable[str]) -> None:
    """Raise InputError for a name of no device, and for one that is given twice."""
    seen: set[str] = set()
    for name in names:
        if name not in _MAKERS:
            raise InputError(f"there is no device {name!r}: choose from {', '.join(NAMES)}")
        if name in seen:
            raise InputError(f"the device {name!r} is given twice: a machine has room for one")
        seen.add(name)


def named(name: str, board: Board) -> Device:
    """Return a new device of a name that `check_names` accepts."""
    return _MAKERS[name](board)
