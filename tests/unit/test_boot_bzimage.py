"""The bzImage loader: what it makes of a good file, and that no bad one gets past it."""

from __future__ import annotations

import itertools
import random
import struct

import pytest

from ringzero.errors import ImageError, InputError, UnsupportedError
from ringzero.machine import address_map
from ringzero.machine.boot import BootPlan, plan_boot
from ringzero.machine.boot.layout import command_line_bytes
from tests.unit.damage import plan_damaged

MIB = 1 << 20
SETUP_SECTORS = 3
KERNEL = bytes(range(256)) * 64  # 16 KiB


def bzimage(kernel: bytes = KERNEL, **fields: int) -> bytes:
    """A bzImage as small as one can be; `fields` overrides setup-header fields by their offset's name."""
    head = bytearray((SETUP_SECTORS + 1) * 512)
    values = {
        "setup_sects": SETUP_SECTORS,
        "syssize": -(-len(kernel) // 16),
        "boot_flag": 0xAA55,
        "jump": 0xEB | (0x26C - 0x202) << 8,
        "version": 0x020F,
        "loadflags": 1,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 0x20_0000,
        "relocatable": 1,
        "xloadflags": 0x3F,
        "cmdline_size": 2047,
        "payload_offset": 0,
        "payload_length": 0,
        "pref_address": 0x100_0000,
        "init_size": 32 * MIB,
    } | fields
    formats = {
        "setup_sects": (0x1F1, "B"),
        "syssize": (0x1F4, "I"),
        "boot_flag": (0x1FE, "H"),
        "jump": (0x200, "H"),
        "version": (0x206, "H"),
        "loadflags": (0x211, "B"),
        "initrd_addr_max": (0x22C, "I"),
        "kernel_alignment": (0x230, "I"),
        "relocatable": (0x234, "B"),
        "xloadflags": (0x236, "H"),
        "cmdline_size": (0x238, "I"),
        "payload_offset": (0x248, "I"),
        "payload_length": (0x24C, "I"),
        "pref_address": (0x258, "Q"),
        "init_size": (0x260, "I"),
    }
    head[0x202:0x206] = b"HdrS"
    for name, value in values.items():
        at, code = formats[name]
        struct.pack_into("<" + code, head, at, value)
    return bytes(head) + kernel


def piece(plan: BootPlan, name: str) -> tuple[int, bytes]:
    found = [(p.address, p.data) for p in plan.pieces if p.name == name]
    assert len(found) == 1
    return found[0]


def test_kernel_goes_to_its_preferred_address_and_is_entered_0x200_behind_it() -> None:
    plan = plan_boot(bzimage(), memory=256 * MIB, command_line="console=ttyS0")
    assert plan.protocol == "linux64"
    assert piece(plan, "kernel") == (0x100_0000, KERNEL)
    assert plan.registers["rip"] == 0x100_0200
    assert plan.registers["rsi"] == address_map.BOOT_PARAMS
    assert plan.registers["cs"] == 0x10
    assert plan.registers["ds"] == plan.registers["es"] == plan.registers["ss"] == 0x18
    assert plan.registers["rflags"] == 2  # interrupts off
    assert plan.registers["efer"] & 0x500 == 0x500
    assert plan.registers["cr0"] & 0x8000_0001 == 0x8000_0001


def test_boot_params_say_where_everything_is() -> None:
    initrd = b"\x07" * 5000
    plan = plan_boot(bzimage(), memory=256 * MIB, command_line="a b=c", initrd=initrd)
    _, page = piece(plan, "boot_params")
    assert len(page) == 4096
    at, size = struct.unpack_from("<II", page, 0x218)
    assert (at, initrd) == piece(plan, "initramfs")
    assert size == 5000
    assert at % 4096 == 0
    assert at == 256 * MIB - 8192  # as high as it goes
    (line,) = struct.unpack_from("<I", page, 0x228)
    assert (line, b"a b=c\0") == piece(plan, "command line")
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    (rsdp,) = struct.unpack_from("<Q", page, 0x070)
    assert rsdp == plan.details["rsdp"]
    assert any(p.address == rsdp and p.data.startswith(b"RSD PTR ") for p in plan.pieces)
    rows = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * i) for i in range(page[0x1E8])]
    assert rows == [(row.address, row.size, row.type) for row in address_map.e820(256 * MIB)]


def test_sentinel_is_clear_so_that_linux_trusts_the_page() -> None:
    _, page = piece(plan_boot(bzimage(), memory=256 * MIB), "boot_params")
    assert page[0x1EF] == 0


def test_initrd_stays_below_the_kernels_limit_and_below_the_device_hole() -> None:
    low = plan_boot(bzimage(initrd_addr_max=0x7FF_FFFF), memory=1 << 30, initrd=b"x" * 100)
    assert low.details["initrd"] == 0x7FF_F000
    high = plan_boot(bzimage(initrd_addr_max=0xFFFF_FFFF), memory=6 << 30, initrd=b"x" * 100)
    assert high.details["initrd"] == address_map.LOW_RAM_LIMIT - 4096


def test_no_two_pieces_overlap() -> None:
    plan = plan_boot(bzimage(), memory=64 * MIB, command_line="x" * 2047, initrd=b"x" * MIB)
    pieces = sorted(plan.pieces, key=lambda p: p.address)
    for before, after in itertools.pairwise(pieces):
        assert before.end <= after.address, (before.name, after.name)


