"""Write ISO 9660 images of a few files: what a seed disk is.

ECMA-119, 3rd edition (December 2017), "Volume and file structure of CD-ROM": sections 8 (volume descriptors) and 9
(records). File names are written as they are, in lower case too, as genisoimage's -allow-lowercase does and Linux
reads them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

__all__ = ["iso9660"]

SECTOR = 2048
SYSTEM_AREA = 16
DIRECTORY = 0x02
NAME_MAX = 30
# 1 January 2000, in the forms of 8.4.26.1 and 9.1.5: equal files give equal images.
LONG_DATE = b"2000010100000000\x00"
SHORT_DATE = bytes((100, 1, 1, 0, 0, 0, 0))


def iso9660(label: str, files: Mapping[str, bytes]) -> bytes:
    """Return an image with the volume identifier `label` and `files` in its root directory."""
    if not 0 < len(label) <= 32 or not label.isascii():
        raise ValueError(f"not a volume identifier: {label!r}")
    for name in files:
        if not 0 < len(name) <= NAME_MAX or not name.isascii() or "/" in name or ";" in name:
            raise ValueError(f"not a name for a file on a seed disk: {name!r}")
    names = sorted(files)
    path_tables = SYSTEM_AREA + 2  # after the two descriptors: one in each byte order
    root = path_tables + 2
    entries = [_record(bytes((0,)), 0, 0, DIRECTORY), _record(bytes((1,)), 0, 0, DIRECTORY)]
    entries += [_record(name.encode(), 0, 0, 0) for name in names]
    root_size = len(_sectors(entries))
    place = root + root_size // SECTOR
    entries = [_record(bytes((itself,)), root, root_size, DIRECTORY) for itself in (0, 1)]
    contents = []
    for name in names:
        data = files[name]
        entries.append(_record(name.encode(), place, len(data), 0))
        contents.append(_padded(data))
        place += len(contents[-1]) // SECTOR
    # 9.4: length of the name, extended attributes, place, number of the parent, name (one zero byte), padding.
    little = struct.pack("<BBIHBx", 1, 0, root, 1, 0)
    big = struct.pack(">BBIHBx", 1, 0, root, 1, 0)
    descriptor = b"".join(
        (
            b"\x01CD001\x01\x00",
            bytes(b" " * 32),
            label.encode().ljust(32),
            bytes(8),
            _both32(place),
            bytes(32),
            _both16(1) + _both16(1) + _both16(SECTOR) + _both32(len(little)),
            struct.pack("<II", path_tables, 0) + struct.pack(">II", path_tables + 1, 0),
            _record(bytes((0,)), root, root_size, DIRECTORY),
            b" " * (128 * 4 + 37 * 3),
            LONG_DATE * 2 + b"0" * 16 + b"\x00" + LONG_DATE,
            b"\x01",
        )
    )
    end = b"\xffCD001\x01"
    parts = [bytes(SYSTEM_AREA * SECTOR), _padded(descriptor), _padded(end), _padded(little), _padded(big)]
    return b"".join([*parts, _sectors(entries), *contents])


def _record(name: bytes, place: int, size: int, flags: int) -> bytes:
    """Return a directory record (9.1); `place` is a sector, `size` bytes."""
    length = 33 + len(name) + (1 - len(name) % 2)
    fields = bytes((length, 0)) + _both32(place) + _both32(size) + SHORT_DATE + bytes((flags, 0, 0))
    return (fields + _both16(1) + bytes((len(name),)) + name).ljust(length, b"\0")


def _sectors(entries: list[bytes]) -> bytes:
    """Lay records out in sectors: none goes over the end of one (6.8.1.1)."""
    out = bytearray()
    for entry in entries:
        if len(out) % SECTOR + len(entry) > SECTOR:
            out += bytes(-len(out) % SECTOR)
        out += entry
    return _padded(bytes(out))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SECTOR)


def _both16(value: int) -> bytes:
    return struct.pack("<H", value) + struct.pack(">H", value)


def _both32(value: int) -> bytes:
    return struct.pack("<I", value) + struct.pack(">I", value)
