"""`ballooning`: how fast memory goes to the host and back, and what a ballooned guest is worth beside a native one.

The measurements are those of `ringzero bench balloon` (`ringzero.bench.memory_balloon`), each against its bar.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ringzero.bench import memory_balloon
from ringzero.bench.memory.item import Figure, Outcome

__all__ = ["Ballooning"]

RATE_BAR = 1.0
"""GiB/s."""
SERVED_BAR = 96.0
"""Per cent of what a native guest of the size serves."""
MIB = 1 << 20


@dataclass(frozen=True)
class Ballooning:
    """What to measure: a balloon of `give` MiB, and guests of `full` MiB that are ballooned to `sizes`."""

    give: int = 1024
    runs: int = 7
    sizes: Sequence[int] = (144, 160, 192, 224)
    full: int = 256
    pairs: int = 5

    def measure(self, console: Console) -> Outcome:
        """Measure the rate, then each size against a native guest, turn by turn."""
        bench = memory_balloon.BalloonBench(
            runs=self.runs, give=self.give, sizes=self.sizes, full=self.full, pairs=self.pairs
        )
        found = bench.measure(console)
        figures: list[Figure] = []
        if (rate := found.rate) is not None:
            for name, measured in (
                ("inflated, memory never used", rate.inflated),
                ("inflated, memory just freed", rate.inflated_freed),
                ("given back to the guest", rate.deflated),
            ):
                figures.append(Figure(name, measured.median, "GiB/s", RATE_BAR))
            figures.append(Figure("went back to the host", rate.returned / MIB, "MiB"))
        for size in self.sizes:
            pairs = [one for one in found.served if one.size == size]
            ratios = [one.ratio * 100 for one in pairs]
            name = f"a file server of {size} MiB, ballooned, of a native one"
            figures.append(Figure(name, statistics.median(ratios), "%", SERVED_BAR))
            figures.append(Figure("... the worst pair", min(ratios), "%"))
            figures.append(Figure("... the best pair", max(ratios), "%"))
            disk = statistics.median(one.disk_ratio for one in pairs)
            figures.append(Figure("... what it reads from its disk", disk * 100, "%"))
        wrong = memory_balloon.complaints(found)
        figures.append(Figure("guests that read other bytes", len(wrong), bar=0, at_most=True))
        details: dict[str, Any] = memory_balloon.as_json(found, {})
        return Outcome(
            "ballooning",
            f"a balloon of {self.give} MiB; guests of {self.full} MiB ballooned to less",
            figures,
            [
                "Rates are medians. The two guests of a size take turns, so that both meet the same host; the best"
                " round of each counts, since what else the host does only makes one slower. Of the pairs of a size,"
                " all freshly started, the median counts.",
                *wrong,
            ],
            details,
        )
