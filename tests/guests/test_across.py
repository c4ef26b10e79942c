"""Accesses that cross from one page into the next are no reason to leave translated code."""

from collections.abc import Callable

ACCESSES = 8 * 2000
"""How often guests/across.c accesses two pages at once when it runs `hot`."""


def test_accesses_across_pages_stay_in_translated_code(hot_counters: Callable[[str], dict[str, int]]) -> None:
    # The start in 32-bit mode is interpreted: some 12,000 instructions.
    assert hot_counters("across")["processor.interpreted"] < ACCESSES
