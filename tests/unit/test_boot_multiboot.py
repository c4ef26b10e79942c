"""The multiboot loader: both forms of a kernel, what it is told, and that no bad file gets past it."""

from __future__ import annotations

import random
import struct
from collections import Counter

import pytest

from ringzero.errors import ImageError, InputError, UnsupportedError
from ringzero.machine import address_map
from ringzero.machine.boot import BootPlan, plan_boot
from tests.unit.damage import plan_damaged

MIB = 1 << 20
MAGIC = 0x1BADB002


def header(flags: int = 0, *addresses: int, checksum: int | None = None) -> bytes:
    total = (-(MAGIC + flags)) & 0xFFFF_FFFF if checksum is None else checksum
    return struct.pack(f"<III{len(addresses)}I", MAGIC, flags, total, *addresses)


def elf32(
    *segments: tuple[int, int, bytes], entry: int = 0x10_0010, multiboot: bytes | None = None, kind: int = 2
) -> bytes:
    """A 32-bit ELF file with a multiboot header at the beginning of the first segment's bytes."""
    front = header() if multiboot is None else multiboot
    parts = segments or ((0x10_0000, 0x2000, front + b"\x90" * 0x100),)
    at = 52 + 32 * len(parts)
    headers, body = b"", b""
    for address, size, data in parts:
        headers += struct.pack(
            "<IIIIIIII", 1, at + len(body), address | 0xC000_0000, address, len(data), size, 7, 4096
        )
        body += data
    ident = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    head = struct.pack("<16sHHIIIIIHHHHHH", ident, kind, 3, 1, entry, 52, 0, 0, 52, 32, len(parts), 0, 0, 0)
    return head + headers + body


def plain(load_end: int = 0, zeros_end: int = 0, flags: int = 1 << 16) -> bytes:
    """A kernel that is no ELF file: the header, 16 bytes into the file, has the addresses."""
    addresses = (0x20_0010, 0x20_0000, load_end, zeros_end, 0x20_0040)
    return bytes(16) + header(flags, *addresses) + b"\xf4" * 0x100


def information(plan: BootPlan) -> tuple[int, bytes]:
    found = [(p.address, p.data) for p in plan.pieces if p.name == "multiboot information"]
    assert len(found) == 1
    return found[0]


def kernel_pieces(plan: BootPlan) -> list[tuple[int, bytes]]:
    return [(p.address, p.data) for p in plan.pieces if p.name == "kernel"]


def test_an_elf_kernel_is_entered_as_the_specification_says() -> None:
    data = elf32()
    plan = plan_boot(data, memory=64 * MIB, command_line="one two", initrd=b"module", name="small.elf")
    assert plan.protocol == "multiboot"
    registers = plan.registers
    assert registers["rip"] == 0x10_0010
    assert registers["rax"] == 0x2BADB002
    assert registers["cr0"] & 0x8000_0001 == 1
    assert registers["rflags"] & (1 << 9 | 1 << 17) == 0
    assert registers["cs_attributes"] == 0xC09B
    assert kernel_pieces(plan) == [(0x10_0000, data[84:])]
    at, info = information(plan)
    assert registers["rbx"] == at
    flags, lower, upper = struct.unpack_from("<III", info)
    assert flags == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (lower, upper) == (0x9FC00 >> 10, 63 * 1024)
    (line,) = struct.unpack_from("<I", info, 16)
    assert [p.data for p in plan.pieces if p.address == line] == [b"small.elf one two\0"]
    count, modules = struct.unpack_from("<II", info, 20)
    start, end, words, _ = struct.unpack_from("<IIII", info, modules - at)
    assert count == 1
    assert info[words - at] == 0
    assert [p.data for p in plan.pieces if p.address == start] == [b"module"]
    assert (start, end) == (0x10_2000, 0x10_2006), "right behind the kernel, at a page"
    size, where = struct.unpack_from("<II", info, 44)
    rows = []
    while size:
        (step,) = struct.unpack_from("<I", info, where - at)
        rows.append(struct.unpack_from("<QQI", info, where + 4 - at))
        where += step + 4
        size -= step + 4
    assert rows == [(r.address, r.size, r.type) for r in address_map.e820(64 * MIB)]
    (name,) = struct.unpack_from("<I", info, 64)
    assert info[name - at :].startswith(b"ringzero\0")


