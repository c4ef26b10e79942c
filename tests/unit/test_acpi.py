"""The ACPI tables: checksums, the fields that Linux acts on, AML encodings, and iasl's own opinion."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from ringzero.errors import InputError
from ringzero.machine import address_map
from ringzero.machine.firmware import AcpiTables, aml, build_tables

IASL = shutil.which("iasl")


@pytest.fixture(params=[1, 4, 255])
def tables(request: pytest.FixtureRequest) -> AcpiTables:
    return build_tables(request.param)


def test_checksums_and_lengths(tables: AcpiTables) -> None:
    for name, _, data in tables.named:
        if name == "RSDP":
            assert sum(data[:20]) & 0xFF == 0
            assert sum(data) & 0xFF == 0
        elif name == "FACS":
            assert struct.unpack_from("<I", data, 4) == (len(data),)
        else:
            assert sum(data) & 0xFF == 0, name
            assert struct.unpack_from("<I", data, 4) == (len(data),)


def test_tables_lie_in_the_firmware_area_and_do_not_overlap(tables: AcpiTables) -> None:
    spans = sorted((address, address + len(data)) for _, address, data in tables.named)
    assert spans[0][0] == tables.rsdp == address_map.FIRMWARE
    assert spans[-1][1] <= address_map.FIRMWARE_END
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start
    addresses = {name: address for name, address, _ in tables.named}
    assert addresses["FACS"] % 64 == 0
    assert addresses["RSDP"] % 16 == 0


def test_pointers_lead_from_the_rsdp_to_every_table(tables: AcpiTables) -> None:
    at = {address: data for _, address, data in tables.named}
    (xsdt,) = struct.unpack_from("<Q", at[tables.rsdp], 24)
    entries = [value for (value,) in struct.iter_unpack("<Q", at[xsdt][36:])]
    assert [at[entry][:4] for entry in entries] == [b"FACP", b"APIC"]
    facs, dsdt = struct.unpack_from("<II", at[entries[0]], 36)
    assert at[facs][:4] == b"FACS"
    assert at[dsdt][:4] == b"DSDT"
    assert struct.unpack_from("<Q", at[entries[0]], 140) == (dsdt,)


def test_fadt_says_what_the_machine_has() -> None:
    fadt = build_tables(1).table("FACP")
    assert len(fadt) == 276
    assert fadt[8] == 6
    assert struct.unpack_from("<H", fadt, 46) == (9,)  # SCI
    assert struct.unpack_from("<I", fadt, 48) == (0,)  # SMI_CMD
    assert struct.unpack_from("<I", fadt, 56) == (0x600,)
    assert struct.unpack_from("<I", fadt, 64) == (0x604,)
    assert struct.unpack_from("<I", fadt, 76) == (0x608,)
    assert tuple(fadt[88:92]) == (4, 2, 0, 4)
    assert fadt[108] == 0x32
    assert struct.unpack_from("<H", fadt, 109) == (0b111,)  # legacy devices, 8042, no VGA
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 10  # reset register
    assert not flags & 1 << 20  # not hardware-reduced
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 1, 0xCF9)
    assert fadt[128] == 6


def test_madt_has_a_row_for_each_processor_and_the_overrides() -> None:
    data = build_tables(3).table("APIC")
    assert struct.unpack_from("<II", data, 36) == (0xFEE0_0000, 1)
    rows = []
    at = 44
    while at < len(data):
        rows.append(data[at : at + data[at + 1]])
        at += data[at + 1]
    assert [row[3] for row in rows if row[0] == 0] == [0, 1, 2]
    assert all(struct.unpack_from("<I", row, 4) == (1,) for row in rows if row[0] == 0)
    (ioapic,) = (row for row in rows if row[0] == 1)
    assert struct.unpack("<BBBBII", ioapic)[2:] == (3, 0, 0xFEC0_0000, 0)
    overrides = [struct.unpack("<BBBBIH", row)[3:] for row in rows if row[0] == 2]
    assert overrides == [(0, 2, 0), (9, 9, 0b1101)]  # PIT on pin 2; SCI level, active high


@pytest.mark.parametrize("cpus", [0, -1, 256])
def test_impossible_processor_counts(cpus: int) -> None:
    with pytest.raises(InputError, match="1 to 255"):
        build_tables(cpus)


def test_aml_encodings() -> None:
    assert [aml.integer(value).hex() for value in (0, 1, 2, 0x100, 0x1_0000, 1 << 32)] == [
        "00",
        "01",
        "0a02",
        "0b0001",
        "0c00000100",
        "0e0000000001000000",
    ]
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    assert aml.name("_S5", b"\x00").hex() == "085f53355f00"
    assert aml.scope("\\_SB.PCI0").hex() == "100b5c2e5f53425f50434930"
    assert aml.method("_STA", aml.return_value(aml.integer(15))).hex() == "14095f53544100a40a0f"
    # PkgLength: one byte up to 62 bytes of body, two from 63, three from 4093.
    for size, head in ((61, "1040"), (55, "103c"), (4088, "10")):
        assert aml.scope("A", b"\0" * size).hex().startswith(head[:2])
    for size in (1, 57, 58, 59, 4086, 4087, 4088, 4089, 70_000):
        data = aml.scope("A", b"\0" * size)
        extra = data[1] >> 6
        length = (
            data[1] & 0x3F
            if not extra
            else data[1] & 0xF | int.from_bytes(data[2 : 2 + extra], "little") << 4
        )
        assert length == len(data) - 1
    for bad in ("", "1A", "ABCDE", "a", "A..B"):
        with pytest.raises(ValueError, match="AML name"):
            aml.name(bad, b"\0")


def test_address_spaces_of_a_bridge() -> None:
    buses = aml.address_space(aml.BUS_NUMBERS, 0, 1)
    assert buses.hex(" ") == "88 0d 00 02 0c 00 00 00 00 00 00 00 00 00 01 00"
    window = aml.address_space(aml.MEMORY, 0xE000_0000, 0x1000_0000, flags=1)
    assert window[:6].hex(" ") == "87 17 00 00 0c 01"
    assert struct.unpack("<5I", window[6:]) == (0, 0xE000_0000, 0xEFFF_FFFF, 0, 0x1000_0000)


@pytest.mark.skipif(IASL is None, reason="no iasl (apt: acpica-tools)")
@pytest.mark.parametrize("mmio", [False, True])
def test_iasl_reads_the_tables_and_compiles_the_dsdt_without_complaint(tmp_path: Path, mmio: bool) -> None:
    assert IASL is not None
    for name, _, data in build_tables(2, mmio=mmio).named:
        if name in ("RSDP", "FACS"):
            continue
        (tmp_path / f"{name}.dat").write_bytes(data)
        done = subprocess.run(
            [IASL, "-d", f"{name}.dat"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        for word in ("Error", "Warning", "Invalid", "Incorrect"):
            assert word not in output, output
    source = (tmp_path / "DSDT.dsl").read_text()
    for wanted in (
        'EisaId ("PNP0501")',
        'EisaId ("PNP0A03")',
        "Name (_PRT, Package (0x1F)",
        'EisaId ("PNP0303")',
        'EisaId ("PNP0B00")',
        '"QEMU0001"',
        "Name (\\_S5, Package",
        "OperationRegion (HPRG, SystemIO, 0x0620, 0x0C)",
        "Method (_E01",
        "Notify (\\_SB.PCI0.S1F, 0x03)",
        "Method (_EJ0, 1, NotSerialized)",
    ):
        assert wanted in source
    assert source.count('"LNRO0005"') == (16 if mmio else 0)
    done = subprocess.run(
        [IASL, "-ve", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "0 Errors" in done.stdout + done.stderr
