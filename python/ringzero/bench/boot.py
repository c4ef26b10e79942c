"""`ringzero bench boot`: whole-process wall time from start to power-off of a Linux guest, against QEMU TCG.

The same kernel, initramfs and command line for both; the guest's /init prints a line and powers off. What is
timed is what a user waits for: the start of Python and of the package is part of it.

Python's bytecode is compiled once, as it is when a package is installed, whatever the environment says.

ringzero is measured three ways: as it finds its caches after a first boot; cold, with empty caches each time;
and with --kaslr, where the kernel unpacks itself as it does under QEMU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ringzero.bench import guests, report
from ringzero.bench.engines import Guest, Run, qemu_command, ringzero_command, run
from ringzero.bench.figures import Sample, sample

__all__ = ["BootBench", "Outcome"]

COLD = ", cold"
KASLR = ", --kaslr"
REACHED = "BENCH-INIT"
APPEND = f"console=ttyS0 panic=-1 -- {guests.POWEROFF}"


@dataclass(frozen=True)
class Outcome:
    """All runs of one kernel under one engine; "translate, cold" and the like are engines here."""

    kernel: str
    engine: str
    runs: tuple[Run, ...]

    @property
    def good(self) -> list[Run]:
        """The runs that reached /init and ended in a power-off, with status 0."""
        return [one for one in self.runs if one.status == 0 and not one.timed_out and one.has(REACHED)]

    @property
    def seconds(self) -> Sample | None:
        """Times of the good runs."""
        return sample([one.seconds for one in self.good]) if self.good else None


@dataclass(frozen=True)
class BootBench:
    """What to measure. `kernels` are (name, file) pairs; `timeout` is in seconds, `memory` in MiB."""

    kernels: Sequence[tuple[str, Path]]
    engine: str = "direct"
    runs: int = 5
    memory: int = 256
    timeout: float = 120.0
    with_qemu: bool = True

    def measure(self, console: Console) -> list[Outcome]:
        """Run everything, interleaved: a round is each kernel under each engine."""
        ours = [self.engine + way for way in ("", COLD, KASLR)]
        engines = [*ours, *(["qemu"] if self.with_qemu else [])]
        collected: dict[tuple[str, str], list[Run]] = {(k, e): [] for k, _ in self.kernels for e in engines}
        with tempfile.TemporaryDirectory(prefix="ringzero-bench-") as folder:
            initrd = Path(folder) / "initrd"
            initrd.write_bytes(guests.boot_initramfs())
            warm = Path(folder) / "cache"
            for name, kernel in self.kernels:
                with console.status(f"a first boot, not counted: Linux {name}"):
                    self._run(self.engine, Guest(kernel, initrd, APPEND, self.memory), warm)
            for turn in range(self.runs):
                for name, kernel in self.kernels:
                    guest = Guest(kernel, initrd, APPEND, self.memory)
                    for engine in engines if turn % 2 == 0 else reversed(engines):
                        with console.status(f"run {turn + 1} of {self.runs}: Linux {name}, {engine}"):
                            collected[name, engine].append(self._run(engine, guest, warm))
        return [Outcome(kernel, engine, tuple(runs)) for (kernel, engine), runs in collected.items()]

    def _run(self, engine: str, guest: Guest, warm: Path) -> Run:
        """Run a guest once; ringzero keeps what it caches in `warm`, or, cold, in a place that is empty."""
        if engine == "qemu":
            return run(qemu_command(guest), timeout=self.timeout)
        kaslr = engine.endswith(KASLR)
        command = ringzero_command(guest, engine=self.engine, kaslr=kaslr)
        with tempfile.TemporaryDirectory(prefix="ringzero-bench-") as empty:
            place = empty if engine.endswith(COLD) else str(warm)
            bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(warm / "bytecode")}
            return run(command, timeout=self.timeout, env=os.environ | bytecode | {"XDG_CACHE_HOME": place})


def ratios(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], float]:
    """Return QEMU's median divided by ours, per kernel and engine: above 1 is faster than QEMU."""
    medians = {(one.kernel, one.engine): one.seconds.median for one in outcomes if one.seconds}
    return {
        (kernel, engine): medians[kernel, "qemu"] / seconds
        for (kernel, engine), seconds in medians.items()
        if engine != "qemu" and (kernel, "qemu") in medians
    }


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print the table, and how each failed run ended."""
    against = ratios(outcomes)
    table = Table(title="start of the process to power-off of the guest", title_justify="left")
    for heading in ("kernel", "engine", "median", "spread", "good runs", "QEMU / this"):
        table.add_column(heading, justify="left" if heading in ("kernel", "engine") else "right")
    for one in outcomes:
        seconds = one.seconds
        table.add_row(
            one.kernel,
            one.engine,
            f"{seconds.median:.3f} s" if seconds else "-",
            f"±{seconds.spread:.0%}" if seconds else "-",
            f"{len(one.good)} of {len(one.runs)}",
            report.ratio(ratio) if (ratio := against.get((one.kernel, one.engine))) else "",
        )
    console.print(table)
    for one in outcomes:
        for number, failed in enumerate(one.runs, 1):
            if failed not in one.good:
                how = "did not end in time" if failed.timed_out else f"ended with status {failed.status}"
                console.print(
                    f"{one.kernel}, {one.engine}, run {number} {how}: {failed.tail()}", markup=False
                )


def failed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return those of which not every run got to its end."""
    return [one for one in outcomes if len(one.good) < len(one.runs)]


def as_json(outcomes: Sequence[Outcome], described: dict[str, Any]) -> dict[str, Any]:
    """Return the report."""
    against = ratios(outcomes)
    return {
        "bench": "boot",
        "machine": described,
        "append": APPEND,
        "results": [
            {
                "kernel": one.kernel,
                "engine": one.engine,
                "runs": len(one.runs),
                "good": len(one.good),
                "seconds": one.seconds.as_json() if one.seconds else None,
            }
            for one in outcomes
        ],
        "qemu_over_ringzero": {f"{kernel}, {engine}": ratio for (kernel, engine), ratio in against.items()},
    }
