"""What guests do in a soak: each kind has files that its guest needs, and a round that says what came out wrong."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from house.shell import ROOT
from ringzero import Machine
from ringzero.bench.debian_programs import LIBRARIES, LOADER, find_program, unpack_programs
from ringzero.bench.programs import make_data

WORK = "/soak"
"""Where a guest finds the files."""
MOST_LINES = 20
"""Of what came out wrong in a round: one wrong page makes hundreds of lines."""


class Kind(Protocol):
    """Something for a guest to do over and over."""

    memory: str

    def prepare(self, scratch: Path) -> dict[str, Path]:
        """Make what is needed, in a folder of this host; return the files of the guest: name below WORK -> file."""

    def round(self, machine: Machine, limit: float) -> list[str]:
        """Do it once, in at most `limit` seconds; return what came out wrong, an empty list when nothing did."""


def run(machine: Machine, script: str, limit: float) -> tuple[int, list[str], list[str]]:
    """Run a script of the guest's shell; return its status, and the lines of its output and of its errors."""
    done = machine.run(["sh", "-c", script], cwd=WORK, timeout=limit, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def judge(status: int, jobs: Sequence[str], lines: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Compare what jobs printed, a line each, with what they should have printed."""
    wrong = [f"the shell ended with status {status}"] if status != 0 else []
    got = [*lines, *[""] * (len(jobs) - len(lines))]
    return wrong + [
        f"{job}: {one or 'nothing'} instead of {right}"
        for job, one, right in zip(jobs, got, wanted, strict=False)
        if one != right
    ]


PIPELINES = {
    "sort": "seq 1 %d | awk '{ print ($1 * 7919) %% 20011, $1 }' | sort -n | cut -d' ' -f2 | sort -n",
    "pack": "seq 1 %d | gzip -9 | gunzip | bzip2 | bunzip2",
    "reverse": "for i in 1 2 3 4 5; do seq 1 2000 | md5sum > /dev/null; done; seq 1 %d | tac | tac",
}


@dataclass
class Pipelines:
    """Busybox's tools in pipelines, side by side; Python knows the sums."""

    memory: str = "256M"
    numbers: random.Random = field(default_factory=random.Random)

    def prepare(self, scratch: Path) -> dict[str, Path]:
        """Do nothing: busybox is in the guest."""
        return {}

    def round(self, machine: Machine, limit: float) -> list[str]:
        """Run the pipelines, each over another number of lines."""
        counts = {job: self.numbers.randrange(5000, 25000) for job in PIPELINES}
        parts = [f"({text % counts[job]}) | sha256sum > {job} &" for job, text in PIPELINES.items()]
        script = "\n".join([*parts, "wait", *(f"cut -d' ' -f1 {job}" for job in PIPELINES)])
        status, lines, errors = run(machine, script, limit)
        wanted = [sum_of_numbers(count) for count in counts.values()]
        return judge(status, list(PIPELINES), lines, wanted) + errors


def sum_of_numbers(last: int) -> str:
    """Return the SHA-256 of what `seq 1 LAST` prints."""
    return hashlib.sha256("".join(f"{n}\n" for n in range(1, last + 1)).encode()).hexdigest()


@dataclass
class Torture:
    """Our program of that name (guests/torture), which checks itself; `seconds` a round, at least once each test."""

    memory: str = "512M"
    seconds: int = 10
    workers: int = 6

    def prepare(self, scratch: Path) -> dict[str, Path]:
        """Compile it."""
        script = ROOT / "guests/torture/build.py"
        subprocess.run([sys.executable, str(script), str(scratch)], check=True, stdout=subprocess.DEVNULL)
        return {path.name: path for path in sorted(scratch.iterdir())}

    def round(self, machine: Machine, limit: float) -> list[str]:
        """Run it once."""
        script = f"exec ./torture {self.seconds} {self.workers}"
        status, lines, errors = run(machine, script, limit)
        wrong = [line for line in lines if not line.startswith(("ran ", "torture: "))]
        if not lines or not lines[-1].startswith("torture: "):
            wrong.append("torture did not come to its end")
        if status != 0 and not wrong:
            wrong.append(f"torture ended with status {status}")
        return wrong + errors


@dataclass
class Compile:
    """Debian's C compiler proper, several at once, beside a sum over a file; this host has done the same before."""

    memory: str = "1G"
    jobs: int = 3
    wanted: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def prepare(self, scratch: Path) -> dict[str, Path]:
        """Unpack the compiler, fetched first if need be, and run it here for what it should print."""
        root = scratch / "root"
        unpack_programs(root)
        make_data(scratch)
        compiler = find_program(root, "cc1")
        self.command = [f"root/{LOADER}", "--library-path", f"root/{LIBRARIES}"]
        self.command += [
            str(compiler.relative_to(scratch)),
            "-quiet",
            "-fpreprocessed",
            "-o",
            "-",
            "source.c",
        ]
        outputs = [self.natively(scratch, level) for level in range(self.jobs)]
        outputs.append((scratch / "text").read_bytes())
        self.wanted = [hashlib.sha256(output).hexdigest() for output in outputs]
        files = [scratch / "source.c", scratch / "text", compiler, root / LOADER]
        files += sorted(path for path in (root / LIBRARIES).iterdir() if path.is_file())
        return {str(path.relative_to(scratch)): path for path in files}

    def natively(self, scratch: Path, level: int) -> bytes:
        """Return what the compiler prints on this host at -O0, -O1, ..."""
        done = subprocess.run([*self.command, f"-O{level}"], cwd=scratch, check=True, stdout=subprocess.PIPE)
        return done.stdout

    def round(self, machine: Machine, limit: float) -> list[str]:
        """Compile at every level at once, and sum meanwhile."""
        names = [*(f"-O{level}" for level in range(self.jobs)), "text"]
        parts = [f"{' '.join(self.command)} {name} | sha256sum > sum{name} &" for name in names[:-1]]
        parts.append("for i in 1 2 3 4 5; do sha256sum text > sumtext; done")
        script = "\n".join([*parts, "wait", *(f"cut -d' ' -f1 sum{name}" for name in names)])
        status, lines, errors = run(machine, script, limit)
        return judge(status, names, lines, self.wanted) + errors


KINDS: dict[str, type[Kind]] = {"pipelines": Pipelines, "torture": Torture, "compile": Compile}
