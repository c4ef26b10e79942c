"""`ringzero bench system`: how long a kernel takes for what programs ask of it all the time.

The items are those of lmbench's lat_* (McVoy and Staelin, "lmbench: Portable Tools for Performance Analysis", USENIX
1996), measured by a program of our own (guests/bench/system.c): as /init of a guest with Debian's kernel, and on this
host.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ringzero.bench import guests, report
from ringzero.bench.clocked import clock_complaint
from ringzero.bench.engines import Guest, qemu_command, ringzero_command, run
from ringzero.bench.rounds import Measured, Results, parse
from ringzero.errors import GuestError, InputError

__all__ = ["ITEMS", "SystemBench"]

ITEMS = {
    "null-syscall": "getppid()",
    "read": "read() of a byte of /dev/zero",
    "write": "write() of a byte to /dev/null",
    "stat": "stat() of a file",
    "open-close": "open() and close()",
    "signal-install": "sigaction()",
    "signal-catch": "kill() of oneself, to the end of the handler",
    "signal-fault": "a store to a read-only page, to the end of the handler",
    "pipe": "round trip through two pipes",
    "unix": "round trip through a Unix socket",
    "switch-2p-0k": "switch between 2 processes",
    "switch-8p-16k": "switch between 8 processes with 16 KiB each",
    "fork": "fork(), exit and wait",
    "exec": "fork(), execve(), exit and wait",
    "mmap": "mmap() of 1 MiB, 64 pages touched, munmap()",
    "page-fault": "first touch of a page",
}

APPEND = "console=ttyS0 quiet panic=-1"
ROUNDS = 5


@dataclass
class Measurement:
    """What was measured, and which clocks were wrong."""

    results: Results = field(default_factory=lambda: Results(ITEMS))
    clocks: list[str] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """Return what makes the figures worthless."""
        return [*self.results.complaints(), *self.clocks]


@dataclass(frozen=True)
class SystemBench:
    """What to measure. `memory` is in MiB, `timeout` (one boot of one engine) in seconds."""

    kernel: Path
    engine: str = "direct"
    runs: int = 5
    only: str = ""
    memory: int = 512
    timeout: float = 300.0
    with_qemu: bool = True

    def measure(self, console: Console) -> Measurement:
        """Run everything, interleaved."""
        if self.only and self.only not in ITEMS:
            raise InputError(f"there is no item {self.only!r}: choose one of {', '.join(ITEMS)}")
        words = ["system", str(ROUNDS), *([self.only] if self.only else [])]
        measurement = Measurement()
        with tempfile.TemporaryDirectory(prefix="ringzero-bench-") as folder:
            initrd = Path(folder) / "initrd"
            initrd.write_bytes(guests.boot_initramfs())
            guest = Guest(self.kernel, initrd, f"{APPEND} -- {' '.join(words)}", self.memory)
            commands = {self.engine: ringzero_command(guest, engine=self.engine)}
            if self.with_qemu:
                commands["qemu"] = qemu_command(guest)
            commands["native"] = [str(guests.program()), *words]
            for turn in range(self.runs):
                for engine in commands if turn % 2 == 0 else reversed(commands):
                    with console.status(f"run {turn + 1} of {self.runs}: {engine}"):
                        try:
                            measured, complaint = self._run(commands[engine])
                        except GuestError as error:
                            raise GuestError(f"run {turn + 1}, {engine}: {error}") from error
                    measurement.results.add(engine, measured)
                    if complaint is not None:
                        measurement.clocks.append(f"run {turn + 1}, {engine}: {complaint}")
        return measurement

    def _run(self, command: Sequence[str]) -> tuple[dict[str, Measured], str | None]:
        """Run once; a second time when the clock was wrong, as when a guest took its clock's rate on a busy host."""
        for _ in range(2):
            done = run(command, timeout=self.timeout)
            measured, complaint = parse(done, "SYSTEM"), clock_complaint(done, "SYSTEM")
            if complaint is None:
                break
        return measured, complaint


def microseconds(nanoseconds: float) -> str:
    """Return a time for the table."""
    value = nanoseconds / 1000
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def show(console: Console, measurement: Measurement) -> None:
    """Print the table and the geometric means."""
    results = measurement.results
    [engine] = results.ours
    others = [other for other in ("native", "qemu") if other in results.runs]
    table = Table(
        title=f"one at a time, medians in microseconds; ours is {engine}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("item", no_wrap=True)
    for heading in ("native", "ours", "spread", "ours / native", "QEMU", "QEMU / ours"):
        table.add_column(heading, justify="right")
    for name in results.names:
        samples = {one: results.sample(one, name) for one in (engine, *others)}
        words = {one: microseconds(value.median) for one, value in samples.items() if value is not None}
        ours = samples[engine]
        ratios = (results.ratio(engine, "native", name), results.ratio("qemu", engine, name))
        to_native, to_qemu = (report.ratio(value) if value is not None else "-" for value in ratios)
        table.add_row(
            name,
            words.get("native", "-"),
            words.get(engine, "-"),
            f"±{ours.spread:.0%}" if ours is not None else "",
            to_native,
            words.get("qemu", "-"),
            to_qemu,
        )
    table.add_section()
    means = (results.mean(engine, "native"), results.mean("qemu", engine))
    to_native, to_qemu = (report.ratio(value) if value is not None else "-" for value in means)
    table.add_row("geomean", "", "", "", to_native, "", to_qemu)
    console.print(table)
    for complaint in measurement.complaints():
        console.print(f"WRONG: {complaint}", markup=False, style="red")


def as_json(measurement: Measurement, described: dict[str, Any], engine: str) -> dict[str, Any]:
    """Return the report."""
    results = measurement.results
    return {
        "bench": "system",
        "machine": described,
        "engine": engine,
        "items": ITEMS,
        "results": results.as_json("nanoseconds"),
        "means": {
            f"{engine}_over_native": results.mean(engine, "native"),
            f"qemu_over_{engine}": results.mean("qemu", engine),
        },
        "complaints": measurement.complaints(),
    }
