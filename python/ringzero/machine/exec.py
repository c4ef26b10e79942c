"""Run commands inside a guest: the host's side of what guests/agent/frame.h describes.

A frame is `u8 type | u8 flags | u16 id | u32 size | payload`, little-endian. One thread a link reads and hands every
frame to the process that it is for; writers share the line under one lock and its windows (see frame.h for why). What
comes from the guest is believed in nothing: no frame is larger than an agent's, no stream holds more than its window,
and the reader waits for nobody but the caller's own sinks.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ringzero.errors import GuestEnded, GuestError, InputError, InternalError

MAGIC = b"ringzero-agent-2\n"
FRAME_MAX = 32768
OUTPUT_MAX = 65536
LINE_WINDOW = 32768
STDIN_WINDOW = 65536
OUTPUT_WINDOW = 262144
OUTPUT_LEFT = 1048576
CONSOLE_ID = 0xFFFF

EXEC, STDIN, STDIN_EOF, RESIZE, SIGNAL, POWEROFF, REBOOT, TAKEN, CLOSE, HELLO = range(1, 11)
READY, STDOUT, STDERR, EXIT, FAILED, CREDIT, ACK, STARTED = range(0x81, 0x89)
FLAG_TTY, FLAG_NO_STDIN, FLAG_NO_STDOUT, FLAG_NO_STDERR, FLAG_JOIN = 1, 2, 4, 8, 16
FLAG_CREDENTIALS, FLAG_BUILTIN, FLAG_TELL = 32, 64, 128
FAILED_DIRECTORY, FAILED_CREDENTIALS = 0x10000, 0x20000

HEADER = struct.Struct("<BBHI")
WORD = struct.Struct("<I")
WINDOW = struct.Struct("<HH")
GREETING = HEADER.pack(READY, 0, 0, len(MAGIC) + WORD.size) + MAGIC
_OTHER_AGENT = re.compile(rb"\x81\0\0\0.\0\0\0ringzero-agent-(\d{1,9})\n", re.DOTALL)

# A quarter of the line's window: a signal or a resize never waits behind more than this.
STDIN_CHUNK = 8192
# The agent's largest frame, and some: one read takes what the socket holds.
READ_SIZE = 256 * 1024
# How much of an output has been taken before the agent is told: seldom, but long before its window is empty.
TAKEN_EVERY = OUTPUT_WINDOW // 4
# A guest that has not taken a signal after so many seconds is not going to.
PATIENCE = 5.0
# The agent's own limit is 1024 (guests/agent/process.c ARGUMENTS_MAX), two of them ends.
WORDS_MAX = 1022

DEFAULT_ENVIRONMENT = {
    "HOME": "/root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "linux",
}

Sink = Callable[[bytes], None]
"""Takes a piece of output; called from the link's thread. While it blocks, the guest's output waits."""

Word = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""A word of a command, as subprocess takes it."""


class Stream(Protocol):
    """Keeps output until somebody reads it, and says then that it was taken (ringzero.machine.streams)."""

    def feed(self, data: bytes) -> None:
        """Take a piece of output; must not wait."""

    def end(self) -> None:
        """Nothing more comes."""


