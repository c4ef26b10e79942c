"""Answers a guest that asks 169.254.169.254 for its metadata: HTTP, over the connections that a NAT gives away.

Both versions of the service (Amazon EC2 User Guide, "Use the Instance Metadata Service to access instance metadata"):
IMDSv1 answers anybody in the guest, IMDSv2 who got a token with a PUT first. HTTP as RFC 9112 has it. Its client is the
guest, which may be hostile: requests are small, few at a time, nothing waits for anybody, and the connection that is
oldest goes when there are too many.

One thread does all, and it may be another's: who has an event loop watches `fileno`, and calls `work` when that can be
read.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Protocol

from ringzero.machine.metadata import InstanceMetadata

__all__ = ["ADDRESS", "MetadataServer"]

ADDRESS = "169.254.169.254:80"
TOKEN_PATH = "/latest/api/token"
TOKEN_HEADER = "x-aws-ec2-metadata-token"
TTL_HEADER = f"{TOKEN_HEADER}-ttl-seconds"
TTL_MAX = 21600
TOKENS_MAX = 256
"""How many tokens are known at once: the oldest goes first."""
CONNECTIONS_MAX = 16
HEAD_MAX = 16 << 10
"""Bytes of a request."""
REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
}
_PIECE = 16 << 10
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Listener(Protocol):
    """What connections come from: a `GuestListener`, or a listening socket."""

    def fileno(self) -> int:
        """Return what can be read when there is a connection."""

    def setblocking(self, flag: bool, /) -> None:
        """Say whether `accept` waits."""

    def accept(self) -> tuple[socket.socket, object]:
        """Return a connection. Raises OSError when there will be no more."""

    def close(self) -> None:
        """Take no more."""


class Tokens:
    """The tokens that were given out, with the times at which they end."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    def give(self, seconds: int) -> str:
        """Return a new token that is good for so long."""
        token = secrets.token_urlsafe(40)
        while len(self._ends) >= TOKENS_MAX:
            del self._ends[next(iter(self._ends))]
        self._ends[token] = time.monotonic() + seconds
        return token

    def knows(self, token: str) -> bool:
        """Say whether a token is good."""
        return self._ends.get(token, 0.0) > time.monotonic()


