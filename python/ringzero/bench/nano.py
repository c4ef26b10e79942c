"""`ringzero bench nano`: what single operations of a kernel cost, in cycles of the host's time stamp counter.

After Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization" (ASPLOS 2006), section
6.3. The guest is guests/nano; natively its loops run as a program where they need no privilege.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ringzero.bench import guests, report
from ringzero.bench.engines import Guest, Run, qemu_command, ringzero_command, run
from ringzero.bench.figures import Sample, sample
from ringzero.errors import GuestError, InputError

__all__ = ["OPERATIONS", "NanoBench", "Results", "parse"]

OPERATIONS = {
    "syscall": "SYSCALL and SYSRET, round trip",
    "in": "IN from a port that nobody has",
    "cr8wr": "a store to CR8, the task priority",
    "callret": "CALL and RET",
    "pgfault": "page fault and IRET, round trip",
    "divzero": "divide error and IRET, round trip",
    "invlpg": "INVLPG of a mapped page",
    "ptemod": "page-table store, INVLPG, access",
    "switch": "load of CR3, then eight pages touched",
    "switch-pcid": "the same with PCIDs",
    "ipi-self": "an interrupt that the processor sends itself",
    "smc": "a store into an instruction, then running it",
}

LINE = re.compile(r"^NANO ([a-z0-9-]+) (\d+) (\d+) ([0-9a-f]{16})$")
ROUNDS = 3
MEMORY = 64


@dataclass(frozen=True)
class Measured:
    """One operation under one engine: cycles of each round, and what was computed."""

    cycles: tuple[float, ...]
    checksums: frozenset[str]


def parse(done: Run) -> dict[str, Measured]:
    """Return what a run measured, by operation. Raises GuestError if it is not whole."""
    cycles: dict[str, list[float]] = {}
    checksums: dict[str, set[str]] = {}
    for _, text in done.lines:
        line = LINE.match(text)
        if line is not None:
            cycles.setdefault(line[1], []).append(int(line[2]) / int(line[3]))
            checksums.setdefault(line[1], set()).add(line[4])
    if done.status != 0 or done.timed_out or not done.has("PASS"):
        how = "did not end in time" if done.timed_out else f"ended with status {done.status}"
        raise GuestError(f"nano {how}: {done.tail()}")
    return {name: Measured(tuple(cycles[name]), frozenset(checksums[name])) for name in cycles}


@dataclass
class Results:
    """All runs: engine -> operation -> what each run measured. The first engine is ours that counts."""

    runs: dict[str, dict[str, list[Measured]]] = field(default_factory=dict)

    def add(self, engine: str, measured: dict[str, Measured]) -> None:
        """Take in one run of one engine."""
        for name, one in measured.items():
            self.runs.setdefault(engine, {}).setdefault(name, []).append(one)

    @property
    def names(self) -> list[str]:
        """The operations that any engine ran, in the order of OPERATIONS."""
        return [name for name in OPERATIONS if any(name in engine for engine in self.runs.values())]

    def cycles(self, engine: str, name: str) -> Sample | None:
        """Return the cycles of an operation: a value a run, the median of its rounds. None where it did not run."""
        measured = self.runs.get(engine, {}).get(name)
        return sample([sample(one.cycles).median for one in measured]) if measured else None

    def ratio(self, engine: str, name: str) -> float | None:
        """Return QEMU's cycles in those of an engine: above 1 is faster than QEMU."""
        ours, theirs = self.cycles(engine, name), self.cycles("qemu", name)
        return theirs.median / ours.median if ours and theirs else None

    def complaints(self) -> list[str]:
        """Return what was computed wrongly by some engine."""
        found = []
        for name in self.names:
            sums = {
                engine: sorted({value for one in operations[name] for value in one.checksums})
                for engine, operations in self.runs.items()
                if name in operations
            }
            if len({value for values in sums.values() for value in values}) > 1:
                found.append(f"{name}: the checksums differ: {sums}")
        return found


@dataclass(frozen=True)
class NanoBench:
    """What to measure: `only` names a single operation; `timeout` is in seconds, for one run of one engine."""

    engines: Sequence[str] = ("translate", "interpret")
    runs: int = 5
    only: str = ""
    timeout: float = 120.0
    with_qemu: bool = True

    def measure(self, console: Console) -> Results:
        """Run everything, interleaved."""
        if self.only and self.only not in OPERATIONS:
            raise InputError(f"there is no operation {self.only!r}: choose one of {', '.join(OPERATIONS)}")
        words = f"rounds={ROUNDS}" + (f" only={self.only}" if self.only else "")
        guest = Guest(guests.nano(), None, words, MEMORY)
        commands = {engine: ringzero_command(guest, engine=engine) for engine in self.engines}
        if self.with_qemu:
            commands["qemu"] = qemu_command(guest)
        commands["native"] = [str(guests.program()), "nano", str(ROUNDS)]
        results = Results()
        for turn in range(self.runs):
            for engine in commands if turn % 2 == 0 else reversed(commands):
                with console.status(f"run {turn + 1} of {self.runs}: {engine}"):
                    done = run(commands[engine], timeout=self.timeout)
                try:
                    measured = parse(done)
                except GuestError as error:
                    raise GuestError(f"run {turn + 1}, {engine}: {error}") from error
                results.add(engine, {n: one for n, one in measured.items() if self.only in ("", n)})
        return results


def cycles_in_words(cycles: Sample | None) -> str:
    """Return cycles for the table."""
    if cycles is None:
        return "-"
    return f"{cycles.median:.1f}" if cycles.median < 10 else f"{cycles.median:,.0f}"


def show(console: Console, results: Results) -> None:
    """Print the table."""
    engines = [engine for engine in results.runs if engine not in ("native", "qemu")]
    first = engines[0]
    table = Table(
        title="cycles of one operation, medians of the runs", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("operation", no_wrap=True)
    for heading in ("native", *engines, "spread", "QEMU", f"QEMU / {first}"):
        table.add_column(heading, justify="right")
    for name in results.names:
        samples = {engine: results.cycles(engine, name) for engine in ("native", *engines, "qemu")}
        words = {engine: cycles_in_words(one) for engine, one in samples.items()}
        ours, ratio = samples[first], results.ratio(first, name)
        table.add_row(
            name,
            *(words[engine] for engine in ("native", *engines)),
            f"±{ours.spread:.0%}" if ours else "",
            words["qemu"],
            report.ratio(ratio) if ratio else "",
        )
    console.print(table)
    for complaint in results.complaints():
        console.print(f"WRONG: {complaint}", markup=False, style="red")


def as_json(results: Results, described: dict[str, Any]) -> dict[str, Any]:
    """Return the report."""
    return {
        "bench": "nano",
        "machine": described,
        "results": [
            {
                "operation": name,
                "what": OPERATIONS[name],
                "engine": engine,
                "cycles": cycles.as_json(),
                "checksum": min(results.runs[engine][name][0].checksums),
                "qemu_over_this": results.ratio(engine, name),
            }
            for name in results.names
            for engine in results.runs
            if (cycles := results.cycles(engine, name)) is not None
        ],
        "complaints": results.complaints(),
    }
