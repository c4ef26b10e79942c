"""What a bzImage packs: every format that Linux knows, nothing damaged, and the copies kept on disk."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import lz4.block
import pytest
import zstandard

from ringzero import _core
from ringzero.errors import ImageError
from ringzero.machine import address_map
from ringzero.machine.boot import payload as packed
from ringzero.machine.boot import plan_boot, unpacked_vmlinux
from ringzero.machine.boot import unpacked as kept
from tests.unit.test_boot_bzimage import bzimage
from tests.unit.test_boot_elf import elf

MIB = 1 << 20
TEXT = bytes(range(256)) * 16
VMLINUX = elf((0x100_0000, 0x40_0000, TEXT + bytes(300_000) + b"end"), entry=0x100_0040)


def lz4_legacy(data: bytes) -> bytes:
    chunks = [data[at : at + (8 << 20)] for at in range(0, len(data), 8 << 20)]
    blocks = [lz4.block.compress(chunk, store_size=False) for chunk in chunks]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(
        data,
        check=lzma.CHECK_CRC32,
        filters=[{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}],
    ),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "lz4": lz4_legacy,
    "zstd": zstandard.ZstdCompressor().compress,
}


def payload(data: bytes = VMLINUX, how: str = "zstd", size: int | None = None) -> bytes:
    """A payload as scripts/Makefile.lib makes it: packed, then the size unpacked. zstd tells no size here."""
    return FORMATS[how](data) + struct.pack("<I", len(data) if size is None else size)


def image(packed: bytes, **fields: int) -> bytes:
    """A bzImage with a loader of 1 KiB before the payload."""
    return bzimage(bytes(1024) + packed, **{"payload_offset": 1024, "payload_length": len(packed)} | fields)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ringzero/unpacked"


@pytest.mark.parametrize("how", FORMATS)
def test_every_format_unpacks_to_what_was_packed(how: str) -> None:
    assert packed.unpack(memoryview(payload(how=how))) == VMLINUX


def test_lz4_of_several_blocks() -> None:
    data = os.urandom(1000) * (20 << 10)
    assert len(data) > 2 * (8 << 20)
    assert packed.unpack(memoryview(payload(data, "lz4"))) == data


@pytest.mark.parametrize("how", FORMATS)
def test_a_damaged_payload_is_one_sentence(how: str) -> None:
    good = payload(how=how)
    bad = [good[: len(good) // 2] + good[-4:]]
    if how in ("gzip", "bzip2", "xz"):  # the others carry no sum
        bad.append(good[:20] + bytes(8) + good[28:])
    for data in bad:
        with pytest.raises(ImageError, match="fetch or build it again") as caught:
            packed.unpack(memoryview(data))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", FORMATS)
def test_a_payload_that_lies_about_its_size_is_refused(how: str) -> None:
    with pytest.raises(ImageError):
        packed.unpack(memoryview(payload(bytes(64 * MIB), how, size=5000)))
    with pytest.raises(ImageError):
        packed.unpack(memoryview(payload(how=how, size=len(VMLINUX) + 1)))
    for absurd in (0, packed.LARGEST + 1):
        with pytest.raises(ImageError, match="which no kernel does"):
            packed.unpack(memoryview(payload(how=how, size=absurd)))


def test_what_is_not_known_is_left_to_the_kernel() -> None:
    assert packed.unpack(memoryview(b"\x89LZO\0\r\n\x1a\n" + bytes(100))) is None
    assert unpacked_vmlinux(bzimage()) is None
    assert unpacked_vmlinux(VMLINUX) is None


def test_an_unpacked_kernel_is_entered_where_it_was_linked() -> None:
    kernel = image(payload())
    plan = plan_boot(kernel, memory=256 * MIB, vmlinux=unpacked_vmlinux(kernel), initrd=b"x" * 100)
    assert plan.protocol == "vmlinux"
    assert plan.registers["rip"] == 0x100_0040
    assert plan.registers["rsi"] == address_map.BOOT_PARAMS
    [kernel_piece] = [piece for piece in plan.pieces if piece.name == "kernel"]
    assert kernel_piece.address == 0x100_0000
    assert bytes(kernel_piece.data).startswith(TEXT)
    # The room that the header asks for is kept free: the kernel puts its heap and page tables there.
    assert plan.details["kernel_end"] == 0x100_0000 + 32 * MIB
    [page] = [bytes(piece.data) for piece in plan.pieces if piece.name == "boot_params"]
    assert page[0x202:0x206] == b"HdrS"


def test_what_is_zero_takes_no_memory() -> None:
    kernel = image(payload())
    plan = plan_boot(kernel, memory=64 * MIB, vmlinux=unpacked_vmlinux(kernel))
    machine = _core.Vm(64 * MIB)
    plan.load(machine)
    touched = machine.stats()["memory.touched_bytes"]
    for piece in plan.pieces:
        assert machine.read_memory(piece.address, len(piece.data)) == piece.data, piece.name
    assert touched < sum(len(piece.data) for piece in plan.pieces) - 190_000


@pytest.mark.parametrize(
    "segments",
    [
        ((0x80_0000, 0x1000, TEXT),),  # below what the header says
        ((0x100_0000, 64 * MIB, TEXT),),  # above
    ],
)
def test_a_kernel_larger_than_its_header_says_is_refused(
    segments: tuple[tuple[int, int, bytes], ...],
) -> None:
    kernel = image(payload(elf(*segments, entry=segments[0][0])))
    with pytest.raises(ImageError, match="more than its header says"):
        plan_boot(kernel, memory=256 * MIB, vmlinux=unpacked_vmlinux(kernel))


def test_an_entry_outside_the_kernel_is_refused() -> None:
    kernel = image(payload(elf((0x100_0000, 0x1000, TEXT), entry=0x20)))
    with pytest.raises(ImageError, match="more than its header says"):
        plan_boot(kernel, memory=256 * MIB, vmlinux=unpacked_vmlinux(kernel))


def test_a_payload_outside_the_file_is_refused() -> None:
    inside = payload()
    kernel = image(inside, payload_length=len(inside) + 100)
    with pytest.raises(ImageError, match="truncated"):
        unpacked_vmlinux(kernel)


# ---- the copies on disk


def unpackings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows each time a payload is really unpacked."""
    seen: list[int] = []
    real = packed.unpack

    def counted(payload: memoryview, name: str = "kernel") -> bytes | None:
        seen.append(len(payload))
        return real(payload, name)

    monkeypatch.setattr(packed, "unpack", counted)
    return seen


