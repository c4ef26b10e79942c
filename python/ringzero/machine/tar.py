"""Trees of files as a tar archive, both ways, as the guest's agent speaks it (guests/agent/tar_out.c, tar_in.c).

Not `tarfile`: what comes from a guest may be made to do harm. Here no header is larger than it needs to be, no name
leads out of the tree, and no link in it is ever followed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ringzero.errors import GuestError

__all__ = ["Member", "Progress", "Reader", "archive", "unpack"]

BLOCK = 512
# As guests/agent/tar.h has it: two paths of at most 4 KiB, and numbers.
EXTENDED_MAX = 16384
PIECE = 65536
_TEMPORARY = ".ringzero-new"
PATH_MAX = 4096
FOLDERS_MAX = 64 << 20
"""Bytes of the names of all folders of a tree: they are kept to the end."""

Progress = Callable[[str, int], None]
"""Told of each piece: the name of the file in the tree, and how many bytes of it there were."""


@dataclass(frozen=True)
class Member:
    """A file, folder or link of a tree: `name` is relative to it, "." the tree itself. Times in nanoseconds."""

    name: str
    kind: str
    mode: int
    size: int
    mtime: int
    link: str = ""


# --- out of this host


def archive(root: Path, progress: Progress | None = None) -> Iterator[bytes]:
    """Give the pieces of an archive of the file or tree at `root`; it is followed when it is a link itself.

    What is no file, folder or link is left out. Raises OSError.
    """
    yield from _archived(os.fspath(root), ".", os.stat(root), progress)
    yield bytes(2 * BLOCK)


def _archived(path: str, name: str, facts: os.stat_result, progress: Progress | None) -> Iterator[bytes]:
    mode = stat.S_IMODE(facts.st_mode)
    if stat.S_ISREG(facts.st_mode):
        with open(path, "rb") as file:
            yield _head(Member(name, "0", mode, facts.st_size, facts.st_mtime_ns))
            left = facts.st_size
            while left:
                data = file.read(min(left, PIECE))
                if not data:
                    raise OSError(5, "became shorter while it was copied", path)
                left -= len(data)
                if progress is not None:
                    progress(name, len(data))
                yield data
            yield bytes(-facts.st_size % BLOCK)
    elif stat.S_ISLNK(facts.st_mode):
        yield _head(Member(name, "2", mode, 0, facts.st_mtime_ns, os.readlink(path)))
    elif stat.S_ISDIR(facts.st_mode):
        yield _head(Member(name, "5", mode, 0, facts.st_mtime_ns))
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            within = entry.name if name == "." else f"{name}/{entry.name}"
            yield from _archived(entry.path, within, entry.stat(follow_symlinks=False), progress)
    elif name == ".":
        raise OSError(22, "is neither a file nor a folder", path)


def _head(member: Member) -> bytes:
    """Return the headers of a member."""
    name, link = os.fsencode(member.name), os.fsencode(member.link)
    records = _record(b"mtime", f"{'-' if member.mtime < 0 else ''}{_seconds(abs(member.mtime))}".encode())
    if len(name) > 100:
        records += _record(b"path", name)
    if len(link) > 100:
        records += _record(b"linkpath", link)
    if member.size >> 33:
        records += _record(b"size", str(member.size).encode())
    extended = _block(b"x", 0, len(records), 0, b"", b"") + records + bytes(-len(records) % BLOCK)
    size = 0 if member.size >> 33 else member.size
    seconds = max(0, member.mtime // 10**9) & 0o77777777777
    return extended + _block(member.kind.encode(), member.mode, size, seconds, name[:100], link[:100])


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09}"


def _record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    size = rest + 1
    while rest + len(str(size)) != size:
        size = rest + len(str(size))
    return b"%d %s=%s\n" % (size, key, value)


def _block(kind: bytes, mode: int, size: int, mtime: int, name: bytes, link: bytes) -> bytes:
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = b"%07o\0" % mode
    block[108:124] = b"0000000\x000000000\0"
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"%011o\0" % mtime
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


# --- into this host


class Reader:
    """Reads an archive from `read`: up to so many bytes, none at the end. Raises GuestError for a bad one."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._left = 0

    def members(self) -> Iterator[Member]:
        """Give the members, each to be read by `content` before the next one is asked for."""
        while True:
            for _ in self.content():
                pass
            member = self._next()
            if member is None:
                return
            yield member

    def content(self) -> Iterator[bytes]:
        """Give the pieces of the present member's content."""
        padding = -self._left % BLOCK
        while self._left:
            data = self._some(min(self._left, PIECE))
            self._left -= len(data)
            yield data
        self._exactly(padding)

    def _next(self) -> Member | None:
        told: dict[bytes, bytes] | None = None
        while True:
            block = self._exactly(BLOCK)
            if not any(block):
                return None
            if sum(block) - sum(block[148:156]) + 8 * 32 != _octal(block[148:156]):
                raise GuestError("the guest sent an archive whose headers are damaged")
            size, kind = _octal(block[124:136]), chr(block[156])
            if kind == "x":
                if told is not None:
                    raise GuestError("the guest sent an archive with headers of nothing")
                if size > EXTENDED_MAX:
                    raise GuestError(f"the guest sent an archive with a header of {size} bytes")
                told = _records(self._exactly(size + -size % BLOCK)[:size])
                continue
            told = told or {}
            if kind not in ("0", "2", "5"):
                raise GuestError(f"the guest sent an archive with a member of type {kind!r}")
            name = told.get(b"path") or block[:100].rstrip(b"\0")
            link = told.get(b"linkpath") or block[157:257].rstrip(b"\0")
            size = _number(told[b"size"]) if b"size" in told else size
            if max(len(name), len(link)) >= PATH_MAX:
                raise GuestError("the guest sent an archive with a name that is too long to be one")
            if kind != "0" and size:
                raise GuestError("the guest sent an archive in which something that is no file has content")
            self._left = size
            mtime = _nanoseconds(told[b"mtime"]) if b"mtime" in told else _octal(block[136:148]) * 10**9
            mode = _octal(block[100:108]) & 0o7777
            return Member(os.fsdecode(name), kind, mode, size, mtime, os.fsdecode(link))

    def _some(self, size: int) -> bytes:
        data = self._read(size)
        if not data:
            raise GuestError("the guest sent an archive that ends too early")
        return data

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._some(size - len(data))
        return data


