"""Every figure of the memory policy that can be turned, in one place, each with its reason.

"The paper" is Waldspurger, Memory Resource Management in VMware ESX Server, OSDI 2002.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Parameters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The figures of a policy. Shares of memory are fractions of one; raises ValueError for impossible ones."""

    tax: float = 0.75
    """The part of its idle memory that a VM may lose to active ones; 0 ignores idleness (the paper, 5.2)."""

    high: float = 0.06
    soft: float = 0.04
    hard: float = 0.02
    low: float = 0.01
    """The free part of the host's memory at which each level begins (the paper, 6.3)."""

    margin: float = 0.05
    """By what part of a threshold free memory must exceed it before the level rises again, and by twice of which
    it is made to exceed `high`: 6.3 % and 6.6 %. The paper says "significantly" and no figure. That the goal
    lies beyond the threshold matters: a balloon also takes pages that are shared and bring little, so the last
    of a shortage melts away ever more slowly. With the threshold at the goal itself, a simulated host of 100 VMs
    stayed soft for 16 minutes; so, for 20 s."""

    balloon_most: float = 0.65
    """The part of its size that a VM's balloon may hold, as in ESX: a guest that is squeezed until its own
    out-of-memory killer comes is worse off than with our swap. Not measured on our guests yet."""

    compress_most: float = 0.1
    """The part of its size that a VM may have compressed: pages that nobody asks for again are better off on
    disk than in memory at half their size."""
    compressed_size: float = 0.5
    """What a compressed page is expected to take, of a page, until the host's counters say what it takes."""

    band: float = 1 / 16
    """How far, as a part of the target, a VM may be from it before memory moves between VMs that is not
    scarce. The sampled activity of 100 pages is good to a tenth; moving pages for less chases noise."""

    scan_calm: int = 5_000
    scan_pressed: int = 40_000
    """Pages a second, over all VMs, that the scanner for equal pages reads: with enough free memory, and when
    it is scarce. A page takes 0.7 microseconds of a processor (3 GHz), but one VM that is scanned alone also
    loses translations: 10,000 pages a second cost it 3 % (`ringzero bench memory scan-cost`)."""

    samples: int = 100
    period: float = 30.0
    """Pages sampled a VM in a period, and the period in seconds of the VM's own running (the paper, 5.3)."""
    slow_gain: float = 1 / 8
    fast_gain: float = 1 / 2
    """The weight of the newest period in the two moving averages. The paper gives no figures; these forget
    half of what was in about five periods and in one."""

    def __post_init__(self) -> None:
        for name in ("high", "soft", "hard", "low", "balloon_most", "compress_most", "compressed_size"):
            _fraction(name, getattr(self, name))
        _fraction("tax", self.tax)
        if self.tax == 1:
            raise ValueError("tax 1 would make an idle page cost without end: give less than 1, such as 0.75")
        if not self.high > self.soft > self.hard > self.low > 0:
            raise ValueError(
                f"the levels high {self.high}, soft {self.soft}, hard {self.hard} and low {self.low}"
                " must fall from one to the next and stay above 0"
            )
        if self.high * (1 + 2 * self.margin) >= 1 or not (math.isfinite(self.margin) and self.margin > 0):
            raise ValueError(
                f"margin {self.margin} must be above 0, and with high {self.high} leave memory to use"
            )
        for name in ("slow_gain", "fast_gain"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0 and at most 1")
        for name in ("samples", "period"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0")
        for name in ("band", "scan_calm", "scan_pressed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")

    @property
    def idle_cost(self) -> float:
        """What an idle page costs, in active ones: the paper's k = 1 / (1 - tax)."""
        return 1 / (1 - self.tax)

    def reserve(self, total: int) -> int:
        """Return the pages, of `total`, that are to be free: more than makes the level high again."""
        return math.ceil(total * self.high * (1 + 2 * self.margin))


def _fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} must be between 0 and 1")
