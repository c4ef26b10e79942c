"""The memory of one VM, as the host's machinery sees it: the one place that knows what the core calls these things.

A thin layer: counts by state, the sampler, the scanner, the evictor, the balloon, and what the monitor itself takes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ringzero.policy import PAGE

if TYPE_CHECKING:
    from ringzero import _core

__all__ = ["STATES", "GuestMemory"]

STATES = ("untouched", "zero", "private", "shared", "image", "ballooned", "compressed", "swapped")
"""What a page of a guest can be. The first is not a state of the core's: see `GuestMemory.counts`."""

# What crates/memory/src/pool.rs calls its memfd.
_POOL = "/memfd:ringzero-pool"


class GuestMemory:
    """The memory of a VM of this process."""

    def __init__(self, vm: _core.Vm, size: int) -> None:
        self._vm = vm
        self._pages = size // PAGE
        self._pools = _descriptors_of(_POOL)

    def counts(self) -> dict[str, int]:
        """Return the pages by state."""
        private = sum(os.fstat(pool).st_blocks * 512 for pool in self._pools) // PAGE
        private = min(private, self._pages)
        counts = dict.fromkeys(STATES, 0)
        counts |= {"private": private, "untouched": self._pages - private}
        return counts


def _descriptors_of(name: str) -> list[int]:
    """Return our descriptors of files in memory whose name begins so."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
            if os.readlink(link).startswith(name):
                found.append(int(link.name))
    return found
