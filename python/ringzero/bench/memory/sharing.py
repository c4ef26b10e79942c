"""What sharing and the search for zeroes gave of some guests' memory: the arithmetic of `identical` and `mixes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringzero.bench.memory.fleet import Fleet, Tally
from ringzero.host.client import HostVm

__all__ = ["COUNTED", "Savings", "measure_savings"]

COUNTED = (
    "Shared: pages that the guests have in common copies (also from the image that they start from),"
    " and pages without a machine page (zero, never touched, or"
    " told free by the guest's kernel), of all pages of the guests; ESX counts zero pages as copies of one, too."
    " Reclaimed: pages of the guests less machine pages that are really used, the shared pool's among them."
    " Of held pages: the same of the pages with content that the guests had before the scan, so that memory which no"
    " guest ever touched is in neither number. Scanned as fast as it goes, by the measurement, until a pass finds"
    " nothing new."
)


@dataclass(frozen=True)
class Savings:
    """Pages of 4 KiB: before the scan and after it."""

    before: Tally
    after: Tally
    pool: int
    """Pages of the shared pool, after the scan."""
    images: int
    """Pages of the images that guests map: each once, whole, even where no guest uses a page any more."""
    passes: int
    faults: tuple[str, ...] = ()
    """What the audits complain about."""

    @property
    def pages(self) -> int:
        """All pages of the guests."""
        return self.after.all

    @property
    def machine(self) -> int:
        """Machine pages that are used after the scan."""
        return self.after["private"] + self.images + self.pool

    @property
    def shared(self) -> float:
        """Per cent of the guests' pages that are shared or zero, for guests that start from one image."""
        return 100 * (self.after["shared"] + self.after["image"] + self.after["zero"]) / self.pages

    @property
    def common(self) -> float:
        """Per cent of the guests' pages that are common copies with content."""
        return 100 * (self.after["shared"] + self.after["image"]) / self.pages

    @property
    def saved(self) -> int:
        """Pages that are reclaimed."""
        return self.pages - self.machine

    @property
    def reclaimed(self) -> float:
        """Per cent of the guests' pages that are reclaimed."""
        return 100 * self.saved / self.pages

    @property
    def held(self) -> int:
        """Pages with content that the guests had before the scan."""
        return self.before.held

    @property
    def reclaimed_of_held(self) -> float:
        """Per cent of the pages with content that need no machine page of their own."""
        return 100 * (self.held - self.machine) / self.held

    def as_json(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "pool": self.pool,
            "images": self.images,
            "passes": self.passes,
            "machine": self.machine,
        }


def measure_savings(fleet: Fleet, vms: Sequence[HostVm]) -> Savings:
    """Count, scan all memory until nothing new is found, and count again; then let the VMs audit themselves."""
    before = fleet.tally(vms)
    passes = fleet.scan(vms)
    after, (pool, image) = fleet.tally(vms), fleet.common_pages()
    return Savings(before, after, pool, image, passes, tuple(fleet.audit()))
