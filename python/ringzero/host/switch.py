"""The switch: the process of a user that joins network cards of machines in different processes.

It listens at a socket of its own, on which daemons and machines say (in the messages of ringzero.host.wire)

    join       tenant, switch, card (its address in hexadecimal digits), and the switch's end of a pair of sockets that
               keep messages apart
    report     -> switches: [tenant, switch, card, counters] of every card

A switch is known by its tenant and its name: two tenants never have the same one. Each is a thread of the core
(`_core.HostSwitch`), which needs nobody's word to go on. The process ends when nobody is plugged in or connected. It
opens no files once it has begun, and is jailed as those are whose frames it carries.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping

from ringzero import _core
from ringzero.errors import InputError, RingzeroError
from ringzero.host.loop import READ, Loop
from ringzero.host.wire import Message, Peer, accept_own, failure

__all__ = ["SwitchProcess", "main"]

PATIENCE = 5.0
"""Seconds between two looks whether anybody is left, while nobody is connected."""
MOST_SWITCHES = 256
_LONGEST_NAME = 200


class SwitchProcess:
    """What this process has: switches by tenant and name, a loop, and who asks."""

    def __init__(self, listener: socket.socket) -> None:
        """Serve whoever connects to `listener` and is of our user."""
        self._switches: dict[tuple[str, str], _core.HostSwitch] = {}
        self._loop = Loop()
        self._listener = listener
        self._peers: set[Peer] = set()
        listener.setblocking(False)
        self._loop.watch(listener, READ, self._accept)
        self._loop.call_later(PATIENCE, self._look)

    def run(self) -> None:
        """Serve until nobody is left to serve."""
        self._loop.run()

    def _look(self) -> None:
        if self._peers:
            return
        self._drop_empty()
        if self._switches:
            self._loop.call_later(PATIENCE, self._look)
        else:
            self._loop.stop()

    def _drop_empty(self) -> None:
        for key, switch in list(self._switches.items()):
            if not switch.report():
                del self._switches[key]

    def _accept(self, _: int) -> None:
        if (connection := accept_own(self._listener)) is not None:
            self._peers.add(Peer(self._loop, connection, self._received, self._gone))

    def _gone(self, peer: Peer, _why: str) -> None:
        self._peers.discard(peer)
        if not self._peers:
            self._loop.call_later(PATIENCE, self._look)

    def _received(self, peer: Peer, message: Message, fds: list[int]) -> None:
        requests: Mapping[str, Callable[[Message, list[int]], Message]] = {
            "join": self._join,
            "report": self._report,
        }
        try:
            what = requests.get(str(message.get("do")))
            if what is None:
                raise InputError(f"the switch does not know {message.get('do')!r:.40}")
            answer = what(message, fds)
        except RingzeroError as error:
            answer = failure(error)
        except _core.CoreError as error:
            answer = failure(InputError(str(error)))
        finally:
            for fd in fds:
                os.close(fd)
        peer.send({"ok": True, "id": message.get("id"), "pid": os.getpid()} | answer)

    def _join(self, message: Message, fds: list[int]) -> Message:
        tenant, name, card = message.get("tenant"), message.get("switch"), message.get("card")
        for word in (tenant, name, card):
            if not isinstance(word, str) or not 0 < len(word) <= _LONGEST_NAME:
                raise InputError(f"a tenant, a switch or a card cannot be called {word!r:.80}")
        assert isinstance(tenant, str) and isinstance(name, str) and isinstance(card, str)
        try:
            address = bytes.fromhex(card)
        except ValueError:
            raise InputError(f"{card!r:.80} is not the address of a card") from None
        if len(fds) != 1:
            raise InputError("a card is plugged in with one socket")
        switch = self._switches.get((tenant, name))
        if switch is None:
            self._drop_empty()
            if len(self._switches) >= MOST_SWITCHES:
                raise InputError(f"there are {MOST_SWITCHES} switches already: use one of them")
            switch = _core.HostSwitch()
        switch.plug_in(address, fds[0])
        self._switches[tenant, name] = switch
        return {}

    def _report(self, _message: Message, _fds: list[int]) -> Message:
        return {
            "switches": [
                [tenant, name, card.hex(), counters]
                for (tenant, name), switch in self._switches.items()
                for card, counters in switch.report().items()
            ]
        }


def main() -> None:
    """Be the switch, listening at the socket whose descriptor the first argument is."""
    import traceback  # noqa: F401  no module can be loaded in the jail

    os.umask(0o077)
    # Whoever started us may be interrupted; the machines are not.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    process = SwitchProcess(socket.socket(fileno=int(sys.argv[1])))
    try:
        _core.enter_jail()
    except _core.CoreError as error:
        print(f"the switch is not jailed: {error}", file=sys.stderr, flush=True)
    process.run()
    # Not sys.exit: the interpreter's end would load what the jail keeps from it.
    os._exit(0)


if __name__ == "__main__":
    main()
