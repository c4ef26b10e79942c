"""The disks of a machine, as the operator names them."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass
from pathlib import Path

from ringzero.errors import InputError

if typing.TYPE_CHECKING:
    from ringzero import _core

__all__ = ["Disk"]

_SERIAL_MAXIMUM = 20


@dataclass(frozen=True)
class Disk:
    """A raw file that a guest sees as a virtio disk: /dev/vda, /dev/vdb ... in the order of the list.

    serial: up to 20 ASCII characters, by which the guest finds it under /dev/disk/by-id.
    """

    path: Path
    read_only: bool = False
    serial: str = ""

    def __post_init__(self) -> None:
        if len(self.serial) > _SERIAL_MAXIMUM or not self.serial.isascii() or not self.serial.isprintable():
            raise InputError(
                f"the serial number {self.serial!r} cannot be: give up to {_SERIAL_MAXIMUM} ASCII characters"
            )

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | Disk) -> Disk:
        """Return the disk that "FILE" or "FILE,ro" names. Raises InputError when that is no file."""
        if isinstance(text, Disk):
            return text
        name = os.fspath(text)
        read_only = name.endswith(",ro")
        path = Path(name.removesuffix(",ro"))
        if not path.is_file():
            raise InputError(f"the disk {path} is not a file: make one with `truncate --size 1G {path}`")
        return cls(path, read_only)

    def device(self, cpus: int) -> _core.VirtioDevice:
        """Open the file, and return the device, with a queue for each of a machine's processors.

        Raises the core's CoreError when the file cannot be opened, or another machine has it.
        """
        from ringzero import _core

        return _core.raw_disk(os.fspath(self.path), read_only=self.read_only, serial=self.serial, queues=cpus)
