"""`overcommit`: far more memory promised than there is, guests that need theirs, and every byte right at the end."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass

from rich.console import Console

from ringzero.bench.memory import pattern
from ringzero.bench.memory.fleet import Fleet, ask_memory
from ringzero.bench.memory.item import Figure, Outcome
from ringzero.host.client import HostVm
from ringzero.policy import PAGE

__all__ = ["Overcommit"]

MIB = 1 << 20
_RIGHT = re.compile(r"PATTERN RIGHT .*")


@dataclass(frozen=True)
class Overcommit:
    """What to measure: `count` guests of `memory` MiB, `busy` of which fill `fill` MiB each and change `changes` pages.

    VMs may take `limit` MiB of the host's memory and `swap` MiB of disk, in `folder`.
    """

    count: int = 100
    memory: int = 300
    busy: int = 20
    fill: int = 200
    changes: int = 20_000
    limit: int = 5120
    swap: int = 28_672
    folder: str = "/tmp"
    timeout: float = 900.0

    def measure(self, console: Console) -> Outcome:
        """Boot the guests, run the pattern program in the busy ones, and compare what it says with what it must say."""
        with Fleet(memory=self.limit * MIB, swap=self.swap * MIB, swap_folder=self.folder) as fleet:
            with console.status(f"overcommit: booting {self.count} guests"):
                vms = fleet.host.up_many(self.count, "debian", memory=f"{self.memory}M", min="16M")
            began = time.monotonic()
            said: dict[str, str] = {}
            most: dict[str, int] = {}
            with console.status(f"overcommit: {self.busy} guests fill {self.fill} MiB each"):
                threads = [
                    threading.Thread(target=self._run, args=(vm, seed, said))
                    for seed, vm in enumerate(vms[: self.busy], 1)
                ]
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    for state, pages in fleet.tally(vms).items():
                        most[state] = max(most.get(state, 0), pages)
                    time.sleep(2.0)
            seconds = time.monotonic() - began
            wrong = {
                vm.name: said.get(vm.name, "nothing")
                for seed, vm in enumerate(vms[: self.busy], 1)
                if said.get(vm.name) != pattern.run_here(self._words(seed)).strip()
            }
            running = fleet.vms()
            answers = sum(vm.run(["true"], timeout=120).returncode == 0 for vm in running)
            swap = [ask_memory(vm)["swap"] for vm in running]
            faults = fleet.audit()
        lost = sum(one["lost"] for one in swap)
        loaded = sum(one["memory_loads"] + one["file_loads"] for one in swap)
        return Outcome(
            "overcommit",
            f"{self.count} guests of {self.memory} MiB, {self.busy} of them fill {self.fill} MiB;"
            f" {self.limit} MiB for all",
            [
                Figure("promised, of the memory for VMs", self.count * self.memory / self.limit, "times"),
                Figure("guests that run and answer", answers, "", self.count),
                Figure("busy guests whose checksums are right", self.busy - len(wrong), "", self.busy),
                Figure("pages lost", lost, bar=0, at_most=True),
                Figure("complaints of the audit", len(faults), bar=0, at_most=True),
                *(
                    Figure(f"most at a time: {state}", pages * PAGE / MIB, "MiB")
                    for state, pages in most.items()
                    if pages
                ),
                Figure("pages that came back from the swap store", loaded),
                Figure("the busy guests were done after", seconds, "s"),
            ],
            [f"{name} said: {words}" for name, words in list(wrong.items())[:5]] + faults[:5],
            {"most": most, "wrong": wrong, "swap": swap},
        )

    def _words(self, seed: int) -> list[str]:
        return ["check", str(self.fill), str(self.changes), str(seed)]

    def _run(self, vm: HostVm, seed: int, said: dict[str, str]) -> None:
        try:
            vm.run(
                ["sh", "-c", "cat > /pattern; chmod +x /pattern"],
                input=pattern.program(),
                check=True,
                timeout=self.timeout,
            )
            done = vm.run(["/pattern", *self._words(seed)], text=True, timeout=self.timeout)
            said[vm.name] = (done.stdout.strip().splitlines() or [f"nothing (status {done.returncode})"])[-1]
        except Exception as error:
            said[vm.name] = f"{type(error).__name__}: {error}"
