"""Test programs for Linux, run on this host and in Debian's kernel on each engine: a guest does as the host."""

import hashlib
import io
import re
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from house.conformance.running import timed
from house.shell import VENV, Failed, say

EACH = 60
"""Seconds that a program may take natively and translated; the interpreter has ten times as many."""
# `vsyscall=xonly`: Debian's cloud kernel leaves the page out, whose tests are for it.
GUEST = ("debian", "--memory", "1G", "--append", "vsyscall=xonly")
IN_GUEST = """\
cd /tmp; tar x
for program in *_64; do
    timeout %d ./$program > output 2>&1 < /dev/null; status=$?
    set -- $(sha256sum output)
    echo "program $program $status $(grep -c '\\[FAIL\\]' output) $1"
    grep '\\[FAIL\\]' output
done
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended, how often it said FAIL, and a digest of all that it said (None: not compared)."""

    status: int
    failures: int
    digest: str | None

    def __str__(self) -> str:
        if (self.status, self.failures) != (0, 0):
            return f"status {self.status}, {self.failures} failed"
        return f"pass {self.digest[:8]}" if self.digest else "pass"


@dataclass(frozen=True)
class Suite:
    """Compiled programs, and of which of them the whole output is compared; others tell times and addresses."""

    name: str
    programs: Sequence[Path]
    steady: frozenset[str]

    def outcome(self, program: str, status: int, failures: int, digest: str) -> Outcome:
        """Return an outcome with what is to be compared."""
        return Outcome(status, failures, digest if program in self.steady else None)


def compile_program(source: Path, target: Path, flags: Iterable[str]) -> Path:
    """Compile one program, in its own folder. Raises Failed when gcc does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    words = ["gcc", "-static", "-no-pie", "-w", "-o", str(target), source.name, *flags]
    done = subprocess.run(words, cwd=source.parent, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise Failed(f"{source} cannot be compiled: {reason}")
    return target


def run_natively(suite: Suite) -> dict[str, Outcome]:
    """Run the programs on this host."""
    outcomes = {}
    for program in suite.programs:
        status, output, _ = timed([str(program)], EACH)
        digest = hashlib.sha256(output).hexdigest()
        outcomes[program.name] = suite.outcome(program.name, status, output.count(b"[FAIL]"), digest)
    return outcomes


def run_in_guest(suite: Suite, engine: str) -> tuple[dict[str, Outcome], str]:
    """Run the programs in Debian's kernel on an engine of ours; return what they did, and all output."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for program in suite.programs:
            tar.add(program, program.name)
    each = EACH * 10 if engine == "interpret" else EACH
    words = [str(VENV / "bin/python"), "-m", "ringzero", "run", *GUEST, "--engine", engine]
    words += ["--", "sh", "-c", IN_GUEST % each]
    _, output, _ = timed(words, each * len(suite.programs), given=archive.getvalue())
    text = output.decode(errors="replace")
    return read(suite, text), text


def read(suite: Suite, output: str) -> dict[str, Outcome]:
    """Return the outcomes that a guest's output tells of."""
    found = re.findall(r"^program (\S+) (\d+) (\d+) ([0-9a-f]{64})$", output, re.MULTILINE)
    return {row[0]: suite.outcome(row[0], int(row[1]), int(row[2]), row[3]) for row in found}


def compare(suite: Suite, engines: Sequence[str], out: Path) -> int:
    """Run all programs natively and in guests; return 0 when the guests' do as the host's."""
    native = run_natively(suite)
    inside: dict[str, dict[str, Outcome]] = {}
    for engine in engines:
        say(f"{suite.name} in {GUEST[0]}, {engine}")
        inside[engine], output = run_in_guest(suite, engine)
        (out / f"{suite.name}.{engine}.txt").write_text(output)
    print(f"{'program':32}" + "".join(f"{where:24}" for where in ("native", *engines)).rstrip(), flush=True)
    wrong = 0
    for name, expected in native.items():
        results = [inside[engine].get(name) for engine in engines]
        wrong += sum(result != expected for result in results)
        cells = [str(result or "did not run") for result in results]
        print(f"{name:32}{expected!s:24}" + "".join(f"{cell:24}" for cell in cells).rstrip(), flush=True)
    say(
        f"{suite.name}: {wrong} outcomes differ from native ones"
        if wrong
        else f"{suite.name}: all as natively"
    )
    return 1 if wrong else 0
