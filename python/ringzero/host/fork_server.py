"""The fork server: a process that has loaded everything a VM needs, and becomes one on request.

Loading Python, the core and an image takes a fifth of a second and 20 MiB; a fork takes milliseconds, and its pages
stay common until somebody writes to them. It has one thread and never runs a guest itself. It ends when the daemon's
end of its channel does; VMs go on without it.

    python -m ringzero.host.fork_server FD      FD: a stream socket to the daemon

Requests: {"do": "fork", "spec": ...} with two descriptors, the VM's listening socket and its log, or with two more,
its socket to the sharer and its group's pool, and "cables" more, those of its cards that are on switches; the answer
has the "pid". When a child has ended: {"event": "gone", "pid": ..., "status": ...} (as os.waitpid has it).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from ringzero import _core
from ringzero.errors import InternalError, RingzeroError
from ringzero.host.loop import Loop
from ringzero.host.spec import GuestSpec
from ringzero.host.vm_process import Place, run_vm
from ringzero.host.wire import Message, Peer, failure
from ringzero.machine.assemble import BootFiles

__all__ = ["ForkServer", "main"]

MOST_IMAGES = 4
"""Whose files are kept in memory: those used last."""

_Mark = tuple[tuple[str, int, int, int] | None, ...]


class ForkServer:
    """Forks VMs for the daemon at the other end of `channel`."""

    def __init__(self, channel: socket.socket) -> None:
        self._loop = Loop()
        self._files: dict[_Mark, BootFiles] = {}
        self._peer = Peer(self._loop, channel, self._received, lambda *_: self._loop.stop())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._loop.wake_on_signals(self._reap)

    def run(self) -> None:
        """Serve until the daemon has gone."""
        _core.prepare()
        self._settle()
        self._loop.run()

    def _settle(self) -> None:
        """Have what is loaded stay common: the collector leaves it alone, here and in every child."""
        gc.collect()
        gc.freeze()

    def _received(self, peer: Peer, message: Message, fds: list[int]) -> None:
        try:
            if message.get("do") != "fork" or len(fds) - _cables(message) not in (2, 4):
                raise InternalError("a fork server forks, given a socket and a log")
            spec = GuestSpec.from_json(message.get("spec"))
            files = self._boot_files(spec)
            answer = {"ok": True, "pid": self._fork(spec, files, message, fds)}
        except RingzeroError as error:
            answer = failure(error)
        except OSError as error:
            answer = failure(InternalError(f"the host gives no process: {error.strerror}"))
        finally:
            for fd in fds:
                os.close(fd)
        peer.send(answer | {"id": message.get("id")})

    def _boot_files(self, spec: GuestSpec) -> BootFiles:
        """Return the files of a spec's image, read once for all VMs that start from the same ones, with the plan for
        this one: what is done before the fork, its process has in common with others.
        """
        machine = spec.machine()
        mark = tuple(_mark(path) for path in machine.file_names())
        known = self._files.pop(mark, None)
        files = machine.boot_files(known)
        if known is None and len(self._files) >= MOST_IMAGES:
            del self._files[next(iter(self._files))]
        if files is not known:
            self._settle()
        self._files[mark] = files
        return files

    def _fork(self, spec: GuestSpec, files: BootFiles, message: Message, fds: list[int]) -> int:
        pid = os.fork()
        if pid == 0:
            self._become(spec, files, message, fds)
        return pid

    def _become(self, spec: GuestSpec, files: BootFiles, message: Message, fds: list[int]) -> NoReturn:
        listener, log, *sharer = fds[: len(fds) - _cables(message)]
        status = 1
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._loop.close()
            self._peer.connection.close()
            # What came along for the next VM is not this one's.
            self._peer.let_go()
            os.dup2(log, 1)
            os.dup2(log, 2)
            own = socket.socket(fileno=os.dup(listener))
            os.close(listener)
            with contextlib.suppress(OSError):
                Path("/proc/self/comm").write_text(f"rz {spec.name}")
            place = Place(
                spec,
                own,
                log,
                (sharer[0], sharer[1]) if sharer else None,
                message.get("swap_folder"),
                int(message.get("swap_bytes", 0)),
                tuple(fds[len(fds) - _cables(message) :]),
            )
            status = run_vm(place, files)
        finally:
            os._exit(status)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._peer.send({"event": "gone", "pid": pid, "status": status})


def _cables(message: Message) -> int:
    """Return how many descriptors of cables a request ends with."""
    count = message.get("cables", 0)
    if type(count) is not int or count < 0:
        raise InternalError(f"there cannot be {count!r:.20} cables")
    return count


def _mark(path: Path | None) -> tuple[str, int, int, int] | None:
    """Return what tells a file from another of its name."""
    if path is None:
        return None
    try:
        facts = path.stat()
    except OSError:
        return (str(path), 0, 0, 0)
    return (str(path), facts.st_ino, facts.st_size, facts.st_mtime_ns)


def main() -> None:
    """Be the fork server of whoever holds the other end of the descriptor that the first argument names."""
    # Loaded here so that no child has to.
    import traceback  # noqa: F401

    import ringzero._core
    import ringzero.devices
    import ringzero.images.debian
    import ringzero.machine.boot.unpacked
    import ringzero.machine.disk_image
    import ringzero.machine.exec  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ForkServer(socket.socket(fileno=int(sys.argv[1]))).run()
    # Not sys.exit: the interpreter's end would wait for nothing that we have, and take its time.
    os._exit(0)


if __name__ == "__main__":
    main()
