"""What the daemon knows of a VM's memory, from what the VM's process told of itself: which is not trusted."""

from __future__ import annotations

from typing import Any

from ringzero.host import facts
from ringzero.host.wire import Message
from ringzero.policy import PAGE, Activity, Parameters

__all__ = ["GuestCounters"]


class GuestCounters:
    """What the daemon knows of a VM's memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts: dict[str, int] = {}
        self.balloon: dict[str, int] = {}
        self.swap: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.activity = Activity()
        self.orders: dict[str, Any] = {"balloon": 0, "scan": 0, "blocked": False}
        self.target: int | None = None
        self.own: facts.Own | None = None
        self.sampled_at = 0.0
        self.weigh_again_at = 0.0

    def take(self, answer: Message, parameters: Parameters) -> str | None:
        """Take what a VM's process told, and return what is wrong with it. It is not trusted: a guest may have it."""
        if "error" in answer:
            return None  # its end is told elsewhere
        counts = _numbers(answer.get("counts"))
        balloon, swap, done = (_numbers(answer.get(key)) for key in ("balloon", "swap", "done"))
        if counts is None or balloon is None or swap is None or done is None:
            return "they are no numbers"
        if sum(counts.values()) != self.size // PAGE:
            return f"its pages by state make {sum(counts.values())}, and it has {self.size // PAGE}"
        self.counts, self.balloon, self.swap, self.done = counts, balloon, swap, done
        sampled = answer.get("sampled")
        if (
            isinstance(sampled, list)
            and len(sampled) == 2
            and all(type(one) is int for one in sampled)
            and sampled[1]
        ):
            if not 0 <= sampled[0] <= sampled[1]:
                return f"{sampled[0]} touched pages of {sampled[1]} sampled ones cannot be"
            self.activity = self.activity.after(sampled[0], sampled[1], parameters)
        return None

    def weigh(self, pid: int) -> None:
        """Find out what the monitor's own memory is."""
        try:
            self.own = facts.own_memory(pid)
        except OSError:
            self.own = None

    def count(self, *states: str) -> int:
        """Return the pages in these states."""
        return sum(self.counts.get(state, 0) for state in states)


def _numbers(values: Any) -> dict[str, int] | None:
    if not isinstance(values, dict):
        return None
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values.values()):
        return None
    return {str(key): value for key, value in values.items()}