def test_the_second_start_unpacks_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = unpackings(monkeypatch)
    kernel = image(payload())
    assert unpacked_vmlinux(kernel) == VMLINUX
    assert unpacked_vmlinux(kernel) == VMLINUX
    assert len(seen) == 1
    [file] = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "grow", "mode", "link", "directory"])
def test_a_copy_that_is_not_as_it_should_be_is_made_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    kernel = image(payload())
    unpacked_vmlinux(kernel)
    [file] = cache.iterdir()
    good = file.read_bytes()
    if damage == "flip":
        file.write_bytes(good[:200_000] + b"\x01" + good[200_001:])
    elif damage == "truncate":
        file.write_bytes(good[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "grow":
        file.write_bytes(good + bytes(10))
    elif damage == "mode":
        file.chmod(0o666)
    elif damage == "link":
        file.rename(cache / "elsewhere")
        file.symlink_to(cache / "elsewhere")
    else:
        file.unlink()
        file.mkdir()
    seen = unpackings(monkeypatch)
    assert unpacked_vmlinux(kernel) == VMLINUX
    assert len(seen) == 1
    if damage != "directory":
        assert file.read_bytes() == good
        assert not file.is_symlink()
    assert not list(cache.glob(".*")), "a scratch file was left"


def test_without_a_place_to_keep_it_the_kernel_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert unpacked_vmlinux(image(payload())) == VMLINUX


def test_the_copies_used_last_are_kept(cache: Path) -> None:
    kernels = [image(payload(VMLINUX + bytes([i]))) for i in range(kept.MOST_KEPT + 2)]
    for age, kernel in enumerate(kernels):
        unpacked_vmlinux(kernel)
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1_000_000 + age, 1_000_000 + age))
        if age == 3:
            unpacked_vmlinux(kernels[0])  # used again: it stays
    assert len(list(cache.iterdir())) == kept.MOST_KEPT
