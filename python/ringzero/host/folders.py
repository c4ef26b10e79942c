"""The folders of a VM, each served by a process of its own: the VM's is jailed and opens no files by name.

Such a process has the folder, a socket to the VM's process, and a jail: it makes no sockets, starts nothing, and ends
when the VM's does. What it is asked over the socket it trusts no more than a guest
(crates/io/src/virtio/fs/elsewhere.rs).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ringzero import _core
from ringzero.machine.mount import Mount

__all__ = ["served_elsewhere"]


def served_elsewhere(mounts: Sequence[Mount], name: str) -> list[Mount]:
    """Start a process for each folder of the VM `name`, and return the mounts that know of them.

    For a process with one thread, which closes the descriptors (`server`) when the machine has them. Raises OSError
    when the host gives no process.
    """
    served: list[Mount] = []
    for mount in mounts:
        ours, theirs = socket.socketpair()
        with theirs:
            if os.fork() == 0:
                _serve(mount, theirs.fileno(), name)
        served.append(replace(mount, server=ours.detach()))
    return served


def _serve(mount: Mount, connection: int, name: str) -> NoReturn:
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        # The other folders' sockets would not end with the VM's process while one of these is open here.
        kept = sorted({1, 2, connection})
        for low, high in zip([0, *(fd + 1 for fd in kept)], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(low, high)
        with contextlib.suppress(OSError):
            Path("/proc/self/comm").write_text(f"rz folder {name}")
        _core.serve_folder(os.fspath(mount.here), connection, read_only=mount.read_only)
        status = 0
    except BaseException as error:
        print(f"the folder {mount.here} is served no more: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)
