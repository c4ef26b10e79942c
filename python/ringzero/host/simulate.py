"""What would have been, had a policy decided over a recorded trace.

The trace says what each guest wanted and how active it was; what the policy took and gave back is put in place of
what was taken and given back then. The model of a guest is small, and said here in full:

- It wants what it had touched, and back what its balloon held, but for what its max withholds from it anyway.
- Its balloon is filled, or emptied, by the next instant of the trace. What it takes more than when the trace was
  recorded is untouched pages first.
- Its idle pages are taken before its active ones. An active page that is compressed or swapped comes back at
  once, and counts as brought back; one that is in the balloon cannot: the guest is short of it.
- Its pages are private, shared and zero in the proportions of the trace; sharing is the same under all policies.

So a replay compares policies with each other. It does not say how fast a guest would have been.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ringzero.errors import InputError
from ringzero.host.policy import MemoryPolicy
from ringzero.host.trace import Instant
from ringzero.policy import Activity, Decision, HostMemory, Level, VmMemory, charges

__all__ = ["Moment", "Replay", "VmMoment", "replay"]


@dataclass(frozen=True, slots=True)
class VmMoment:
    """One VM at one instant of a replay, in pages."""

    target: int
    held: int
    """Machine pages that it is charged for."""
    active: int
    short: int
    """Active pages that are in its balloon."""
    blocked: bool


@dataclass(frozen=True, slots=True)
class Moment:
    """All VMs at one instant of a replay."""

    at: float
    lasted: float
    """Seconds to the next instant; 0 for the last."""
    level: Level
    free: int
    vms: dict[str, VmMoment]


@dataclass(slots=True)
class Replay:
    """What became of a trace under one policy; counts in pages unless their names say otherwise."""

    policy: str
    moments: list[Moment] = field(default_factory=list)
    ballooned: Counter[str] = field(default_factory=Counter)
    """By VM, as all counters here: pages that balloons were asked to take, in all."""
    compressed: Counter[str] = field(default_factory=Counter)
    swapped: Counter[str] = field(default_factory=Counter)
    back: Counter[str] = field(default_factory=Counter)
    """Pages that were compressed or swapped and that the guest touched again."""
    overrun: int = 0
    """The most pages that guests wanted at once beyond what the host had: they would have had to wait."""
    unmet: int = 0
    """The most pages at once that were missing and that the policy found no means to take."""

    def seconds_at(self, level: Level) -> float:
        """Return how long the host was at a level."""
        return sum(moment.lasted for moment in self.moments if moment.level is level)

    @property
    def level_changes(self) -> int:
        """How often the level changed."""
        levels = [moment.level for moment in self.moments]
        return sum(one is not other for one, other in pairwise(levels))

    @property
    def least_free(self) -> int:
        """Return the least that was free of the host's memory."""
        return min(moment.free for moment in self.moments)

    @property
    def blocked_seconds(self) -> float:
        """Return for how long VMs were blocked, all of them together."""
        return sum(moment.lasted * sum(vm.blocked for vm in moment.vms.values()) for moment in self.moments)

    def mean(self, vm: str, what: str) -> float:
        """Return the mean over time of a field of `VmMoment`, while the VM was there."""
        there = [(moment.lasted, moment.vms[vm]) for moment in self.moments if vm in moment.vms]
        lasted = sum(seconds for seconds, _ in there)
        if lasted == 0:  # it came with the last line
            return float(getattr(there[-1][1], what))
        return float(sum(seconds * getattr(one, what) for seconds, one in there) / lasted)

    def names(self) -> list[str]:
        """Return the names of all VMs, in the order in which they came."""
        return list(dict.fromkeys(name for moment in self.moments for name in moment.vms))


@dataclass(slots=True)
class _Taken:
    """What a replay has taken of one VM, in pages."""

    ballooned: int
    compressed: int
    swapped: int


