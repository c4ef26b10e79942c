"""Every error that ringzero raises on purpose, in one tree.

    RingzeroError                 exit status 1: ours to explain
    ├── InputError                exit status 2: the operator can put it right
    │   ├── ImageError            a kernel, initramfs or disk that cannot be used
    │   ├── UnsupportedError      well formed, but not supported (yet), or not on this host
    │   └── FetchError            an image could not be fetched (no network, no apt, bad checksum)
    ├── GuestError                the guest did not do what was asked of it
    │   ├── ConsoleTimeout        `expect` did not see its pattern in time
    │   └── GuestEnded            the guest ended while something was still wanted from it
    └── InternalError             exit status 1: a defect of ours; please report it

A message is one sentence, names the thing that was wrong (the file, the option, the value) and says what to
do. What the *guest* does wrong is never one of these: that is a fault, and the guest's own business.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "ConsoleTimeout",
    "FetchError",
    "GuestEnded",
    "GuestError",
    "ImageError",
    "InputError",
    "InternalError",
    "RingzeroError",
    "UnsupportedError",
]


class RingzeroError(Exception):
    """The base of them all; `str(error)` is one sentence fit to show to the operator."""

    exit_status: ClassVar[int] = 1
    """What `ringzero` exits with when this error reaches the command line."""


class InputError(RingzeroError):
    """Something that the operator gave cannot be used: an option, a size, a file."""

    exit_status: ClassVar[int] = 2


class ImageError(InputError):
    """A kernel, initramfs or disk image that is damaged, truncated or not what it should be."""


class UnsupportedError(InputError):
    """Well formed, but something that ringzero does not support (yet), or not on this host."""


class FetchError(InputError):
    """An image could not be fetched, or what arrived was not what was asked for."""


class GuestError(RingzeroError):
    """The guest did not do what was asked of it."""


class ConsoleTimeout(GuestError):
    """`expect` did not see its pattern in time."""


class GuestEnded(GuestError):
    """The guest ended while something was still wanted from it; `reason` is what `wait` returned."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class InternalError(RingzeroError):
    """A defect of ours. Nothing the operator does causes it, and the message asks for a report."""
