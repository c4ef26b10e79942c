#!/usr/bin/env python3
"""Run a boot plan of ours under QEMU, from the first instruction on: is what the loaders prepare what a kernel wants?

    guests/firmware/oracle.py KERNEL [--initrd F] [--append TEXT] [--memory 256M] [--long]

QEMU's own loader for kernels has no part in it: the pieces of memory, the registers and the ACPI tables are the plan's.
`-cpu max`, one processor. The console is on stdio.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "python"))

from ringzero.machine import address_map  # noqa: E402
from ringzero.machine.boot import BootPlan, plan_boot, read_file  # noqa: E402
from ringzero.machine.spec import parse_memory  # noqa: E402

_PATCHED = 0x1000


def build_firmware(plan: BootPlan, work: Path) -> Path:
    """Assemble the trampoline, fill in the plan's registers and ACPI tables, return the image for `-bios`."""
    made, linked = work / "trampoline.o", work / "trampoline.bin"
    subprocess.run(["gcc", "-c", str(HERE / "trampoline.S"), "-o", str(made)], check=True)
    subprocess.run(["ld", "-Ttext=0", "--oformat=binary", "-o", str(linked), str(made)], check=True)
    upper = bytearray(linked.read_bytes()[:0x10000])
    registers = plan.registers
    long_mode = registers["efer"] >> 10 & 1
    names = ("rip", "rbx", "rsi", "rdi", "rsp", "cr3")
    struct.pack_into("<7Q", upper, _PATCHED, long_mode, *(registers[name] for name in names))
    struct.pack_into("<HI", upper, _PATCHED + 56, registers["gdtr_limit"], registers["gdtr_base"])
    lower = bytearray(0x10000)
    for piece in plan.pieces:
        if piece.address >= address_map.FIRMWARE and piece.end <= address_map.FIRMWARE_END:
            at = piece.address - address_map.FIRMWARE
            lower[at : at + len(piece.data)] = piece.data
    image = work / "firmware.bin"
    image.write_bytes(lower + upper)
    return image


def qemu_command(plan: BootPlan, memory: int, work: Path) -> list[str]:
    """Return the command that starts `plan`; files that it needs are put into `work`."""
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-M", "pc", "-cpu", "max", "-m", f"{memory >> 20}M", "-nodefaults",
        "-display", "none", "-serial", "stdio", "-no-reboot", "-bios", str(build_firmware(plan, work)),
    ]  # fmt: skip
    for number, piece in enumerate(plan.pieces):
        if address_map.FIRMWARE <= piece.address < address_map.FIRMWARE_END or not piece.data:
            continue
        file = work / f"piece{number}"
        file.write_bytes(piece.data)
        command += ["-device", f"loader,file={file},addr={piece.address:#x},force-raw=on"]
    return command


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernel")
    parser.add_argument("--initrd")
    parser.add_argument("--append", default="")
    parser.add_argument("--memory", default="256M")
    parser.add_argument("--long", action="store_true", help="enter an ELF file in long mode")
    options = parser.parse_args()
    memory = parse_memory(options.memory)
    plan = plan_boot(
        read_file(options.kernel, "kernel"),
        memory=memory,
        command_line=options.append,
        initrd=read_file(options.initrd, "initramfs") if options.initrd else None,
        enter_long_mode=options.long,
    )
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(qemu_command(plan, memory, Path(folder)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
