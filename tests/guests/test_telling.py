"""Hot user code that shares a page with CPUID and XGETBV runs as it stands, but for these."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ringzero import Machine

ROUNDS = 500
"""How often guests/telling.c goes round each of its loops, with an XGETBV in each round."""


def test_pages_with_cpuid_run_directly_but_for_that(
    build: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGZERO_ALWAYS_DIRECT", "1")
    output = bytearray()
    with Machine(kernel=build("telling"), engine="direct", memory=64 << 20, console=output.extend) as machine:
        assert machine.wait(60) == "poweroff"
        stats = machine.stats()
    if stats["direct.impossible"]:
        pytest.skip("this host lets no process of ours trace a child")
    assert output.decode().split()[-1] == "PASS"
    # A stop before each XGETBV, and each CPUID of the loop with one.
    assert stats["direct.breaks"] >= 3 * ROUNDS
    if "cpuid_fault" in Path("/proc/cpuinfo").read_text().split():
        # And each CPUID of the loop with eight; little was left to the translator and the interpreter.
        assert stats["direct.faults"] >= 8 * ROUNDS
        assert stats["direct.steps"] < ROUNDS
