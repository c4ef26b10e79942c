"""The decision: for every VM a target, and what to take from it or give back to it, by which means.

The target is what a VM is entitled to if all want their maximum: the host's memory, less the monitors' own and
less what is kept free, divided by shares and activity. Little of it is enforced while memory is not scarce. When
it is, as much is taken as is missing, from those who pay least for what they hold, and so never from a VM that
holds no more than its target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ringzero.policy.counters import HostMemory, VmMemory, amount, charges
from ringzero.policy.division import Claim, divide
from ringzero.policy.level import Level, next_level
from ringzero.policy.parameters import Parameters

__all__ = ["Decision", "VmDecision", "decide", "entitlements", "fault_of"]

TRUSTED = 256
"""From so many compressed pages on, what they take is believed instead of what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmDecision:
    """What one VM is to do, in pages."""

    name: str
    target: int
    """Machine pages that it is entitled to."""
    balloon: int
    """Pages that its balloon shall hold, in all."""
    compress: int = 0
    swap: int = 0
    """Private pages to compress and to swap out, now."""
    scan: int = 0
    """Pages a second to read in search of equal ones."""
    blocked: bool = False
    """Not to run until the next decision."""
    most: int | None = None
    """Private pages that it may have until the next decision, if there is a bound: for each that it gets beyond,
    another goes out at once. So a VM that wants more than there is pays for it itself, and soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What all VMs are to do, until the next decision."""

    level: Level
    vms: tuple[VmDecision, ...]
    """One for each VM, in the order in which their counters were given."""
    unmet: int = 0
    """Pages that are missing and that no means can take: the operator should know."""


def decide(
    host: HostMemory,
    vms: Sequence[VmMemory],
    before: Decision | None = None,
    parameters: Parameters | None = None,
) -> Decision:
    """Decide from the counters of now; of the decision before, only its level counts.

    Raises ValueError when two VMs have one name.
    """
    if len({vm.name for vm in vms}) != len(vms):
        raise ValueError("two vms have the same name")
    p = parameters or Parameters()
    level = next_level(before.level if before else Level.HIGH, host.free, host.total, p)
    held = charges(host, vms)
    targets = entitlements(host, vms, p)
    if level is Level.HIGH:
        change = _rebalance(host, vms, held, targets, p)
    else:
        change = _revoke(vms, held, _missing(host, vms, held, p), p)

    gain = _gain_of_compressing(host, vms, p)
    scans = _scans(vms, p.scan_calm if level is Level.HIGH else p.scan_pressed)
    swap_free = host.swap_free
    unmet = 0
    decided = []
    for vm, has, target, delta, scan in zip(vms, held, targets, change, scans, strict=True):
        balloon, rest = _balloon(vm, delta, level, p)
        if level is Level.HIGH:  # only a VM above its max is forced
            rest = min(rest, max(0, has - vm.max))
        compress, rest = _compress(vm, rest, gain, p)
        swap = min(rest, vm.private - compress, swap_free)
        swap_free -= swap
        unmet += rest - swap
        blocked = level is Level.LOW and has > target
        stays = vm.private - compress - swap
        most = None if level is Level.HIGH else stays + max(0, target - has - delta)
        decided.append(
            VmDecision(
                name=vm.name,
                target=target,
                balloon=balloon,
                compress=compress,
                swap=swap,
                scan=scan,
                blocked=blocked,
                most=most,
            )
        )
    return Decision(level=level, vms=tuple(decided), unmet=unmet)


def entitlements(
    host: HostMemory, vms: Sequence[VmMemory], parameters: Parameters | None = None
) -> list[int]:
    """Return the target of each VM, in machine pages, between its min and its max.

    Together they leave the monitors' own memory and the reserve free, if the mins do (`admission.admit`). Memory
    that somebody else took of the host is not there to be divided.
    """
    p = parameters or Parameters()
    overhead = sum(vm.overhead for vm in vms)
    taken = sum(vm.private for vm in vms) + host.shared + host.compressed
    there = min(host.total - overhead, taken + host.free)
    claims = [Claim(vm.shares, vm.active_pages, vm.min, vm.max) for vm in vms]
    return divide(there - p.reserve(host.total), claims, p.idle_cost)


