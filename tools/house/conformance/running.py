"""Running one test of kvm-unit-tests on something, and reading what came of it."""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from house.conformance.unittests import Case
from house.shell import ROOT, VENV, environment

TCG = "tcg"
# A test's own number N comes out as N * 2 + 1, of QEMU's isa-debug-exit as of our debug-exit; lib/report.c sees to
# it that "nothing to test" becomes 77.
STATUSES = {1: "pass", 77: "skip"}
STARTED = "smp: waiting for"
"""What every test prints before it tests anything (lib/x86/smp.c)."""
LATE = 124
ALL_FEATURES = "+pku,+pks"
"""What `-cpu max` stands for here."""
# Beside the time that the list allows: for the interpreter, and for a busy machine.
PATIENCE = {"interpret": 10.0, "translate": 6.0, "direct": 6.0, TCG: 3.0}


@dataclass(frozen=True)
class Result:
    """What became of a test: `verdict` is pass, fail, skip, timeout or "ended N"; `failures` are the lines that say
    FAIL, `checks` how many lines said PASS or FAIL, `seconds` how long it took.
    """

    verdict: str
    checks: int
    failures: tuple[str, ...]
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; a test that skips itself is not wrong."""
        return self.verdict in ("pass", "skip")


def run(test: Case, suite: Path, where: str) -> Result:
    """Run a test under QEMU ("tcg") or on one of our engines."""
    with tempfile.NamedTemporaryFile("w", prefix="conformance-", suffix=".env") as settings:
        # The suite's way to tell a test about its machine where there is no firmware configuration device.
        # Without a test device apic.flat leaves out KVM's paravirtual IPIs, of which CPUID says nothing here.
        device = int(test.file != "apic.flat")
        settings.write(f"NR_CPUS={test.processors}\nMEMSIZE=256\nTEST_DEVICE={device}\nBOOTLOADER=0\n")
        settings.flush()
        command = under_qemu(test, suite) if where == TCG else on_ours(test, suite, where, settings.name)
        status, output, seconds = timed(command, test.timeout * PATIENCE[where])
        return read(status, output.decode(errors="replace").replace("\r", ""), seconds)


def under_qemu(test: Case, suite: Path) -> list[str]:
    """Return the command that runs a test under TCG, with the devices that the suite's own runner adds."""
    words = ["qemu-system-x86_64", "-accel", "tcg", "--no-reboot", "-nodefaults", "-display", "none"]
    words += ["-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]
    words += ["-serial", "stdio", "-device", "pci-testdev"]
    # `accel=kvm` and the like in the list are for KVM.
    qemu = [word for word in test.qemu if word != "-enable-kvm"]
    words += ["-m", test.memory] if "-m" not in qemu else []
    words += ["-smp", str(test.processors), "-kernel", str(suite / "x86" / test.file), *qemu]
    return [*words, *(["-append", " ".join(test.arguments)] if test.arguments else [])]


def on_ours(test: Case, suite: Path, engine: str, settings: str) -> list[str]:
    """Return the command that runs a test on one of our engines."""
    words = [str(VENV / "bin/python"), "-m", "ringzero", "run", "--engine", engine, "--memory", test.memory]
    words += ["--cpus", str(test.processors), "--device", "debug-exit", "--device", "pc-testdev"]
    words += ["--kernel", str(suite / "x86" / test.file), "--initrd", settings]
    if test.wants_all:
        words += ["--cpu", ALL_FEATURES]
    return [*words, *([f"--append={' '.join(test.arguments)}"] if test.arguments else [])]


def timed(command: Sequence[str], limit: float, given: bytes = b"") -> tuple[int, bytes, float]:
    """Run a command, with `given` on its standard input; return its status (124 when it was stopped after `limit`
    seconds), output and seconds.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(given, timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = LATE
    return status, output, time.monotonic() - began


def read(status: int, output: str, seconds: float) -> Result:
    """Return what a status and an output say."""
    failures = tuple(re.findall(r"^FAIL: (.*)$", output, re.MULTILINE))
    checks = len(re.findall(r"^(?:PASS|FAIL): ", output, re.MULTILINE))
    if STARTED not in output:
        # QEMU and ringzero end with small numbers of their own when they cannot run something.
        verdict = f"did not start ({status})"
    elif status == LATE:
        verdict = "timeout"
    elif status in STATUSES and not failures:
        verdict = STATUSES[status]
    elif (status & 1 and status > 1) or failures:
        verdict = "fail"
    else:
        verdict = f"ended {status}"
    return Result(verdict, checks, failures, seconds, output)
