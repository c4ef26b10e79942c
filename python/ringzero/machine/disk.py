"""The disks of a machine, as the operator names them (docs/disks.md)."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass
from pathlib import Path

from ringzero.errors import InputError

if typing.TYPE_CHECKING:
    from ringzero import _core

__all__ = ["CACHES", "ON_ERROR", "Disk"]

CACHES = ("writeback", "writethrough", "none", "unsafe")
ON_ERROR = ("auto", "report", "pause")
_SERIAL_MAXIMUM = 20


@dataclass(frozen=True)
class Disk:
    """A file that a guest sees as a virtio disk: /dev/vda, /dev/vdb ... in the order of the list.

    serial: up to 20 ASCII characters, by which the guest finds it under /dev/disk/by-id.
    cache: what the host may keep in its memory of what the guest has written (`CACHES`).
    on_error: whether the machine is paused when the host cannot do what the guest wants of the disk, or the guest is
    told (`ON_ERROR`); "auto" pauses it when the host's disk is full.
    iops, bps: operations and bytes a second, 0 for no limit.
    """

    path: Path
    read_only: bool = False
    serial: str = ""
    cache: str = "writeback"
    on_error: str = "auto"
    iops: int = 0
    bps: int = 0

    def __post_init__(self) -> None:
        if len(self.serial) > _SERIAL_MAXIMUM or not self.serial.isascii() or not self.serial.isprintable():
            raise InputError(
                f"the serial number {self.serial!r} cannot be: give up to {_SERIAL_MAXIMUM} ASCII characters"
            )
        _one_of(self.cache, CACHES, "cache mode")
        _one_of(self.on_error, ON_ERROR, "way with errors")
        for what, rate in (("operations", self.iops), ("bytes", self.bps)):
            if not 0 <= rate < 1 << 63:
                raise InputError(f"{rate} {what} a second cannot be: give a number from 1, or 0 for no limit")

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | Disk) -> Disk:
        """Return the disk that "FILE" or "FILE,OPTION,..." names; the options are those of `--disk`.

        Raises InputError when there is no such file or option.
        """
        if isinstance(text, Disk):
            return text
        name, options = _split(os.fspath(text))
        path = Path(name)
        fields: dict[str, typing.Any] = {}
        for option in options:
            key, equals, value = option.partition("=")
            field, read = _OPTIONS[key]
            if bool(equals) != (read is not None):
                how = f"{key}=VALUE" if read is not None else key
                raise InputError(f"the disk option {option!r} is not understood: write {how}")
            if field in fields:
                raise InputError(f"the disk option {key!r} was given twice")
            fields[field] = True if read is None else read(value)
        if not path.is_file():
            raise InputError(f"the disk {path} is not a file: make one with `truncate --size 1G {path}`")
        return cls(path, **fields)

    def device(self, cpus: int) -> _core.Disk:
        """Open the file, and return the device, with a queue for each of a machine's processors.

        Raises the core's CoreError when the file cannot be opened, or another machine has it.
        """
        from ringzero import _core

        return _core.Disk(
            os.fspath(self.path),
            read_only=self.read_only,
            serial=self.serial,
            queues=min(cpus, 16),
            cache=self.cache,
            on_error=self.on_error,
            iops=self.iops,
            bps=self.bps,
        )


def _one_of(name: str, names: tuple[str, ...], what: str) -> None:
    if name not in names:
        raise InputError(f"there is no {what} {name!r} for a disk: choose one of {', '.join(names)}")


def _bytes(text: str) -> int:
    from ringzero.machine.spec import parse_size

    return parse_size(text, "rate")


def _operations(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{text!r} operations a second cannot be: give a whole number")
    return int(text)


# option -> (field, how to read its value; None for a word without one)
_OPTIONS: dict[str, tuple[str, typing.Callable[[str], typing.Any] | None]] = {
    "ro": ("read_only", None),
    "serial": ("serial", str),
    "cache": ("cache", str),
    "on-error": ("on_error", str),
    "iops": ("iops", _operations),
    "bps": ("bps", _bytes),
}


def _split(text: str) -> tuple[str, list[str]]:
    """Take the options off the end; a comma may be part of the file's name."""
    parts = text.split(",")
    at = len(parts)
    while at > 1 and parts[at - 1].partition("=")[0] in _OPTIONS:
        at -= 1
    name = ",".join(parts[:at])
    if at > 1 and not os.path.exists(name) and os.path.exists(",".join(parts[: at - 1])):
        raise InputError(f"there is no disk option {parts[at - 1]!r}: there is {', '.join(_OPTIONS)}")
    return name, parts[at:]
