"""`run`: how long `vm.run(["true"])` takes on a guest that has booted and idles, and how fast files are copied.

The agent is measured over the line that it moves to by itself, a virtio console port, over the serial port that it
begins on, and over a socket. QEMU has no agent of its own to compare with.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from rich.console import Console

from ringzero.bench.memory.item import MIB, Figure, Outcome
from ringzero.errors import GuestError
from ringzero.machine.machine import Machine

__all__ = ["RunBench"]

BAR = 5.0
"""Milliseconds."""
SETTLED = 3.0
"""Seconds after the boot until a guest is warm: its drivers are loaded, and it idles."""


@dataclass(frozen=True)
class RunBench:
    """What to measure: so many `commands` in each of the `rounds`, and copies of so many `mebibytes`."""

    commands: int = 500
    mebibytes: int = 32
    rounds: int = 3
    memory: str = "256M"
    image: str = "debian"

    def measure(self, console: Console) -> Outcome:
        """Measure over all lines, interleaved."""
        lines: dict[str, bool | str] = {"virtio port": True, "serial port": "serial", "vsock": "vsock"}
        times: dict[str, list[float]] = {name: [] for name in lines}
        rates: dict[str, list[float]] = {}
        for turn in range(self.rounds):
            for name, agent in lines.items():
                with console.status(f"run: round {turn + 1} of {self.rounds}, over the {name}"):
                    self._round(name, agent, times[name], rates)
        figures = []
        for name, taken in times.items():
            taken.sort()
            middle = taken[len(taken) // 2]
            late = taken[min(len(taken) - 1, len(taken) * 99 // 100)]
            figures.append(Figure(f'vm.run(["true"]), median, {name}', middle, "ms", bar=BAR, at_most=True))
            figures.append(Figure(f"... 99th percentile, {name}", late, "ms"))
        figures += [Figure(name, max(found), "MiB/s") for name, found in rates.items()]
        return Outcome(
            "run",
            "commands and copies of a warm guest",
            figures,
            notes=[f"{self.rounds} rounds of {self.commands} commands; the best of the rounds for copies"],
            details={"milliseconds": times},
        )

    def _round(self, name: str, agent: bool | str, times: list[float], rates: dict[str, list[float]]) -> None:
        data = os.urandom(self.mebibytes * MIB)
        with Machine(self.image, memory=self.memory, shell=False, agent=agent) as vm:
            vm.wait_ready()
            time.sleep(SETTLED)
            for _ in range(self.commands):
                began = time.perf_counter()
                vm.run(["true"], check=True)
                times.append((time.perf_counter() - began) * 1000)
            file = vm.path("/root/copied")
            began = time.perf_counter()
            file.write_bytes(data)
            middle = time.perf_counter()
            if file.read_bytes() != data:
                raise GuestError("a file came back from the guest as another than it went there")
            ended = time.perf_counter()
        rates.setdefault(f"copy in, {name}", []).append(self.mebibytes / (middle - began))
        rates.setdefault(f"copy out, {name}", []).append(self.mebibytes / (ended - middle))
