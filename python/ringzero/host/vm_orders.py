"""A VM's process carries out what the arbiter orders: balloon, scan, evict, block. On the process's one loop, in small
pieces, and with as few wake-ups as the pace allows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ringzero.errors import InputError
from ringzero.host.loop import Loop, Timer
from ringzero.host.vm_memory import GuestMemory

if TYPE_CHECKING:
    from ringzero import _core

__all__ = ["Orders"]

ORDERS_HOLD = 20.0
"""Seconds that orders hold without a word of the daemon: a VM is blocked no longer, and scanned no longer."""
_SCAN_AT_ONCE = 512
_KEEP_PERIOD = 0.02
"""Seconds between two looks at a bound: a guest whose pages come back as fast as they can gets some MiB beyond it."""
_EVICT_AT_ONCE = 256
"""Pages in one go, a millisecond or so: who asks for something meanwhile does not wait long."""


class Orders:
    """What the arbiter wants of a VM, and how far it is."""

    def __init__(self, loop: Loop, vm: _core.Vm, memory: GuestMemory) -> None:
        self._loop = loop
        self._vm = vm
        self._memory = memory
        self._is_blocked = False
        self._to_evict = 0
        self._most: int | None = None
        self._to_scan = 0
        self._pace = 0.0
        self._timer: Timer | None = None
        self._expiry: Timer | None = None
        self.totals = {"scanned": 0, "shared": 0, "zeroed": 0, "evicted": 0}
        """Pages, since the start."""
        self.full: str | None = None
        """Why the last eviction went no further."""

    def take(self, orders: dict[str, Any]) -> None:
        """Take new orders. Raises InputError for what makes no sense.

        `balloon`: pages that it shall hold, in all. `scan`: pages a second, for the `seconds` until the next orders.
        `evict`: pages, now. `most`: private pages that it may have from now on, or None. `blocked`: not to run.
        """
        values = {key: orders.get(key) for key in ("balloon", "scan", "evict", "most")}
        for key, value in values.items():
            if value is not None and (type(value) is not int or not 0 <= value < 1 << 40):
                raise InputError(f"{key} is {value!r:.40}, and must be a number of pages")
        seconds = orders.get("seconds", 5.0)
        if type(seconds) not in (int, float) or not 0 < seconds < 3600:
            raise InputError(f"orders for {seconds!r:.40} seconds cannot be")
        if (balloon := values["balloon"]) is not None:
            self._memory.balloon(balloon)
        if (evict := values["evict"]) is not None:
            # A bound says it all; without one, what was not yet done is still to be done.
            self._to_evict = evict if values["most"] is not None else self._to_evict + evict
        if (scan := values["scan"]) is not None:
            # What the last round did not get to is not made up for.
            self._to_scan = round(scan * seconds)
            self._pace = float(scan)
        self._most = values["most"]
        self._block(bool(orders.get("blocked")))
        if self._expiry is not None:
            self._expiry.cancel()
        holds = self._is_blocked or self._most is not None
        self._expiry = self._loop.call_later(ORDERS_HOLD, self._expire) if holds else None
        self._work()

    def _expire(self) -> None:
        self._expiry = None
        self._most = None
        self._block(False)

    def _block(self, blocked: bool) -> None:
        if blocked != self._is_blocked:
            self._is_blocked = blocked
            if blocked:
                self._vm.pause()
            else:
                self._vm.resume()

    def resume(self) -> None:
        """Let the guest go on, if nobody wants it to stand still."""
        if not self._is_blocked:
            self._vm.resume()

    def _work(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wait = 0.0
        if self._most is not None:
            self._to_evict = max(self._to_evict, self._memory.counts()["private"] - self._most)
        if self._to_evict:
            pages = min(self._to_evict, _EVICT_AT_ONCE)
            gone, self.full = self._memory.evict(pages)
            self.totals["evicted"] += gone
            # Fewer than were wanted: there are no more for now.
            self._to_evict = self._to_evict - gone if gone == pages else 0
            wait = 0.0 if gone == pages else _KEEP_PERIOD
        elif self._to_scan:
            pages = min(self._to_scan, _SCAN_AT_ONCE)
            done = self._memory.scan(pages)
            for key in ("scanned", "shared", "zeroed"):
                self.totals[key] += done[key]
            self._to_scan = self._to_scan - pages if done["scanned"] else 0
            wait = pages / max(self._pace, 1.0)
        else:
            wait = _KEEP_PERIOD
        if self._to_evict or self._to_scan or self._most is not None:
            self._timer = self._loop.call_later(wait, self._work)
