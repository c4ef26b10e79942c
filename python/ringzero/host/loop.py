"""A small event loop: descriptors that are watched, timers, and nothing that wakes for nothing.

The daemon, the fork server and every VM's process run one each, on one thread. (asyncio would do, and takes 6 MiB of a
process of which there will be a hundred.)
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["READ", "WRITE", "Loop", "Timer"]

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

Handler = Callable[[int], None]
"""Called with the events (READ, WRITE) that its descriptor has."""


@dataclass(order=True, slots=True)
class Timer:
    """A call to come; `cancel` forgets it."""

    at: float
    number: int
    call: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        """Do not call."""
        self.call = None


class Loop:
    """Waits for descriptors and times, and calls who asked for them."""

    def __init__(self) -> None:
        self._selector = selectors.EpollSelector()
        self._timers: list[Timer] = []
        self._numbers = itertools.count()
        self._stopping = False
        self._posted: deque[Callable[[], None]] = deque()
        self._waker: socket.socket | None = None
        self._sleeper: socket.socket | None = None
        self._woken: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def watch(self, descriptor: int | socket.socket, events: int, handler: Handler) -> None:
        """Call `handler` whenever `descriptor` is ready for `events`; a second call changes them."""
        try:
            self._selector.modify(descriptor, events, handler)
        except KeyError:
            self._selector.register(descriptor, events, handler)

    def forget(self, descriptor: int | socket.socket) -> None:
        """Watch a descriptor no longer. Call it before the descriptor is closed."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(descriptor)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call once, when so many seconds have passed."""
        timer = Timer(time.monotonic() + seconds, next(self._numbers), call)
        heapq.heappush(self._timers, timer)
        return timer

    def accept_posts(self) -> None:
        """Make `post` possible. On the loop's own thread."""
        if self._waker is None:
            self._sleeper, self._waker = socket.socketpair()
            self._sleeper.setblocking(False)
            self._waker.setblocking(False)
            self.watch(self._sleeper, READ, self._take_posts)

    def post(self, call: Callable[[], None]) -> None:
        """Have the loop's thread call it soon: the one thing here that other threads may do."""
        with self._lock:
            self._posted.append(call)
            if self._waker is not None:
                with contextlib.suppress(BlockingIOError):  # it has enough to wake up by
                    self._waker.send(b"\0")

    def wake_on_signals(self, woken: Callable[[], None] | None = None) -> None:
        """Have signals with a handler of ours wake the loop, and call `woken` then. On the main thread."""
        self.accept_posts()
        assert self._waker is not None
        self._woken = woken
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def stop(self) -> None:
        """Have `run` return once the present event is dealt with."""
        self._stopping = True

    def run(self) -> None:
        """Wait and call, until `stop`."""
        while not self._stopping:
            for key, events in self._selector.select(self._patience()):
                # Forgotten by a handler before it in this round?
                if not self._stopping and self._selector.get_map().get(key.fd) is key:
                    key.data(events)
            now = time.monotonic()
            while not self._stopping and self._timers and self._timers[0].at <= now:
                timer = heapq.heappop(self._timers)
                if timer.call is not None:
                    timer.call()

    def close(self) -> None:
        """Let go of the loop's own descriptors."""
        self._selector.close()
        for end in (self._waker, self._sleeper):
            if end is not None:
                end.close()

    def _patience(self) -> float | None:
        while self._timers and self._timers[0].call is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].at - time.monotonic()) if self._timers else None

    def _take_posts(self, _: int) -> None:
        assert self._sleeper is not None
        with contextlib.suppress(BlockingIOError):
            os.read(self._sleeper.fileno(), 4096)
        if self._woken is not None:
            self._woken()
        while True:
            with self._lock:
                if not self._posted:
                    return
                call = self._posted.popleft()
            call()
