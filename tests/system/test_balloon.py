"""The balloon with Debian's own driver: memory goes to the host and comes back, and nobody is hurt."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator

import pytest

from ringzero import Machine, _core

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian

MIB = 1 << 20
PAGES = MIB // 4096
"""Pages of a MiB."""


@pytest.fixture(scope="module")
def guest() -> Iterator[Machine]:
    """Give a booted Debian of 256 MiB whose driver is there."""
    with Machine("debian", engine=ENGINE, shell=False) as machine:
        machine.wait_ready(300)
        until(lambda: core(machine).balloon_stats(ask=False)["driver"] == 1)
        yield machine


def core(machine: Machine) -> _core.Vm:
    return machine._vm


def until(done: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def inflate(machine: Machine, mebibytes: int) -> None:
    """Set the target, and wait until the guest has done it."""
    core(machine).balloon_target(mebibytes * PAGES)
    until(lambda: core(machine).balloon_stats(ask=False)["actual"] == mebibytes * PAGES)


def available(machine: Machine) -> int:
    """Return what the guest believes it could use, in MiB."""
    text = machine.run(["cat", "/proc/meminfo"], text=True, check=True).stdout
    found = re.search(r"MemAvailable: +(\d+) kB", text)
    assert found is not None
    return int(found[1]) // 1024


def touched(machine: Machine) -> int:
    """Return what the host gave, in MiB."""
    return machine.stats()["memory.touched_bytes"] // MIB


def test_memory_goes_to_the_host_and_comes_back(guest: Machine) -> None:
    free = available(guest)
    guest.run(["sh", "-c", "dd if=/dev/zero of=/tmp/file bs=1M count=100 && rm /tmp/file"], check=True)
    before = touched(guest)
    inflate(guest, 128)
    assert touched(guest) <= before - 80
    assert abs(free - 128 - available(guest)) <= 8
    assert core(guest).memory_counts()["ballooned"] == 128 * PAGES
    assert core(guest).memory_audit() == []
    inflate(guest, 0)
    assert abs(free - available(guest)) <= 8
    # What comes back is as good as new.
    script = "dd if=/dev/zero bs=1M count=100 | tr '\\0' x >/tmp/file; sha1sum </tmp/file; rm /tmp/file"
    done = guest.run(["sh", "-c", script], text=True, check=True)
    assert done.stdout.split()[0] == hashlib.sha1(b"x" * (100 * MIB)).hexdigest()
    counts = core(guest).balloon_stats(ask=False)
    assert counts["inflated"] == counts["deflated"] == 128 * PAGES
    refused = [counts[name] for name in ("refused_inflations", "refused_deflations", "malformed", "unasked")]
    assert refused == [0, 0, 0, 0]


def test_the_guest_tells_of_itself(guest: Machine) -> None:
    before = core(guest).balloon_stats()["updates"]
    until(lambda: core(guest).balloon_stats(ask=False)["updates"] > before)
    told = core(guest).balloon_stats(ask=False)
    assert 200 * MIB < told["guest_total"] < 256 * MIB
    assert abs(told["guest_available"] // MIB - available(guest)) <= 8
    assert told["guest_minor_faults"] > 0


def test_a_guest_out_of_memory_takes_some_back(guest: Machine) -> None:
    inflate(guest, available(guest) - 24)
    before = core(guest).balloon_stats(ask=False)
    # Without a balloon that gives in, the guest's kernel would kill this.
    guest.run(["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"], check=True)
    after = core(guest).balloon_stats(ask=False)
    assert after["unasked"] >= 16 * PAGES
    assert after["actual"] < before["actual"]
    inflate(guest, 0)


def test_what_the_guest_frees_goes_to_the_host(guest: Machine) -> None:
    guest.run(["sh", "-c", "dd if=/dev/zero of=/tmp/file bs=1M count=100"], check=True)
    before = touched(guest)
    assert before >= 100
    guest.run(["rm", "/tmp/file"], check=True)
    until(lambda: touched(guest) <= before - 64)
    until(lambda: core(guest).balloon_stats(ask=False)["discarded"] >= 64 * PAGES)
    counts = core(guest).balloon_stats(ask=False)
    assert counts["reported"] >= counts["discarded"]
