"""How the processes of a host talk: JSON objects, one a line, over Unix stream sockets; descriptors go with a line.

A request has "do", what is wanted, and may have "id", which the answer repeats. An answer has "ok", or "error" with
one sentence and "status", the exit status that this error would have. What comes by itself has "event". A message
with "fds": N goes with N descriptors. Both ends take nothing for granted: a line that is too long or no object, or
descriptors that nobody announced, end the connection.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ringzero.errors import InputError, InternalError, RingzeroError
from ringzero.host.loop import READ, WRITE, Loop

__all__ = [
    "LONGEST",
    "Channel",
    "Message",
    "Peer",
    "Rubbish",
    "accept_own",
    "connect",
    "credentials",
    "failure",
    "listen",
]

Message = dict[str, Any]

LONGEST = 4 << 20
"""Bytes a line: a list of thousands of VMs, or the states of a VM with terabytes."""
MOST_DESCRIPTORS = 16
"""That may wait for their message."""
MOST_UNSENT = 16 << 20
"""Bytes that wait for a peer that does not read. Then it is one no longer."""
_PIECE = 1 << 16
_CREDENTIALS = struct.Struct("iII")


class Rubbish(Exception):
    """What arrived is no message: one sentence says why."""


def failure(error: RingzeroError) -> Message:
    """Return the answer that tells of an error."""
    return {"error": str(error), "status": error.exit_status}


def credentials(connection: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end, as they were when it connected or listened."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(raw)
    return process, user


def accept_own(listener: socket.socket) -> socket.socket | None:
    """Take a connection; None when it is another user's, or gone already."""
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        if credentials(connection)[1] == os.geteuid():
            return connection
        connection.close()
    return None


@contextlib.contextmanager
def _short(path: Path) -> Any:
    """Give a name for `path` that fits into a socket address, whose limit is 107 bytes."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def listen(path: Path, backlog: int = 64) -> socket.socket:
    """Return a listening socket at `path`, in the place of one that nobody listens on any more."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with _short(path) as name:
        listener.bind(name)
    listener.listen(backlog)
    return listener


def connect(path: Path, timeout: float | None = 10.0) -> socket.socket:
    """Connect to who listens at `path`. Raises OSError when nobody does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        with _short(path) as name:
            connection.connect(name)
    except OSError:
        connection.close()
        raise
    return connection


def _packed(message: Message) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(data) > LONGEST:
        raise InternalError(f"a message of {len(data)} bytes is too long to be sent")
    return data


def _send_some(connection: socket.socket, data: bytes | memoryview, fds: Sequence[int]) -> int:
    if not fds:
        return connection.send(data, socket.MSG_NOSIGNAL)
    rights = array.array("i", fds)
    return connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL)


class _Arrivals:
    """Bytes and descriptors that arrived, until they make messages."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._searched = 0
        self._descriptors: list[int] = []

    def receive(self, connection: socket.socket) -> bool:
        """Take in what is there; False at the end. Raises BlockingIOError, Rubbish, and OSError."""
        data, fds, flags, _ = socket.recv_fds(connection, _PIECE, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        self._descriptors += fds
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > MOST_DESCRIPTORS:
            raise Rubbish("more descriptors came than any message has")
        self.data += data
        return bool(data)

    def next(self) -> tuple[Message, list[int]] | None:
        """Return a message that is whole, and its descriptors, which are the caller's; None when there is none."""
        end = self.data.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self.data)
            if len(self.data) > LONGEST:
                raise Rubbish(f"a line is longer than {LONGEST >> 20} MiB")
            return None
        line = bytes(self.data[:end])
        del self.data[: end + 1]
        self._searched = 0
        try:
            message = json.loads(line.decode())  # bytes would be tried in encodings that a jail cannot load
        except (ValueError, RecursionError):
            raise Rubbish(f"a line is not JSON: {line[:40]!r}") from None
        if not isinstance(message, dict):
            raise Rubbish(f"a line is no JSON object: {line[:40]!r}")
        count = message.get("fds", 0)
        if type(count) is not int or not 0 <= count <= len(self._descriptors):
            raise Rubbish(f"a message speaks of {count!r:.20} descriptors, and {len(self._descriptors)} came")
        taken, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        return message, taken

    def drop(self) -> None:
        """Close the descriptors that nobody took."""
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()


