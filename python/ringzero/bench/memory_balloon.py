"""`ringzero bench balloon`: how fast memory goes to the host and back, and what a ballooned guest is worth.

The rate is of one guest with Debian's own driver: from the target being set until the driver says that all pages are
given, with memory that the guest never used and with memory that it just freed; and back.

A ballooned guest is compared with one that natively has as much memory as the balloon leaves, as Waldspurger (2002, 3.2
"Ballooning") did with a file server: both read the same files, in the same random order, from disks that hold one and a
half times what the smaller guest has for its page cache. They take turns, round by round, so that both meet the same
host. What else the host does makes either slower, so two more figures stand beside the throughput, which depend on it
less: the processor time that the host spent on the rounds, and how much came from the disk.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ringzero.bench import guests
from ringzero.bench.figures import Sample, sample
from ringzero.bench.idle import processor_seconds
from ringzero.errors import GuestError, InputError
from ringzero.machine.disk import Disk
from ringzero.machine.machine import Machine

__all__ = ["BalloonBench", "Figures", "Rate", "Served"]

MIB = 1 << 20
PAGES = MIB // 4096
"""Pages of a MiB."""
TIMEOUT = 120.0
# Small files more often than large ones: 64 KiB in the mean.
FILE_KIB = (16, 16, 16, 16, 64, 64, 256)
# How much there is to read, in parts of what the guest has for its page cache, and how often in a round.
FILES_TO_CACHE = 1.5
READS_TO_FILES = 2
SEED = 4242
MOUNTED = "/mnt"
PROGRAM = "/root/bench"
LINE = re.compile(r"^FILES (\d+) (\d+) ([0-9a-f]{16})$", re.MULTILINE)


@dataclass(frozen=True)
class Rate:
    """How fast a balloon of so many MiB went up and down, in GiB/s; `freed` is memory that the guest had used."""

    mebibytes: int
    inflated: Sample
    inflated_freed: Sample
    deflated: Sample
    returned: int
    """Bytes of host memory that went back with the memory that the guest had used."""


@dataclass(frozen=True)
class Round:
    """One round of a guest: MB/s, bytes read and how many of them from its disk, the host's processor time in seconds,
    and the checksum of what it read.
    """

    speed: float
    served: int
    from_disk: int
    processor: float
    checksum: str


@dataclass(frozen=True)
class Served:
    """A ballooned guest and a native one of the same size, in MiB; rounds in the order in which they were run."""

    size: int
    full: int
    files_bytes: int
    native: tuple[Round, ...]
    ballooned: tuple[Round, ...]

    @property
    def ratio(self) -> float:
        """What the ballooned guest reaches of the native one's throughput, by the best round of each: both do the same
        in all rounds, and what else the host does only makes one slower.
        """
        return _speed(self.ballooned).high / _speed(self.native).high

    @property
    def processor_ratio(self) -> float:
        """What it reaches of the native one's throughput in a second of the host's processors, over all rounds."""
        per_second = [
            sum(one.served for one in rounds) / max(sum(one.processor for one in rounds), 0.001)
            for rounds in (self.ballooned, self.native)
        ]
        return per_second[0] / per_second[1]

    @property
    def disk_ratio(self) -> float:
        """What it reads from its disk, in parts of what the native one reads."""
        native = sum(one.from_disk for one in self.native)
        return sum(one.from_disk for one in self.ballooned) / native if native else 1.0


@dataclass(frozen=True)
class Figures:
    """What was measured."""

    rate: Rate | None
    served: tuple[Served, ...]


@dataclass(frozen=True)
class BalloonBench:
    """What to measure. `give`, `sizes` and `full` are MiB; `full` is what a ballooned guest begins with.

    Of each size there are so many `pairs`, each of two guests that were just started: what a guest translated
    first, and where it lies, makes one guest faster than its twin for all its life.
    """

    image: str = "debian"
    engine: str = "direct"
    runs: int = 5
    give: int = 1024
    sizes: Sequence[int] = (144, 160, 192, 224)
    full: int = 256
    pairs: int = 1

    def measure(self, console: Console) -> Figures:
        """Measure the rate, then each size."""
        if wrong := [size for size in self.sizes if not 96 <= size < self.full]:
            raise InputError(f"a ballooned guest of {wrong[0]} MiB cannot be: from 96 to {self.full - 1}")
        rate = None
        if self.give:
            with console.status("how fast the balloon is"):
                rate = self._rate()
        served = []
        if self.sizes:
            with _served_files(self.full) as (disk, sizes):
                for size in self.sizes:
                    for pair in range(self.pairs):
                        with console.status(f"a file server of {size} MiB, pair {pair + 1} of {self.pairs}"):
                            served.append(self._serve(size, disk, sizes, is_native_first=pair % 2 == 0))
        return Figures(rate, tuple(served))

    def _rate(self) -> Rate:
        up, up_freed, down, returned = [], [], [], []
        speed = self.give / 1024
        with self._machine(self.give + 384) as machine:
            for _ in range(self.runs):
                up.append(speed / inflate(machine, self.give))
                down.append(speed / inflate(machine, 0))
                _use(machine, self.give // 2)
                before = machine.stats()["memory.touched_bytes"]
                up_freed.append(speed / inflate(machine, self.give))
                returned.append(before - machine.stats()["memory.touched_bytes"])
                inflate(machine, 0)
        return Rate(self.give, sample(up), sample(up_freed), sample(down), int(sample(returned).median))

    def _machine(self, mebibytes: int, disks: Sequence[Disk] = ()) -> Machine:
        """Return a started guest whose driver is there."""
        machine = Machine(
            self.image, memory=mebibytes * MIB, engine=self.engine, shell=False, disks=disks
        ).start()
        try:
            machine.wait_ready(TIMEOUT)
            _until(lambda: machine._vm.balloon_stats(ask=False)["driver"] == 1, "its driver did not come")
        except BaseException:
            machine.stop()
            raise
        return machine

    def _serve(self, size: int, disk: Disk, sizes: Sequence[int], *, is_native_first: bool) -> Served:
        order = (size, self.full) if is_native_first else (self.full, size)
        with self._machine(order[0], [disk]) as first, self._machine(order[1], [disk]) as second:
            native, ballooned = (first, second) if is_native_first else (second, first)
            inflate(ballooned, self.full - size)
            for machine in (native, ballooned):
                _prepare(machine)
            wanted, files, total = FILES_TO_CACHE * _available(native), 0, 0
            while files < len(sizes) and total < wanted:
                total += sizes[files]
                files += 1
            rounds: dict[Machine, list[Round]] = {native: [], ballooned: []}
            for turn in range(self.runs + 1):
                # Each begins every other turn.
                turns = list(rounds.items())
                for machine, done in turns if turn % 2 else reversed(turns):
                    one = _round(machine, files, SEED + turn)
                    if turn:  # the first fills the cache
                        done.append(one)
            return Served(size, self.full, total, tuple(rounds[native]), tuple(rounds[ballooned]))


def inflate(machine: Machine, mebibytes: int) -> float:
    """Set the target and wait until the driver says that it is done; return how long that took, in seconds."""
    pages, vm = mebibytes * PAGES, machine._vm
    began = time.perf_counter()
    vm.balloon_target(pages)
    _until(lambda: vm.balloon_stats(ask=False)["actual"] == pages, "its balloon did not get there", 0.002)
    return time.perf_counter() - began


def _until(done: Callable[[], bool], complaint: str, pause: float = 0.02) -> None:
    end = time.monotonic() + TIMEOUT
    while not done():
        if time.monotonic() > end:
            raise GuestError(f"the guest was waited for in vain: {complaint}")
        time.sleep(pause)


def _use(machine: Machine, mebibytes: int) -> None:
    """Have the guest use memory and free it."""
    script = f"dd if=/dev/zero of=/tmp/used bs=1M count={mebibytes} 2>/dev/null; rm /tmp/used"
    machine.run(["sh", "-c", script], check=True)


def _prepare(machine: Machine) -> None:
    machine.run(
        ["sh", "-c", f"cat >{PROGRAM} && chmod +x {PROGRAM}"], input=guests.program().read_bytes(), check=True
    )
    machine.run(["mount", "-t", "ext4", "-o", "ro", "/dev/vda", MOUNTED], check=True)


def _available(machine: Machine) -> int:
    """Return what a guest could use for its page cache, in bytes."""
    found = re.search(r"MemAvailable: +(\d+) kB", machine.run(["cat", "/proc/meminfo"], text=True).stdout)
    if found is None:
        raise GuestError("the guest's /proc/meminfo has no MemAvailable line")
    return int(found[1]) * 1024


def _from_disk(machine: Machine) -> int:
    """Return how many bytes a guest has read from its disk (Linux, admin-guide/iostats.rst, field 3)."""
    return int(machine.run(["cat", "/sys/block/vda/stat"], text=True, check=True).stdout.split()[2]) * 512


def _round(machine: Machine, files: int, seed: int) -> Round:
    before, used = _from_disk(machine), _processor_seconds()
    words = [PROGRAM, "files", MOUNTED, str(files), str(READS_TO_FILES * files), str(seed)]
    done = machine.run(words, text=True)
    line = LINE.search(done.stdout)
    if done.returncode != 0 or line is None:
        raise GuestError(f"the file server ended with status {done.returncode}: {done.stdout}{done.stderr}")
    speed = int(line[2]) / int(line[1]) * 1000
    return Round(speed, int(line[2]), _from_disk(machine) - before, _processor_seconds() - used, line[3])


def _processor_seconds() -> float:
    """Return the processor time of this process and of those that run guests' user code for it."""
    own = os.getpid()
    children: list[int] = []
    for task in Path(f"/proc/{own}/task").iterdir():
        # A thread may end while we look.
        with contextlib.suppress(OSError):
            children += map(int, (task / "children").read_text().split())
    seconds = processor_seconds(own)
    for child in children:
        with contextlib.suppress(OSError):
            seconds += processor_seconds(child)
    return seconds


