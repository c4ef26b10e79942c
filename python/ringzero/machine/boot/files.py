"""Reading a kernel or an initramfs that the operator named."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from ringzero.errors import ImageError, InputError

__all__ = ["LARGEST", "read_file"]

LARGEST: Final = 2 << 30
"""No kernel or initramfs is larger than this many bytes: they must lie below 3 GiB together."""


def read_file(path: Path | str, what: str, *, largest: int = LARGEST) -> bytes:
    """Return the whole file; `what` is what the operator calls it ("kernel", "initramfs").

    Raises InputError when it is missing, unreadable or not a regular file, ImageError when it is empty or
    larger than `largest` bytes. A device or a pipe is refused before it is read, or a read could last for
    ever.
    """
    path = Path(path)
    try:
        # O_NONBLOCK: a FIFO that nobody writes to must not hold us up before fstat has told us what it is.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist: check the path") from None
    except PermissionError:
        raise InputError(f"{what} {path} may not be read by this user: check its permissions") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{what} {path} cannot be opened: {reason}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)  # before fdopen, which refuses a directory in words of its own
        raise InputError(f"{what} {path} is not a regular file: give the file itself")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size == 0:
            raise ImageError(f"{what} {path} is empty: fetch or build it again")
        if status.st_size > largest:
            raise ImageError(
                f"{what} {path} has {status.st_size >> 20} MiB, more than the {largest >> 20} MiB that can be loaded"
            )
        try:
            return file.read(largest + 1)[:largest]
        except OSError as error:
            raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
