"""How scarce memory is: the four states of Waldspurger, OSDI 2002, 6.3 "Dynamic Reallocation"."""

from __future__ import annotations

from enum import IntEnum

from ringzero.policy.parameters import Parameters

__all__ = ["Level", "next_level"]


class Level(IntEnum):
    """How scarce memory is, and so what may be done to get some back. Scarcer is larger."""

    HIGH = 0
    """Enough is free: equal pages are shared at the calm pace; balloons move only between VMs."""
    SOFT = 1
    """Balloons take memory back; only where a guest cannot balloon is it compressed or swapped."""
    HARD = 2
    """A balloon would take too long: pages are compressed and swapped."""
    LOW = 3
    """The same, and VMs above their target do not run until there is memory again."""


def next_level(level: Level, free: int, total: int, parameters: Parameters) -> Level:
    """Return the level that follows `level` when `free` pages of `total` are free.

    It falls below a level's own threshold, and rises only above that of the next higher one by the margin: so
    between the two lies a band in which nothing changes.
    """
    thresholds = {
        Level.HIGH: parameters.high,
        Level.SOFT: parameters.soft,
        Level.HARD: parameters.hard,
        Level.LOW: parameters.low,
    }
    fallen = max((one for one in Level if one and free < thresholds[one] * total), default=Level.HIGH)
    if fallen >= level:
        return fallen
    while level > Level.HIGH:
        higher = Level(level - 1)
        if free <= thresholds[higher] * (1 + parameters.margin) * total:
            break
        level = higher
    return level
