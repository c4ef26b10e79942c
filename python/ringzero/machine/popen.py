"""Commands of a guest with the conventions of `subprocess`: its constants, its results, its exceptions.

What differs from a process of the host, and why:

- standard input that is not given is /dev/null: the guest does not share this process's;
- output that is not captured is copied to this process's own, or to the file that was given;
- a signal goes to the command and to all that it started in its group: the group is all that outsiders can name;
- a command has ended when it has: a grandchild that keeps its pipe open does not hold the end back;
- `env` that is not given is a small one, `user` and `group` are names and numbers of the guest;
- streams have no descriptor: they can be read and written, but not waited for with select.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from subprocess import DEVNULL, PIPE, STDOUT, CalledProcessError, CompletedProcess, TimeoutExpired
from types import TracebackType
from typing import IO, Any

from ringzero.errors import GuestError
from ringzero.machine import frames, guest_process
from ringzero.machine.exec import AgentLink
from ringzero.machine.frames import Credentials, Word
from ringzero.machine.guest_process import GuestProcess
from ringzero.machine.streams import Collected, InputPipe, OutputPipe

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "CalledProcessError",
    "CompletedProcess",
    "GuestPopen",
    "TimeoutExpired",
    "run",
    "text_mode",
    "words_of",
]

Redirection = int | IO[Any] | None
"""None, PIPE, DEVNULL, STDOUT (for standard error), a descriptor, or a file."""

_PUMP_SIZE = 65536


class TextMode:
    """How bytes become text, if they do."""

    def __init__(self, encoding: str | None, errors: str | None, on: bool) -> None:
        self.on = on
        self.encoding = encoding or "utf-8"
        self.errors = errors or "strict"

    def decode(self, data: bytes | bytearray) -> Any:
        """Return output as the caller wants it, line ends and all."""
        if not self.on:
            return bytes(data)
        text = bytes(data).decode(self.encoding, self.errors)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def encode(self, data: Any) -> memoryview | bytes:
        """Return input as bytes."""
        return data.encode(self.encoding, self.errors) if isinstance(data, str) else memoryview(data)


def text_mode(
    text: bool | None, encoding: str | None, errors: str | None, universal_newlines: bool | None
) -> TextMode:
    """Return what subprocess's four options mean together. Raises SubprocessError when they contradict."""
    if text is not None and universal_newlines is not None and bool(text) != bool(universal_newlines):
        raise subprocess.SubprocessError(
            "Cannot disambiguate when both text and universal_newlines are supplied but different. "
            "Pass one or the other."
        )
    return TextMode(encoding, errors, bool(text or encoding or errors or universal_newlines))


def words_of(args: Word | Sequence[Word]) -> list[Word]:
    """Return the words of a command: a single text is the name of a program, as without a shell."""
    return [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)


