"""The arithmetic of the benchmarks: medians, spreads, geometric means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Sample", "geometric_mean", "sample"]


@dataclass(frozen=True)
class Sample:
    """Measured values of one thing, in seconds unless said otherwise."""

    values: tuple[float, ...]
    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half of the range in parts of the median: 0.03 is shown as ±3 %."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON report holds of it."""
        return {**asdict(self), "spread": self.spread}


def sample(values: Sequence[float]) -> Sample:
    """Return the median and range of some values. Raises ValueError when there are none."""
    if not values:
        raise ValueError("nothing was measured")
    return Sample(tuple(values), statistics.median(values), min(values), max(values))


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean, which alone gives the same answer whichever engine is the unit."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logarithms))
