"""The ACPI tables of our machine (ACPI 6.5): RSDP, XSDT, FADT, FACS, MADT and DSDT.

The guest is told the truth and no more: a PC with its legacy devices, an I/O APIC, one local APIC a
processor, power management through fixed registers (not "hardware-reduced"), no VGA, and a PCI host bridge
with one bus. There is no MCFG: configuration mechanism 1 reaches all that is there.

Everything lies in the firmware area (address_map.FIRMWARE), the RSDP first, where a guest that is not told
its address finds it by its signature.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from ringzero.devices import ports
from ringzero.errors import InputError
from ringzero.machine import address_map
from ringzero.machine.firmware import aml, hotplug, virtio_mmio

__all__ = ["MOST_CPUS", "AcpiTables", "build_tables"]

MOST_CPUS: Final = 255
"""APIC ids 0-254: 255 means "all" in xAPIC mode, and larger ids would need x2APIC entries."""

_OEM_ID: Final = b"RNGZRO"
_OEM_TABLE_ID: Final = b"RINGZERO"
_CREATOR: Final = b"RZRO"
_HEADER_SIZE: Final = 36
_RSDP_SIZE: Final = 36
_SYSTEM_IO: Final = 1


@dataclass(frozen=True)
class AcpiTables:
    """The finished tables: the RSDP's address, and (name, address, bytes) of each."""

    rsdp: int
    named: tuple[tuple[str, int, bytes], ...]

    @property
    def pieces(self) -> list[tuple[int, bytes]]:
        """The (address, bytes) pairs to put into memory."""
        return [(address, data) for _, address, data in self.named]

    def table(self, name: str) -> bytes:
        """Return one table by its signature ("RSDP", "XSDT", "FACP", "FACS", "APIC", "DSDT")."""
        return next(data for known, _, data in self.named if known == name)


