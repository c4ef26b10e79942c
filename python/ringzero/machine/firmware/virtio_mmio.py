"""What the DSDT and the kernel's command line say of virtio devices on no bus (crates/io/src/virtio/mmio.rs)."""

from __future__ import annotations

from ringzero.machine import address_map
from ringzero.machine.firmware import aml

__all__ = ["devices", "words"]

_MAGIC = 0x7472_6976
_REGISTERS = 0x200
"""Bytes: the common registers, and as many for the device's configuration."""


def _irq(number: int) -> int:
    return address_map.PCI_IRQS[number % len(address_map.PCI_IRQS)]


def devices() -> bytes:
    r"""Return a device for each place that may have one, for the scope `\_SB`: it is there when its magic value is.

    Linux's virtio_mmio driver looks for the id LNRO0005.
    """
    return b"".join(_device(number) for number in range(address_map.VIRTIO_MMIO_DEVICES))


def _device(number: int) -> bytes:
    first = address_map.VIRTIO_MMIO + number * address_map.PAGE
    is_there = aml.equal(aml.path("MAGC"), aml.integer(_MAGIC))
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.name(
            "_CRS",
            aml.resources(aml.memory(first, _REGISTERS), aml.interrupt(_irq(number))),
        ),
        aml.operation_region("REGS", aml.SYSTEM_MEMORY, first, 4),
        aml.field("REGS", aml.DWORD_ACCESS, ("MAGC", 32)),
        aml.method(
            "_STA",
            aml.when(is_there, aml.return_value(aml.integer(0x0F))),
            aml.return_value(aml.integer(0)),
        ),
    )


def words(count: int) -> list[str]:
    """Return the words of the command line by which a kernel without ACPI finds so many devices."""
    return [
        f"virtio_mmio.device=0x{_REGISTERS:x}@0x{address_map.VIRTIO_MMIO + number * address_map.PAGE:x}:{_irq(number)}"
        for number in range(count)
    ]
