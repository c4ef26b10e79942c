"""`ringzero bench compute`: fourteen programs under ringzero, under QEMU TCG, and on the bare machine.

Times are taken inside, by the guest's clock; the host's clock checks that one from outside, and the
checksums of what was computed must agree between all engines.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ringzero.bench import guests, report
from ringzero.bench.engines import Guest, Run, qemu_command, ringzero_command, run
from ringzero.bench.figures import Sample, geometric_mean, sample
from ringzero.errors import GuestError

__all__ = ["CLASSES", "ComputeBench", "Item", "Results", "parse"]

APPEND = "console=ttyS0 quiet panic=-1"

CLASSES = {
    "integer-loop": "user",
    "random-updates": "user",
    "recursive-calls": "user",
    "dot-product": "float",
    "memset-memcpy": "user",
    "null-syscall": "kernel",
    "fork-exec-wait": "kernel",
    "pipe-ping-pong": "kernel",
    "page-fault-touch": "kernel",
    "sha256sum": "user",
    "gzip": "user",
    "bzip2-d": "user",
    "awk": "user",
    "sort": "user",
}
"""What each item is mostly made of. Floating point is user mode too."""

LINE = re.compile(r"BENCH ([a-z0-9-]+) (\d+) ([0-9a-f]{16})$")
MARK = re.compile(r"BENCH-(START|STOP)$")

# A guest's clock may differ from the host's by this part, and by these seconds: a line takes time to arrive.
CLOCK_PART, CLOCK_SECONDS = 0.05, 0.05


@dataclass(frozen=True)
class Item:
    """One item of one run: seconds by the guest's clock and by the host's, and the checksum."""

    seconds: float
    host_seconds: float
    checksum: str

    @property
    def clock_differs(self) -> bool:
        """Whether the guest's clock and the host's disagree by more than the arrival of lines explains."""
        return abs(self.seconds - self.host_seconds) > CLOCK_PART * self.host_seconds + CLOCK_SECONDS


def parse(done: Run) -> dict[str, Item]:
    """Return the items of a run by name. Raises GuestError if the run is not whole."""
    items: dict[str, Item] = {}
    started = host_seconds = 0.0
    for moment, text in done.lines:
        mark = MARK.search(text)
        if mark is not None and mark[1] == "START":
            started = moment
        elif mark is not None:
            host_seconds += moment - started
        line = LINE.search(text)
        if line is not None:
            items[line[1]] = Item(int(line[2]) / 1e9, host_seconds, line[3])
            host_seconds = 0.0
    missing = [name for name in CLASSES if name not in items]
    if missing or done.status != 0 or done.timed_out:
        how = "did not end in time" if done.timed_out else f"ended with status {done.status}"
        raise GuestError(f"the compute set {how}, without {', '.join(missing) or 'nothing'}: {done.tail()}")
    return items


@dataclass
class Results:
    """All rounds: engine -> item -> what each round gave."""

    rounds: dict[str, dict[str, list[Item]]] = field(default_factory=dict)

    def add(self, engine: str, items: dict[str, Item]) -> None:
        """Take in one round of one engine."""
        for name, item in items.items():
            self.rounds.setdefault(engine, {}).setdefault(name, []).append(item)

    def seconds(self, engine: str, name: str) -> Sample:
        """Return the times of an item."""
        return sample([item.seconds for item in self.rounds[engine][name]])

    def ratio(self, slow: str, fast: str, name: str) -> float:
        """Return how many times `slow`'s median is `fast`'s."""
        return self.seconds(slow, name).median / self.seconds(fast, name).median

    def means(self, slow: str, fast: str) -> dict[str, float]:
        """Return the geometric means of the ratios: over all items, user mode, floating point, kernel."""
        groups = {
            "all": list(CLASSES),
            "user": [name for name, kind in CLASSES.items() if kind in ("user", "float")],
            "float": [name for name, kind in CLASSES.items() if kind == "float"],
            "kernel": [name for name, kind in CLASSES.items() if kind == "kernel"],
        }
        return {
            group: geometric_mean(self.ratio(slow, fast, name) for name in names)
            for group, names in groups.items()
        }

    def complaints(self) -> list[str]:
        """Return what makes the figures worthless: checksums that differ, clocks that are wrong."""
        found = []
        for name in CLASSES:
            sums = {e: sorted({item.checksum for item in items[name]}) for e, items in self.rounds.items()}
            if len({value for values in sums.values() for value in values}) > 1:
                found.append(f"{name}: the checksums differ: {sums}")
            for engine, items in self.rounds.items():
                bad = [item for item in items[name] if item.clock_differs]
                if bad:
                    found.append(
                        f"{name}, {engine}: the guest's clock says {bad[0].seconds:.3f} s, "
                        f"the host's {bad[0].host_seconds:.3f} s"
                    )
        return found


@dataclass(frozen=True)
class ComputeBench:
    """What to measure. `memory` is in MiB, `timeout` (one boot of one engine) in seconds."""

    kernel: Path
    engine: str = "direct"
    runs: int = 5
    memory: int = 512
    timeout: float = 600.0
    with_qemu: bool = True

    def measure(self, console: Console) -> Results:
        """Run everything, interleaved: a round is the whole set natively and in one boot of each engine."""
        results = Results()
        engines = ["native", self.engine, *(["qemu"] if self.with_qemu else [])]
        # In memory where there is such a file system: the guests' files are in memory too.
        shm = Path("/dev/shm")
        with tempfile.TemporaryDirectory(prefix="ringzero-bench-", dir=shm if shm.is_dir() else None) as name:
            folder = Path(name)
            initrd, tools = folder / "initrd", folder / "busybox"
            initrd.write_bytes(guests.compute_initramfs())
            tools.write_bytes(guests.busybox())
            tools.chmod(0o755)
            guest = Guest(self.kernel, initrd, APPEND, self.memory)
            commands = {
                "native": [str(guests.program()), "all", str(tools), str(folder)],
                self.engine: ringzero_command(guest, engine=self.engine),
                "qemu": qemu_command(guest) if self.with_qemu else [],
            }
            for turn in range(self.runs):
                for engine in engines if turn % 2 == 0 else reversed(engines):
                    with console.status(f"round {turn + 1} of {self.runs}: {engine}"):
                        done = run(commands[engine], timeout=self.timeout)
                    try:
                        results.add(engine, parse(done))
                    except GuestError as error:
                        raise GuestError(f"round {turn + 1}, {engine}: {error}") from error
        return results


def show(console: Console, results: Results, engine: str) -> None:
    """Print the table and the geometric means."""
    with_qemu = "qemu" in results.rounds
    # Without vertical lines seven columns fit into 80 characters.
    table = Table(
        title=f"compute: medians in ms; ours is {engine}", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("item", no_wrap=True)
    headings = ["native", "ours", "spread", "ours / native"]
    for heading in [*headings, *(["QEMU", "QEMU / ours"] if with_qemu else [])]:
        table.add_column(heading, justify="right", min_width=6)
    for name in CLASSES:
        ours = results.seconds(engine, name)
        table.add_row(
            name,
            report.milliseconds(results.seconds("native", name).median),
            report.milliseconds(ours.median),
            f"±{ours.spread:.0%}",
            report.ratio(results.ratio(engine, "native", name)),
            *(
                (
                    report.milliseconds(results.seconds("qemu", name).median),
                    report.ratio(results.ratio("qemu", engine, name)),
                )
                if with_qemu
                else ()
            ),
        )
    table.add_section()
    to_native = results.means(engine, "native")
    to_qemu = results.means("qemu", engine) if with_qemu else {}
    for group, value in to_native.items():
        qemu = ("", report.ratio(to_qemu[group])) if with_qemu else ()
        table.add_row(f"geomean, {group}", "", "", "", report.ratio(value), *qemu)
    console.print(table)
    for complaint in results.complaints():
        console.print(f"WRONG: {complaint}", markup=False, style="red")


def as_json(results: Results, described: dict[str, Any], engine: str) -> dict[str, Any]:
    """Return the report."""
    return {
        "bench": "compute",
        "machine": described,
        "append": APPEND,
        "results": [
            {
                "item": name,
                "class": CLASSES[name],
                "engine": one,
                "checksum": items[name][0].checksum,
                "seconds": results.seconds(one, name).as_json(),
                "host_seconds": [item.host_seconds for item in items[name]],
            }
            for name in CLASSES
            for one, items in results.rounds.items()
        ],
        "means": {
            f"{engine}_over_native": results.means(engine, "native"),
            **({f"qemu_over_{engine}": results.means("qemu", engine)} if "qemu" in results.rounds else {}),
        },
        "complaints": results.complaints(),
    }