class _Connection:
    """One connection: the part of a request that has come, and the part of an answer that has not gone."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.request = bytearray()
        self.answer: list[memoryview] = []
        self.is_last = False
        """Behind this answer comes no other: the guest's words are read and dropped until it closes, too."""
        self.has_ended = False
        """The guest has said all."""

    def receive(self) -> bool:
        """Take what has come; False when the connection is broken."""
        try:
            data = self.line.recv(_PIECE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.has_ended |= not data
        if not self.is_last:
            self.request += data
        return True

    def send(self) -> bool:
        """Give what can be given of the answer; False when the connection is broken."""
        try:
            while self.answer:
                sent = self.line.send(self.answer[0])
                self.answer[0] = self.answer[0][sent:]
                if not self.answer[0]:
                    del self.answer[0]
            if self.is_last:
                self.line.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


class MetadataServer:
    """The service of one machine. Serves from `with` on, on a thread of its own, or whenever `work` is called."""

    def __init__(
        self, listener: Listener, metadata: InstanceMetadata, *, tokens_required: bool = False
    ) -> None:
        """Take connections from `listener`, and close it in the end. With `tokens_required` only IMDSv2 is answered."""
        self.metadata = metadata
        self.tokens_required = tokens_required
        self.tokens = Tokens()
        self._listener = listener
        self._connections: dict[int, _Connection] = {}
        """By descriptor, the oldest first."""
        self._ender, self._ended = socket.socketpair()
        self._selector = selectors.EpollSelector()
        self._thread: threading.Thread | None = None
        listener.setblocking(False)
        self._selector.register(listener.fileno(), _READ)
        self._selector.register(self._ended.fileno(), _READ)

    def fileno(self) -> int:
        """Return what can be read when there is work."""
        return self._selector.fileno()

    def work(self, timeout: float | None = 0.0) -> bool:
        """Do what there is to do, and wait for it first for up to `timeout` seconds, None for ever. False once nothing
        will come any more.
        """
        for key, _ in self._selector.select(timeout):
            if key.fd == self._ended.fileno():
                return False
            if key.fd == self._listener.fileno():
                if not self._accept():
                    return False
            elif (connection := self._connections.get(key.fd)) is not None:
                self._go_on(connection)
        return True

    def start(self) -> MetadataServer:
        """Serve on a thread of its own until `close`, or until the machine has ended."""
        self._thread = threading.Thread(target=self._serve, name="ringzero-metadata", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Serve no more."""
        if self._thread is None:
            self._let_go()
        else:
            with contextlib.suppress(OSError):  # it has ended already
                self._ender.send(b"\0")
            self._thread.join()

    def __enter__(self) -> MetadataServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while self.work(None):
            pass
        self._let_go()

    def _let_go(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._selector.close()
        self._listener.close()
        self._ender.close()
        self._ended.close()

    # --- connections

    def _accept(self) -> bool:
        try:
            line, _ = self._listener.accept()
        except BlockingIOError:
            return True
        except OSError:
            return False
        line.setblocking(False)
        if len(self._connections) >= CONNECTIONS_MAX:
            self._drop(next(iter(self._connections.values())))
        self._connections[line.fileno()] = _Connection(line)
        self._selector.register(line.fileno(), _READ)
        return True

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.line.fileno())
        del self._connections[connection.line.fileno()]
        connection.line.close()

    def _go_on(self, connection: _Connection) -> None:
        lives = connection.send() if connection.answer else connection.receive()
        # One answer after the other: who asks faster than he reads, waits.
        while lives and not connection.answer and not connection.is_last and self._answer(connection):
            lives = connection.send()
        if not lives or (connection.has_ended and not connection.answer):
            self._drop(connection)
        else:
            self._selector.modify(connection.line.fileno(), _WRITE if connection.answer else _READ)

    # --- requests

    def _answer(self, connection: _Connection) -> bool:
        """Answer the first request, if it has come whole: 2.1 "Message Format"."""
        request = connection.request
        while request.startswith((b"\r", b"\n")):  # 2.2: empty lines before it
            del request[0]
        ends = [at + len(mark) for mark in (b"\r\n\r\n", b"\n\n") if (at := request.find(mark)) >= 0]
        if not ends:
            if len(request) > HEAD_MAX:
                self._reply(connection, 431)
            return len(request) > HEAD_MAX
        head = bytes(request[: min(ends)])
        del request[: min(ends)]
        first, *lines = head.decode("latin-1").splitlines()
        words = first.split(" ")
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers.setdefault(name.lower(), value.strip())
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
            self._reply(connection, 400)
            return True
        method, target, version = words
        # A body is read by nobody, and must not be the next request.
        connection.is_last = (
            version == "HTTP/1.0"
            or method not in ("GET", "HEAD")
            or "close" in headers.get("connection", "").lower()
            or headers.get("content-length", "0") != "0"
            or "transfer-encoding" in headers
        )
        path = target.partition("?")[0]
        if method == "PUT":
            self._give_token(connection, path, headers)
        elif method in ("GET", "HEAD"):
            self._give_item(connection, path, headers.get(TOKEN_HEADER), with_body=method == "GET")
        else:
            self._reply(connection, 405)
        return True

    def _give_token(self, connection: _Connection, path: str, headers: Mapping[str, str]) -> None:
        if path != TOKEN_PATH:
            self._reply(connection, 404)
        elif "x-forwarded-for" in headers:
            # Who forwards requests from elsewhere shall not fetch tokens for them.
            self._reply(connection, 403)
        else:
            text = headers.get(TTL_HEADER, "")
            seconds = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
            if 1 <= seconds <= TTL_MAX:
                self._reply(connection, 200, self.tokens.give(seconds).encode(), f"{TTL_HEADER}: {seconds}")
            else:
                self._reply(connection, 400)

    def _give_item(self, connection: _Connection, path: str, token: str | None, *, with_body: bool) -> None:
        if self.tokens_required if token is None else not self.tokens.knows(token):
            self._reply(connection, 401)
            return
        found = self.metadata.answer(path)
        self._reply(connection, 404 if found is None else 200, found or b"", with_body=with_body)

    def _reply(
        self, connection: _Connection, status: int, body: bytes = b"", *headers: str, with_body: bool = True
    ) -> None:
        connection.is_last |= status in (400, 405, 431)
        lines = [
            f"HTTP/1.1 {status} {REASONS[status]}",
            "Server: EC2ws",
            f"Content-Type: {'text/plain' if status == 200 else 'text/html'}",
            f"Content-Length: {len(body)}",
            *headers,
            *(["Connection: close"] if connection.is_last else []),
        ]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        sent = body if with_body else b""
        # In one piece, unless that is a copy of much.
        parts = [head + sent] if len(sent) < _PIECE else [head, sent]
        connection.answer = [memoryview(part) for part in parts]
