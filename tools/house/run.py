"""Programs of this tree, and `make run`: the default guest, to its prompt, or a demonstration."""

import os
import sys
from collections.abc import Sequence

from house.shell import ROOT, VENV, environment, say, status_of

GUEST = "debian"


def ringzero(arguments: Sequence[str]) -> int:
    """Run this tree's `ringzero` and return its exit status."""
    return status_of([VENV / "bin/ringzero", *arguments])


def house_program(module: str, arguments: Sequence[str]) -> int:
    """Run a part of tools/dev that needs the package, and return its exit status."""
    return status_of(
        [VENV / "bin/python", "-m", module, *arguments], extra={"PYTHONPATH": str(ROOT / "tools")}
    )


def default_guest() -> int:
    """Fetch the default guest if it is not in the cache, and boot it."""
    # `pull` is silent and offline when the cache already holds the image.
    status = ringzero(["pull", GUEST])
    if status != 0:
        return status
    if sys.stdin.isatty():
        say(f"ringzero run {GUEST}   (Ctrl-] leaves)")
        program = VENV / "bin/ringzero"
        # In place of this process, so that the terminal and its signals belong to ringzero alone.
        os.execve(program, [str(program), "run", GUEST], environment())
    say(f"no terminal on standard input: ringzero run {GUEST} -- sh -c '(tools/demo.sh)'")
    return ringzero(["run", GUEST, "--", "sh", "-c", (ROOT / "tools/demo.sh").read_text()])
