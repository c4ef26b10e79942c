#!/usr/bin/env python3
"""Build the guest agent, a static program without a C library, from the sources beside this file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("agent.c", "line.c", "mount.c", "process.c", "builtin.c", "tar_out.c", "tar_in.c")
DEFAULT_OUTPUT = HERE.parents[1] / "python" / "ringzero" / "images" / "builtin" / "agent"

# -mgeneral-regs-only: no vector state, so the guest kernel has none to save for process 1.
FLAGS = (
    *("-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie", "-fno-asynchronous-unwind-tables"),
    *("-mgeneral-regs-only", "-fcf-protection=none"),
    *("-nostdlib", "-static", "-s", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,norelro"),
)


def build_agent(output: Path = DEFAULT_OUTPUT, compiler: str = "gcc") -> Path:
    """Compile the agent to `output` and return that path. Raises CalledProcessError when the compiler
    refuses.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".new")
    subprocess.run(
        [compiler, *FLAGS, "-o", str(temporary), *(str(HERE / name) for name in SOURCES)], check=True
    )
    temporary.chmod(0o755)
    temporary.replace(output)
    return output


if __name__ == "__main__":
    print(build_agent(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT))
