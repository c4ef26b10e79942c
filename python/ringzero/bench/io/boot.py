"""`boot`: Debian with systemd from its disk to its login prompt, first boots of the image debian-full.

Kernel, initramfs, command line and disk are the same for both, and each run has an overlay of its own: each is a first
boot of the image. What is timed is what a user waits for: from the start of the process to the prompt on the serial
console.
"""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ringzero import images
from ringzero.bench.engines import Guest, qemu_command, ringzero_command
from ringzero.bench.figures import sample
from ringzero.bench.memory.item import Figure, Outcome
from ringzero.errors import GuestError
from ringzero.machine.installer import run_guest

__all__ = ["BootBench"]

BAR = 0.6
PROMPT = b" login: "
DISK = "if=none,id=disk,format=raw,cache=unsafe,aio=threads,snapshot=on"


@dataclass(frozen=True)
class BootBench:
    """What to measure: `runs` boots of each, `memory` MiB of guest memory, `timeout` seconds for a boot."""

    runs: int = 5
    memory: int = 512
    timeout: float = 300.0

    def measure(self, console: Console) -> Outcome:
        """Boot all, interleaved; the first boot of ours, which finds no kept translations, is told apart."""
        image = images.find("debian-full") or images.pull("debian-full", run_guest=run_guest)
        if image.disk is None:
            raise GuestError(f"{image.name} has no root disk")
        guest = Guest(image.kernel, image.initrd, image.append, self.memory)
        times: dict[str, list[float]] = {"cold": [], "ringzero": [], "qemu": []}
        with tempfile.TemporaryDirectory(prefix="ringzero-bench-") as empty:
            for turn in range(self.runs):
                for engine in times if turn % 2 == 0 else reversed(times):
                    caches = {"XDG_CACHE_HOME": tempfile.mkdtemp(dir=empty)} if engine == "cold" else {}
                    with console.status(f"boot: run {turn + 1} of {self.runs}, {engine}"):
                        seconds = to_prompt(self._command(engine, guest, image.disk), self.timeout, caches)
                    times[engine].append(seconds)
        return _outcome(times, self.runs, self.memory)

    @staticmethod
    def _command(engine: str, guest: Guest, disk: Path) -> list[str]:
        if engine != "qemu":
            return [*ringzero_command(guest), "--disk", f"{disk},format=raw,overlay"]
        return [
            *qemu_command(guest),
            *("-drive", f"{DISK},file={disk}"),
            *("-object", "iothread,id=thread"),
            *("-device", "virtio-blk-pci,drive=disk,iothread=thread"),
            *("-device", "virtio-rng-pci"),
        ]


def to_prompt(command: Sequence[str], timeout: float, environment: dict[str, str]) -> float:
    """Run a guest until it asks for a login, and return the seconds that took. Raises GuestError when it never does."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=os.environ | environment,
    )
    assert process.stdout is not None
    said = b""
    try:
        while True:
            left = began + timeout - time.perf_counter()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise GuestError(f"no login prompt within {timeout:g} s: {said[-300:]!r}")
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                raise GuestError(f"the guest ended without a login prompt: {said[-300:]!r}")
            said = (said + data)[-4096:]
            if PROMPT in said:
                return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _outcome(times: dict[str, list[float]], runs: int, memory: int) -> Outcome:
    ours, cold, theirs = (sample(times[engine]) for engine in ("ringzero", "cold", "qemu"))
    figures = [
        Figure("process start to login prompt", ours.median, "s", theirs=theirs.median),
        Figure("  of QEMU's time", ours.median / theirs.median, "x", BAR, at_most=True),
        Figure("with empty caches", cold.median, "s", theirs=theirs.median),
        Figure("  of QEMU's time", cold.median / theirs.median, "x"),
    ]
    notes = [f"half of the range is {ours.spread:.0%} of our median, {theirs.spread:.0%} of QEMU's"]
    title = f"debian-full with {memory} MiB, medians of {runs} first boots"
    return Outcome(
        "boot", title, figures, notes, {engine: sample(found).as_json() for engine, found in times.items()}
    )
