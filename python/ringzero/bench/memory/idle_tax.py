"""`idle-tax`: what an active guest gains when idle memory is taxed (two VMs, as in section 5.4 of the ESX paper)."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ringzero.bench.memory import pattern
from ringzero.bench.memory.fleet import Fleet, ask_memory
from ringzero.bench.memory.item import MIB, Figure, Outcome
from ringzero.errors import GuestError
from ringzero.host.client import HostVm
from ringzero.policy import PAGE

__all__ = ["IdleTax"]

BAR = 30.0
_PERIOD = 2.0
"""Seconds: of the sampler."""
_STEPS = re.compile(r"^PATTERN STEPS (\d+) IN ([0-9.]+)", re.MULTILINE)


@dataclass(frozen=True)
class IdleTax:
    """What to measure. Sizes are MiB: two guests of `memory`, `limit` for both; what each of them touches.

    `settle` is how long the idle guest has slept before the active one begins, `seconds` how long that works; what
    counts is its last half.
    """

    memory: int = 320
    limit: int = 330
    idle: int = 160
    active: int = 190
    settle: float = 40.0
    seconds: float = 60.0
    taxes: tuple[float, float] = (0.0, 0.75)

    def measure(self, console: Console) -> Outcome:
        """Run the two guests under each tax."""
        steps, held = [], []
        details: dict[str, Any] = {}
        for tax in self.taxes:
            with console.status(f"idle-tax: tax {tax:.0%}, {self.seconds:g} s"):
                measured = self._run(tax)
            steps.append(_rate(measured[0], self.seconds / 2))
            held.append(measured[1])
            details[f"{tax:.0%}"] = {"steps": measured[0], "held": measured[1]}
        if not all(steps):
            raise GuestError("the active guest got nowhere")
        first, second = (f"{tax:.0%}" for tax in self.taxes)
        return Outcome(
            "idle-tax",
            f"two guests of {self.memory} MiB, {self.limit} MiB for both; idle memory untaxed and taxed",
            [
                Figure("throughput of the active guest gains", 100 * (steps[1] / steps[0] - 1), "%", BAR),
                Figure("its memory gains", 100 * (held[1]["active"] / held[0]["active"] - 1), "%"),
                Figure(f"pages it reads or changes a second, tax {first}", steps[0]),
                Figure(f"the same, tax {second}", steps[1]),
                *(
                    Figure(f"{name} guest's memory, tax {tax}", one[name] * PAGE / MIB, "MiB")
                    for tax, one in zip((first, second), held, strict=True)
                    for name in ("active", "idle")
                ),
            ],
            [
                f"The idle guest has touched {self.idle} MiB and sleeps; the active one changes random pages of"
                f" {self.active} MiB. Throughput is that of the second half of the run, with all times in which the"
                f" guest was held up. The sampling period is {_PERIOD:g} s for the measurement, where the default is"
                f" 30 s, and the idle guest has slept for {self.settle:g} s before: both only decide how soon the"
                " policy knows.",
            ],
            details,
        )

    def _run(self, tax: float) -> tuple[list[tuple[int, float]], dict[str, int]]:
        """Return the active guest's steps and the seconds that they took, again and again, and both guests' private
        pages at the end.
        """
        with Fleet(
            parameters={"tax": tax, "period": _PERIOD, "scan_calm": 0, "scan_pressed": 0},
            memory=self.limit * MIB,
            swap=1 << 30,
            swap_folder="/tmp",
        ) as fleet:
            vms = {
                name: fleet.host.up("debian", name=name, memory=f"{self.memory}M", min="32M")
                for name in ("idle", "active")
            }
            for vm in vms.values():
                vm.run(["sh", "-c", "cat > /pattern; chmod +x /pattern"], input=pattern.program(), check=True)
            hold = ["/pattern", "hold", str(self.idle), str(int(self.settle + 2 * self.seconds)), "1"]
            vms["idle"].run(["sh", "-c", f"{' '.join(hold)} > /dev/null 2>&1 &"], check=True)
            time.sleep(self.settle)
            said: list[str] = []
            walk = ["walk", str(self.active), str(int(self.seconds)), "2"]
            thread = threading.Thread(target=_walk, args=(vms["active"], walk, said))
            thread.start()
            thread.join(self.seconds * 0.9)
            held = {name: ask_memory(vm)["counts"]["private"] for name, vm in vms.items()}
            thread.join()
            time.sleep(0.1)
        if not said:
            raise GuestError("the active guest ended before its time")
        return [(int(steps), float(seconds)) for steps, seconds in _STEPS.findall(said[0])], held


def _rate(steps: list[tuple[int, float]], last: float) -> float:
    """Return the steps a second in about the `last` seconds."""
    taken: list[tuple[int, float]] = []
    while len(taken) < len(steps) and sum(seconds for _, seconds in taken) < last:
        taken.append(steps[-1 - len(taken)])
    return sum(one for one, _ in taken) / max(1.0, sum(seconds for _, seconds in taken))


def _walk(vm: HostVm, words: list[str], said: list[str]) -> None:
    done = vm.run(["/pattern", *words], text=True)
    if done.returncode == 0:
        said.append(done.stdout)
