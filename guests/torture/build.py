#!/usr/bin/env python3
"""Build torture and the two programs that it starts, all static, from the sources beside this file.

guests/torture/build.py [FOLDER]   into a folder of their own; build/torture/ when none is named
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_OUTPUT = HERE.parents[1] / "build" / "torture"
SOURCES = ("runner.c", "registers.c", "memory.c", "mappings.c", "code.c", "processes.c", "threads.c")
TWINS = (1, 2)

WARNINGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")
# Position independent, so that each start is at another address.
FLAGS = (*WARNINGS, "-static-pie", "-fPIE", "-pthread", "-s")
# At one address, and with nothing in it but what differs.
TWIN_FLAGS = (
    *WARNINGS,
    *("-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie", "-fno-asynchronous-unwind-tables"),
    *("-fno-tree-vectorize", "-nostdlib", "-static", "-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack"),
)


def build_torture(folder: Path = DEFAULT_OUTPUT, compiler: str = "gcc") -> list[Path]:
    """Compile the programs into `folder` and return their paths, torture's first.

    Raises CalledProcessError when the compiler refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    commands = {folder / "torture": [*FLAGS, *(str(HERE / name) for name in SOURCES)]}
    for which in TWINS:
        commands[folder / f"twin-{which}"] = [*TWIN_FLAGS, f"-DWHICH={which}ul", str(HERE / "twin.c")]
    for target, words in commands.items():
        subprocess.run([compiler, "-o", str(target), *words], check=True)
    return list(commands)


if __name__ == "__main__":
    for path in build_torture(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT):
        print(path)
