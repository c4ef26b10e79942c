"""What every protocol puts into low memory, and where an initramfs goes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ringzero.errors import InputError
from ringzero.machine import address_map, cpu_state
from ringzero.machine.address_map import E820Row

__all__ = ["Piece", "Start", "boot_params", "command_line_bytes", "common_pieces", "place_initrd"]


@dataclass(frozen=True)
class Piece:
    """Some bytes that go to a guest physical address."""

    name: str
    address: int
    data: bytes | memoryview = field(repr=False)

    @property
    def end(self) -> int:
        """The first address behind the piece."""
        return self.address + len(self.data)


@dataclass(frozen=True)
class Start:
    """What one protocol adds to the common pieces."""

    protocol: str
    pieces: Sequence[Piece]
    registers: Mapping[str, int]
    details: Mapping[str, int]


def command_line_bytes(text: str) -> bytes:
    """Return the command line as the guest gets it, with its final zero. Raises InputError for a zero
    inside.
    """
    if "\0" in text:
        raise InputError("the kernel command line holds a null character: remove it")
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InputError(
            "the kernel command line holds characters that cannot be encoded: remove them"
        ) from None
    return data + b"\0"


def common_pieces(command_line: bytes) -> list[Piece]:
    """Return the pieces that no protocol can do without: BIOS data area, GDT, page tables, command line.

    `command_line` is the result of `command_line_bytes`. Raises InputError when it is longer than any guest
    could take.
    """
    if len(command_line) > address_map.COMMAND_LINE_MAXIMUM:
        most = address_map.COMMAND_LINE_MAXIMUM - 1
        raise InputError(
            f"the kernel command line has {len(command_line) - 1} bytes: at most {most} fit, shorten it"
        )
    # Where Linux looks for the EBDA (0x40E, a segment) and the size of conventional memory in KiB (0x413).
    bios_data = bytearray(0x100)
    struct.pack_into("<H", bios_data, 0x0E, address_map.EBDA >> 4)
    struct.pack_into("<H", bios_data, 0x13, address_map.EBDA >> 10)
    return [
        Piece("BIOS data area", address_map.BIOS_DATA_AREA, bytes(bios_data)),
        Piece("GDT", address_map.GDT, cpu_state.gdt()),
        Piece(
            "page tables", address_map.PAGE_TABLES, cpu_state.identity_page_tables(address_map.PAGE_TABLES)
        ),
        Piece("command line", address_map.COMMAND_LINE, command_line),
    ]


def place_initrd(
    size: int, *, memory: int, kernel_end: int, highest: int, name: str, alignment: int = address_map.PAGE
) -> int:
    """Return the address for an initramfs of `size` bytes: as high as possible, where the kernel does not
    unpack itself.

    `kernel_end` is the first address behind the kernel and all the room it needs, `highest` the last address
    that an initramfs may have. Raises InputError when it does not fit.
    """
    top = min(address_map.low_ram_size(memory), highest + 1)
    address = (top - size) // alignment * alignment
    if address < kernel_end:
        # What would do, for as long as the limit is memory and not `highest`.
        needed = _round_up(kernel_end + size + alignment, 16 * address_map.MIB) >> 20
        if top == address_map.low_ram_size(memory) and needed << 20 <= min(
            address_map.LOW_RAM_LIMIT, highest + 1
        ):
            advice = f"give at least --memory {needed}M"
        else:
            advice = "make it smaller"
        raise InputError(
            f"{name} has {_mib(size)} MiB and does not fit into {memory >> 20} MiB of memory "
            f"beside the kernel: {advice}"
        )
    return address


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}"


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


# Offsets in struct boot_params (Documentation/arch/x86/zero-page.rst).
_BP_ACPI_RSDP = 0x070
_BP_E820_ENTRIES = 0x1E8
_BP_E820_TABLE = 0x2D0
_BP_E820_MAXIMUM = 128
_BP_HEADER = 0x1F1


def boot_params(
    header: bytes,
    *,
    rows: Sequence[E820Row],
    rsdp: int,
    initrd: tuple[int, int] | None,
    alignment: int | None = None,
) -> bytes:
    """Return the 4 KiB "zero page" with a setup header, memory map, initramfs (address, size) and RSDP
    address.

    `header` is the kernel's own setup header from offset 0x1F1, or empty: then enough of one is made up that
    a Linux entered at its 64-bit ELF entry point accepts it. `alignment` is the kernel's alignment in that
    case.
    """
    page = bytearray(4096)
    if header:
        page[_BP_HEADER : _BP_HEADER + len(header)] = header
    else:
        struct.pack_into("<H", page, 0x1FE, 0xAA55)
        struct.pack_into("<4sH", page, 0x202, b"HdrS", 0x020F)
        struct.pack_into("<I", page, 0x22C, 0x7FFF_FFFF)
        struct.pack_into("<I", page, 0x230, alignment or 0x20_0000)
    struct.pack_into("<H", page, 0x1FA, 0xFFFF)  # vid_mode: normal
    page[0x210] = 0xFF  # type_of_loader: one without a number
    # LOADED_HIGH, no QUIET, no KEEP_SEGMENTS; CAN_USE_HEAP stays clear, since no 16-bit code runs.
    page[0x211] |= 0x01
    page[0x211] &= ~0x80 & 0xFF
    address, size = initrd or (0, 0)
    struct.pack_into("<II", page, 0x218, address, size)
    struct.pack_into("<I", page, 0x228, address_map.COMMAND_LINE)
    struct.pack_into("<Q", page, 0x250, 0)  # setup_data: whatever the file says, there is none in memory
    struct.pack_into("<Q", page, _BP_ACPI_RSDP, rsdp)
    rows = rows[:_BP_E820_MAXIMUM]
    page[_BP_E820_ENTRIES] = len(rows)
    for i, row in enumerate(rows):
        struct.pack_into("<QQI", page, _BP_E820_TABLE + 20 * i, row.address, row.size, row.type)
    return bytes(page)
