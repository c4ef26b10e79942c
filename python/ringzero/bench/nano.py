"""`ringzero bench nano`: what single operations of a kernel cost, in cycles of the host's time stamp counter.

After Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization" (ASPLOS 2006), section
6.3. The guest is guests/nano; natively its loops run as a program where they need no privilege.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ringzero.bench import guests, report
from ringzero.bench.engines import Guest, qemu_command, ringzero_command, run
from ringzero.bench.figures import Sample
from ringzero.bench.rounds import Results, parse
from ringzero.errors import GuestError, InputError

__all__ = ["OPERATIONS", "NanoBench"]

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

ROUNDS = 5
MEMORY = 64


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
        results = Results(OPERATIONS)
        for turn in range(self.runs):
            for engine in commands if turn % 2 == 0 else reversed(commands):
                with console.status(f"run {turn + 1} of {self.runs}: {engine}"):
                    done = run(commands[engine], timeout=self.timeout)
                try:
                    measured = parse(done, "NANO")
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
    engines = results.ours
    first = engines[0]
    table = Table(
        title="cycles of one operation, medians of the runs", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("operation", no_wrap=True)
    for heading in ("native", *engines, "spread", "QEMU", f"QEMU / {first}"):
        table.add_column(heading, justify="right")
    for name in results.names:
        samples = {engine: results.sample(engine, name) for engine in ("native", *engines, "qemu")}
        words = {engine: cycles_in_words(one) for engine, one in samples.items()}
        ours, ratio = samples[first], results.ratio("qemu", first, name)
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
        "operations": OPERATIONS,
        "results": results.as_json("cycles"),
        "complaints": results.complaints(),
    }
