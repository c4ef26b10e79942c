"""The guest physical address map and the I/O ports: every constant that the loaders, ACPI and the devices
share.

    guest physical address
    ┌──────────────────────┐ 4 GiB + rest
    │ RAM, the rest        │ only when memory is larger than 3 GiB
    ├──────────────────────┤ 0x1_0000_0000  4 GiB
    │ hole for devices     │     0xFF00_0000  pc-testdev, when asked for
    │                      │     0xFEE0_0000  local APIC
    │                      │     0xFEC0_0000  I/O APIC
    │                      │     0xE000_0000  PCI window, 256 MiB: registers of PCI devices
    │                      │     0xD000_0000  virtio devices on no bus, when asked for, a page each
    ├──────────────────────┤ 0xC000_0000    3 GiB   LOW_RAM_LIMIT
    │ RAM                  │
    │   initramfs          │ as high as the kernel allows
    │   ...                │
    │   kernel             │ at its preferred address (Linux: 16 MiB)
    ├──────────────────────┤ 0x0010_0000    1 MiB
    │ firmware tables      │ 0x000E_0000    RSDP first, then the other ACPI tables      (e820: reserved)
    ├──────────────────────┤ 0x000E_0000
    │ nothing              │ where a VGA adapter and option ROMs would be               (e820: not listed)
    ├──────────────────────┤ 0x000A_0000
    │ EBDA                 │ 0x0009_FC00    one KiB that the BIOS data area points to   (e820: reserved)
    ├──────────────────────┤ 0x0009_FC00
    │ RAM, conventional    │
    │   command line       │ 0x0002_0000    up to 64 KiB
    │   start info         │ 0x0001_0000    of PVH or multiboot: module list, memory map
    │   page tables        │ 0x0000_9000    PML4, PDPT, four page directories: identity, 0..4 GiB
    │   stack              │ 0x0000_8000..0x0000_8FF0, for our own guests
    │   boot_params        │ 0x0000_7000    the Linux "zero page"
    │   GDT                │ 0x0000_6000
    │   BIOS data area     │ 0x0000_0400
    └──────────────────────┘ 0x0000_0000

What a loader puts below 1 MiB is needed only until the guest has its own: the memory stays plain RAM to the
guest.

    I/O ports
    0x020 0x0A0  PIC              0x3F8 0x2F8 0x3E8 0x2E8  COM1-COM4 (IRQ 4, 3, 4, 3)
    0x040-0x043  PIT, and 0x061   0x402 0x0E9              debug output
    0x060 0x064  i8042            0x505                    pvpanic
    0x070 0x071  RTC and CMOS     0x600                    ACPI PM1a event, 0x604 PM1a control, 0x608 PM timer
                                  0x610, 0x620             ACPI general-purpose events; slots of the PCI bus
    0xCF8 0xCFC  PCI config       0xCF9                    reset register
    when asked for: 0x0F4 debug-exit, 0x0E0-0x0E7 and 0x2000-0x200F pc-testdev
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = ["E820Row", "E820Type", "UartPort", "e820", "high_ram_size", "low_ram_size"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
PAGE: Final = 4 * KIB

# RAM below and above the hole.
LOW_RAM_LIMIT: Final = 0xC000_0000
HIGH_RAM_START: Final = 0x1_0000_0000

# Below 1 MiB.
BIOS_DATA_AREA: Final = 0x400
GDT: Final = 0x6000
BOOT_PARAMS: Final = 0x7000
STACK_TOP: Final = 0x8FF0
PAGE_TABLES: Final = 0x9000
START_INFO: Final = 0x1_0000
COMMAND_LINE: Final = 0x2_0000
COMMAND_LINE_MAXIMUM: Final = 64 * KIB
"""What fits at COMMAND_LINE, the final zero byte included."""
EBDA: Final = 0x9_FC00
CONVENTIONAL_END: Final = 0xA_0000
FIRMWARE: Final = 0xE_0000
FIRMWARE_END: Final = 0x10_0000
LEAST_LINUX_MEMORY: Final = 64 * MIB
"""Below this, a 64-bit Linux dies while it unpacks itself, without a word on the console."""
LOADABLE: Final = 0x10_0000
"""The first address at which a kernel may be loaded: everything below is ours."""

# Memory-mapped devices.
IOAPIC: Final = 0xFEC0_0000
LOCAL_APIC: Final = 0xFEE0_0000

PCI_WINDOW: Final = 0xE000_0000
PCI_WINDOW_SIZE: Final = 256 * MIB
VIRTIO_MMIO: Final = 0xD000_0000
VIRTIO_MMIO_DEVICES: Final = 16

PCI_CONFIG: Final = 0xCF8
PCI_CONFIG_PORTS: Final = 8
PCI_SLOTS: Final = 32
PCI_IRQS: Final = (10, 11)
"""The ISA interrupts of slots with an even and an odd number."""

# I/O ports; those of the slow devices are in ringzero.devices.ports.
PM1A_EVENT: Final = 0x600
PM1A_CONTROL: Final = 0x604
PM_TIMER: Final = 0x608
GPE0: Final = 0x610
GPE0_PORTS: Final = 2
PCI_HOTPLUG: Final = 0x620
PCI_HOTPLUG_PORTS: Final = 12
RESET_REGISTER: Final = 0xCF9
RESET_VALUE: Final = 6

# Interrupts.
SCI_IRQ: Final = 9
S5_SLEEP_TYPE: Final = 5
"""SLP_TYP in PM1a control (bits 10-12) that means soft off."""


@dataclass(frozen=True)
class UartPort:
    """A serial port: its name in the DSDT, first I/O port and ISA interrupt."""

    name: str
    port: int
    irq: int


UARTS: Final = (
    UartPort("COM1", 0x3F8, 4),
    UartPort("COM2", 0x2F8, 3),
    UartPort("COM3", 0x3E8, 4),
    UartPort("COM4", 0x2E8, 3),
)


class E820Type(IntEnum):
    """What a row of the memory map is (ACPI 6.5 table 15.6 Address Range Types); PVH uses the same numbers."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4


