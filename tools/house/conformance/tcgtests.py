"""QEMU's tests of its own translator, tests/tcg: the 64-bit ones, with their whole output compared with the host's."""

import subprocess
import sys
from pathlib import Path

from house.conformance.programs import Suite, compile_program
from house.shell import Failed

FOLDER = Path("tests/tcg")
FLAGS = ("-O2", "-fno-strict-aliasing")
LIBRARIES = ("-lm", "-lpthread")
# Not here: what wants 32-bit code, and 3DNow!, which only AMD's processors had.
LEFT_OUT = frozenset({"hello-i386", "test-3dnow"})
MORE = {
    "test-i386-pcmpistri": ("-msse4.2",),
    "test-i386-sse-exceptions": ("-msse4.1", "-mfpmath=sse"),
    "test-i386-ssse3": ("-mssse3",),
    "test-avx": ("-O1", "-mavx2", "-masm=intel"),
    "test-mmx": ("-O1", "-masm=intel"),
    "float_convs": ("libs/float_helpers.c", "-I."),
    "float_convd": ("libs/float_helpers.c", "-I."),
    "float_madds": ("libs/float_helpers.c", "-I."),
}
# Made by scripts of its own from one table of instructions.
HEADERS = {"test-avx": (), "test-mmx": ("MMX", "SSE", "SSE2", "SSE3", "SSSE3")}
# Their output tells of times, addresses, or which thread was first.
UNSTEADY = frozenset({"signals", "test-mmap", "testthread", "threadcount", "vsyscall"})


def build(qemu: Path, out: Path) -> Suite:
    """Compile the programs of a QEMU source tree. Raises Failed when there is none, or something cannot be made."""
    root = qemu.resolve() / FOLDER
    if not (root / "i386/test-i386.c").exists():
        raise Failed(f"{qemu} is no QEMU source tree with {FOLDER}", 2)
    programs = []
    for source in sorted([*root.glob("x86_64/*.c"), *root.glob("i386/*.c"), *root.glob("multiarch/*.c")]):
        name = source.stem
        if name in LEFT_OUT:
            continue
        flags = [*FLAGS, *MORE.get(name, ()), f"-I{root / 'i386'}", f"-I{root / 'multiarch'}"]
        if name in HEADERS:
            flags.append(f"-I{make_header(root / 'i386', name, out)}")
        programs.append(compile_program(source, out / f"{name}_64", [*flags, *LIBRARIES]))
    steady = frozenset(path.name for path in programs if path.stem.removesuffix("_64") not in UNSTEADY)
    return Suite("tcgtests", programs, steady)


def make_header(folder: Path, name: str, out: Path) -> Path:
    """Make the header of a program that a script writes; return the folder that it is in."""
    out.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, f"{name}.py", "x86.csv", str(out / f"{name}.h"), *HEADERS[name]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"{folder / name}.py failed: {done.stderr.strip()}")
    return out
