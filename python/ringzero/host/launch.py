"""Starting a daemon, in a session of its own, and waiting until it has begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ringzero.errors import InputError, InternalError
from ringzero.host import facts
from ringzero.host.options import DaemonOptions
from ringzero.host.policy import load_policy
from ringzero.host.runtime import Runtime
from ringzero.host.wire import checked
from ringzero.machine.spec import parse_size

__all__ = ["start_daemon"]

SWAP_FOLDER = "/var/tmp"
"""Where swap files are, if nothing is said: on disk, while the runtime folder is often in memory."""
DEFAULT_PART = 0.9
"""Of the host's memory for VMs, if nothing else is said."""


def start_daemon(
    runtime: Runtime,
    *,
    memory: str | int | None = None,
    swap: str | int = 0,
    swap_folder: str | os.PathLike[str] | None = None,
    policy: str | os.PathLike[str] | None = None,
    record: str | os.PathLike[str] | None = None,
) -> int:
    """Start a daemon and return its process. Sizes are bytes, or text like "4G".

    `memory` is what VMs may take of the host's, nine tenths of it if nothing is said; `swap` what they may take of
    disk, in `swap_folder`. Raises InputError: a daemon runs already, a policy that is none.
    """
    if policy is not None:
        load_policy(Path(policy))  # here first: its mistakes are the operator's to see
    runtime.prepare()
    if record is not None and not os.path.isdir(os.path.dirname(os.path.abspath(record))):
        raise InputError(f"counters cannot be recorded to {record}: there is no such folder")
    options = DaemonOptions(
        root=str(runtime.root),
        memory=int(DEFAULT_PART * facts.memory_limit()) if memory is None else parse_size(memory),
        swap=parse_size(swap, "swap"),
        swap_folder=_swap_folder(swap_folder),
        policy=None if policy is None else os.path.abspath(policy),
        record=None if record is None else os.path.abspath(record),
    )
    log = os.open(runtime.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "ringzero.host.daemon", json.dumps(options.as_json())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(log)
    assert process.stdout is not None
    with process.stdout as words:
        line = words.readline()
    if not line:
        process.wait()
        raise InternalError(f"the daemon ended before it had begun: {runtime.log} says why")
    answer = checked(json.loads(line))
    # It is a child of ours only until we end; nobody waits for it.
    process.returncode = 0
    return int(answer["pid"])


def _swap_folder(chosen: str | os.PathLike[str] | None) -> str:
    folder = os.path.abspath(SWAP_FOLDER if chosen is None else chosen)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"the swap folder {folder} is none that can be written to: give another")
    return folder
