"""`ringzero host top`, `map`, `metrics` and `audit`: to see what memory is doing."""

from __future__ import annotations

import json as json_format
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["audit", "map_", "metrics", "top"]

PAGES_PER_MIB = 256
_COLUMNS = (
    "SIZE",
    "MIN",
    "MAX",
    "SHARES",
    "ACTIVE",
    "PRIVATE",
    "SHARED",
    "ZERO",
    "BALLOON",
    "SWAPPED",
    "TARGET",
    "OWN",
)


def top(
    once: Annotated[bool, typer.Option("--once", help="Once, and no more.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Once, as JSON.")] = False,
    seconds: Annotated[float, typer.Option(metavar="N", help="How often.")] = 2.0,
) -> None:
    """Show every VM's memory and processor time, live. In MiB; q or Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    from ringzero.host.client import Host

    console = Console(width=None if sys.stdout.isatty() else 160)
    with Host.connect() as host:
        before = host.ask("list", closely=True)
        if json:
            typer.echo(json_format.dumps({"host": before["host"], "vms": before["vms"]}))
            return
        if once:
            time.sleep(0.2)
            console.print(table(host.ask("list", closely=True), before))
            return
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(min(max(seconds, 0.2), 60.0) if before["vms"] else 0.5)
                now = host.ask("list", closely=True)
                live.update(table(now, before), refresh=True)
                before = now


def table(now: dict[str, Any], before: dict[str, Any]) -> RenderableType:
    """Return the table of `top`; processor time is that since `before`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    host = now["host"]
    used = {vm["name"]: (vm.get("cpu"), vm.get("at")) for vm in before["vms"]}
    rows = Table(box=None, pad_edge=False, header_style="bold")
    rows.add_column("VM", no_wrap=True)
    for heading in _COLUMNS:
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("CPU", justify="right", no_wrap=True)
    rows.add_column("STATE", no_wrap=True)
    for vm in now["vms"]:
        spec, pages = vm["spec"], vm["pages"]
        cpu, at = used.get(vm["name"], (None, None))
        share = ""
        if cpu is not None and vm.get("cpu") is not None and vm["at"] > at:
            share = f"{100 * max(0.0, vm['cpu'] - cpu) / (vm['at'] - at):.1f} %"
        rows.add_row(
            Text(vm["name"]),
            *(_mib(spec[field] / 4096) for field in ("memory", "min", "max")),
            str(spec["shares"]),
            f"{100 * vm['active']:.0f} %" if pages else "",
            _mib(pages.get("private")),
            _mib(_sum(pages, "shared", "image")),
            _mib(pages.get("zero")),
            _mib(pages.get("ballooned")),
            _mib(_sum(pages, "compressed", "swapped")),
            _mib(vm["target"]),
            _mib(None if vm["own"] is None else vm["own"] / 4096),
            share,
            Text(vm["phase"] if vm["reason"] is None else f"ended: {vm['reason']}"),
        )
    running = sum(vm["phase"] == "running" for vm in now["vms"])
    promised = sum(vm["spec"]["memory"] for vm in now["vms"] if vm["pid"] is not None) / 4096
    head = (
        f"{running} of {len(now['vms'])} vms running   memory {_mib(host['total'])} MiB, free {_mib(host['free'])}"
        f" ({host['level']}), promised {_mib(promised)}, shared pool {_mib(host['shared'])}, compressed"
        f" {_mib(host['compressed'])}, swap free {_mib(host['swap_free'])} of {_mib(host['swap_size'])}"
    )
    return Group(Text(head), Text(), rows)


def map_(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Which VMs; all without.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a PNG, a pixel a page (Pillow).")
    ] = None,
) -> None:
    """Show every VM's pages by state, in the terminal or as a picture."""
    from rich.console import Console
    from rich.text import Text

    from ringzero.errors import GuestEnded
    from ringzero.host import map as maps
    from ringzero.host.client import Host

    vms: list[tuple[str, bytes]] = []
    with Host.connect() as host:
        for vm in [host.vm(name) for name in names] if names else host.vms():
            try:
                vms.append((vm.name, vm.memory_states()))
            except GuestEnded:
                continue  # it has no pages any more
    if png is not None:
        maps.draw(vms, png)
        return
    console = Console(highlight=False)
    label = max((len(name) for name, _ in vms), default=0)
    width = max(16, min(console.width - label - 2, 128))

    def style(state: str | None) -> str:
        return "#{:02x}{:02x}{:02x}".format(*maps.COLOURS[state or "zero"])

    for name, states in vms:
        # Two parts a character: the upper half is the foreground, the lower one the background.
        row = maps.cells(states, 2 * width)
        line = Text(name.ljust(label + 2))
        for upper, lower in zip(row[::2], row[1::2], strict=True):
            line.append("\u258c", f"{style(upper)} on {style(lower)}")
        console.print(line, no_wrap=True, overflow="crop")
    legend = Text(" " * (label + 2))
    for state in maps.COLOURS:
        legend.append("\u2588\u2588 ", style(state)).append(f"{state}  ")
    console.print(legend)


def metrics() -> None:
    """Print metrics in the text format of Prometheus."""
    from ringzero.host.client import Host

    with Host.connect() as host:
        typer.echo(host.metrics(), nl=False)


def audit() -> None:
    """Have every VM derive the invariants of its memory again. Status 1 when one does not hold."""
    from ringzero.host.client import Host

    with Host.connect() as host:
        faults = host.audit()
    for name, found in faults.items():
        for fault in found:
            typer.echo(f"{name}: {fault}")
    if any(faults.values()):
        raise typer.Exit(1)
    typer.echo(f"the sharer and {len(faults) - 1} vms, no fault")


def _sum(pages: dict[str, int], *states: str) -> int | None:
    return sum(pages.get(state, 0) for state in states) if pages else None


def _mib(pages: float | None) -> str:
    return "" if pages is None else f"{pages / PAGES_PER_MIB:,.0f}"
