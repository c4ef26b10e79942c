"""The arbiter of memory: asks every VM for its counters, has the policy decide, and sends each VM its orders.

A round takes two messages a VM at most: the answer to the first has the counters, and the orders of the last round went
with it; only what cannot wait (a VM to evict from, to block, or whose balloon has another size) is sent at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ringzero.errors import InputError
from ringzero.host import trace
from ringzero.host.guest import Guest, Phase
from ringzero.host.loop import Loop, Timer
from ringzero.host.memory import HostMemoryView
from ringzero.host.policy import MemoryPolicy
from ringzero.host.sharing import Sharing
from ringzero.host.wire import Message
from ringzero.policy import PAGE, Decision, HostMemory, Level, VmDecision, VmMemory

__all__ = ["Arbiter"]

CALM_PERIOD, PRESSED_PERIOD = 5.0, 1.0
"""Seconds from round to round, while the level is high and while it is not."""
ANSWER_LIMIT = 2.0
"""Seconds: who has not answered by then is decided upon by his last counters."""
SOON = 0.05
"""Seconds: of several that come or go together, each does not make a round of its own."""
FRESH = 0.5
"""Seconds: counters that are older are asked for again when somebody looks at them."""
WEIGHING_PERIOD = 60.0
"""Seconds until a monitor's own memory is weighed again. The system walks its page tables for that."""
SETTLED = 10.0
"""Seconds from the first weighing, when a guest has just booted, until its monitor has given back what that took."""


class Arbiter:
    """Divides the host's memory between its VMs."""

    def __init__(
        self,
        loop: Loop,
        guests: dict[str, Guest],
        policy: MemoryPolicy,
        view: HostMemoryView,
        tell: Callable[[str, str | None, str], None],
        record: Path | None = None,
    ) -> None:
        self.decision: Decision | None = None
        self.host: HostMemory | None = None
        self.sharing: Sharing | None = None
        self._loop = loop
        self._guests = guests
        self._policy = policy
        self._view = view
        self._tell = tell
        self._record: IO[str] | None = None
        if record is not None:
            try:
                self._record = record.open("a", encoding="utf-8")
            except OSError as error:
                raise InputError(f"counters cannot be recorded to {record}: {error.strerror}") from error
        self._waits: set[str] = set()
        self._timer: Timer | None = None
        self._limit: Timer | None = None
        self._complaint: str | None = None
        self._recorded_at = 0.0
        self._began_at = 0.0

    def begin(self) -> None:
        """Hold rounds from now on."""
        self._timer = self._loop.call_later(0.0, self._round)

    def hurry(self) -> None:
        """Hold the next round at once: a VM has come or gone."""
        if self._timer is not None and self._timer.at > time.monotonic() + SOON:
            self._timer.cancel()
            self._timer = self._loop.call_later(SOON, self._round)

    def freshen(self) -> None:
        """Hold a round soon, if the last was a while ago: somebody looks."""
        if time.monotonic() - self._began_at > FRESH:
            self.hurry()

    @property
    def level(self) -> Level:
        """How scarce memory was in the last round."""
        return self.decision.level if self.decision is not None else Level.HIGH

    def _running(self) -> list[Guest]:
        return [guest for guest in self._guests.values() if guest.phase in (Phase.BOOTING, Phase.RUNNING)]

    def _round(self) -> None:
        self._timer = None
        guests = self._running()
        now = self._began_at = time.monotonic()
        self._waits = {guest.name for guest in guests}
        for guest in guests:
            self._ask(guest, now)
        self._weigh(guests, now)
        if self.sharing is not None:
            self._view.shared = self.sharing.pages
            self.sharing.look()
        if self._waits:
            self._limit = self._loop.call_later(ANSWER_LIMIT, self._decide)
        else:
            self._decide()

    def _ask(self, guest: Guest, now: float) -> None:
        fields: dict[str, Any] = {"orders": guest.memory.orders | {"seconds": self._period()}}
        guest.memory.orders = {key: value for key, value in guest.memory.orders.items() if key != "evict"}
        p = self._policy.parameters
        if guest.phase is Phase.RUNNING and now - guest.memory.sampled_at >= p.period:
            guest.memory.sampled_at = now
            fields["sample"] = p.samples
        guest.ask("memory", lambda answer: self._answered(guest, answer), **fields)

    def _answered(self, guest: Guest, answer: Message) -> None:
        if fault := guest.memory.take(answer, self._policy.parameters):
            self._tell("counters", guest.name, f"vm {guest.name!r} tells of counters that cannot be: {fault}")
        self._waits.discard(guest.name)
        if not self._waits and self._limit is not None:
            self._decide()

    def _weigh(self, guests: list[Guest], now: float) -> None:
        """Weigh one monitor whose turn has come; those that were never weighed go first."""
        due = [one for one in guests if one.phase is Phase.RUNNING and now >= one.memory.weigh_again_at]
        for guest in sorted(due, key=lambda one: one.memory.weigh_again_at)[: max(1, len(guests) // 10)]:
            is_first = not guest.memory.weigh_again_at
            guest.memory.weigh_again_at = now + (SETTLED if is_first else WEIGHING_PERIOD)
            if guest.pid is not None:
                guest.memory.weigh(guest.pid)

    def _period(self) -> float:
        return CALM_PERIOD if self.level is Level.HIGH else PRESSED_PERIOD

    def _decide(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        self._waits.clear()
        guests = self._running()
        vms = [self._view.counters(guest) for guest in guests]
        host = self.host = self._view.host(vms, guests)
        before = self.level
        try:
            decision = self._policy.decide(host, vms, self.decision)
        except (InputError, ValueError) as error:
            self._complain(f"the policy cannot decide: {error}")
        else:
            self.decision = decision
            if decision.unmet:
                self._complain(f"{decision.unmet} pages are missing, and no means can take them")
            else:
                self._complaint = None
            for guest, one in zip(guests, decision.vms, strict=True):
                self._order(guest, one)
            if decision.level is not before:
                self._tell(
                    "level",
                    None,
                    f"free memory is {decision.level.name.lower()}: {host.free * PAGE >> 20} MiB",
                )
        self._note(host, vms)
        self._timer = self._loop.call_later(self._period(), self._round)

    def _order(self, guest: Guest, one: VmDecision) -> None:
        urgent = one.compress + one.swap > 0 or one.blocked != guest.memory.orders.get("blocked", False)
        urgent = urgent or (
            self.level is not Level.HIGH and one.balloon != guest.memory.orders.get("balloon", 0)
        )
        guest.memory.target = one.target
        orders = {"balloon": one.balloon, "scan": one.scan, "blocked": one.blocked, "most": one.most}
        # A bound that falls is for now; one that is lifted can wait.
        urgent = urgent or (one.most is not None and one.most < guest.memory.count("private"))
        guest.memory.orders = orders
        if urgent:
            now = orders | {"evict": one.compress + one.swap, "seconds": self._period()}
            guest.ask("memory", lambda _: None, orders=now)

    def _complain(self, text: str) -> None:
        """Tell what is wrong, once until it is right again or something else is wrong."""
        if self._complaint != text.split(" ", 1)[-1]:
            self._complaint = text.split(" ", 1)[-1]
            self._tell("unmet", None, text)

    def _note(self, host: HostMemory, vms: list[VmMemory]) -> None:
        now = time.monotonic()
        if self._record is None or now <= self._recorded_at:
            return
        self._recorded_at = now
        try:
            self._record.write(trace.line(round(now, 3), host, vms))
            self._record.flush()
        except OSError as error:
            self._tell("record", None, f"counters are recorded no longer: {error.strerror}")
            self._record = None
