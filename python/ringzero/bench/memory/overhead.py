"""`overhead`: what a monitor takes beyond its guest's pages, and what that is made of."""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ringzero.bench.idle import POOL
from ringzero.bench.memory.fleet import IMAGE, SHARED_POOL, Fleet, descriptors_size
from ringzero.bench.memory.item import MIB, Figure, Outcome
from ringzero.host.facts import family

__all__ = ["Overhead", "Weight", "weigh"]

BAR = 8.0
_KERNEL_STACK = 16 << 10
_MAPPING = 232
"""Bytes: sizeof(struct vm_area_struct) of Linux 6.1 on x86-64, with its place in the tree left out."""
_HEADER = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ (\d+)\s*(.*)$")
_FIELD = re.compile(r"^(Private_Dirty|Pss|Anonymous):\s+(\d+) kB")


@dataclass(frozen=True)
class Weight:
    """The memory of a VM beyond the guest's pages, in bytes by what it is, and threads, processes and mappings."""

    parts: dict[str, int]
    threads: int
    processes: int
    mappings: int
    proportional: int
    """Of what is private and anonymous the share of this VM, where the fork server's other children have it too."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def weigh(pid: int) -> Weight:
    """Weigh a VM's process and those that it has for user code. Raises OSError when it is gone.

    What a process wrote counts (Private_Dirty), not what it has in common with its siblings. Files in memory count by
    what the system gave them, once, however often they are mapped.
    """
    parts: dict[str, int] = {}
    threads = mappings = proportional = 0
    members = family(pid)
    for one in members:
        whose = "" if one == pid else " of user processes"
        kind: str | None = None
        for line in Path(f"/proc/{one}/smaps").read_text().splitlines():
            if header := _HEADER.match(line):
                mappings += 1
                kind = _kind(header[3])
            elif kind is not None and (found := _FIELD.match(line)):
                if found[1] == "Private_Dirty":
                    parts[kind + whose] = parts.get(kind + whose, 0) + int(found[2]) * 1024
                elif found[1] == "Pss":
                    proportional += int(found[2]) * 1024
        status = Path(f"/proc/{one}/status").read_text()
        threads += int(_number("Threads", status))
        tables = int(_number("VmPTE", status)) * 1024
        parts["page tables"] = parts.get("page tables", 0) + tables
    for name, size in _files(pid).items():
        parts[name] = size
    parts["kernel stacks"] = _KERNEL_STACK * threads
    parts["kernel's mappings"] = _MAPPING * mappings
    return Weight(
        {name: size for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size},
        threads,
        len(members),
        mappings,
        proportional,
    )


def _kind(name: str) -> str | None:
    """Say what a mapping is; None for one that is counted elsewhere: the guest's pages, files in memory."""
    if name.startswith("/memfd:") or name in ("[vvar]", "[vdso]", "[vsyscall]"):
        return None
    if name == "[heap]":
        return "heap"
    if name.startswith("[stack"):
        return "first stack"
    if name.startswith("/"):
        return "data of libraries"
    return "anonymous (arenas, stacks of threads, tables)"


def _files(pid: int) -> dict[str, int]:
    """Return the files in memory that a process has beside the guest's pages, by name."""
    sizes: dict[str, int] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("/memfd:"):
            name = target.removeprefix("/memfd:").partition(" ")[0]
            if not name.startswith((POOL, SHARED_POOL, IMAGE)):
                sizes[f"file in memory {name}"] = sum(descriptors_size(pid, name).values())
    return sizes


def _number(name: str, text: str) -> str:
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return found[1] if found else "0"


@dataclass(frozen=True)
class Overhead:
    """What to measure. `count` VMs of `memory` MiB, weighed `settle` seconds after the last has booted."""

    count: int = 4
    memory: int = 128
    settle: float = 75.0

    def measure(self, console: Console) -> Outcome:
        """Boot the VMs on a daemon, leave them alone, and weigh them."""
        with Fleet() as fleet:
            with console.status(f"overhead: booting {self.count} guests"):
                fleet.host.up_many(self.count, "debian", memory=f"{self.memory}M")
            with console.status(f"overhead: {self.settle:g} s of quiet"):
                time.sleep(self.settle)
            weights = [weigh(pid) for pid in fleet.pids()]
        middle = sorted(weights, key=lambda one: one.total)[len(weights) // 2]
        figures = [
            Figure(
                "beyond the guest's pages, per VM (median)",
                statistics.median(one.total for one in weights) / MIB,
                "MiB",
                BAR,
                at_most=True,
            ),
            Figure("the largest of them", max(one.total for one in weights) / MIB, "MiB"),
            *(
                Figure(f"  of that: {name}", size / MIB, "MiB")
                for name, size in middle.parts.items()
                if size >= 0.02 * MIB
            ),
            Figure("threads", middle.threads),
            Figure("processes", middle.processes),
            Figure("mappings", middle.mappings),
        ]
        return Outcome(
            "overhead",
            f"a monitor's own memory, {self.count} Debian guests of {self.memory} MiB at their prompts",
            figures,
            [
                "Counted: pages that the VM's process and its processes for user code wrote and have to themselves,"
                " files in memory but the guest's pages and common ones, page tables, kernel stacks (16 KiB a thread),"
                " mappings (232 bytes each). What all VMs have in common with the fork server is not counted to any.",
            ],
            {"vms": [_as_json(one) for one in weights]},
        )


def _as_json(weight: Weight) -> dict[str, Any]:
    return {
        "total": weight.total,
        "parts": weight.parts,
        "threads": weight.threads,
        "processes": weight.processes,
        "mappings": weight.mappings,
        "proportional": weight.proportional,
    }
