r"""What the DSDT says of PCI cards that come and go while the guest runs.

crates/io/src/pci/hotplug.rs has the registers. Each slot is a device that can be ejected. General-purpose event 1 runs
`\_GPE._E01`, which reads in which slots there is a new card and of which the operator wants the card back, and tells
the system of each (ACPI 6.5, 5.6.6 Device Object Notifications: 1 for the former, 3 for the latter).
"""

from __future__ import annotations

from ringzero.machine import address_map
from ringzero.machine.firmware import aml

__all__ = ["event_handler", "slots"]

_DEVICE_CHECK, _EJECT_REQUEST = 1, 3
_REGION = "HPRG"
_INSERTED, _WANTED, _EJECT = "HPIN", "HPWT", "HPEJ"
"""The registers, a bit a slot; the first two are cleared by writing the bits that were seen."""
_BRIDGE = "\\_SB.PCI0"


def _slot_name(slot: int) -> str:
    return f"S{slot:02X}_"


def slots() -> bytes:
    """Return the registers and the slots, for the scope of the PCI bridge. Slot 0 is the bridge's own."""
    registers = aml.operation_region(
        _REGION, aml.SYSTEM_IO, address_map.PCI_HOTPLUG, address_map.PCI_HOTPLUG_PORTS
    )
    registers += aml.field(_REGION, aml.DWORD_ACCESS, (_INSERTED, 32), (_WANTED, 32), (_EJECT, 32))
    return registers + b"".join(
        aml.device(
            _slot_name(slot),
            aml.name("_ADR", aml.integer(slot << 16)),
            aml.name("_SUN", aml.integer(slot)),
            aml.method("_EJ0", aml.store(aml.integer(1 << slot), aml.path(_EJECT)), arguments=1),
        )
        for slot in range(1, address_map.PCI_SLOTS)
    )


def event_handler() -> bytes:
    r"""Return the handler of event 1, for the scope `\_GPE`."""
    terms = b""
    for register, notification in ((_INSERTED, _DEVICE_CHECK), (_WANTED, _EJECT_REQUEST)):
        place = aml.path(f"{_BRIDGE}.{register}")
        terms += aml.store(place, aml.local(0))
        terms += aml.store(aml.local(0), place)
        for slot in range(1, address_map.PCI_SLOTS):
            told = aml.notify(f"{_BRIDGE}.{_slot_name(slot)}", aml.integer(notification))
            terms += aml.when(aml.bit_and(aml.local(0), aml.integer(1 << slot)), told)
    return aml.method("_E01", terms)
