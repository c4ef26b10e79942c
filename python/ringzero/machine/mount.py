"""Folders of the host in a guest, as the operator names them."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ringzero.errors import InputError

if typing.TYPE_CHECKING:
    from ringzero import _core

__all__ = ["Mount"]

_THERE = re.compile(r"/[A-Za-z0-9._/+@%=-]*\Z")
"""What can be a word of a kernel's command line, which is how the guest hears of it."""


@dataclass(frozen=True)
class Mount:
    """A folder of this host that a guest has at a place of its own.

    server: a socket to a process that serves it (a descriptor), where that is not this one.
    tag: the name by which the guest's system mounts it: `mount -t virtiofs TAG /there`. Our images do so themselves.
    """

    here: Path
    there: PurePosixPath
    read_only: bool = False
    tag: str = ""
    server: int | None = None

    def __post_init__(self) -> None:
        if not _THERE.match(str(self.there)) or ".." in self.there.parts:
            raise InputError(
                f"a folder cannot be mounted at {str(self.there)!r}: give an absolute path without spaces"
            )

    @classmethod
    def parse(cls, text: str | Mount) -> Mount:
        """Return what "HERE:THERE", with ":ro" behind it or not, says. Raises InputError when it is nothing."""
        mount = text if isinstance(text, Mount) else cls.read(text)
        if not mount.here.is_dir():
            raise InputError(f"{mount.here} cannot be mounted: there is no such folder")
        return mount

    @classmethod
    def read(cls, text: str) -> Mount:
        """Return what a text says, without a look at the folder. Raises InputError when it is nothing."""
        read_only = text.endswith(":ro")
        here, colon, there = text.removesuffix(":ro").rpartition(":")
        if not colon or not here or not there:
            raise InputError(f"the mount {text!r} is not HERE:THERE: write ./here:/there or ./here:/there:ro")
        return cls(Path(here), PurePosixPath(there), read_only)

    def __str__(self) -> str:
        """Return what `read` takes, with an absolute path: it means the same in another process."""
        return f"{os.path.abspath(self.here)}:{self.there}{':ro' if self.read_only else ''}"

    @classmethod
    def parse_all(cls, texts: Iterable[str | Mount]) -> list[Mount]:
        """Return the mounts of a machine, each with a tag. Raises InputError when two have the same place or tag."""
        mounts: list[Mount] = []
        for number, mount in enumerate(map(cls.parse, texts)):
            mount = dataclasses.replace(mount, tag=mount.tag or f"mount{number}")
            for other in mounts:
                if other.there == mount.there:
                    raise InputError(
                        f"two folders are to be mounted at {mount.there}: give each a place of its own"
                    )
                if other.tag == mount.tag:
                    raise InputError(f"two folders have the tag {mount.tag!r}: give each one of its own")
            mounts.append(mount)
        return mounts

    def device(self, _cpus: int) -> _core.VirtioDevice:
        """Open the folder, and return the device. Raises the core's CoreError when it cannot be opened."""
        from ringzero import _core

        return _core.shared_folder(
            os.fspath(self.here), self.tag, read_only=self.read_only, server=self.server
        )

    @property
    def word(self) -> str:
        """The word of the command line by which our images mount it."""
        return f"ringzero.mount={self.tag}:{self.there}{':ro' if self.read_only else ''}"
