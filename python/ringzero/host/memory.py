"""The counters that a memory policy is told (ringzero.policy.counters), from what VMs and the host system say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ringzero.host import facts
from ringzero.host.guest import Guest
from ringzero.host.spec import GuestSpec
from ringzero.policy import PAGE, HostMemory, VmMemory

__all__ = ["EXPECTED_OVERHEAD", "HostMemoryView"]

EXPECTED_OVERHEAD = (8 << 20) // PAGE
"""Pages of a monitor's own, for a VM that was not measured yet: the most that one shall take."""


class HostMemoryView:
    """The host's memory for VMs: `total` bytes of it, and `swap` bytes of disk."""

    def __init__(self, total: int, swap: int) -> None:
        self._total = total // PAGE
        self._swap = swap // PAGE
        self.shared = 0
        """Pages of the shared pool."""

    def newcomer(self, spec: GuestSpec) -> VmMemory:
        """Return the counters of a VM that has not started."""
        return VmMemory(
            name=spec.name,
            size=spec.memory // PAGE,
            min=spec.min // PAGE,
            max=spec.max // PAGE,
            shares=spec.shares,
            overhead=EXPECTED_OVERHEAD,
        )

    def counters(self, guest: Guest) -> VmMemory:
        """Return the counters of a VM, as far as it has told them."""
        told = guest.memory
        # Zero pages and those never touched are one to the core: neither brings anything to a balloon.
        private = told.count("private")
        return replace(
            self.newcomer(guest.spec),
            active=told.activity.fraction(),
            private=private,
            shared=told.count("shared", "image"),
            ballooned=told.count("ballooned"),
            compressed=told.count("compressed"),
            swapped=told.count("swapped"),
            overhead=EXPECTED_OVERHEAD if told.own is None else -(-told.own.total // PAGE),
            balloons=bool(told.balloon.get("driver")),
        )

    def host(self, vms: Sequence[VmMemory], guests: Sequence[Guest] = ()) -> HostMemory:
        """Return the host's own counters, beside those of its VMs."""
        compressed = -(-sum(guest.memory.swap.get("compressed_bytes", 0) for guest in guests) // PAGE)
        taken = sum(vm.private + vm.overhead for vm in vms) + self.shared + compressed
        free = max(0, min(self._total - taken, facts.available() // PAGE))
        swapped = sum(vm.swapped for vm in vms)
        return HostMemory(
            total=self._total,
            free=free,
            shared=self.shared,
            compressed=compressed,
            swap_size=self._swap,
            swap_free=max(0, self._swap - swapped),
        )