class GuestPopen:
    """A command that runs in the guest, as subprocess.Popen is one that runs on the host."""

    def __init__(
        self,
        link: AgentLink,
        args: Word | Sequence[Word],
        bufsize: int = -1,
        *,
        stdin: Redirection = None,
        stdout: Redirection = None,
        stderr: Redirection = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        credentials: Credentials | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        window: tuple[int, int] | None = None,
        tell: bool = True,
    ) -> None:
        """Start it, and wait until it runs, unless `tell` is False. Raises OSError when it cannot be started, as
        subprocess does.

        `window` (rows, columns) gives it a terminal of its own, where all output is standard output.
        """
        self.args = args
        self.returncode: int | None = None
        self._mode = text_mode(text, encoding, errors, universal_newlines)
        self._pumps: list[threading.Thread] = []
        self._files: list[int] = []
        self._feeder: threading.Thread | None = None
        join = stderr == STDOUT
        if window is not None:
            join, stderr = False, None
        out, out_to = self._output(stdout, frames.STDOUT, 1)
        if stderr == STDOUT or window is not None:
            err, err_to = None, None
        else:
            err, err_to = self._output(stderr, frames.STDERR, 2)
        try:
            from_fd = None if stdin in (None, PIPE, DEVNULL) else _descriptor(stdin)
            process = link.start(
                words_of(args),
                env=env,
                cwd=cwd,
                stdout=out,
                stderr=err,
                stdin=stdin == PIPE or from_fd is not None or window is not None,
                join=join,
                window=window,
                credentials=credentials,
                tell=tell,
            )
            for pipe in (out, err):
                if pipe is not None:
                    pipe.attach(process)
            if tell and not process.wait_started(guest_process.START_PATIENCE):
                process.kill()
                raise GuestError(
                    f"the guest's agent has not started {process.args[0]!r} within {guest_process.START_PATIENCE:g} s"
                )
        except BaseException:
            for fd in self._files:
                os.close(fd)
            raise
        self._process: GuestProcess = process
        self.pid = process.pid
        """Its number in the guest."""
        self.stdin: Any = None
        if stdin == PIPE or (window is not None and stdin is None):
            self.stdin = self._wrapped(InputPipe(process), bufsize)
        elif from_fd is not None:
            self._pump(lambda: _copy_in(from_fd, process))
        self.stdout: Any = self._given(out, out_to, bufsize)
        self.stderr: Any = self._given(err, err_to, bufsize)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: returncode: {self.returncode} args: {self.args!r}>"

    # --- as subprocess.Popen has it

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._taken() if self._process.ended else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status. Raises TimeoutExpired, and GuestEnded."""
        if not self._process.ended and self._process.wait(timeout) is None:
            raise TimeoutExpired(self.args, timeout or 0.0)
        code = self._taken()
        assert code is not None
        for pump in self._pumps:
            pump.join()
        return code

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Send `input`, read both outputs to their end, wait, and return (stdout, stderr).

        After TimeoutExpired, which has the bytes that came so far, it can be called again: nothing is lost.
        """
        if self._feeder is not None and input:
            raise ValueError("Cannot send input after starting communication")
        parts = [None if stream is None else _raw(stream).collect() for stream in (self.stdout, self.stderr)]
        if self._feeder is None and self.stdin is not None and not self.stdin.closed:
            stdin, raw = self.stdin, _raw(self.stdin)
            data = self._mode.encode(input) if input else b""
            if hasattr(stdin, "flush"):
                _quietly(stdin.flush)

            def feed() -> None:
                _quietly(lambda: raw.write(data) if len(data) else None)
                _quietly(stdin.close)

            self._feeder = threading.Thread(target=feed, name="ringzero-stdin", daemon=True)
            self._feeder.start()
        try:
            self.wait(timeout)
        except TimeoutExpired as late:
            out, err = (bytes(part) if part else None for part in parts)
            raise TimeoutExpired(self.args, late.timeout, output=out, stderr=err) from None
        if self._feeder is not None:
            self._feeder.join()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        out, err = (None if part is None else self._mode.decode(part) for part in parts)
        return out, err

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            self._process.send_signal(int(sig))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal, in characters."""
        self._process.resize(rows, columns)

    def __enter__(self) -> GuestPopen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in (self.stdout, self.stderr, self.stdin):
            if stream is not None:
                _quietly(stream.close)
        self.wait()

    # --- inside

    @property
    def process(self) -> GuestProcess:
        """The command as the link has it."""
        return self._process

    def _taken(self) -> int | None:
        self.returncode = self._process.wait(0)
        return self.returncode

    def _output(self, where: Redirection, kind: int, own: int) -> tuple[OutputPipe | None, int | None]:
        """Return the pipe for an output, and the descriptor that it is copied to; neither for DEVNULL."""
        if where == DEVNULL:
            return None, None
        if where == PIPE:
            return OutputPipe(kind), None
        fd = os.dup(own if where is None else _descriptor(where))
        self._files.append(fd)
        return OutputPipe(kind), fd

    def _given(self, pipe: OutputPipe | None, fd: int | None, bufsize: int) -> Any:
        """Return what the caller reads an output from: nothing, when it is copied elsewhere."""
        if pipe is None:
            return None
        if fd is not None:
            self._pumps.append(self._pump(lambda: _copy_out(pipe, fd)))
            return None
        return self._wrapped(pipe, bufsize)

    def _wrapped(self, raw: OutputPipe | InputPipe, bufsize: int) -> Any:
        size = io.DEFAULT_BUFFER_SIZE if bufsize < 0 or (bufsize <= 1 and self._mode.on) else bufsize
        if size <= 1 and not self._mode.on:
            return raw
        buffered: Any = (
            io.BufferedWriter(raw, size) if isinstance(raw, InputPipe) else io.BufferedReader(raw, size)
        )
        if not self._mode.on:
            return buffered
        return io.TextIOWrapper(
            buffered,
            encoding=self._mode.encoding,
            errors=self._mode.errors,
            line_buffering=bufsize == 1,
            write_through=bufsize == 0,
        )

    @staticmethod
    def _pump(work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name="ringzero-pump", daemon=True)
        thread.start()
        return thread


def run(
    link: AgentLink,
    args: Word | Sequence[Word],
    *,
    input: Any = None,
    stdin: Redirection = None,
    stdout: Redirection = None,
    stderr: Redirection = None,
    capture_output: bool | None = None,
    check: bool = False,
    timeout: float | None = None,
    **how: Any,
) -> CompletedProcess[Any]:
    """Run a command to its end, as subprocess.run does; options as GuestPopen has them.

    Output is captured unless it is sent elsewhere, or `capture_output` is False.
    """
    if input is not None:
        if stdin is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        stdin = PIPE
    if capture_output and (stdout is not None or stderr is not None):
        raise ValueError("stdout and stderr arguments may not be used with capture_output.")
    if capture_output is None:
        capture_output = stdout is None and stderr is None
    if capture_output:
        stdout = stderr = PIPE
    deadline = None if timeout is None else time.monotonic() + timeout
    if capture_output and stdin is None and not how.keys() - {"text", "env", "cwd", "encoding", "errors"}:
        return _captured(link, args, check, timeout, **how)
    process = GuestPopen(link, args, stdin=stdin, stdout=stdout, stderr=stderr, tell=False, **how)
    try:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        out, err = process.communicate(input, left)
    except BaseException as error:
        # Not by the context manager, which waits: a guest that does not do what it is told cannot hold us up.
        process.kill()
        _reap(process.process)
        if isinstance(error, TimeoutExpired):
            raise TimeoutExpired(args, timeout or 0.0, output=error.output, stderr=error.stderr) from None
        raise
    return _result(args, process.returncode, out, err, check)


def _captured(
    link: AgentLink,
    args: Word | Sequence[Word],
    check: bool,
    timeout: float | None,
    *,
    text: bool | None = None,
    encoding: str | None = None,
    errors: str | None = None,
    **how: Any,
) -> CompletedProcess[Any]:
    """The common case, by the shortest way: no streams, and no wait but for the end."""
    mode = text_mode(text, encoding, errors, None)
    out, err = Collected(), Collected()
    process = link.start(words_of(args), stdin=False, stdout=out, stderr=err, **how)
    try:
        status = process.wait(timeout)
    except BaseException:
        process.kill()
        raise
    if status is None:
        process.kill()
        _reap(process)
        raise TimeoutExpired(
            args, timeout or 0.0, output=bytes(out.data) or None, stderr=bytes(err.data) or None
        )
    return _result(args, status, mode.decode(out.data), mode.decode(err.data), check)


def _result(args: Any, status: int | None, out: Any, err: Any, check: bool) -> CompletedProcess[Any]:
    result: CompletedProcess[Any] = CompletedProcess(args, 0 if status is None else status, out, err)
    if check:
        result.check_returncode()
    return result


def _reap(process: GuestProcess) -> None:
    """Wait a little for the end of a command that was killed; a guest that does not do it cannot hold us up."""
    _quietly(lambda: process.wait(guest_process.PATIENCE))


def _raw(stream: Any) -> Any:
    """Return the pipe below a stream of ours."""
    while (below := getattr(stream, "buffer", None) or getattr(stream, "raw", None)) is not None:
        stream = below
    return stream


def _descriptor(where: Any) -> int:
    return where if isinstance(where, int) else int(where.fileno())


def _quietly(do: Callable[[], object]) -> None:
    with contextlib.suppress(OSError, GuestError, ValueError):
        do()


def _copy_out(pipe: OutputPipe, fd: int) -> None:
    """Copy an output to a descriptor of the host until it ends; who cannot be written to any more is let go."""
    from ringzero.machine.machine import write_all

    buffer = bytearray(_PUMP_SIZE)
    try:
        while size := pipe.readinto(buffer):
            write_all(fd, memoryview(buffer)[:size])
    except OSError:
        pipe.close()
    finally:
        os.close(fd)


def _copy_in(fd: int, process: GuestProcess) -> None:
    try:
        while data := os.read(fd, _PUMP_SIZE):
            process.write(data)
    except OSError:
        pass
    process.close_stdin()