def _checksum(data: bytes | bytearray) -> int:
    """Return the byte that makes the sum of `data` and itself zero modulo 256."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """Return a table with its standard header (5.2.6 System Description Table Header)."""
    size = _HEADER_SIZE + len(body)
    fields = struct.pack(
        "<4sIBB6s8sI4sI", signature, size, revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR, 1
    )
    data = bytearray(fields + body)
    data[9] = _checksum(data)
    return bytes(data)


def _rsdp(xsdt: int) -> bytes:
    """Return the Root System Description Pointer, revision 2, without an RSDT (5.2.5.3)."""
    data = bytearray(
        struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, _RSDP_SIZE, xsdt, 0),
    )
    data[8] = _checksum(data[:20])
    data[32] = _checksum(data)
    return bytes(data)


def _gas(port: int, bits: int, access: int) -> bytes:
    """Return a Generic Address Structure for I/O ports (5.2.3.2); access: 1 byte, 2 word, 3 dword."""
    return struct.pack("<BBBBQ", _SYSTEM_IO if port else 0, bits, 0, access, port)


# FADT fixed feature flags (5.2.9 table 5.10).
_WBINVD: Final = 1 << 0
_PROC_C1: Final = 1 << 2
_POWER_BUTTON_IS_A_DEVICE: Final = 1 << 4
_SLEEP_BUTTON_IS_A_DEVICE: Final = 1 << 5
_RTC_WAKE_NOT_FIXED: Final = 1 << 6
_RESET_REGISTER_SUPPORTED: Final = 1 << 10
# IA-PC boot architecture flags (5.2.9.3).
_LEGACY_DEVICES: Final = 1 << 0
_HAS_8042: Final = 1 << 1
_VGA_NOT_PRESENT: Final = 1 << 2


def _fadt(facs: int, dsdt: int) -> bytes:
    """Return the Fixed ACPI Description Table, revision 6.5 (5.2.9).

    SMI_CMD is 0: the machine is in ACPI mode from the start. TMR_VAL_EXT stays clear, so the guest uses 24
    bits of the PM timer, which is right whether it has 24 or 32. There is no fixed power button (nobody
    presses it).
    """
    flags = (
        _WBINVD
        | _PROC_C1
        | _POWER_BUTTON_IS_A_DEVICE
        | _SLEEP_BUTTON_IS_A_DEVICE
        | _RTC_WAKE_NOT_FIXED
        | _RESET_REGISTER_SUPPORTED
    )
    body = struct.pack(
        "<II BBHIBBBB IIIIIIII BBBBBBBB HHHHBBBBB HBI",
        facs,
        dsdt,
        0,  # was INT_MODEL
        1,  # preferred profile: desktop
        address_map.SCI_IRQ,
        0,  # SMI_CMD
        0,  # ACPI_ENABLE
        0,  # ACPI_DISABLE
        0,  # S4BIOS_REQ
        0,  # PSTATE_CNT
        address_map.PM1A_EVENT,
        0,  # PM1b event
        address_map.PM1A_CONTROL,
        0,  # PM1b control
        0,  # PM2 control
        address_map.PM_TIMER,
        address_map.GPE0,
        0,  # GPE1
        4,  # PM1_EVT_LEN
        2,  # PM1_CNT_LEN
        0,  # PM2_CNT_LEN
        4,  # PM_TMR_LEN
        address_map.GPE0_PORTS,
        0,  # GPE1_BLK_LEN
        0,  # GPE1_BASE
        0,  # CST_CNT
        101,  # P_LVL2_LAT over 100: no C2
        1001,  # P_LVL3_LAT over 1000: no C3
        0,  # FLUSH_SIZE
        0,  # FLUSH_STRIDE
        0,  # DUTY_OFFSET
        0,  # DUTY_WIDTH
        0,  # DAY_ALRM
        0,  # MON_ALRM
        ports.CMOS_CENTURY,
        _LEGACY_DEVICES | _HAS_8042 | _VGA_NOT_PRESENT,
        0,
        flags,
    )
    body += _gas(address_map.RESET_REGISTER, 8, 1)
    # X_FIRMWARE_CTRL stays 0, as it must when FIRMWARE_CTRL is given; X_DSDT repeats DSDT.
    body += struct.pack("<BHB QQ", address_map.RESET_VALUE, 0, 5, 0, dsdt)
    body += _gas(address_map.PM1A_EVENT, 32, 2)
    body += _gas(0, 0, 0)  # PM1b event
    body += _gas(address_map.PM1A_CONTROL, 16, 2)
    body += _gas(0, 0, 0)  # PM1b control
    body += _gas(0, 0, 0)  # PM2 control
    body += _gas(address_map.PM_TIMER, 32, 3)
    body += _gas(address_map.GPE0, 8 * address_map.GPE0_PORTS, 1)
    body += _gas(0, 0, 0)  # GPE1
    body += _gas(0, 0, 0) * 2  # sleep control and status: for hardware-reduced machines
    body += b"RINGZERO"  # hypervisor vendor identity
    return _table(b"FACP", 6, body)


def _facs() -> bytes:
    """Return the Firmware ACPI Control Structure, version 2 (5.2.10): nothing but itself. No checksum by
    definition.
    """
    return struct.pack("<4sIIIIIQB", b"FACS", 64, 0, 0, 0, 0, 0, 2).ljust(64, b"\0")


def _madt(cpus: int) -> bytes:
    """Return the Multiple APIC Description Table, revision 5 (5.2.12)."""
    body = struct.pack("<II", address_map.LOCAL_APIC, 1)  # PCAT_COMPAT: there are two 8259s as well
    for cpu in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)  # processor local APIC: uid, apic id, enabled
    body += struct.pack("<BBBBII", 1, 12, cpus, 0, address_map.IOAPIC, 0)  # I/O APIC from GSI 0
    # Interrupt source overrides: bus 0, source, GSI, flags. The PIT is wired to pin 2; the SCI is level,
    # active high.
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, address_map.SCI_IRQ, address_map.SCI_IRQ, 0b11_01)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # NMI at LINT1 of every processor
    return _table(b"APIC", 5, body)


def _pci_bridge() -> bytes:
    """Return the PCI host bridge: bus 0 alone, so that nobody looks for devices on others, the window of its
    devices' registers, which interrupt each slot's INTA# is (6.2.13 _PRT), and the slots.
    """
    interrupts = [
        aml.package(
            aml.integer(slot << 16 | 0xFFFF),
            aml.integer(0),  # INTA#
            aml.integer(0),  # no link device: the line is wired
            aml.integer(address_map.PCI_IRQS[slot % len(address_map.PCI_IRQS)]),
        )
        for slot in range(1, address_map.PCI_SLOTS)
    ]
    window = aml.address_space(aml.MEMORY, address_map.PCI_WINDOW, address_map.PCI_WINDOW_SIZE, flags=1)
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.address_space(aml.BUS_NUMBERS, 0, 1),
                aml.io_ports(address_map.PCI_CONFIG, address_map.PCI_CONFIG_PORTS),
                window,
            ),
        ),
        aml.name("_PRT", aml.package(*interrupts)),
        hotplug.slots(),
    )


def _dsdt(mmio: bool) -> bytes:
    """Return the Differentiated System Description Table: soft off, the PCI bus, and the legacy devices with
    their resources.
    """
    present = aml.name("_STA", aml.integer(0x0F))
    uarts = [
        aml.device(
            uart.name,
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(number)),
            present,
            aml.name("_CRS", aml.resources(aml.io_ports(uart.port, 8), aml.irq(uart.irq))),
        )
        for number, uart in enumerate(address_map.UARTS, start=1)
    ]
    keyboard = aml.device(
        "KBD",
        aml.name("_HID", aml.eisa_id("PNP0303")),
        present,
        aml.name(
            "_CRS",
            aml.resources(
                aml.io_ports(ports.KEYBOARD_DATA, 1),
                aml.io_ports(ports.KEYBOARD_COMMAND, 1),
                aml.irq(ports.KEYBOARD_IRQ),
            ),
        ),
    )
    clock = aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io_ports(ports.RTC_INDEX, 2), aml.irq(ports.RTC_IRQ))),
    )
    # Linux's pvpanic driver looks for this id; QEMU's documentation (docs/specs/pvpanic) has the interface.
    panic = aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        present,
        aml.name("_CRS", aml.resources(aml.io_ports(ports.PVPANIC, 1))),
    )
    s5 = aml.integer(address_map.S5_SLEEP_TYPE)
    zero = aml.integer(0)
    body = aml.name("\\_S5", aml.package(s5, s5, zero, zero))
    body += aml.scope("\\_SB", _pci_bridge(), *uarts, keyboard, clock, panic)
    body += aml.scope("\\_SB", virtio_mmio.devices()) if mmio else b""
    body += aml.scope("\\_GPE", hotplug.event_handler())
    return _table(b"DSDT", 2, body)


def build_tables(cpus: int, *, mmio: bool = False) -> AcpiTables:
    """Return all tables for a machine with `cpus` processors, placed in the firmware area; with `mmio` for one whose
    virtio devices are on no bus.

    Raises InputError for a number of processors that the tables cannot describe.
    """
    if not 1 <= cpus <= MOST_CPUS:
        raise InputError(f"{cpus} processors are not possible: give 1 to {MOST_CPUS}")
    rsdp = address_map.FIRMWARE
    at = rsdp + _align(_RSDP_SIZE, 64)
    named: list[tuple[str, int, bytes]] = []

    def place(table: bytes) -> int:
        nonlocal at
        address, at = at, at + _align(len(table), 64)
        named.append((table[:4].decode("ascii"), address, table))
        return address

    facs = place(_facs())
    dsdt = place(_dsdt(mmio))
    tables = [place(_fadt(facs, dsdt)), place(_madt(cpus))]
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    named.insert(0, ("RSDP", rsdp, _rsdp(xsdt)))
    if at > address_map.FIRMWARE_END:
        raise AssertionError("the ACPI tables have outgrown the firmware area")
    return AcpiTables(rsdp, tuple(named))


def _align(size: int, step: int) -> int:
    return -(-size // step) * step
