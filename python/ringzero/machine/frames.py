"""The words that a guest's agent and the host speak: what guests/agent/frame.h describes, with its numbers.

A frame is `u8 type | u8 flags | u16 id | u32 size | payload`, little-endian.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ringzero.errors import InputError

MAGIC = b"ringzero-agent-2\n"
FRAME_MAX = 32768
OUTPUT_MAX = 65536
LINE_WINDOW = 32768
STDIN_WINDOW = 65536
OUTPUT_WINDOW = 262144
OUTPUT_LEFT = 1048576
CONSOLE_ID = 0xFFFF

EXEC, STDIN, STDIN_EOF, RESIZE, SIGNAL, POWEROFF, REBOOT, TAKEN, CLOSE, HELLO, MOVE = range(1, 12)
READY, STDOUT, STDERR, EXIT, FAILED, CREDIT, ACK, STARTED, OFFER, MOVED = range(0x81, 0x8B)
FLAG_TTY, FLAG_NO_STDIN, FLAG_NO_STDOUT, FLAG_NO_STDERR, FLAG_JOIN = 1, 2, 4, 8, 16
FLAG_CREDENTIALS, FLAG_BUILTIN, FLAG_TELL = 32, 64, 128
FAILED_DIRECTORY, FAILED_CREDENTIALS = 0x10000, 0x20000

HEADER = struct.Struct("<BBHI")
WORD = struct.Struct("<I")
WINDOW = struct.Struct("<HH")
GREETING = HEADER.pack(READY, 0, 0, len(MAGIC) + WORD.size) + MAGIC
OTHER_AGENT = re.compile(rb"\x81\0\0\0.\0\0\0ringzero-agent-(\d{1,9})\n", re.DOTALL)
"""The first words of an agent of another version, with that."""

# The agent's own limit is 1024 (guests/agent/process.c ARGUMENTS_MAX), two of them ends.
WORDS_MAX = 1022

DEFAULT_ENVIRONMENT = {
    "HOME": "/root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "linux",
}

Word = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""A word of a command, as subprocess takes it."""


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
