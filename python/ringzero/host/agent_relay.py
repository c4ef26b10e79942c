"""One client of a VM's process on the line to the guest's agent: it speaks the agent's own frames.

They are those of guests/agent/frame.h. The line is one, and commands are numbered by whoever is at this end of it; so
each client gets numbers of his own, and windows are kept from end to end: what waits here for a client is what its
commands' windows hold, and no more. When a client goes, what it started is ended.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable

from ringzero.errors import RingzeroError
from ringzero.machine import frames as words
from ringzero.machine.exec import AgentLink
from ringzero.machine.frames import HEADER, MAGIC, WORD
from ringzero.machine.guest_process import GuestProcess

__all__ = ["AgentRelay"]

_NUMBER = WORD.pack(1)


class _Output:
    """An output of a command, on its way to the client."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send

    def feed(self, data: bytes) -> None:
        """Take a piece of output; the client says when it was taken."""
        self._send(data)

    def end(self) -> None:
        """The command's end is told by itself."""


class AgentRelay:
    """Serves a connection, on two threads of its own, until the client or the guest goes."""

    def __init__(self, connection: socket.socket, first: bytes, link: AgentLink) -> None:
        """Take over `connection`, with what has arrived on it already."""
        connection.settimeout(None)
        self._connection = connection
        self._arrived = bytearray(first)
        self._link = link
        self._processes: dict[int, GuestProcess] = {}
        self._unsent: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._over = False
        self._push(words.READY, 0, MAGIC + _NUMBER)
        for work in (self._read, self._write):
            threading.Thread(target=work, name="agent-relay", daemon=True).start()

    def _push(self, kind: int, number: int, payload: bytes) -> None:
        """Have a frame sent; never waits."""
        with self._changed:
            if not self._over:
                self._unsent.append(HEADER.pack(kind, 0, number, len(payload)) + payload)
                self._changed.notify()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._unsent or self._over)
                    if not self._unsent:
                        break
                    frame = self._unsent.popleft()
                self._connection.sendall(frame)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        with contextlib.suppress(OSError, RingzeroError):
            self._serve()
        with self._changed:
            self._over = True
            self._changed.notify()
        for process in list(self._processes.values()):
            process.abandon()
        self._connection.close()

    def _serve(self) -> None:
        hello = HEADER.pack(words.HELLO, 0, 0, len(MAGIC) + WORD.size) + MAGIC + _NUMBER
        if self._exactly(len(hello)) != hello:
            return
        while True:
            kind, flags, number, size = HEADER.unpack(self._exactly(HEADER.size))
            if size > words.FRAME_MAX:
                return
            payload = self._exactly(size)
            if kind == words.EXEC:
                self._start(number, flags, payload)
            elif number in self._processes:
                _pass_on(self._processes[number], kind, flags, payload)
            self._push(words.ACK, 0, WORD.pack(HEADER.size + size))

    def _exactly(self, size: int) -> bytes:
        while len(self._arrived) < size:
            data = self._connection.recv(65536)
            if not data:
                raise ConnectionResetError
            self._arrived += data
        taken = bytes(self._arrived[:size])
        del self._arrived[:size]
        return taken

    def _start(self, number: int, flags: int, payload: bytes) -> None:
        outputs = [
            _Output(lambda data, kind=kind: self._push(kind, number, data))  # type: ignore[misc]
            for kind in (words.STDOUT, words.STDERR)
        ]
        process = self._link.begin(payload, flags, ["a command"], None, outputs[0], outputs[1])
        process.when_credited(lambda size: self._push(words.CREDIT, number, WORD.pack(size)))
        self._processes[number] = process
        told: list[int] = []

        def tell() -> None:
            if process.pid is not None and not told:
                told.append(process.pid)
                self._push(words.STARTED, number, WORD.pack(process.pid))
            if process.ended and self._processes.pop(number, None) is not None:
                if (
                    process.last_words is None
                ):  # lost with the guest: the client learns it as from the line itself
                    with contextlib.suppress(OSError):
                        self._connection.shutdown(socket.SHUT_RDWR)
                else:
                    self._push(process.last_words[0], number, process.last_words[1])

        process.when_known(tell)


def _pass_on(process: GuestProcess, kind: int, flags: int, payload: bytes) -> None:
    which = words.STDERR if flags else words.STDOUT
    if kind == words.STDIN:
        process.write(payload)
    elif kind == words.STDIN_EOF:
        process.close_stdin()
    elif kind == words.CLOSE:
        process.close_output(which)
    elif kind == words.TAKEN and len(payload) == WORD.size:
        process.taken(which, WORD.unpack(payload)[0])
    elif kind == words.SIGNAL and len(payload) == WORD.size:
        process.send_signal(WORD.unpack(payload)[0])
    elif kind == words.RESIZE and len(payload) == words.WINDOW.size:
        process.resize(*words.WINDOW.unpack(payload))
