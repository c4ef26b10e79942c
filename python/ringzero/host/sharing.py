"""The VMs of a daemon and their sharer: who joins it before it starts, and who joins the next one."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path

from ringzero.host.guest import Guest
from ringzero.host.loop import Loop
from ringzero.host.sharer_link import Pool, SharerLink
from ringzero.host.spec import GuestSpec
from ringzero.host.wire import Message
from ringzero.policy import PAGE

__all__ = ["Sharing"]

Tell = Callable[[str, str | None, str], None]


class Sharing:
    """Joins VMs to the sharer, and knows what the pools take."""

    def __init__(self, loop: Loop, path: Path, guests: dict[str, Guest], tell: Tell) -> None:
        self.pages = 0
        """Machine pages of all pools that are in use."""
        self.uses = 0
        """Guest pages that are one of those."""
        self._guests = guests
        self._tell = tell
        self._returning: set[str] = set()
        """VMs that have not brought their pools to a new sharer yet."""
        self._after: list[Callable[[], None]] = []
        """Who wants to join when they have: a group has its pool from them."""
        self._link = SharerLink(loop, path, self._lost)

    @property
    def pid(self) -> int | None:
        """The sharer's process, when this daemon started it."""
        return self._link.pid

    def start(self) -> None:
        """Find the sharer, or start one, for the VMs that there are already as well. Raises OSError."""
        if not self._link.start():
            self._join_again()

    def close(self) -> None:
        """Let the sharer go; it serves the VMs as long as there are any."""
        if not any(guest.is_alive for guest in self._guests.values()):
            self._link.stop()
        self._link.close()

    def join(self, spec: GuestSpec, joined: Callable[[list[int]], None]) -> None:
        """Have a VM join before it starts; `joined` gets two descriptors for it, its socket and its group's pool.

        They are the callee's to close. There are none when it cannot join: it then shares with nobody.
        """

        def answered(answer: Message, fds: list[int]) -> None:
            if len(fds) != 2:
                self._tell("sharing", spec.name, f"vm {spec.name!r} shares no pages: {answer.get('error')}")
                for fd in fds:
                    os.close(fd)
                fds = []
            joined(fds)

        def join() -> None:
            self._link.join(spec.group, spec.name, spec.memory // PAGE, None, answered)

        if self._returning:
            self._after.append(join)
        else:
            join()

    def look(self) -> None:
        """Ask the sharer what its pools take, and what has happened."""

        def answered(answer: Message) -> None:
            groups = answer.get("groups")
            if isinstance(groups, dict):
                self.pages = sum(int(group.get("shared_pages", 0)) for group in groups.values())
                self.uses = sum(int(group.get("uses", 0)) for group in groups.values())
            for sentence in answer.get("sentences", []):
                self._tell("sharing", None, str(sentence))

        self._link.report(answered)

    def audit(self, answered: Callable[[list[str]], None]) -> None:
        """Compare pools, tables, and what VMs use."""
        self._link.audit(
            lambda answer: answered([str(one) for one in answer.get("findings", [answer.get("error")])])
        )

    def _lost(self) -> None:
        self._tell(
            "sharing", None, "the sharer has ended: the vms join another one, with the pages that they share"
        )
        self._join_again()

    def _join_again(self) -> None:
        """Have every VM that has a pool bring it to the new sharer; the last one of them says that all have."""
        self._returning = {guest.name for guest in self._guests.values() if guest.is_alive}
        for guest in list(self._guests.values()):
            if guest.is_alive:
                self._bring(guest, functools.partial(self._returned, guest.name))
        self._look_whether_all_have()

    def _returned(self, name: str) -> None:
        if name in self._returning:
            self._returning.discard(name)
            self._look_whether_all_have()

    def _look_whether_all_have(self) -> None:
        if not self._returning:
            self._link.recovered()
            after, self._after = self._after, []
            for join in after:
                join()

    def _bring(self, guest: Guest, done: Callable[[], None]) -> None:
        def described(answer: Message) -> None:
            pool = _pool(answer.get("pool"))
            if pool is None:  # it has none, or has ended
                done()
            else:
                self._link.join(guest.spec.group, guest.name, guest.spec.memory // PAGE, pool, joined)

        def joined(answer: Message, fds: list[int]) -> None:
            if not fds:
                self._tell(
                    "sharing", guest.name, f"vm {guest.name!r} shares no more pages: {answer.get('error')}"
                )
                done()
                return
            with contextlib.ExitStack() as stack:
                for fd in fds:
                    stack.callback(os.close, fd)
                guest.ask("attach", attached, fds[:1])

        def attached(answer: Message) -> None:
            if "error" in answer and guest.is_alive:
                self._tell(
                    "sharing", guest.name, f"vm {guest.name!r} shares no more pages: {answer['error']}"
                )
            done()

        guest.ask("describe", described)


def _pool(value: object) -> Pool | None:
    match value:
        case [int(device), int(inode)]:
            return device, inode
        case _:
            return None
