"""Whether the clock by which a guest measured itself was right: the host's clock stands beside it."""

from __future__ import annotations

import re

from ringzero.bench.compute import Item
from ringzero.bench.engines import Run
from ringzero.errors import GuestError

__all__ = ["clock_complaint"]

MARK = re.compile(r"BENCH-(START|STOP)$")


def clock_complaint(done: Run, word: str) -> str | None:
    """Return how the guest's clock differs from the host's between its two marks, when it is by more than lines take.

    The guest prints BENCH-START, BENCH-STOP and `WORD-CLOCK nanoseconds`. Raises GuestError when it did not.
    """
    marks = {found[1]: moment for moment, text in done.lines if (found := MARK.search(text))}
    clock = re.compile(rf"{word}-CLOCK (\d+)$")
    told = [int(found[1]) / 1e9 for _, text in done.lines if (found := clock.search(text))]
    if len(marks) != 2 or len(told) != 1:
        raise GuestError(f"its marks are missing: {done.tail()}")
    item = Item(told[0], marks["STOP"] - marks["START"], "")
    if not item.clock_differs:
        return None
    return f"the guest's clock says {item.seconds:.3f} s, the host's {item.host_seconds:.3f} s"
