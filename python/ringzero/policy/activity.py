"""How much of its memory a VM uses: Waldspurger, OSDI 2002, 5.3 "Measuring Idle Memory".

At the start of each period the mechanism picks some of the guest's pages at random, anew each time, and takes
their mappings away. The first touch of such a page puts its mapping back and counts it. The guest is not asked.

Three estimates follow from the counts: a slow moving average, a fast one, and the fast one with the period
that is not over yet. The largest is used, so that a VM that wakes up is believed at once and one that falls
asleep only after a while.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ringzero.policy.parameters import Parameters

__all__ = ["Activity"]


@dataclass(frozen=True, slots=True)
class Activity:
    """The estimate for one VM; a new one counts as fully active, so that nobody is taxed unmeasured."""

    slow: float = 1.0
    fast: float = 1.0
    touched: int = 0
    sampled: int = 0
    """Of the period that is not over: pages touched so far, of so many that were picked."""

    def during(self, touched: int, sampled: int) -> Activity:
        """Return the estimate within a period in which `touched` of `sampled` pages were touched so far."""
        _check(touched, sampled)
        return replace(self, touched=touched, sampled=sampled)

    def after(self, touched: int, sampled: int, parameters: Parameters | None = None) -> Activity:
        """Return the estimate after a period that ended with `touched` of `sampled` pages touched."""
        _check(touched, sampled)
        p = parameters or Parameters()
        seen = touched / sampled
        return Activity(_towards(self.slow, seen, p.slow_gain), _towards(self.fast, seen, p.fast_gain))

    def fraction(self, parameters: Parameters | None = None) -> float:
        """Return the part of the VM's pages that are active: the largest of the three averages, 0 to 1."""
        p = parameters or Parameters()
        current = _towards(self.fast, self.touched / self.sampled, p.fast_gain) if self.sampled else 0.0
        return max(self.slow, self.fast, current)


def _towards(average: float, seen: float, gain: float) -> float:
    return average + gain * (seen - average)


def _check(touched: int, sampled: int) -> None:
    if not 0 <= touched <= sampled or sampled == 0:
        raise ValueError(f"{touched} touched pages of {sampled} sampled ones cannot be")
