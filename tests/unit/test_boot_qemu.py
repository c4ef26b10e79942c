"""Our boot plans under QEMU, from the first instruction: the pieces, the registers and the ACPI tables are all ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORACLE = ROOT / "guests" / "firmware" / "oracle.py"
HELLO = ROOT / "python" / "ringzero" / "images" / "builtin" / "hello.elf"


def run_oracle(*arguments: str, timeout: float = 60) -> str:
    done = subprocess.run(
        [sys.executable, str(ORACLE), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.needs_qemu
@pytest.mark.parametrize(("flags", "entry"), [([], "the PVH entry"), (["--long"], "the 64-bit entry")])
def test_hello_starts_by_both_entries_and_powers_off(flags: list[str], entry: str) -> None:
    if not HELLO.exists():
        pytest.skip("hello.elf is not built: run tools/dev guests")
    output = run_oracle(str(HELLO), "--append", "one two", *flags)
    assert f"started by    {entry}" in output
    assert "command line  one two" in output
    assert "RSDP at e0000" in output
    assert "powering off" in output


@pytest.mark.needs_qemu
@pytest.mark.needs_debian
def test_debians_kernel_takes_the_plan_and_the_acpi_tables() -> None:
    from ringzero import images

    image = images.pull("debian")
    append = "console=ttyS0 panic=-1 rdinit=/absent init=/absent"  # boots, finds no init, panics, and the machine ends
    output = run_oracle(str(image.kernel), "--initrd", str(image.initrd), "--append", append)
    for line in (
        "ACPI: RSDP 0x00000000000E0000",
        "ACPI: Using ACPI (MADT) for SMP configuration information",
        "ACPI: 1 ACPI AML tables successfully acquired and loaded",
        "ACPI: PM: (supports S0 S5)",
        "ACPI: PM-Timer IO Port: 0x608",
        "Trying to unpack rootfs image as initramfs",
        "00:00: ttyS0 at I/O 0x3f8 (irq = 4",
        "rtc_cmos",
    ):
        assert line in output, f"{line!r} is missing from:\n{output[-4000:]}"
    # This QEMU has nothing at our event block: all of its bits read as set, also those of events that we do not have.
    output = "\n".join(line for line in output.splitlines() if "No handler or method for GPE" not in line)
    for trouble in ("ACPI Error", "ACPI BIOS Error", "ACPI Warning", "Firmware Bug"):
        assert trouble not in output, output