@dataclass(frozen=True)
class E820Row:
    """One row of the memory map that the guest is given, in bytes."""

    address: int
    size: int
    type: E820Type

    @property
    def end(self) -> int:
        """The first address behind the row."""
        return self.address + self.size


def low_ram_size(memory: int) -> int:
    """Return how many of `memory` bytes lie below the device hole."""
    return min(memory, LOW_RAM_LIMIT)


def high_ram_size(memory: int) -> int:
    """Return how many of `memory` bytes lie above 4 GiB."""
    return max(0, memory - LOW_RAM_LIMIT)


def e820(memory: int) -> list[E820Row]:
    """Return the memory map of a machine with `memory` bytes (at least 1 MiB), in ascending order.

    The firmware area is reserved, not "ACPI reclaimable": the tables are a few KiB, and a guest that never
    reclaims them cannot get it wrong.
    """
    rows = [
        E820Row(0, EBDA, E820Type.RAM),
        E820Row(EBDA, CONVENTIONAL_END - EBDA, E820Type.RESERVED),
        E820Row(FIRMWARE, FIRMWARE_END - FIRMWARE, E820Type.RESERVED),
    ]
    low = low_ram_size(memory)
    if low > FIRMWARE_END:
        rows.append(E820Row(FIRMWARE_END, low - FIRMWARE_END, E820Type.RAM))
    # The two APICs' pages, so that no guest places a PCI window there.
    rows.append(E820Row(IOAPIC, PAGE, E820Type.RESERVED))
    rows.append(E820Row(LOCAL_APIC, PAGE, E820Type.RESERVED))
    if high := high_ram_size(memory):
        rows.append(E820Row(HIGH_RAM_START, high, E820Type.RAM))
    return rows
