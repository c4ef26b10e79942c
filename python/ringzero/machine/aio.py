"""The asyncio twins of running commands and copying files in a guest.

    done = await vm.aio.run(["make", "-j4"], check=True, text=True)

Whoever is cancelled takes his command with him: it is killed in the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ringzero.errors import GuestError
from ringzero.machine import frames, guest_process
from ringzero.machine.exec import AgentLink
from ringzero.machine.frames import Credentials, Word
from ringzero.machine.guest_process import GuestProcess
from ringzero.machine.popen import (
    DEVNULL,
    PIPE,
    STDOUT,
    CompletedProcess,
    TextMode,
    TimeoutExpired,
    text_mode,
    words_of,
)
from ringzero.machine.streams import Collected, OutputPipe

if TYPE_CHECKING:
    from ringzero.machine.drive import Driven

__all__ = ["AsyncGuest", "AsyncGuestPopen", "AsyncReader", "AsyncWriter"]

_PIECE = 65536
_LINE_MAX = 1 << 20


class AsyncReader:
    """An output of a command, read as it comes; what nobody reads waits in the guest."""

    def __init__(self, pipe: OutputPipe, mode: TextMode) -> None:
        self._pipe = pipe
        self._mode = mode
        self._rest = b""
        loop = asyncio.get_running_loop()
        self._more = asyncio.Event()
        pipe.watch(lambda: _call_soon(loop, self._more.set))

    async def read(self, size: int = -1) -> Any:
        """Read up to `size` bytes, waiting for the first; everything up to the end with -1."""
        if size >= 0:
            data, self._rest = self._rest[:size], self._rest[size:]
            return self._mode.decode(data or (await self._some(size) if size else b""))
        parts = [self._rest]
        self._rest = b""
        while data := await self._some(_PIECE):
            parts.append(data)
        return self._mode.decode(b"".join(parts))

    async def readline(self) -> Any:
        """Read a line with its end; what there is at the end of the output, and in pieces when it is very long."""
        while b"\n" not in self._rest and len(self._rest) < _LINE_MAX:
            data = await self._some(_PIECE)
            if not data:
                line, self._rest = self._rest, b""
                return self._mode.decode(line)
            self._rest += data
        at = self._rest.find(b"\n") + 1 or len(self._rest)
        line, self._rest = self._rest[:at], self._rest[at:]
        return self._mode.decode(line)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while line := await self.readline():
            yield line

    def close(self) -> None:
        """Read no more: a command that writes more gets SIGPIPE."""
        self._pipe.close()

    async def _some(self, size: int) -> bytes:
        while True:
            self._more.clear()
            data = self._pipe.read_now(size)
            if data is not None:
                return data
            await self._more.wait()


class AsyncWriter:
    """Standard input of a command."""

    def __init__(self, process: GuestProcess, mode: TextMode) -> None:
        self._process = process
        self._mode = mode
        self._closed = False

    async def write(self, data: Any) -> None:
        """Send all of `data`; waits while the command does not read."""
        if self._process.ended or self._closed:
            raise BrokenPipeError(32, "Broken pipe")
        await asyncio.to_thread(self._process.write, self._mode.encode(data))

    async def close(self) -> None:
        """Tell the command that its input is at its end."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._process.close_stdin)


class AsyncGuestPopen:
    """A command that runs in the guest; `async with` waits for it, and kills it when it is left by an exception."""

    def __init__(
        self,
        process: GuestProcess,
        args: Any,
        mode: TextMode,
        stdin: AsyncWriter | None,
        stdout: AsyncReader | None,
        stderr: AsyncReader | None,
    ) -> None:
        self.args = args
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self._process = process
        self._mode = mode
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        process.when_known(lambda: _call_soon(loop, self._changed.set))

    @property
    def pid(self) -> int | None:
        """Its number in the guest."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, -N when signal N ended it; None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for the end and return the exit status. Raises GuestEnded."""
        while not self._process.ended:
            self._changed.clear()
            if not self._process.ended:
                await self._changed.wait()
        code = self._process.wait(0)
        assert code is not None
        return code

    async def communicate(self, input: Any = None) -> tuple[Any, Any]:
        """Send `input`, read both outputs to their end, wait, and return (stdout, stderr)."""

        async def feed() -> None:
            if self.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    if input:
                        await self.stdin.write(input)
                await self.stdin.close()

        async def drain(stream: AsyncReader | None) -> Any:
            return None if stream is None else await stream.read()

        out, err, _, _ = await asyncio.gather(drain(self.stdout), drain(self.stderr), feed(), self.wait())
        return out, err

    async def send_signal(self, sig: int) -> None:
        """Send a signal, unless it has ended."""
        if not self._process.ended:
            await asyncio.to_thread(self._process.send_signal, int(sig))

    async def terminate(self) -> None:
        """Send SIGTERM."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL."""
        await self.send_signal(signal.SIGKILL)

    async def __aenter__(self) -> AsyncGuestPopen:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.stdin is not None:
            await _finished(self.stdin.close())
        if kind is not None:
            await _finished(self.kill())
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                await _finished(asyncio.to_thread(stream.close))
        await self.wait()


