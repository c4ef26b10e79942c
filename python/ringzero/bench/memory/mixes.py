"""`mixes`: the three mixes of the ESX paper's table, rebuilt with Debian guests and real services."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ringzero import images
from ringzero.bench.memory import services
from ringzero.bench.memory.fleet import Fleet, until_printed
from ringzero.bench.memory.item import MIB, Figure, Outcome
from ringzero.bench.memory.sharing import COUNTED, measure_savings
from ringzero.errors import GuestError
from ringzero.host.client import HostVm
from ringzero.policy import PAGE

__all__ = ["MIXES", "Mix", "Mixes"]

START_LIMIT = 240.0


@dataclass(frozen=True)
class Mix:
    """One mix: guests as (service, kernel series, how many, MiB of each), and the paper's row in MB and %."""

    name: str
    guests: tuple[tuple[str, str, int, int], ...]
    pause: float
    """Seconds between two requests of a guest's load."""
    total: int
    saved: int
    percent: float


# The paper's A were ten guests of one system with web servers, databases and others; B nine of several kinds; C five,
# lightly loaded (Waldspurger, OSDI 2002, section 4.3, the table of real deployments). Sizes are such that each mix has
# as much memory in all as the paper's.
MIXES = (
    Mix("A", (("web", "6.1", 5, 160), ("database", "6.1", 5, 250)), 0.5, 2048, 673, 32.9),
    Mix(
        "B",
        (
            ("web", "6.1", 2, 190),
            ("web", "6.12", 1, 190),
            ("mail", "6.1", 1, 190),
            ("mail", "6.12", 1, 190),
            ("database", "6.1", 1, 258),
            ("database", "6.12", 1, 258),
            ("proxy", "6.1", 1, 190),
            ("proxy", "6.12", 1, 190),
        ),
        0.5,
        1846,
        345,
        18.7,
    ),
    Mix(
        "C", (("proxy", "6.1", 1, 332), ("mail", "6.12", 2, 332), ("web", "6.1", 2, 332)), 5.0, 1658, 120, 7.2
    ),
)


@dataclass(frozen=True)
class Mixes:
    """What to measure: `only` names mixes, all without; the load runs for `settle` seconds before the count."""

    only: Sequence[str] = ()
    settle: float = 45.0

    def measure(self, console: Console) -> Outcome:
        """Boot each mix, let its load run, scan, and count, while the load goes on."""
        figures: list[Figure] = []
        notes = [COUNTED]
        details = {}
        for mix in MIXES:
            if self.only and mix.name not in self.only:
                continue
            with tempfile.TemporaryDirectory(prefix="rz-bench-") as folder:
                measured = self._mix(console, mix, Path(folder))
            figures += measured[0]
            details[mix.name] = measured[1]
            kinds = ", ".join(
                f"{count} {service} ({series}, {size} MiB)" for service, series, count, size in mix.guests
            )
            notes.append(
                f"{mix.name}: {kinds}; a request every {mix.pause:g} s; {measured[1]['served']:,} requests were"
                f" answered, {measured[1]['failed']} were not."
            )
        return Outcome("mixes", "the ESX paper's three mixes, with Debian guests", figures, notes, details)

    def _mix(self, console: Console, mix: Mix, folder: Path) -> tuple[list[Figure], dict[str, object]]:
        with console.status(f"mixes: the images of {mix.name}"):
            kernels = {series: images.pull("debian", series).kernel for _, series, *_ in mix.guests}
            archives = {}
            for service, series, *_ in mix.guests:
                path = folder / f"{service}-{series}"
                path.write_bytes(services.initramfs(services.SERVICES[service], series))
                archives[service, series] = path
        with Fleet(parameters={"scan_calm": 0, "scan_pressed": 0}) as fleet:
            vms: list[HostVm] = []
            with console.status(f"mixes: booting {mix.name}"):
                for service, series, count, size in mix.guests:
                    vms += fleet.host.up_many(
                        count,
                        name=f"{service}-{series.replace('.', '-')}",
                        memory=f"{size}M",
                        kernel=str(kernels[series]),
                        initrd=str(archives[service, series]),
                        append=services.append(mix.pause),
                        wait=False,  # they have no agent that says when they have booted; their consoles do
                    )
                for vm in vms:
                    until_printed(vm, services.READY, START_LIMIT, services.FAILED)
            with console.status(f"mixes: the load of {mix.name}"):
                time.sleep(self.settle)
            with console.status(f"mixes: scanning {mix.name}"):
                savings = measure_savings(fleet, vms)
                served, failed = _served(vms, mix.pause)
        total, saved = savings.pages * PAGE / MIB, savings.saved * PAGE / MIB
        figures = [
            Figure(f"{mix.name}: guests' memory", total, "MB", theirs=mix.total),
            Figure(f"{mix.name}: saved", saved, "MB", theirs=mix.saved),
            Figure(f"{mix.name}: saved, of all", savings.reclaimed, "%", mix.percent, theirs=mix.percent),
            Figure(f"{mix.name}: saved, of held pages", savings.reclaimed_of_held, "%"),
            Figure(f"{mix.name}: complaints of the audit", len(savings.faults), bar=0, at_most=True),
            Figure(f"{mix.name}: requests that failed", failed, bar=0, at_most=True),
        ]
        return figures, savings.as_json() | {"served": served, "failed": failed}


def _served(vms: Sequence[HostVm], pause: float) -> tuple[int, int]:
    """Return how many requests were answered and how many were not, by what the guests last said."""
    served = failed = 0
    for vm in vms:
        text = until_printed(vm, services.SERVED, 60.0 + 30 * pause)
        last = services.SERVED.findall(text)[-1]
        served, failed = served + int(last[0]), failed + int(last[1])
    if not served:
        raise GuestError("no guest of the mix served anything")
    return served, failed
