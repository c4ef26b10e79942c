"""The protocol that every Python device follows, and how one is put on a machine's bus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["Device", "PortBus", "PortRange", "attach"]


@dataclass(frozen=True)
class PortRange:
    """`count` I/O ports from `first`."""

    first: int
    count: int = 1

    def __post_init__(self) -> None:
        if not (self.first >= 0 and self.count >= 1 and self.first + self.count <= 0x10000):
            raise ValueError(
                f"ports {self.first:#x} to {self.first + self.count - 1:#x} are not within 0..0xffff"
            )


@runtime_checkable
class Device(Protocol):
    """A device that answers on I/O ports."""

    @property
    def name(self) -> str:
        """What messages call the device."""

    @property
    def ports(self) -> Sequence[PortRange]:
        """The ports that the device answers on."""

    def read(self, port: int, size: int) -> int:
        """Return what `size` bytes (1, 2 or 4) at `port` read as."""

    def write(self, port: int, size: int, value: int) -> None:
        """Take `size` bytes (1, 2 or 4) written to `port`."""


class _Window:
    """One port range of a device, as the bus calls it: by the offset in the range
    (`ringzero._core.PortDevice`).
    """

    def __init__(self, device: Device, first: int) -> None:
        self._device = device
        self._first = first

    def read(self, offset: int, size: int) -> int:
        return self._device.read(self._first + offset, size) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._first + offset, size, value)


class PortBus(Protocol):
    """What devices are put on; `ringzero._core.Vm` is one."""

    def add_port_device(self, first: int, count: int, device: _Window) -> None:
        """Give `count` I/O ports from `first` to a device."""


def attach(bus: PortBus, device: Device) -> None:
    """Put a device on the bus, each of its port ranges. Before the machine starts only."""
    for window in device.ports:
        bus.add_port_device(window.first, window.count, _Window(device, window.first))
