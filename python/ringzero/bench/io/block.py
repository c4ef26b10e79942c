"""`block`: how fast a guest reads and writes its disk past its own cache, in sequence and at random.

The guest's program (guests/disk) is the same for all, as /init with Debian's kernel and drivers; natively it works on
the file itself. The disk is a raw file in memory, so that the monitors are measured and not what this host has for
disks; QEMU has each of its ways of asynchronous I/O, an I/O thread, and counts with the one that is its best for an
item.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ringzero.bench import guests
from ringzero.bench.clocked import clock_complaint
from ringzero.bench.engines import Guest, Run, qemu_command, ringzero_command, run
from ringzero.bench.figures import Sample, sample
from ringzero.bench.memory.item import MIB, Figure, Outcome
from ringzero.errors import GuestError

__all__ = ["ITEMS", "BlockBench"]

ITEMS = {
    "sequential-read": ("sequential read, 1 MiB at a time, 4 deep", "MiB/s"),
    "sequential-write": ("sequential write, 1 MiB at a time, 4 deep", "MiB/s"),
    "random-read": ("random read, 4 KiB, 32 deep", "IOPS"),
    "random-write": ("random write, 4 KiB, 32 deep", "IOPS"),
}
BAR = 2.0
SERIES = "6.12"
AIO = {
    "qemu threads": "cache=writeback,aio=threads",
    "qemu io_uring": "cache=writeback,aio=io_uring",
    "qemu threads direct": "cache=none,aio=threads",
    "qemu native direct": "cache=none,aio=native",
    "qemu io_uring direct": "cache=none,aio=io_uring",
}
LINE = re.compile(r"\bDISK ([a-z-]+) (\d+) (\d+) ([0-9a-f]{16})$")


@dataclass(frozen=True)
class BlockBench:
    """What to measure. `mebibytes` is the size of the disk, `operations` how many random ones a round has; the best of
    the `rounds` of a run counts, and the median of the `runs`. `folder` is where the disk is."""

    runs: int = 5
    rounds: int = 3
    mebibytes: int = 512
    operations: int = 20000
    memory: int = 256
    timeout: float = 300.0
    folder: Path = Path("/dev/shm")

    def measure(self, console: Console) -> Outcome:
        """Run all, interleaved."""
        rates: dict[str, dict[str, list[float]]] = {}
        sums: dict[str, set[str]] = {name: set() for name in ITEMS}
        complaints: list[str] = []
        with tempfile.TemporaryDirectory(prefix="ringzero-bench-", dir=self.folder) as name:
            commands = self._commands(Path(name))
            for turn in range(self.runs):
                for engine in commands if turn % 2 == 0 else reversed(commands):
                    with console.status(f"block: run {turn + 1} of {self.runs}, {engine}"):
                        done = run(commands[engine], timeout=self.timeout)
                    best = self._rates(done, engine, sums)
                    complaint = clock_complaint(done, "DISK")
                    if complaint is not None:
                        complaints.append(f"run {turn + 1}, {engine}: {complaint}")
                    for item, rate in best.items():
                        rates.setdefault(engine, {}).setdefault(item, []).append(rate)
        complaints += [f"{item}: what was read differs" for item, found in sums.items() if len(found) != 1]
        samples = {
            engine: {item: sample(values) for item, values in items.items()}
            for engine, items in rates.items()
        }
        return self._outcome(samples, complaints)

    def _commands(self, folder: Path) -> dict[str, list[str]]:
        initrd = folder / "initrd"
        initrd.write_bytes(guests.disk_initramfs(SERIES))
        words = [str(self.rounds), str(self.mebibytes), str(self.operations)]
        append = f"console=ttyS0 quiet panic=-1 -- bench /dev/vda {' '.join(words)}"
        guest = Guest(guests.kernel(SERIES), initrd, append, self.memory)
        commands = {
            "ringzero": [*ringzero_command(guest), "--disk", str(self._disk(folder, "ringzero"))],
            "native": [str(guests.disk_program()), "bench", str(self._disk(folder, "native")), *words],
        }
        for engine, options in AIO.items():
            file = self._disk(folder, engine.replace(" ", "-"))
            commands[engine] = [
                *qemu_command(guest),
                *("-drive", f"if=none,id=disk,file={file},format=raw,{options}"),
                *("-object", "iothread,id=thread"),
                *("-device", "virtio-blk-pci,drive=disk,iothread=thread,num-queues=1"),
            ]
        return commands

    def _disk(self, folder: Path, name: str) -> Path:
        path = folder / f"{name}.raw"
        with path.open("wb") as file:
            file.truncate(self.mebibytes * MIB)
        return path

    def _rates(self, done: Run, engine: str, sums: dict[str, set[str]]) -> dict[str, float]:
        """Return how much of each item was done in a second, at the best."""
        best: dict[str, float] = {}
        for _, text in done.lines:
            if (line := LINE.search(text)) is not None:
                rate = int(line[3]) / int(line[2]) * 1e9
                best[line[1]] = max(best.get(line[1], 0.0), rate)
                sums[line[1]].add(line[4])
        if done.status != 0 or done.timed_out or not done.has("PASS") or set(best) != set(ITEMS):
            raise GuestError(f"{engine} did not come to its end: {done.tail()}")
        return best

    def _outcome(self, samples: dict[str, dict[str, Sample]], complaints: Sequence[str]) -> Outcome:
        figures, notes = [], []
        for item, (title, unit) in ITEMS.items():
            ours, native = samples["ringzero"][item], samples["native"][item]
            best = max(AIO, key=lambda engine: samples[engine][item].median)
            theirs = samples[best][item]
            figures.append(Figure(title, ours.median, unit, theirs=theirs.median))
            figures.append(Figure("  times QEMU's best", ours.median / theirs.median, "x", BAR))
            figures.append(
                Figure("  of what this host does natively", 100 * ours.median / native.median, "%")
            )
            notes.append(
                f"{item}: QEMU's best is {best!r}; half of the range is {ours.spread:.0%} of our median"
            )
        figures.append(Figure("complaints", len(complaints), bar=0, at_most=True))
        details = {
            engine: {item: one.as_json() for item, one in items.items()} for engine, items in samples.items()
        }
        title = f"a raw disk of {self.mebibytes} MiB in {self.folder}, medians of {self.runs}"
        return Outcome("block", title, figures, [*notes, *complaints], details)
