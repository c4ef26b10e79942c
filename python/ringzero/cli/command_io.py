"""What commands of a guest get from the command line, in `ringzero run` and `ringzero exec` alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ringzero.errors import InputError

if TYPE_CHECKING:
    from ringzero.machine.guest_process import GuestProcess

__all__ = ["environment", "feed"]


def environment(pairs: Sequence[str]) -> dict[str, str]:
    """Return what `--env NAME=VALUE` says. Raises InputError for what is no such pair."""
    for pair in pairs:
        if "=" not in pair[1:]:
            raise InputError(f"--env {pair!r}: write NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def feed(process: GuestProcess) -> None:
    """Pass our standard input on to a command, to its end."""
    while True:
        try:
            data = os.read(0, 65536)
        except OSError:
            data = b""
        if not data:
            process.close_stdin()
            return
        process.write(data)
