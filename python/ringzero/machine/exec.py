"""Run commands inside a guest: the host's side of what guests/agent/frame.h describes.

A frame is `u8 type | u8 flags | u16 id | u32 size | payload`, little-endian. One thread a link reads and
hands every frame to the process that it is for; writers share the line under one lock and two windows (see
frame.h for why).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence

from ringzero.errors import GuestEnded, InputError, InternalError

MAGIC = b"ringzero-agent-1\n"
FRAME_MAX = 32768
LINE_WINDOW = 32768
STDIN_WINDOW = 65536
CONSOLE_ID = 0xFFFF

EXEC, STDIN, STDIN_EOF, RESIZE, SIGNAL, POWEROFF, REBOOT = 1, 2, 3, 4, 5, 6, 7
READY, STDOUT, STDERR, EXIT, FAILED, CREDIT, ACK = 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87
FLAG_TTY, FLAG_NO_STDIN = 1, 2

HEADER = struct.Struct("<BBHI")
WORD = struct.Struct("<I")
WINDOW = struct.Struct("<HH")

# A quarter of the line's window: a signal or a resize never waits behind more than this.
STDIN_CHUNK = 8192
# The agent's largest frame, and some: one read takes what the socket holds.
READ_SIZE = 256 * 1024

DEFAULT_ENVIRONMENT = {
    "HOME": "/root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "linux",
}

Sink = Callable[[bytes], None]
"""Takes a piece of output; called from the link's thread. While it blocks, the guest's output waits."""


class GuestProcess:
    """A command in the guest, as `AgentLink.start` gives it."""

    def __init__(self, link: AgentLink, number: int, args: Sequence[str], stdout: Sink, stderr: Sink) -> None:
        self.args = list(args)
        self._link = link
        self._number = number
        self._sinks = {STDOUT: stdout, STDERR: stderr}
        self._done = threading.Event()
        self._credit = STDIN_WINDOW
        self._credited = threading.Condition()
        self._failure: Exception | None = None
        self._return_code: int | None = None

    @property
    def returncode(self) -> int | None:
        """The exit status, -N when signal N ended it (as subprocess has it); None while it runs."""
        return self._return_code

    def write(self, data: bytes | memoryview) -> None:
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

    def send_signal(self, number: int) -> None:
        """Send a signal to the command and all that it started in its group."""
        if not self._done.is_set():
            self._link.send(SIGNAL, self._number, WORD.pack(number))

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(9)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the command's terminal, in characters."""
        if not self._done.is_set():
            self._link.send(RESIZE, self._number, WINDOW.pack(rows, columns))

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

    def _deliver(self, kind: int, payload: bytes) -> None:
        if kind in self._sinks:
            sink = self._sinks[kind]
            try:
                sink(payload)
            except (
                Exception
            ) as error:  # the sink is the caller's: its failure is this command's, not the link's
                self._sinks[STDOUT] = self._sinks[STDERR] = _discard
                self._finish(failure=error)
        elif kind == CREDIT:
            with self._credited:
                self._credit += WORD.unpack(payload)[0]
                self._credited.notify_all()
        elif kind == EXIT:
            self._finish(code=os.waitstatus_to_exitcode(WORD.unpack(payload)[0]))
        elif kind == FAILED:
            number = WORD.unpack(payload)[0]
            self._finish(failure=OSError(number, os.strerror(number), self.args[0]))

    def _finish(self, *, code: int | None = None, failure: Exception | None = None) -> None:
        if self._done.is_set():
            return
        self._return_code, self._failure = code, failure
        self._done.set()
        with self._credited:
            self._credited.notify_all()


