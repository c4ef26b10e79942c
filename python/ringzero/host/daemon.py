"""The host daemon: one a user. It starts VMs, watches over them, divides memory between them, and tells who asks.

    python -m ringzero.host.daemon OPTIONS      `ringzero host start` does this; OPTIONS is JSON (DaemonOptions)

No VM needs it: each is a process of its own. A daemon that is killed is started again and finds its VMs by their
sockets. On its own socket everybody who may open it is the operator, and asks in JSON (ringzero.host.wire):

    status, list, metrics, audit, switches, events, up, down, watch, stop
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from ringzero.errors import InputError, InternalError, RingzeroError
from ringzero.host.arbiter import Arbiter
from ringzero.host.fork_link import ForkLink
from ringzero.host.guest import Guest, Phase, last_words
from ringzero.host.loop import READ, Loop
from ringzero.host.memory import HostMemoryView
from ringzero.host.options import DaemonOptions
from ringzero.host.policy import MemoryPolicy, OwnPolicy, load_policy
from ringzero.host.rows import host_row, vm_row
from ringzero.host.runtime import Runtime
from ringzero.host.sharing import Sharing
from ringzero.host.spec import GuestSpec
from ringzero.host.state import State
from ringzero.host.switching import Switching
from ringzero.host.wire import Message, Peer, accept_own, failure, listen

__all__ = ["Daemon", "main"]

MOST_AT_ONCE = 1000
"""VMs in one request."""
BOOT_LIMIT = 30.0
"""Seconds: a guest that has not said by then that it has booted holds no other one up."""
POWER_OFF_LIMIT = 10.0
"""Seconds: a guest that was asked to power off and did not has its plug pulled."""
MOST_ENDED = 500
"""VMs that have ended and are still shown."""


class Daemon:
    """The daemon. Raises InputError where it cannot be."""

    def __init__(self, runtime: Runtime, options: DaemonOptions) -> None:
        self.runtime = runtime
        self.options = options
        self.policy: MemoryPolicy = (
            OwnPolicy() if options.policy is None else load_policy(Path(options.policy))
        )
        self.loop = Loop()
        self.guests: dict[str, Guest] = {}
        self.state = State(runtime.database)
        self.began = time.time()
        self._clients: set[Peer] = set()
        self._watchers: set[Peer] = set()
        self._to_start: deque[Guest] = deque()
        self._booting: set[str] = set()
        self._when: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._boots_at_once = 2 * (os.cpu_count() or 1)
        self.fork = ForkLink(self.loop, self._child_gone, lambda text: self.tell("fork-server", None, text))
        self.memory = HostMemoryView(options.memory, options.swap)
        record = None if options.record is None else Path(options.record)
        self.arbiter = Arbiter(self.loop, self.guests, self.policy, self.memory, self.tell, record)
        self.sharing = Sharing(self.loop, runtime.sharer, self.guests, self.tell)
        self.arbiter.sharing = self.sharing
        self.switching = Switching(self.loop, runtime, self.guests, self.tell)
        self._find_guests()
        self.sharing.start()
        self.switching.start()
        self.fork.start()
        self._listener = listen(runtime.socket)
        self.loop.watch(self._listener, READ, self._accept)

    def run(self) -> None:
        """Serve until `stop` is asked for; VMs go on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.loop.stop())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.loop.wake_on_signals()
        self.tell("daemon", None, f"the daemon began, with {self._living()} vms")
        self.arbiter.begin()
        self.loop.run()
        self.tell("daemon", None, f"the daemon ended; {self._living()} vms go on")
        # Who connects from here on finds nobody, and not one who is about to go.
        with contextlib.suppress(FileNotFoundError):
            self.runtime.socket.unlink()
        self.loop.forget(self._listener)
        self._listener.close()
        self.fork.close()
        self.sharing.close()
        self.switching.close()
        for guest in self.guests.values():
            guest.close()
        self.state.close()

    def _living(self) -> int:
        return sum(guest.is_alive for guest in self.guests.values())

    # --- VMs

    def _find_guests(self) -> None:
        """Find the VMs of an earlier daemon: by their sockets, and in the database."""
        for path in self.runtime.vms.glob("*.sock"):
            with contextlib.suppress(OSError, RingzeroError):
                guest = Guest.adopt(self.loop, self.runtime, path.stem, self._changed)
                self.guests[guest.name] = guest
                continue
            # Nobody is there any more.
            path.unlink(missing_ok=True)
        for known in self.state.vms():
            name = known.spec.name
            if name in self.guests:
                continue
            guest = self.guests[name] = Guest(self.loop, self.runtime, known.spec, self._changed)
            guest.began, guest.phase, guest.ended_at, guest.reason = (
                known.began,
                Phase.ENDED,
                known.ended,
                known.reason,
            )
            if known.reason is None:
                words = last_words(self.runtime.vm_log(name), known.began)
                guest.ended_at = time.time()
                guest.reason = words or "killed: its process ended while there was no daemon"
                self._keep_end(guest)
        lost = [guest.spec for guest in self.guests.values() if guest.is_alive]
        with contextlib.suppress(InputError):
            known_names = {known.spec.name for known in self.state.vms()}
            self.state.add([spec for spec in lost if spec.name not in known_names], time.time())

    def _changed(self, guest: Guest) -> None:
        """A VM's phase has changed, or its process has something to tell."""
        news, guest.news = guest.news, None
        if news is not None:
            self.tell("disk", guest.name, f"vm {guest.name!r}: {news}")
            return
        self._booting.discard(guest.name)
        if guest.phase is Phase.RUNNING:
            seconds = time.time() - guest.began
            self.tell("ready", guest.name, f"vm {guest.name!r} has booted, {seconds:.2f} s after its start")
        elif guest.phase is Phase.ENDED:
            self._keep_end(guest)
            if guest.is_condemned:
                self._forget([guest])
        self.arbiter.hurry()
        self._start_some()
        self._look_at_waiters()

    def _keep_end(self, guest: Guest) -> None:
        self.tell("ended", guest.name, f"vm {guest.name!r} has ended: {guest.reason}")
        with contextlib.suppress(InputError):  # told already; a full disk must not end the daemon
            self.state.ended(guest.name, guest.reason or "")
        ended = [one for one in self.guests.values() if one.phase is Phase.ENDED]
        if len(ended) > MOST_ENDED:
            self._forget(sorted(ended, key=lambda one: one.ended_at or 0.0)[: len(ended) - MOST_ENDED])

    def _forget(self, guests: list[Guest]) -> None:
        for guest in guests:
            self.guests.pop(guest.name, None)
            with contextlib.suppress(OSError):
                self.runtime.vm_log(guest.name).unlink()
        with contextlib.suppress(InputError):
            self.state.forget([guest.name for guest in guests])

    def _child_gone(self, pid: int, status: int) -> None:
        for guest in self.guests.values():
            if guest.pid == pid:
                guest.exit_status = status

    def _start_some(self) -> None:
        """Start VMs that wait, as many at once as boot fastest together."""
        while self._to_start and len(self._booting) < self._boots_at_once:
            guest = self._to_start.popleft()
            if guest.phase is Phase.WAITING:
                self._start(guest)

    def _start(self, guest: Guest) -> None:
        name = guest.name
        self._booting.add(name)
        try:
            listener = listen(self.runtime.control(name))
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            log = os.open(self.runtime.vm_log(name), flags, 0o600)
        except OSError as error:
            guest.end(f"error: its socket or log cannot be made: {error.strerror}")
            return
        guest.began = time.time()

        def answered(answer: Message) -> None:
            if "error" in answer:
                guest.end(f"error: {answer['error']}")
                return
            pid = int(answer["pid"])
            try:
                guest.join(pid)
            except OSError:
                guest.end(last_words(self.runtime.vm_log(name), guest.began) or "error: it ended at once")
                return
            with contextlib.suppress(InputError):
                self.state.started(name, pid)
            self.tell("started", name, f"vm {name!r} is process {pid}")
            self.switching.look_after(guest, losses)
            self.loop.call_later(BOOT_LIMIT, lambda: self._boots_slowly(guest))
            if guest.is_condemned:
                guest.kill()
            self._look_at_waiters()

        def joined(sharer: list[int]) -> None:
            self.switching.join(guest.spec, lambda cables, why: plugged(sharer, cables, why))

        def plugged(sharer: list[int], cables: list[int], why: str | None) -> None:
            if why is None:
                self.fork.fork(
                    guest.spec,
                    [listener.fileno(), log, *sharer, *cables],
                    answered,
                    swap_folder=self.options.swap_folder,
                    swap_bytes=min(self.options.swap, guest.spec.memory),
                    cables=len(cables),
                )
            listener.close()
            for fd in (log, *sharer, *cables):
                os.close(fd)
            if why is not None:
                guest.end(f"error: {why}")

        losses = self.switching.losses
        self.sharing.join(guest.spec, joined)

    def _boots_slowly(self, guest: Guest) -> None:
        if guest.name in self._booting and guest.phase is Phase.BOOTING:
            self._booting.discard(guest.name)
            self._start_some()

    # --- events

    def tell(self, kind: str, vm: str | None, text: str) -> None:
        """Keep an event, and tell everybody who watches."""
        event = self.state.event(kind, vm, text)
        for peer in list(self._watchers):
            peer.send({"event": "event"} | asdict(event))

    def _wait_until(self, condition: Callable[[], bool], then: Callable[[], None]) -> None:
        """Call `then` once `condition` holds; it is looked at whenever a VM's phase changes."""
        if condition():
            then()
        else:
            self._when.append((condition, then))

    def _look_at_waiters(self) -> None:
        waiting, self._when = self._when, []
        for condition, then in waiting:
            self._wait_until(condition, then)

    # --- who asks

    def _accept(self, _: int) -> None:
        if (connection := accept_own(self._listener)) is not None:
            self._clients.add(Peer(self.loop, connection, self._received, self._gone))

    def _gone(self, peer: Peer, _why: str) -> None:
        self._clients.discard(peer)
        self._watchers.discard(peer)

    def _received(self, peer: Peer, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        number = message.get("id")

        def answer(content: Message) -> None:
            peer.send(content | {"id": number})

        requests: Mapping[str, Callable[[Message, Callable[[Message], None]], None]] = {
            "status": self._status,
            "list": self._list,
            "metrics": self._metrics,
            "audit": self._audit_sharing,
            "switches": self._switches,
            "events": self._events,
            "up": self._up,
            "down": self._down,
            "stop": self._stop,
        }
        try:
            if message.get("do") == "watch":
                self._watchers.add(peer)
                answer({"ok": True})
                return
            what = requests.get(str(message.get("do")))
            if what is None:
                raise InputError(f"the daemon does not know {message.get('do')!r:.40}")
            what(message, answer)
        except RingzeroError as error:
            answer(failure(error))
        except Exception as error:  # a defect of ours: who asked is told, and the daemon goes on
            import traceback

            traceback.print_exception(error)
            answer(failure(InternalError(f"the daemon failed: {type(error).__name__}: {error}")))

    def _status(self, _: Message, answer: Callable[[Message], None]) -> None:
        answer(
            {
                "ok": True,
                "pid": os.getpid(),
                "fork_server": self.fork.pid,
                "sharer": self.sharing.pid,
                "switch": self.switching.pid,
                "began": self.began,
                "vms": {phase.value: self._count(phase) for phase in Phase},
                "policy": self.policy.name,
                "memory": self.options.memory,
                "swap": self.options.swap,
                "root": str(self.runtime.root),
            }
        )

    def _count(self, phase: Phase) -> int:
        return sum(guest.phase is phase for guest in self.guests.values())

    def _list(self, message: Message, answer: Callable[[Message], None]) -> None:
        closely = bool(message.get("closely"))
        if closely:
            self.arbiter.freshen()
        vms = [vm_row(guest, closely=closely) for guest in self._named(message, at_least_one=False)]
        answer({"ok": True, "vms": vms, "host": host_row(self.arbiter, self.memory)})

    def _audit_sharing(self, _: Message, answer: Callable[[Message], None]) -> None:
        """What of the sharer's is not as it must be; each VM's process is asked for its own."""
        self.sharing.audit(lambda faults: answer({"ok": True, "faults": faults}))

    def _switches(self, _: Message, answer: Callable[[Message], None]) -> None:
        """The cards that are on switches: tenant, switch, address and counters of each."""
        self.switching.report(lambda reply: answer(reply if "error" in reply else {"ok": True} | reply))

    def _metrics(self, _: Message, answer: Callable[[Message], None]) -> None:
        from ringzero.host.metrics import exposition

        rows = [vm_row(guest, closely=True) for guest in self.guests.values()]
        answer({"ok": True, "text": exposition(host_row(self.arbiter, self.memory), rows)})

    def _named(self, message: Message, *, at_least_one: bool) -> list[Guest]:
        """Return the VMs that a request names: by "names", all of them without."""
        names = message.get("names")
        if names is None:
            if at_least_one and not message.get("all"):
                raise InputError("which vms? Name them, or say --all")
            return list(self.guests.values())
        if not isinstance(names, list):
            raise InputError("names are a list")
        if unknown := [name for name in names if name not in self.guests]:
            raise InputError(f"there is no vm {unknown[0]!r:.80}: `ringzero host list` shows all")
        return [self.guests[name] for name in dict.fromkeys(names)]

    def _events(self, message: Message, answer: Callable[[Message], None]) -> None:
        after = message.get("after", 0)
        most = message.get("most", 1000)
        if (
            type(after) is not int
            or type(most) is not int
            or not 0 <= after < 1 << 62
            or not 0 <= most <= 10_000
        ):
            raise InputError("events are asked for after a number, and at most 10000 at a time")
        answer({"ok": True, "events": [asdict(event) for event in self.state.events(after, most)]})

    def _up(self, message: Message, answer: Callable[[Message], None]) -> None:
        wanted = message.get("specs")
        if not isinstance(wanted, list) or not 1 <= len(wanted) <= MOST_AT_ONCE:
            raise InputError(f"from 1 to {MOST_AT_ONCE} vms can be asked for at once")
        specs = [GuestSpec.from_json(one) for one in wanted]
        self._admit(specs)
        began = time.time()
        self.state.add(specs, began)
        started = []
        for spec in specs:
            guest = self.guests[spec.name] = Guest(self.loop, self.runtime, spec, self._changed)
            started.append(guest)
        self._to_start += started
        self._start_some()
        through = (
            (Phase.RUNNING, Phase.ENDED)
            if message.get("wait")
            else (Phase.BOOTING, Phase.RUNNING, Phase.ENDED)
        )
        self._wait_until(
            lambda: all(guest.phase in through for guest in started),
            lambda: answer({"ok": True, "vms": [vm_row(guest) for guest in started]}),
        )

    def _admit(self, specs: list[GuestSpec]) -> None:
        """Raise InputError, with the sum, when these VMs cannot all start."""
        there = [guest for guest in self.guests.values() if guest.phase is not Phase.ENDED]
        names = {guest.name for guest in there}
        counters = [self.memory.counters(guest) for guest in there]
        host = self.memory.host(counters)
        for spec in specs:
            if spec.name in names:
                raise InputError(
                    f"there is a vm {spec.name!r} already: choose another name, or take it down first"
                )
            names.add(spec.name)
            newcomer = self.memory.newcomer(spec)
            admission = self.policy.admit(host, counters, newcomer)
            if not admission.admitted:
                self.tell("refused", spec.name, admission.reason)
                raise InputError(admission.reason)
            counters.append(newcomer)

    def _down(self, message: Message, answer: Callable[[Message], None]) -> None:
        guests = self._named(message, at_least_one=True)
        at_once = bool(message.get("now"))
        for guest in guests:
            guest.is_condemned = True
            self._take_down(guest, at_once)
        self._look_at_waiters()
        self._wait_until(
            lambda: all(guest.phase is Phase.ENDED for guest in guests),
            lambda: answer({"ok": True, "vms": [guest.name for guest in guests]}),
        )

    def _take_down(self, guest: Guest, at_once: bool) -> None:
        if guest.phase is Phase.ENDED:
            self._forget([guest])
            return
        if guest.phase is Phase.WAITING:
            if guest.name not in self._booting:
                guest.end("stopped")
            return  # else it is condemned, and ends as soon as it has a process
        if at_once or guest.phase is not Phase.RUNNING:
            self._pull_plug(guest)
            return

        def asked(reply: Message) -> None:
            if "error" in reply and guest.is_alive:
                self._pull_plug(guest)

        guest.ask("power_off", asked)
        self.loop.call_later(POWER_OFF_LIMIT, lambda: self._pull_plug(guest))

    def _pull_plug(self, guest: Guest) -> None:
        if guest.is_alive:
            guest.ask("stop", lambda _: None)
            self.loop.call_later(2.0, lambda: guest.kill() if guest.is_alive else None)

    def _stop(self, _: Message, answer: Callable[[Message], None]) -> None:
        answer({"ok": True, "vms": self._living()})
        self.loop.call_later(0.0, self.loop.stop)


def main() -> None:
    """Be the daemon; the first line on standard output says whether it has begun."""
    os.umask(0o077)
    try:
        options = DaemonOptions.from_json(json.loads(sys.argv[1]))
        runtime = Runtime(Path(options.root))
        runtime.prepare()
        lock = runtime.lock()
        if lock is None:
            raise InputError(f"a daemon runs already, with the runtime folder {runtime.root}")
        daemon = Daemon(runtime, options)
    except RingzeroError as error:
        _say(failure(error))
        os._exit(error.exit_status)
    except Exception as error:
        import traceback

        traceback.print_exception(error)
        _say(failure(InternalError(f"the daemon could not begin: {type(error).__name__}: {error}")))
        os._exit(1)
    _say({"ok": True, "pid": os.getpid()})
    daemon.run()
    # First another daemon may begin; then whoever asked for the end sees it, by the end of his connection.
    os.close(lock)
    os._exit(0)


def _say(message: Message) -> None:
    """Tell who started us, and let go of him."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")
        os.dup2(2, 1)


if __name__ == "__main__":
    main()
