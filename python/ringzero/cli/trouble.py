"""What `ringzero run` does when the host's disk is full: it says so, and lets the guest go on when there is room."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ringzero.cli import fail

if TYPE_CHECKING:
    from ringzero.machine.machine import Machine

__all__ = ["mind_disks"]

LOOK = 1.0


def mind_disks(machine: Machine) -> None:
    """Look after the disks of a machine that runs, on a thread of its own, until the machine ends."""
    threading.Thread(target=_mind, args=(machine,), name="ringzero-disks", daemon=True).start()


def _mind(machine: Machine) -> None:
    told: list[str] = []
    while machine.wait(LOOK) is None:
        troubles = machine.disk_troubles()
        if troubles and troubles != told:
            fail(f"{'; '.join(troubles)}: the guest is paused, and goes on when that is put right")
            told = troubles
        if troubles:
            # What is still not possible pauses it again.
            machine.resume()
        elif told:
            fail("the guest goes on")
            told = []
