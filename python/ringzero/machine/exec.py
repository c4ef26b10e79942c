"""The link to a guest's agent: it starts commands there, and has their output found its way.

One thread a link reads and hands every frame to the process that it is for; writers share the line under one lock and
its windows (guests/agent/frame.h says why). What comes from the guest is believed in nothing: no frame is larger than
an agent's, no stream holds more than its window, and the reader waits for nobody but the caller's own sinks.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence

from ringzero.errors import GuestEnded, GuestError, InternalError, RingzeroError
from ringzero.machine.agent_lines import AgentLines, Lines, StartedAgain
from ringzero.machine.frames import (
    ACK,
    CONSOLE_ID,
    CREDIT,
    DEFAULT_ENVIRONMENT,
    EXEC,
    EXIT,
    FAILED,
    FLAG_BUILTIN,
    FLAG_CREDENTIALS,
    FLAG_JOIN,
    FLAG_NO_STDERR,
    FLAG_NO_STDIN,
    FLAG_NO_STDOUT,
    FLAG_TELL,
    FLAG_TTY,
    GREETING,
    HEADER,
    HELLO,
    LINE_WINDOW,
    MAGIC,
    MOVE,
    MOVED,
    OFFER,
    OTHER_AGENT,
    OUTPUT_MAX,
    POWEROFF,
    READY,
    RESIZE,
    STARTED,
    STDERR,
    STDOUT,
    TAKEN,
    WINDOW,
    WORD,
    Credentials,
    Word,
    pack_exec,
)
from ringzero.machine.guest_process import PATIENCE, START_PATIENCE, GuestProcess, Sink, Stream, discard

__all__ = ["AgentLink"]

POSTED_MAX = 4096


class AgentLink:
    """The line to the agent in one guest. `close` it, or let the guest end."""

    def __init__(self, line: socket.socket | Lines, first: bytes = b"") -> None:
        """Take over `line`, a stream joined to the guest's agent or several of them, and close it in the end.

        `first` is what was read from it already.
        """
        self._lines: Lines = AgentLines(line) if isinstance(line, socket.socket) else line
        self._first = first
        self._ready = threading.Event()
        self.was_ready = False
        """Whether an agent has been there, be it now or not."""
        self._ended = threading.Event()
        self._processes: dict[int, GuestProcess] = {}
        self._last_number = 0
        self._sending = threading.Lock()  # taken before _state
        self._state = threading.Condition()
        self._unacknowledged = 0
        self._greeting = b""  # HELLO, while it has not been sent
        self._number = b""  # the agent's own, as READY and HELLO have it
        self._sends_to: socket.socket | None = None  # what the agent reads; none before READY
        self._moves_to: socket.socket | None = None  # what it is to read instead
        self._rest = b""  # of a frame that was begun, and that nobody waits for
        self._posted: list[bytes] = []  # frames that nobody waits for
        self._credits: dict[
            tuple[int, int], int
        ] = {}  # (process, output): bytes that TAKEN is to be sent for
        self._complaint: str | None = None
        self._reader = threading.Thread(target=self._read, name="ringzero-agent", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the agent has said that it is there. False when `timeout` (seconds) passed or the line
        ended.

        Raises GuestError when what is there is no agent that we understand.
        """
        with self._state:
            self._state.wait_for(
                lambda: self._ready.is_set() or self._ended.is_set() or self._complaint is not None, timeout
            )
            if self._complaint is not None and not self._ended.is_set():
                raise GuestError(self._complaint)
        return self._ready.is_set() and not self._ended.is_set()

    @property
    def ended(self) -> bool:
        """Whether the line is at its end: the guest is gone, or `close` was called."""
        return self._ended.is_set()

    def start(
        self,
        args: Sequence[Word],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdout: Sink | Stream | None = None,
        stderr: Sink | Stream | None = None,
        stdin: bool = True,
        join: bool = False,
        window: tuple[int, int] | None = None,
        credentials: Credentials | None = None,
        builtin: bool = False,
        tell: bool = False,
    ) -> GuestProcess:
        """Start a command; `args[0]` is looked up along the guest's PATH.

        `env` is the whole environment (the default is a small one), `cwd` a directory of the guest. Without
        `stdin` the command reads /dev/null; without a sink an output goes there; with `join` standard error goes
        where standard output does. `window` (rows, columns) gives it a terminal of its own; all output then comes
        to `stdout`. `builtin` names one of the agent's own (guests/agent/builtin.c). With `tell` the
        agent says that it runs, for `wait_started` and `pid`. Raises InputError for arguments
        that cannot be passed on.
        """
        environment = DEFAULT_ENVIRONMENT if env is None else env
        where = os.fspath(cwd) if cwd is not None else None
        payload = pack_exec(args, environment, where or "/", window or (0, 0), credentials)
        flags = FLAG_TTY if window is not None else 0
        flags |= 0 if stdin else FLAG_NO_STDIN
        flags |= 0 if stdout is not None else FLAG_NO_STDOUT
        flags |= FLAG_JOIN if join else 0 if stderr is not None else FLAG_NO_STDERR
        flags |= FLAG_CREDENTIALS if credentials is not None else 0
        flags |= FLAG_BUILTIN if builtin else 0
        flags |= FLAG_TELL if tell else 0
        words = [os.fsdecode(word) for word in args]
        return self.begin(payload, flags, words, where, stdout or discard, stderr or discard)

    def begin(
        self,
        payload: bytes,
        flags: int,
        words: list[str],
        cwd: str | None,
        stdout: Sink | Stream,
        stderr: Sink | Stream,
    ) -> GuestProcess:
        """Start what an EXEC frame says; `words` and `cwd` are for messages."""
        with self._state:
            self._refuse_ended()
            number = self._free_number()
            process = GuestProcess(self, number, words, flags, cwd, {STDOUT: stdout, STDERR: stderr})
            self._processes[number] = process
        if not self.send(EXEC, number, payload, flags, START_PATIENCE) and not process.ended:
            with self._state:
                self._processes.pop(number, None)
            raise GuestError(f"the guest's agent has taken nothing for {START_PATIENCE:g} s")
        return process

    def resize_console(self, rows: int, columns: int) -> None:
        """Set the size of the terminal on the guest's console, in characters."""
        self.send(RESIZE, CONSOLE_ID, WINDOW.pack(rows, columns), patience=PATIENCE)

    def power_off(self) -> None:
        """Ask the guest to power off."""
        self.send(POWEROFF, 0, patience=PATIENCE)

    def send(
        self,
        kind: int,
        number: int,
        payload: bytes | memoryview = b"",
        flags: int = 0,
        patience: float | None = None,
    ) -> bool:
        """Send one frame. Waits for the agent, and for room on the line; returns whether it was sent.

        It is not when the guest has ended or its agent was lost meanwhile, and when it took nothing for `patience`
        seconds. What was begun by then follows when the agent takes it, before anything else.
        """
        frame = memoryview(HEADER.pack(kind, flags, number, len(payload)) + payload)
        end = None if patience is None else time.monotonic() + patience
        if not self._sending.acquire(timeout=-1 if patience is None else patience):
            return False
        try:
            sent = self._send_holding(frame, number, end)
        finally:
            self._sending.release()
        self._flush()
        return sent

    def _send_holding(self, frame: memoryview, number: int, end: float | None) -> bool:
        begun = False

        def pointless() -> bool:
            if begun:  # the rest must follow, unless an agent that came new knows nothing of the begin
                return not self._ready.is_set() or bool(self._greeting)
            return number not in (0, CONSOLE_ID) and number not in self._processes

        def able() -> bool:
            return self._ready.is_set() and self._unacknowledged < LINE_WINDOW and not self._rest

        while frame:
            with self._state:
                left = None if end is None else max(0.0, end - time.monotonic())
                self._state.wait_for(lambda: self._ended.is_set() or pointless() or able(), left)
                if self._ended.is_set() or pointless():
                    return False
                if not able():
                    self._rest = bytes(frame) if begun else self._rest
                    return begun
                greeting, self._greeting = self._greeting, b""
                line = self._sends_to
                assert line is not None  # READY has come
                size = min(len(frame), max(1, LINE_WINDOW - self._unacknowledged))
                self._unacknowledged += size + len(greeting)
            try:
                line.sendall(greeting + frame[:size])
            except OSError:
                return False  # the guest is gone; the reader finds out and tells everyone
            frame = frame[size:]
            begun = True
        return True

    def take(self, number: int, which: int, size: int) -> None:
        """Have TAKEN sent: now, or by whoever is sending. Never waits, so that the reader can ask for it."""
        with self._state:
            if number in self._processes:
                self._credits[number, which] = self._credits.get((number, which), 0) + size
        self._flush()

    def post(self, kind: int, number: int, payload: bytes = b"", flags: int = 0) -> None:
        """Have a frame sent when there is room for it. Never waits; for frames that are small and few."""
        with self._state:
            if self._ended.is_set() or len(self._posted) >= POSTED_MAX:
                return  # whoever has taken none of those takes no more of them
            self._posted.append(HEADER.pack(kind, flags, number, len(payload)) + payload)
        self._flush()

    def _flush(self) -> None:
        """Send what the reader cannot wait to send, unless somebody is sending: he does it after his own."""
        while self._sending.acquire(blocking=False):
            try:
                with self._state:
                    pieces = self._urgent()
                if not pieces:
                    return
                for line, data in pieces:
                    # A socket holds more than the window: this waits only where a guest lies about what it has read.
                    line.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                return
            finally:
                self._sending.release()

    def _urgent(self) -> list[tuple[socket.socket, bytes]]:
        """Take what is to be sent out of turn, and where to. Both locks are held: nobody is amid a frame."""
        line = self._sends_to
        if self._ended.is_set() or line is None:
            return []
        if self._rest:
            size = max(0, LINE_WINDOW - self._unacknowledged)
            piece, self._rest = self._rest[:size], self._rest[size:]
            self._unacknowledged += len(piece)
            self._state.notify_all()
            return [(line, piece)] if piece else []
        if self._moves_to is not None:
            move, hello = HEADER.pack(MOVE, 0, 0, 0), _hello(self._number)
            self._unacknowledged += len(move) + len(hello)
            self._sends_to, self._moves_to = self._moves_to, None
            return [(line, move), (self._sends_to, hello)]
        if not (self._greeting or self._credits or self._posted) or self._unacknowledged >= LINE_WINDOW:
            return []  # after the next ACK
        frames = self._greeting + b"".join(
            HEADER.pack(TAKEN, which, number, WORD.size) + WORD.pack(size)
            for (number, which), size in self._credits.items()
        )
        frames += b"".join(self._posted)
        self._greeting = b""
        self._posted.clear()
        self._credits.clear()
        self._unacknowledged += len(frames)
        return [(line, frames)]

    def close(self) -> None:
        """End the link; commands that still run count as lost."""
        self._lines.wake()  # the reader, which a close alone would not
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=5)
        self._lines.close()

    def _refuse_ended(self) -> None:
        if self._ended.is_set():
            raise GuestEnded("the guest has ended: it cannot run a command")

    def _free_number(self) -> int:
        for _ in range(CONSOLE_ID):
            self._last_number = self._last_number % (CONSOLE_ID - 1) + 1
            if self._last_number not in self._processes:
                return self._last_number
        raise InternalError("every number for a guest process is taken")

    # --- the reader's thread

    def _read(self) -> None:
        arrived = bytearray(self._first)
        try:
            while True:
                try:
                    if self._find_agent(arrived):
                        self._read_frames(arrived)
                    return
                except StartedAgain as again:
                    self._lose(_STARTED_AGAIN)
                    arrived[:] = again.words
                except GuestError as error:
                    self._complaint = f"the guest's agent broke its protocol: {error}"
                    self._lose(GuestError(self._complaint))
        except OSError:
            pass
        finally:
            with self._state:
                self._ended.set()
            self._ready.set()
            self._lose(None)

    def _lose(self, why: GuestError | None) -> None:
        """Give up every command that runs: the agent that ran it is gone, or the guest with it."""
        with self._state:
            left = list(self._processes.values())
            self._processes.clear()
            self._credits.clear()
            self._posted.clear()
            self._rest = b""
            if why is not None:
                self._ready.clear()
            self._state.notify_all()
        for process in left:
            process.finish(failure=why or GuestEnded(f"the guest ended while {process.args[0]!r} ran in it"))

    def _greet(self, number: bytes) -> None:
        with self._state:
            self._number, self._greeting = number, _hello(number)
            self._sends_to, self._moves_to = self._lines.present, None
            self._unacknowledged = 0
            self._complaint = None
            self.was_ready = True
            self._ready.set()
            self._state.notify_all()
        self._flush()

    def _find_agent(self, arrived: bytearray) -> bool:
        """Skip what is no agent's (a boot loader, another program) up to READY; False at the end of the line."""
        whole = len(GREETING) + WORD.size
        while (at := arrived.find(GREETING)) < 0 or len(arrived) < at + whole:
            if at < 0:
                other = OTHER_AGENT.search(arrived)
                if other is not None and other[1] != MAGIC[15:-1]:
                    self._complaint = (
                        f"the agent in the guest speaks version {other[1].decode()} of its protocol, and this ringzero"
                        f" {MAGIC[15:-1].decode()}: fetch the image again (in a source tree, build it first:"
                        " guests/agent/build.py)"
                    )
                    with self._state:
                        self._state.notify_all()
                del arrived[: max(0, len(arrived) - whole)]
            if not (data := self._lines.receive()):
                return False
            arrived += data
        self._greet(bytes(arrived[at + len(GREETING) : at + whole]))
        del arrived[: at + whole]
        return True

    def _read_frames(self, arrived: bytearray) -> None:
        """Hand frames to their processes until the line ends. Raises GuestError for what is no frame of an agent."""
        while True:
            at = 0
            while len(arrived) - at >= HEADER.size:
                kind, _, number, size = HEADER.unpack_from(arrived, at)
                if kind == 0:  # zeros, as frame.h says
                    del arrived[:at]
                    self._lose(_STARTED_AGAIN)
                    if not self._find_agent(arrived):
                        return
                    at = 0
                    continue
                if size > OUTPUT_MAX:
                    del arrived[:]
                    raise GuestError(f"it announced a frame of {size} bytes")
                if len(arrived) - at - HEADER.size < size:
                    break
                at += HEADER.size
                if kind == MOVED:
                    del arrived[:]
                    if not self._follow(arrived):
                        return
                    at = 0
                    continue
                self._dispatch(kind, number, bytes(memoryview(arrived)[at : at + size]))
                at += size
            del arrived[:at]
            if not (data := self._lines.receive()):
                return
            arrived += data

    def _follow(self, arrived: bytearray) -> bool:
        """Go on where the agent has moved to, behind its word there; False at the end of the line."""
        with self._state:
            if self._sends_to is self._lines.present:
                raise GuestError("it moved to another line, and was not told to")
        self._lines.move()
        words = GREETING + self._number
        while (at := arrived.find(words)) < 0:  # before it is what was meant for another agent
            del arrived[: max(0, len(arrived) - len(words))]
            if not (data := self._lines.receive()):
                return False
            arrived += data
        del arrived[: at + len(words)]
        return True

    def _consider_moving(self) -> None:
        """The agent has found the port: have MOVE sent, unless it was."""
        try:
            port = self._lines.port()
        except (OSError, RingzeroError):
            return  # no descriptor is left, or no thread: it stays where it is
        with self._state:
            if port is not None and self._sends_to is not port:
                self._moves_to = port
        self._flush()

    def _dispatch(self, kind: int, number: int, payload: bytes) -> None:
        if kind in (EXIT, FAILED, CREDIT, ACK, STARTED) and len(payload) != WORD.size:
            return  # not from our agent: a guest may write what it likes to its serial port
        if kind == ACK:
            with self._state:
                self._unacknowledged = max(0, self._unacknowledged - WORD.unpack(payload)[0])
                self._state.notify_all()
            self._flush()
            return
        if kind == OFFER:
            self._consider_moving()
            return
        if kind == READY and payload[: len(MAGIC)] == MAGIC and len(payload) == len(MAGIC) + WORD.size:
            self._lose(_STARTED_AGAIN)
            self._greet(payload[len(MAGIC) :])
            return
        with self._state:
            process = (
                self._processes.pop(number, None) if kind in (EXIT, FAILED) else self._processes.get(number)
            )
            if process is not None and kind in (EXIT, FAILED):
                for which in (0, 1):
                    self._credits.pop((number, which), None)
                self._state.notify_all()
        if process is not None:
            process.deliver(kind, payload)


def _hello(number: bytes) -> bytes:
    return HEADER.pack(HELLO, 0, 0, len(MAGIC) + WORD.size) + MAGIC + number


_STARTED_AGAIN = GuestError("the guest's agent was started again: the command it ran is lost")
