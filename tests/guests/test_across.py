"""Accesses that cross from one page into the next are no reason to leave translated code."""

from collections.abc import Callable
from pathlib import Path

from ringzero import Machine

ACCESSES = 8 * 2000
"""How often guests/across.c accesses two pages at once when it runs `hot`."""


def test_accesses_across_pages_stay_in_translated_code(build: Callable[[str], Path]) -> None:
    with Machine(kernel=build("across"), engine="translate", memory=64 << 20, append="hot") as machine:
        assert machine.wait(60) == "poweroff"
        interpreted = machine.stats()["processor.interpreted"]
    # The start in 32-bit mode is interpreted: some 12,000 instructions.
    assert interpreted < ACCESSES
