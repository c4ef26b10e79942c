"""The process of one VM: the guest, its console, and a control socket. It depends on no other process.

One thread of Python, which sleeps unless somebody asks for something. On the control socket everybody who may open it
(the operator: the runtime folder is his alone) can ask, the daemon and `ringzero host console` alike:

    describe     the spec, and how it goes: booting, ready, ended
    memory       pages by state; with "orders" those of the arbiter, with "sample" the end of a sampling period
    states       the state of every page
    audit        what of the memory's invariants does not hold
    attach       join another sharer, at the other end of the socket that comes along
    plug         plug the card of that number into another switch, with the cable that comes along
    console      from here on the connection is the guest's console, both ways; first comes what it last printed
    agent        from here on the connection is a line to the guest's agent, as its serial port is (frame.h)
    power_off    ask the guest to power itself off
    stop         end it, as if its plug were pulled

Whoever is connected is told the end, {"event": "ended", "reason": ...}, and it is the last line of the VM's log, too:
so it is known even if nobody was there.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ringzero.errors import InputError, InternalError, RingzeroError
from ringzero.host.agent_relay import AgentRelay
from ringzero.host.folders import served_elsewhere
from ringzero.host.loop import READ, WRITE, Loop, Timer
from ringzero.host.spec import GuestSpec
from ringzero.host.vm_memory import GuestMemory
from ringzero.host.vm_orders import Orders
from ringzero.host.vm_squeeze import Squeeze
from ringzero.host.wire import Message, Peer, failure
from ringzero.machine.assemble import BootFiles
from ringzero.machine.exec import AgentLink
from ringzero.machine.machine import (
    CONSOLE_PORT,
    PANIC_END,
    PANIC_LINE,
    PANIC_SILENCE,
    core_errors,
)
from ringzero.machine.network import Network

__all__ = ["Place", "VmProcess", "run_vm"]

SCROLLBACK = 64 << 10
"""Bytes of the console's last output that are kept for who attaches."""
SETTLED, TRIM_PERIOD = 6.0, 20.0
"""Seconds from when a guest has booted until what that took is given back (the translator drops its own part of it
after 1.5 s of quiet), and from then on until it is looked after again: a millisecond's work."""
DISK_PERIOD = 2.0
"""Seconds between two looks at the disks."""
_PIECE = 64 << 10
_MOST_WAITING = 1 << 20
"""Bytes for a console that does not read: older ones are lost to it."""
_END_PATIENCE = 10.0
_LAST_WORDS = 256
"""Bytes: longer than the line that ends a kernel's panic."""


@dataclass(frozen=True)
class Place:
    """What a VM's process is given: by the daemon, through the fork server."""

    spec: GuestSpec
    listener: socket.socket
    """Its control socket."""
    log: int
    """A descriptor: what it has to say, and how it ended."""
    sharer: tuple[int, int] | None = None
    """Descriptors of its socket to the sharer, and of its group's pool; they are closed once it has joined."""
    swap_folder: str | None = None
    swap_bytes: int = 0
    """For a file without a name, of pages that memory has no place for."""
    cables: tuple[int, ...] = ()
    """Descriptors: of the cards that are on switches, in their order. They are closed once they are plugged in."""


class _Cables:
    """What a VM's cards are joined by: its daemon has done it, and does it again."""

    def __init__(self, fds: tuple[int, ...]) -> None:
        self._fds = list(fds)

    def join(self, network: Network, _mac: bytes) -> socket.socket:
        if not self._fds:
            raise InternalError(f"nobody has plugged this vm into the switch {network.switch!r}")
        return socket.socket(fileno=self._fds.pop(0))

    def keep(self, *_: object) -> None:
        pass


