"""The guest's console: read it, write to it, wait for what you expect on it."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import overload

from ringzero.errors import ConsoleTimeout, GuestEnded

# What `read` and `expect` may still ask for. A guest that talks for hours while nobody reads loses the oldest
# part.
PENDING_MAX = 4 * 1024 * 1024
PENDING_KEEP = 2 * 1024 * 1024
# Enough for a panic message with its register dump and call trace.
TAIL_MAX = 16 * 1024
READ_SIZE = 64 * 1024

Sink = Callable[[bytes], None]
"""Takes each piece of the console's output as it comes, on the console's own thread."""


class Console:
    """A serial console, as a stream of bytes in both directions. Safe to use from several threads."""

    def __init__(self, line: socket.socket, sink: Sink | None = None) -> None:
        """Take over `line`, a stream joined to the guest's serial port; pass what arrives to `sink` as
        well.
        """
        self._line = line
        self._sink = sink
        self._pending = bytearray()
        self._tail = bytearray()
        self._last_output = time.monotonic()
        self._ended = False
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._reader = threading.Thread(target=self._read, name="ringzero-console", daemon=True)
        self._reader.start()

    @property
    def sink_failure(self) -> Exception | None:
        """What the sink raised, if it did: it is called no more then."""
        return self._failure

    def write(self, data: bytes | str) -> None:
        """Type `data` on the console. Waits while the guest does not take it. Raises GuestEnded."""
        try:
            self._line.sendall(data.encode() if isinstance(data, str) else data)
        except OSError as error:
            raise GuestEnded("the guest has ended: nobody reads its console") from error

    def sendline(self, line: bytes | str = "") -> None:
        """Type a line and Enter. Raises GuestEnded."""
        self.write((line.encode() if isinstance(line, str) else line) + b"\n")

    def read(self, timeout: float | None = None) -> bytes:
        """Return what came since the last `read` or `expect`; waits for at least a byte.

        Empty at the end of the guest, or when `timeout` (seconds) passed first; 0 only looks.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._ended, timeout)
            data = bytes(self._pending)
            self._pending.clear()
            return data

    @overload
    def expect(self, pattern: str | re.Pattern[str], timeout: float = 30.0) -> re.Match[str]: ...
    @overload
    def expect(self, pattern: bytes | re.Pattern[bytes], timeout: float = 30.0) -> re.Match[bytes]: ...
    def expect(
        self, pattern: str | bytes | re.Pattern[str] | re.Pattern[bytes], timeout: float = 30.0
    ) -> re.Match[str] | re.Match[bytes]:
        """Wait until a regular expression matches what came since the last `read` or `expect`; return the
        match.

        What comes after the match is left for the next call; `match.string[:match.start()]` is what came
        before it. Raises ConsoleTimeout after `timeout` seconds and GuestEnded when the guest ends first,
        both with the console's last lines.
        """
        compiled = re.compile(pattern)
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                match, size = _search(compiled, bytes(self._pending))
                if match is not None:
                    del self._pending[:size]
                    return match
                if self._ended:
                    raise GuestEnded(
                        f"the guest ended before {compiled.pattern!r} came; its last words: {self._words()}"
                    )
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ConsoleTimeout(
                        f"{compiled.pattern!r} did not come within {timeout:g} s; "
                        f"the console's last words: {self._words()}"
                    )
                self._changed.wait(left)

    def tail(self) -> bytes:
        """Return the last output (16 KiB at most), whoever has read it."""
        with self._changed:
            return bytes(self._tail)

    def quiet_for(self) -> float:
        """Return for how many seconds nothing has come."""
        with self._changed:
            return time.monotonic() - self._last_output

    def finish(self, timeout: float = 2.0) -> None:
        """Wait until the output of a guest that has ended was all taken in, but not longer than `timeout`
        seconds.
        """
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout)

    def close(self) -> None:
        """Let go of the console."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # wakes the reader, which a close alone would not
        self.finish()
        self._line.close()

    def _read(self) -> None:
        while True:
            try:
                data = self._line.recv(READ_SIZE)
            except OSError:
                data = b""
            if data and self._sink is not None:
                try:
                    self._sink(data)
                except Exception as error:  # the caller's own: kept for the caller, the console goes on
                    self._failure, self._sink = error, None
            with self._changed:
                self._last_output = time.monotonic()
                self._pending += data
                if len(self._pending) > PENDING_MAX:
                    del self._pending[:-PENDING_KEEP]
                self._tail += data
                if len(self._tail) > 2 * TAIL_MAX:
                    del self._tail[:-TAIL_MAX]
                self._ended = not data
                self._changed.notify_all()
            if not data:
                return

    def _words(self) -> str:
        text = self._tail[-400:].decode("utf-8", "replace").strip()
        return repr(text) if text else "(nothing)"


def _search(
    pattern: re.Pattern[str] | re.Pattern[bytes], data: bytes
) -> tuple[re.Match[str] | re.Match[bytes] | None, int]:
    """Search, and return the match with the number of bytes up to its end."""
    if isinstance(pattern.pattern, bytes):
        match = re.search(pattern, data)
        return match, match.end() if match else 0
    # surrogateescape keeps every byte, so that lengths in text can be turned back into lengths in bytes.
    text = data.decode("utf-8", "surrogateescape")
    found = re.search(pattern, text)
    return found, len(text[: found.end()].encode("utf-8", "surrogateescape")) if found else 0
