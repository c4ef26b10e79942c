"""A host of its own for a measurement: a daemon with an empty runtime folder, and the VMs that it starts."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ringzero.bench.idle import POOL
from ringzero.errors import GuestError
from ringzero.host.client import Host, HostVm
from ringzero.host.facts import family
from ringzero.policy import PAGE

__all__ = [
    "Fleet",
    "Tally",
    "ask_memory",
    "descendants",
    "descriptors_size",
    "processor_seconds",
    "until_printed",
]

SHARED_POOL = "ringzero-shared"
IMAGE = "ringzero-image"
"""What python/ringzero/machine/boot/sealed.py calls the files in memory that VMs of one image map."""
FAST_SCAN = 400_000
"""Pages a second for each VM, while a measurement scans: as fast as it goes."""
_MOST_PASSES = 12
_STILL = 0.002
"""When a pass over all memory shares less than this part more, scanning has come to its end."""


class Tally(dict[str, int]):
    """Pages of all VMs by state."""

    @property
    def all(self) -> int:
        """Every page of the guests."""
        return sum(self.values())

    @property
    def held(self) -> int:
        """Pages with content: all but those that were never touched or became zero, and ballooned ones."""
        return self.all - self["zero"] - self["ballooned"]


class Fleet:
    """A daemon and its VMs; all end with the `with` block. Options are those of `ringzero.host.launch.start_daemon`.

    `parameters` of the memory policy that differ from the default are written into a policy file.
    """

    def __init__(self, *, parameters: dict[str, Any] | None = None, **options: Any) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="rz-bench-"))
        if parameters is not None:
            words = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
            file = self._root / "policy.py"
            file.write_text(f"from ringzero.policy import Parameters\n\nparameters = Parameters({words})\n")
            options["policy"] = file
        try:
            self.host = Host.connect(self._root / "run", start=True, **options)
        except BaseException:
            shutil.rmtree(self._root, ignore_errors=True)
            raise
        self._daemon = int(self.host.status()["pid"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ours = self.processes()
        with contextlib.suppress(Exception):
            self.host.down(*(vm.name for vm in self.host.vms()), now=True)
        with contextlib.suppress(Exception):
            self.host.stop()
        self.host.close()
        end = time.monotonic() + 10.0
        while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in ours):
            time.sleep(0.05)
        shutil.rmtree(self._root, ignore_errors=True)

    # --- VMs

    def vms(self) -> list[HostVm]:
        """Return the VMs that run."""
        return [vm for vm in self.host.vms() if vm.phase == "running"]

    def pids(self) -> list[int]:
        """Return the VMs' processes, without those that they have for user code."""
        return [int(row["pid"]) for row in self.host.ask("list")["vms"] if row["pid"] is not None]

    def processes(self) -> set[int]:
        """Return every process of this host: the daemon, what it started, and the VMs with what they started."""
        found = {self._daemon, *descendants(self._daemon)}
        with contextlib.suppress(Exception):
            for pid in self.pids():
                found |= {pid, *family(pid), *descendants(pid)}
        return found

    def tally(self, vms: Iterable[HostVm] | None = None) -> Tally:
        """Ask every VM itself for its pages by state, and return the sums."""
        sums = Tally()
        for vm in self.vms() if vms is None else vms:
            for state, pages in ask_memory(vm)["counts"].items():
                sums[state] = sums.get(state, 0) + pages
        return sums

    def common_pages(self) -> tuple[int, int]:
        """Return the pages of the shared pools, and of the images that VMs map: each file once, whoever has it open."""
        pools: dict[int, int] = {}
        images: dict[int, int] = {}
        for pid in self.processes():
            pools |= descriptors_size(pid, SHARED_POOL)
            images |= descriptors_size(pid, IMAGE)
        return sum(pools.values()) // PAGE, sum(images.values()) // PAGE

    def private_pools(self) -> int:
        """Return the pages that the system counts in the VMs' own pools."""
        return sum(sum(descriptors_size(pid, POOL).values()) for pid in self.pids()) // PAGE

    def scan(self, vms: Sequence[HostVm], *, limit: float = 300.0) -> int:
        """Have all memory of the VMs scanned, again and again until a pass shares next to nothing more.

        Returns how often it went through. `limit` is in seconds.
        """
        end = time.monotonic() + limit
        before = -1
        for turn in range(1, _MOST_PASSES + 1):
            for vm in vms:
                self._scan_once(vm, end)
            done = [ask_memory(vm)["counts"] for vm in vms]
            now = sum(one["shared"] + one["zero"] for one in done)
            pages = sum(sum(one.values()) for one in done)
            # The first pass only learns the hashes, and the second hints at them.
            if turn > 3 and now - before < _STILL * pages:
                return turn
            if time.monotonic() > end:
                return turn
            before = now
        return _MOST_PASSES

    def _scan_once(self, vm: HostVm, end: float) -> None:
        answer = ask_memory(vm)
        pages = sum(answer["counts"].values())
        began = answer["done"]["scanned"]
        wanted = sum(answer["counts"][state] for state in ("private", "shared"))
        last, still = began, 0
        while last - began < wanted and still < 40 and time.monotonic() < end:
            # The daemon's own orders, every few seconds, put an end to ours: so they are given again and again.
            ask_memory(vm, orders={"scan": FAST_SCAN, "seconds": pages / FAST_SCAN})
            time.sleep(0.05)
            now = ask_memory(vm)["done"]["scanned"]
            still = still + 1 if now == last else 0
            last = now

    def audit(self) -> list[str]:
        """Return what the VMs' audits complain about."""
        return [f"{vm}: {fault}" for vm, faults in self.host.audit().items() for fault in faults]


def ask_memory(vm: HostVm, **fields: Any) -> dict[str, Any]:
    """Ask a VM's process itself for its memory, with orders if need be (ringzero.host.vm_process)."""
    with vm.channel() as channel:
        channel.connection.settimeout(30.0)
        return dict(channel.ask("memory", **fields))


def until_printed(vm: HostVm, words: str | re.Pattern[str], timeout: float, failed: str = "") -> str:
    """Wait until a guest has printed something, and return all that is known of its console's output.

    `words` are a text or a pattern. Raises GuestError after `timeout` seconds, and when it prints `failed` instead.
    """
    pattern = re.compile(re.escape(words)) if isinstance(words, str) else words
    connection, first = vm.open_console()
    seen = bytearray(first)
    end = time.monotonic() + timeout
    with connection:
        while True:
            text = seen.decode(errors="replace")
            if pattern.search(text):
                return text
            left = end - time.monotonic()
            ready = left > 0 and select.select([connection], [], [], left)[0]
            data = connection.recv(65536) if ready else b""
            if not data or (failed and failed in text):
                raise GuestError(
                    f"vm {vm.name} did not print {pattern.pattern!r}; last it said {text[-300:]!r}"
                )
            seen += data


def descriptors_size(pid: int, name: str) -> dict[int, int]:
    """Return the bytes that the files in memory take whose name begins so and that a process has open, by inode."""
    sizes: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it may be closed meanwhile
                if os.readlink(link).startswith(f"/memfd:{name}"):
                    status = link.stat()
                    sizes[status.st_ino] = status.st_blocks * 512
    return sizes


def descendants(pid: int) -> set[int]:
    """Return the processes below a process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(words[1]), []).append(int(entry.name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            if child not in found:
                found.add(child)
                todo.append(child)
    return found


def processor_seconds(pids: Iterable[int]) -> float:
    """Return user and system time of processes so far, those that are gone left out (proc_pid_stat(5), 14 and 15)."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")
