"""The ELF loader: PVH and 64-bit entry, and that no bad file gets past it."""

from __future__ import annotations

import random
import struct

import pytest

from ringzero.errors import ImageError, InputError, UnsupportedError
from ringzero.machine import address_map
from ringzero.machine.boot import BootPlan, plan_boot
from ringzero.machine.boot.elf import parse
from tests.unit.damage import plan_damaged

MIB = 1 << 20
PVH_ENTRY = 0x10_0010


def note(entry: int = PVH_ENTRY, size: int = 8, name: bytes = b"Xen\0", kind: int = 18) -> bytes:
    return struct.pack("<III", len(name), size, kind) + name + entry.to_bytes(size, "little")


def elf(
    *segments: tuple[int, int, bytes],
    notes: bytes = b"",
    note_alignment: int = 4,
    entry: int = 0x10_0000,
    kind: int = 2,
    machine: int = 62,
    ident: bytes = b"\x7fELF\x02\x01\x01",
) -> bytes:
    """An ELF file; a segment is (physical address, size in memory, bytes)."""
    parts = segments or ((0x10_0000, 0x2000, b"\x90" * 0x1000),)
    count = len(parts) + (1 if notes else 0)
    at = 64 + 56 * count
    headers, body = b"", b""
    for address, size, data in parts:
        headers += struct.pack("<IIQQQQQQ", 1, 7, at + len(body), address, address, len(data), size, 4096)
        body += data
    if notes:
        headers += struct.pack(
            "<IIQQQQQQ", 4, 4, at + len(body), 0, 0, len(notes), len(notes), note_alignment
        )
        body += notes
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", ident.ljust(16, b"\0"), kind, machine, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0
    )
    return head + headers + body


def piece(plan: BootPlan, name: str) -> tuple[int, bytes]:
    found = [(p.address, p.data) for p in plan.pieces if p.name == name]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("size", [4, 8])
def test_pvh_note_leads_to_protected_mode_with_a_start_info(size: int) -> None:
    before = note(7, 4, b"GNU\0", 3)
    plan = plan_boot(elf(notes=before + note(size=size)), memory=64 * MIB, command_line="hi", initrd=b"abc")
    assert plan.protocol == "pvh"
    registers = plan.registers
    assert registers["rip"] == PVH_ENTRY
    assert registers["cr0"] & 0x8000_0001 == 1
    assert registers["efer"] == registers["cr4"] == registers["cr3"] == 0
    assert registers["cs_attributes"] == 0xC09B
    assert registers["rbx"] == address_map.START_INFO
    at, data = piece(plan, "start_info")
    assert at == address_map.START_INFO
    fields = struct.unpack_from("<IIIIQQQQII", data)
    magic, version, flags, modules, module_list, line, rsdp, rows_at, row_count, _ = fields
    assert (magic, version, flags, modules) == (0x336E_C578, 1, 0, 1)
    assert line == piece(plan, "command line")[0]
    assert rsdp == plan.details["rsdp"]
    module = struct.unpack_from("<QQQQ", data, module_list - at)
    assert module == (plan.details["initrd"], 3, 0, 0)
    assert piece(plan, "initramfs") == (plan.details["initrd"], b"abc")
    rows = [struct.unpack_from("<QQII", data, rows_at - at + 24 * i) for i in range(row_count)]
    assert [row[:3] for row in rows] == [(r.address, r.size, r.type) for r in address_map.e820(64 * MIB)]


def test_no_module_list_without_an_initramfs() -> None:
    _, data = piece(plan_boot(elf(notes=note()), memory=64 * MIB), "start_info")
    assert struct.unpack_from("<I", data, 12) == (0,)
    assert struct.unpack_from("<Q", data, 16) == (0,)


@pytest.mark.parametrize(("notes", "enter_long_mode"), [(b"", False), (note(), True), (note(kind=19), False)])
def test_without_pvh_the_entry_point_is_taken_in_long_mode(notes: bytes, enter_long_mode: bool) -> None:
    plan = plan_boot(elf(notes=notes, entry=0x10_0040), memory=64 * MIB, enter_long_mode=enter_long_mode)
    assert plan.protocol == "elf64"
    assert plan.registers["rip"] == 0x10_0040
    assert plan.registers["rsi"] == address_map.BOOT_PARAMS
    assert plan.registers["rdi"] == plan.registers["rbx"] == address_map.START_INFO
    assert plan.registers["efer"] & 0x500 == 0x500
    _, page = piece(plan, "boot_params")
    assert page[0x202:0x206] == b"HdrS"


