"""The command line of the measurements of I/O: `ringzero bench io [ITEM...]`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console

from ringzero.bench.io.block import BlockBench
from ringzero.bench.io.boot import BootBench
from ringzero.bench.io.network import NetworkBench
from ringzero.bench.io.run import RunBench
from ringzero.bench.memory import item
from ringzero.errors import InputError

__all__ = ["ITEMS", "IoBench", "chosen"]


class Item(Protocol):
    """One measurement, with its figures as defaults."""

    def measure(self, console: Console) -> item.Outcome:
        """Measure it, side by side with QEMU."""


ITEMS: dict[str, Callable[[], Item]] = {
    "boot": BootBench,
    "block": BlockBench,
    "network": NetworkBench,
    "run": RunBench,
}
SMALL: dict[str, Callable[[], Item]] = {
    "boot": lambda: BootBench(runs=1),
    "block": lambda: BlockBench(runs=1, mebibytes=32, operations=2000, rounds=1),
    "network": lambda: NetworkBench(runs=1, seconds=1, trips=500),
    "run": lambda: RunBench(commands=20, mebibytes=2, rounds=1),
}
"""The same with little to do, to see that they work: what they measure stands for nothing."""


class IoBench:
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


def _show(console: Console, outcomes: list[item.Outcome]) -> None:
    item.show(console, outcomes, theirs_is="QEMU TCG")


def _as_json(outcomes: list[item.Outcome], described: dict[str, Any]) -> dict[str, Any]:
    return item.as_json(outcomes, described, bench="io")


def chosen(
    items: Annotated[list[str] | None, typer.Argument(metavar="[ITEM...]", help=", ".join(ITEMS))] = None,
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="With little to do, to see that it works; the figures stand for nothing."
        ),
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON, too.")
    ] = None,
) -> None:
    """Disks, networks and commands of guests, against QEMU TCG with its best virtio settings; each against its bar."""
    from ringzero.bench.command import finish

    bench = IoBench(items or [], small=small)
    finish(bench.measure, _show, _as_json, item.missed, json)
