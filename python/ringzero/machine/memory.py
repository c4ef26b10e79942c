"""The memory of a machine in this process: how big it is, what its pages are, and its balloon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringzero.errors import InputError
from ringzero.machine.spec import format_size, parse_size

if TYPE_CHECKING:
    from ringzero import _core

__all__ = ["MachineMemory"]

_PAGE = 4096


class MachineMemory:
    """The memory of a machine that was started; `Machine.memory` gives it."""

    def __init__(self, vm: _core.Vm, size: int) -> None:
        self._vm = vm
        self.size = size
        """Bytes that the guest believes to have."""

    @property
    def pages(self) -> dict[str, int]:
        """Pages of 4 KiB by state: zero (they take nothing of the host), private, shared, image, ballooned,
        compressed, swapped. Their sum is the guest's memory.
        """
        return self._vm.memory_counts()

    @property
    def target(self) -> int:
        """Bytes that the guest shall do with; its balloon is to hold the rest. Set it to bytes, or text like "64M".

        The guest follows as far as it can, and only if its kernel has a balloon driver. Raises InputError for more
        than it has.
        """
        return self.size - self._vm.balloon_stats(ask=False)["target"] * _PAGE

    @target.setter
    def target(self, size: int | str) -> None:
        wanted = parse_size(size, "target")
        if wanted > self.size:
            raise InputError(
                f"a target of {format_size(wanted)} is more than the guest has: {format_size(self.size)}"
            )
        self._vm.balloon_target((self.size - wanted) // _PAGE)

    @property
    def stats(self) -> dict[str, int]:
        """What is known of the balloon (`balloon_...`, in pages) and, where its driver tells, of the guest
        (`guest_...`, in bytes), and of pages that were swapped. Fresh figures of the guest come with a later look.
        """
        balloon = self._vm.balloon_stats()
        named = {
            key if key.startswith("guest_") else f"balloon_{key}": value for key, value in balloon.items()
        }
        return named | {f"swap_{key}": value for key, value in self._vm.memory_swap().items()}

    def states(self) -> bytes:
        """Return the state of every page, by address: a byte each, its place in `pages`."""
        return self._vm.memory_states()

    def audit(self) -> list[str]:
        """Derive every invariant of the memory again, while the guest stands still: a sentence for each that does
        not hold.
        """
        return self._vm.memory_audit()
