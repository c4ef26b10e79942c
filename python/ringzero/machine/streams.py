"""The ends of a guest command's standard streams in this process: raw files of io, to be buffered and read as text."""

from __future__ import annotations

import io
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from ringzero.errors import GuestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ringzero.machine.guest_process import GuestProcess

__all__ = ["CAPTURE_MAX", "Collected", "InputPipe", "OutputPipe"]


CAPTURE_MAX = 1 << 30
"""Bytes of an output that are captured: whatever says more is read as a stream, or is up to no good."""


def _too_much(most: int) -> GuestError:
    return GuestError(f"the guest has sent more than {most} bytes, too much to be kept: read it as a stream")


class OutputPipe(io.RawIOBase):
    """Standard output or error, read as it comes. It keeps a window of bytes, and the guest waits behind that."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self._kind = kind
        self._process: GuestProcess | None = None
        self._pieces: deque[bytes] = deque()
        self._at = 0
        self._over = False
        self._changed = threading.Condition()
        self._watcher: Callable[[], None] | None = None
        self._collected: bytearray | None = None
        self.patience: float | None = None
        """Seconds that a read waits for a byte."""

    def attach(self, process: GuestProcess) -> None:
        """Say whose output it is."""
        self._process = process

    # --- the link's side

    def feed(self, data: bytes) -> None:
        """Take a piece of output."""
        with self._changed:
            if self._collected is None:
                self._pieces.append(data)
            else:
                self._collected += data
            self._changed.notify_all()
            watcher, collected = self._watcher, self._collected is not None
            is_full = self._collected is not None and len(self._collected) > CAPTURE_MAX
        if collected:
            self._taken(len(data))
        if is_full and self._process is not None:
            self._process.fail(_too_much(CAPTURE_MAX))
        if watcher is not None:
            watcher()

    def end(self) -> None:
        """Nothing more comes."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            watcher = self._watcher
        if watcher is not None:
            watcher()

    # --- the reader's side

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for a byte, and read what is there and fits; 0 at the end. Raises GuestError after `patience`."""
        self._check_open()
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self._over or self.closed, self.patience):
                raise GuestError(f"the guest has sent nothing for {self.patience:g} s")
        return self._move(memoryview(buffer).cast("B"))

    def read_now(self, size: int) -> bytes | None:
        """Read up to `size` bytes that are there: none at the end, None when there are none yet."""
        with self._changed:
            if not self._pieces and not self._over:
                return None
        data = bytearray(size)
        return bytes(data[: self._move(memoryview(data))])

    def watch(self, watcher: Callable[[], None] | None) -> None:
        """Have `watcher` called, from the link's thread, whenever there is more to read."""
        with self._changed:
            self._watcher = watcher

    def collect(self) -> bytearray:
        """From here on keep everything that comes, however much it is, for `communicate`."""
        size = 0
        with self._changed:
            if self._collected is None:
                rest = b"".join(self._pieces)[self._at :]
                size = len(rest)
                self._pieces.clear()
                self._at = 0
                self._collected = bytearray(rest)
        if size:
            self._taken(size)
        return self._collected

    def close(self) -> None:
        """Read no more: a command that writes more gets SIGPIPE."""
        if not self.closed:
            super().close()
            with self._changed:
                self._pieces.clear()
                over = self._over
                self._changed.notify_all()
            if self._process is not None and not over:
                self._process.close_output(self._kind)

    def _move(self, to: memoryview) -> int:
        moved = 0
        with self._changed:
            while self._pieces and moved < len(to):
                piece = self._pieces[0]
                size = min(len(piece) - self._at, len(to) - moved)
                to[moved : moved + size] = piece[self._at : self._at + size]
                moved += size
                self._at += size
                if self._at == len(piece):
                    self._pieces.popleft()
                    self._at = 0
        if moved:
            self._taken(moved)
        return moved

    def _taken(self, size: int) -> None:
        if self._process is not None:
            self._process.taken(self._kind, size)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


class Collected:
    """A sink that keeps everything: what `run` captures."""

    def __init__(self, most: int | None = None) -> None:
        """Keep at most so many bytes; CAPTURE_MAX by itself."""
        self.data = bytearray()
        self._most = most

    def __call__(self, data: bytes) -> None:
        """Take a piece of output. Raises GuestError when it is too much."""
        most = CAPTURE_MAX if self._most is None else self._most
        if len(self.data) + len(data) > most:
            raise _too_much(most)
        self.data += data


class InputPipe(io.RawIOBase):
    """Standard input. Writing waits while the command does not read, and fails when it has ended."""

    def __init__(self, process: GuestProcess) -> None:
        super().__init__()
        self._process = process

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Send all of `data`. Raises BrokenPipeError when the command has ended."""
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._process.ended:
            raise BrokenPipeError(32, "Broken pipe")
        view = memoryview(data).cast("B")
        self._process.write(view)
        return len(view)

    def close(self) -> None:
        """Tell the command that its input is at its end."""
        if not self.closed:
            super().close()
            self._process.close_stdin()
