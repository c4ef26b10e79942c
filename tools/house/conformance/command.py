"""The command: run the tests, print a table, write the figures."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from house.conformance import selftests, tcgtests
from house.conformance.programs import compare
from house.conformance.running import TCG, Result, run
from house.conformance.unittests import Case, read_list
from house.shell import ROOT, Failed, say, which

COLUMNS = (TCG, "interpret", "translate", "direct")
FIGURES = ROOT / "build/conformance"


@dataclass(frozen=True)
class Trees:
    """Where the tests are: a built kvm-unit-tests, a Linux and a QEMU source tree, each only if wanted."""

    suite: Path | None = None
    linux: Path | None = None
    qemu: Path | None = None


def conformance(trees: Trees, only: Sequence[str], columns: Sequence[str], out: Path) -> int:
    """Run the tests of the trees that are given; return 0 when none fails on an engine of ours."""
    if trees == Trees():
        raise Failed(
            "which tests? Clone kvm-unit-tests, run ./configure and make in it, and name it: tools/dev "
            "conformance --suite DIR; or name a source tree with other tests: --linux DIR, --qemu DIR",
            2,
        )
    engines = [where for where in columns if where != TCG]
    status = unit_tests(trees.suite.resolve(), only, columns, out) if trees.suite is not None else 0
    if trees.linux is not None:
        status |= compare(selftests.build(trees.linux, out / "selftests"), engines, out)
    if trees.qemu is not None:
        status |= compare(tcgtests.build(trees.qemu, out / "tcgtests"), engines, out)
    return status


def unit_tests(suite: Path, only: Sequence[str], columns: Sequence[str], out: Path) -> int:
    """Run kvm-unit-tests' 64-bit tests; return 0 when none fails on an engine of ours that should pass."""
    tests = read_list(suite)
    unknown = sorted(set(only) - {test.name for test in tests})
    if unknown:
        raise Failed(f"{suite} has no test {unknown[0]!r}", 2)
    chosen = [test for test in tests if test.name in only or not (only or test.left_out)]
    missing = [test.file for test in chosen if not (suite / "x86" / test.file).exists()]
    if missing:
        raise Failed(f"{suite}/x86/{missing[0]} is not there: run ./configure and make in {suite}", 2)
    if TCG in columns and which("qemu-system-x86_64") is None:
        raise Failed("qemu-system-x86_64 is missing: install it, or give --no-tcg", 2)
    results: dict[str, dict[str, Result]] = {}
    print(row("test", *columns), flush=True)
    for test in chosen:
        results[test.name] = {where: run(test, suite, where) for where in columns}
        print(row(test.name, *(cell(result) for result in results[test.name].values())), flush=True)
    left_out = {} if only else {test.name: test.left_out for test in tests if test.left_out}
    write(out, suite, results, left_out)
    return judge(chosen, results)


def row(name: str, *cells: str) -> str:
    """Return a line of the table."""
    return "  ".join([f"{name:32}", *(f"{text:22}" for text in cells)]).rstrip()


def cell(result: Result) -> str:
    """Return what the table says of a result: the verdict, how many checks failed, seconds."""
    failed = f" {len(result.failures)}/{result.checks}" if result.failures else ""
    return f"{result.verdict}{failed} ({result.seconds:.1f} s)"


def write(
    out: Path, suite: Path, results: dict[str, dict[str, Result]], left_out: Mapping[str, str | None]
) -> None:
    """Write all results as JSON, and every output beside it."""
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "-C", str(suite), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    figures = {
        "suite": str(suite),
        "commit": commit.stdout.strip() or None,
        "host": platform.platform(),
        "tests": {
            name: {
                where: {
                    "verdict": result.verdict,
                    "checks": result.checks,
                    "failures": list(result.failures),
                    "seconds": round(result.seconds, 3),
                }
                for where, result in columns.items()
            }
            for name, columns in results.items()
        },
        "left out": left_out,
    }
    (out / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name, columns in results.items():
        for where, result in columns.items():
            (out / f"{name}.{where}.txt").write_text(result.output)
    say(f"figures and outputs are in {out}")


def judge(tests: Sequence[Case], results: dict[str, dict[str, Result]]) -> int:
    """Say what fails on our engines, and return 1 if anything does."""
    wrong = [
        f"{test.name} on {where}: {result.verdict}" + "".join(f"\n     {line}" for line in result.failures)
        for test in tests
        for where, result in results[test.name].items()
        if where != TCG and not result.passed
    ]
    for line in wrong:
        print(f"   {line}", flush=True)
    say(
        f"{len(wrong)} runs on our engines failed" if wrong else f"{len(results)} tests passed on our engines"
    )
    return 1 if wrong else 0
