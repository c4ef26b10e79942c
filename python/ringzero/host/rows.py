"""What the daemon tells of a VM and of the host, as JSON: `list`, `top`, metrics and `Host` all show these."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ringzero.host import facts
from ringzero.host.guest import Guest
from ringzero.host.wire import Message

if TYPE_CHECKING:
    from ringzero.host.arbiter import Arbiter
    from ringzero.host.memory import HostMemoryView

__all__ = ["host_row", "vm_row"]


def vm_row(guest: Guest, *, closely: bool = False) -> Message:
    """Return a VM's row; with `closely` also what takes a look at the host system: processor time."""
    told = guest.memory
    row: Message = {
        "name": guest.name,
        "phase": guest.phase.value,
        "pid": guest.pid,
        "began": guest.began,
        "ended": guest.ended_at,
        "reason": guest.reason,
        "spec": guest.spec.as_json(),
        "pages": told.counts,
        "target": told.target,
        "balloon": told.balloon,
        "swap": told.swap,
        "done": told.done,
        "active": told.activity.fraction(),
        "jail": guest.jail,
        "own": None if told.own is None else told.own.total,
    }
    if closely and guest.pid is not None:
        row |= {"cpu": facts.processor_seconds(guest.pid), "at": time.monotonic()}
    return row


def host_row(arbiter: Arbiter, view: HostMemoryView) -> Message:
    """Return the host's row; amounts in pages of 4 KiB."""
    host = arbiter.host or view.host([])
    return {
        "total": host.total,
        "free": host.free,
        "shared": host.shared,
        "compressed": host.compressed,
        "swap_size": host.swap_size,
        "swap_free": host.swap_free,
        "level": arbiter.level.name.lower(),
        "unmet": 0 if arbiter.decision is None else arbiter.decision.unmet,
    }
