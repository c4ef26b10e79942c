"""A Linux bzImage, by the 64-bit boot protocol (Linux 6.12 Documentation/arch/x86/boot.rst).

The file is a boot sector and setup code (`setup_sects` sectors of 512 bytes and one more), then the
"protected-mode kernel", of which `syssize` says the size in 16-byte units. Only the latter is loaded; its
64-bit entry point is 0x200 behind its first byte. The setup header, from 0x1F1 of the file, says where it
wants to be and how much room it needs. Inside is the kernel proper, packed: `ringzero.machine.boot.payload`
unpacks it for a start that skips the loader around it.

The file is not trusted: a field that is out of its range is an ImageError, never an exception of Python's
own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from ringzero.errors import ImageError, InputError, UnsupportedError
from ringzero.machine import address_map, cpu_state
from ringzero.machine.boot import elf
from ringzero.machine.boot.layout import Piece, Start, boot_params, place_initrd

__all__ = ["BzImage", "looks_like", "parse", "plan"]

_BOOT_FLAG: Final = 0xAA55
_MAGIC: Final = b"HdrS"
_HEADER: Final = 0x1F1
_SECTOR: Final = 512
_ENTRY_64: Final = 0x200
_XLF_KERNEL_64: Final = 1 << 0
_LOADED_HIGH: Final = 1 << 0
_OLDEST: Final = 0x020C
"""2.12 (Linux 3.8) brought xloadflags, without which nothing says that there is a 64-bit entry point."""


@dataclass(frozen=True)
class BzImage:
    """What the setup header of a bzImage says, checked. Addresses and sizes in bytes."""

    version: int
    header: bytes = field(repr=False)
    kernel_offset: int
    kernel_size: int
    payload_offset: int
    payload_size: int
    alignment: int
    relocatable: bool
    preferred_address: int
    init_size: int
    initrd_highest: int
    command_line_limit: int

    def payload(self, data: bytes) -> memoryview:
        """Return the packed vmlinux in the file `data`; empty when the header names none."""
        start = self.kernel_offset + self.payload_offset
        return memoryview(data)[start : start + self.payload_size]


def looks_like(data: bytes) -> bool:
    """Say whether a file claims to be a Linux boot image: a boot sector's signature, and more than a boot
    sector.
    """
    return len(data) >= _SECTOR and data[0x1FE:0x200] == struct.pack("<H", _BOOT_FLAG)


def parse(data: bytes, name: str = "kernel") -> BzImage:
    """Return the checked setup header of a bzImage.

    Raises ImageError when it is no kernel, truncated or inconsistent, UnsupportedError when it is too old or
    32-bit.
    """
    if not looks_like(data):
        raise ImageError(f"{name} is not a Linux bzImage: give a kernel such as /boot/vmlinuz-*")
    if data[0x202:0x206] != _MAGIC:
        if len(data) < 0x206:
            raise _truncated(name, len(data), 0x206)
        raise ImageError(
            f"{name} is a boot sector but not a Linux kernel: give a kernel such as /boot/vmlinuz-*"
        )
    if len(data) < 0x208:
        raise _truncated(name, len(data), 0x208)
    (version,) = struct.unpack_from("<H", data, 0x206)
    if version < _OLDEST:
        raise UnsupportedError(
            f"{name} speaks boot protocol {version >> 8}.{version & 255:02d}: 2.12 (Linux 3.8) or newer is needed"
        )
    header_end = 0x202 + data[0x201]
    if header_end < 0x264:
        raise ImageError(
            f"{name} has a setup header that ends at {header_end:#x}, too early: fetch or build it again"
        )
    if len(data) < max(header_end, 0x26C):
        raise _truncated(name, len(data), max(header_end, 0x26C))
    setup_sectors = data[0x1F1] or 4
    (paragraphs,) = struct.unpack_from("<I", data, 0x1F4)
    alignment, relocatable = struct.unpack_from("<IB", data, 0x230)
    xloadflags, command_line_limit = struct.unpack_from("<HI", data, 0x236)
    preferred_address, init_size = struct.unpack_from("<QI", data, 0x258)
    (initrd_highest,) = struct.unpack_from("<I", data, 0x22C)
    payload_offset, payload_size = struct.unpack_from("<II", data, 0x248)
    if not data[0x211] & _LOADED_HIGH:
        raise UnsupportedError(f"{name} is a zImage, which loads below 1 MiB: build a bzImage")
    if not xloadflags & _XLF_KERNEL_64:
        raise UnsupportedError(
            f"{name} is a 32-bit kernel, which is not supported yet: give an x86-64 kernel"
        )
    kernel_offset = (setup_sectors + 1) * _SECTOR
    kernel_size = paragraphs * 16
    if kernel_size <= _ENTRY_64:
        raise ImageError(
            f"{name} says that its kernel has {kernel_size} bytes, too few: fetch or build it again"
        )
    # syssize is rounded up to a paragraph, so the last one may be short in the file.
    if len(data) < kernel_offset + kernel_size - 15:
        raise _truncated(name, len(data), kernel_offset + kernel_size)
    kernel_size = min(kernel_size, len(data) - kernel_offset)
    if alignment & (alignment - 1) or not address_map.PAGE <= alignment <= address_map.GIB:
        raise ImageError(
            f"{name} wants an alignment of {alignment:#x}, which is no power of two: fetch it again"
        )
    if init_size < kernel_size:
        raise ImageError(f"{name} says that it needs less room than it has bytes: fetch or build it again")
    if not address_map.LOADABLE <= preferred_address < address_map.LOW_RAM_LIMIT:
        raise ImageError(
            f"{name} wants to be loaded at {preferred_address:#x}, which no kernel does: fetch it again"
        )
    if payload_offset + payload_size > kernel_size:
        raise _truncated(name, len(data), kernel_offset + payload_offset + payload_size)
    return BzImage(
        version=version,
        header=data[_HEADER:header_end],
        kernel_offset=kernel_offset,
        kernel_size=kernel_size,
        payload_offset=payload_offset,
        payload_size=payload_size,
        alignment=alignment,
        relocatable=bool(relocatable),
        preferred_address=preferred_address,
        init_size=init_size,
        initrd_highest=initrd_highest,
        command_line_limit=command_line_limit,
    )


def _truncated(name: str, size: int, wanted: int) -> ImageError:
    return ImageError(
        f"{name} is truncated: it has {size} bytes and should have {wanted}: fetch or build it again"
    )


def plan(
    image: BzImage,
    data: bytes,
    *,
    memory: int,
    command_line_size: int,
    initrd: bytes | None,
    rsdp: int,
    name: str,
    initrd_name: str,
    vmlinux: memoryview | None = None,
) -> Start:
    """Return the pieces and registers that start a bzImage.

    `command_line_size` counts the final zero, which the kernel's own limit does not. The kernel goes to its
    preferred address: a 64-bit Linux never runs below it (arch/x86/boot/compressed/head_64.S moves itself up
    to LOAD_PHYSICAL_ADDR), so lower places gain nothing. With `vmlinux`, the payload unpacked, that is loaded
    at the addresses it was linked for, and entered as the kernel's own loader would (the same protocol; the
    loader's work is done). Raises InputError when something does not fit.
    """
    if image.command_line_limit and command_line_size - 1 > image.command_line_limit:
        raise InputError(
            f"the kernel command line has {command_line_size - 1} bytes, and {name} takes {image.command_line_limit}: "
            "shorten it"
        )
    if memory < address_map.LEAST_LINUX_MEMORY:
        raise InputError(
            f"{memory >> 20} MiB of memory is too small for {name}: Linux needs at least "
            f"--memory {address_map.LEAST_LINUX_MEMORY >> 20}M"
        )
    address = image.preferred_address
    end = address + image.init_size
    if end > address_map.low_ram_size(memory):
        needed = -(-end // (16 * address_map.MIB)) * 16
        if needed << 20 > address_map.LOW_RAM_LIMIT:
            raise ImageError(
                f"{name} says that it needs {image.init_size >> 20} MiB, too many: fetch or build it again"
            )
        raise InputError(
            f"{name} needs {-(-end >> 20)} MiB to start, and the machine has {memory >> 20} MiB: "
            f"give at least --memory {needed}M"
        )
    if vmlinux is None:
        entry = address + _ENTRY_64
        kernel = memoryview(data)[image.kernel_offset : image.kernel_offset + image.kernel_size]
        pieces = [Piece("kernel", address, kernel)]
    else:
        unpacked = elf.parse(vmlinux, name)
        entry = unpacked.entry
        # What the header promises of the room must hold for what is in it.
        if unpacked.start < address or unpacked.end > end or not unpacked.is_loaded(entry):
            raise ImageError(f"{name} unpacks to more than its header says: fetch or build it again")
        pieces = [Piece("kernel", part.address, part.data) for part in unpacked.segments if part.data]
    details = {"kernel": address, "kernel_end": end}
    where: tuple[int, int] | None = None
    if initrd is not None:
        # 0x37FFFFFF is what the protocol gives for a kernel that says nothing.
        highest = image.initrd_highest or 0x37FF_FFFF
        at = place_initrd(len(initrd), memory=memory, kernel_end=end, highest=highest, name=initrd_name)
        where = (at, len(initrd))
        pieces.append(Piece("initramfs", at, initrd))
        details |= {"initrd": at, "initrd_size": len(initrd)}
    page = boot_params(image.header, rows=address_map.e820(memory), rsdp=rsdp, initrd=where)
    pieces.append(Piece("boot_params", address_map.BOOT_PARAMS, page))
    registers = cpu_state.long_mode(entry=entry, rsi=address_map.BOOT_PARAMS)
    return Start("linux64" if vmlinux is None else "vmlinux", pieces, registers, details)
