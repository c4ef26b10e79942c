"""The VMs of a daemon and the switch: who is joined before it starts, and again when the switch has come back."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

from ringzero.host.guest import Guest
from ringzero.host.loop import Loop
from ringzero.host.runtime import Runtime
from ringzero.host.spec import GuestSpec
from ringzero.host.switches import cable, reach
from ringzero.host.wire import Message, Peer

__all__ = ["Switching"]

PAUSE = 1.0
"""Seconds after which another switch is tried when the host had no process for it."""

Tell = Callable[[str, str | None, str], None]
Joined = Callable[[list[int], str | None], None]
"""Told of a descriptor for each card that is on a switch, which are the callee's; or why it cannot be."""


class Switching:
    """Plugs cards of VMs into the switch. Its process is looked for when the first VM needs it."""

    def __init__(self, loop: Loop, runtime: Runtime, guests: dict[str, Guest], tell: Tell) -> None:
        self.pid: int | None = None
        """The switch's process, once it has answered."""
        self.losses = 0
        """How often the switch has ended."""
        self._loop = loop
        self._runtime = runtime
        self._guests = guests
        self._tell = tell
        self._peer: Peer | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, Callable[[Message], None]] = {}
        self._is_closing = False

    def start(self) -> None:
        """Find the switch of the VMs that there are already: who is not plugged in any more is plugged in again."""
        if self._plugged():
            self._come_back()

    def close(self) -> None:
        """Let the switch go; it goes on as long as anybody is plugged in."""
        self._is_closing = True
        if self._peer is not None:
            self._peer.close()

    def join(self, spec: GuestSpec, joined: Joined) -> None:
        """Plug in all cards of a VM that are on switches, before it starts."""
        self._join_next(spec, spec.switched(), [], joined)

    def look_after(self, guest: Guest, losses: int) -> None:
        """Plug a VM in again that has started, if the switch has ended since it was joined, at `losses`."""
        if self.losses != losses and guest.spec.switched():
            self._come_back()

    def report(self, answered: Callable[[Message], None]) -> None:
        """Ask for the counters of all cards."""
        if self._peer is None:
            answered({"switches": []})
        else:
            self._ask("report", {}, [], answered)

    def _join_next(
        self, spec: GuestSpec, rest: list[tuple[int, str, bytes]], fds: list[int], joined: Joined
    ) -> None:
        if not rest:
            joined(fds, None)
            return
        (_, switch, mac), *others = rest
        ours, theirs = cable()

        def answered(answer: Message) -> None:
            if "error" in answer:
                for fd in [ours.detach(), *fds]:
                    os.close(fd)
                joined([], str(answer["error"]))
            else:
                self._join_next(spec, others, [*fds, ours.detach()], joined)

        with theirs:
            self._ask(
                "join",
                {"tenant": spec.group, "switch": switch, "card": mac.hex()},
                [theirs.fileno()],
                answered,
            )

    def _ask(self, do: str, fields: Message, fds: list[int], answered: Callable[[Message], None]) -> None:
        if self._peer is None:
            try:
                self._peer = Peer(self._loop, reach(self._runtime), self._received, self._closed)
            except OSError as error:
                answered({"error": f"the switch cannot be started: {error}", "status": 1})
                return
        number = next(self._numbers)
        self._asked[number] = answered
        self._peer.send({"do": do, "id": number} | fields, fds)

    def _received(self, _peer: Peer, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        self.pid = message.get("pid", self.pid)
        if (answered := self._asked.pop(message.get("id", 0), None)) is not None:
            answered(message)

    def _closed(self, _peer: Peer, _why: str) -> None:
        self._peer, self.pid = None, None
        self.losses += 1
        asked, self._asked = self._asked, {}
        for answered in asked.values():
            answered({"error": "the switch ended before it had answered", "status": 1})
        if not self._is_closing and self._plugged():
            self._tell("switch", None, "the switch has ended: the vms are plugged into another one")
            self._come_back()

    def _plugged(self) -> list[Guest]:
        return [guest for guest in self._guests.values() if guest.is_alive and guest.spec.switched()]

    def _come_back(self) -> None:
        """Plug in whoever is not, in a switch that was there or is new."""
        if self._is_closing:
            return

        def reported(answer: Message) -> None:
            rows = answer.get("switches")
            if not isinstance(rows, list):  # it is gone again, or there is none
                self._loop.call_later(PAUSE, self._come_back)
                return
            known = {(tenant, switch, card) for tenant, switch, card, _ in rows}
            for guest in self._plugged():
                for number, switch, mac in guest.spec.switched():
                    if (guest.spec.group, switch, mac.hex()) not in known:
                        self._plug(guest, number, switch, mac)

        self._ask("report", {}, [], reported)

    def _plug(self, guest: Guest, number: int, switch: str, mac: bytes) -> None:
        def joined(fds: list[int], why: str | None) -> None:
            if why is not None:
                self._tell("switch", guest.name, f"vm {guest.name!r} is not on the switch {switch!r}: {why}")
                return
            guest.ask("plug", lambda _: None, fds, card=number)
            for fd in fds:
                os.close(fd)

        self._join_next(guest.spec, [(number, switch, mac)], [], joined)
