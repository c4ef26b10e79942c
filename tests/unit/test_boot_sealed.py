"""Pages of boot files that many machines map: whole pages that are not zero, and nothing of them is lost."""

from __future__ import annotations

import random

from ringzero.machine.boot import Piece
from ringzero.machine.boot.sealed import PAGE, SMALLEST, SealedPages


class Memory:
    """A machine's memory, by page, as `ringzero._core.Vm` has it."""

    def __init__(self, fd: int) -> None:
        self.bytes = bytearray(4 << 20)
        self.mapped = 0
        self.fd = fd

    def write_memory(self, address: int, data: bytes | memoryview) -> None:
        """Write."""
        self.bytes[address : address + len(data)] = data

    def map_image(self, fd: int, runs: list[tuple[int, int, int]]) -> None:
        """Copy what a VM would map."""
        import os

        for address, page, count in runs:
            assert address % PAGE == 0
            assert count > 0
            assert not any(self.bytes[address : address + count * PAGE]), "written before it was mapped"
            self.bytes[address : address + count * PAGE] = os.pread(fd, count * PAGE, page * PAGE)
            self.mapped += count


def loaded(sealed: SealedPages, pieces: list[Piece]) -> Memory:
    memory = Memory(sealed.fd)
    for piece in sealed.load(memory, pieces):
        memory.write_memory(piece.address, piece.data)
    return memory


def test_what_is_mapped_and_what_is_written_make_the_pieces() -> None:
    dice = random.Random(5)
    for _ in range(30):
        parts = [dice.randbytes(PAGE) if dice.random() < 0.6 else bytes(PAGE) for _ in range(40)]
        kernel = b"".join(parts)[dice.randrange(PAGE) : -dice.randrange(1, PAGE)]
        initrd = dice.randbytes(SMALLEST + dice.randrange(PAGE))
        pieces = [
            Piece("boot_params", 0x1000, b"params"),
            Piece("kernel", 0x10_0000 + dice.randrange(PAGE), kernel),
            Piece("kernel", 0x20_0000, b"small"),
            Piece("initramfs", 0x30_0000, initrd),
        ]
        sealed = SealedPages(pieces)
        memory = loaded(sealed, pieces)
        expected = bytearray(4 << 20)
        for piece in pieces:
            expected[piece.address : piece.end] = piece.data
        assert memory.bytes == expected
        assert memory.mapped >= SMALLEST // PAGE


def test_other_pieces_are_written_as_always() -> None:
    pieces = [Piece("kernel", 0x10_0000, b"1" * (1 << 17))]
    sealed = SealedPages(pieces)
    for others in (
        [Piece("kernel", 0x10_0001, b"1" * (1 << 17))],
        [Piece("kernel", 0x10_0000, b"1" * (1 << 18))],
        [],
    ):
        memory = loaded(sealed, others)
        assert memory.mapped == 0
        assert all(memory.bytes[piece.address : piece.end] == piece.data for piece in others)
    # The same files in a machine that has another memory: another address, the same pages.
    memory = loaded(sealed, [Piece("kernel", 0x20_0000, b"1" * (1 << 17))])
    assert memory.mapped == 32
