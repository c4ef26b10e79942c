"""Write "newc" cpio archives, the form in which Linux takes an initramfs.

The archive is made from names, modes and bytes; nothing is read from the host's file system, so device nodes
and files owned by root need no root here. Format: the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst ("initramfs buffer format", Linux 6.1).
"""

from __future__ import annotations

import stat
from typing import BinaryIO

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
# The kernel unpacks names into a buffer of PATH_MAX bytes and refuses longer ones.
NAME_MAX = 4096
FILE_SIZE_MAX = 0xFFFF_FFFF


class NewcWriter:
    """Append files, directories, links and device nodes to a newc archive.

    Parents are made when they are first needed, so that an entry never arrives before its directory. Leave
    the `with` block, or call `close`, to write the trailer: an archive without one is not complete.
    """

    def __init__(self, out: BinaryIO, *, mtime: int = 0) -> None:
        """Write to `out`. Every entry gets `mtime` (seconds since 1970), so that equal input gives equal
        bytes.
        """
        self._out = out
        self._mtime = mtime
        self._inode = 0
        self._seen: set[str] = set()
        self._closed = False

    def __enter__(self) -> NewcWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory. A directory that is already there is left as it is."""
        name = self._name(path)
        if name in self._seen:
            return
        self._parents(name)
        self._entry(name, stat.S_IFDIR | mode, links=2)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file with the contents `data`."""
        if len(data) > FILE_SIZE_MAX:
            raise ValueError(f"{path!r} is too large for a newc archive (4 GiB at most)")
        name = self._name(path)
        self._parents(name)
        self._entry(name, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link which points to `target`."""
        name = self._name(path)
        self._parents(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int, *, block: bool = False, mode: int = 0o600) -> None:
        """Add a character (or, with `block`, a block) device node."""
        name = self._name(path)
        self._parents(name)
        self._entry(name, (stat.S_IFBLK if block else stat.S_IFCHR) | mode, device=(major, minor))

    def close(self) -> None:
        """Write the trailer, once. `out` stays open: it is the caller's."""
        if not self._closed:
            self._closed = True
            self._write(TRAILER, 0, b"", links=1, inode=0, device=(0, 0), mtime=0)

    def _name(self, path: str) -> str:
        name = path.strip("/")
        parts = name.split("/")
        if not name or any(part in ("", ".", "..") for part in parts) or "\0" in name:
            raise ValueError(f"not a plain path for an archive: {path!r}")
        if len(name.encode()) >= NAME_MAX:
            raise ValueError(f"name longer than {NAME_MAX - 1} bytes: {path[:40]!r}...")
        return name

    def _parents(self, name: str) -> None:
        head, _, _ = name.rpartition("/")
        if head and head not in self._seen:
            self.directory(head)

    def _entry(
        self, name: str, mode: int, data: bytes = b"", *, links: int = 1, device: tuple[int, int] = (0, 0)
    ) -> None:
        if self._closed:
            raise ValueError("the archive is closed")
        if name in self._seen:
            raise ValueError(f"{name!r} is in the archive already")
        self._seen.add(name)
        self._inode += 1
        self._write(name, mode, data, links=links, inode=self._inode, device=device, mtime=self._mtime)

    def _write(
        self,
        name: str,
        mode: int,
        data: bytes,
        *,
        links: int,
        inode: int,
        device: tuple[int, int],
        mtime: int,
    ) -> None:
        encoded = name.encode() + b"\0"
        # Order of the fields: inode, mode, uid, gid, links, mtime, size, device of the file (2), device that
        # the node names (2), length of the name with its NUL, checksum (not used with this magic).
        fields = (inode, mode, 0, 0, links, mtime, len(data), 0, 0, *device, len(encoded), 0)
        header = MAGIC + b"".join(b"%08x" % field for field in fields) + encoded
        self._out.write(header + bytes(-len(header) % 4))
        self._out.write(data)
        self._out.write(bytes(-len(data) % 4))
