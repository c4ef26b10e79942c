"""The sharer: the process of a host that counts the shared pages of its VMs.

It listens at a socket of its own, on which a daemon says (in the messages of ringzero.host.wire)

    join       group, vm, pages, perhaps pool, and the sharer's end of a pair of stream sockets
               -> pool: [device, inode], and a descriptor of it to read unless only VMs have it so far
    recovered  all VMs that had shared pages of an earlier sharer have joined, or are gone
    report     -> groups: counts by name; sentences: what has happened since the last report
    audit      -> findings: what is not as it must be
    stop

The work is done by a thread of the core (`_core.Sharer`), which talks to the VMs. It needs no daemon for that: when one
goes away, this process serves the VMs until the last of them has gone, and takes the next daemon's word meanwhile.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping

from ringzero import _core
from ringzero.errors import InputError, InternalError, RingzeroError
from ringzero.host.loop import READ, Loop
from ringzero.host.wire import Message, Peer, accept_own, failure

__all__ = ["SharerProcess", "main"]

PATIENCE = 60.0
"""Seconds between two looks whether any VM is left, while there is no daemon."""
_LONGEST_NAME = 200


class SharerProcess:
    """What this process has: the core's sharer, a loop, and who asks."""

    def __init__(self, listener: socket.socket) -> None:
        """Serve whoever connects to `listener` and is of our user."""
        self._sharer = _core.Sharer()
        self._loop = Loop()
        self._listener = listener
        self._peers: set[Peer] = set()
        listener.setblocking(False)
        self._loop.watch(listener, READ, self._accept)
        self._loop.call_later(PATIENCE, self._look)

    def run(self) -> None:
        """Serve until told to stop, or until nobody is left to serve."""
        self._loop.run()

    def _look(self) -> None:
        """End when there is neither a daemon nor a VM."""
        if self._peers:
            return
        groups, _ = self._sharer.report()
        if groups:
            self._loop.call_later(PATIENCE, self._look)
        else:
            self._loop.stop()

    def _accept(self, _: int) -> None:
        if (connection := accept_own(self._listener)) is not None:
            self._peers.add(Peer(self._loop, connection, self._received, self._gone))

    def _gone(self, peer: Peer, _why: str) -> None:
        self._peers.discard(peer)
        if not self._peers:
            self._loop.call_later(PATIENCE, self._look)

    def _received(self, peer: Peer, message: Message, fds: list[int]) -> None:
        requests: Mapping[str, Callable[[Message, list[int]], tuple[Message, list[int]]]] = {
            "join": self._join,
            "recovered": self._recovered,
            "report": self._report,
            "audit": self._audit,
            "stop": self._stop,
        }
        answer: Message
        back: list[int] = []
        try:
            what = requests.get(str(message.get("do")))
            if what is None:
                raise InputError(f"the sharer does not know {message.get('do')!r:.40}")
            answer, back = what(message, fds)
        except RingzeroError as error:
            answer = failure(error)
        except _core.CoreError as error:
            answer = failure(InternalError(str(error)))
        finally:
            for fd in fds:
                os.close(fd)
        peer.send({"ok": True, "id": message.get("id")} | answer, back)
        for fd in back:
            os.close(fd)

    def _join(self, message: Message, fds: list[int]) -> tuple[Message, list[int]]:
        group, vm, pages = message.get("group"), message.get("vm"), message.get("pages")
        for name in (group, vm):
            if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
                raise InputError(f"a vm or a sharing group cannot be called {name!r:.80}")
        assert isinstance(group, str) and isinstance(vm, str)
        if type(pages) is not int or not 0 < pages < 1 << 40:
            raise InputError(f"a vm cannot have {pages!r:.40} pages")
        if len(fds) != 1:
            raise InputError("a vm joins with one socket")
        pool, identity = self._sharer.join(group, vm, fds[0], pages, _identity(message.get("pool")))
        return {"pool": list(identity)}, [] if pool is None else [pool]

    def _recovered(self, _message: Message, _fds: list[int]) -> tuple[Message, list[int]]:
        self._sharer.recovered()
        return {}, []

    def _report(self, _message: Message, _fds: list[int]) -> tuple[Message, list[int]]:
        groups, sentences = self._sharer.report()
        return {"groups": groups, "sentences": sentences}, []

    def _audit(self, _message: Message, _fds: list[int]) -> tuple[Message, list[int]]:
        return {"findings": self._sharer.audit()}, []

    def _stop(self, _message: Message, _fds: list[int]) -> tuple[Message, list[int]]:
        self._loop.call_later(0.0, self._loop.stop)
        return {}, []


def _identity(pool: object) -> tuple[int, int] | None:
    """Return which file a message names as a pool."""
    match pool:
        case None:
            return None
        case [int(device), int(inode)] if 0 <= device < 1 << 64 and 0 <= inode < 1 << 64:
            return device, inode
        case _:
            raise InputError(f"a pool is a device and an inode, not {pool!r:.40}")


def main() -> None:
    """Be the sharer, listening at the socket whose descriptor the first argument is."""
    os.umask(0o077)
    # Whoever started us may be interrupted; the VMs are not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    SharerProcess(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
