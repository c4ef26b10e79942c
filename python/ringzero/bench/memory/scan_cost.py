"""`scan-cost`: what the search for equal pages, at the default pace, costs the guest that is searched."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from rich.console import Console

from ringzero.bench.figures import sample
from ringzero.bench.memory.fleet import Fleet, ask_memory
from ringzero.bench.memory.item import Figure, Outcome
from ringzero.errors import GuestError
from ringzero.host.client import HostVm
from ringzero.host.facts import processor_seconds
from ringzero.policy import Parameters

__all__ = ["ScanCost"]

BAR = 2.0
WORK = "for i in $(seq 24); do seq 1 30000 | sort -n | sha256sum; done"
"""System calls, pipes, new processes, sorting in memory and pure computing: all that a scan could be in the way of."""
_BREATH = 0.5


@dataclass(frozen=True)
class ScanCost:
    """What to measure: `rounds` times the work with scanning and without, in turns, in a guest of `memory` MiB."""

    rounds: int = 9
    memory: int = 128
    pace: int = Parameters().scan_calm
    """Pages a second: what the policy gives all guests together, here all to the one that works."""

    def measure(self, console: Console) -> Outcome:
        """Boot one guest that works and one that has the same pages, and let the first work in turns."""
        with Fleet(parameters={"scan_calm": 0, "scan_pressed": 0}) as fleet:
            with console.status("scan-cost: booting"):
                busy, other = fleet.host.up_many(2, "debian", memory=f"{self.memory}M")
            fleet.scan([busy, other])
            pid = int(busy.row()["pid"])
            self._work(busy, pid)
            times: dict[bool, list[float]] = {True: [], False: []}
            spent: dict[bool, list[float]] = {True: [], False: []}
            before = ask_memory(busy)["done"]["scanned"]
            for turn in range(self.rounds):
                for scanned in (True, False) if turn % 2 == 0 else (False, True):
                    with console.status(f"scan-cost: round {turn + 1} of {self.rounds}"):
                        took, used = self._scanned(busy, pid) if scanned else self._work(busy, pid)
                    times[scanned].append(took)
                    spent[scanned].append(used)
            scanned_pages = ask_memory(busy)["done"]["scanned"] - before
            faults = fleet.audit()
        wall = {key: sample(values) for key, values in times.items()}
        processor = {key: sample(values) for key, values in spent.items()}
        cost = 100 * (wall[True].median / wall[False].median - 1)
        return Outcome(
            "scan-cost",
            f"scanning at {self.pace:,} pages a second against none, medians of {self.rounds}",
            [
                Figure("the work takes longer by", cost, "%", BAR, at_most=True),
                Figure(
                    "processor time of the VM, scanning included, is more by",
                    100 * (processor[True].median / processor[False].median - 1),
                    "%",
                ),
                Figure("the work, not scanned", wall[False].median, "s"),
                Figure("  half of its range, of the median", 100 * wall[False].spread, "%"),
                Figure("pages scanned a second, while it was", scanned_pages / sum(times[True])),
                Figure("complaints of the audit", len(faults), bar=0, at_most=True),
            ],
            [f"The work: {WORK}", *faults[:5]],
            {"with": wall[True].as_json(), "without": wall[False].as_json()},
        )

    def _work(self, vm: HostVm, pid: int) -> tuple[float, float]:
        """Have the work done once: seconds, and the VM's processor time in seconds."""
        used, began = processor_seconds(pid), time.perf_counter()
        done = vm.run(["sh", "-c", WORK], text=True, check=True, timeout=300)
        took = time.perf_counter() - began
        if len(set(done.stdout.splitlines())) != 1:
            raise GuestError(f"the same work gave different sums: {done.stdout[:200]!r}")
        return took, processor_seconds(pid) - used

    def _scanned(self, vm: HostVm, pid: int) -> tuple[float, float]:
        over = threading.Event()

        def drive() -> None:
            # The daemon's own orders, none, come every few seconds: ours are given again before their time is over.
            while not over.is_set():
                ask_memory(vm, orders={"scan": self.pace, "seconds": 2 * _BREATH})
                over.wait(_BREATH)
            ask_memory(vm, orders={"scan": 0})

        thread = threading.Thread(target=drive)
        thread.start()
        try:
            return self._work(vm, pid)
        finally:
            over.set()
            thread.join()
