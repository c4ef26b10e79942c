"""Boot unmodified x86-64 Linux in an ordinary process, by runtime binary translation.

    from ringzero import Machine
    with Machine("debian", memory="512M") as vm:
        print(vm.run(["uname", "-a"], check=True, text=True, capture_output=True).stdout)

The names below are loaded when they are first used, so that `import ringzero` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringzero.errors import (
        ConsoleTimeout,
        FetchError,
        GuestEnded,
        GuestError,
        ImageError,
        InputError,
        InternalError,
        RingzeroError,
        UnsupportedError,
    )
    from ringzero.host.client import Host
    from ringzero.machine.console import Console
    from ringzero.machine.machine import Machine

    __version__: str

__all__ = [
    "Console",
    "ConsoleTimeout",
    "FetchError",
    "GuestEnded",
    "GuestError",
    "Host",
    "ImageError",
    "InputError",
    "InternalError",
    "Machine",
    "RingzeroError",
    "UnsupportedError",
    "__version__",
]

_HOMES = {
    "Machine": "ringzero.machine.machine",
    "Console": "ringzero.machine.console",
    "Host": "ringzero.host.client",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ringzero")
        except PackageNotFoundError:  # used from a tree that was never installed
            return "0+unknown"
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(_HOMES.get(name, "ringzero.errors")), name)
    raise AttributeError(f"module 'ringzero' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