class AgentLink:
    """The line to the agent in one guest. `close` it, or let the guest end."""

    def __init__(self, line: socket.socket) -> None:
        """Take over `line`, a stream joined to the guest's second serial port, and close it in the end."""
        self._line = line
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._processes: dict[int, GuestProcess] = {}
        self._last_number = 0
        self._sending = threading.Lock()  # taken before _state
        self._state = threading.Condition()
        self._unacknowledged = 0
        self._reader = threading.Thread(target=self._read, name="ringzero-agent", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until the agent has said that it is there. False when `timeout` (seconds) passed or the line
        ended.
        """
        self._ready.wait(timeout)
        return self._ready.is_set() and not self._ended.is_set()

    @property
    def ended(self) -> bool:
        """Whether the line is at its end: the guest is gone, or `close` was called."""
        return self._ended.is_set()

    def start(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        stdin: bool = True,
        window: tuple[int, int] | None = None,
    ) -> GuestProcess:
        """Start a command; `args[0]` is looked up along the guest's PATH.

        `env` is the whole environment (the default is a small one), `cwd` a directory of the guest. Without
        `stdin` the command reads /dev/null. `window` (rows, columns) gives it a terminal of its own; all
        output then comes to `stdout`. Raises InputError for arguments that cannot be passed on.
        """
        environment = DEFAULT_ENVIRONMENT if env is None else env
        payload = pack_exec(args, environment, cwd or "/", window or (0, 0))
        flags = (FLAG_TTY if window is not None else 0) | (0 if stdin else FLAG_NO_STDIN)
        with self._state:
            if self._ended.is_set():
                raise GuestEnded("the guest has ended: it cannot run a command")
            number = self._free_number()
            process = GuestProcess(self, number, args, stdout or _discard, stderr or _discard)
            self._processes[number] = process
        self.send(EXEC, number, payload, flags)
        return process

    def resize_console(self, rows: int, columns: int) -> None:
        """Set the size of the terminal on the guest's console, in characters."""
        self.send(RESIZE, CONSOLE_ID, WINDOW.pack(rows, columns))

    def power_off(self) -> None:
        """Ask the guest to power off."""
        self.send(POWEROFF, 0)

    def send(self, kind: int, number: int, payload: bytes | memoryview = b"", flags: int = 0) -> None:
        """Send one frame. Waits for room on the line; does nothing once the guest has ended."""
        frame = memoryview(HEADER.pack(kind, flags, number, len(payload)) + payload)
        with self._sending:
            while frame:
                with self._state:
                    self._state.wait_for(lambda: self._unacknowledged < LINE_WINDOW or self._ended.is_set())
                    if self._ended.is_set():
                        return
                    size = min(len(frame), LINE_WINDOW - self._unacknowledged)
                    self._unacknowledged += size
                try:
                    self._line.sendall(frame[:size])
                except OSError:
                    return  # the guest is gone; the reader finds out and tells everyone
                frame = frame[size:]

    def close(self) -> None:
        """End the link; commands that still run count as lost."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # wakes the reader, which a close alone would not
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=5)
        self._line.close()

    def _free_number(self) -> int:
        for _ in range(CONSOLE_ID):
            self._last_number = self._last_number % (CONSOLE_ID - 1) + 1
            if self._last_number not in self._processes:
                return self._last_number
        raise InternalError("every number for a guest process is taken")

    def _read(self) -> None:
        try:
            self._read_frames()
        except OSError:
            pass
        finally:
            with self._state:
                self._ended.set()
                left = list(self._processes.values())
                self._processes.clear()
                self._state.notify_all()
            self._ready.set()
            for process in left:
                process._finish(failure=GuestEnded(f"the guest ended while {process.args[0]!r} ran in it"))

    def _read_frames(self) -> None:
        # Anything may come before the agent speaks (a boot loader, another program): READY is looked for.
        greeting = HEADER.pack(READY, 0, 0, len(MAGIC)) + MAGIC
        arrived = bytearray()
        while (at := arrived.find(greeting)) < 0:
            if not (data := self._line.recv(READ_SIZE)):
                return
            del arrived[: max(0, len(arrived) - len(greeting))]
            arrived += data
        del arrived[: at + len(greeting)]
        self._ready.set()
        while True:
            at = 0
            while len(arrived) - at >= HEADER.size:
                kind, _, number, size = HEADER.unpack_from(arrived, at)
                if len(arrived) - at - HEADER.size < size:
                    break
                at += HEADER.size
                self._dispatch(kind, number, bytes(arrived[at : at + size]))
                at += size
            del arrived[:at]
            if not (data := self._line.recv(READ_SIZE)):
                return
            arrived += data

    def _dispatch(self, kind: int, number: int, payload: bytes) -> None:
        if kind in (EXIT, FAILED, CREDIT, ACK) and len(payload) != WORD.size:
            return  # not from our agent: a guest may write what it likes to its serial port
        if kind == ACK:
            with self._state:
                self._unacknowledged = max(0, self._unacknowledged - WORD.unpack(payload)[0])
                self._state.notify_all()
            return
        with self._state:
            process = (
                self._processes.pop(number, None) if kind in (EXIT, FAILED) else self._processes.get(number)
            )
        if process is not None:
            process._deliver(kind, payload)


def pack_exec(args: Sequence[str], env: Mapping[str, str], cwd: str, window: tuple[int, int]) -> bytes:
    """Return the payload of an EXEC frame. Raises InputError when the guest could not take it."""
    if not args or not args[0]:
        raise InputError("a command needs a name")
    words = [cwd, *args, *(f"{name}={value}" for name, value in env.items())]
    if any("\0" in word for word in words):
        raise InputError("a command, its directory and its environment cannot hold NUL characters")
    text = b"".join(os.fsencode(word) + b"\0" for word in words)
    head = struct.pack("<HHHH", len(args) & 0xFFFF, len(env) & 0xFFFF, *window)
    # The agent's own limit on the number of words is 1024 (guests/agent/process.c ARGUMENTS_MAX), two of them
    # ends.
    if len(head) + len(text) > FRAME_MAX or len(words) > 1022:
        raise InputError("the command line is too long: at most 1000 words and 32 KiB with its environment")
    return head + text


def _discard(_: bytes) -> None:
    pass
