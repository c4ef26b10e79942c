#!/usr/bin/env python3
"""Build our own small guests with the machine's gcc and ld, and run them under QEMU as the oracle.

    guests/build.py                   build every guest into build/guests/, and PACKAGED ones into the package
    guests/build.py arithmetic paging only these
    guests/build.py --qemu [NAME...]  build, then run each under QEMU TCG and report PASS or FAIL
    guests/build.py --native [NAME]   build and run as a Linux program, where a guest can (it has `HOSTED` in it): the
                                      processor itself is then the oracle
    guests/build.py --list            names only

A guest is `guests/NAME.c`, `guests/hostile/NAME.c` (named hostile_NAME), or a folder `guests/NAME/` with `main.c`.
Every one is linked with guests/lib into an ELF with a PVH note.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = ROOT / "build" / "guests"
BUILTIN = ROOT / "python" / "ringzero" / "images" / "builtin"
PACKAGED = ("hello", "nano")

# -mgeneral-regs-only: the compiler itself must not touch SSE, or an interrupt handler would clobber what a guest tests.
CFLAGS = [
    "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-pic", "-fno-pie", "-fno-builtin",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-omit-frame-pointer", "-fcf-protection=none",
    "-mno-red-zone", "-mgeneral-regs-only", "-mcmodel=small", f"-I{HERE / 'lib'}",
]  # fmt: skip
LDFLAGS = [
    "-nostdlib", "-static", "-no-pie", "-z", "max-page-size=4096", "-z", "noexecstack", "--build-id=none",
    "-T", str(HERE / "lib" / "guest.ld"),
]  # fmt: skip
QEMU = [
    "qemu-system-x86_64", "-accel", "tcg", "-M", "pc", "-cpu", "max,vendor=GenuineIntel", "-m", "256M", "-nodefaults",
    "-display", "none", "-serial", "stdio", "-no-reboot", "-smp", "4",
]  # fmt: skip

# Where QEMU 7.2 itself is wrong and the bare processor (--native, or the manual) is right.
QEMU_DEFECTS = {
    "across": {
        # it reads what it is to change as a load, and stores vectors and x87 numbers in pieces
        "modify_2-missing",
        "modify_4-missing",
        "modify_8-missing",
        "modify_8_shift-missing",
        "modify_8_r10-missing",
        "modify_8_xadd-missing",
        "locked_8_add-missing",
        "locked_4_xchg-missing",
        "compare_8-missing",
        "bit_8-missing",
        "store_16-missing",
        "store_32-missing",
        "store_16-read-only",
        "store_32-read-only",
        "x87_10-read-only",
    },
    "arithmetic": {"blsi"},  # CF inverted; fixed in QEMU 8.0
    "simd": {
        # which of two NaNs is kept, and denormals-are-zero where nothing is computed
        "addps",
        "subps",
        "mulps",
        "divps",
        "minps",
        "maxpd",
        "minsd",
        "maxss",
        "addsubps",
        "hsubps",
        "dpps",
        "vaddps",
        "vmulpd",
        "vdivps",
        "vminps",
        "sse_keeps_upper",
        "vex_clears_upper",
        "vdpps",
        "vfnmadd231ps",
        "vfmaddsub213ps",
        "vcvtph2ps",
        "vcvtps2ph",
    },
    "keys": {
        "pkrs-no-access",
        "not-in-use",
    },  # its TLB outlives a change of CR4.PKS; PKRU always counts as in use
    "xsave": {"fxrstor-reserved-mxcsr", "ldmxcsr-reserved", "xsave-ts"},
    "system": {
        "syscall-masked",  # the arithmetic flags are lost
        "lstar-non-canonical",
        "wrgsbase-non-canonical",  # any address is taken
        "compat-limit",
        "compat-null",  # no segment limits
        "compat-syscall",  # whatever the vendor
        "iret-cs-two-sizes",
        "iret-ss-absent",  # found later, or as another fault
        "iret-marks-accessed",
    },
    "debug": {
        "two-at-once",  # only one breakpoint of an access is reported
        "general-detect",
        "general-detect-dr6",
        "general-detect-cleared",
        "rf-of-a-fault",  # not there
    },
    "exceptions": {
        "icebp",
        "lock-load",
        "ltr-null",
        "xm",
        "xm-off",  # no unmasked SSE exceptions
        "gate-bad-type",
        "gate-not-present",
        "gate-beyond-idt",
        "serial-fault",
        "user-int-gate-level",  # vector * 16 + 2
    },
    "paging": {
        "non-canonical-stack",  # #SS for the stack segment, QEMU raises #GP
        "missing-modify",
        "straddle-missing-add",  # a read-modify-write faults as a write (seen on the bare processor)
        "reserved-bit",
        "reserved-bit-write",
        "address-too-wide",
        "nx-reserved-when-off",
        "2m-misaligned-reserved",
        # the last five: RSVD comes with P set (SDM Vol. 3A 4.7), QEMU leaves P clear
    },
}


def guests() -> dict[str, list[Path]]:
    """Every guest: name -> its C and assembler sources, without the library's."""
    found = {path.stem: [path] for path in sorted(HERE.glob("*.c"))}
    for path in sorted((HERE / "hostile").glob("*.c")):
        found[f"hostile_{path.stem}"] = [path]
    for main in sorted(HERE.glob("*/main.c")):
        folder = main.parent
        found[folder.name] = sorted([*folder.glob("*.c"), *folder.glob("*.S")])
    return found


