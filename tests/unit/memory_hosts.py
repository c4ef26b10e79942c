"""Hosts full of VMs for the tests of the memory policies: random ones that could be, and the paper's two VMs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from ringzero.policy import HostMemory, Parameters, VmMemory, charges

MIB = 256
"""Pages."""


def random_vm(choose: Random, name: str) -> VmMemory:
    """Return a VM in some state, nothing about it likely but that it can be."""
    size = choose.choice((1, 7, 64 * MIB, choose.randint(1, 4096 * MIB)))
    most = choose.choice((size, choose.randint(1, size)))
    least = choose.choice((0, 0, most // 10, most // 10, most, choose.randint(0, most)))
    cuts = sorted(choose.randint(0, size) for _ in range(6))
    states = [high - low for low, high in zip([0, *cuts], cuts, strict=False)]
    return VmMemory(
        name=name,
        size=size,
        min=least,
        max=most,
        shares=choose.choice((1, 1000, 1_000_000, choose.randint(1, 5000))),
        active=choose.choice((0.0, 1.0, choose.random())),
        private=states[0],
        shared=states[1],
        zero=states[2],
        ballooned=states[3],
        compressed=states[4],
        swapped=states[5],
        overhead=choose.randint(0, 8 * MIB),
        balloons=choose.random() < 0.8,
    )


def random_host(choose: Random) -> tuple[HostMemory, list[VmMemory]]:
    """Return a host whose books are right: what is not free is charged to a VM, or its monitor's own."""
    vms = [random_vm(choose, f"vm{number}") for number in range(choose.randint(0, 8))]
    shared = choose.randint(0, sum(vm.shared for vm in vms))
    compressed = choose.randint(0, sum(vm.compressed for vm in vms))
    used = sum(vm.private + vm.overhead for vm in vms) + shared + compressed
    swapped = sum(vm.swapped for vm in vms)
    swap_free = choose.choice((0, choose.randint(0, 4096 * MIB)))
    free = choose.choice((0, used // 100, used // 30, choose.randint(0, 2 * used + 1)))
    host = HostMemory(
        total=max(1, used + free),
        free=max(1, used + free) - used,
        shared=shared,
        compressed=compressed,
        swap_size=swapped + swap_free,
        swap_free=swap_free,
    )
    return host, vms


def admitted(host: HostMemory, vms: Sequence[VmMemory], parameters: Parameters) -> list[VmMemory]:
    """Return the VMs with mins lowered until the host can keep them all."""
    room = host.total - sum(vm.overhead for vm in vms) - parameters.reserve(host.total)
    kept = []
    for vm in vms:
        least = max(0, min(vm.min, room))
        room -= least
        kept.append(replace(vm, min=least))
    return kept


def two_vms(budget: int, parameters: Parameters) -> tuple[HostMemory, list[VmMemory]]:
    """Return the experiment of the paper's 5.4: two VMs of 256 MiB and equal shares, one idle and one active.

    The host has `budget` pages for them beyond what is to be free, and each holds half of it.
    """
    total = budget
    while total - parameters.reserve(total) < budget:
        total += 1
    half = budget // 2
    idle = VmMemory(
        name="idle",
        size=256 * MIB,
        min=32 * MIB,
        max=256 * MIB,
        active=0.05,
        private=half,
        ballooned=256 * MIB - half,
    )
    vms = [idle, replace(idle, name="busy", active=0.95)]
    free = total - sum(charges(HostMemory(total=total, free=0), vms))
    return HostMemory(total=total, free=free, swap_size=512 * MIB, swap_free=512 * MIB), vms
