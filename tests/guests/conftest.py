"""Our own small guests, built once, and what becomes of them."""

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringzero import Machine, _core

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 64 << 20
"""Bytes of guest memory: every guest fits, and all of it is compared."""
TIMEOUT = 60.0
"""Seconds; the longest takes 3 s under the interpreter."""

Build = Callable[[str], Path]


@dataclass
class Outcome:
    """How a guest ended."""

    reason: str
    lines: list[str]
    registers: dict[str, int]
    pages: list[bytes]
    """A digest of each page of guest memory."""

    def differing_pages(self, other: "Outcome") -> list[int]:
        """Return the addresses of pages that are not the same."""
        return [n << 12 for n, (a, b) in enumerate(zip(self.pages, other.pages, strict=True)) if a != b]


@pytest.fixture(scope="session")
def build() -> Build:
    """Return the ELF file of a guest by its name."""
    if not all(shutil.which(tool) for tool in ("gcc", "ld", "strip")):
        pytest.skip("no gcc and binutils to build the guests with")
    subprocess.run([sys.executable, str(ROOT / "guests" / "build.py")], check=True, stdout=subprocess.DEVNULL)
    return lambda name: ROOT / "build" / "guests" / f"{name}.elf"


@pytest.fixture(params=_core.engines())
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    return str(request.param)


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def run(build: Build) -> Run:
    """Run a guest to its end; `patience` (seconds) later it is stopped from outside."""

    def run(name: str, engine: str, append: str = "", patience: float = TIMEOUT, cpu: str = "") -> Outcome:
        output = bytearray()
        with Machine(
            kernel=build(name), engine=engine, memory=MEMORY, append=append, cpu=cpu, console=output.extend
        ) as machine:
            reason = machine.wait(patience)
            if reason is None:
                began = time.monotonic()
                machine.stop()
                assert time.monotonic() - began < 10, "a machine must stop at once"
                reason = machine.end_reason
            assert reason is not None
            memory = machine.read_memory(0, MEMORY)
            pages = [hashlib.sha256(memory[at : at + 4096]).digest() for at in range(0, MEMORY, 4096)]
            lines = output.decode("ascii", "replace").replace("\r", "").splitlines()
            return Outcome(reason, lines, machine.registers(), pages)

    return run


@pytest.fixture(scope="session")
def hot_counters(build: Build) -> Callable[[str], dict[str, int]]:
    """Run a guest `hot` under the translator, over and over what it is about, and return the machine's counters."""

    def run(name: str) -> dict[str, int]:
        with Machine(kernel=build(name), engine="translate", memory=MEMORY, append="hot") as machine:
            assert machine.wait(TIMEOUT) == "poweroff"
            return machine.stats()

    return run
