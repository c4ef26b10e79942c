"""What can be done in a guest with an agent: `Driven` is the part that a Machine and a VM of a host have in common."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from ringzero.errors import GuestEnded, InputError
from ringzero.machine.exec import AgentLink
from ringzero.machine.files import SILENCE, GuestFiles, GuestName, GuestPath
from ringzero.machine.frames import Credentials, Word
from ringzero.machine.guest_process import GuestProcess, Sink

if TYPE_CHECKING:
    from ringzero.machine.aio import AsyncGuest
    from ringzero.machine.popen import GuestPopen, Redirection

__all__ = ["Driven"]


class Driven:
    """Commands and files of a guest. Whoever has one says how to reach its agent."""

    def agent_link(self) -> AgentLink:
        """Return the line to the agent of a guest that has booted; wait for that. Raises InputError where there is no
        agent, GuestError when it does not answer, and GuestEnded.
        """
        raise NotImplementedError

    def why_ended(self) -> str | None:
        """Return why the guest ended, where that is known."""
        return None

    @property
    def files(self) -> GuestFiles:
        """The guest's files: copy them, read them, write them."""
        return GuestFiles(self.agent_link)

    def path(self, path: GuestName, *, timeout: float | None = SILENCE) -> GuestPath:
        """Return a file of the guest, as pathlib.Path would be one of the host; `timeout` as `GuestFiles.within` has
        it.
        """
        return self.files.within(timeout).path(path)

    @property
    def aio(self) -> AsyncGuest:
        """The same for asyncio: `await vm.aio.run(...)`."""
        from ringzero.machine.aio import AsyncGuest

        return AsyncGuest(self)

    def spawn(
        self,
        args: Sequence[Word],
        *,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        stdin: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        window: tuple[int, int] | None = None,
    ) -> GuestProcess:
        """Start a command and return it at once; its output is handed to the sinks as it comes, and to nobody where
        there is none. See `ringzero.machine.exec.AgentLink.start`; `popen` is what subprocess has.
        """
        return self.agent_link().start(
            args,
            env=env,
            cwd=cwd,
            stdout=stdout or _nobody,
            stderr=stderr or _nobody,
            stdin=stdin,
            window=window,
        )

    def popen(
        self,
        args: Word | Sequence[Word],
        bufsize: int = -1,
        *,
        stdin: Redirection = None,
        stdout: Redirection = None,
        stderr: Redirection = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        group: str | int | None = None,
        extra_groups: Sequence[str | int] | None = None,
        umask: int = -1,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        universal_newlines: bool | None = None,
        window: tuple[int, int] | None = None,
    ) -> GuestPopen:
        """Start a command in the guest, as subprocess.Popen does on the host; see `ringzero.machine.popen`."""
        from ringzero.machine.popen import GuestPopen

        return GuestPopen(
            self.agent_link(),
            args,
            bufsize,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=env,
            credentials=self.credentials(user, group, extra_groups, umask),
            text=text,
            encoding=encoding,
            errors=errors,
            universal_newlines=universal_newlines,
            window=window,
        )

    @overload
    def run(
        self,
        args: Word | Sequence[Word],
        *,
        input: str | None = None,
        capture_output: bool | None = None,
        check: bool = False,
        timeout: float | None = None,
        text: Literal[True],
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        **how: Any,
    ) -> subprocess.CompletedProcess[str]: ...
    @overload
    def run(
        self,
        args: Word | Sequence[Word],
        *,
        input: bytes | None = None,
        capture_output: bool | None = None,
        check: bool = False,
        timeout: float | None = None,
        text: Literal[False] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        **how: Any,
    ) -> subprocess.CompletedProcess[bytes]: ...
    def run(
        self,
        args: Word | Sequence[Word],
        *,
        user: str | int | None = None,
        group: str | int | None = None,
        extra_groups: Sequence[str | int] | None = None,
        umask: int = -1,
        **how: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command in the guest and return its result, as subprocess.run does on the host.

        Options: input, stdin, stdout, stderr, capture_output, check, timeout, text, encoding, errors, cwd, env, user,
        group, extra_groups, umask. Output is captured unless it is sent elsewhere or `capture_output` is False: then
        it goes to this process's own. Without `input` the command reads /dev/null. Raises CalledProcessError with
        `check`, TimeoutExpired after `timeout` seconds (the command is killed first), FileNotFoundError or
        PermissionError when there is no such command, and GuestEnded when the guest ends.
        """
        from ringzero.machine.popen import run

        credentials = self.credentials(user, group, extra_groups, umask)
        if credentials is not None:
            how["credentials"] = credentials
        try:
            return run(self.agent_link(), args, **how)
        except GuestEnded as error:
            if error.reason is not None or (reason := self.why_ended()) is None:
                raise
            raise GuestEnded(f"{error} ({reason})", reason) from None

    def credentials(
        self,
        user: str | int | None,
        group: str | int | None,
        extra_groups: Sequence[str | int] | None,
        umask: int,
    ) -> Credentials | None:
        """Return who a command is to be, with the names of users and groups looked up in the guest's /etc."""
        if user is None and group is None and extra_groups is None and umask < 0:
            return None
        return Credentials(
            user=self._number("passwd", "user", user),
            group=self._number("group", "group", group),
            groups=None
            if extra_groups is None
            else tuple(self._number("group", "group", one) or 0 for one in extra_groups),
            umask=None if umask < 0 else umask,
        )

    def _number(self, table: str, kind: str, name: str | int | None) -> int | None:
        if name is None or isinstance(name, int):
            return name
        for line in self.files.read_text(f"/etc/{table}", errors="replace").splitlines():
            fields = line.split(":")
            if fields[0] == name and len(fields) > 2 and fields[2].isdigit():
                return int(fields[2])
        raise InputError(f"the guest has no {kind} {name!r} (in its /etc/{table})")


def _nobody(_: bytes) -> None:
    pass
