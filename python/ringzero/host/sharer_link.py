"""The daemon's end of the sharer: finds it or starts it, has VMs join it, and starts another one when it is gone."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ringzero.host.loop import Loop
from ringzero.host.wire import Message, Peer, connect, listen

__all__ = ["Joined", "Pool", "SharerLink"]

PATIENCE = 5.0
"""Seconds after which another sharer is tried, when the host had no process for it."""

Pool = tuple[int, int]
"""Which file a group's pool is: device and inode."""

Joined = Callable[[Message, list[int]], None]
"""Told of the answer, and of descriptors, which become its own: the VM's socket, and the pool's if it gets one."""


class SharerLink:
    """The sharer of a daemon. VMs are given sockets to it; what they say there is theirs."""

    def __init__(self, loop: Loop, path: Path, lost: Callable[[], None]) -> None:
        """Use the sharer that listens at `path`, or start one there. `lost` is called when it was gone, after another
        one was started: then every VM that shares must join again, with its pool, before `recovered`.
        """
        self._loop = loop
        self._path = path
        self._lost = lost
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[Joined, list[int]]] = {}
        self._peer: Peer | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closing = False

    def start(self) -> bool:
        """Find the sharer of an earlier daemon, or start one; True when it was there. Raises OSError."""
        try:
            connection = connect(self._path)
        except OSError:
            self._begin()
            return False
        self._peer = Peer(self._loop, connection, self._received, self._closed)
        return True

    def _begin(self) -> None:
        with listen(self._path) as listener:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ringzero.host.sharer", str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        # It is heard as soon as it looks: the socket listens already.
        self._peer = Peer(self._loop, connect(self._path), self._received, self._closed)

    def join(self, group: str, vm: str, pages: int, pool: Pool | None, joined: Joined) -> None:
        """Have a VM of `pages` pages join a group. A VM that has a pool already, `pool`, gets none."""
        ours, theirs = socket.socketpair()
        with ours:
            fields = {"group": group, "vm": vm, "pages": pages} | (
                {} if pool is None else {"pool": list(pool)}
            )
            self._ask("join", fields, [ours.fileno()], joined, [theirs.detach()])

    def recovered(self) -> None:
        """Say that all VMs that had shared pages have joined again."""
        self._ask("recovered", {}, [], _ignore, [])

    def report(self, answered: Callable[[Message], None]) -> None:
        """Ask for the counts of all groups, and what has happened."""
        self._ask("report", {}, [], lambda answer, _: answered(answer), [])

    def audit(self, answered: Callable[[Message], None]) -> None:
        """Ask what is not as it must be."""
        self._ask("audit", {}, [], lambda answer, _: answered(answer), [])

    def stop(self) -> None:
        """End the sharer: there is no VM that it could serve."""
        self._is_closing = True
        self._ask("stop", {}, [], _ignore, [])

    def close(self) -> None:
        """Let the sharer go; it serves the VMs as long as there are any."""
        self._is_closing = True
        if self._peer is not None:
            self._peer.close()

    @property
    def pid(self) -> int | None:
        """The sharer's process, when it is one of ours."""
        return None if self._process is None else self._process.pid

    def _ask(self, do: str, fields: Message, fds: list[int], answered: Joined, kept: list[int]) -> None:
        if self._peer is None:
            _close(kept)
            answered({"error": "there is no sharer", "status": 1}, [])
            return
        number = next(self._numbers)
        self._asked[number] = (answered, kept)
        self._peer.send({"do": do, "id": number} | fields, fds)

    def _received(self, _peer: Peer, message: Message, fds: list[int]) -> None:
        known = self._asked.pop(message.get("id", 0), None)
        if known is None:
            _close(fds)
            return
        answered, kept = known
        if "error" in message:
            _close(kept + fds)
            answered(message, [])
        else:
            answered(message, kept + fds)

    def _closed(self, _peer: Peer, _why: str) -> None:
        self._peer = None
        process, self._process = self._process, None
        if process is not None and not self._is_closing:
            process.kill()
            process.wait()
        asked, self._asked = self._asked, {}
        for answered, kept in asked.values():
            _close(kept)
            answered({"error": "the sharer ended before it had answered", "status": 1}, [])
        if not self._is_closing:
            self._begin_again()

    def _begin_again(self) -> None:
        if self._is_closing:
            return
        try:
            self._begin()
        except OSError:  # no process to be had just now
            self._loop.call_later(PATIENCE, self._begin_again)
        else:
            self._lost()


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _ignore(_answer: Message, fds: list[int]) -> None:
    _close(fds)
