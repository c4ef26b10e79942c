"""`ringzero bench profile`: where a guest's time goes, by samples of what its processors do.

The guest is a boot to power-off, items of `bench compute` and `bench system`, or a command in an image. Shares are of
the time in which the guest had something to do; a busy host makes a run longer, but hardly changes them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ringzero.bench import boot, compute, guests, system
from ringzero.errors import GuestError, InputError
from ringzero.machine.machine import Machine

__all__ = ["ROWS", "ProfileBench", "Report"]

ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "direct": ("user code as it stands", ("direct.excursions",)),
    "user": ("translated user code", ()),
    "kernel": ("translated kernel code", ()),
    "gone": ("translated code, dropped since", ()),
    "refill": ("TLB refills from the shadow", ("tlb.misses",)),
    "walk": ("walks of guest page tables", ("tlb.fills",)),
    "translate": ("translation", ("translate.blocks",)),
    "recall": ("kept translations, in and out", ("kept.blocks",)),
    "switch": (
        "into translated code and out",
        (
            *("exits.probe", "exits.interpret", "exits.short", "exits.link", "exits.lookup", "exits.simd"),
            "exits.fault",
        ),
    ),
    "dispatch": ("finding the next block", ("translate.lookups",)),
    "refresh": ("taking note of what went stale", ("translate.user_forgets", "translate.kernel_forgets")),
    "interpret": ("interpreted instructions", ("processor.interpreted",)),
    "deliver": ("delivery of faults and interrupts", ()),
    "port": ("ports", ("outside.port_reads", "outside.port_writes")),
    "mmio": ("memory-mapped devices", ("outside.mmio_reads", "outside.mmio_writes")),
    "apic": ("local APIC by MSR and CR8", ("outside.apic_msrs",)),
    "signals": ("the host's signals in translated code", ("exits.fault", "exits.poll")),
    "monitor": ("run loop", ("exits.attention", "exits.interrupt_window", "exits.halt")),
}
"""What the samples are of, with its words in the table, and the counters of how often it was done."""


@dataclass
class Report:
    """What one guest did between two moments: seconds on the host's clock, and how the counters grew."""

    what: str
    seconds: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)

    def add(self, seconds: float, before: dict[str, int], after: dict[str, int]) -> None:
        """Take in a stretch of time."""
        self.seconds += seconds
        for name, value in after.items():
            self.counters[name] = self.counters.get(name, 0) + value - before.get(name, 0)

    def samples(self, name: str) -> int:
        """Return the samples of a row, or of `idle`."""
        return self.counters.get(f"profile.{name}", 0)

    @property
    def busy(self) -> int:
        """All samples in which the guest had something to do."""
        return sum(self.samples(name) for name in ROWS)

    def share(self, samples: int) -> float:
        """Return what part of the busy time some samples are."""
        return samples / self.busy if self.busy else 0.0

    @property
    def idle(self) -> float:
        """The part of all samples in which the guest slept."""
        every = self.busy + self.samples("idle")
        return self.samples("idle") / every if every else 0.0

    def count(self, name: str) -> int | None:
        """Return how often a row's thing was done; None where nobody counts it."""
        counters = ROWS[name][1]
        return sum(self.counters.get(counter, 0) for counter in counters) if counters else None

    def ranked(self, prefix: str) -> list[tuple[str, int]]:
        """Return the counters under a dotted prefix by what follows it, the largest first."""
        found = [
            (name.removeprefix(f"{prefix}."), value)
            for name, value in self.counters.items()
            if name.startswith(f"{prefix}.") and value
        ]
        return sorted(found, key=lambda row: (-row[1], row[0]))

    def instructions(self) -> list[tuple[str, int, int]]:
        """Return (instruction, samples, how often) of what was interpreted, the costliest first."""
        samples = dict(self.ranked("profile.instruction"))
        counts = dict(self.ranked("interpreted"))
        rows = [(name, samples.get(name, 0), counts.get(name, 0)) for name in samples.keys() | counts.keys()]
        return sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))

    def blocks(self) -> list[tuple[str, str, int]]:
        """Return (mode, address, samples) of the hottest blocks."""
        rows = [
            (mode, address, samples)
            for mode in ("user", "kernel")
            for address, samples in self.ranked(f"profile.{mode}_block")
        ]
        return sorted(rows, key=lambda row: (-row[2], row))

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON report holds of it."""
        return {
            "what": self.what,
            "seconds": self.seconds,
            "samples": self.busy,
            "idle_share": self.idle,
            "rows": [
                {
                    "name": name,
                    "samples": self.samples(name),
                    "share": self.share(self.samples(name)),
                    "count": self.count(name),
                }
                for name in ROWS
            ],
            "instructions": [
                {"instruction": name, "samples": samples, "share": self.share(samples), "count": count}
                for name, samples, count in self.instructions()
            ],
            "blocks": [
                {"mode": mode, "rip": f"0x{rip}", "samples": samples, "share": self.share(samples)}
                for mode, rip, samples in self.blocks()
            ],
            "counters": self.counters,
        }


@dataclass(frozen=True)
class ProfileBench:
    """What to look at: `command` in `image`, or else `items` of other benches, or else a boot of `kernel`.

    `memory` is in MiB, `timeout` in seconds. `cold` takes and keeps no translations of other runs.
    """

    kernel: Path | None = None
    items: Sequence[str] = ()
    image: str = "debian"
    command: Sequence[str] = ()
    engine: str = "direct"
    memory: int = 512
    cpus: int = 1
    cold: bool = False
    timeout: float = 600.0

    def measure(self, console: Console) -> list[Report]:
        """Run the guest and return a report for each thing that was looked at."""
        known = dict.fromkeys([*compute.CLASSES, *system.ITEMS])
        unknown = [name for name in self.items if name not in known]
        if unknown:
            raise InputError(f"there is no item {unknown[0]!r}: choose from {', '.join(known)}")
        if self.command:
            with console.status(f"{self.image}: {self.command[0]}"):
                return [self._command()]
        if self.kernel is None:
            raise InputError("what is to be looked at? A kernel's boot, --workload ITEM, or -- CMD")
        with tempfile.TemporaryDirectory(prefix="ringzero-bench-") as folder:
            initrd = Path(folder) / "initrd"
            initrd.write_bytes(guests.compute_initramfs() if self.items else guests.boot_initramfs())
            if not self.items:
                with console.status("booting"):
                    return [self._boot(self.kernel, initrd)]
            reports = []
            for item in self.items:
                with console.status(item):
                    reports.append(self._item(self.kernel, initrd, item))
            return reports

    def _machine(self, **options: Any) -> Machine:
        return Machine(
            engine=self.engine,
            memory=f"{self.memory}M",
            cpus=self.cpus,
            profile=True,
            translation_cache=not self.cold,
            **options,
        )

    def _boot(self, kernel: Path, initrd: Path) -> Report:
        report = Report(f"boot of {kernel.name}")
        with (
            self._machine(kernel=kernel, initrd=initrd, append=boot.APPEND) as machine,
            stretch(machine, report, {}),
        ):
            reason = machine.wait(self.timeout)
        if reason != "poweroff":
            raise GuestError(f"the boot did not end in a power-off but in {reason or 'nothing at all'}")
        return report

    def _item(self, kernel: Path, initrd: Path, item: str) -> Report:
        report = Report(item)
        words = item if item in compute.CLASSES else f"system {system.ROUNDS} {item}"
        with self._machine(kernel=kernel, initrd=initrd, append=f"{compute.APPEND} -- {words}") as machine:
            end = time.monotonic() + self.timeout
            while True:
                mark = machine.console.expect(r"BENCH-(START|END|FAILED)", end - time.monotonic())
                if mark[1] == "END":
                    break
                if mark[1] == "FAILED":
                    raise GuestError(f"{item} failed in the guest: {machine.console.tail()[-200:]!r}")
                with stretch(machine, report):
                    machine.console.expect("BENCH-STOP", end - time.monotonic())
        return report

    def _command(self) -> Report:
        report = Report(" ".join(self.command))
        with self._machine(image=self.image) as machine:
            machine.wait_ready(self.timeout)
            with stretch(machine, report):
                done = machine.run(self.command, timeout=self.timeout)
            if done.returncode != 0:
                said = done.stderr.decode(errors="replace").strip()[-300:]
                raise GuestError(f"the command ended with status {done.returncode}: {said}")
        return report


@contextmanager
def stretch(machine: Machine, report: Report, before: dict[str, int] | None = None) -> Iterator[None]:
    """Add what the machine does inside the `with` to a report."""
    before = machine.stats() if before is None else before
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    report.add(seconds, before, machine.stats())


def show(console: Console, reports: Sequence[Report], most: int = 12) -> None:
    """Print the tables: where the time went, then the costliest interpreted instructions and hottest blocks."""
    for report in reports:
        title = f"{report.what}: {report.seconds:.2f} s, {report.idle:.0%} of it idle; {report.busy} samples"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("where", no_wrap=True)
        table.add_column("share", justify="right")
        table.add_column("times", justify="right")
        for name, (words, _) in sorted(ROWS.items(), key=lambda row: -report.samples(row[0])):
            count = report.count(name)
            if report.samples(name) or count:
                share = report.share(report.samples(name))
                table.add_row(words, f"{share:.1%}", "" if count is None else f"{count:,}")
        for name, samples, count in report.instructions()[:most]:
            if name == report.instructions()[0][0]:
                table.add_section()
            table.add_row(f"interpreted: {name}", f"{report.share(samples):.1%}", f"{count:,}")
        for number, (mode, rip, samples) in enumerate(report.blocks()[:most]):
            if number == 0:
                table.add_section()
            table.add_row(f"{mode} block {rip}", f"{report.share(samples):.1%}", "")
        console.print(table)


def as_json(reports: Sequence[Report], described: dict[str, Any], engine: str) -> dict[str, Any]:
    """Return the report."""
    return {
        "bench": "profile",
        "machine": described,
        "engine": engine,
        "results": [report.as_json() for report in reports],
    }