def fault_of(decision: object, vms: Sequence[VmMemory]) -> str | None:
    """Return why a decision for these VMs must not be carried out, as a part of a sentence, or None."""
    if not isinstance(decision, Decision):
        return f"it decides {decision!r:.60} and not a Decision"
    if not isinstance(decision.level, Level):
        return f"its level is {decision.level!r} and not a Level"
    if [one.name for one in decision.vms] != [vm.name for vm in vms]:
        return "it does not decide for each vm once, in the order given"
    for one, vm in zip(decision.vms, vms, strict=True):
        for name in ("target", "balloon", "compress", "swap", "scan"):
            value = getattr(one, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                return f"it decides {name} {value!r} for vm {vm.name!r}, and not a whole number, 0 or more"
        if not vm.min <= one.target <= vm.max:
            return (
                f"it gives vm {vm.name!r} a target of {amount(one.target)},"
                f" outside its min {amount(vm.min)} and max {amount(vm.max)}"
            )
        if not vm.balloon_least <= one.balloon <= vm.size - vm.min:
            return (
                f"it wants {amount(one.balloon)} in the balloon of vm {vm.name!r}, which leaves the guest"
                f" less than its min {amount(vm.min)} or more than its max {amount(vm.max)}"
            )
        if one.most is not None and (
            isinstance(one.most, bool) or not isinstance(one.most, int) or one.most < 0
        ):
            return (
                f"it decides most {one.most!r} for vm {vm.name!r}, and not a whole number, 0 or more, or None"
            )
        if one.compress + one.swap > vm.private:
            return (
                f"it takes {amount(one.compress + one.swap)} from vm {vm.name!r} by compressing and swapping,"
                f" which has {amount(vm.private)} of its own"
            )
    return None


def _claims_on_what_is_held(
    vms: Sequence[VmMemory], least: Sequence[int], most: Sequence[int]
) -> list[Claim]:
    return [
        Claim(vm.shares, vm.active_pages, low, high) for vm, low, high in zip(vms, least, most, strict=True)
    ]


def _missing(host: HostMemory, vms: Sequence[VmMemory], held: Sequence[int], p: Parameters) -> int:
    """Return the pages that must come free: to have the reserve, and what the VMs take beyond the host's memory."""
    beyond = sum(held) + sum(vm.overhead for vm in vms) - host.total
    return max(0, p.reserve(host.total) - host.free) + max(0, beyond)


def _revoke(vms: Sequence[VmMemory], held: Sequence[int], missing: int, p: Parameters) -> list[int]:
    """Return the change (nobody's is positive) that brings `missing` pages, from who pays least for his."""
    least = [min(vm.min, has) for vm, has in zip(vms, held, strict=True)]
    most = [min(vm.max, has) for vm, has in zip(vms, held, strict=True)]
    left = divide(sum(held) - missing, _claims_on_what_is_held(vms, least, most), p.idle_cost)
    return [new - has for new, has in zip(left, held, strict=True)]


def _rebalance(
    host: HostMemory, vms: Sequence[VmMemory], held: Sequence[int], targets: Sequence[int], p: Parameters
) -> list[int]:
    """Return the change that moves memory towards the targets, while it is not scarce.

    Balloons are let go as far as there is spare memory; if that is not enough, VMs above their targets give the
    rest. Those get more only when it has arrived, in a later decision: so giving never makes memory scarce.
    """
    off = [target - has for target, has in zip(targets, held, strict=True)]
    off = [delta if abs(delta) > p.band * target else 0 for delta, target in zip(off, targets, strict=True)]
    wanted = [max(0, min(delta, vm.ballooned - vm.balloon_least)) for delta, vm in zip(off, vms, strict=True)]
    spare = max(0, host.free - p.reserve(host.total))
    missing = max(0, sum(wanted) - spare)

    least = [has + min(0, delta) for has, delta in zip(held, off, strict=True)]
    most = [min(vm.max, has) for vm, has in zip(vms, held, strict=True)]
    least = [min(low, high) for low, high in zip(least, most, strict=True)]
    left = divide(sum(held) - missing, _claims_on_what_is_held(vms, least, most), p.idle_cost)

    most = [has + want for has, want in zip(held, wanted, strict=True)]
    given = divide(sum(held) + min(spare, sum(wanted)), _claims_on_what_is_held(vms, held, most), p.idle_cost)
    return [new - has + more - has for new, more, has in zip(left, given, held, strict=True)]


def _balloon(vm: VmMemory, delta: int, level: Level, p: Parameters) -> tuple[int, int]:
    """Return what the balloon shall hold, and the pages that it cannot take for sure.

    Which pages a guest gives is its own choice. It may give those that it never touched, which brings nothing: so
    the balloon takes as many more, and holds the guest to what is left of what it has now.
    """
    least = vm.balloon_least
    now = min(vm.ballooned, vm.size - vm.min)
    if delta >= 0:
        return max(least, now - delta), 0
    if not vm.balloons or level > Level.SOFT:
        return max(least, now), -delta
    most = max(least, min(math.floor(p.balloon_most * vm.size), vm.size - vm.min))
    untouched = vm.size - vm.touched
    asked = max(now, min(now + untouched - delta, most))
    return max(least, asked), -delta - max(0, min(-delta, asked - now - untouched))


def _compress(vm: VmMemory, missing: int, gain: float, p: Parameters) -> tuple[int, int]:
    """Return the pages to compress, and what is missing then."""
    room = max(0, math.floor(p.compress_most * vm.size) - vm.compressed)
    if gain <= 0 or missing == 0:
        return 0, missing
    pages = min(room, vm.private, math.ceil(missing / gain))
    return pages, max(0, missing - math.floor(pages * gain))


def _gain_of_compressing(host: HostMemory, vms: Sequence[VmMemory], p: Parameters) -> float:
    """Return the part of a page that compressing it frees."""
    compressed = sum(vm.compressed for vm in vms)
    return 1 - (host.compressed / compressed if compressed >= TRUSTED else p.compressed_size)


def _scans(vms: Sequence[VmMemory], pace: int) -> list[int]:
    """Return each VM's part of the scanner's pace: as its private pages are, which are what can be shared."""
    private = sum(vm.private for vm in vms)
    return [pace * vm.private // private if private else 0 for vm in vms]
