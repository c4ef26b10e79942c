"""The decisions of the memory policy: which means each level chooses, and what no decision may ever do."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from ringzero.policy import (
    Decision,
    HostMemory,
    Level,
    Parameters,
    VmMemory,
    charges,
    decide,
    entitlements,
    fault_of,
)
from tests.unit.memory_hosts import MIB, admitted, random_host, two_vms

P = Parameters()


def some_before(choose: Random) -> Decision | None:
    return choose.choice((None, *(Decision(level=level, vms=()) for level in Level)))


def test_every_decision_can_be_carried_out() -> None:
    choose = Random(5)
    means = dict.fromkeys(("ballooned", "let go", "compressed", "swapped", "blocked", "unmet"), 0)
    for _ in range(1500):
        host, vms = random_host(choose)
        decision = decide(
            host, vms, some_before(choose), Parameters(tax=choose.choice((0.0, 0.5, 0.75, 0.99)))
        )
        assert fault_of(decision, vms) is None
        assert sum(one.swap for one in decision.vms) <= host.swap_free
        for one, vm, has in zip(decision.vms, vms, charges(host, vms), strict=True):
            if has <= vm.min:
                assert one.compress == one.swap == 0
                assert one.balloon <= max(vm.ballooned, vm.balloon_least)
                assert not one.blocked
            if one.compress or one.swap:
                assert decision.level >= Level.HARD or not vm.balloons or one.balloon >= vm.ballooned
            assert one.blocked == (decision.level is Level.LOW and has > one.target)
            assert (one.most is None) == (decision.level is Level.HIGH)
            assert one.most is None or one.most >= min(vm.private, one.target) - one.compress - one.swap
            means["ballooned"] += one.balloon > vm.ballooned
            means["let go"] += one.balloon < vm.ballooned
            means["compressed"] += one.compress > 0
            means["swapped"] += one.swap > 0
            means["blocked"] += one.blocked
        means["unmet"] += decision.unmet > 0
    assert min(means.values()) > 20, means


def test_nothing_is_taken_of_a_vm_below_its_target() -> None:
    choose = Random(6)
    taken = 0
    for _ in range(500):
        host, vms = random_host(choose)
        vms = [replace(vm, max=vm.size) for vm in admitted(host, vms, P)]  # over its max, any VM gives
        if sum(vm.min for vm in vms) + sum(vm.overhead for vm in vms) + P.reserve(host.total) > host.total:
            continue
        decision = decide(host, vms, some_before(choose), P)
        for one, vm, has in zip(decision.vms, vms, charges(host, vms), strict=True):
            loses = one.balloon > min(vm.ballooned, vm.size - vm.min) or one.compress or one.swap
            taken += bool(loses)
            assert not loses or has > one.target
    assert taken > 150


def squeezed(part_free: float, **of_all: object) -> tuple[HostMemory, list[VmMemory]]:
    """Return a host of 1000 MiB with so much of it free; two VMs, one idle, hold the rest."""
    total, free = 1000 * MIB, round(1000 * MIB * part_free)
    half = (total - free) // 2
    idle = VmMemory(name="idle", size=half, min=100 * MIB, max=half, private=half, active=0.1)
    vms = [replace(one, **of_all) for one in (idle, replace(idle, name="busy", active=0.9))]
    return HostMemory(total=total, free=total - 2 * half, swap_size=total, swap_free=total), vms


def test_a_level_chooses_its_means() -> None:
    host, vms = squeezed(0.07)
    calm = decide(host, vms)
    assert calm.level is Level.HIGH
    assert all(one.balloon == one.compress == one.swap == 0 for one in calm.vms)
    assert 0 < sum(one.scan for one in calm.vms) <= P.scan_calm

    host, vms = squeezed(0.03)
    soft = decide(host, vms)
    missing = P.reserve(host.total) - host.free
    assert soft.level is Level.SOFT
    # The idle one alone gives, by its balloon, what is missing and no more.
    assert missing <= soft.vms[0].balloon <= missing + 2
    assert soft.vms[1].balloon == 0
    assert all(one.compress == one.swap == 0 and not one.blocked for one in soft.vms)
    assert sum(one.scan for one in soft.vms) > sum(one.scan for one in calm.vms)

    _, stubborn = squeezed(0.03, balloons=False)
    paged = decide(host, stubborn)
    assert paged.vms[0].balloon == 0
    assert paged.vms[0].compress > 0
    assert paged.vms[0].compress * P.compressed_size + paged.vms[0].swap >= missing - 2

    host, vms = squeezed(0.015)
    hard = decide(host, vms)
    assert hard.level is Level.HARD
    assert hard.vms[0].balloon == 0
    assert hard.vms[0].compress > 0
    assert hard.vms[0].swap > 0
    assert not hard.vms[0].blocked

    host, vms = squeezed(0.005)
    low = decide(host, vms)
    assert low.level is Level.LOW
    assert low.vms[0].blocked
    assert not low.vms[1].blocked


def test_who_is_above_his_target_may_not_grow_and_who_is_below_may_up_to_it() -> None:
    host, vms = squeezed(0.015)
    decision = decide(host, vms)
    assert decision.level is Level.HARD
    (idle, busy), held = decision.vms, charges(host, vms)
    assert held[0] > idle.target and idle.most == vms[0].private - idle.compress - idle.swap
    assert held[1] <= busy.target and busy.most == vms[1].private + busy.target - held[1]


def test_all_that_is_taken_beyond_the_memory_is_missing() -> None:
    host, vms = squeezed(0.0)
    asked = []
    for beyond in (0, 1000):
        more = [replace(vm, overhead=vm.overhead + beyond // 2) for vm in vms]
        decision = decide(host, more)
        asked.append(sum(one.compress + one.swap for one in decision.vms))
    assert asked[1] - asked[0] >= 1000


def test_a_balloon_that_takes_untouched_pages_brings_the_missing_ones_too() -> None:
    host, vms = squeezed(0.03)
    roomy = [replace(vm, size=vm.size + 200 * MIB, max=vm.size + 200 * MIB, active=0.1) for vm in vms]
    for one, vm in zip(decide(host, roomy).vms, roomy, strict=True):
        # Whatever it gives, the guest then has less than it holds now.
        assert one.balloon > 200 * MIB
        assert vm.size - one.balloon < vm.private
        assert one.swap == one.compress == 0
    # As far as a balloon may grow; what it then does not bring for sure is paged.
    huge = [replace(vm, size=3 * vm.size, max=3 * vm.size, active=0.1) for vm in vms]
    for one, vm in zip(decide(host, huge).vms, huge, strict=True):
        assert one.balloon == int(P.balloon_most * vm.size)
        assert one.compress > 0


def test_a_full_swap_file_is_told() -> None:
    host, vms = squeezed(0.005)
    full = replace(host, swap_free=0)
    assert decide(host, vms).unmet == 0
    decision = decide(full, vms)
    assert decision.unmet > 0
    assert all(one.swap == 0 for one in decision.vms)


def test_what_compressing_brings_is_believed_once_it_is_known() -> None:
    host, vms = squeezed(0.015)
    packed = 400
    vms = [replace(vms[0], private=vms[0].private - packed, compressed=packed), vms[1]]
    well = decide(replace(host, compressed=packed // 4, free=host.free + packed - packed // 4), vms)
    badly = decide(replace(host, compressed=packed), vms)
    assert well.vms[0].compress > 0
    assert badly.vms[0].compress == 0
    assert badly.vms[0].swap > 0


def test_a_vm_above_its_max_gives_even_when_there_is_plenty() -> None:
    vm = VmMemory(name="a", size=200, min=10, max=120, private=180)
    host = HostMemory(total=10_000, free=9_820, swap_size=1000, swap_free=1000)
    assert decide(host, [vm]).vms[0].balloon == 80
    one = decide(host, [replace(vm, balloons=False)]).vms[0]
    assert (one.balloon, one.compress + one.swap >= 60) == (80, True)
    # A guest just started is told its max at once, before it has touched anything.
    assert decide(host, [replace(vm, private=0)]).vms[0].balloon == 80


def test_memory_moves_from_idle_to_active_without_ever_making_it_scarce() -> None:
    host, vms = two_vms(360 * MIB, P)
    before: Decision | None = None
    for _ in range(10):
        before = decide(host, vms, before)
        assert before.level is Level.HIGH
        # The guests follow at once; the active one fills what it is given.
        vms = [
            replace(vm, ballooned=one.balloon, private=vm.size - one.balloon)
            for vm, one in zip(vms, before.vms, strict=True)
        ]
        host = replace(host, free=host.total - sum(charges(host, vms)))
    idle, busy = charges(host, vms)
    assert busy >= 1.3 * 180 * MIB
    assert idle < 120 * MIB
    # It is over: the next decisions change nothing.
    assert [one.balloon for one in decide(host, vms, before).vms] == [vm.ballooned for vm in vms]


def test_for_anothers_good_a_vm_is_only_ballooned() -> None:
    host, (idle, busy) = two_vms(360 * MIB, P)
    assert decide(host, [idle, busy]).vms[0].balloon > idle.ballooned
    stubborn = decide(host, [replace(idle, balloons=False), busy]).vms[0]
    assert (stubborn.balloon, stubborn.compress, stubborn.swap) == (idle.ballooned, 0, 0)


def test_small_differences_to_a_target_are_left_alone() -> None:
    host, vms = two_vms(360 * MIB, P)
    targets = entitlements(host, vms, P)

    def moved(part: float) -> bool:
        off = [round(targets[0] * part), -round(targets[0] * part)]
        near = [
            replace(vm, private=target + more, ballooned=vm.size - target - more)
            for vm, target, more in zip(vms, targets, off, strict=True)
        ]
        return [one.balloon for one in decide(host, near).vms] != [vm.ballooned for vm in near]

    # 1/16 of 104 MiB; of the 256 MiB of the other it is less than that.
    host = replace(host, free=P.reserve(host.total))
    assert not moved(0.06)
    assert moved(0.2)


def test_books_that_are_wrong_do_not_lead_out_of_bounds() -> None:
    # Counters of many processes are not read at one instant: then they need not add up.
    choose = Random(11)
    for _ in range(500):
        host, vms = random_host(choose)
        host = replace(
            host,
            shared=host.shared * choose.randint(0, 5),
            compressed=host.compressed * choose.randint(0, 5),
            free=choose.randint(0, host.total),
        )
        assert fault_of(decide(host, vms, some_before(choose), P), vms) is None


def test_two_vms_of_one_name_are_refused() -> None:
    host, vms = squeezed(0.1)
    with pytest.raises(ValueError, match="same name"):
        decide(host, [vms[0], vms[0]])


def test_a_hundred_vms_charged_for_one_pool_are_charged_what_it_takes() -> None:
    choose = Random(7)
    for _ in range(300):
        host, vms = random_host(choose)
        used = sum(vm.private for vm in vms)
        used += host.shared if any(vm.shared for vm in vms) else 0
        used += host.compressed if any(vm.compressed for vm in vms) else 0
        assert sum(charges(host, vms)) == used


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": 9}, "target"),
        ({"target": 121}, "target"),
        ({"target": 50.5}, "target 50.5"),
        ({"balloon": 79}, "balloon"),
        ({"balloon": 191}, "balloon"),
        ({"compress": 30, "swap": 21}, "compressing and swapping"),
        ({"scan": -1}, "scan -1"),
        ({"most": -1}, "most -1"),
        ({"most": 1.5}, "most 1.5"),
        ({"name": "b"}, "each vm once"),
    ],
)
def test_a_decision_out_of_bounds_is_found(change: dict[str, object], words: str) -> None:
    vm = VmMemory(name="a", size=200, min=10, max=120, private=50)
    good = decide(HostMemory(total=1000, free=900), [vm])
    assert fault_of(good, [vm]) is None
    bad = replace(good, vms=(replace(good.vms[0], **change),))
    assert words in (fault_of(bad, [vm]) or "")
    assert fault_of(replace(good, level=7), [vm])
    assert fault_of(None, [vm])
