"""The counters that a memory policy is told (ringzero.policy.counters), from what VMs and the host system say."""

from __future__ import annotations

from collections.abc import Sequence

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
        return self.newcomer(guest.spec)

    def host(self, vms: Sequence[VmMemory]) -> HostMemory:
        """Return the host's own counters, beside those of its VMs."""
        taken = sum(vm.private + vm.overhead for vm in vms)
        free = max(0, min(self._total - taken, facts.available() // PAGE))
        swapped = sum(vm.swapped for vm in vms)
        return HostMemory(
            total=self._total,
            free=free,
            swap_size=self._swap,
            swap_free=max(0, self._swap - swapped),
        )
