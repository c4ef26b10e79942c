"""User code that has SIMD state in registers again after a system call does not leave translated code for it."""

from collections.abc import Callable

CALLS = 2 * 5000
"""How many system calls guests/xsave.c makes when it runs `hot`, each with a use of SIMD state on either side."""


def test_simd_state_comes_back_in_translated_code(hot_counters: Callable[[str], dict[str, int]]) -> None:
    assert hot_counters("xsave")["exits.simd"] < CALLS // 10