def test_load_writes_every_piece_and_sets_the_registers() -> None:
    class Machine:
        def __init__(self) -> None:
            self.written: list[tuple[int, bytes]] = []
            self.registers: dict[str, int] = {}

        def write_memory(self, address: int, data: bytes) -> None:
            self.written.append((address, data))

        def set_registers(self, values: dict[str, int], cpu: int = 0) -> None:
            assert cpu == 0
            self.registers = values

    plan = plan_boot(bzimage(), memory=64 * MIB)
    machine = Machine()
    plan.load(machine)
    assert machine.written == [(p.address, p.data) for p in plan.pieces]
    assert machine.registers == plan.registers


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", ImageError, "neither a Linux bzImage nor an ELF"),
        (b"#!/bin/sh\necho no\n" * 100, ImageError, "neither a Linux bzImage nor an ELF"),
        (bytes(0x1FE) + b"\x55\xaa", ImageError, "truncated"),
        (bytes(0x1FE) + b"\x55\xaa" + bytes(512), ImageError, "not a Linux kernel"),
        (bzimage()[:0x206], ImageError, "truncated"),
        (bzimage()[:0x230], ImageError, "truncated"),
        (bzimage()[:-100], ImageError, "truncated"),
        (bzimage()[: 4 * 512], ImageError, "truncated"),
        (bzimage(version=0x0206), UnsupportedError, "2.06"),
        (bzimage(xloadflags=0), UnsupportedError, "32-bit kernel, which is not supported yet"),
        (bzimage(loadflags=0), UnsupportedError, "zImage"),
        (bzimage(jump=0x10EB), ImageError, "too early"),
        (bzimage(syssize=0), ImageError, "too few"),
        (bzimage(syssize=0xFFFF_FFFF), ImageError, "truncated"),
        (bzimage(setup_sects=255), ImageError, "truncated"),
        (bzimage(kernel_alignment=0), ImageError, "alignment"),
        (bzimage(kernel_alignment=0x30_0000), ImageError, "alignment"),
        (bzimage(init_size=16), ImageError, "less room"),
        (bzimage(init_size=0xFFFF_FFFF), ImageError, "too many"),
        (bzimage(pref_address=0), ImageError, "loaded at 0x0"),
        (bzimage(pref_address=1 << 60), ImageError, "loaded at"),
    ],
)
def test_bad_kernels_are_refused_in_one_sentence(data: bytes, error: type[InputError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        plan_boot(data, memory=256 * MIB, name="vmlinuz")
    message = str(caught.value)
    assert message.startswith("vmlinuz ")
    assert ":" in message, "the message says what to do"
    assert "\n" not in message
    assert error.exit_status == 2


def test_what_does_not_fit_is_refused_with_what_would_do() -> None:
    with pytest.raises(InputError, match="--memory 64M"):
        plan_boot(bzimage(), memory=32 * MIB)
    with pytest.raises(InputError, match="give at least --memory 128M"):
        plan_boot(bzimage(init_size=100 * MIB), memory=64 * MIB)
    with pytest.raises(
        InputError, match="does not fit into 64 MiB of memory beside the kernel: give at least --memory"
    ):
        plan_boot(bzimage(), memory=64 * MIB, initrd=bytes(40 * MIB), initrd_name="big.img")
    with pytest.raises(InputError, match="takes 2047: shorten it"):
        plan_boot(bzimage(), memory=64 * MIB, command_line="x" * 2048)
    plan_boot(bzimage(), memory=64 * MIB, command_line="x" * 2047)
    with pytest.raises(InputError, match="at most 65535 fit"):
        plan_boot(bzimage(cmdline_size=0), memory=64 * MIB, command_line="x" * 70000)
    with pytest.raises(InputError, match="null character"):
        plan_boot(bzimage(), memory=64 * MIB, command_line="a\0b")


def test_the_memory_that_a_message_asks_for_is_enough() -> None:
    for initrd_size in (30 * MIB, 100 * MIB + 1):
        with pytest.raises(InputError) as caught:
            plan_boot(bzimage(), memory=64 * MIB, initrd=bytes(initrd_size))
        memory = int(str(caught.value).rsplit(" ", 1)[1].removesuffix("M")) * MIB
        plan_boot(bzimage(), memory=memory, initrd=bytes(initrd_size))


def test_a_syssize_that_rounds_up_is_no_truncation() -> None:
    plan = plan_boot(bzimage(KERNEL[:-5]), memory=64 * MIB)
    assert piece(plan, "kernel")[1] == KERNEL[:-5]


def test_damaged_headers_raise_nothing_but_our_own_errors() -> None:
    """Files with random bytes in their headers: a plan, or one of our errors."""
    choose = random.Random(2)
    good = bzimage(KERNEL[:1024])
    outcomes = plan_damaged(choose, good, rounds=3_000, header=range(0x1F1, 0x270), most=6)
    assert outcomes["plan"] > 30
    assert outcomes["error"] > 30


def test_command_line_bytes_are_what_was_typed() -> None:
    assert command_line_bytes("ä=1") == "ä=1".encode() + b"\0"
    assert command_line_bytes("\udcff") == b"\xff\0"  # an argument that was no UTF-8
