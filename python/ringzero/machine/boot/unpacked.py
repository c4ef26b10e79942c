"""Unpacked kernels kept on disk: unpacking costs a tenth of a second, each time a machine starts.

    $XDG_CACHE_HOME/ringzero/unpacked/KEY      the vmlinux, with holes where it is zero

KEY is a BLAKE3 sum of the packed payload, so a file cannot belong to another kernel, and behind the vmlinux
is a sum of it. The file is the user's own (mode 0600); one that is not, or whose sum is wrong, is not used and
made anew. Nothing here can fail a start: when the cache cannot be used, the kernel is unpacked once more.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from pathlib import Path
from typing import Final

from blake3 import blake3

from ringzero.errors import InputError
from ringzero.images.cache import cache_root
from ringzero.machine.boot import payload as packed

__all__ = ["MOST_KEPT", "unpacked"]

MOST_KEPT: Final = 8
"""Kernels kept, those used last; each takes about 45 MiB of disk."""

_HOLE: Final = bytes(1 << 16)
_TRAILER: Final = struct.Struct("<8sQ32s")
_MAGIC: Final = b"rzunpak1"


def unpacked(payload: memoryview, name: str = "kernel") -> memoryview | None:
    """Return the vmlinux packed in `payload`, from the cache or unpacked now; None when the packing is not
    known.

    Raises ImageError when the payload is damaged.
    """
    place: Path | None = None
    with contextlib.suppress(InputError):  # no home directory is known: then without
        place = cache_root() / "unpacked" / blake3(payload).hexdigest()
    if place is not None and (kept := _kept(place)) is not None:
        return kept
    data = packed.unpack(payload, name)
    if data is None:
        return None
    if place is not None:
        with contextlib.suppress(OSError):
            _keep(place, data)
    return memoryview(data)


def _sum(data: bytes | memoryview) -> bytes:
    return blake3(data, max_threads=blake3.AUTO).digest()


def _kept(place: Path) -> memoryview | None:
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        facts = os.fstat(descriptor)
        ours = stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077
        if not ours or facts.st_size <= _TRAILER.size:
            return None
        # A private mapping: nobody else's later write is seen in the pages that were read.
        view = memoryview(mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
        magic, size, checksum = _TRAILER.unpack(view[-_TRAILER.size :])
        data = view[: -_TRAILER.size]
        if magic != _MAGIC or size != len(data) or _sum(data) != checksum:
            return None
        os.utime(descriptor)
        return data
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


def _keep(place: Path, data: bytes) -> None:
    """Write the file beside its place and rename it: nobody sees half of one."""
    import tempfile

    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".", delete=False) as file:
        try:
            for at in range(0, len(data), len(_HOLE)):
                piece = data[at : at + len(_HOLE)]
                if piece == _HOLE:
                    file.seek(len(_HOLE), os.SEEK_CUR)
                else:
                    file.write(piece)
            file.write(_TRAILER.pack(_MAGIC, len(data), _sum(data)))
            file.flush()
            os.rename(file.name, place)
        except OSError:
            os.unlink(file.name)
            raise
    others = sorted(place.parent.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in others[MOST_KEPT:]:
        old.unlink(missing_ok=True)