@dataclass(frozen=True)
class Credentials:
    """Who a command is to be, by numbers of the guest; None leaves it as the agent is, which is root."""

    user: int | None = None
    group: int | None = None
    groups: tuple[int, ...] | None = None
    umask: int | None = None

    def packed(self) -> bytes:
        """Return it as EXEC has it. Raises InputError for numbers that no user can have."""
        as_it_is = 0xFFFFFFFF
        groups = self.groups or ()
        for number in (self.user, self.group, self.umask, *groups):
            if number is not None and not 0 <= number < as_it_is:
                raise InputError(f"{number} is no number of a user, a group or a umask")
        if len(groups) > 256:
            raise InputError(f"{len(groups)} groups are too many: give at most 256")
        words = (
            *(as_it_is if number is None else number for number in (self.user, self.group, self.umask)),
            as_it_is if self.groups is None else len(groups),
            *groups,
        )
        return struct.pack(f"<{len(words)}I", *words)


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

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes to standard input; waits while the command does not take them. Dropped once it has
        ended.
        """
        view = memoryview(data).cast("B")
        while view:
            with self._credited:
                self._credited.wait_for(lambda: self._credit > 0 or self._done.is_set())
                if self._done.is_set():
                    return
                size = min(len(view), self._credit, STDIN_CHUNK)
                self._credit -= size
            self._link.send(STDIN, self._number, view[:size])
            view = view[size:]

    def close_stdin(self) -> None:
        """Tell the command that its input is at its end."""
        if not self._done.is_set():
            self._link.send(STDIN_EOF, self._number)

    def close_output(self, kind: int) -> None:
        """Read no more of STDOUT or STDERR: what the command writes there ends it by SIGPIPE, as a pipe does."""
        self._sinks[kind] = _discard
        if not self._done.is_set():
            self._link.send(CLOSE, self._number, flags=kind - STDOUT, patience=PATIENCE)

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
        """End it, because nobody wants it any more. One of the agent's own puts what it does in order first."""
        with contextlib.suppress(GuestError):
            if self._flags & FLAG_BUILTIN:
                self.close_stdin()
                self.close_output(STDOUT)
            else:
                self.kill()

    def when_credited(self, callback: Callable[[int], None]) -> None:
        """Call `callback`, from the link's thread, with the bytes of input that the guest has taken, as it says so."""
        self._credit_callback = callback

    def send_signal(self, number: int) -> None:
        """Send a signal to the command and all that it started in its group."""
        if not self._done.is_set():
            self._link.send(SIGNAL, self._number, WORD.pack(number), patience=PATIENCE)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(9)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal, in characters."""
        if not self._done.is_set():
            self._link.send(RESIZE, self._number, WINDOW.pack(rows, columns), patience=PATIENCE)

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

    def when_known(self, callback: Callable[[], None]) -> None:
        """Call `callback`, from the link's thread, when it has started, when it has ended, and at once when either is
        so already.
        """
        with self._credited:
            self._callbacks.append(callback)
            now = self._known.is_set()
        if now:
            callback()

    def _deliver(self, kind: int, payload: bytes) -> None:
        """Take a frame. Raises GuestError for one that our agent does not send."""
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
            except (
                Exception
            ) as error:  # the sink is the caller's: its failure is this command's, not the link's
                self._sinks[STDOUT] = self._sinks[STDERR] = _discard
                self._finish(failure=error)
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
            self._finish(code=_exit_code(WORD.unpack(payload)[0]))
        elif kind == FAILED:
            self.last_words = (kind, payload)
            number = WORD.unpack(payload)[0]
            about = self._cwd if number & FAILED_DIRECTORY else self.args[0]
            number &= 0xFFFF
            self._finish(failure=OSError(number, os.strerror(number), about))

    def _finish(self, *, code: int | None = None, failure: Exception | None = None) -> None:
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


class AgentLink:
    """The line to the agent in one guest. `close` it, or let the guest end."""

    def __init__(self, line: socket.socket, first: bytes = b"") -> None:
        """Take over `line`, a stream joined to the guest's agent, and close it in the end.

        `first` is what was read from it already.
        """
        self._line = line
        self._first = first
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._processes: dict[int, GuestProcess] = {}
        self._last_number = 0
        self._sending = threading.Lock()  # taken before _state
        self._state = threading.Condition()
        self._unacknowledged = 0
        self._greeting = b""  # HELLO, while it has not been sent
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
        return self.begin(payload, flags, words, where, stdout or _discard, stderr or _discard)

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
        self.send(EXEC, number, payload, flags)
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
        seconds.
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
            return self._ready.is_set() and self._unacknowledged < LINE_WINDOW

        while frame:
            with self._state:
                left = None if end is None or begun else max(0.0, end - time.monotonic())
                self._state.wait_for(lambda: self._ended.is_set() or pointless() or able(), left)
                if self._ended.is_set() or pointless() or not able():
                    return False
                greeting, self._greeting = self._greeting, b""
                size = min(len(frame), max(1, LINE_WINDOW - self._unacknowledged))
                self._unacknowledged += size + len(greeting)
            try:
                self._line.sendall(greeting + frame[:size])
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

    def _flush(self) -> None:
        """Send what the reader cannot wait to send, unless somebody is sending: he does it after his own."""
        while self._sending.acquire(blocking=False):
            try:
                with self._state:
                    if self._ended.is_set() or not (self._greeting or self._credits):
                        return
                    if self._unacknowledged >= LINE_WINDOW:
                        return  # when the next ACK comes
                    frames = self._greeting + b"".join(
                        HEADER.pack(TAKEN, which, number, WORD.size) + WORD.pack(size)
                        for (number, which), size in self._credits.items()
                    )
                    self._greeting = b""
                    self._credits.clear()
                    self._unacknowledged += len(frames)
                # The socket holds more than the window: this waits only where a guest lies about what it has read.
                self._line.send(frames, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                return
            finally:
                self._sending.release()

    def close(self) -> None:
        """End the link; commands that still run count as lost."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # wakes the reader, which a close alone would not
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=5)
        self._line.close()

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
            while self._find_agent(arrived):
                try:
                    self._read_frames(arrived)
                    return
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
            if why is not None:
                self._ready.clear()
            self._state.notify_all()
        for process in left:
            process._finish(failure=why or GuestEnded(f"the guest ended while {process.args[0]!r} ran in it"))

    def _greet(self, number: bytes) -> None:
        with self._state:
            self._greeting = HEADER.pack(HELLO, 0, 0, len(MAGIC) + WORD.size) + MAGIC + number
            self._unacknowledged = 0
            self._complaint = None
            self._ready.set()
            self._state.notify_all()
        self._flush()

    def _find_agent(self, arrived: bytearray) -> bool:
        """Skip what is no agent's (a boot loader, another program) up to READY; False at the end of the line."""
        whole = len(GREETING) + WORD.size
        while (at := arrived.find(GREETING)) < 0 or len(arrived) < at + whole:
            if at < 0:
                other = _OTHER_AGENT.search(arrived)
                if other is not None and other[1] != MAGIC[15:-1]:
                    self._complaint = (
                        f"the agent in the guest speaks version {other[1].decode()} of its protocol, and this ringzero"
                        f" {MAGIC[15:-1].decode()}: fetch the image again (in a source tree, build it first:"
                        " guests/agent/build.py)"
                    )
                    with self._state:
                        self._state.notify_all()
                del arrived[: max(0, len(arrived) - whole)]
            if not (data := self._line.recv(READ_SIZE)):
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
                self._dispatch(kind, number, bytes(memoryview(arrived)[at : at + size]))
                at += size
            del arrived[:at]
            if not (data := self._line.recv(READ_SIZE)):
                return
            arrived += data

    def _dispatch(self, kind: int, number: int, payload: bytes) -> None:
        if kind in (EXIT, FAILED, CREDIT, ACK, STARTED) and len(payload) != WORD.size:
            return  # not from our agent: a guest may write what it likes to its serial port
        if kind == ACK:
            with self._state:
                self._unacknowledged = max(0, self._unacknowledged - WORD.unpack(payload)[0])
                self._state.notify_all()
            self._flush()
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
            process._deliver(kind, payload)


