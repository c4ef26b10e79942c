"""A guest for the making of an image: it has disks, runs one command, and powers off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ringzero.machine.disk import Disk

if TYPE_CHECKING:
    from ringzero.images import Image

__all__ = ["run_guest"]

# dpkg and what it starts are many programs, each with code of its own: an eighth of this is for their translations.
MEMORY = "1G"


def run_guest(
    image: Image, disks: Sequence[Path], args: Sequence[str], output: Callable[[bytes], None], timeout: float
) -> int | None:
    """Boot `image` with raw `disks`, run a command, power off, and return the command's status.

    `output` is given what the command says. Returns None when `timeout` (seconds) passed first. Raises
    GuestError when the guest fails.
    """
    from ringzero.machine.machine import Machine

    with Machine(image, memory=MEMORY, disks=[Disk(path) for path in disks], shell=False) as machine:
        process = machine.spawn(args, stdout=output, stderr=output, stdin=False)
        status = process.wait(timeout)
        if status == 0:
            machine.power_off()
    return status