def replay(trace: Sequence[Instant], policy: MemoryPolicy) -> Replay:
    """Let a policy decide over a trace. Raises InputError when the policy decides what must not be."""
    done = Replay(policy.name)
    taken: dict[str, _Taken] = {}
    activity: dict[str, Activity] = {}
    before: Decision | None = None
    for number, instant in enumerate(trace):
        names = {vm.name for vm in instant.vms}
        taken = {name: one for name, one in taken.items() if name in names}
        activity = {name: one for name, one in activity.items() if name in names}
        guests: list[_Guest] = []
        for recorded in instant.vms:
            vm = _with_activity(recorded, instant, activity, policy)
            one = taken.setdefault(vm.name, _Taken(vm.ballooned, vm.compressed, vm.swapped))
            guests.append(_guest(vm, one))
            done.back[vm.name] += guests[-1].back
        vms = [guest.vm for guest in guests]
        host, overrun = _host(instant, vms)
        done.overrun = max(done.overrun, overrun)
        try:
            before = policy.decide(host, vms, before)
        except ValueError as error:
            raise InputError(f"policy {policy.name} cannot decide at {instant.at:g} s: {error}") from error
        done.unmet = max(done.unmet, before.unmet)
        lasted = trace[number + 1].at - instant.at if number + 1 < len(trace) else 0.0
        moment = Moment(instant.at, lasted, before.level, host.free, {})
        for guest, decided, has in zip(guests, before.vms, charges(host, vms), strict=True):
            vm = guest.vm
            moment.vms[vm.name] = VmMoment(decided.target, has, guest.active, guest.short, decided.blocked)
            one = taken[vm.name]
            done.ballooned[vm.name] += max(0, decided.balloon - one.ballooned)
            done.compressed[vm.name] += decided.compress
            done.swapped[vm.name] += decided.swap
            if vm.balloons:
                one.ballooned = decided.balloon
            one.compressed += decided.compress
            one.swapped += decided.swap
        done.moments.append(moment)
    return done


def _with_activity(
    vm: VmMemory, instant: Instant, activity: dict[str, Activity], policy: MemoryPolicy
) -> VmMemory:
    """Return the VM with its active part from the averages of its samples, where the trace has samples."""
    if vm.name not in instant.samples:
        return vm
    estimate = activity.get(vm.name, Activity()).after(*instant.samples[vm.name], policy.parameters)
    activity[vm.name] = estimate
    return replace(vm, active=estimate.fraction(policy.parameters))


@dataclass(frozen=True, slots=True)
class _Guest:
    """What a guest is like, with what was taken of it."""

    vm: VmMemory
    active: int
    back: int
    short: int


def _guest(vm: VmMemory, taken: _Taken) -> _Guest:
    """Return the guest as it is with what was `taken`; what it brings back is taken no longer."""
    resident_then = vm.private + vm.shared + vm.zero
    withheld = min(vm.ballooned, vm.balloon_least)
    wanted = vm.touched - withheld
    taken.ballooned = min(taken.ballooned, vm.size)
    then, now = vm.ballooned - withheld, max(0, taken.ballooned - withheld)
    in_balloon = min(then, now) + max(0, now - then - (vm.size - vm.touched))
    left = wanted - in_balloon
    # The balloon may take pages that had been compressed or swapped: those are then gone.
    taken.compressed = min(taken.compressed, left)
    taken.swapped = min(taken.swapped, left - taken.compressed)

    active = min(vm.active_pages, wanted)
    lacking = max(0, active - (left - taken.compressed - taken.swapped))
    unpacked = min(lacking, taken.compressed)
    read = min(lacking - unpacked, taken.swapped)
    taken.compressed -= unpacked
    taken.swapped -= read

    resident = left - taken.compressed - taken.swapped
    shared = resident * vm.shared // resident_then if resident_then else 0
    zero = resident * vm.zero // resident_then if resident_then else 0
    guest = replace(
        vm,
        private=resident - shared - zero,
        shared=shared,
        zero=zero,
        ballooned=taken.ballooned,
        compressed=taken.compressed,
        swapped=taken.swapped,
    )
    return _Guest(guest, active, back=unpacked + read, short=lacking - unpacked - read)


def _host(instant: Instant, vms: Sequence[VmMemory]) -> tuple[HostMemory, int]:
    """Return the host as it is with these VMs, and the pages by which they want more than it has."""
    then = instant.host
    shared_then = sum(vm.shared for vm in instant.vms)
    compressed_then = sum(vm.compressed for vm in instant.vms)
    swapped_then = sum(vm.swapped for vm in instant.vms)
    overhead = sum(vm.overhead for vm in vms)
    own_then = sum(vm.private for vm in instant.vms)
    others = max(0, then.total - then.free - overhead - own_then - then.shared - then.compressed)

    shared = then.shared * sum(vm.shared for vm in vms) // shared_then if shared_then else 0
    compressed = sum(vm.compressed for vm in vms)
    store = then.compressed * compressed // compressed_then if compressed_then else compressed // 2
    free = then.total - others - overhead - sum(vm.private for vm in vms) - shared - store
    swap_free = then.swap_free + swapped_then - sum(vm.swapped for vm in vms)
    host = replace(
        then,
        free=max(0, free),
        shared=shared,
        compressed=store,
        swap_free=max(0, min(then.swap_size, swap_free)),
    )
    return host, max(0, -free)
