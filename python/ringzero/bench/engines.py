"""Starts the engines that are compared, reads what their guests print, and takes the time from outside."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ringzero.errors import InputError

__all__ = ["QEMU", "Guest", "Run", "qemu_command", "qemu_version", "ringzero_command", "run"]

QEMU = "qemu-system-x86_64"

# An end that is not a power-off leaves its story here.
KEPT_LINES = 2000


@dataclass(frozen=True)
class Guest:
    """One guest, the same for every engine. `memory` is in MiB."""

    kernel: Path
    initrd: Path | None
    append: str
    memory: int


@dataclass
class Run:
    """One run: seconds from start to end, exit status, and its lines with the second at which each came."""

    seconds: float
    status: int
    timed_out: bool
    lines: list[tuple[float, str]] = field(default_factory=list)

    def has(self, words: str) -> bool:
        """Say whether any line contains some words."""
        return any(words in line for _, line in self.lines)

    def tail(self, count: int = 5) -> str:
        """Return the last lines, for a message about a run that failed."""
        return " | ".join(line for _, line in self.lines[-count:]) or "(no output)"


def ringzero_command(guest: Guest, *, engine: str = "direct", kaslr: bool = False) -> list[str]:
    """Return the command that runs a guest under this ringzero."""
    return [
        *this_ringzero(),
        "run",
        *("--kernel", str(guest.kernel)),
        *(("--initrd", str(guest.initrd)) if guest.initrd is not None else ()),
        *("--append", guest.append),
        *("--memory", f"{guest.memory}M"),
        *("--engine", engine),
        *(["--kaslr"] if kaslr else []),
    ]


def this_ringzero() -> list[str]:
    """Return how to start the ringzero that this process is part of, whatever else is on the PATH."""
    script = Path(sys.executable).with_name("ringzero")
    return [str(script)] if script.exists() else [sys.executable, "-m", "ringzero.cli"]


def qemu_command(guest: Guest) -> list[str]:
    """Return the command that runs a guest under QEMU's own translator. Raises InputError without QEMU."""
    program = shutil.which(QEMU)
    if program is None:
        raise InputError(
            f"{QEMU} is not on the PATH: install it (Debian, Ubuntu: apt install qemu-system-x86), or "
            "measure without a comparison: --without-qemu"
        )
    return [
        program,
        *("-accel", "tcg"),
        *("-M", "pc"),
        "-nodefaults",
        *("-display", "none"),
        *("-serial", "stdio"),
        "-no-reboot",
        *("-m", f"{guest.memory}M"),
        *("-kernel", str(guest.kernel)),
        *(("-initrd", str(guest.initrd)) if guest.initrd is not None else ()),
        *("-append", guest.append),
    ]


def qemu_version() -> str:
    """Return QEMU's first line of `--version`, or '' without QEMU."""
    program = shutil.which(QEMU)
    if program is None:
        return ""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]


def run(command: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end with nothing on standard input, and stamp each line of output as it comes.

    `env` is its environment, None for ours. A run that is not over after `timeout` seconds is killed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=env,
    )
    assert process.stdout is not None
    lines: list[tuple[float, str]] = []
    rest = b""
    timed_out = False
    try:
        while True:
            left = began + timeout - time.perf_counter()
            if left <= 0:
                timed_out = True
                process.kill()
                break
            if not select.select([process.stdout], [], [], left)[0]:
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break
            now = time.perf_counter() - began
            *whole, rest = (rest + chunk).split(b"\n")
            lines += [(now, line.decode(errors="replace").strip("\r")) for line in whole]
            del lines[:-KEPT_LINES]
        # What has closed its output must also end.
        try:
            status = process.wait(max(1.0, began + timeout - time.perf_counter()))
        except subprocess.TimeoutExpired:
            timed_out = True
            process.kill()
            status = process.wait()
        seconds = time.perf_counter() - began
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
    return Run(seconds, status, timed_out, lines)
