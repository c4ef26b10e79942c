"""Two Debian guests whose pages are shared, swapped, and come back, all the while they work, and nobody notices."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from ringzero import Machine, _core
from ringzero.machine.assemble import BootFiles

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian

MEMORY = 128 << 20
ROUNDS = 6
WORK = """
seq 1 20000 | sort -n | sha256sum
cp /bin/busybox /tmp/copy; sha256sum /tmp/copy; rm /tmp/copy
dd if=/dev/zero of=/tmp/zeroes bs=4k count=500 2>/dev/null; sha256sum /tmp/zeroes; rm /tmp/zeroes
awk 'BEGIN { for (i = 0; i < 20000; i++) a[i] = i * i; for (i in a) s += a[i]; print s }'
"""


class Sharing(Machine):
    """A machine that has joined a sharer, and begins with pages that others have."""

    sharer: _core.Sharer
    begun_with: BootFiles

    def _assembled(self, image: object, files: BootFiles | None = None) -> _core.Vm:
        vm = super()._assembled(image, files or self.begun_with)  # type: ignore[arg-type]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pool, _ = self.sharer.join("group", f"vm{id(self)}", theirs.fileno(), MEMORY >> 12)
            assert pool is not None
            vm.attach_sharer(ours.fileno(), pool)
            os.close(pool)
        return vm


@pytest.fixture
def sharer() -> _core.Sharer:
    return _core.Sharer()


@pytest.fixture
def guests(sharer: _core.Sharer, tmp_path: object) -> Iterator[list[Sharing]]:
    made = [Sharing("debian", memory=MEMORY, cpus=cpus, engine=ENGINE, shell=False) for cpus in (1, 2)]
    files = made[0].boot_files()
    for machine in made:
        machine.sharer, machine.begun_with = sharer, files
    try:
        for machine in made:
            machine.start()
            machine._vm.set_swap(32 << 20, str(tmp_path), 64 << 20)
        for machine in made:
            machine.wait_ready(300)
        yield made
    finally:
        for machine in made:
            machine.stop()


def test_guests_work_while_their_pages_come_and_go(sharer: _core.Sharer, guests: list[Sharing]) -> None:
    expected = guests[0].run(["sh", "-c", WORK], text=True, check=True).stdout
    is_over = threading.Event()
    counts = {"shared": 0, "zeroed": 0, "evicted": 0, "alone": 0}
    wrong: list[str] = []

    def look_after(vm: _core.Vm) -> None:
        while not is_over.wait(0.05):
            done = vm.memory_scan(3000)
            for name in ("shared", "zeroed", "alone"):
                counts[name] += done[name]
            counts["evicted"] += vm.memory_evict(15)[0]
            vm.memory_sample(20)

    def work(guest: Sharing) -> None:
        for _ in range(ROUNDS):
            told = guest.run(["sh", "-c", WORK], text=True, timeout=120)
            if told.stdout != expected:
                wrong.append(f"{told}")

    keepers = [threading.Thread(target=look_after, args=(guest._vm,)) for guest in guests]
    workers = [threading.Thread(target=work, args=(guest,)) for guest in guests]
    for thread in (*keepers, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    is_over.set()
    for thread in keepers:
        thread.join()
    assert wrong == []
    assert counts["alone"] == 0, sharer.report()
    assert min(counts["shared"], counts["zeroed"], counts["evicted"]) > 300, counts
    for guest in guests:
        assert guest._vm.memory_audit() == []
        assert guest._vm.memory_counts()["image"] > 2000, "the kernel's code is common from the beginning"
    groups, faults = sharer.report()
    assert faults == []
    assert groups["group"]["uses"] >= sum(guest._vm.memory_counts()["shared"] for guest in guests)
    assert sharer.audit() == []
