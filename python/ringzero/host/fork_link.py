"""The daemon's end of the fork server: starts it, asks it for VMs, and starts another one when it is gone."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ringzero.host.loop import Loop
from ringzero.host.spec import GuestSpec
from ringzero.host.wire import Message, Peer

__all__ = ["ForkLink"]

Answered = Callable[[Message], None]
Gone = Callable[[int, int], None]
"""Told of a child that has ended: its process, and its status as os.waitpid has it."""


class ForkLink:
    """The fork server of a daemon."""

    def __init__(self, loop: Loop, gone: Gone, say: Callable[[str], None]) -> None:
        self._loop = loop
        self._gone = gone
        self._say = say
        self._numbers = itertools.count(1)
        self._asked: dict[int, Answered] = {}
        self._peer: Peer | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closing = False

    @property
    def pid(self) -> int | None:
        """The fork server's process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start a fork server. Raises OSError when the host gives no process."""
        ours, theirs = socket.socketpair()
        with theirs:
            # One arena for the C library's heap: a VM's threads allocate little, and each arena keeps what it had.
            environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "ringzero.host.fork_server", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                )
            except OSError:
                ours.close()
                raise
        self._peer = Peer(self._loop, ours, self._received, self._closed)

    def fork(self, spec: GuestSpec, fds: Sequence[int], answered: Answered, **fields: Any) -> None:
        """Ask for a VM; `answered` is called with the answer, which is an error when there is no fork server."""
        if self._peer is None:
            try:
                self.start()
            except OSError as error:
                answered({"error": f"the fork server cannot be started: {error.strerror}", "status": 1})
                return
        assert self._peer is not None
        number = next(self._numbers)
        self._asked[number] = answered
        self._peer.send({"do": "fork", "id": number, "spec": spec.as_json()} | fields, fds)

    def close(self) -> None:
        """Let the fork server go; its VMs go on."""
        self._is_closing = True
        if self._peer is not None:
            self._peer.close()

    def _received(self, _peer: Peer, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        if message.get("event") == "gone":
            self._gone(int(message["pid"]), int(message["status"]))
        elif (answered := self._asked.pop(message.get("id", 0), None)) is not None:
            answered(message)

    def _closed(self, _peer: Peer, _why: str) -> None:
        self._peer = None
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
        if self._is_closing:
            return
        self._say("the fork server has ended: the next vm gets another one")
        asked, self._asked = self._asked, {}
        for answered in asked.values():
            answered({"error": "the fork server ended before it had started the vm", "status": 1})
