"""The vmlinux inside a bzImage: an ELF file, compressed by one of the seven ways that Linux knows.

The kernel's own loader would unpack it too, under translation, and then move it to an address of its own
choice (KASLR). Done here, it takes a tenth of the time, and the kernel's text is the same at every boot, so
that what was translated of it can be kept.

Linux 6.12 Documentation/arch/x86/boot.rst, payload_offset and payload_length: the format is known by its
first bytes; the last four bytes are the unpacked size (scripts/Makefile.lib, size_append).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from ringzero.errors import ImageError

__all__ = ["LARGEST", "unpack"]

LARGEST: Final = 1 << 30
"""No kernel unpacks to more than this many bytes: it must lie below 3 GiB, and moves itself while it starts."""

_LZ4_CHUNK: Final = 8 << 20
"""What a block of the old LZ4 frame unpacks to at most (lz4 doc/lz4_Frame_format.md, Legacy frame)."""


def unpack(payload: memoryview, name: str = "kernel") -> bytes | None:
    """Return the vmlinux in `payload`; None when it is packed in a way that is not known here.

    Raises ImageError when it is damaged: then the kernel could not unpack itself either.
    """
    decompress = next((way for magic, way in _FORMATS.items() if payload[: len(magic)] == magic), None)
    if decompress is None:
        return None
    (size,) = struct.unpack("<I", payload[-4:])
    if not 0 < size <= LARGEST:
        raise ImageError(f"{name} says that it unpacks to {size} bytes, which no kernel does: fetch it again")
    try:
        data = decompress(payload, size)
    except Exception as error:  # each library has errors of its own, and none of them is ours to tell apart
        raise ImageError(f"{name} has a damaged payload ({error}): fetch or build it again") from error
    if len(data) != size:
        raise ImageError(f"{name} unpacks to {len(data)} bytes and should to {size}: fetch or build it again")
    return data


# Each takes the payload and the size to expect, and makes no more than one byte beyond that: a payload that
# claims little and unpacks to terabytes is refused by its length. What they need is loaded when it is needed.


def _gzip(payload: memoryview, size: int) -> bytes:
    import zlib

    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(payload, size + 1)


def _bzip2(payload: memoryview, size: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(payload, size + 1)


def _xz(payload: memoryview, size: int) -> bytes:
    import lzma

    # FORMAT_AUTO: .xz and the older .lzma; the branch filter for x86 that Linux uses is named in the stream.
    return lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=LARGEST).decompress(payload, size + 1)


def _lz4(payload: memoryview, size: int) -> bytes:
    import lz4.block

    parts: list[bytes] = []
    at, made, end = 4, 0, len(payload) - 4
    while at < end and made <= size:
        (length,) = struct.unpack_from("<I", payload, at)
        at += 4
        if not 0 < length <= end - at:
            raise ValueError(f"a block of {length} bytes at {at:#x}")
        parts.append(lz4.block.decompress(payload[at : at + length], uncompressed_size=_LZ4_CHUNK))
        made += len(parts[-1])
        at += length
    return b"".join(parts)


def _zstd(payload: memoryview, size: int) -> bytes:
    import zstandard

    # Linux packs in one frame with a window as large as the kernel (zstd -22 --ultra).
    reader = zstandard.ZstdDecompressor(max_window_size=LARGEST).stream_reader(payload)
    return reader.read(size + 1)


_FORMATS: Final[dict[bytes, Callable[[memoryview, int], bytes]]] = {
    b"\x1f\x8b": _gzip,
    b"\x1f\x9e": _gzip,
    b"BZh": _bzip2,
    b"\xfd7zXZ\0": _xz,
    b"\x5d\0\0": _xz,
    b"\x02\x21\x4c\x18": _lz4,
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""By the first bytes. LZO is missing: no distribution ships it, and such a kernel unpacks itself."""
