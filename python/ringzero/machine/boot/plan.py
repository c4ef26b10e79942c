"""The plan of a start: pieces of memory and registers, and the choice between the protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from ringzero.errors import ImageError, InputError
from ringzero.machine import address_map
from ringzero.machine.boot import bzimage, elf, multiboot
from ringzero.machine.boot.layout import Piece, command_line_bytes, common_pieces
from ringzero.machine.boot.sealed import SealedPages
from ringzero.machine.firmware import acpi

__all__ = ["BootPlan", "GuestMemory", "Piece", "plan_boot", "unpacked_vmlinux"]


_AT_ONCE: Final = 1 << 16
"""The core copies what it is given: pieces of this size stay in the processor's cache meanwhile."""


class GuestMemory(Protocol):
    """What a plan needs of a machine; `ringzero._core.Vm` is one."""

    def write_memory(self, address: int, data: bytes | memoryview) -> None:
        """Write guest physical memory."""

    def map_image(self, fd: int, runs: list[tuple[int, int, int]]) -> None:
        """Map pages of a sealed file."""

    def set_registers(self, values: dict[str, int], cpu: int = 0) -> None:
        """Set registers by name."""


@dataclass(frozen=True)
class BootPlan:
    """Everything that makes a stopped machine ready to start.

    `protocol` says how: "vmlinux" (unpacked from a bzImage), "linux64" (a bzImage that unpacks itself), "pvh",
    "elf64" or "multiboot".
    """

    protocol: str
    pieces: Sequence[Piece]
    registers: Mapping[str, int]
    details: Mapping[str, int] = field(default_factory=dict)
    """Addresses worth showing: kernel, kernel_end, initrd, initrd_size, rsdp."""

    def load(self, machine: GuestMemory, sealed: SealedPages | None = None) -> None:
        """Write the pieces to the machine's memory and set its first processor's registers.

        What `sealed` has of the pieces is mapped instead, common to all machines that start from it.
        """
        pieces = sealed.load(machine, self.pieces) if sealed is not None else self.pieces
        for piece in pieces:
            view = memoryview(piece.data)
            for at in range(0, len(view), _AT_ONCE):
                machine.write_memory(piece.address + at, view[at : at + _AT_ONCE])
        machine.set_registers(dict(self.registers), 0)


def plan_boot(
    kernel: bytes,
    *,
    memory: int,
    cpus: int = 1,
    command_line: str = "",
    initrd: bytes | None = None,
    name: str = "kernel",
    initrd_name: str = "initramfs",
    enter_long_mode: bool = False,
    vmlinux: memoryview | None = None,
    mmio: bool = False,
) -> BootPlan:
    """Return how to start `kernel` on a machine with `memory` bytes and `cpus` processors.

    `name` and `initrd_name` are what messages call the two files. `enter_long_mode` enters an ELF file at its
    entry point in 64-bit mode even when it has a PVH entry: for debugging an engine. `vmlinux` is what a
    bzImage unpacks to, when it shall not unpack itself (`unpacked_vmlinux`). With `mmio` virtio devices are on no bus.

    Raises ImageError for a kernel that is damaged or no kernel, UnsupportedError for one that is not
    supported yet, InputError when something does not fit into `memory`.
    """
    if memory < 2 * address_map.MIB:
        raise InputError(f"a kernel needs more than {memory >> 10} KiB of memory: give at least 2M")
    tables = acpi.build_tables(cpus, mmio=mmio)
    rsdp = tables.rsdp
    by_multiboot = not bzimage.looks_like(kernel) and multiboot.looks_like(kernel)
    # A multiboot kernel finds its own name in front of its words, as boot loaders put it there.
    text = command_line_bytes(f"{name} {command_line}" if by_multiboot else command_line)
    common = [*common_pieces(text), *(Piece("ACPI", address, data) for address, data in tables.pieces)]
    if by_multiboot:
        start = multiboot.plan(kernel, memory=memory, initrd=initrd, name=name, initrd_name=initrd_name)
    elif kernel[:4] == elf.MAGIC:
        image = elf.parse(kernel, name)
        start = elf.plan(
            image,
            memory=memory,
            command_line_size=len(text),
            initrd=initrd,
            rsdp=rsdp,
            name=name,
            initrd_name=initrd_name,
            enter_long_mode=enter_long_mode,
        )
    elif bzimage.looks_like(kernel):
        header = bzimage.parse(kernel, name)
        start = bzimage.plan(
            header,
            kernel,
            memory=memory,
            command_line_size=len(text),
            initrd=initrd,
            rsdp=rsdp,
            name=name,
            initrd_name=initrd_name,
            vmlinux=vmlinux,
        )
    else:
        raise ImageError(
            f"{name} is neither a Linux bzImage nor an ELF or multiboot kernel: give a kernel such as /boot/vmlinuz-*"
        )
    return BootPlan(
        start.protocol, [*common, *start.pieces], start.registers, {**start.details, "rsdp": rsdp}
    )


def unpacked_vmlinux(kernel: bytes, name: str = "kernel") -> memoryview | None:
    """Return what a bzImage unpacks to, kept on disk from an earlier start; None when `kernel` is something
    else, or packed in a way that only it knows.

    Raises ImageError when it is damaged.
    """
    if not bzimage.looks_like(kernel):
        return None
    payload = bzimage.parse(kernel, name).payload(kernel)
    if not payload:
        return None
    from ringzero.machine.boot.unpacked import unpacked

    return unpacked(payload, name)