class _Console:
    """The guest's console line, and everybody who is attached to it."""

    def __init__(
        self, loop: Loop, line: socket.socket, printed: Callable[[], None], ended: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._line = line
        self._printed = printed
        self._ended = ended
        self._typed = bytearray()
        self._attached: dict[socket.socket, bytearray] = {}
        self.last = bytearray()
        line.setblocking(False)
        loop.watch(line, READ, self._line_ready)

    def attach(self, connection: socket.socket, typed: bytes) -> None:
        connection.setblocking(False)
        self._attached[connection] = bytearray(self.last)
        self._typed += typed
        self._flush(connection)
        self._type()

    def close(self) -> None:
        """Give what was printed last to those who read, and end their connections."""
        for connection in list(self._attached):
            with contextlib.suppress(OSError):
                connection.settimeout(1.0)
                connection.sendall(self._attached[connection])
            self._detach(connection)
        self._line.close()

    def _line_ready(self, events: int) -> None:
        if events & WRITE:
            self._type()
        if not events & READ:
            return
        try:
            data = self._line.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.forget(self._line)
            self._ended()
            return
        self.last += data
        if len(self.last) > 2 * SCROLLBACK:
            del self.last[:-SCROLLBACK]
        self._printed()
        for connection, waiting in list(self._attached.items()):
            waiting += data
            if len(waiting) > _MOST_WAITING:
                del waiting[: -_MOST_WAITING // 2]
            self._flush(connection)

    def _flush(self, connection: socket.socket) -> None:
        waiting = self._attached[connection]
        try:
            while waiting:
                del waiting[: connection.send(waiting, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:
            self._detach(connection)
            return
        # Who types faster than the guest reads is read again when that has caught up.
        events = (WRITE if waiting else 0) | (READ if len(self._typed) < _PIECE else 0)
        if events:
            self._loop.watch(connection, events, lambda now: self._peer_ready(connection, now))
        else:
            self._loop.forget(connection)

    def _peer_ready(self, connection: socket.socket, events: int) -> None:
        if events & READ:
            try:
                data = connection.recv(_PIECE)
            except BlockingIOError:
                data = None
            except OSError:
                data = b""
            if data == b"":
                self._detach(connection)
                return
            if data:
                self._typed += data
                self._type()
        self._flush(connection)

    def _type(self) -> None:
        was_full = len(self._typed) >= _PIECE
        try:
            while self._typed:
                del self._typed[: self._line.send(self._typed, socket.MSG_NOSIGNAL)]
        except BlockingIOError:
            pass
        except OSError:  # the guest has ended; the reading side tells
            self._typed.clear()
        if self._line.fileno() >= 0:
            self._loop.watch(self._line, READ | (WRITE if self._typed else 0), self._line_ready)
        if was_full and len(self._typed) < _PIECE:
            for connection in list(self._attached):
                self._flush(connection)

    def _detach(self, connection: socket.socket) -> None:
        self._loop.forget(connection)
        self._attached.pop(connection, None)
        connection.close()


class VmProcess:
    """A VM with its loop. `run` returns why the guest ended."""

    def __init__(self, place: Place, files: BootFiles | None = None) -> None:
        """Put the machine together. Raises RingzeroError when it cannot be."""
        self.spec = spec = place.spec
        self._began = time.time()
        try:
            # Before this process has threads.
            folders = served_elsewhere(spec.mounts, spec.name)
        except OSError as error:
            raise InternalError(f"the host gives no process for a folder: {error.strerror}") from error
        self._machine = machine = replace(spec, mounts=tuple(folders)).machine(_Cables(place.cables))
        self._vm = machine.assembled(files)
        for folder in folders:
            assert folder.server is not None
            os.close(folder.server)
        self._leads_out = machine.networks.leads_out
        self._memory = GuestMemory(self._vm, spec.memory)
        with core_errors():
            self._memory.use_swap(place.swap_folder, place.swap_bytes)
            if place.sharer is not None:
                self._memory.attach_sharer(*place.sharer)
                for fd in place.sharer:
                    os.close(fd)
        self._loop = Loop()
        self._orders = Orders(self._loop, self._vm, self._memory)
        self._peers: set[Peer] = set()
        self._listener = place.listener
        self._console = _Console(self._loop, _line(self._vm, CONSOLE_PORT), self._printed, self._line_ended)
        self._agent_lines = machine.agent_lines(self._vm)
        self._agent: AgentLink | None = None
        self._ready = False
        self._jail: list[str] = []
        self._reason: str | None = None
        self._silence: Timer | None = None
        self._troubles: list[str] = []

    def run(self) -> str:
        """Run the guest to its end and return the reason."""
        if self._agent_lines is not None and (line := self._agent_lines.present) is not None:
            # The agent's first words say that the guest has booted. Nobody reads them until it is needed.
            self._loop.watch(line, READ, lambda _: self._agent_speaks(line))
        # Again, although it listens already: so the socket tells who asks that it is this process.
        self._listener.listen(64)
        self._loop.watch(self._listener, READ, self._accept)
        self._loop.accept_posts()
        if self._machine.metadata is not None:
            self._loop.watch(self._machine.metadata.fileno(), READ, self._tell_guest)
        # All that it needs is open. From here on it is the guest's, should that break out.
        from ringzero import _core

        try:
            _core.enter_jail(network=self._leads_out)
            self._jail = ["no new privileges", "seccomp"]
        except _core.CoreError as error:
            print(f"the vm is not jailed: {error}", file=sys.stderr, flush=True)
        self._vm.start()
        if any(not disk.read_only for disk in self._machine.disks):
            self._mind_disks()
        # Without our agent nobody says that the guest has booted.
        self._ready = self._agent_lines is None
        self._loop.run()
        assert self._reason is not None
        return self._reason

    def finish(self) -> None:
        """Tell everybody who is connected how it ended."""
        for peer in list(self._peers):
            peer.connection.settimeout(1.0)
            with contextlib.suppress(OSError):
                peer.connection.sendall(
                    json.dumps({"event": "ended", "reason": self._reason}).encode() + b"\n"
                )
            peer.close()
        self._console.close()
        self._listener.close()

    # --- the guest

    def _agent_speaks(self, line: socket.socket) -> None:
        self._loop.forget(line)
        self._ready = True
        self._tell({"event": "ready"})
        Squeeze(self._loop, self._memory).begin()
        self._loop.call_later(SETTLED, self._trim)

    def _mind_disks(self) -> None:
        """A guest whose disk could not be written is paused: say so, and try whether it can go on."""
        troubles = self._machine.disk_troubles()
        if troubles != self._troubles:
            self._troubles = troubles
            words = (
                f"{'; '.join(troubles)}: it is paused until that is put right" if troubles else "it goes on"
            )
            self._tell({"event": "trouble", "text": words})
        if troubles:
            with core_errors():
                self._machine.retry_disks()
                # Unless the arbiter wants it paused, too: then it goes on when that does.
                self._orders.resume()
        self._loop.call_later(DISK_PERIOD, self._mind_disks)

    def _tell_guest(self, _: int) -> None:
        """The guest asks about itself."""
        if self._machine.metadata is not None and not self._machine.metadata.work():
            self._loop.forget(self._machine.metadata.fileno())

    def _trim(self) -> None:
        """Give back what was needed to boot, and from then on what is not needed any more, now and then."""
        self._memory.trim()
        self._loop.call_later(TRIM_PERIOD, self._trim)

    def _printed(self) -> None:
        """A kernel that stands still for ever after a panic says so last: it is ended when it stays silent."""
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if PANIC_END.search(bytes(self._console.last[-_LAST_WORDS:])):
            self._silence = self._loop.call_later(PANIC_SILENCE, lambda: self._vm.request_end("panic"))

    def _line_ended(self) -> None:
        """The console is at its end, and so is the guest."""
        reason = self._vm.wait(_END_PATIENCE) or "error: the guest did not end"
        panicked = PANIC_LINE.findall(self._console.last)
        if reason == "reboot" and panicked:
            reason = "panic"
        if reason == "panic" and panicked:
            reason = f"panic: {panicked[-1].decode('utf-8', 'replace')}"
        self._reason = reason
        self._loop.stop()

    # --- who asks

    def _accept(self, _: int) -> None:
        with contextlib.suppress(OSError):
            connection, _address = self._listener.accept()
            self._peers.add(Peer(self._loop, connection, self._received, self._closed))

    def _closed(self, peer: Peer, _why: str) -> None:
        self._peers.discard(peer)

    def _tell(self, event: Message) -> None:
        for peer in list(self._peers):
            peer.send(event)

    def _received(self, peer: Peer, message: Message, fds: list[int]) -> None:
        requests: Mapping[str, Callable[[Peer, Message, list[int]], Message | None]] = {
            "describe": self._describe,
            "memory": self._describe_memory,
            "states": self._states,
            "audit": self._audit,
            "attach": self._attach_sharer,
            "plug": self._plug,
            "console": self._attach,
            "agent": self._relay,
            "power_off": self._power_off,
            "stop": self._stop,
        }
        answer: Message | None
        try:
            what = requests.get(str(message.get("do")))
            if what is None:
                raise InputError(f"a vm's process does not know {message.get('do')!r:.40}")
            answer = what(peer, message, fds)
        except RingzeroError as error:
            answer = failure(error)
        except Exception as error:  # a defect of ours must not take the guest with it
            answer = failure(InternalError(f"{type(error).__name__}: {error}"))
        finally:
            for fd in fds:
                os.close(fd)
        if answer is not None:
            peer.send(answer | {"id": message.get("id")})

    def _describe(self, *_: Any) -> Message:
        return {
            "ok": True,
            "spec": self.spec.as_json(),
            "ready": self._ready,
            "began": self._began,
            "pool": self._memory.pool(),
            "jail": self._jail,
        }

    def _describe_memory(self, _peer: Peer, message: Message, _: list[int]) -> Message:
        orders, sample = message.get("orders"), message.get("sample")
        if orders is not None:
            if not isinstance(orders, dict):
                raise InputError("orders are an object")
            self._orders.take(orders)
        answer: Message = {
            "ok": True,
            "counts": self._memory.counts(),
            "balloon": self._memory.balloon_facts(),
            "swap": self._memory.swap_facts(),
            "done": self._orders.totals,
            "full": self._orders.full,
        }
        if sample is not None:
            if type(sample) is not int or not 0 < sample <= 10_000:
                raise InputError(f"{sample!r:.40} pages cannot be sampled")
            answer["sampled"] = self._memory.sample(sample)
        return answer

    def _states(self, *_: Any) -> Message:
        return {"ok": True, "states": base64.b64encode(zlib.compress(self._memory.states(), 1)).decode()}

    def _audit(self, *_: Any) -> Message:
        return {"ok": True, "faults": self._memory.audit()}

    def _attach_sharer(self, _peer: Peer, _message: Message, fds: list[int]) -> Message:
        if len(fds) != 1:
            raise InputError("a sharer is at the other end of one socket")
        with core_errors():
            self._memory.attach_sharer(fds[0])
        return {"ok": True}

    def _plug(self, _peer: Peer, message: Message, fds: list[int]) -> Message:
        number, cards = message.get("card"), self._machine.networks.cards
        if len(fds) != 1 or type(number) is not int or not 0 <= number < len(cards):
            raise InputError("a cable is for one card")
        with core_errors():
            cards[number].plug_into(fds[0])
        return {"ok": True}

    def _attach(self, peer: Peer, message: Message, _: list[int]) -> None:
        peer.send({"ok": True, "id": message.get("id")})
        self._peers.discard(peer)
        self._console.attach(*peer.detach())

    def _link(self) -> AgentLink:
        if self._agent_lines is None:
            raise InputError(
                f"vm {self.spec.name!r} has no agent in it, so it cannot run commands: use its console"
            )
        if not self._ready:
            raise InputError(
                f"vm {self.spec.name!r} has not booted yet, so it cannot run commands: wait until it is ready"
            )
        if self._agent is None:
            self._loop.accept_posts()
            self._agent = AgentLink(self._agent_lines)
        return self._agent

    def _relay(self, peer: Peer, message: Message, _: list[int]) -> None:
        link = self._link()
        peer.send({"ok": True, "id": message.get("id")})
        self._peers.discard(peer)
        AgentRelay(*peer.detach(), link)

    def _power_off(self, *_: Any) -> Message:
        self._link().power_off()
        return {"ok": True}

    def _stop(self, *_: Any) -> Message:
        self._vm.stop()
        return {"ok": True}


def _line(vm: Any, port: int) -> socket.socket:
    return socket.socket(fileno=vm.serial_fd(port))


def run_vm(place: Place, files: BootFiles | None = None) -> int:
    """Be the process of a VM: run it, write how it ended to its log, and return the exit status."""
    gc.disable()
    reason = "error: it did not start"
    status = 1
    try:
        process = VmProcess(place, files)

        def stop(_number: int, _frame: object) -> None:
            process._vm.stop()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        reason = process.run()
        status = 1 if reason.startswith("error") else 0
        process.finish()
    except RingzeroError as error:
        reason = f"error: {error}"
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
        reason = f"error: {type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        sys.stderr.flush()
        os.write(place.log, json.dumps({"ended": reason, "at": time.time()}).encode() + b"\n")
    return status
