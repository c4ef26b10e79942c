"""The way to the switch of a user: found, or started; and `HostSwitches`, by which a machine of any process joins one.

from ringzero.host.switches import HostSwitches

with Machine("debian", net="switch=lan,ip=192.168.7.2/24", switches=HostSwitches()) as vm: ...
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ringzero.errors import InputError, InternalError, RingzeroError
from ringzero.host.runtime import Runtime
from ringzero.host.wire import Channel, connect, listen

if TYPE_CHECKING:
    from ringzero import _core
    from ringzero.machine.network import Network

__all__ = ["DEFAULT_TENANT", "HostSwitches", "cable", "reach"]

DEFAULT_TENANT = "default"
_PATIENCE = 10.0
"""Seconds for an answer of the switch's process, which has to start first, perhaps."""
_PAUSE = 1.0
"""Seconds after which it is tried again when the host had no process for a switch."""
_ATTEMPTS = 3
"""One that is about to end still takes connections."""


@contextlib.contextmanager
def _alone(runtime: Runtime) -> Iterator[None]:
    """Let nobody else start a switch meanwhile."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(runtime.root / "switch.lock", flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def reach(runtime: Runtime) -> socket.socket:
    """Connect to the switch of this user, which is started if it is not there. Raises OSError."""
    with _alone(runtime):
        with contextlib.suppress(OSError):
            return connect(runtime.switch, _PATIENCE)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        log = os.open(runtime.root / "switch.log", flags, 0o600)
        try:
            with listen(runtime.switch) as listener:
                process = subprocess.Popen(
                    [sys.executable, "-m", "ringzero.host.switch", str(listener.fileno())],
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                    cwd="/",
                )
        finally:
            os.close(log)
        # Somebody waits for it, so that it does not stay in the table of processes; its end is seen elsewhere.
        threading.Thread(target=process.wait, name="ringzero-switch", daemon=True).start()
        # It is heard as soon as it looks: the socket listens already.
        return connect(runtime.switch, _PATIENCE)


def cable() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a cable: the card's, and the switch's."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class HostSwitches:
    """Joins cards of machines of this process to the switches of this user, and again when those come back."""

    def __init__(self, tenant: str = DEFAULT_TENANT, runtime: Runtime | None = None) -> None:
        """`tenant` is whose switches they are where a network does not say: a host's VMs are of their share group."""
        self._tenant = tenant
        self._runtime = runtime or Runtime.default()
        self._kept: list[tuple[Network, bytes, weakref.ref[_core.NetworkCard]]] = []
        self._lock = threading.Lock()
        self._watch: socket.socket | None = None
        self._watcher: threading.Thread | None = None
        self._is_closed = False

    def join(self, network: Network, mac: bytes) -> socket.socket:
        """Return the card's end of a cable into the network's switch. Raises InputError: its address is taken."""
        self._runtime.prepare()
        with self._lock:
            if self._watcher is None:
                self._begin_to_watch()
        return self._join(network, mac)

    def keep(self, network: Network, mac: bytes, card: _core.NetworkCard) -> None:
        """Plug a card that was joined in again, whenever the switch has come back, until its machine has ended."""
        with self._lock:
            self._kept = [kept for kept in self._kept if kept[2]() is not None]
            self._kept.append((network, mac, weakref.ref(card)))

    def close(self) -> None:
        """Join nobody again. Machines stay where they are as long as the switch is there."""
        with self._lock:
            self._is_closed = True
            if self._watch is not None:
                with contextlib.suppress(OSError):
                    self._watch.shutdown(socket.SHUT_RDWR)

    def _join(self, network: Network, mac: bytes) -> socket.socket:
        fields = {
            "tenant": network.tenant or self._tenant,
            "switch": network.switch,
            "card": mac.hex(),
        }
        for attempt in range(_ATTEMPTS):
            ours, theirs = cable()
            try:
                with theirs, Channel(reach(self._runtime)) as channel:
                    channel.ask("join", [theirs.fileno()], **fields)
                return ours
            except RingzeroError as error:
                ours.close()
                raise InputError(f"--net switch={network.switch}: {error}") from None
            except OSError as error:
                ours.close()
                if attempt == _ATTEMPTS - 1:
                    raise InternalError(f"the switch of this user cannot be reached: {error}") from error
        raise AssertionError("unreachable")

    def _begin_to_watch(self) -> None:
        try:
            self._watch = reach(self._runtime)
        except OSError as error:
            raise InternalError(f"the switch of this user cannot be reached: {error}") from error
        self._watch.settimeout(None)
        self._watcher = threading.Thread(target=self._see_to_it, name="ringzero-cables", daemon=True)
        self._watcher.start()

    def _see_to_it(self) -> None:
        """Wait for the end of the switch's process, over and over."""
        watch = self._watch
        while watch is not None:
            with watch, contextlib.suppress(OSError):
                while watch.recv(4096):
                    pass
            watch = self._reach_again()
            if watch is not None:
                self._plug_in_again()

    def _reach_again(self) -> socket.socket | None:
        while True:
            with self._lock:
                self._watch = None
                if self._is_closed:
                    return None
                with contextlib.suppress(OSError):
                    self._watch = reach(self._runtime)
                    self._watch.settimeout(None)
                    return self._watch
            time.sleep(_PAUSE)

    def _plug_in_again(self) -> None:
        from ringzero._core import CoreError

        with self._lock:
            kept, self._kept = self._kept, []
        for network, mac, reference in kept:
            card = reference()
            if card is None:
                continue
            try:
                with self._join(network, mac) as socket_:
                    card.plug_into(socket_.fileno())
            except CoreError:  # its machine has ended
                continue
            except RingzeroError as error:
                print(f"ringzero: {error}", file=sys.stderr, flush=True)
            self.keep(network, mac, card)
