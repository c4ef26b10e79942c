"""Linux's own tests of its x86 side, tools/testing/selftests/x86: natively here, and in Debian's kernel on each engine.

They are programs that ask for what only a whole processor with a whole kernel can give: segments of their own, single
steps through system calls, signals with odd frames. A guest should do with them what this host does.
"""

import io
import re
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from house.conformance.running import timed
from house.shell import VENV, Failed, say

FOLDER = Path("tools/testing/selftests/x86")
# As its Makefile has them for 64 bits; those in 32 bits want a C library that few machines have.
PROGRAMS = (
    "check_initial_reg_state",
    "corrupt_xstate_header",
    "fsgsbase",
    "fsgsbase_restore",
    "ioperm",
    "iopl",
    "ldt_gdt",
    "mov_ss_trap",
    "ptrace_syscall",
    "sigaltstack",
    "sigreturn",
    "sigtrap_loop",
    "single_step_syscall",
    "syscall_arg_fault",
    "syscall_nt",
    "syscall_numbering",
    "sysret_rip",
    "sysret_ss_attrs",
    "test_mremap_vdso",
    "test_vsyscall",
)
LEFT_OUT = {"amx": "no AMX in CPUID"}
FLAGS = ("-O2", "-std=gnu99", "-pthread", "-w", "-no-pie", "-static", "-DCAN_BUILD_64")
# What some of them need besides their own source.
MORE = {"sysret_ss_attrs": ("thunks.S",), "check_initial_reg_state": ("-Wl,-ereal_start",)}
EACH = 60
"""Seconds that a program may take natively and translated; the interpreter has ten times as many."""
MARK = "selftest "
IN_GUEST = """\
cd /tmp; tar x
for program in *_64; do
    timeout %d ./$program > output 2>&1 < /dev/null; status=$?
    echo "selftest $program $status $(grep -c '\\[FAIL\\]' output)"
    grep '\\[FAIL\\]' output
done
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and how often it said FAIL."""

    status: int
    failures: int

    def __str__(self) -> str:
        if (self.status, self.failures) == (0, 0):
            return "pass"
        return f"status {self.status}, {self.failures} failed"


def build(linux: Path, out: Path) -> list[Path]:
    """Compile the programs of a Linux source tree. Raises Failed when there is none, or gcc fails."""
    folder = linux / FOLDER
    if not (folder / "helpers.h").exists():
        raise Failed(f"{linux} is no Linux source tree with {FOLDER}", 2)
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for name in PROGRAMS:
        target = out / f"{name}_64"
        words = ["gcc", *FLAGS, "-o", str(target), f"{name}.c", *MORE.get(name, ()), "-lrt", "-ldl"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise Failed(f"{FOLDER}/{name}.c cannot be compiled: {reason}")
        made.append(target)
    return made


def run_natively(programs: Sequence[Path]) -> dict[str, Outcome]:
    """Run the programs on this host."""
    outcomes = {}
    for program in programs:
        status, output, _ = timed([str(program)], EACH)
        outcomes[program.name] = Outcome(status, output.count("[FAIL]"))
    return outcomes


def run_in_guest(programs: Sequence[Path], engine: str) -> tuple[dict[str, Outcome], str]:
    """Run the programs in Debian's kernel on an engine of ours; return what they did, and all output."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for program in programs:
            tar.add(program, program.name)
    each = EACH * 10 if engine == "interpret" else EACH
    words = [
        str(VENV / "bin/python"),
        "-m",
        "ringzero",
        "run",
        "debian",
        "--memory",
        "512M",
        "--engine",
        engine,
    ]
    _, output, _ = timed(
        [*words, "--", "sh", "-c", IN_GUEST % each], each * len(programs), given=archive.getvalue()
    )
    return read(output), output


def read(output: str) -> dict[str, Outcome]:
    """Return the outcomes that a guest's output tells of."""
    found = re.findall(rf"^{MARK}(\S+) (\d+) (\d+)$", output, re.MULTILINE)
    return {name: Outcome(int(status), int(failures)) for name, status, failures in found}


def selftests(linux: Path, engines: Sequence[str], out: Path) -> int:
    """Run all programs natively and in guests; return 0 when the guests' do as the host's."""
    programs = build(linux.resolve(), out / "selftests")
    native = run_natively(programs)
    inside: dict[str, dict[str, Outcome]] = {}
    for engine in engines:
        say(f"selftests in debian, {engine}")
        inside[engine], output = run_in_guest(programs, engine)
        (out / f"selftests.{engine}.txt").write_text(output)
    print(f"{'program':32}" + "".join(f"{where:24}" for where in ("native", *engines)), flush=True)
    wrong = 0
    for name, expected in native.items():
        cells = [str(inside[engine].get(name, "did not run")) for engine in engines]
        wrong += sum(cell != str(expected) for cell in cells)
        print(f"{name:32}{expected!s:24}" + "".join(f"{cell:24}" for cell in cells), flush=True)
    say(f"{wrong} outcomes differ from native ones" if wrong else "all as natively")
    return 1 if wrong else 0
