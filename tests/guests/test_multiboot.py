"""A multiboot kernel of a few bytes, from its file to the number that it ends with."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ringzero import Machine
from ringzero.cli import run_command

LOAD = 0x10_0000
MAGIC, LOADER_MAGIC = 0x1BADB002, 0x2BADB002
HAS_ADDRESSES = 1 << 16
CODE = b"".join(
    (
        b"\x3d" + struct.pack("<I", LOADER_MAGIC),  # cmp eax, LOADER_MAGIC
        b"\x75\x0a",  # jne bad
        b"\x8b\x4b\x18",  # mov ecx, [ebx + 24]: mods_addr
        b"\x8b\x09",  # mov ecx, [ecx]: mod_start
        b"\x0f\xb6\x01",  # movzx eax, byte [ecx]
        b"\xeb\x02",  # jmp out
        b"\xb0\x7f",  # bad: mov al, 0x7f
        b"\xe6\xf4",  # out: out 0xf4, al
        b"\xf4\xeb\xfd",  # hlt; jmp to it
    )
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A kernel that ends its machine with the first byte of its module, and a module that begins with 42."""
    checksum = -(MAGIC + HAS_ADDRESSES) & 0xFFFF_FFFF
    header = struct.pack("<8I", MAGIC, HAS_ADDRESSES, checksum, LOAD, LOAD, 0, 0, LOAD + 32)
    kernel, module = tmp_path / "small.bin", tmp_path / "module"
    kernel.write_bytes(header + CODE)
    module.write_bytes(b"\x2a and more")
    return kernel, module


@pytest.mark.parametrize("engine", ["interpret", "translate"])
def test_the_number_is_the_end_of_the_machine(files: tuple[Path, Path], engine: str) -> None:
    kernel, module = files
    with Machine(kernel=kernel, initrd=module, memory="4M", engine=engine, devices=["debug-exit"]) as machine:
        assert machine.wait(20.0) == "debug-exit 42"


def test_the_number_becomes_an_exit_status_as_under_qemu(files: tuple[Path, Path]) -> None:
    kernel, module = files
    words = ["run", "--kernel", str(kernel), "--initrd", str(module), "--timeout", "20"]
    assert run_command([*words, "--device", "debug-exit"]) == 42 * 2 + 1
