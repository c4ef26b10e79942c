"""The disks of a machine, as the operator names them (docs/disks.md)."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass, fields
from pathlib import Path

from ringzero.errors import InputError
from ringzero.machine.chain import FORMATS, Link, chain

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
    format: raw or qcow2; by itself, by the file's name.
    temporary: the file is only read, and what the guest writes is gone with the machine.
    overlay: the file is only read, and what the guest writes is in this one, a qcow2 image that is made if need be.
    backing: a file or folder that may lie behind the image, besides those of its own folder.
    """

    path: Path
    read_only: bool = False
    serial: str = ""
    cache: str = "writeback"
    on_error: str = "auto"
    iops: int = 0
    bps: int = 0
    format: str = ""
    temporary: bool = False
    overlay: Path | None = None
    backing: Path | None = None

    def __post_init__(self) -> None:
        if len(self.serial) > _SERIAL_MAXIMUM or not self.serial.isascii() or not self.serial.isprintable():
            raise InputError(
                f"the serial number {self.serial!r} cannot be: give up to {_SERIAL_MAXIMUM} ASCII characters"
            )
        _one_of(self.cache, CACHES, "cache mode")
        _one_of(self.on_error, ON_ERROR, "way with errors")
        if self.format:
            _one_of(self.format, FORMATS, "format")
        for what, rate in (("operations", self.iops), ("bytes", self.bps)):
            if not 0 <= rate < 1 << 63:
                raise InputError(f"{rate} {what} a second cannot be: give a number from 1, or 0 for no limit")
        if self.read_only and (self.temporary or self.overlay is not None):
            raise InputError(f"the disk {self.path} is read-only: it needs no overlay")

    @classmethod
    def parse(cls, text: str | os.PathLike[str] | Disk) -> Disk:
        """Return the disk that "FILE" or "FILE,OPTION,..." names; the options are those of `--disk`.

        Raises InputError when there is no such file or option.
        """
        if isinstance(text, Disk):
            return text
        disk = cls.read(text)
        if not disk.path.is_file():
            raise InputError(
                f"the disk {disk.path} is not a file: make one with `ringzero image create {disk.path} 1G`"
            )
        return disk

    @classmethod
    def read(cls, text: str | os.PathLike[str]) -> Disk:
        """Return the disk that a text names, without a look at the file. Raises InputError for an unknown option."""
        name, options = _split(os.fspath(text))
        path = Path(name)
        given: dict[str, typing.Any] = {}
        for option in options:
            key, equals, value = option.partition("=")
            known = [one for one in _OPTIONS if one[0] == key and (one[2] is not None) == bool(equals)]
            if not known:
                how = " or ".join(
                    one[0] if one[2] is None else f"{one[0]}=VALUE" for one in _OPTIONS if one[0] == key
                )
                raise InputError(f"the disk option {option!r} is not understood: write {how}")
            _, field, read = known[0]
            if field in given:
                raise InputError(f"the disk option {key!r} was given twice")
            given[field] = True if read is None else read(value)
        return cls(path, **given)

    def __str__(self) -> str:
        """Return what `read` takes, with absolute paths: it means the same in another process."""
        defaults = {field.name: field.default for field in fields(self)}
        words = [os.path.abspath(self.path)]
        for option, field, read in _OPTIONS:
            value = getattr(self, field)
            if value != defaults[field]:
                text = os.path.abspath(value) if isinstance(value, Path) else value
                words.append(option if read is None else f"{option}={text}")
        return ",".join(words)

    @property
    def is_for_one(self) -> bool:
        """Whether it is written to, so that one machine at a time can have it."""
        return not self.read_only and not self.temporary

    def device(self, cpus: int) -> _core.Disk:
        """Open the file, and return the device, with a queue for each of a machine's processors.

        Raises InputError when its images cannot be used together, and the core's CoreError when a file cannot be
        opened, or another machine has it.
        """
        from ringzero import _core

        (path, image_format), *behind = self.files()
        return _core.Disk(
            path,
            format=image_format,
            behind=behind,
            is_temporary=self.temporary,
            read_only=self.read_only,
            serial=self.serial,
            queues=min(cpus, 16),
            cache=self.cache,
            on_error=self.on_error,
            iops=self.iops,
            bps=self.bps,
        )

    def files(self) -> list[Link]:
        """Return the files of the disk, the top first, each with its format. An overlay is made if it is not there.

        Raises as `device`.
        """
        allowed = [] if self.backing is None else [self.backing]
        links = chain(self.path, self.format, allowed)
        if self.overlay is None:
            return links
        if not self.overlay.exists():
            _make_overlay(self.overlay, links[0])
        over = chain(self.overlay, "qcow2", [*allowed, self.path, self.path.parent])
        if len(over) < 2 or not os.path.samefile(over[1][0], self.path):
            raise InputError(
                f"the overlay {self.overlay} is not one of {self.path}: name another file, or remove it"
            )
        return over


def _make_overlay(overlay: Path, base: Link) -> None:
    from ringzero import _core

    path, image_format = base
    size = _core.image_info(path)["size"] if image_format == "qcow2" else os.stat(path).st_size // 512 * 512
    _core.image_create(os.fspath(overlay), size, backing=(os.path.abspath(path), image_format))


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


# option, field, how to read its value; None for a word without one
_OPTIONS: tuple[tuple[str, str, typing.Callable[[str], typing.Any] | None], ...] = (
    ("ro", "read_only", None),
    ("format", "format", str),
    ("overlay", "temporary", None),
    ("overlay", "overlay", Path),
    ("backing", "backing", Path),
    ("cache", "cache", str),
    ("serial", "serial", str),
    ("iops", "iops", _operations),
    ("bps", "bps", _bytes),
    ("on-error", "on_error", str),
)


def _split(text: str) -> tuple[str, list[str]]:
    """Take the options off the end; a comma may be part of the file's name."""
    names = list(dict.fromkeys(option for option, _, _ in _OPTIONS))
    parts = text.split(",")
    at = len(parts)
    while at > 1 and parts[at - 1].partition("=")[0] in names:
        at -= 1
    name = ",".join(parts[:at])
    if at > 1 and not os.path.exists(name) and os.path.exists(",".join(parts[: at - 1])):
        raise InputError(f"there is no disk option {parts[at - 1]!r}: there is {', '.join(names)}")
    return name, parts[at:]
