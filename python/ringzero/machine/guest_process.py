"""A command in a guest, as the link to the agent has it: its output on the way to who wants it, its input, its end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ringzero.errors import GuestError
from ringzero.machine.frames import (
    CLOSE,
    CREDIT,
    EXIT,
    FAILED,
    FAILED_DIRECTORY,
    FLAG_BUILTIN,
    OUTPUT_LEFT,
    OUTPUT_WINDOW,
    RESIZE,
    SIGNAL,
    STARTED,
    STDERR,
    STDIN,
    STDIN_EOF,
    STDIN_WINDOW,
    STDOUT,
    WINDOW,
    WORD,
)

if TYPE_CHECKING:
    from ringzero.machine.exec import AgentLink

__all__ = ["PATIENCE", "START_PATIENCE", "GuestProcess", "Sink", "Stream", "discard"]

# A quarter of the line's window: a signal or a resize never waits behind more than this.
STDIN_CHUNK = 8192
# How much of an output has been taken before the agent is told: seldom, but long before its window is empty.
TAKEN_EVERY = OUTPUT_WINDOW // 4
# A guest in which a command that was killed has not ended after so many seconds is not waited for.
PATIENCE = 3.0
# One that has not taken a command after so many is not going to; it may be paused for a while, or busy.
START_PATIENCE = 60.0

Sink = Callable[[bytes], None]
"""Takes a piece of output; called from the link's thread. While it blocks, the guest's output waits."""


class Stream(Protocol):
    """Keeps output until somebody reads it, and says then that it was taken (ringzero.machine.streams)."""

    def feed(self, data: bytes) -> None:
        """Take a piece of output; must not wait."""

    def end(self) -> None:
        """Nothing more comes."""


class GuestProcess:
    """A command in the guest, as `AgentLink.start` gives it."""

    def __init__(
        self,
        link: AgentLink,
        number: int,
        args: Sequence[str],
        flags: int,
        cwd: str | None,
        sinks: dict[int, Sink | Stream],
    ) -> None:
        self.args = list(args)
        self._link = link
        self._number = number
        self._cwd = cwd
        self._sinks = sinks
        self._out = {STDOUT: 0, STDERR: 0}  # bytes that came and were not said to be taken
        self._taken = {STDOUT: 0, STDERR: 0}  # bytes that were taken, and not said to be yet
        self._done = threading.Event()
        self._known = threading.Event()
        self._pid: int | None = None
        self._credit = STDIN_WINDOW
        self._credited = threading.Condition()
        self._callbacks: list[Callable[[], None]] = []
        self._credit_callback: Callable[[int], None] | None = None
        self._flags = flags
        self.last_words: tuple[int, bytes] | None = None
        """The frame that told its end; None before, and when it was lost."""
        self._heard = time.monotonic()
        self._failure: Exception | None = None
        self._return_code: int | None = None

    @property
    def returncode(self) -> int | None:
        """The exit status, -N when signal N ended it (as subprocess has it); None while it runs."""
        return self._return_code

    @property
    def pid(self) -> int | None:
        """Its number in the guest; None before it is known, and unless it was asked for."""
        return self._pid

    @property
    def ended(self) -> bool:
        """Whether it has ended, or was lost."""
        return self._done.is_set()

    def write(self, data: bytes | bytearray | memoryview, patience: float | None = None) -> None:
        """Send bytes to standard input; waits while the command does not take them. Dropped once it has
        ended. Raises GuestError when nothing was taken for `patience` seconds.
        """
        view = memoryview(data).cast("B")
        while view:
            with self._credited:
                able = self._credited.wait_for(lambda: self._credit > 0 or self._done.is_set(), patience)
                if self._done.is_set():
                    return
                size = min(len(view), self._credit, STDIN_CHUNK)
                self._credit -= size
            sent = able and self._link.send(STDIN, self._number, view[:size], patience=patience)
            if not sent and patience is not None and not self._done.is_set() and not self._link.ended:
                raise GuestError(f"the guest has taken nothing for {patience:g} s")
            view = view[size:]

    def close_stdin(self) -> None:
        """Tell the command that its input is at its end."""
        if not self._done.is_set():
            self._link.post(STDIN_EOF, self._number)

    def close_output(self, kind: int) -> None:
        """Read no more of STDOUT or STDERR: what the command writes there ends it by SIGPIPE, as a pipe does."""
        self._sinks[kind] = discard
        if not self._done.is_set():
            self._link.post(CLOSE, self._number, flags=kind - STDOUT)

    def taken(self, kind: int, size: int) -> None:
        """Say that so many bytes of STDOUT or STDERR have found their place: the guest may send more."""
        with self._credited:
            self._out[kind] -= size
            self._taken[kind] += size
            if self._taken[kind] < TAKEN_EVERY or self._done.is_set():
                return
            size, self._taken[kind] = self._taken[kind], 0
        self._link.take(self._number, kind - STDOUT, size)

    def abandon(self) -> None:
        """End it, because nobody wants it any more. Never waits."""
        self._end_there()

    def when_credited(self, callback: Callable[[int], None]) -> None:
        """Call `callback`, from the link's thread, with the bytes of input that the guest has taken, as it says so."""
        self._credit_callback = callback

    def send_signal(self, number: int) -> None:
        """Send a signal to the command and all that it started in its group. Never waits."""
        if not self._done.is_set():
            self._link.post(SIGNAL, self._number, WORD.pack(number))

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(9)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal, in characters. Never waits."""
        if not self._done.is_set():
            self._link.post(RESIZE, self._number, WINDOW.pack(rows, columns))

    def wait_started(self, timeout: float | None = None) -> bool:
        """Wait until it runs (for one that was started with `tell`), or has ended. False when `timeout` (seconds)
        passed first. Raises OSError when the guest could not start it, and GuestEnded.
        """
        if not self._known.wait(timeout):
            return False
        if self._failure is not None and self._pid is None:
            raise self._failure
        return True

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end and return the exit status; None when `timeout` (seconds) passed first.

        All output has reached the sinks by then. Raises OSError when the guest could not start the command,
        and GuestEnded when the guest ended first.
        """
        if not self._done.wait(timeout):
            return None
        if self._failure is not None:
            raise self._failure
        return self._return_code

    def wait_heard(self, patience: float | None) -> int:
        """Wait for the end as `wait` does, as long as something is heard of it. Raises GuestError when nothing was for
        `patience` seconds.
        """
        while True:
            left = None if patience is None else max(0.0, self._heard + patience - time.monotonic())
            status = self.wait(left)
            if status is not None:
                return status
            if patience is not None and time.monotonic() >= self._heard + patience:
                raise GuestError(f"the guest has said nothing for {patience:g} s")

    def fail(self, why: Exception) -> None:
        """End it for a reason of this side's, which whoever waits is told. Never waits."""
        self._end_there()
        self.finish(failure=why)
        self._sinks[STDOUT] = self._sinks[STDERR] = discard

    def _end_there(self) -> None:
        """Have it end in the guest. One of the agent's own puts what it does in order first."""
        if self._done.is_set():
            return
        if self._flags & FLAG_BUILTIN:
            self.close_stdin()
            self.close_output(STDOUT)
        else:
            self.kill()

    def when_known(self, callback: Callable[[], None]) -> None:
        """Call `callback`, from the link's thread, when it has started, when it has ended, and at once when either is
        so already.
        """
        with self._credited:
            self._callbacks.append(callback)
            now = self._known.is_set()
        if now:
            callback()

    def deliver(self, kind: int, payload: bytes) -> None:
        """Take a frame. Raises GuestError for one that our agent does not send."""
        self._heard = time.monotonic()
        if kind in self._sinks:
            with self._credited:
                self._out[kind] += len(payload)
                if self._out[kind] > OUTPUT_WINDOW + OUTPUT_LEFT:
                    raise GuestError("it sent more output than there was a place for")
            sink = self._sinks[kind]
            if not callable(sink):
                sink.feed(payload)
                return
            try:
                sink(payload)
            except Exception as error:  # the caller's own: it is this command's failure, not the link's
                self.fail(error)
            self.taken(kind, len(payload))
        elif kind == CREDIT:
            with self._credited:
                self._credit = min(self._credit + WORD.unpack(payload)[0], STDIN_WINDOW)
                self._credited.notify_all()
            if self._credit_callback is not None:
                self._credit_callback(WORD.unpack(payload)[0])
        elif kind == STARTED:
            self._pid = WORD.unpack(payload)[0]
            self._known.set()
            self._call_back()
        elif kind == EXIT:
            self.last_words = (kind, payload)
            self.finish(code=_exit_code(WORD.unpack(payload)[0]))
        elif kind == FAILED:
            self.last_words = (kind, payload)
            number = WORD.unpack(payload)[0]
            about = self._cwd if number & FAILED_DIRECTORY else self.args[0]
            number &= 0xFFFF
            self.finish(failure=OSError(number, os.strerror(number), about))

    def finish(self, *, code: int | None = None, failure: Exception | None = None) -> None:
        """Note its end, once."""
        with self._credited:
            if self._done.is_set():
                return
            self._return_code, self._failure = code, failure
            self._done.set()
            self._known.set()
            self._credited.notify_all()
        for sink in self._sinks.values():
            if not callable(sink):
                sink.end()
        self._call_back()

    def _call_back(self) -> None:
        with self._credited:
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()


def _exit_code(status: int) -> int:
    """Return a wait status as subprocess gives it; one that waitpid never gives counts as its low byte."""
    try:
        return os.waitstatus_to_exitcode(status)
    except (ValueError, OverflowError):
        return status & 0xFF


def discard(_: bytes) -> None:
    """Take a piece of output that nobody wants."""
