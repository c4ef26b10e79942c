"""`ringzero bench idle`: what a guest at its prompt costs the host, in processor time and memory."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ringzero.bench.engines import this_ringzero
from ringzero.errors import GuestError

__all__ = ["Idle", "IdleBench"]

# A shell's prompt ends what was printed; colours and questions of busybox's line editor do not count.
PROMPT = re.compile(rb"[#$] $")
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
# What crates/memory/src/pool.rs calls its memfd.
POOL = "ringzero-pool"
SETTLE_SECONDS = 3.0
MIB = 1024 * 1024


@dataclass(frozen=True)
class Idle:
    """What was measured. `processor` is in parts of one core; memory is in bytes.

    `resident` counts a page once for each mapping (Rss), `proportional` once in all (Pss): the code cache is mapped
    twice, once to write and once to run.
    """

    seconds: float
    processor: float
    resident: int
    proportional: int
    touched: int

    @property
    def overhead(self) -> int:
        """Resident memory beyond what the guest touched."""
        return self.resident - self.touched


@dataclass(frozen=True)
class IdleBench:
    """What to measure. `memory` is in MiB, `seconds` how long to watch."""

    image: str = "debian"
    engine: str = "direct"
    memory: int = 256
    seconds: float = 20.0
    timeout: float = 120.0

    def measure(self, console: Console) -> Idle:
        """Boot the guest to its prompt on a terminal of its own, then watch the process from outside."""
        command = [
            *this_ringzero(),
            "run",
            self.image,
            "--memory",
            f"{self.memory}M",
            "--engine",
            self.engine,
        ]
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        try:
            with console.status(f"booting {self.image}"):
                self._until_prompt(process, ours)
                _drain(ours, SETTLE_SECONDS)
            with console.status(f"watching for {self.seconds:g} s"):
                before, began = processor_seconds(process.pid), time.perf_counter()
                _drain(ours, self.seconds)
                used, passed = processor_seconds(process.pid) - before, time.perf_counter() - began
            return Idle(passed, used / passed, *memory_of(process.pid), touched(process.pid))
        finally:
            process.kill()
            process.wait()
            os.close(ours)

    def _until_prompt(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        seen = b""
        end = time.monotonic() + self.timeout
        while time.monotonic() < end:
            if process.poll() is not None:
                break
            seen = (seen + _drain(terminal, 0.5))[-4096:]
            if PROMPT.search(ESCAPES.sub(b"", seen)):
                return
        raise GuestError(f"{self.image} did not reach a prompt: {seen[-300:].decode(errors='replace')!r}")


def _drain(terminal: int, seconds: float) -> bytes:
    """Read what a terminal prints for `seconds`, so that its writer never waits for us."""
    got = b""
    end = time.monotonic() + seconds
    while select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
        try:
            got += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    return got


def processor_seconds(pid: int) -> float:
    """Return user and system time of a process so far (Linux, proc_pid_stat(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> tuple[int, int]:
    """Return (resident, proportional) memory of a process in bytes: Rss and Pss of proc_pid_smaps_rollup(5)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kilobytes = dict(re.findall(r"^(Rss|Pss):\s+(\d+) kB", rollup, re.MULTILINE))
    if len(kilobytes) != 2:
        raise GuestError(f"/proc/{pid}/smaps_rollup has no Rss or Pss line")
    return int(kilobytes["Rss"]) * 1024, int(kilobytes["Pss"]) * 1024


def touched(pid: int) -> int:
    """Return how much guest memory is given out, in bytes: the pages of the pools' memfds that a process holds.

    The host kernel counts them: the pool gives a page on first touch, and a memfd has only touched pages.
    """
    seen: dict[int, int] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        # A descriptor may be closed while we look.
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(link).startswith(f"/memfd:{POOL}"):
                status = link.stat()
                seen[status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def show(console: Console, idle: Idle) -> None:
    """Print the table."""
    table = Table(title="a guest at its prompt", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_row("processor, of one core", f"{idle.processor:.2%}")
    table.add_row("resident memory (Rss)", f"{idle.resident / MIB:.1f} MiB")
    table.add_row("the same, pages counted once (Pss)", f"{idle.proportional / MIB:.1f} MiB")
    table.add_row("touched by the guest", f"{idle.touched / MIB:.1f} MiB")
    table.add_row("resident beyond touched", f"{idle.overhead / MIB:.1f} MiB")
    console.print(table)


def as_json(idle: Idle, described: dict[str, Any]) -> dict[str, Any]:
    """Return the report."""
    return {
        "bench": "idle",
        "machine": described,
        "seconds": idle.seconds,
        "processor_part_of_one_core": idle.processor,
        "resident_bytes": idle.resident,
        "proportional_bytes": idle.proportional,
        "touched_bytes": idle.touched,
        "overhead_bytes": idle.overhead,
    }