class AsyncGuest:
    """Commands and files of a guest, for asyncio."""

    def __init__(self, guest: Driven) -> None:
        self._guest = guest

    async def run(
        self,
        args: Word | Sequence[Word],
        *,
        input: Any = None,
        check: bool = False,
        timeout: float | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        **who: Any,
    ) -> CompletedProcess[Any]:
        """Run a command and return its result with its output, as `Machine.run` does.

        When it is cancelled, or `timeout` (seconds) passes, the command is killed.
        """
        mode = text_mode(text, encoding, errors, None)
        link, credentials = await asyncio.to_thread(self._prepared, who)
        out, err = Collected(), Collected()
        process = await asyncio.to_thread(
            lambda: link.start(
                words_of(args),
                stdin=input is not None,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=env,
                credentials=credentials,
            )
        )
        command = AsyncGuestPopen(process, args, mode, AsyncWriter(process, mode), None, None)
        try:
            async with asyncio.timeout(timeout):
                if input is not None:
                    await command.communicate(input)
                status = await command.wait()
        except TimeoutError:
            await _finished(command.kill())
            await _reaped(command)
            raise TimeoutExpired(
                args, timeout or 0.0, output=bytes(out.data) or None, stderr=bytes(err.data) or None
            ) from None
        except BaseException:
            await _finished(command.kill())
            raise
        result: CompletedProcess[Any] = CompletedProcess(
            args, status, mode.decode(out.data), mode.decode(err.data)
        )
        if check:
            result.check_returncode()
        return result

    async def popen(
        self,
        args: Word | Sequence[Word],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        window: tuple[int, int] | None = None,
        **who: Any,
    ) -> AsyncGuestPopen:
        """Start a command, and wait until it runs. Streams are PIPE, DEVNULL (also None) or, for stderr, STDOUT."""
        for stream, most in ((stdin, PIPE), (stdout, PIPE), (stderr, STDOUT)):
            if stream not in (None, PIPE, DEVNULL, most):
                raise ValueError(
                    "asyncio streams of a guest's command are PIPE, DEVNULL, or STDOUT for stderr"
                )
        mode = text_mode(text, encoding, errors, None)
        link, credentials = await asyncio.to_thread(self._prepared, who)
        out = OutputPipe(frames.STDOUT) if stdout == PIPE else None
        err = OutputPipe(frames.STDERR) if stderr == PIPE and window is None else None
        process = await asyncio.to_thread(
            lambda: link.start(
                words_of(args),
                env=env,
                cwd=cwd,
                stdout=out,
                stderr=err,
                stdin=stdin == PIPE,
                join=stderr == STDOUT and window is None,
                window=window,
                credentials=credentials,
                tell=True,
            )
        )
        for pipe in (out, err):
            if pipe is not None:
                pipe.attach(process)
        command = AsyncGuestPopen(
            process,
            args,
            mode,
            AsyncWriter(process, mode) if stdin == PIPE else None,
            AsyncReader(out, mode) if out is not None else None,
            AsyncReader(err, mode) if err is not None else None,
        )
        try:
            while not process.wait_started(0):
                command._changed.clear()
                if not process.wait_started(0):
                    await command._changed.wait()
        except asyncio.CancelledError:
            await _finished(command.kill())
            raise
        return command

    @property
    def files(self) -> AsyncFiles:
        """The guest's files."""
        return AsyncFiles(self._guest)

    def _prepared(self, who: Mapping[str, Any]) -> tuple[AgentLink, Credentials | None]:
        unknown = who.keys() - {"user", "group", "extra_groups", "umask"}
        if unknown:
            raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
        link = self._guest.agent_link()
        named = {"user": None, "group": None, "extra_groups": None, "umask": -1} | dict(who)
        return link, self._guest.credentials(**named)


class AsyncFiles:
    """The methods of `GuestFiles`, each awaited; they are done on a thread, and one that has begun is finished."""

    def __init__(self, guest: Driven) -> None:
        self._guest = guest

    async def put(self, *args: Any, **how: Any) -> None:
        """Copy a file or a tree into the guest."""
        await asyncio.to_thread(self._guest.files.put, *args, **how)

    async def get(self, *args: Any, **how: Any) -> None:
        """Copy a file or a tree out of the guest."""
        await asyncio.to_thread(self._guest.files.get, *args, **how)

    async def read_bytes(self, path: Any) -> bytes:
        """Return what is in a file."""
        return await asyncio.to_thread(self._guest.files.read_bytes, path)

    async def write_bytes(self, path: Any, data: bytes) -> int:
        """Write a file, whole or not at all."""
        return await asyncio.to_thread(self._guest.files.write_bytes, path, data)

    async def read_text(self, path: Any, **how: Any) -> str:
        """Return what is in a text file."""
        return await asyncio.to_thread(lambda: self._guest.files.read_text(path, **how))

    async def write_text(self, path: Any, text: str, **how: Any) -> int:
        """Write a text file, whole or not at all."""
        return await asyncio.to_thread(lambda: self._guest.files.write_text(path, text, **how))


def _call_soon(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(what)


async def _finished(work: Any) -> None:
    """Await something to its end, although whoever asks may be cancelled again meanwhile."""
    task = asyncio.ensure_future(work)
    with contextlib.suppress(GuestError, OSError):
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await task
            raise


async def _reaped(command: AsyncGuestPopen) -> None:
    """Wait a little for the end of a command that was killed."""
    with contextlib.suppress(TimeoutError, GuestError, OSError):
        async with asyncio.timeout(guest_process.PATIENCE):
            await command.wait()
