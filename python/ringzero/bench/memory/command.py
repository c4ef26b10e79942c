"""The command line of the measurements of memory: `ringzero bench memory [ITEM...]`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import Console

from ringzero.bench.memory import item
from ringzero.bench.memory.ballooning import Ballooning
from ringzero.bench.memory.hundred import Hundred
from ringzero.bench.memory.identical import Identical
from ringzero.bench.memory.idle_tax import IdleTax
from ringzero.bench.memory.mixes import Mixes
from ringzero.bench.memory.overcommit import Overcommit
from ringzero.bench.memory.overhead import Overhead
from ringzero.bench.memory.scan_cost import ScanCost
from ringzero.errors import InputError

__all__ = ["ITEMS", "MemoryBench", "chosen"]


class Item(Protocol):
    """One measurement, with its figures as defaults."""

    def measure(self, console: Console) -> item.Outcome:
        """Measure it."""


ITEMS: dict[str, Callable[[], Item]] = {
    "overhead": Overhead,
    "identical": Identical,
    "mixes": Mixes,
    "hundred": Hundred,
    "overcommit": Overcommit,
    "scan-cost": ScanCost,
    "idle-tax": IdleTax,
    "ballooning": Ballooning,
}
SMALL: dict[str, Callable[[], Item]] = {
    "overhead": lambda: Overhead(count=2, settle=5),
    "identical": lambda: Identical(count=3, settle=5),
    "mixes": lambda: Mixes(only=("C",), settle=20),
    "hundred": lambda: Hundred(count=3, settle=5, watch=10),
    "overcommit": lambda: Overcommit(
        count=3, memory=160, busy=2, fill=80, changes=8000, limit=224, swap=512, timeout=200
    ),
    "scan-cost": lambda: ScanCost(rounds=2),
    "idle-tax": lambda: IdleTax(seconds=20),
    "ballooning": lambda: Ballooning(give=128, runs=1, sizes=(160,)),
}
"""The same with few guests, to see that they work: what they measure stands for nothing."""


class MemoryBench:
    """The items to measure, one after another."""

    def __init__(self, items: list[str], *, small: bool = False) -> None:
        """Raises InputError for an item that there is not."""
        for name in items:
            if name not in ITEMS:
                raise InputError(f"there is no item {name!r}: there is {', '.join(ITEMS)}")
        self.items = items or list(ITEMS)
        self.small = small

    def measure(self, console: Console) -> list[item.Outcome]:
        """Measure all of them."""
        return [(SMALL if self.small else ITEMS)[name]().measure(console) for name in self.items]


def chosen(
    items: Annotated[list[str] | None, typer.Argument(metavar="[ITEM...]", help=", ".join(ITEMS))] = None,
    small: Annotated[
        bool,
        typer.Option("--small", help="With few guests, to see that it works; the figures stand for nothing."),
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON, too.")
    ] = None,
) -> None:
    """Memory of many guests: sharing, overcommitment, what a monitor takes, a hundred guests; each against its bar."""
    from ringzero.bench.command import finish

    bench = MemoryBench(items or [], small=small)
    finish(bench.measure, item.show, item.as_json, item.missed, json)
