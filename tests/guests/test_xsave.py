"""User code that has SIMD state in registers again after a system call does not leave translated code for it."""

from collections.abc import Callable
from pathlib import Path

from ringzero import Machine

CALLS = 2 * 5000
"""How many system calls guests/xsave.c makes when it runs `hot`, each with a use of SIMD state on either side."""


def test_simd_state_comes_back_in_translated_code(build: Callable[[str], Path]) -> None:
    with Machine(kernel=build("xsave"), engine="translate", memory=64 << 20, append="hot") as machine:
        assert machine.wait(60) == "poweroff"
        left = machine.stats()["exits.simd"]
    assert left < CALLS // 10
