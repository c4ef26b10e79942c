"""What many machines start from, once: pages of kernel and initramfs in a sealed file that every VM maps.

The file is in memory. A page stays common until its guest writes to it. Only whole pages that are not zero are in
the file; what is left of a piece, at its edges, is written as always.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from ringzero.machine.boot.layout import Piece

__all__ = ["SealedPages", "Sharing"]

PAGE: Final = 4096
SMALLEST: Final = 1 << 16
"""Bytes of a piece that are worth a place in the file."""

_COMMON: Final = ("kernel", "initramfs")
"""The pieces that depend on the files alone; the others tell of the machine."""


class Sharing(Protocol):
    """What loading needs of a machine; `ringzero._core.Vm` is one."""

    def write_memory(self, address: int, data: bytes | memoryview) -> None:
        """Write guest physical memory."""

    def map_image(self, fd: int, runs: list[tuple[int, int, int]]) -> None:
        """Map pages of a sealed file: (guest physical address, page in the file, number of pages)."""


@dataclass(frozen=True)
class _Part:
    """Pages of one piece, that has `size` bytes and begins `offset` bytes into a page."""

    size: int
    offset: int
    runs: tuple[tuple[int, int, int], ...]
    """(byte in the piece, page in the file, number of pages)"""


class SealedPages:
    """The common pages of some pieces. It owns its file until it is collected."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        """Copy the pages of the pieces that are common. Raises OSError when the host gives no file."""
        self.fd = os.memfd_create("ringzero-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._parts: list[_Part] = []
        pages = 0
        for piece in _common(pieces):
            runs: list[tuple[int, int, int]] = []
            view = memoryview(piece.data)
            for begin, end in _runs(view, -piece.address % PAGE):
                count = (end - begin) // PAGE
                os.pwrite(self.fd, view[begin:end], pages * PAGE)
                runs.append((begin, pages, count))
                pages += count
            self._parts.append(_Part(len(view), piece.address % PAGE, tuple(runs)))
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def load(self, machine: Sharing, pieces: Iterable[Piece]) -> list[Piece]:
        """Map into a machine what these pieces have here; return what remains to be written, as pieces."""
        rest: list[Piece] = []
        mapped: list[tuple[int, int, int]] = []
        common = _common(pieces := list(pieces))
        fits = [(part.size, part.offset) for part in self._parts] == [
            (len(piece.data), piece.address % PAGE) for piece in common
        ]
        if not fits:
            return pieces
        parts = {id(piece): part for piece, part in zip(common, self._parts, strict=True)}
        for piece in pieces:
            part = parts.get(id(piece))
            if part is None:
                rest.append(piece)
                continue
            view, done = memoryview(piece.data), 0
            for begin, page, count in (*part.runs, (part.size, 0, 0)):
                if view[done:begin]:
                    rest.append(Piece(piece.name, piece.address + done, view[done:begin]))
                done = begin + count * PAGE
                if count:
                    mapped.append((piece.address + begin, page, count))
        machine.map_image(self.fd, mapped)
        return rest


def _common(pieces: Iterable[Piece]) -> list[Piece]:
    return [piece for piece in pieces if piece.name in _COMMON and len(piece.data) >= SMALLEST]


def _runs(view: memoryview, begin: int) -> Iterator[tuple[int, int]]:
    """Yield (first byte, byte behind) of the whole pages from `begin` on that are not zero, as long runs."""
    zeroes = bytes(PAGE)
    first = None
    for at in range(begin, len(view) - PAGE + 1, PAGE):
        if view[at : at + PAGE] == zeroes:
            if first is not None:
                yield (first, at)
            first = None
        elif first is None:
            first = at
    if first is not None:
        yield (first, begin + (len(view) - begin) // PAGE * PAGE)