def _octal(field: bytes) -> int:
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise GuestError("the guest sent an archive with a number that is none") from None


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise GuestError("the guest sent an archive with a number that is none")
    return int(text)


def _nanoseconds(text: bytes) -> int:
    whole, _, part = text.removeprefix(b"-").partition(b".")
    value = _number(whole) * 10**9 + (_number(part[:9].ljust(9, b"0")) if part else 0)
    return -value if text.startswith(b"-") else value


def _records(data: bytes) -> dict[bytes, bytes]:
    found = {}
    while data:
        digits, _, _ = data.partition(b" ")
        size = _number(digits[:18])
        key, equals, value = data[len(digits) + 1 : size].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise GuestError("the guest sent an archive whose headers are damaged")
        found[key] = value[:-1]
        data = data[size:]
    return found


def unpack(reader: Reader, target: Path, progress: Progress | None = None) -> None:
    """Put what an archive has at `target`: a file appears whole or not at all, a folder is gone into if it is there.

    Links are made as they are and never followed; set-user and set-group bits are not kept. Raises OSError, GuestError.
    """
    members = reader.members()
    first = next(members, None)
    if first is None or first.name != ".":
        raise GuestError("the guest sent an archive that does not begin with what it is of")
    if first.kind != "5":
        with _folder(os.path.abspath(target.parent), -1) as parent:
            _make(first, target.name, parent, reader, progress, str(target))
        if next(members, None) is not None:
            raise GuestError("the guest sent more than one file, and one was asked for")
        return
    with contextlib.suppress(FileExistsError):
        os.mkdir(target)
    later, named = {"": first}, 0
    with _folder(os.fspath(target), -1) as root:
        for member in members:
            parts = member.name.split("/")
            if any(part in ("", ".", "..") or "\0" in part for part in parts):
                raise GuestError(f"the guest sent an archive in which {member.name!r} is not in the tree")
            with _within(root, parts[:-1]) as parent:
                if member.kind == "5":
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(parts[-1], 0o700, dir_fd=parent)
                    if member.name not in later:
                        named += len(member.name)
                    if named > FOLDERS_MAX:
                        raise GuestError("the guest sent an archive with more folders than a tree can have")
                    later[member.name] = member
                else:
                    _make(member, parts[-1], parent, reader, progress, str(target / member.name))
        # What is made in a folder changes its time, and its mode may forbid it: so they come last, the innermost first.
        for member in reversed(later.values()):
            parts = [] if member.name == "." else member.name.split("/")
            with _within(root, parts) as folder:
                os.fchmod(folder, member.mode & 0o777)
                os.utime(folder, ns=(member.mtime, member.mtime))


@contextlib.contextmanager
def _folder(path: str, parent: int) -> Iterator[int]:
    follow = os.O_NOFOLLOW if parent >= 0 else 0
    fd = os.open(
        path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | follow, dir_fd=parent if parent >= 0 else None
    )
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _within(root: int, parts: list[str]) -> Iterator[int]:
    """Open a folder of the tree, one name after the other, so that no link is followed."""
    fd = os.dup(root)
    try:
        for part in parts:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def _make(
    member: Member, name: str, parent: int, reader: Reader, progress: Progress | None, shown: str
) -> None:
    """Make a file or a link under another name, and give it its own when it is whole."""
    temporary = name[:200] + _TEMPORARY
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=parent)
    try:
        if member.kind == "2":
            os.symlink(member.link, temporary, dir_fd=parent)
            os.utime(temporary, ns=(member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
        else:
            how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            with open(os.open(temporary, how, 0o600, dir_fd=parent), "wb") as file:
                for data in reader.content():
                    file.write(data)
                    if progress is not None:
                        progress(member.name, len(data))
                file.flush()
                os.fchmod(file.fileno(), member.mode & 0o777)
                os.utime(file.fileno(), ns=(member.mtime, member.mtime))
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=parent)
        raise OSError(error.errno, error.strerror, shown) from error
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=parent)
        raise
