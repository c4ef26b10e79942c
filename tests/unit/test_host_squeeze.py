"""The squeeze after a boot, with a guest that only has numbers."""

from collections.abc import Callable
from typing import Any

import pytest

from ringzero.host import vm_squeeze
from ringzero.host.vm_memory import GuestMemory
from ringzero.host.vm_squeeze import LEFT, Squeeze

PAGES = 32768


class Later:
    """A loop whose time passes when it is told to."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_later(self, _seconds: float, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def run(self, most: int = 100) -> int:
        """Make the calls in their order; return how many there were."""
        done = 0
        while self.calls and done < most:
            self.calls.pop(0)()
            done += 1
        return done


class Guest:
    """A balloon that holds at once what it shall, up to `most`."""

    def __init__(self, *, driver: int = 1, free: int = 16000, most: int = PAGES) -> None:
        self.driver, self.free, self.most = driver, free, most
        self.target = 0
        self.targets: list[int] = []
        self.asked = 0

    def balloon_target(self, pages: int) -> None:
        self.target = pages
        self.targets.append(pages)

    def balloon_stats(self, ask: bool = True) -> dict[str, int]:
        self.asked += ask
        actual = min(self.target, self.most)
        return {
            "driver": self.driver,
            "target": self.target,
            "actual": actual,
            "guest_free": self.free * 4096,
        }

    def memory_counts(self) -> dict[str, int]:
        actual = min(self.target, self.most)
        return {"zero": 1000, "private": PAGES - 1000 - actual, "ballooned": actual}


def start(guest: Guest) -> tuple[GuestMemory, Any]:
    memory, loop = GuestMemory(guest, PAGES * 4096), Later()  # type: ignore[arg-type]
    Squeeze(loop, memory).begin()  # type: ignore[arg-type]
    return memory, loop


def test_it_takes_what_is_free_for_a_moment_and_nobody_is_told() -> None:
    guest = Guest()
    memory, loop = start(guest)
    loop.run(2)
    assert guest.targets == [16000 - LEFT - PAGES // 32]
    counts = memory.counts()
    assert (counts["ballooned"], sum(counts.values())) == (0, PAGES)
    loop.run()
    assert guest.targets[1:] == [0]
    assert guest.asked == 1
    memory.balloon(500)
    assert memory.counts()["ballooned"] == 500


@pytest.mark.parametrize("free", [0, 100, LEFT])
def test_a_guest_with_little_is_left_alone(free: int) -> None:
    guest = Guest(free=free)
    start(guest)[1].run()
    assert guest.targets == []


def test_without_a_driver_it_gives_up() -> None:
    guest = Guest(driver=0)
    assert start(guest)[1].run() < 20
    assert guest.targets == []


def test_a_guest_that_does_not_get_there_is_let_go() -> None:
    guest = Guest(most=1000)
    _, loop = start(guest)
    assert loop.run() < 2 * vm_squeeze._MOST_LOOKS
    assert guest.target == 0


def test_orders_end_it_and_come_first() -> None:
    guest = Guest(most=1000)
    memory, loop = start(guest)
    loop.run(3)
    memory.balloon(700)
    loop.run()
    assert guest.target == 700
    assert memory.counts()["ballooned"] == 700
    assert not memory.squeeze(100)


def test_a_guest_that_lies_of_its_free_memory_gives_no_more_than_it_has() -> None:
    guest = Guest(free=1 << 50)
    start(guest)[1].run()
    assert max(guest.targets) < PAGES