class Peer:
    """The other end of a connection, for a process with a loop: nothing here waits."""

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        receive: Callable[[Peer, Message, list[int]], None],
        closed: Callable[[Peer, str], None],
    ) -> None:
        """Take over `connection`. `receive` is called with each message and its descriptors, which are then its own;
        `closed`, once, when the connection has ended, with a sentence that is empty for an end as it should be.
        """
        connection.setblocking(False)
        self.loop = loop
        self.connection = connection
        self._receive = receive
        self._closed = closed
        self._arrivals = _Arrivals()
        self._unsent: list[tuple[memoryview, Sequence[int]]] = []
        self._unsent_bytes = 0
        self.is_open = True
        self._closes_when_sent = False
        loop.watch(connection, READ, self._ready)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message, soon. The descriptors are copied first, so the caller may close his."""
        if not self.is_open:
            return
        if fds:
            message = message | {"fds": len(fds)}
        self._push(memoryview(_packed(message)), [os.dup(fd) for fd in fds])

    def close_when_sent(self) -> None:
        """Close once all that was sent is on its way; nothing is received any more."""
        self._closes_when_sent = True
        if not self._unsent:
            self.close()

    def close(self, why: str = "") -> None:
        """Close now. Raises nothing; `closed` is called once."""
        if not self.is_open:
            return
        self.is_open = False
        self.loop.forget(self.connection)
        self.connection.close()
        self.let_go()
        self._closed(self, why)

    def detach(self) -> tuple[socket.socket, bytes]:
        """Give the connection back to be used for something else, with what arrived and was not used."""
        self.is_open = False
        self.loop.forget(self.connection)
        rest = bytes(self._arrivals.data)
        self.let_go()
        return self.connection, rest

    def let_go(self) -> None:
        """Close the descriptors that are on their way, either way: a copy of the process has no use for them."""
        self._arrivals.drop()
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()

    def _push(self, data: memoryview, fds: Sequence[int]) -> None:
        self._unsent.append((data, fds))
        self._unsent_bytes += len(data)
        if len(self._unsent) == 1:
            self._flush()
        if self._unsent_bytes > MOST_UNSENT:
            self.close("it does not read what it is sent")

    def _flush(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                size = _send_some(self.connection, data, fds)
            except BlockingIOError:
                self.loop.watch(self.connection, READ | WRITE, self._ready)
                return
            except OSError:
                self.close()
                return
            for fd in fds:
                os.close(fd)
            self._unsent_bytes -= size
            if size < len(data):
                self._unsent[0] = (data[size:], ())
            else:
                self._unsent.pop(0)
        if self._closes_when_sent:
            self.close()
        else:
            self.loop.watch(self.connection, READ, self._ready)

    def _ready(self, events: int) -> None:
        if events & WRITE and self._unsent:
            self._flush()
        if not events & READ or not self.is_open:
            return
        try:
            if not self._arrivals.receive(self.connection):
                self.close()
                return
            while self.is_open and not self._closes_when_sent and (got := self._arrivals.next()) is not None:
                self._receive(self, *got)
        except BlockingIOError:
            pass
        except Rubbish as error:
            self.send({"error": str(error), "status": 2})
            self.close(str(error))
        except OSError:
            self.close()


class Channel:
    """The other end of a connection, for a program that asks and waits for the answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._arrivals = _Arrivals()
        self._numbers = 0

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message. Raises OSError."""
        if fds:
            message = message | {"fds": len(fds)}
        data = memoryview(_packed(message))
        while data:
            data = data[_send_some(self.connection, data, fds) :]
            fds = ()

    def receive(self) -> tuple[Message, list[int]] | None:
        """Return the next message and its descriptors, which are the caller's; None at the end.

        Raises TimeoutError after the connection's timeout, and OSError. Rubbish is an InternalError.
        """
        try:
            while (got := self._arrivals.next()) is None:
                if not self._arrivals.receive(self.connection):
                    return None
        except Rubbish as error:
            raise InternalError(f"the host's process sent what is no message: {error}") from None
        return got

    def ask(self, do: str, fds: Sequence[int] = (), **fields: Any) -> Message:
        """Send a request and return its answer; events that come before it are lost.

        Raises InputError or InternalError for an answer that is an error, and OSError for a connection that ended.
        """
        self._numbers += 1
        self.send({"do": do, "id": self._numbers} | fields, fds)
        while True:
            got = self.receive()
            if got is None:
                raise ConnectionResetError("the other end closed the connection")
            message, descriptors = got
            for fd in descriptors:
                os.close(fd)
            if message.get("id") in (self._numbers, None) and "event" not in message:
                return checked(message)

    def rest(self) -> bytes:
        """Return what arrived behind the last message, and is no message."""
        data = bytes(self._arrivals.data)
        self._arrivals.data.clear()
        return data

    def close(self) -> None:
        """Close the connection."""
        self._arrivals.drop()
        self.connection.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked(answer: Message) -> Message:
    """Return an answer, or raise the error that it tells of."""
    if "error" in answer:
        kind = InputError if answer.get("status") == 2 else InternalError
        raise kind(str(answer["error"]))
    return answer
