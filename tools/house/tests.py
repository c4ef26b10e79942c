"""`tools/dev test` and `tools/dev fuzz`: every suite to its end, then one summary."""

import re
import time
from collections.abc import Callable, Sequence

from house import checks, setup
from house.shell import ROOT, VENV, Failed, say, watch

Suite = Callable[[], tuple[int, list[str]]]
"""A suite returns its exit status and its closing lines."""

# Seconds, building included: CI has an hour on two cores and should take a third of it.
CARGO_LIMIT = 1500.0
PYTEST_LIMIT = 1200.0


def check_suite() -> tuple[int, list[str]]:
    """Run all checks."""
    status = checks.check()
    return status, ["all passed" if status == 0 else "some failed, see above"]


def cargo_suite() -> tuple[int, list[str]]:
    """Run cargo's tests, in the dev profile that Cargo.toml optimizes."""
    # The binding is a Python extension module: it links only inside Python, and pytest is its test.
    status, lines = watch(
        ["cargo", "test", "--workspace", "--exclude", "ringzero-binding", "--locked", "--no-fail-fast"],
        limit=CARGO_LIMIT,
    )
    closing = [
        line for line in lines if line.startswith("test result:") and " 0 passed; 0 failed" not in line
    ]
    return status, closing or ["cargo's tests did not get to run"]


def pytest_suite(folder: str) -> Suite:
    """Return the suite that is one folder of tests/."""

    def run() -> tuple[int, list[str]]:
        if not any((ROOT / "tests" / folder).rglob("test_*.py")):
            return 0, ["no tests here yet"]
        status, lines = watch([VENV / "bin/python", "-m", "pytest", f"tests/{folder}"], limit=PYTEST_LIMIT)
        return status, [line for line in lines if re.match(r"=+ .* in [\d.]+s", line)][-1:]

    return run


SUITES: dict[str, Suite] = {
    "check": check_suite,
    "cargo": cargo_suite,
    "house": pytest_suite("house"),
    "unit": pytest_suite("unit"),
    "guests": pytest_suite("guests"),
    "system": pytest_suite("system"),
}


def test(only: Sequence[str] = ()) -> int:
    """Run the suites, all of them to the end, print how each closed, and return 0 if none failed."""
    unknown = sorted(set(only) - set(SUITES))
    if unknown:
        raise Failed(f"no such suite: {', '.join(unknown)}; known: {', '.join(SUITES)}", 2)
    setup.prepare()
    summary: list[str] = []
    failed: list[str] = []
    for name, run in SUITES.items():
        if only and name not in only:
            continue
        say(f"suite {name}")
        began = time.monotonic()
        status, closing = run()
        if status != 0:
            failed.append(name)
        verdict = (
            "passed"
            if status == 0
            else "STOPPED: too long"
            if status == 124
            else f"FAILED with status {status}"
        )
        summary.append(f"{name}: {verdict} after {time.monotonic() - began:.0f} s")
        summary += [f"    {line}" for line in closing]
    say("summary")
    print("\n".join(summary), flush=True)
    say(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


def fuzz(minutes: float, seed: int | None, engines: Sequence[str]) -> int:
    """Compare random instruction sequences with the bare processor, the engines sharing the time evenly.

    Returns 0 if no difference was found. Raises Failed when the machine cannot build it.
    """
    setup.system()
    first = seed if seed is not None else int(time.time())
    failed = False
    for engine in engines:
        share = minutes / len(engines)
        say(
            f"random instructions: {engine} against the bare processor, {share:g} minutes, first seed {first}"
        )
        words = ["--engine", engine, "--minutes", f"{share:g}", "--seed", str(first)]
        status, _ = watch(
            [
                "cargo",
                "run",
                "--release",
                "--locked",
                "-p",
                "ringzero-processor",
                "--example",
                "fuzz",
                "--",
                *words,
            ]
        )
        failed |= status != 0
    return 1 if failed else 0


def fuzz_devices(minutes: float, seed: int | None) -> int:
    """Drive every virtio device as no driver should. Returns 0 if none was harmed.

    Raises Failed when the machine cannot build it.
    """
    setup.system()
    first = seed if seed is not None else int(time.time())
    say(f"hostile drivers: every virtio device, {minutes:g} minutes, first seed {first}")
    cargo = ["cargo", "run", "--release", "--locked", "-p", "ringzero-io", "--features", "testing"]
    words = ["--example", "fuzz-devices", "--", "--minutes", f"{minutes:g}", "--seed", str(first)]
    status, _ = watch([*cargo, *words])
    return 1 if status != 0 else 0
