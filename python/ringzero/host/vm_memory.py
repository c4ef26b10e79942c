"""The memory of one VM, as the host's machinery sees it: the one place that knows what the core calls these things.

A thin layer: counts by state, the sampler, the scanner, the evictor, the balloon, and what the monitor itself takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringzero import _core

__all__ = ["STATES", "GuestMemory"]

STATES = ("zero", "private", "shared", "image", "ballooned", "compressed", "swapped")
"""What a page of a guest can be; zero pages, and those never touched, take nothing of the host."""
COMPRESSED_PART = 10
"""This part of a VM's size is memory for compressed pages, at most (Parameters.compress_most)."""


class GuestMemory:
    """The memory of a VM of this process. All calls are the daemon's or the operator's; none waits for the guest."""

    def __init__(self, vm: _core.Vm, size: int) -> None:
        self._vm = vm
        self.size = size
        self._ballooned = 0
        self._squeezed = 0
        self._is_momentary = False

    def counts(self) -> dict[str, int]:
        """Return the pages by state; their sum is the guest's memory. What a squeeze took for a moment counts as zero:
        nobody decides upon it.
        """
        counts = self._vm.memory_counts()
        moment = max(0, counts["ballooned"] - self._ballooned) if self._is_momentary else 0
        self._is_momentary = self._squeezed > 0 or moment > 0
        return counts | {"ballooned": counts["ballooned"] - moment, "zero": counts["zero"] + moment}

    def states(self) -> bytes:
        """Return the state of every page, by address: a byte each, its place in `STATES`."""
        return self._vm.memory_states()

    def balloon(self, pages: int) -> None:
        """Have the guest's balloon hold so many pages, in all. Ends a squeeze if that is another number than before."""
        if pages != self._ballooned:
            self._ballooned, self._squeezed = pages, 0
            self._vm.balloon_target(pages)

    def squeeze(self, pages: int) -> bool:
        """Have the balloon hold so many pages more, for a moment; False when it already has to hold some."""
        if self._ballooned:
            return False
        self._squeezed, self._is_momentary = pages, True
        self._vm.balloon_target(pages)
        return True

    @property
    def is_squeezed(self) -> bool:
        """Whether the balloon holds more than it was ordered to."""
        return self._squeezed > 0

    def let_go(self) -> None:
        """End a squeeze."""
        if self._squeezed:
            self._squeezed = 0
            self._vm.balloon_target(self._ballooned)

    def ask_guest(self) -> None:
        """Have the guest tell of itself: the next `balloon_facts` but one has it, or a later one."""
        self._vm.balloon_stats(ask=True)

    def balloon_facts(self) -> dict[str, int]:
        """Return what is known of the balloon: `driver`, 1 when the guest has one, `target` and `actual` pages ..."""
        # What the guest itself told last: to ask it would wake it up.
        return self._vm.balloon_stats(ask=False)

    def scan(self, pages: int) -> dict[str, int]:
        """Look through so many pages for equal ones; return how many were scanned, shared, and zeroed."""
        return self._vm.memory_scan(pages)

    def sample(self, pages: int) -> tuple[int, int]:
        """End a sampling period and begin the next with so many pages: pages touched of those sampled."""
        return self._vm.memory_sample(pages)

    def use_swap(self, folder: str | None, file_bytes: int) -> None:
        """Have a place for pages that are evicted: memory for compressed ones, and a file in `folder`."""
        self._vm.set_swap(self.size // COMPRESSED_PART, folder, file_bytes)

    def attach_sharer(self, socket: int, pool: int | None = None) -> None:
        """Join the sharer at the other end of `socket`; the first time with the `pool` of the group."""
        self._vm.attach_sharer(socket, pool)

    def pool(self) -> tuple[int, int] | None:
        """Return which file the group's pool is."""
        return self._vm.shared_pool()

    def evict(self, pages: int) -> tuple[int, str | None]:
        """Put up to so many pages into the swap store; how many went, and why no more if it is full."""
        return self._vm.memory_evict(pages)

    def swap_facts(self) -> dict[str, int]:
        """Return what the swap store holds: `compressed_bytes` of memory, among others."""
        return self._vm.memory_swap()

    def audit(self) -> list[str]:
        """Derive every invariant again; a sentence for each that does not hold."""
        return self._vm.memory_audit()

    def trim(self) -> int:
        """Give back what the monitor does not need while the guest is quiet; pages."""
        return self._vm.memory_trim()