def test_without_an_initramfs_there_is_no_module() -> None:
    _, info = information(plan_boot(elf32(), memory=64 * MIB))
    assert struct.unpack_from("<II", info, 20) == (0, 0)


def test_upper_memory_ends_at_the_device_hole() -> None:
    _, info = information(plan_boot(elf32(), memory=8192 * MIB))
    assert struct.unpack_from("<I", info, 8) == ((0xC000_0000 - MIB) >> 10,)


@pytest.mark.parametrize(
    ("load_end", "zeros_end", "size", "end"),
    [(0, 0, 304, 0x20_0130), (0x20_0100, 0, 0x100, 0x20_0100), (0x20_0100, 0x20_1000, 0x100, 0x20_1000)],
)
def test_addresses_in_the_header_need_no_elf(load_end: int, zeros_end: int, size: int, end: int) -> None:
    data = plain(load_end, zeros_end)
    plan = plan_boot(data, memory=64 * MIB)
    assert plan.protocol == "multiboot"
    assert plan.registers["rip"] == 0x20_0040
    assert kernel_pieces(plan) == [(0x20_0000, data[:size])]
    assert plan.details["kernel_end"] == end


def test_the_header_is_found_where_it_may_be() -> None:
    padding = bytes(8192 - 12)
    inside = elf32((0x10_0000, 0x4000, padding[: 8192 - 84 - 12] + header()))
    assert plan_boot(inside, memory=64 * MIB).protocol == "multiboot"
    for late in (padding[: 8192 - 84 - 8] + header(), b"\0\0" + header(), header(checksum=5)):
        with pytest.raises(UnsupportedError, match="without a multiboot header"):
            plan_boot(elf32((0x10_0000, 0x4000, late)), memory=64 * MIB)
    decoy = struct.pack("<I", MAGIC) + header()
    assert plan_boot(elf32((0x10_0000, 0x4000, decoy + bytes(64))), memory=64 * MIB).protocol == "multiboot"


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (elf32(multiboot=header(1 << 3)), UnsupportedError, "features 0x8"),
        (elf32(multiboot=header(1 << 2)), UnsupportedError, "video mode"),
        (elf32(entry=0x20_0000), ImageError, "outside"),
        (elf32(kind=1), ImageError, "not an executable"),
        (elf32()[:-1], ImageError, "truncated"),
        (elf32((0x1000, 4096, header() + b"x" * 64), entry=0x1000), ImageError, "below 1 MiB"),
        (elf32((0xFFFF_F000, 4096, header() + b"x" * 64), entry=0xFFFF_F000), ImageError, "no RAM"),
        (plain(load_end=0x20_0200), ImageError, "truncated"),
        (plain(load_end=0x20_0000 - 1), ImageError, "truncated"),
        (
            header(1 << 16, 0x20_0000, 0x20_0010, 0, 0, 0x20_0010) + bytes(64),
            ImageError,
            "not within what it loads",
        ),
        (
            header(1 << 16, 0x20_0010, 0x20_0000, 0, 0, 0x20_0010) + bytes(64),
            ImageError,
            "not within what it loads",
        ),
        (header(1 << 16, 0, 0, 0, 0, 0) + bytes(64), ImageError, "below 1 MiB"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(data: bytes, error: type[InputError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        plan_boot(data, memory=64 * MIB, name="small")
    assert str(caught.value).startswith("small ")
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(InputError, match="behind the kernel: give at least --memory 16M"):
        plan_boot(elf32(), memory=4 * MIB, initrd=bytes(4 * MIB))
    with pytest.raises(InputError, match="give at least --memory 48M"):
        plan_boot(plain(zeros_end=0x20_0000 + 40 * MIB), memory=16 * MIB)


def test_damaged_files_raise_nothing_but_our_own_errors() -> None:
    choose = random.Random(5)
    outcomes: Counter[str] = Counter()
    for good in (elf32(), plain(0x20_0100, 0x20_1000)):
        outcomes.update(plan_damaged(choose, good, rounds=2_000, header=range(120), most=4))
    assert outcomes["plan"] > 30
    assert outcomes["error"] > 30
