"""Jumps that count, and prefixes that only pad, are no reason to leave translated code."""

from collections.abc import Callable

ROUNDS = 6 * 4000
"""How often guests/flow.c goes round its loops when it runs `hot`, each with at least one such instruction."""


def test_jumps_that_count_stay_in_translated_code(hot_counters: Callable[[str], dict[str, int]]) -> None:
    # The start in 32-bit mode is interpreted: some 12,000 instructions.
    assert hot_counters("flow")["processor.interpreted"] < ROUNDS
