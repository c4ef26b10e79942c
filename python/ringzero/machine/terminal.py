"""The operator's terminal: raw while the guest's console is on it, and always put back."""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable
from types import FrameType

ESCAPE = 0x1D  # Ctrl-], as in telnet and virsh console
READ_SIZE = 4096

WindowChanged = Callable[[int, int], None]
"""Told of the window's new size: rows, columns."""


def window_size(fd: int = 1) -> tuple[int, int] | None:
    """Return the terminal's rows and columns, or None when `fd` is not one, or one that does not know."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    return (size.lines, size.columns) if size.lines and size.columns else None


class RawTerminal:
    """A `with` block in which the terminal passes every key on, and tells of new window sizes.

    On leaving the terminal is as it was, also after an exception or SIGTERM, SIGHUP and SIGINT. Use it on the
    main thread: signal handlers are set.
    """

    def __init__(self, fd: int = 0, changed: WindowChanged | None = None) -> None:
        self._fd = fd
        self._changed = changed
        self._saved: list[object] | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> RawTerminal:
        self._saved = termios.tcgetattr(self._fd)
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, self._leave)
        if self._changed is not None:
            self._handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, self._window)
        tty.setraw(self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        if self._saved is not None:
            # TCSADRAIN: what the guest printed last still goes out as it was meant.
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers.clear()

    @staticmethod
    def _leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)  # unwinds through __exit__

    def _window(self, _number: int, _frame: FrameType | None) -> None:
        size = window_size(self._fd)
        if size is not None and self._changed is not None:
            # A signal handler must not wait, and the line to the guest may be full.
            threading.Thread(target=self._changed, args=size, daemon=True).start()


def pump_keys(
    take: Callable[[bytes], None], *, fd: int = 0, escape: bool, left: Callable[[], None]
) -> threading.Thread:
    """Pass on what is read from `fd` to `take`, on a thread of its own, until it ends.

    With `escape`, Ctrl-] ends it and calls `left`.
    """

    def pump() -> None:
        while True:
            try:
                data = os.read(fd, READ_SIZE)
            except OSError:
                return
            if not data:
                return
            at = data.find(ESCAPE) if escape else -1
            try:
                take(data if at < 0 else data[:at])
            except Exception:  # the guest has ended: whoever waits for it knows
                return
            if at >= 0:
                left()
                return

    thread = threading.Thread(target=pump, name="ringzero-keys", daemon=True)
    thread.start()
    return thread
