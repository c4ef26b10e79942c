"""An ELF kernel: by its PVH entry when it has one, else at its entry point in long mode.

PVH (Xen docs/misc/pvh.pandoc and include/public/arch-x86/hvm/start_info.h; in Linux arch/x86/platform/pvh/):
a note names a 32-bit entry point; ebx points to `hvm_start_info`, which has the memory map, the command line
and the initramfs. Without the note, the file is entered at `e_entry` with both worlds' arguments: rsi =
boot_params, as a Linux vmlinux wants it, and rdi = rbx = hvm_start_info, as our own guests do.

The file is not trusted: every offset and size is checked before it is used.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ringzero.errors import ImageError, InputError, UnsupportedError
from ringzero.machine import address_map, cpu_state
from ringzero.machine.boot.layout import Piece, Start, boot_params, place_initrd

__all__ = [
    "MAGIC",
    "ElfImage",
    "Segment",
    "check_placement",
    "is_32_bit",
    "parse",
    "parse_32_bit",
    "plan",
]

MAGIC: Final = b"\x7fELF"
_CLASS_32, _CLASS_64 = 1, 2
_LITTLE_ENDIAN: Final = 1
_TYPE_EXECUTABLE, _TYPE_SHARED = 2, 3
_MACHINE_I386, _MACHINE_X86_64 = 3, 62
_LOAD, _NOTE = 1, 4
_MOST_HEADERS: Final = 128
_MOST_NOTE_BYTES: Final = 1 << 20
_XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
_START_INFO_MAGIC: Final = 0x336E_C578
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_HEADER_32: Final = struct.Struct("<16sHHIIIIIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_PROGRAM_HEADER_32: Final = struct.Struct("<IIIIIIII")


@dataclass(frozen=True)
class Segment:
    """One loadable part: `data` goes to guest physical `address`, zeros follow up to `memory_size`."""

    address: int
    memory_size: int
    data: bytes | memoryview = field(repr=False)

    @property
    def end(self) -> int:
        """The first address behind the segment."""
        return self.address + self.memory_size


@dataclass(frozen=True)
class ElfImage:
    """What matters of an ELF kernel, checked: its segments and its entry points (`pvh_entry` None without a
    note). `segments` are in the order of their addresses and do not overlap.
    """

    segments: tuple[Segment, ...]
    entry: int
    pvh_entry: int | None

    @property
    def start(self) -> int:
        """The lowest address."""
        return min(segment.address for segment in self.segments)

    @property
    def end(self) -> int:
        """The first address behind all segments."""
        return max(segment.end for segment in self.segments)

    def is_loaded(self, address: int) -> bool:
        """Say whether a guest physical address lies in one of the segments."""
        return any(segment.address <= address < segment.end for segment in self.segments)


def is_32_bit(data: bytes | memoryview) -> bool:
    """Say whether an ELF file is one for 32-bit x86 processors."""
    if len(data) < _HEADER_32.size or data[:4] != MAGIC or data[4] != _CLASS_32:
        return False
    (machine,) = struct.unpack_from("<H", data, 18)
    return bool(data[5] == _LITTLE_ENDIAN and machine == _MACHINE_I386)


def parse(data: bytes | memoryview, name: str = "kernel") -> ElfImage:
    """Return the checked parts of an ELF kernel for x86-64.

    Raises ImageError when it is truncated, inconsistent or no kernel, UnsupportedError when it is for another
    processor.
    """
    if data[:4] != MAGIC:
        raise ImageError(f"{name} is not an ELF file: give an ELF kernel (vmlinux) or a bzImage")
    if is_32_bit(data):
        raise UnsupportedError(
            f"{name} is a 32-bit kernel without a multiboot header, which is not supported yet: "
            "give an x86-64 kernel"
        )
    if len(data) < _HEADER.size:
        raise _truncated(name)
    ident, kind, machine, _, entry, table, _, _, _, entry_size, count, _, _, _ = _HEADER.unpack_from(data)
    if ident[4] != _CLASS_64 or ident[5] != _LITTLE_ENDIAN or machine != _MACHINE_X86_64:
        raise UnsupportedError(f"{name} is an ELF file for another processor: give an x86-64 kernel")
    headers = _program_headers(data, name, kind, table, entry_size, count, _PROGRAM_HEADER)
    rows = [_Row(row[0], row[2], row[4], row[5], row[6], row[7]) for row in headers]
    return _image(data, name, entry, rows)


def parse_32_bit(data: bytes, name: str = "kernel") -> ElfImage:
    """Return the checked parts of an ELF kernel of which `is_32_bit` is true. Raises ImageError as `parse`."""
    _, kind, _, _, entry, table, _, _, _, entry_size, count, _, _, _ = _HEADER_32.unpack_from(data)
    headers = _program_headers(data, name, kind, table, entry_size, count, _PROGRAM_HEADER_32)
    rows = [_Row(row[0], row[1], row[3], row[4], row[5], row[7]) for row in headers]
    return _image(data, name, entry, rows)


@dataclass(frozen=True)
class _Row:
    """What a program header says, whatever its width."""

    kind: int
    offset: int
    physical: int
    file_size: int
    memory_size: int
    alignment: int


def _program_headers(
    data: bytes | memoryview,
    name: str,
    kind: int,
    table: int,
    entry_size: int,
    count: int,
    layout: struct.Struct,
) -> list[tuple[int, ...]]:
    """Return the rows of the program header table, which lies within the file."""
    if kind not in (_TYPE_EXECUTABLE, _TYPE_SHARED):
        raise ImageError(f"{name} is an ELF file but not an executable: give a linked kernel (vmlinux)")
    if entry_size != layout.size or not 0 < count <= _MOST_HEADERS:
        raise ImageError(f"{name} has no usable ELF program headers: give a linked kernel (vmlinux)")
    if table + count * entry_size > len(data):
        raise _truncated(name)
    return [layout.unpack_from(data, table + i * entry_size) for i in range(count)]


def _image(data: bytes | memoryview, name: str, entry: int, rows: list[_Row]) -> ElfImage:
    """Return what the program headers say is to be loaded."""
    segments = []
    pvh_entry = None
    for row in rows:
        if row.kind not in (_LOAD, _NOTE):
            continue
        if row.offset + row.file_size > len(data):
            raise _truncated(name)
        if row.kind == _NOTE:
            if pvh_entry is None:
                note = data[row.offset : row.offset + min(row.file_size, _MOST_NOTE_BYTES)]
                pvh_entry = _pvh_entry(bytes(note), row.alignment)
        elif row.memory_size:
            if row.file_size > row.memory_size:
                raise ImageError(
                    f"{name} has an ELF segment larger in the file than in memory: build it again"
                )
            segments.append(
                Segment(row.physical, row.memory_size, data[row.offset : row.offset + row.file_size])
            )
    if not segments:
        raise ImageError(f"{name} has nothing to load: give a linked kernel (vmlinux)")
    segments.sort(key=lambda segment: segment.address)
    for before, after in itertools.pairwise(segments):
        if after.address < before.end:
            raise ImageError(f"{name} has ELF segments that overlap: build it again")
    return ElfImage(tuple(segments), entry, pvh_entry)


def _truncated(name: str) -> ImageError:
    return ImageError(
        f"{name} is truncated: its ELF headers point behind its end, so fetch or build it again"
    )


def _notes(data: bytes, alignment: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield (name, type, descriptor) of the notes in a PT_NOTE segment; stops at the first that does not
    fit.
    """
    step = 8 if alignment == 8 else 4
    at = 0
    while at + 12 <= len(data):
        name_size, descriptor_size, kind = struct.unpack_from("<III", data, at)
        at += 12
        name_end = at + name_size
        descriptor = -(-name_end // step) * step
        if descriptor + descriptor_size > len(data):
            return
        yield data[at:name_end], kind, data[descriptor : descriptor + descriptor_size]
        at = -(-(descriptor + descriptor_size) // step) * step


def _pvh_entry(data: bytes, alignment: int) -> int | None:
    for name, kind, descriptor in _notes(data, alignment):
        # The address has 4 bytes in the documentation and 8 in what Linux for x86-64 emits.
        if name.rstrip(b"\0") == b"Xen" and kind == _XEN_ELFNOTE_PHYS32_ENTRY and len(descriptor) in (4, 8):
            return int.from_bytes(descriptor, "little")
    return None


def check_placement(image: ElfImage, entry: int, *, memory: int, name: str) -> None:
    """Raise ImageError or InputError when an image does not fit where it wants to be, or is entered elsewhere."""
    low = address_map.low_ram_size(memory)
    if image.start < address_map.LOADABLE:
        raise ImageError(
            f"{name} wants to be loaded at {image.start:#x}, and memory below 1 MiB is taken: link it at 1 MiB or above"
        )
    if image.end > address_map.LOW_RAM_LIMIT:
        raise ImageError(
            f"{name} wants to be loaded at {image.end - 1:#x}, where no RAM can be: build it again"
        )
    if image.end > low:
        needed = -(-image.end // (16 * address_map.MIB)) * 16
        raise InputError(
            f"{name} needs {-(-image.end >> 20)} MiB to start, and the machine has {memory >> 20} MiB: "
            f"give at least --memory {needed}M"
        )
    if not image.is_loaded(entry):
        raise ImageError(f"{name} has its entry point {entry:#x} outside of what it loads: build it again")


def plan(
    image: ElfImage,
    *,
    memory: int,
    command_line_size: int,
    initrd: bytes | None,
    rsdp: int,
    name: str,
    initrd_name: str,
    enter_long_mode: bool = False,
) -> Start:
    """Return the pieces and registers that start an ELF kernel; raises ImageError or InputError when it
    cannot be.

    `enter_long_mode` ignores the PVH entry. Memory behind a segment's file bytes is not written: a machine's
    RAM is zero at the start.
    """
    del command_line_size  # an ELF kernel states no limit of its own
    pvh = image.pvh_entry is not None and not enter_long_mode
    entry = image.pvh_entry if pvh and image.pvh_entry is not None else image.entry
    check_placement(image, entry, memory=memory, name=name)
    pieces = [Piece("kernel", segment.address, segment.data) for segment in image.segments if segment.data]
    details = {"kernel": image.start, "kernel_end": image.end}
    where: tuple[int, int] | None = None
    if initrd is not None:
        at = place_initrd(
            len(initrd),
            memory=memory,
            kernel_end=image.end,
            highest=address_map.LOW_RAM_LIMIT - 1,
            name=initrd_name,
        )
        where = (at, len(initrd))
        pieces.append(Piece("initramfs", at, initrd))
        details |= {"initrd": at, "initrd_size": len(initrd)}
    rows = address_map.e820(memory)
    pieces.append(Piece("start_info", address_map.START_INFO, _start_info(rows, rsdp, where)))
    if pvh:
        return Start(
            "pvh", pieces, cpu_state.protected_mode32(entry=entry, rbx=address_map.START_INFO), details
        )
    pieces.append(
        Piece("boot_params", address_map.BOOT_PARAMS, boot_params(b"", rows=rows, rsdp=rsdp, initrd=where))
    )
    registers = cpu_state.long_mode(
        entry=entry, rsi=address_map.BOOT_PARAMS, rdi=address_map.START_INFO, rbx=address_map.START_INFO
    )
    return Start("elf64", pieces, registers, details)


def _start_info(rows: list[address_map.E820Row], rsdp: int, initrd: tuple[int, int] | None) -> bytes:
    """Return hvm_start_info version 1 for START_INFO, followed by the module list and the memory map."""
    modules_at = address_map.START_INFO + 64
    map_at = address_map.START_INFO + 128
    modules = struct.pack("<QQQQ", *initrd, 0, 0) if initrd else b""
    memory_map = b"".join(struct.pack("<QQII", row.address, row.size, row.type, 0) for row in rows)
    info = struct.pack(
        "<IIIIQQQQII",
        _START_INFO_MAGIC,
        1,  # version: with a memory map
        0,
        1 if initrd else 0,
        modules_at if initrd else 0,
        address_map.COMMAND_LINE,
        rsdp,
        map_at,
        len(rows),
        0,
    )
    return info.ljust(64, b"\0") + modules.ljust(64, b"\0") + memory_map
