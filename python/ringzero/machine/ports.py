"""The ports of a machine: named channels between a program of the guest and this process."""

from __future__ import annotations

import socket
import typing
from collections.abc import Sequence

from ringzero.errors import InputError

if typing.TYPE_CHECKING:
    from ringzero import _core

__all__ = ["Ports"]


class Ports:
    """Named ports of a virtio console; in the guest each is a character device, found by its name.

    With udev that is /dev/virtio-ports/NAME; elsewhere /dev/vport0pN, with the name in
    /sys/class/virtio-ports/vport0pN/name. The names "hvc0", "hvc1" and so on are terminals of the guest's system:
    /dev/hvc0, which the kernel writes to and reads when its command line says console=hvc0.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Name the ports. Raises InputError for a name that is given twice; the core judges the rest."""
        self.names = tuple(names)
        for name in self.names:
            if self.names.count(name) > 1:
                raise InputError(f"two ports are named {name!r}: give each a name of its own")
        # The guest numbers them itself.
        self._terminals = [f"hvc{number}" for number in range(sum(map(_is_terminal, self.names)))]
        if wrong := [name for name in self.names if _is_terminal(name) and name not in self._terminals]:
            raise InputError(f"the guest numbers its terminals from hvc0 on: there can be no {wrong[0]} yet")
        self._console: _core.Console | None = None
        self._own: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether any were asked for."""
        return bool(self.names)

    @property
    def is_needed(self) -> bool:
        """Whether the machine needs the device."""
        return bool(self.names or self._own)

    def add_own(self, name: str) -> None:
        """Have one more port behind those that were asked for, for a program of ours in the guest."""
        self._own = (name,)

    def device(self, _cpus: int) -> _core.VirtioDevice:
        """Return the device that has these ports. Raises the core's CoreError for a name that cannot be."""
        from ringzero import _core

        self._console = _core.Console(self._named, consoles=len(self._terminals))
        return self._console

    @property
    def _named(self) -> list[str]:
        return [*(name for name in self.names if not _is_terminal(name)), *self._own]

    def _index(self, name: str) -> int:
        if name not in (*self.names, *self._own):
            known = ", ".join(self.names) or "none"
            raise InputError(f"this machine has no port {name!r}: it has {known}")
        # The terminals are the device's first ports.
        return [*self._terminals, *self._named].index(name)

    @property
    def _there(self) -> _core.Console:
        if self._console is None:
            raise InputError("the machine was not started: its ports are not there yet")
        return self._console

    def join(self, name: str) -> socket.socket:
        """Return a stream socket joined to a port; once a port, and again when that socket is closed.

        What is sent waits until a program of the guest has opened the port; what the guest sends while nobody
        is joined is gone.
        """
        index = self._index(name)
        return socket.socket(fileno=self._there.port(index))

    def is_open(self, name: str) -> bool:
        """Return whether a program of the guest has the port open."""
        index = self._index(name)
        return self._there.is_open(index)

    def resize(self, name: str, rows: int, columns: int) -> None:
        """Tell the guest the size of the window that a terminal ("hvc0") is shown in."""
        index = self._index(name)
        self._there.resize(index, rows, columns)


def _is_terminal(name: str) -> bool:
    return name.startswith("hvc") and name[3:].isdecimal()