def test_identity_page_tables_map_four_gib() -> None:
    plan = plan_boot(elf(), memory=64 * MIB)
    at, data = piece(plan, "page tables")
    assert plan.registers["cr3"] == at
    memory = {at + 8 * i: value for i, (value,) in enumerate(struct.iter_unpack("<Q", data))}

    def walk(address: int) -> int:
        table = at
        for shift in (39, 30, 21):
            entry = memory[table + 8 * (address >> shift & 511)]
            assert entry & 3 == 3
            if entry & 0x80:
                return (entry & ~0x1F_FFFF) | (address & 0x1F_FFFF)
            table = entry & ~0xFFF
        raise AssertionError

    for address in (0, 0x1234, 0x20_0000, 0xC000_0000, 0xFEE0_0020, 0xFFFF_FFFF):
        assert walk(address) == address


def test_segments_are_loaded_at_their_physical_addresses() -> None:
    data = elf((0x10_0000, 4096, b"one"), (0x40_0000, 8192, b"two"), (0x80_0000, 4096, b""))
    plan = plan_boot(data, memory=64 * MIB)
    assert [(p.address, p.data) for p in plan.pieces if p.name == "kernel"] == [
        (0x10_0000, b"one"),
        (0x40_0000, b"two"),
    ]
    assert plan.details["kernel_end"] == 0x80_1000


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (elf()[:3], ImageError, "neither"),
        (elf()[:40], ImageError, "truncated"),
        (elf()[:100], ImageError, "truncated"),
        (elf()[:-1], ImageError, "truncated"),
        (elf(notes=note())[:-1], ImageError, "truncated"),
        (
            elf(ident=b"\x7fELF\x01\x01\x01", machine=3),
            UnsupportedError,
            "32-bit kernel without a multiboot header, which is not supported yet",
        ),
        (elf(ident=b"\x7fELF\x02\x02\x01"), UnsupportedError, "another processor"),
        (elf(machine=183), UnsupportedError, "another processor"),
        (elf(kind=1), ImageError, "not an executable"),
        (elf((0x10_0000, 4, b"12345678")), ImageError, "larger in the file"),
        (elf((0x10_0000, 0, b"")), ImageError, "nothing to load"),
        (elf((0x10_0000, 8192, b"a"), (0x10_1000, 8192, b"b")), ImageError, "overlap"),
        (elf((0x1000, 4096, b"a"), entry=0x1000), ImageError, "below 1 MiB"),
        (elf((0xBFFF_F000, 8192, b"a"), entry=0xBFFF_F000), ImageError, "no RAM"),
        (elf(((1 << 64) - 4096, 4096, b"a")), ImageError, "no RAM"),
        (elf((0x10_0000, (1 << 64) - 1, b"a")), ImageError, "no RAM"),
        (elf(entry=0x20_0000), ImageError, "entry point 0x200000 outside"),
        (elf(notes=note(entry=0x30_0000)), ImageError, "entry point 0x300000 outside"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(data: bytes, error: type[InputError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        plan_boot(data, memory=64 * MIB, name="vmlinux")
    assert str(caught.value).startswith("vmlinux ")
    assert "\n" not in str(caught.value)


def test_a_kernel_larger_than_memory_is_refused_with_what_would_do() -> None:
    with pytest.raises(InputError, match="give at least --memory 48M"):
        plan_boot(elf((0x10_0000, 40 * MIB, b"a")), memory=16 * MIB)
    with pytest.raises(InputError, match="beside the kernel"):
        plan_boot(elf(), memory=4 * MIB, initrd=bytes(4 * MIB))
    with pytest.raises(InputError, match="at least 2M"):
        plan_boot(elf(), memory=1 * MIB)


def test_notes_that_lie_about_their_sizes_are_passed_over() -> None:
    for broken in (
        struct.pack("<III", 0xFFFF_FFFF, 8, 18) + b"Xen\0" + bytes(8),
        struct.pack("<III", 4, 0xFFFF_FFFF, 18) + b"Xen\0" + bytes(8),
        b"\x01",
        bytes(64),
    ):
        assert parse(elf(notes=broken)).pvh_entry is None


def test_damaged_files_raise_nothing_but_our_own_errors() -> None:
    choose = random.Random(3)
    good = elf((0x10_0000, 8192, b"x" * 300), (0x20_0000, 4096, b"y" * 100), notes=note())
    outcomes = plan_damaged(choose, good, rounds=3_000, header=range(4, 64 + 3 * 56), most=6)
    assert outcomes["plan"] > 30
    assert outcomes["error"] > 30
