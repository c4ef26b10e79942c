"""The program that fills a guest's memory with a pattern and checks it (guests/memory/pattern.c)."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ringzero import images
from ringzero.errors import InternalError

__all__ = ["program", "run_here"]


@cache
def program() -> bytes:
    """Return the program, a static one: it runs in any guest, and here."""
    path = Path(images.__file__).parent / "builtin" / "pattern"
    if not path.is_file():
        raise InternalError(
            f"the pattern program is missing from the package ({path}): build it with tools/dev guests"
        )
    return path.read_bytes()


def run_here(arguments: list[str]) -> str:
    """Run the program on this machine itself, and return what it says: what a guest's must say, too."""
    with tempfile.TemporaryDirectory(prefix="rz-bench-") as folder:
        path = Path(folder) / "pattern"
        path.write_bytes(program())
        path.chmod(0o755)
        done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InternalError(f"the pattern program fails on this machine itself: {done.stdout}{done.stderr}")
    return done.stdout
