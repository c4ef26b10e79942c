"""What `nano` and `system` have in common: items that a guest measures itself, in rounds, and a checksum for each.

A guest prints `WORD name amount times checksum` for each round of an item: how many cycles, or nanoseconds, all the
times together took, and what was computed, which must be the same on every engine. What else the host does only adds to
a round, so a run counts with its least.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ringzero.bench.engines import Run
from ringzero.bench.figures import Sample, geometric_mean, sample
from ringzero.errors import GuestError

__all__ = ["Measured", "Results", "parse"]

LINE = re.compile(r"\b([A-Z]+) ([a-z0-9-]+) (\d+) (\d+) ([0-9a-f]{16})$")


@dataclass(frozen=True)
class Measured:
    """One item in one run: what it took at a time, by rounds, and what was computed."""

    rounds: tuple[float, ...]
    checksums: frozenset[str]


def parse(done: Run, word: str) -> dict[str, Measured]:
    """Return what a run measured, by item. Raises GuestError if it is not whole."""
    rounds: dict[str, list[float]] = {}
    checksums: dict[str, set[str]] = {}
    for _, text in done.lines:
        line = LINE.search(text)
        if line is not None and line[1] == word:
            rounds.setdefault(line[2], []).append(int(line[3]) / int(line[4]))
            checksums.setdefault(line[2], set()).add(line[5])
    if done.status != 0 or done.timed_out or not done.has("PASS"):
        how = "did not end in time" if done.timed_out else f"ended with status {done.status}"
        raise GuestError(f"it {how}: {done.tail()}")
    return {name: Measured(tuple(rounds[name]), frozenset(checksums[name])) for name in rounds}


@dataclass
class Results:
    """All runs: engine -> item -> what each run measured. `order` has the items as they are shown."""

    order: Iterable[str]
    runs: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)

    def add(self, engine: str, measured: dict[str, Measured]) -> None:
        """Take in one run of one engine."""
        for name, one in measured.items():
            self.runs.setdefault(engine, {}).setdefault(name, []).append(one)

    @property
    def names(self) -> list[str]:
        """The items that any engine ran."""
        return [name for name in self.order if any(name in engine for engine in self.runs.values())]

    @property
    def ours(self) -> list[str]:
        """Our engines."""
        return [engine for engine in self.runs if engine not in ("native", "qemu")]

    def sample(self, engine: str, name: str) -> Sample | None:
        """Return a value a run, the least of its rounds. None where it did not run."""
        measured = self.runs.get(engine, {}).get(name)
        return sample([min(one.rounds) for one in measured]) if measured else None

    def ratio(self, slow: str, fast: str, name: str) -> float | None:
        """Return how many times `slow`'s median is `fast`'s; None where one of them did not run."""
        numerator, denominator = self.sample(slow, name), self.sample(fast, name)
        return numerator.median / denominator.median if numerator and denominator else None

    def mean(self, slow: str, fast: str) -> float | None:
        """Return the geometric mean of the ratios of the items that both ran."""
        ratios = [ratio for name in self.names if (ratio := self.ratio(slow, fast, name)) is not None]
        return geometric_mean(ratios) if ratios else None

    def complaints(self) -> list[str]:
        """Return what was computed wrongly by some engine."""
        found = []
        for name in self.names:
            sums = {
                engine: sorted({value for one in items[name] for value in one.checksums})
                for engine, items in self.runs.items()
                if name in items
            }
            if len({value for values in sums.values() for value in values}) > 1:
                found.append(f"{name}: the checksums differ: {sums}")
        return found

    def as_json(self, unit: str) -> list[dict[str, Any]]:
        """Return what the JSON report holds of them."""
        return [
            {
                "item": name,
                "engine": engine,
                unit: one.as_json(),
                "checksum": min(self.runs[engine][name][0].checksums),
                "qemu_over_this": self.ratio("qemu", engine, name),
            }
            for name in self.names
            for engine in self.runs
            if (one := self.sample(engine, name)) is not None
        ]
