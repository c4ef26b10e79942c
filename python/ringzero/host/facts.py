"""What the host system says of a VM's process and of itself: processor time, memory. All from /proc."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ringzero.policy import PAGE

__all__ = ["Own", "available", "family", "memory_limit", "own_memory", "processor_seconds"]

_TICKS = os.sysconf("SC_CLK_TCK")
_KERNEL_STACK = 16 << 10
"""Bytes a thread; Linux has no larger ones on x86-64 (THREAD_SIZE)."""


def family(pid: int) -> list[int]:
    """Return a VM's process and those that it has for user code."""
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(word) for word in (thread / "children").read_text().split()]
    return found


def processor_seconds(pid: int) -> float:
    """Return user and system time of a VM so far, of the processes that it has now (proc_pid_stat(5), 14 and 15)."""
    ticks = 0
    for one in family(pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
    return ticks / _TICKS


@dataclass(frozen=True)
class Own:
    """The memory of a VM's processes beyond the guest's pages, in bytes."""

    anonymous: int
    """Heap, stacks, and what was written of common pages; a page that several processes have counts in parts."""
    files: int
    """Files in memory other than the guest's pages: translated code."""
    kernel: int
    """Page tables and kernel stacks."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.anonymous + self.files + self.kernel


def own_memory(pid: int) -> Own:
    """Return what a VM costs beyond its guest's pages. Raises OSError when it is gone, or may not be looked at."""
    anonymous = kernel = 0
    for one in family(pid):
        rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
        anonymous += _kilobytes("Pss_Anon", rollup)
        status = Path(f"/proc/{one}/status").read_text()
        threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
        kernel += _kilobytes("VmPTE", status) + _KERNEL_STACK * (int(threads[1]) if threads else 1)
    files: dict[int, int] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it may be closed meanwhile
            name = os.readlink(link)
            if name.startswith("/memfd:") and not name.startswith(
                ("/memfd:ringzero-pool", "/memfd:ringzero-shared", "/memfd:ringzero-image")
            ):
                facts = link.stat()
                files[facts.st_ino] = facts.st_blocks * 512
    return Own(anonymous, sum(files.values()), kernel)


def memory_limit() -> int:
    """Return the bytes of memory that there are for us: the machine's, or what a control group leaves of it."""
    limit = os.sysconf("SC_PHYS_PAGES") * PAGE
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = min(limit, int(Path(path).read_text()))
    return limit


def available() -> int:
    """Return the bytes of memory that the system could give without swapping (MemAvailable)."""
    return _kilobytes("MemAvailable", Path("/proc/meminfo").read_text())


def _kilobytes(name: str, text: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
