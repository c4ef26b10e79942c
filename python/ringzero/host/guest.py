"""A VM as the daemon knows it: its process, the connection to it, and how it goes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from ringzero.errors import InputError
from ringzero.host.guest_counters import GuestCounters
from ringzero.host.loop import READ, Loop
from ringzero.host.runtime import Runtime
from ringzero.host.spec import GuestSpec
from ringzero.host.wire import Channel, Message, Peer, connect, credentials

__all__ = ["Guest", "Phase", "last_words"]

_LOG_TAIL = 16 << 10
_LONGEST_NEWS = 1000
_PATIENCE = 2.0
"""Seconds for a VM's process to answer what it always answers at once."""


class Phase(StrEnum):
    """How a VM goes."""

    WAITING = "waiting"
    """Admitted; it starts when those before it have booted."""
    BOOTING = "booting"
    RUNNING = "running"
    ENDED = "ended"


class Guest:
    """One VM. `changed` is called when its phase has changed, or there is news."""

    def __init__(
        self, loop: Loop, runtime: Runtime, spec: GuestSpec, changed: Callable[[Guest], None]
    ) -> None:
        self.spec = spec
        self.phase = Phase.WAITING
        self.began = time.time()
        self.ended_at: float | None = None
        self.reason: str | None = None
        self.pid: int | None = None
        self.process_fd: int | None = None
        self.exit_status: int | None = None
        """As os.waitpid has it, when the fork server told."""
        self.was_told_to_end = False
        self.is_condemned = False
        """It is ended by the operator, and forgotten then."""
        self.memory = GuestCounters(spec.memory)
        self.news: str | None = None
        """What its process had to tell of its disks, until somebody takes it."""
        self.jail: list[str] = []
        """What keeps its process from doing harm, by its own word before it ran its guest."""
        self._loop = loop
        self._runtime = runtime
        self._changed = changed
        self._peer: Peer | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, Callable[[Message], None]] = {}

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.spec.name

    @property
    def is_alive(self) -> bool:
        """Whether it has a process."""
        return self.pid is not None and self.phase is not Phase.ENDED

    def join(self, pid: int) -> None:
        """Take note of its process, and connect to it. Raises OSError when it is gone."""
        self.pid = pid
        self.phase = Phase.BOOTING
        self.process_fd = os.pidfd_open(pid)
        self._loop.watch(self.process_fd, READ, lambda _: self._gone())
        self._connect()

    @classmethod
    def adopt(cls, loop: Loop, runtime: Runtime, name: str, changed: Callable[[Guest], None]) -> Guest:
        """Find a VM by its socket: it tells its spec itself. Raises OSError or RingzeroError when it does not."""
        path = runtime.control(name)
        with Channel(connect(path, _PATIENCE)) as channel:
            spec = GuestSpec.from_json(channel.ask("describe").get("spec"))
        if spec.name != name:
            raise InputError(f"the vm at {path} calls itself {spec.name!r}")
        # Since it answers it listens by itself, and the socket has its process's number.
        with connect(path, _PATIENCE) as connection:
            pid, _ = credentials(connection)
        guest = cls(loop, runtime, spec, changed)
        guest.join(pid)
        return guest

    def ask(
        self, do: str, answered: Callable[[Message], None], fds: Sequence[int] = (), **fields: Any
    ) -> None:
        """Ask its process for something; `answered` is called with the answer, or an error."""
        if self._peer is None:
            answered({"error": f"vm {self.name!r} is not running", "status": 2})
            return
        number = next(self._numbers)
        self._asked[number] = answered
        self._peer.send({"do": do, "id": number} | fields, fds)

    def kill(self) -> None:
        """End its process at once."""
        if self.process_fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.process_fd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it; it goes on."""
        if self.process_fd is not None:
            self._loop.forget(self.process_fd)
            os.close(self.process_fd)
            self.process_fd = None
        if self._peer is not None:
            peer, self._peer = self._peer, None
            peer.close()

    def end(self, reason: str) -> None:
        """Note that it has ended."""
        self.close()
        self.phase = Phase.ENDED
        self.pid = None
        self.ended_at = time.time()
        self.reason = reason
        with contextlib.suppress(OSError):
            self._runtime.control(self.name).unlink()
        asked, self._asked = self._asked, {}
        for answered in asked.values():
            answered({"error": f"vm {self.name!r} has ended: {reason}", "status": 1})
        self._changed(self)

    def _connect(self) -> None:
        # Its process may not listen by itself yet; the socket was made for it, so this does not wait.
        self._peer = Peer(
            self._loop, connect(self._runtime.control(self.name), _PATIENCE), self._received, self._closed
        )
        self.ask("describe", self._described)

    def _described(self, answer: Message) -> None:
        if "error" in answer or self.phase is not Phase.BOOTING:
            return
        self.began = float(answer.get("began", self.began))
        jail = answer.get("jail")
        self.jail = [str(one) for one in jail] if isinstance(jail, list) else []
        if answer.get("ready"):
            self.phase = Phase.RUNNING
            self._changed(self)

    def _received(self, _peer: Peer, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        if message.get("event") == "ready":
            if self.phase is Phase.BOOTING:
                self.phase = Phase.RUNNING
                self._changed(self)
        elif message.get("event") == "trouble":
            self.news = str(message.get("text"))[:_LONGEST_NEWS]
            self._changed(self)
        elif (answered := self._asked.pop(message.get("id", 0), None)) is not None:
            answered(message)

    def _closed(self, _peer: Peer, _why: str) -> None:
        # Its end is told by the process itself, a moment later.
        self._peer = None

    def _gone(self) -> None:
        """The process has ended."""
        pid = self.process_fd
        assert pid is not None
        # A killed process is gone before its fork server tells by what: that is asked for first.
        self._loop.forget(pid)
        self._loop.call_later(0.0 if self._words() else 0.1, self._bury)

    def _words(self) -> str | None:
        return last_words(self._runtime.vm_log(self.name), self.began)

    def _bury(self) -> None:
        words = self._words()
        if words is None:
            status = self.exit_status
            if status is not None and os.WIFSIGNALED(status):
                words = f"killed: its process got {signal.Signals(os.WTERMSIG(status)).name}"
            else:
                words = "killed: its process ended without a word"
        self.end(words)


def last_words(log: Path, began: float) -> str | None:
    """Return what a VM's process wrote last: why the guest ended. None when it did not come to that."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_TAIL))
            lines = file.read().splitlines()
        record = json.loads(lines[-1])
        return str(record["ended"]) if float(record["at"]) >= began else None
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None
