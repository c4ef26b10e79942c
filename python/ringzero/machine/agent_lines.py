"""The streams that lead to a guest's agent: the one that it begins on, and a faster one that it moves to.

The first is a serial port, which every kernel has a driver for; the second a port of a virtio console, whose driver
would hold up the first command. guests/agent/frame.h has the words of the move.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ringzero.machine.frames import GREETING, WORD

if TYPE_CHECKING:
    from ringzero.machine.vsock import VsockListener

__all__ = ["READ_SIZE", "VSOCK_PORT", "AcceptedLines", "AgentLines", "Lines", "StartedAgain"]

READ_SIZE = 256 * 1024
"""Bytes: the agent's largest frame, and some. One read takes what the socket holds."""


class StartedAgain(Exception):
    """Another agent speaks on the first line: what the one before ran is lost. `words` are its first."""

    def __init__(self, words: bytes) -> None:
        super().__init__()
        self.words = words


class Lines(Protocol):
    """What leads to one agent. One thread receives and moves; the others are for any."""

    @property
    def present(self) -> socket.socket | None:
        """The line that is read; None when there is none yet."""

    def port(self) -> socket.socket | None:
        """Return the line that the agent may move to; None when there is none. Raises OSError, RingzeroError."""

    def move(self) -> None:
        """Read that from now on."""

    def receive(self) -> bytes:
        """Return what has come next; nothing at the end. Raises StartedAgain, and OSError."""

    def wake(self) -> None:
        """End the lines, so that whoever receives is told."""

    def close(self) -> None:
        """Close the lines."""


class AgentLines:
    """A line, and the port that the agent may move to; from then on the first is listened to for another agent."""

    def __init__(self, first: socket.socket, port: Callable[[], socket.socket] | None = None) -> None:
        """Take over `first`, and what `port` gives when it is first asked for."""
        self._first: socket.socket | None = first
        self._open_port = port
        self._port: socket.socket | None = None
        self._present = first
        self._heard = bytearray()  # the end of what came on the first line since the move

    @property
    def present(self) -> socket.socket | None:
        """The line that is read; None when there is none yet."""
        return self._present

    def port(self) -> socket.socket | None:
        """Return the line that the agent may move to; None when there is none."""
        if self._port is None and self._open_port is not None:
            self._port = self._open_port()
        return self._port

    def move(self) -> None:
        """Read the port from now on, and look out for an agent that begins again on the first line."""
        if self._port is not None:
            self._present = self._port
            self._heard.clear()

    def receive(self) -> bytes:
        """Return what has come next; nothing at the end. Raises StartedAgain, and OSError."""
        if self._present is self._first or self._first is None:
            return self._present.recv(READ_SIZE)
        poll = select.poll()
        for line in (self._present, self._first):
            poll.register(line, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._first.fileno() in ready:
                data = self._first.recv(READ_SIZE)
                if not data:
                    return data
                self._listen(data)
            if self._present.fileno() in ready:
                return self._present.recv(READ_SIZE)

    def _listen(self, data: bytes) -> None:
        self._heard += data
        at = self._heard.find(GREETING)
        if at >= 0 and len(self._heard) >= at + len(GREETING) + WORD.size:
            words = bytes(self._heard[at:])
            self._heard.clear()
            assert self._first is not None
            self._present = self._first
            raise StartedAgain(words)
        del self._heard[: at if at >= 0 else max(0, len(self._heard) - len(GREETING))]

    def wake(self) -> None:
        """End the lines, so that whoever receives is told."""
        for line in (self._first, self._port):
            if line is not None:
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the lines."""
        for line in (self._first, self._port):
            if line is not None:
                line.close()


VSOCK_PORT = 29274
"""Where the host waits for the agent (guests/agent/line.c has the same)."""


class AcceptedLines:
    """A line that the agent makes, by a socket of its kind: the next one when that has ended."""

    def __init__(self, listener: VsockListener) -> None:
        self._listener = listener
        self.present: socket.socket | None = None

    def port(self) -> None:
        """There is none."""

    def move(self) -> None:
        """There is nowhere to go."""

    def receive(self) -> bytes:
        """Return what has come next; nothing when the machine has ended. Raises StartedAgain, and OSError."""
        if self.present is not None:
            if data := self.present.recv(READ_SIZE):
                return data
            self.present.close()
            self.present, _ = self._listener.accept()
            raise StartedAgain(b"")
        self.present, _ = self._listener.accept()
        return self.present.recv(READ_SIZE)

    def wake(self) -> None:
        """End the present line; the listener ends with the machine."""
        if (present := self.present) is not None:
            with contextlib.suppress(OSError):
                present.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the line, and wait for no other."""
        self._listener.close()
        if self.present is not None:
            self.present.close()
