"""`hundred`: what a hundred guests at their prompts cost, and how long one more takes to start."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ringzero.bench.memory.fleet import Fleet, processor_seconds
from ringzero.bench.memory.item import MIB, Figure, Outcome
from ringzero.host.facts import available
from ringzero.policy import PAGE

__all__ = ["Hundred", "weight_of"]

MEMORY_BAR, PROCESSOR_BAR, START_BAR = 3.0, 20.0, 3.0
GIB = 1024 * MIB


def weight_of(pids: Iterable[int]) -> tuple[int, int]:
    """Return (memory that processes have by Pss, what the kernel has for them), in bytes.

    Pss counts a page that several have in parts, so the sum counts each page once. The kernel's part is an estimate:
    page tables, and 16 KiB of stack a thread.
    """
    proportional = kernel = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        proportional += _kilobytes("Pss", rollup)
        threads = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))
        kernel += _kilobytes("VmPTE", status) + (16 << 10) * threads
    return proportional, kernel


def _kilobytes(name: str, text: str) -> int:
    lines = (line.split() for line in text.splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == f"{name}:"), 0)


@dataclass(frozen=True)
class Hundred:
    """What to measure: `count` guests of `memory` MiB; settled by a scan of all memory and `settle` seconds of quiet.

    Then the processor is watched for `watch` seconds.
    """

    count: int = 100
    memory: int = 128
    settle: float = 30.0
    watch: float = 30.0

    def measure(self, console: Console) -> Outcome:
        """Boot the guests on a daemon with its default policy, let them settle, and measure."""
        before = available()
        with Fleet() as fleet:
            began = time.monotonic()
            with console.status(f"hundred: booting {self.count} guests"):
                vms = fleet.host.up_many(self.count, "debian", memory=f"{self.memory}M")
            booted = time.monotonic() - began
            most = before - available()
            with console.status("hundred: settling"):
                passes = fleet.scan(vms, limit=600.0)
                time.sleep(self.settle)
            ours = fleet.processes()
            used, since = processor_seconds(ours), time.monotonic()
            with console.status(f"hundred: watching the processor for {self.watch:g} s"):
                time.sleep(self.watch)
            busy = (processor_seconds(ours) - used) / (time.monotonic() - since) / (os.cpu_count() or 1)
            taken = before - available()
            proportional, kernel = weight_of(ours)
            tally, (pool, image) = fleet.tally(vms), fleet.common_pages()
            began = time.monotonic()
            with console.status("hundred: one more"):
                fleet.host.up("debian", name="one-more", memory=f"{self.memory}M")
            one_more = time.monotonic() - began
            answers = sum(vm.run(["true"], timeout=60).returncode == 0 for vm in fleet.vms())
            faults = fleet.audit()
        count = self.count
        return Outcome(
            "hundred",
            f"{count} Debian guests of {self.memory} MiB at their prompts, on one daemon",
            [
                Figure("guests that answer, with the one more", answers, "", count + 1),
                Figure(
                    "host memory in all (MemAvailable before less after)",
                    taken / GIB,
                    "GiB",
                    MEMORY_BAR,
                    at_most=True,
                ),
                Figure("the same by Pss and the kernel's part", (proportional + kernel) / GIB, "GiB"),
                Figure("  of that: kernel's (page tables, stacks)", kernel / GIB, "GiB"),
                Figure("  of that: guests' private pages", tally["private"] * PAGE / GIB, "GiB"),
                Figure("  of that: the shared pool and the image", (pool + image) * PAGE / GIB, "GiB"),
                Figure("before anything was shared", most / GIB, "GiB"),
                Figure(
                    "idle processor time of everything, of the machine",
                    100 * busy,
                    "%",
                    PROCESSOR_BAR,
                    at_most=True,
                ),
                Figure("one more guest, to its prompt", one_more, "s", START_BAR, at_most=True),
                Figure("all guests, to their prompts", booted, "s"),
                Figure("complaints of the audit", len(faults), bar=0, at_most=True),
            ],
            [
                f"Settled: all memory was scanned {passes} times, as fast as it goes, then {self.settle:g} s of quiet."
                " The processor time is that of all processes of this host, at the daemon's default pace of scanning."
                " MemAvailable is the whole machine's: what else runs on it is in that figure, too.",
                *faults[:5],
            ],
            {"pages": dict(tally), "pool": pool, "image": image, "processes": len(ours)},
        )
