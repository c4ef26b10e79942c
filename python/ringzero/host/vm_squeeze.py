"""What a guest freed while it booted goes back to the host, although nobody asked for memory: once, when it has booted.

A kernel that has booted leaves pages behind that are free for it and full of what nobody needs: no two guests have
the same there, so they are not shared, and its own reports of free pages leave them out as long as less than 64 MiB are
free (mm/page_reporting.c `page_reporting_process_zone`, Linux 6.1). A balloon that is blown up for a moment to almost
all that is free takes them, and what it lets go again nobody has touched.
"""

from __future__ import annotations

from ringzero.host.loop import Loop
from ringzero.host.vm_memory import GuestMemory
from ringzero.policy import PAGE

__all__ = ["Squeeze"]

SETTLE = 2.0
"""Seconds after the agent's first word: the guest's drivers are loaded then, and its memory is as it stays."""
_ASK_AGAIN = 1.0
_MOST_ASKED = 10
"""A guest that has no driver by then has none."""
_LOOK = 0.05
_MOST_LOOKS = 20
"""A guest that is busy is left alone after a second."""
LEFT = (6 << 20) // PAGE
"""Pages that stay free meanwhile, beside a thirty-second of the guest's memory: whoever starts a program finds some."""


class Squeeze:
    """Does it once for one VM, on its loop."""

    def __init__(self, loop: Loop, memory: GuestMemory) -> None:
        self._loop = loop
        self._memory = memory
        self._left = _MOST_ASKED

    def begin(self) -> None:
        """Do it as soon as the guest can."""
        self._loop.call_later(SETTLE, self._ask)

    def _ask(self) -> None:
        self._left -= 1
        if self._memory.balloon_facts().get("driver"):
            self._memory.ask_guest()
            self._left = _MOST_LOOKS
            self._loop.call_later(_LOOK, self._squeeze)
        elif self._left > 0:
            self._loop.call_later(_ASK_AGAIN, self._ask)

    def _squeeze(self) -> None:
        free = self._memory.balloon_facts().get("guest_free", 0) // PAGE
        free = min(free, self._memory.size // PAGE)
        pages = free - LEFT - self._memory.size // PAGE // 32
        if pages > 0 and self._memory.squeeze(pages):
            self._loop.call_later(_LOOK, self._look)

    def _look(self) -> None:
        self._left -= 1
        facts = self._memory.balloon_facts()
        if self._left > 0 and self._memory.is_squeezed and facts["actual"] < facts["target"]:
            self._loop.call_later(_LOOK, self._look)
        else:
            self._memory.let_go()
