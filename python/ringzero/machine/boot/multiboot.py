"""A small kernel, by the Multiboot Specification version 0.6.96 ("multiboot 1").

Somewhere in the first 8 KiB of the file there is a header with a magic number and a checksum. The kernel is
a 32-bit ELF file, or anything at all when the header itself has the addresses (flag 16). It is entered in
32-bit protected mode without paging, with EAX = a magic number and EBX = the address of an information
structure: command line, modules (an initramfs is the only one here), memory map.

The file is not trusted: every offset and size is checked before it is used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from ringzero.errors import ImageError, InputError, UnsupportedError
from ringzero.machine import address_map, cpu_state
from ringzero.machine.boot import elf
from ringzero.machine.boot.layout import Piece, Start

__all__ = ["LOADER_MAGIC", "Header", "find_header", "looks_like", "plan"]

_MAGIC: Final = 0x1BAD_B002
LOADER_MAGIC: Final = 0x2BAD_B002
"""What EAX holds when the kernel is entered."""
_SEARCHED: Final = 8192
_HEADER: Final = struct.Struct("<III")
_ADDRESSES: Final = struct.Struct("<IIIII")

_WANTS_VIDEO: Final = 1 << 2
_HAS_ADDRESSES: Final = 1 << 16
_KNOWN_DEMANDS: Final = 0b111
"""Page-aligned modules, memory information and a video mode. A loader that does not know a demand (bits
0-15) must give up; bits 16-31 are offers that it may pass over."""

# Flags of the information structure: which of its fields are there.
_INFO_MEMORY: Final = 1 << 0
_INFO_COMMAND_LINE: Final = 1 << 2
_INFO_MODULES: Final = 1 << 3
_INFO_MEMORY_MAP: Final = 1 << 6
_INFO_LOADER_NAME: Final = 1 << 9
_INFO_SIZE: Final = 116
_LOADER_NAME: Final = b"ringzero\0"


@dataclass(frozen=True)
class Header:
    """A multiboot header: where it is in the file, what it asks for, and its five addresses if it has any
    (of the header itself, the first and last byte to load, the end of the zeros behind that, the entry).
    """

    offset: int
    flags: int
    addresses: tuple[int, ...] | None


def find_header(data: bytes) -> Header | None:
    """Return the multiboot header of a file, or None when it has none: aligned, whole, and summing to zero."""
    searched = data[:_SEARCHED]
    at = -1
    while (at := searched.find(struct.pack("<I", _MAGIC), at + 1)) >= 0:
        if at % 4 or at + _HEADER.size > len(searched):
            continue
        magic, flags, checksum = _HEADER.unpack_from(searched, at)
        if (magic + flags + checksum) & 0xFFFF_FFFF:
            continue
        if not flags & _HAS_ADDRESSES:
            return Header(at, flags, None)
        if at + _HEADER.size + _ADDRESSES.size <= len(searched):
            return Header(at, flags, _ADDRESSES.unpack_from(searched, at + _HEADER.size))
    return None


def looks_like(data: bytes) -> bool:
    """Say whether a file is for this protocol: one with a header, but not a 64-bit ELF file, which others
    load better.
    """
    if data[:4] == elf.MAGIC and not elf.is_32_bit(data):
        return False
    return find_header(data) is not None


def plan(data: bytes, *, memory: int, initrd: bytes | None, name: str, initrd_name: str) -> Start:
    """Return the pieces and registers that start a multiboot kernel.

    The caller puts the command line at `address_map.COMMAND_LINE`. Raises ImageError, UnsupportedError or
    InputError when the kernel cannot be started.
    """
    header = find_header(data)
    if header is None:
        raise ImageError(f"{name} has no multiboot header: give a multiboot kernel")
    unknown = header.flags & 0xFFFF & ~_KNOWN_DEMANDS
    if unknown:
        raise UnsupportedError(
            f"{name} demands multiboot features {unknown:#x}, which do not exist here: build it without"
        )
    if header.flags & _WANTS_VIDEO:
        raise UnsupportedError(f"{name} demands a video mode, and a machine has no screen: build it without")
    image = _by_addresses(data, header, name) if header.addresses else elf.parse_32_bit(data, name)
    elf.check_placement(image, image.entry, memory=memory, name=name)
    pieces = [Piece("kernel", segment.address, segment.data) for segment in image.segments if segment.data]
    details = {"kernel": image.start, "kernel_end": image.end}
    module: tuple[int, int] | None = None
    if initrd is not None:
        # Right behind the kernel, as boot loaders do it: small kernels map little memory.
        at = -(-image.end // address_map.PAGE) * address_map.PAGE
        if at + len(initrd) > address_map.low_ram_size(memory):
            needed = -(-(at + len(initrd)) // (16 * address_map.MIB)) * 16
            advice = (
                f"give at least --memory {needed}M"
                if needed << 20 <= address_map.LOW_RAM_LIMIT
                else "make it smaller"
            )
            raise InputError(
                f"{initrd_name} does not fit into {memory >> 20} MiB of memory behind the kernel: {advice}"
            )
        module = (at, at + len(initrd))
        pieces.append(Piece("initramfs", at, initrd))
        details |= {"initrd": at, "initrd_size": len(initrd)}
    pieces.append(Piece("multiboot information", address_map.START_INFO, _information(memory, module)))
    registers = cpu_state.protected_mode32(entry=image.entry, rax=LOADER_MAGIC, rbx=address_map.START_INFO)
    return Start("multiboot", pieces, registers, details)


def _by_addresses(data: bytes, header: Header, name: str) -> elf.ElfImage:
    """Return the one segment that the addresses in the header describe."""
    assert header.addresses is not None
    header_address, load, load_end, zeros_end, entry = header.addresses
    first = header.offset - (header_address - load)
    if load > header_address or first < 0:
        raise ImageError(f"{name} has a multiboot header that is not within what it loads: build it again")
    size = (load_end - load) if load_end else len(data) - first
    if size <= 0 or first + size > len(data):
        raise ImageError(
            f"{name} is truncated: its multiboot header points behind its end, so fetch or build it again"
        )
    memory_size = max(size, zeros_end - load if zeros_end else 0)
    return elf.ElfImage((elf.Segment(load, memory_size, data[first : first + size]),), entry, None)


def _information(memory: int, module: tuple[int, int] | None) -> bytes:
    """Return the information structure for START_INFO, followed by module list, memory map and our name."""
    at = address_map.START_INFO
    modules_at, map_at, name_at = at + 128, at + 160, at + 144
    # The last field of a module is reserved; the one before is its command line, an empty string here: the
    # four zero bytes after the module.
    modules = struct.pack("<IIII", *module, modules_at + 12, 0) if module else b""
    rows = b"".join(
        struct.pack("<IQQI", 20, row.address, row.size, row.type) for row in address_map.e820(memory)
    )
    flags = _INFO_MEMORY | _INFO_COMMAND_LINE | _INFO_MODULES | _INFO_MEMORY_MAP | _INFO_LOADER_NAME
    low = address_map.EBDA >> 10
    high = (address_map.low_ram_size(memory) - address_map.MIB) >> 10
    info = bytearray(_INFO_SIZE)
    struct.pack_into("<IIII", info, 0, flags, low, high, 0)
    struct.pack_into("<I", info, 16, address_map.COMMAND_LINE)
    struct.pack_into("<II", info, 20, 1 if module else 0, modules_at if module else 0)
    struct.pack_into("<II", info, 44, len(rows), map_at)
    struct.pack_into("<I", info, 64, name_at)
    return bytes(info).ljust(128, b"\0") + modules.ljust(16, b"\0") + _LOADER_NAME.ljust(16, b"\0") + rows
