"""What a PC's firmware would leave in memory for the operating system: the ACPI tables, and nothing else."""

from ringzero.machine.firmware.acpi import AcpiTables, build_tables

__all__ = ["AcpiTables", "build_tables"]
