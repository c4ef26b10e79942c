"""`identical`: how much of ten identical idle guests is common."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console

from ringzero.bench.memory.fleet import Fleet
from ringzero.bench.memory.item import Figure, Outcome
from ringzero.bench.memory.sharing import COUNTED, measure_savings

__all__ = ["Identical"]

SHARED_BAR, RECLAIMED_BAR = 70.0, 62.0
SHARED_PAPER, RECLAIMED_PAPER = 67.0, 60.0
"""Per cent, of ten Linux guests with the same benchmark (Waldspurger, OSDI 2002, section 4.3)."""


@dataclass(frozen=True)
class Identical:
    """What to measure: `count` guests of `memory` MiB, `settle` seconds after the last has booted."""

    count: int = 10
    memory: int = 128
    settle: float = 15.0

    def measure(self, console: Console) -> Outcome:
        """Boot the guests, leave them alone, scan, and count."""
        # The daemon's own scanning would share before the first count.
        with Fleet(parameters={"scan_calm": 0, "scan_pressed": 0}) as fleet:
            with console.status(f"identical: booting {self.count} guests"):
                vms = fleet.host.up_many(self.count, "debian", memory=f"{self.memory}M")
            with console.status(f"identical: {self.settle:g} s of quiet"):
                time.sleep(self.settle)
            with console.status("identical: scanning"):
                savings = measure_savings(fleet, vms)
        held = savings.held / savings.pages * 100
        return Outcome(
            "identical",
            f"{self.count} identical Debian guests of {self.memory} MiB, idle after boot",
            [
                Figure("shared or zero, of all pages", savings.shared, "%", SHARED_BAR, theirs=SHARED_PAPER),
                Figure(
                    "reclaimed, of all pages", savings.reclaimed, "%", RECLAIMED_BAR, theirs=RECLAIMED_PAPER
                ),
                Figure("shared with content, of all pages", savings.common, "%"),
                Figure("held before the scan, of all pages", held, "%"),
                Figure("reclaimed, of held pages", savings.reclaimed_of_held, "%"),
                Figure("complaints of the audit", len(savings.faults), bar=0, at_most=True),
            ],
            [COUNTED, *savings.faults[:5]],
            savings.as_json(),
        )
