"""Files of a guest: `vm.files` copies them, `vm.path(...)` is one as pathlib would have it.

All of it is done by the guest's agent itself (guests/agent/builtin.c): no program of the guest is needed. What the
guest refuses is the OSError that it would be here, with the guest's path in it.
"""

from __future__ import annotations

import contextlib
import os
import stat as stat_modes
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ringzero.errors import GuestError
from ringzero.machine.exec import AgentLink
from ringzero.machine.frames import STDOUT as STDOUT_KIND
from ringzero.machine.streams import Collected, OutputPipe
from ringzero.machine.tar import BLOCK, Progress, Reader, archive, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["GuestFiles", "GuestPath", "Progress"]

GuestName = str | os.PathLike[str]
SILENCE = 60.0
"""Seconds that a guest may show no sign of what it was asked for: then it is given up."""
READ_MOST = 1 << 30
_LIST_MOST = 64 << 20
"""Bytes that a file and a folder have at most where they are kept in memory."""
# Of what a builtin says, a path is all that is looked at.
_MESSAGE_MAX = 8192
_FOLDER, _LINK, _FILE = 4, 10, 8
"""Types of struct dirent (include/linux/fs_types.h, Linux 6.1)."""


class GuestFiles:
    """The files of one guest. `path` gives one of them; the rest copies."""

    def __init__(self, link: Callable[[], AgentLink], timeout: float | None = SILENCE) -> None:
        """Take the way to the agent: called for each request, since it may have to wait for the guest."""
        self._link = link
        self._timeout = timeout

    def within(self, timeout: float | None) -> GuestFiles:
        """Return the same files, for operations that are given up with a GuestError after `timeout` seconds: a minute
        by itself, None is never. Whatever moves a file's content is given up when nothing came or went for so long.
        """
        return GuestFiles(self._link, timeout)

    def path(self, path: GuestName) -> GuestPath:
        """Return a file of the guest, whether it is there or not."""
        return GuestPath(self, path)

    def put(
        self,
        source: GuestName,
        target: GuestName,
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> None:
        """Copy a file or a whole tree of this host to `target` in the guest, which is its name there.

        Modes and times go with it, links stay links, and root owns it. Each file appears whole or not at all, in the
        place of one that is there; a tree is joined with one that is there. `timeout` is as `within` has it.
        """
        files = self if timeout is None else self.within(timeout)
        files._stream_in(["put", os.fspath(target)], archive(Path(source), progress))

    def get(
        self,
        source: GuestName,
        target: GuestName,
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
        most: int | None = None,
    ) -> None:
        """Copy a file or a whole tree of the guest to `target` on this host, as `put` does the other way.

        The guest is not trusted: nothing lands outside `target`, and set-user bits are not kept. Its links are made as
        they are, so look before you follow them. An archive of more than `most` bytes is given up with a GuestError.
        """
        patience = self._timeout if timeout is None else timeout
        out, said = OutputPipe(STDOUT_KIND), Collected()
        out.patience = patience
        came = 0
        process = self._link().start(
            ["get", os.fspath(source)], stdin=False, stdout=out, stderr=_short(said), builtin=True
        )
        out.attach(process)

        def read(size: int) -> bytes:
            nonlocal came
            buffer = bytearray(size)
            got = out.readinto(buffer)
            came += got
            if most is not None and came > most:
                raise GuestError(f"{os.fspath(source)!r} has more than the {most} bytes that were allowed")
            if not got:
                _check(process.wait_heard(patience), said, source)  # better than that the archive ends
            return bytes(memoryview(buffer)[:got])

        try:
            unpack(Reader(read), Path(target), progress)
            rest = 0
            while got := out.readinto(bytearray(4096)):
                rest += got
                if rest > BLOCK * 20:  # as programs pad it that write in records
                    raise GuestError("the guest sent more after the end of an archive")
            _check(process.wait_heard(patience), said, source)
        finally:
            out.close()

    def read_bytes(self, path: GuestName, *, most: int = READ_MOST) -> bytes:
        """Return what is in a file. Raises GuestError when that is more than `most` bytes: `get` is for those."""
        return self.call("read", path, most=most, is_long=True)

    def write_bytes(self, path: GuestName, data: bytes | bytearray | memoryview) -> int:
        """Write a file, whole or not at all; one that is there keeps its mode and owner. Returns the bytes written."""
        return self._write(path, data, None)

    def read_text(self, path: GuestName, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return what is in a text file."""
        text = self.read_bytes(path).decode(encoding, errors)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def write_text(self, path: GuestName, text: str, encoding: str = "utf-8", errors: str = "strict") -> int:
        """Write a text file, as `write_bytes` does. Returns the characters written."""
        self.write_bytes(path, text.encode(encoding, errors))
        return len(text)

    def call(
        self,
        word: str,
        *arguments: GuestName | bytes | int,
        most: int = _MESSAGE_MAX,
        is_long: bool = False,
    ) -> bytes:
        """Have the agent do one of its own (guests/agent/builtin.c) and return its output, of at most so many bytes.

        It has the time that the files have for it; where it `is_long`, for each sign of life. Raises OSError,
        GuestError.
        """
        out, said = Collected(most), Collected()
        words = [word, *(str(one) if isinstance(one, int) else os.fspath(one) for one in arguments)]
        process = self._link().start(words, stdin=False, stdout=out, stderr=_short(said), builtin=True)
        try:
            status = process.wait_heard(self._timeout) if is_long else process.wait(self._timeout)
            if status is None:
                raise GuestError(f"the guest has not done {word!r} within {self._timeout:g} s")
            _check(status, said, words[1])
        except BaseException:
            process.abandon()
            raise
        return bytes(out.data)

    def _write(self, path: GuestName, data: bytes | bytearray | memoryview, mode: int | None) -> int:
        view = memoryview(data).cast("B")
        self._stream_in(
            ["write", os.fspath(path), "-" if mode is None else f"{mode:o}", str(len(view))], [view]
        )
        return len(view)

    def _stream_in(self, words: list[str], pieces: Iterable[bytes | memoryview]) -> None:
        said = Collected()
        process = self._link().start(words, stdout=None, stderr=_short(said), builtin=True)
        try:
            for piece in pieces:
                if process.ended:
                    break
                process.write(piece, self._timeout)
        except GuestError:
            process.abandon()
            raise
        except BaseException:
            # Input that ends too early is what tells the agent that it shall leave no half of a file behind.
            process.close_stdin()
            with contextlib.suppress(OSError, GuestError):
                process.wait_heard(self._timeout)
            raise
        process.close_stdin()
        _check(process.wait_heard(self._timeout), said, words[1])


class GuestPath:
    """A path in a guest, with what pathlib.Path has for one: names are put together here, files are there."""

    def __init__(self, files: GuestFiles, path: GuestName) -> None:
        self._files = files
        self._path = PurePosixPath(path)

    def __fspath__(self) -> str:
        return str(self._path)

    def __str__(self) -> str:
        return str(self._path)

    def __repr__(self) -> str:
        return f"GuestPath({str(self._path)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuestPath) and (self._files, self._path) == (other._files, other._path)

    def __hash__(self) -> int:
        return hash(self._path)

    def __truediv__(self, other: GuestName) -> GuestPath:
        return GuestPath(self._files, self._path / other)

    def joinpath(self, *others: GuestName) -> GuestPath:
        """Return the path with others behind it."""
        return GuestPath(self._files, self._path.joinpath(*others))

    @property
    def parent(self) -> GuestPath:
        """The folder that it is in."""
        return GuestPath(self._files, self._path.parent)

    @property
    def name(self) -> str:
        """Its last part."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """What its name ends in, with the dot."""
        return self._path.suffix

    @property
    def stem(self) -> str:
        """Its name without `suffix`."""
        return self._path.stem

    @property
    def parts(self) -> tuple[str, ...]:
        """Its parts."""
        return self._path.parts

    # --- what it holds

    def read_bytes(self) -> bytes:
        """Return what is in it."""
        return self._files.read_bytes(self)

    def write_bytes(self, data: bytes | bytearray | memoryview) -> int:
        """Write it; see GuestFiles.write_bytes."""
        return self._files.write_bytes(self, data)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return what is in it, as text."""
        return self._files.read_text(self, encoding, errors)

    def write_text(self, text: str, encoding: str = "utf-8", errors: str = "strict") -> int:
        """Write it; see GuestFiles.write_text."""
        return self._files.write_text(self, text, encoding, errors)

    def iterdir(self) -> Iterator[GuestPath]:
        """Give what is in a folder."""
        for entry in self._files.call("list", self, most=_LIST_MOST, is_long=True).split(b"\0")[:-1]:
            name = os.fsdecode(entry[1:])
            if name in ("", ".", "..") or "/" in name:
                raise GuestError(
                    f"the guest's agent says that {name!r:.60} is in {self}, and that is no name"
                )
            yield self / name

    def readlink(self) -> GuestPath:
        """Return where a link points to."""
        return GuestPath(self._files, os.fsdecode(self._files.call("readlink", self)))

    # --- what it is

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return what stat tells, with times in seconds and in nanoseconds."""
        words = self._files.call("stat" if follow_symlinks else "lstat", self).split()
        try:
            numbers = [int(word) for word in words]
            times = numbers[7:10]
            if min(numbers[:7]) < 0 or max(map(abs, numbers)) >> 64:
                raise ValueError
            seconds: list[Any] = [time // 10**9 for time in times]
            return os.stat_result(
                # As structseq has them; rounded as os.stat does it.
                [*numbers[:7], *seconds, *(time // 10**9 + 1e-9 * (time % 10**9) for time in times), *times]
            )
        except (ValueError, TypeError, IndexError):
            raise GuestError(f"the guest's agent did not tell what {self} is") from None

    def lstat(self) -> os.stat_result:
        """Return what stat tells of a link itself."""
        return self.stat(follow_symlinks=False)

    def exists(self) -> bool:
        """Return whether it is there."""
        return self._mode() is not None

    def is_file(self) -> bool:
        """Return whether it is a file, or a link to one."""
        return stat_modes.S_ISREG(self._mode() or 0)

    def is_dir(self) -> bool:
        """Return whether it is a folder, or a link to one."""
        return stat_modes.S_ISDIR(self._mode() or 0)

    def is_symlink(self) -> bool:
        """Return whether it is a link."""
        return stat_modes.S_ISLNK(self._mode(follow_symlinks=False) or 0)

    def _mode(self, **how: bool) -> int | None:
        try:
            return self.stat(**how).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None

    # --- what is done with it

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a folder."""
        try:
            self._files.call("mkdir", self, f"{mode:o}")
        except FileNotFoundError:
            if not parents or self.parent == self:
                raise
            self.parent.mkdir(parents=True, exist_ok=True)
            self.mkdir(mode, exist_ok=exist_ok)
        except FileExistsError:
            if not exist_ok or not self.is_dir():
                raise

    def rmdir(self) -> None:
        """Remove an empty folder."""
        self._files.call("rmdir", self)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file or a link."""
        with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
            self._files.call("unlink", self)

    def rmtree(self) -> None:
        """Remove it and all that is in it; links are removed, not followed."""
        self._files.call("remove", self)

    def rename(self, target: GuestName) -> GuestPath:
        """Give it another name, in the place of a file that has it; return that."""
        self._files.call("rename", self, target)
        return GuestPath(self._files, target)

    replace = rename

    def symlink_to(self, target: GuestName) -> None:
        """Make it a link to `target`."""
        self._files.call("symlink", target, self)

    def hardlink_to(self, target: GuestName) -> None:
        """Make it another name of the file `target`."""
        self._files.call("link", target, self)

    def chmod(self, mode: int) -> None:
        """Set its mode."""
        self._files.call("chmod", self, f"{mode:o}")

    def chown(self, user: int, group: int) -> None:
        """Set its owner, by numbers."""
        self._files.call("chown", self, user, group)

    def utime(self, *, ns: tuple[int, int]) -> None:
        """Set the times of its last use and last change (nanoseconds)."""
        self._files.call("utime", self, *ns)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Make an empty file, or set the times of one that is there to now."""
        if self.exists():
            if not exist_ok:
                raise FileExistsError(17, os.strerror(17), str(self))
            import time

            self.utime(ns=(now := time.time_ns(), now))
        else:
            self._files._write(self, b"", None if mode == 0o666 else mode)  # the guest's umask applies


def _short(said: Collected) -> Callable[[bytes], None]:
    """Return a sink for an agent's message, which a guest cannot make long."""

    def sink(data: bytes) -> None:
        if len(said.data) < _MESSAGE_MAX:
            said(data[:_MESSAGE_MAX])

    return sink


def _check(status: int | None, said: Collected, path: Any) -> None:
    """Raise what an exit status of a builtin says."""
    if status == 0:
        return
    if status is None or status < 0:
        raise GuestError(f"the guest's agent was ended while it worked on {os.fspath(path)!r}")
    raise OSError(status, os.strerror(status), os.fsdecode(bytes(said.data)) or os.fspath(path))
