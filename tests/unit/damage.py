"""Kernels with random bytes in their headers: whatever is in them, a plan or an error of ours."""

from __future__ import annotations

from random import Random

from ringzero.errors import RingzeroError
from ringzero.machine.boot import plan_boot

MIB = 1 << 20


def plan_damaged(choose: Random, good: bytes, *, rounds: int, header: range, most: int) -> dict[str, int]:
    """Damage 1 to `most` bytes of `header`, and sometimes cut the end; count how often a plan or an error came.

    Every plan must stay inside memory, and no error but our own may come.
    """
    outcomes = {"plan": 0, "error": 0}
    for _ in range(rounds):
        data = bytearray(good)
        for _ in range(choose.randint(1, most)):
            data[choose.randrange(header.start, header.stop)] = choose.choice(
                (0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256))
            )
        if choose.random() < 0.2:
            del data[choose.randrange(len(data)) :]
        try:
            plan = plan_boot(bytes(data), memory=64 * MIB, initrd=b"i" * 4096)
        except RingzeroError:
            outcomes["error"] += 1
        else:
            outcomes["plan"] += 1
            assert all(p.address >= 0 and p.end <= 64 * MIB for p in plan.pieces)
    return outcomes
