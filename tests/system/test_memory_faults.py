"""Debian guests that work while their pages are shared, swapped and ballooned, and sharer after sharer is killed."""

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringzero import Machine, _core
from ringzero.host.wire import Channel, connect, listen

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian

MEMORY = 128 << 20
WORK = """
seq 1 20000 | sort -n | sha256sum
for i in 1 2 3; do head -c 2000000 /dev/urandom >/tmp/a$i; cp /tmp/a$i /tmp/b$i; done
for i in 1 2 3; do cmp /tmp/a$i /tmp/b$i || echo damaged; done; rm /tmp/[ab]?
find /bin /lib -type f | sort | head -200 | xargs cat | sha256sum
"""


class Sharer:
    """A sharer's process."""

    def __init__(self, folder: Path) -> None:
        path = folder / "sharer.sock"
        with listen(path) as listener:
            words = [sys.executable, "-m", "ringzero.host.sharer", str(listener.fileno())]
            self._process = subprocess.Popen(words, pass_fds=[listener.fileno()])
        self.channel = Channel(connect(path, timeout=60))

    def attach(self, vm: _core.Vm) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            fields = {"group": "tenant", "vm": "vm", "pages": MEMORY // 4096, "pool": vm.shared_pool()}
            self.channel.send({"do": "join"} | fields, [theirs.fileno()])
        got = self.channel.receive()
        assert got is not None and got[0].get("ok"), got
        with ours:
            vm.attach_sharer(ours.fileno(), *got[1])
        for fd in got[1]:
            os.close(fd)

    def uses(self) -> int:
        return int(self.channel.ask("report")["groups"]["tenant"]["uses"])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.channel.close()


class Guest(Machine):
    """A machine that joins a sharer before it starts, and can swap."""

    folder: Path
    sharer: Sharer

    def _assembled(self, *args: Any, **options: Any) -> _core.Vm:
        vm = super()._assembled(*args, **options)
        self.sharer.attach(vm)
        vm.set_swap(1 << 20, str(self.folder), MEMORY)
        return vm

    def work(self) -> str:
        return self.run(["sh", "-c", WORK], text=True, check=True).stdout


@pytest.fixture
def guests(tmp_path: Path) -> Iterator[list[Guest]]:
    sharer = Sharer(tmp_path)
    made = [Guest("debian", engine=ENGINE, memory=MEMORY, cpus=2, shell=False) for _ in range(2)]
    for guest in made:
        guest.folder, guest.sharer = tmp_path, sharer
        guest.start()
    yield made
    for guest in made:
        guest.stop()
    made[0].sharer.kill()


def test_guests_keep_their_memory_whoever_is_killed(guests: list[Guest], tmp_path: Path) -> None:
    for guest in guests:
        guest.wait_ready(300)
    wanted = guests[0].work()
    assert "damaged" not in wanted
    done, found = threading.Event(), []

    def run(guest: Guest) -> None:
        found.append(guest.work())

    def take(guest: Guest, numbers: random.Random) -> None:
        vm = guest._vm
        while not done.wait(0.01):
            vm.memory_scan(4000)
            if numbers.random() < 0.4:
                vm.memory_evict(numbers.randrange(400))
            if numbers.random() < 0.05:
                vm.balloon_target(numbers.choice((0, 4000)))

    workers = [threading.Thread(target=run, args=(guest,)) for guest in guests]
    takers = [
        threading.Thread(target=take, args=(guest, random.Random(at))) for at, guest in enumerate(guests)
    ]
    numbers = random.Random(9)
    for thread in (*workers, *takers):
        thread.start()
    kills = 0
    while any(worker.is_alive() for worker in workers):
        # Not before pages are shared again, which each sharer begins anew.
        while guests[0].sharer.uses() < 5000 and any(worker.is_alive() for worker in workers):
            workers[0].join(0.02)
        workers[0].join(numbers.random() * 0.3)
        guests[0].sharer.kill()
        kills += 1
        workers[0].join(numbers.random() * 0.1)
        sharer = Sharer(tmp_path)
        for guest in guests:
            guest.sharer = sharer
            sharer.attach(guest._vm)
        sharer.channel.ask("recovered")
        assert sharer.channel.ask("audit")["findings"] == []
    done.set()
    for thread in (*workers, *takers):
        thread.join()
    assert found == [wanted] * 2
    for guest in guests:
        vm = guest._vm
        assert vm.memory_audit() == []
        stats, swap = vm.stats(), vm.memory_swap()
        assert min(stats["memory.broken"], stats["memory.brought_back"], swap["spills"]) > 0, (stats, swap)
        assert swap["lost"] == 0
    assert kills > 0
