"""`ringzero host simulate`: compares memory policies over a trace."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringzero.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from ringzero.host.simulate import Replay

MOST_POLICIES = 2
PAGES_PER_MIB = 256
LEAST_WIDTH = 100


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="Recorded counters, as JSON lines.")],
    policy: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A policy of your own, in Python; twice to compare two."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON, too.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what each VM held, as a PNG (matplotlib).")
    ] = None,
) -> None:
    """Replay recorded counters through memory policies, and compare them.

    With no --policy the default one is shown alone; with one, it is compared with the default.
    """
    from rich.console import Console

    from ringzero.host import trace as traces
    from ringzero.host.policy import MemoryPolicy, OwnPolicy, load_policy
    from ringzero.host.simulate import replay

    files = policy or []
    if len(files) > MOST_POLICIES:
        raise InputError(f"{len(files)} policies are given, and {MOST_POLICIES} can be compared")
    chosen: list[MemoryPolicy] = [load_policy(file) for file in files]
    if len(chosen) < MOST_POLICIES:
        chosen.insert(0, OwnPolicy())
    recorded = traces.read(trace)
    replays = [replay(recorded, one) for one in chosen]
    # Figures that are cut off would be none: narrow terminals wrap lines instead.
    show(Console(width=max(LEAST_WIDTH, Console().width)), replays)
    if json is not None:
        try:
            json.write_text(json_format.dumps([as_json(one) for one in replays], indent=1) + "\n")
        except OSError as error:
            raise InputError(f"{json} cannot be written: {error.strerror}") from error
    if picture is not None:
        from ringzero.host.picture import draw

        draw(replays, picture)


def show(console: Console, replays: Sequence[Replay]) -> None:
    """Print two tables: what became of each VM, and of the host."""
    from rich.table import Table
    from rich.text import Text

    from ringzero.policy import Level

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("VM", "POLICY"):
        table.add_column(heading, no_wrap=True, min_width=7)
    for heading in ("ACTIVE", "TARGET", "HELD", "", "SHORT", "BALLOON", "PACKED", "SWAPPED", "BACK"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in replays[0].names():
        for one in replays:
            held = one.mean(name, "held")
            first = replays[0].mean(name, "held")
            versus = f"{100 * (held - first) / first:+.0f} %" if one is not replays[0] and first else ""
            table.add_row(
                Text(name if one is replays[0] else ""),  # a name may look like markup
                Text(one.policy),
                *(_mib(one.mean(name, what)) for what in ("active", "target", "held")),
                versus,
                _mib(one.mean(name, "short")),
                *(_mib(count[name]) for count in (one.ballooned, one.compressed, one.swapped, one.back)),
            )
    console.print(table)
    console.print(
        "\nIn MiB. Means over time of what a VM used, was entitled to, held, and lacked of what it used;"
        "\nsums of what its balloon took, of what was compressed and swapped, and of what came back.\n",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("HOST UNDER POLICY", no_wrap=True)
    for one in replays:
        table.add_column(Text(one.policy), justify="right", no_wrap=True, min_width=7)
    rows: list[tuple[str, list[str]]] = [
        (f"seconds at level {level.name.lower()}", [f"{one.seconds_at(level):g}" for one in replays])
        for level in Level
    ]
    rows.append(("changes of level", [str(one.level_changes) for one in replays]))
    rows.append(("seconds that VMs were blocked, in all", [f"{one.blocked_seconds:g}" for one in replays]))
    rows.append(("least free memory, MiB", [_mib(one.least_free) for one in replays]))
    rows.append(("wanted beyond the host's memory, MiB at most", [_mib(one.overrun) for one in replays]))
    rows.append(("missing with no means to take it, MiB at most", [_mib(one.unmet) for one in replays]))
    for what, values in rows:
        table.add_row(what, *values)
    console.print(table)


def as_json(one: Replay) -> dict[str, Any]:
    """Return a replay as JSON knows it: amounts in pages, means over time, seconds by level."""
    from ringzero.policy import Level

    return {
        "policy": one.policy,
        "seconds": {level.name.lower(): one.seconds_at(level) for level in Level},
        "level_changes": one.level_changes,
        "blocked_seconds": one.blocked_seconds,
        "least_free": one.least_free,
        "overrun": one.overrun,
        "unmet": one.unmet,
        "vms": {
            name: {
                **{what: one.mean(name, what) for what in ("active", "target", "held", "short")},
                "ballooned": one.ballooned[name],
                "compressed": one.compressed[name],
                "swapped": one.swapped[name],
                "back": one.back[name],
            }
            for name in one.names()
        },
    }


def _mib(pages: float) -> str:
    return f"{pages / PAGES_PER_MIB:,.1f}"