@contextlib.contextmanager
def _served_files(mebibytes: int) -> Any:
    """Make a disk full of files, enough for a guest of this size; give it, and the size of each file in bytes."""
    program = shutil.which("mke2fs") or shutil.which("/sbin/mke2fs")
    if program is None:
        raise InputError("a disk for the file server needs mke2fs: install e2fsprogs")
    chance = random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="ringzero-bench-") as name:
        folder = Path(name) / "files"
        folder.mkdir()
        sizes: list[int] = []
        while sum(sizes) < FILES_TO_CACHE * mebibytes * MIB:
            sizes.append(chance.choice(FILE_KIB) * 1024)
            (folder / str(len(sizes) - 1)).write_bytes(chance.randbytes(sizes[-1]))
        image = Path(name) / "disk"
        with image.open("wb") as file:
            file.truncate(int(sum(sizes) * 1.2) + 32 * MIB)
        command = [program, "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(folder), str(image)]
        subprocess.run(command, check=True)
        shutil.rmtree(folder)
        yield Disk(image, read_only=True), sizes


def _speed(rounds: Sequence[Round]) -> Sample:
    return sample([one.speed for one in rounds])


def show(console: Console, figures: Figures) -> None:
    """Print the tables."""
    if figures.rate is not None:
        rate = figures.rate
        table = Table(title=f"a balloon of {rate.mebibytes} MiB, GiB/s", title_justify="left")
        table.add_column("what")
        table.add_column("median", justify="right")
        table.add_column("spread", justify="right")
        for what, rates in (
            ("inflated, memory never used", rate.inflated),
            ("inflated, memory just freed", rate.inflated_freed),
            ("given back to the guest", rate.deflated),
        ):
            table.add_row(what, f"{rates.median:.2f}", f"±{rates.spread:.0%}")
        console.print(table)
        console.print(f"{rate.returned / MIB:,.0f} MiB of host memory went back with the memory just freed")
    if figures.served:
        full = figures.served[0].full
        title = f"a file server in MB/s, ballooned from {full} MiB against native; sizes in MiB"
        table = Table(title=title, title_justify="left")
        for column in ("size", "files", "native", "±", "ballooned", "±", "of best", "by CPU", "disk"):
            table.add_column(column, justify="right")
        for one in figures.served:
            native, ballooned = _speed(one.native), _speed(one.ballooned)
            table.add_row(
                f"{one.size}",
                f"{one.files_bytes / MIB:,.0f}",
                f"{native.median:,.0f}",
                f"{native.spread:.0%}",
                f"{ballooned.median:,.0f}",
                f"{ballooned.spread:.0%}",
                f"{one.ratio:.1%}",
                f"{one.processor_ratio:.1%}",
                f"{one.disk_ratio:.1%}",
            )
        console.print(table)
    for complaint in complaints(figures):
        console.print(complaint, markup=False)


def complaints(figures: Figures) -> list[str]:
    """Say which sizes did not read what the native guest read."""
    return [
        f"the ballooned guest of {one.size} MiB read other bytes than the native one"
        for one in figures.served
        if [a.checksum for a in one.native] != [b.checksum for b in one.ballooned]
    ]


def as_json(figures: Figures, described: dict[str, Any]) -> dict[str, Any]:
    """Return the report."""
    report: dict[str, Any] = {"bench": "balloon", "machine": described}
    if (rate := figures.rate) is not None:
        report["rate"] = {
            "mebibytes": rate.mebibytes,
            "inflated_gib_per_second": rate.inflated.as_json(),
            "inflated_freed_gib_per_second": rate.inflated_freed.as_json(),
            "deflated_gib_per_second": rate.deflated.as_json(),
            "returned_bytes": rate.returned,
        }
    report["served"] = [
        {
            "mebibytes": one.size,
            "of_mebibytes": one.full,
            "files_bytes": one.files_bytes,
            "native_megabytes_per_second": _speed(one.native).as_json(),
            "ballooned_megabytes_per_second": _speed(one.ballooned).as_json(),
            "native_bytes_from_disk": [a.from_disk for a in one.native],
            "ballooned_bytes_from_disk": [b.from_disk for b in one.ballooned],
            "ballooned_over_native": one.ratio,
            "ballooned_over_native_by_processor_time": one.processor_ratio,
        }
        for one in figures.served
    ]
    return report
