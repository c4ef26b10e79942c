"""What a daemon was started with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from ringzero.errors import InputError

__all__ = ["DaemonOptions"]


@dataclass(frozen=True)
class DaemonOptions:
    """The options of `ringzero host start`. Sizes are bytes."""

    root: str
    """The runtime folder."""
    memory: int
    """Of the host's memory, what VMs may take: their pages and their monitors' own."""
    swap: int = 0
    """Of disk, what pages of VMs may take, in files without a name."""
    swap_folder: str | None = None
    policy: str | None = None
    """A file with a memory policy."""
    record: str | None = None
    """A file that counters are recorded to."""

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Return the options that `as_json` made."""
        if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
            raise InputError("these are no options of a daemon: start it by `ringzero host start`")
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        """Return the fields, as JSON knows them."""
        return asdict(self)
