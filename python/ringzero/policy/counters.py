"""What a policy is told: the counters of each VM and of the host, all in pages of 4 KiB.

Whoever runs the VMs gives these, and nothing else is asked for. Of each VM:

    size, min, max, shares       what the operator set; the monitor knows them
    active                       from the sampler (`ringzero.policy.activity`): touched pages of sampled ones
    private, shared, zero        the pmap's counts of pages by state; pages of an image that several VMs map
                                 count as shared
    ballooned                    pages that the guest's balloon holds now (not: was asked to hold)
    compressed, swapped          pages by state, too
    overhead                     the monitor's own pages for this VM: its process beyond the guest's pages
    balloons                     whether the guest has a balloon driver that follows its target

Pages that are in none of these states were never touched, and cost nothing. Of the host: all memory that is
for VMs, what of it is free, what the shared pool and the compressed store take, and the swap file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

__all__ = ["MOST_SHARES", "PAGE", "HostMemory", "VmMemory", "amount", "charges"]

PAGE = 4096
"""Bytes a page."""
MOST_PAGES = 1 << 40
"""4 PiB, more than the processor can address: what is beyond was not counted but made up, or is damaged."""
MOST_SHARES = 1_000_000
"""More would lose the VM with one share in the rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmMemory:
    """The counters of one VM, in pages. Raises ValueError, one sentence, for counters that cannot be."""

    name: str
    size: int
    """What the guest believes to have."""
    min: int
    """What it never has less of, in machine memory, if it wants it."""
    max: int
    """What it never has more of."""
    shares: int = 1000
    active: float = 1.0
    """The part of `size` that the guest uses: 0 to 1."""
    private: int = 0
    shared: int = 0
    zero: int = 0
    ballooned: int = 0
    compressed: int = 0
    swapped: int = 0
    overhead: int = 0
    balloons: bool = True

    def __post_init__(self) -> None:
        what = f"vm {self.name!r:.80}"
        _whole(what, self, exempt=("name", "active", "balloons"))
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise ValueError(f"a vm's name is {self.name!r:.80}, and must be a word that can be printed")
        if not isinstance(self.balloons, bool):
            raise ValueError(f"{what}: balloons is {self.balloons!r}, and must be true or false")
        if isinstance(self.active, bool) or not isinstance(self.active, int | float):
            raise ValueError(f"{what}: active is {self.active!r}, and must be a number between 0 and 1")
        if not 0 <= self.active <= 1:
            raise ValueError(f"{what}: active is {self.active}, and must be between 0 and 1")
        if not self.min <= self.max <= self.size or self.size == 0:
            raise ValueError(
                f"{what}: min {amount(self.min)}, max {amount(self.max)} and size {amount(self.size)}"
                " must rise from one to the next"
            )
        if not 1 <= self.shares <= MOST_SHARES:
            raise ValueError(f"{what}: {self.shares} shares, and 1 to {MOST_SHARES:,} can be had")
        if self.touched > self.size:
            raise ValueError(
                f"{what}: its pages by state make {amount(self.touched)}, and its size is {amount(self.size)}"
            )

    @property
    def touched(self) -> int:
        """Pages in any state; the others were never touched."""
        return self.private + self.shared + self.zero + self.ballooned + self.compressed + self.swapped

    @property
    def active_pages(self) -> int:
        """Pages that the guest uses, as far as the samples tell."""
        return round(self.active * self.size)

    @property
    def balloon_least(self) -> int:
        """Pages that the balloon must hold at all times, so that the guest has no more than its max."""
        return self.size - self.max


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """The counters of the host, in pages. Raises ValueError for counters that cannot be."""

    total: int
    """Memory for VMs: their pages and their monitors' own."""
    free: int
    shared: int = 0
    """Machine pages behind all shared pages of all VMs."""
    compressed: int = 0
    """Machine pages that the compressed pages of all VMs take."""
    swap_size: int = 0
    swap_free: int = 0

    def __post_init__(self) -> None:
        _whole("the host", self)
        if self.total == 0:
            raise ValueError("the host: total is 0, and a host has memory")
        if self.free > self.total or self.swap_free > self.swap_size:
            raise ValueError("the host: more is free than there is, of memory or of swap")


def charges(host: HostMemory, vms: Sequence[VmMemory]) -> list[int]:
    """Return the machine pages that each VM is charged for: its own, and its part of what is common.

    What the shared pool takes is divided by how many shared pages each VM has in it, and the compressed store
    likewise; a zero page costs nothing. So the charges add up to what the VMs take of the host.
    """
    shared = _parts(host.shared, [vm.shared for vm in vms])
    compressed = _parts(host.compressed, [vm.compressed for vm in vms])
    return [vm.private + one + other for vm, one, other in zip(vms, shared, compressed, strict=True)]


def _parts(whole: int, weights: Sequence[int]) -> list[int]:
    """Return `whole` in parts as the weights are; no page is lost in rounding."""
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    ends = [whole * end // total for end in accumulate(weights)]
    return [end - begin for begin, end in pairwise([0, *ends])]


def amount(pages: int) -> str:
    """Return an amount of memory in words: KiB below a MiB, else MiB with a decimal where there is one."""
    if pages * PAGE < 1 << 20:
        return f"{pages * PAGE // 1024} KiB"
    text = f"{pages * PAGE / (1 << 20):,.1f}"
    return f"{text.removesuffix('.0')} MiB"


def _whole(what: str, counters: VmMemory | HostMemory, exempt: tuple[str, ...] = ()) -> None:
    for field in fields(counters):
        if field.name in exempt:
            continue
        value = getattr(counters, field.name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{what}: {field.name} is {value!r:.40}, and must be a whole number, 0 or more")
        if value > MOST_PAGES:
            raise ValueError(
                f"{what}: {field.name} is more than {MOST_PAGES:,}, and no host has such numbers"
            )
