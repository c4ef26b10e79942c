"""Jumps that count, and prefixes that only pad, are no reason to leave translated code."""

from collections.abc import Callable
from pathlib import Path

from ringzero import Machine

ROUNDS = 6 * 4000
"""How often guests/flow.c goes round its loops when it runs `hot`, each with at least one such instruction."""


def test_jumps_that_count_stay_in_translated_code(build: Callable[[str], Path]) -> None:
    with Machine(kernel=build("flow"), engine="translate", memory=64 << 20, append="hot") as machine:
        assert machine.wait(60) == "poweroff"
        interpreted = machine.stats()["processor.interpreted"]
    # The start in 32-bit mode is interpreted: some 12,000 instructions.
    assert interpreted < ROUNDS
