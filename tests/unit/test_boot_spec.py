"""Sizes, the spec of a machine, the address map and reading files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from ringzero import errors
from ringzero.errors import ImageError, InputError
from ringzero.machine import address_map
from ringzero.machine.address_map import E820Type
from ringzero.machine.boot import read_file
from ringzero.machine.cpu_state import long_mode, protected_mode32
from ringzero.machine.spec import MachineSpec, format_size, parse_memory, parse_size

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256M", 256 * MIB),
        ("256m", 256 * MIB),
        ("256MiB", 256 * MIB),
        ("256 MB", 256 * MIB),
        ("1G", GIB),
        ("1.5G", 3 * GIB // 2),
        ("262144K", 256 * MIB),
        ("268435456", 256 * MIB),
        ("268435456B", 256 * MIB),
        (" 64M ", 64 * MIB),
        (256 * MIB, 256 * MIB),
        ("0", 0),
    ],
)
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "abc",
        "-1M",
        "12X",
        "1e9",
        "0x100",
        "1,5G",
        "1.5",
        "nan",
        "inf",
        "²",
        "٣M",
        "9" * 30,
        "1 2M",
        -5,
    ],
)
def test_what_is_no_size_is_refused_with_what_is_accepted(text: str | int) -> None:
    with pytest.raises(InputError, match="256M, 1G or a number of bytes"):
        parse_size(text)


def test_memory_too_small_or_absurd() -> None:
    assert parse_memory("1M") == MIB
    assert parse_memory(MIB + 1) == MIB  # whole pages
    for text, words in (
        ("1023K", "at least 1M"),
        ("0", "at least 1M"),
        ("999999G", "at most 256G"),
        ("257G", "at most 256G"),
    ):
        with pytest.raises(InputError, match=words):
            parse_memory(text)


def test_format_size_is_read_back() -> None:
    for size in (1, 1023, 1024, 1536, MIB, 3 * GIB, 1 << 40, 0):
        assert parse_size(format_size(size)) == size


def test_spec_checks_every_field() -> None:
    spec = MachineSpec.checked(memory="512M", cpus=2, engine="interpret", kernel="/k", command_line="quiet")
    assert (spec.memory, spec.cpus, spec.engine, spec.kernel) == (512 * MIB, 2, "interpret", Path("/k"))
    for arguments, words in (
        ({"memory": "32M"}, "Linux needs at least 64M"),
        ({"cpus": 0}, "1 to"),
        ({"cpus": 1000}, "1 to"),
        ({"cpus": True}, "1 to"),
        ({"engine": "warp"}, "choose one of direct, translate, interpret"),
        ({"cpu": "+pku,+avx512"}, r"no '\+avx512' to add: choose from \+pku, \+pks"),
        ({"cpu": "pku"}, "no 'pku' to add"),
        ({"command_line": "a\0b"}, "null"),
    ):
        with pytest.raises(InputError, match=words):
            MachineSpec.checked(**arguments)  # type: ignore[arg-type]
    assert MachineSpec.checked(memory="2M", linux=False).memory == 2 * MIB


@pytest.mark.parametrize("memory", [MIB, 2 * MIB, 64 * MIB, 3 * GIB, 3 * GIB + 4096, 8 * GIB])
def test_e820_rows_are_in_order_and_hold_all_memory(memory: int) -> None:
    rows = address_map.e820(memory)
    for before, after in itertools.pairwise(rows):
        assert before.end <= after.address
    ram = sum(row.size for row in rows if row.type == E820Type.RAM)
    # What is not RAM to the guest of its memory: EBDA to the end of the firmware area.
    assert memory - ram == address_map.FIRMWARE_END - address_map.EBDA
    assert all(
        row.end <= address_map.LOW_RAM_LIMIT or row.address >= 1 << 32
        for row in rows
        if row.type == E820Type.RAM
    )


def test_register_names_are_those_of_the_core() -> None:
    """The core refuses an unknown name, so a typing error here would stop every start."""
    general = {f"r{i}" for i in range(8, 16)} | {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"}
    others = {
        "rip",
        "rflags",
        "cr0",
        "cr2",
        "cr3",
        "cr4",
        "efer",
        "gdtr_base",
        "gdtr_limit",
        "idtr_base",
        "idtr_limit",
    }
    segments = {
        name + part
        for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldtr")
        for part in ("", "_base", "_limit", "_attributes")
    }
    for registers in (long_mode(entry=1), protected_mode32(entry=1)):
        assert set(registers) == general | others | segments
        assert all(value & ~0xF0FF == 0 for name, value in registers.items() if name.endswith("_attributes"))


def test_read_file_names_what_is_wrong(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"data")
    assert read_file(good, "kernel") == b"data"
    empty = tmp_path / "empty"
    empty.touch()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, words in (
        (tmp_path / "absent", "kernel .*absent does not exist"),
        (tmp_path, "is not a regular file"),
        (fifo, "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (good / "x", "cannot be opened"),
    ):
        with pytest.raises(InputError, match=words):
            read_file(path, "kernel")
    with pytest.raises(InputError, match="cannot be opened"):
        read_file("a\0b", "kernel")
    with pytest.raises(ImageError, match="empty"):
        read_file(empty, "initramfs")
    with pytest.raises(ImageError, match="more than"):
        read_file(good, "initramfs", largest=3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0)
    with pytest.raises(InputError, match="may not be read"):
        read_file(secret, "kernel")


def test_every_error_has_its_exit_status() -> None:
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.RingzeroError)
        assert error.exit_status == (2 if issubclass(error, InputError) else 1)


def test_transports() -> None:
    assert MachineSpec.checked().transport == "pci"
    assert MachineSpec.checked(transport="mmio").transport == "mmio"
    with pytest.raises(InputError, match="no transport 'isa'"):
        MachineSpec.checked(transport="isa")
