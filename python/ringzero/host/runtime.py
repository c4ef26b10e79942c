"""The runtime folder: where the daemon of one user and its VMs' processes find each other.

    $RINGZERO_HOST, else $XDG_RUNTIME_DIR/ringzero, else /run/user/UID/ringzero, else ~/.cache/ringzero/host
        lock              held by the daemon as long as it lives
        daemon.sock       what `ringzero host` talks to
        sharer.sock                    what daemons ask the sharer of pages on
        switch.sock, switch.lock      what daemons and machines ask the switch on, and who starts it
        switch.log        what the switch has to say
        daemon.log        what the daemon and the fork server have to say
        state.db          VMs and events (ringzero.host.state)
        vms/NAME.sock     the control socket of a VM's process
        vms/NAME.log      what that process had to say, and how it ended

Nobody else may use the folder (mode 0700, owner checked): who can is the operator.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from ringzero.errors import InputError
from ringzero.images.cache import cache_root

__all__ = ["VARIABLE", "Runtime", "checked_name"]

VARIABLE = "RINGZERO_HOST"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")


def checked_name(name: str) -> str:
    """Return a VM's name, which is a part of file names. Raises InputError for one that cannot be."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise InputError(
            f"a vm cannot be called {name!r:.80}: give lower case letters, digits, '.', '_' and '-', 63 at most"
        )
    return name


@dataclass(frozen=True)
class Runtime:
    """The runtime folder of this user, or one of a caller's choice."""

    root: Path

    @classmethod
    def default(cls) -> Runtime:
        """Return the folder that the environment names."""
        chosen = os.environ.get(VARIABLE, "")
        if chosen:
            if not os.path.isabs(chosen):
                raise InputError(f"{VARIABLE}={chosen!r}: give the absolute path of a folder")
            return cls(Path(chosen))
        for folder in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.geteuid()}"):
            if (
                os.path.isabs(folder)
                and os.access(folder, os.W_OK)
                and Path(folder).stat().st_uid == os.geteuid()
            ):
                return cls(Path(folder) / "ringzero")
        return cls(cache_root() / "host")

    def prepare(self) -> None:
        """Make the folder where it is missing. Raises InputError when it cannot be used, or by others, too."""
        try:
            for folder in (self.root, self.vms):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                facts = os.stat(folder, follow_symlinks=False)
                if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
                    raise InputError(
                        f"the runtime folder {folder} is not this user's alone: make it so (chmod 700), or set"
                        f" {VARIABLE} to another"
                    )
        except OSError as error:
            raise InputError(
                f"the runtime folder {self.root} cannot be used ({error.strerror}): set {VARIABLE} to another"
            ) from error

    def lock(self) -> int | None:
        """Return a descriptor that holds the daemon's lock, or None when another daemon has it."""
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        return descriptor

    @property
    def socket(self) -> Path:
        """Where the daemon listens."""
        return self.root / "daemon.sock"

    @property
    def sharer(self) -> Path:
        """Where the sharer listens."""
        return self.root / "sharer.sock"

    @property
    def switch(self) -> Path:
        """Where the switch listens."""
        return self.root / "switch.sock"

    @property
    def log(self) -> Path:
        """What the daemon has to say."""
        return self.root / "daemon.log"

    @property
    def database(self) -> Path:
        """VMs and events."""
        return self.root / "state.db"

    @property
    def vms(self) -> Path:
        """The folder of the VMs' sockets and logs."""
        return self.root / "vms"

    def control(self, name: str) -> Path:
        """Where a VM's process listens."""
        return self.vms / f"{name}.sock"

    def vm_log(self, name: str) -> Path:
        """What a VM's process had to say."""
        return self.vms / f"{name}.log"
