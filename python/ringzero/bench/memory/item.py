"""What a measurement of memory or I/O gives: figures, some of which have a bar, and how they are shown and written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["MIB", "Figure", "Outcome", "as_json", "missed", "show"]

MIB = 1 << 20


@dataclass(frozen=True)
class Figure:
    """One number. `bar` is what it must reach, or with `at_most` must not exceed; `theirs` is another system's."""

    name: str
    value: float
    unit: str = ""
    bar: float | None = None
    at_most: bool = False
    theirs: float | None = None

    @property
    def meets(self) -> bool:
        """Whether it keeps its bar; true without one."""
        return self.bar is None or (self.value <= self.bar if self.at_most else self.value >= self.bar)

    def text(self, value: float) -> str:
        """Return a value with the unit."""
        digits = 0 if float(value).is_integer() or abs(value) >= 1000 else 2 if abs(value) < 10 else 1
        return f"{value:,.{digits}f} {self.unit}".rstrip()


@dataclass(frozen=True)
class Outcome:
    """What one item measured. `notes` say what was counted and what to know; `details` go into JSON only."""

    item: str
    title: str
    figures: list[Figure]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def missed(outcomes: list[Outcome]) -> list[str]:
    """Return a line for each figure that does not keep its bar."""
    return [f"{one.item}: {figure.name}" for one in outcomes for figure in one.figures if not figure.meets]


def show(console: Console, outcomes: list[Outcome], theirs_is: str = "ESX paper") -> None:
    """Print a table for each item, and its notes; `theirs_is` says whose figures stand beside ours."""
    for one in outcomes:
        theirs = any(figure.theirs is not None for figure in one.figures)
        table = Table(title=f"{one.item}: {one.title}", title_justify="left")
        table.add_column("what")
        for heading in ("measured", *([theirs_is] if theirs else []), "bar", ""):
            table.add_column(heading, justify="right")
        for figure in one.figures:
            bar = ""
            if figure.bar is not None:
                bar = ("at most " if figure.at_most else "at least ") + figure.text(figure.bar)
            mark = "" if figure.bar is None else "kept" if figure.meets else "[red]missed[/red]"
            paper = "" if figure.theirs is None else figure.text(figure.theirs)
            table.add_row(figure.name, figure.text(figure.value), *([paper] if theirs else []), bar, mark)
        console.print(table)
        for note in one.notes:
            console.print(note, markup=False, highlight=False)


def as_json(outcomes: list[Outcome], described: dict[str, Any], bench: str = "memory") -> dict[str, Any]:
    """Return the report."""
    return {
        "bench": bench,
        "machine": described,
        "items": [
            {
                **asdict(one),
                "figures": [asdict(figure) | {"meets": figure.meets} for figure in one.figures],
            }
            for one in outcomes
        ],
        "missed": missed(outcomes),
    }