def pack_exec(
    args: Sequence[Word],
    env: Mapping[str, str],
    cwd: str,
    window: tuple[int, int],
    credentials: Credentials | None = None,
) -> bytes:
    """Return the payload of an EXEC frame. Raises InputError when the guest could not take it."""
    if not args or not os.fspath(args[0]):
        raise InputError("a command needs a name")
    words = [os.fsencode(word) for word in (cwd, *args)]
    words += [os.fsencode(name) + b"=" + os.fsencode(value) for name, value in env.items()]
    if any(b"\0" in word for word in words):
        raise InputError("a command, its directory and its environment cannot hold NUL characters")
    text = b"".join(word + b"\0" for word in words)
    head = struct.pack("<HHHH", len(args) & 0xFFFF, len(env) & 0xFFFF, *window)
    head += credentials.packed() if credentials is not None else b""
    if len(head) + len(text) > FRAME_MAX or len(words) > WORDS_MAX:
        raise InputError("the command line is too long: at most 1000 words and 32 KiB with its environment")
    return head + text


def _exit_code(status: int) -> int:
    """Return a wait status as subprocess gives it; one that waitpid never gives counts as its low byte."""
    try:
        return os.waitstatus_to_exitcode(status)
    except (ValueError, OverflowError):
        return status & 0xFF


_STARTED_AGAIN = GuestError("the guest's agent was started again: the command it ran is lost")


def _discard(_: bytes) -> None:
    pass