def library() -> list[Path]:
    """What every guest is linked with."""
    lib = HERE / "lib"
    return [lib / "start.S", lib / "traps.S", lib / "lib.c", lib / "smp_start.S", lib / "smp.c"]


def build(name: str, sources: list[Path]) -> Path:
    """Compile and link one guest. Raises CalledProcessError when the compiler or linker refuses."""
    objects = []
    inputs = [*library(), *sources]
    headers = [*HERE.glob("lib/*.h"), *HERE.glob("*.h"), HERE / "lib" / "guest.ld", Path(__file__)]
    target = OUT / f"{name}.elf"
    newest = max(path.stat().st_mtime for path in [*inputs, *headers])
    if not target.exists() or target.stat().st_mtime <= newest:
        work = OUT / "objects" / name
        work.mkdir(parents=True, exist_ok=True)
        for source in inputs:
            made = work / f"{source.parent.name}-{source.name}.o"
            subprocess.run(["gcc", *CFLAGS, "-c", str(source), "-o", str(made)], check=True)
            objects.append(str(made))
        subprocess.run(["ld", *LDFLAGS, "-o", str(target), *objects], check=True)
    if name in PACKAGED:
        BUILTIN.mkdir(parents=True, exist_ok=True)
        # Without its debug sections: they are nine tenths of the file, and it goes into the wheel.
        subprocess.run(
            ["strip", "--strip-debug", "-o", str(BUILTIN / f"{name}.elf"), str(target)], check=True
        )
    return target


def run_native(name: str, sources: list[Path], arguments: list[str]) -> int:
    """Build `name` with -DHOSTED against the C library and run it here. Returns its exit status."""
    if not any("HOSTED" in source.read_text() for source in sources):
        print(f"{name}: uses privileged instructions, so it has no native form")
        return 0
    work = OUT / "native"
    work.mkdir(parents=True, exist_ok=True)
    target = work / name
    flags = ["-std=gnu11", "-O1", "-DHOSTED", "-fno-builtin", "-mno-red-zone", "-fno-pie", "-no-pie"]
    flags.append(f"-I{HERE / 'lib'}")
    command = ["gcc", *flags, *map(str, sources), str(HERE / "lib" / "hosted.c"), "-o", str(target)]
    subprocess.run(command, check=True)
    return subprocess.run([str(target), *arguments], check=False).returncode


def run_qemu(name: str, elf: Path, timeout: float, append: str) -> bool:
    """Run a guest under QEMU TCG. A hostile guest passes when QEMU ends, or has to be stopped, without a crash."""
    command = [*QEMU, "-kernel", str(elf), *(["-append", append] if append else [])]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
        output, status = done.stdout.decode(errors="replace"), str(done.returncode)
    except subprocess.TimeoutExpired as late:
        output, status = (late.stdout or b"").decode(errors="replace"), "stopped"
    lines = output.replace("\r", "").strip().splitlines()
    if name.startswith("hostile_"):
        good = status in ("0", "stopped")
    else:
        failed = {line.split()[1] for line in lines[:-1] if line.startswith("FAIL ")}
        known = QEMU_DEFECTS.get(name, set())
        ends = ("PASS", "powering off through the PM1a control port")
        good = bool(lines) and (lines[-1] in ends or (lines[-1].startswith("FAIL ") and failed == known))
    last = lines[-1] if lines else "-"
    print(f"{'PASS' if good else 'FAIL'} {name} (qemu: {status}; {len(lines)} lines; last: {last!r})")
    if not good:
        print("\n".join("    " + line for line in lines if not line.startswith("ok ")))
    return good


def main() -> int:
    """Parse the command line, and build and run what it names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="guests to build (all of them when none is named)")
    parser.add_argument("--list", action="store_true", help="print the names of all guests")
    parser.add_argument("--qemu", action="store_true", help="run each under QEMU TCG after building")
    parser.add_argument("--native", action="store_true", help="build and run as a Linux program")
    parser.add_argument("--append", default="", help="command line for the guest")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a guest under QEMU may take")
    options = parser.parse_args()
    known = guests()
    if options.list:
        print("\n".join(known))
        return 0
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"no guest is called {unknown[0]!r}: see guests/build.py --list", file=sys.stderr)
        return 2
    for tool in ("gcc", "ld", "strip"):
        if shutil.which(tool) is None:
            print(f"{tool} is missing: install gcc and binutils (apt install gcc binutils)", file=sys.stderr)
            return 2
    OUT.mkdir(parents=True, exist_ok=True)
    names = options.names or list(known)
    good = True
    for name in names:
        try:
            if options.native:
                good &= run_native(name, known[name], options.append.split()) == 0
                continue
            elf = build(name, known[name])
        except subprocess.CalledProcessError as failed:
            print(f"{name}: {failed.cmd[0]} failed", file=sys.stderr)
            return 1
        if options.qemu:
            limit = 5.0 if name.startswith("hostile_") else options.timeout
            good &= run_qemu(name, elf, limit, options.append)
        else:
            print(elf.relative_to(ROOT))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
