"""The command line of `tools/dev crash`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from house.crash.trial import KINDS, trial


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials, the kinds in turn, and return 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog="tools/dev crash",
        description="Kill machines (SIGKILL) while their guests write and flush, and look whether all that a guest saw "
        "flushed is on its disk, and whether image and file system are clean.",
    )
    parser.add_argument("--times", type=int, default=20, help="how many machines (default: 20)")
    parser.add_argument("--seed", type=int, default=None, help="of the first (default: from the clock)")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this; may be repeated")
    options = parser.parse_args(arguments)
    kinds = options.kind or list(KINDS)
    seed = int(time.time()) if options.seed is None else options.seed
    wrong = flushed = leaky = 0
    for number in range(options.times):
        kind = kinds[number % len(kinds)]
        result = trial(kind, seed + number)
        flushed += result.flushed
        leaky += result.leaks > 0
        if result.wrong:
            wrong += 1
            print(f"{kind}, seed {seed + number}: " + "; ".join(result.wrong), flush=True)
        elif sys.stderr.isatty():
            print(f"\r{number + 1} of {options.times}", end="", file=sys.stderr, flush=True)
    print(
        f"{options.times} machines killed, {flushed} writes flushed before, {wrong} with anything wrong; "
        f"{leaky} images had lost clusters until the next start"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
