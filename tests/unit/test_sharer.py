"""Pages shared among VMs by a sharer, and what is left of it when somebody is killed."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from ringzero import _core
from ringzero.host.loop import Loop
from ringzero.host.sharer_link import SharerLink
from ringzero.host.wire import Channel, connect, listen

MEMORY = 16 << 20
PAGES = MEMORY // 4096
FIRST = 256  # below it, machines have what firmware leaves


def content(number: int) -> bytes:
    """Return a page of which there is one for each number."""
    return random.Random(number).randbytes(4096)


class Guest:
    """A VM that never starts, and what its pages are to hold."""

    def __init__(self) -> None:
        self.vm = _core.Vm(MEMORY)
        self.pages: dict[int, int] = {}

    def store(self, page: int, number: int) -> None:
        self.vm.write_memory((FIRST + page) * 4096, content(number))
        self.pages[page] = number

    def check(self) -> None:
        assert self.vm.memory_audit() == []
        for page, number in self.pages.items():
            assert self.vm.read_memory((FIRST + page) * 4096, 4096) == content(number), f"page {page}"

    def shared(self) -> int:
        return self.vm.memory_counts()["shared"]

    def scan(self) -> dict[str, int]:
        self.vm.memory_scan(PAGES)
        return self.vm.memory_scan(PAGES)


def join(sharer: _core.Sharer, guest: Guest, group: str = "tenant") -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pool, _ = sharer.join(group, "vm", theirs.fileno(), PAGES)
        assert pool is not None
        theirs.close()
        guest.vm.attach_sharer(ours.fileno(), pool)
        os.close(pool)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def uses(sharer: _core.Sharer, group: str = "tenant") -> int:
    return sharer.report()[0].get(group, {}).get("uses", 0)


def test_equal_pages_are_one_and_a_store_breaks_them() -> None:
    sharer, one, other = _core.Sharer(), Guest(), Guest()
    for guest in (one, other):
        join(sharer, guest)
        for page in range(300):
            guest.store(page, page)
        guest.store(300, 1000 + (guest is one))
    one.scan()
    assert other.scan()["shared"] == 300
    # The first is told of its twins, and need not wait until the scan comes by.
    one.vm.memory_scan(1)
    assert one.vm.memory_scan(1)["shared"] > 0
    one.scan()
    assert one.shared() == other.shared() == 300
    assert one.vm.memory_counts()["private"] == 1
    groups, sentences = sharer.report()
    assert (groups["tenant"]["shared_pages"], groups["tenant"]["uses"], sentences) == (300, 600, [])
    other.store(7, 2000)
    other.vm.memory_scan(1)
    until(lambda: uses(sharer) == 599)
    for guest in (one, other):
        guest.check()
    assert sharer.audit() == []
    del other, guest
    until(lambda: uses(sharer) == 300)
    one.check()


def test_what_one_group_holds_changes_nothing_for_another() -> None:
    seen = []
    for other_has_the_same in (True, False):
        sharer, guest, twin, other = _core.Sharer(), Guest(), Guest(), Guest()
        for one, group in ((guest, "a"), (twin, "a"), (other, "b")):
            join(sharer, one, group)
        for page in range(100):
            other.store(page, page if other_has_the_same else 1000 + page)
            # Half of the pages of one group have a twin there.
            guest.store(page, page)
            twin.store(page, page if page % 2 else 2000 + page)
        for _ in range(3):
            # It is first, and again and again: whatever there is to be found out is known to the sharer.
            assert other.scan()["shared"] == 0
            guest.scan()
            twin.scan()
        assert guest.vm.shared_pool() != other.vm.shared_pool()
        # A store is slow where a page must be broken, which is where the guest's own group has it.
        states = guest.vm.memory_states()
        for page in range(100):
            guest.store(page, 3000 + page)
        broken = guest.vm.stats()["memory.broken"]
        counts = sharer.report()[0]["a"]
        seen.append(
            (states, broken, {name: counts[name] for name in ("offered", "found", "added", "stale", "uses")})
        )
    assert seen[0] == seen[1]
    assert seen[0][1] == 50


def test_a_vm_that_stores_as_fast_as_pages_are_shared_keeps_its_content() -> None:
    sharer, guests = _core.Sharer(), [Guest(), Guest()]
    stop = threading.Event()

    def scan(guest: Guest) -> None:
        while not stop.is_set():
            guest.vm.memory_scan(PAGES)

    for guest in guests:
        join(sharer, guest)
    scanners = [threading.Thread(target=scan, args=(guest,)) for guest in guests]
    for scanner in scanners:
        scanner.start()
    try:
        numbers = random.Random(3)
        for _ in range(6000):
            guest = numbers.choice(guests)
            page = numbers.randrange(40)
            guest.store(page, numbers.randrange(8))
            back = guest.vm.read_memory((FIRST + page) * 4096, 4096)
            assert back == content(guest.pages[page])
    finally:
        stop.set()
        for scanner in scanners:
            scanner.join()
    groups, sentences = sharer.report()
    assert groups["tenant"]["released"] > 100 and sentences == []
    for guest in guests:
        guest.scan()
        guest.check()
    until(lambda: uses(sharer) == sum(guest.shared() for guest in guests))
    assert sharer.audit() == []


def test_a_machine_joins_with_a_pool_before_it_starts() -> None:
    sharer, guest, other = _core.Sharer(), Guest(), Guest()
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(_core.CoreError, match="its pool must come along"):
            guest.vm.attach_sharer(left.fileno())
        with pytest.raises(_core.CoreError, match="descriptor 999"):
            guest.vm.attach_sharer(999)
        assert guest.vm.shared_pool() is None
    join(sharer, guest, "a")
    with pytest.raises(_core.CoreError, match="another sharing group already"):
        join(sharer, guest, "b")
    with pytest.raises(_core.CoreError, match="was started already"):
        other.vm.start()
        other.vm.pause()
        join(sharer, other, "a")
    other.vm.stop()
    with pytest.raises(_core.CoreError, match="has another pool"):
        left, right = socket.socketpair()
        with left, right:
            sharer.join("a", "vm", right.fileno(), PAGES, (1, 2))


class Process:
    """A sharer in a process of its own, and a daemon's talk with it."""

    def __init__(self, folder: Path) -> None:
        path = folder / "sharer.sock"
        with listen(path) as listener:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ringzero.host.sharer", str(listener.fileno())],
                pass_fds=[listener.fileno()],
            )
        self.channel = Channel(connect(path, timeout=20))

    def join(self, pool: tuple[int, int] | None = None) -> tuple[socket.socket, int | None]:
        """Return a VM's socket, and its pool if it has none."""
        ours, theirs = socket.socketpair()
        with theirs:
            fields = {"group": "tenant", "vm": "vm", "pages": PAGES, "pool": pool}
            self.channel.send({"do": "join"} | fields, [theirs.fileno()])
        got = self.channel.receive()
        assert got is not None and got[0].get("ok"), got
        return ours, got[1][0] if got[1] else None

    def attach(self, guest: Guest) -> None:
        ours, pool = self.join(guest.vm.shared_pool())
        with ours:
            guest.vm.attach_sharer(ours.fileno(), pool)
        if pool is not None:
            os.close(pool)

    def uses(self) -> int:
        return int(self.channel.ask("report")["groups"].get("tenant", {}).get("uses", 0))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    made: list[Process] = []

    def make() -> Process:
        made.append(Process(tmp_path))
        return made[-1]

    yield make
    for process in made:
        process.kill()


def _is_counted(process: Process, guests: list[Guest]) -> bool:
    return process.uses() == sum(guest.shared() for guest in guests)


def test_the_sharer_may_be_killed_at_any_moment(processes: Callable[[], Process]) -> None:
    process, guests = processes(), [Guest(), Guest()]
    for guest in guests:
        process.attach(guest)
    numbers = random.Random(4)
    for _ in range(6):
        stop = threading.Event()

        def work(guest: Guest, seed: int, stop: threading.Event = stop) -> None:
            mine = random.Random(seed)
            while not stop.is_set():
                for _ in range(20):
                    guest.store(mine.randrange(600), mine.randrange(300))
                guest.vm.memory_scan(PAGES)

        workers = [threading.Thread(target=work, args=(guest, numbers.random())) for guest in guests]
        for worker in workers:
            worker.start()
        time.sleep(numbers.random() * 0.2)
        os.kill(process.process.pid, signal.SIGKILL)
        time.sleep(0.05)
        stop.set()
        for worker in workers:
            worker.join()
        assert all(guest.scan()["alone"] for guest in guests)
        process.kill()
        process = processes()
        for guest in guests:
            guest.check()
            process.attach(guest)
        process.channel.ask("recovered")
        assert process.channel.ask("audit")["findings"] == []
        for guest in guests:
            guest.scan()
            guest.check()
        until(partial(_is_counted, process, guests))
    assert all(guest.shared() > 100 for guest in guests)
    assert process.channel.ask("report")["sentences"] == []


CHILD = """
import sys, threading
sys.path[:0] = sys.argv[1:2]
import test_sharer as tests
guest = tests.Guest()
guest.vm.attach_sharer(int(sys.argv[2]), int(sys.argv[3]))
print("ready", flush=True)
while True:
    for page in range(200):
        guest.store(page, tests.random.randrange(100))
    guest.vm.memory_scan(tests.PAGES)
    guest.vm.memory_scan(tests.PAGES)
"""


def test_a_vm_may_be_killed_at_any_moment(processes: Callable[[], Process]) -> None:
    process, guest = processes(), Guest()
    process.attach(guest)
    for page in range(200):
        guest.store(page, page // 2)
    guest.scan()
    assert guest.shared() == 200
    children = []
    for _ in range(2):
        ours, pool = process.join()
        assert pool is not None
        with ours:
            words = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(ours.fileno()), str(pool)]
            child = subprocess.Popen(words, pass_fds=[ours.fileno(), pool], stdout=subprocess.PIPE)
        os.close(pool)
        children.append(child)
    for number, child in enumerate(children):
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        until(lambda: process.uses() > 200)
        time.sleep(0.05 * number)
        child.kill()
        child.wait()
        child.stdout.close()
    until(lambda: process.uses() == 200)
    assert process.channel.ask("audit")["findings"] == []
    guest.check()
    report = process.channel.ask("report")
    assert (report["groups"]["tenant"]["members"], report["groups"]["tenant"]["shared_pages"]) == (1, 100)


def test_what_is_no_request_is_refused(processes: Callable[[], Process]) -> None:
    process = processes()
    for request, why in (
        ({"do": "dance"}, "does not know"),
        ({"do": "join"}, "cannot be called"),
        ({"do": "join", "group": "a", "vm": "b", "pages": True}, "cannot have True pages"),
        ({"do": "join", "group": "a", "vm": "b", "pages": 1}, "with one socket"),
    ):
        process.channel.send(request)
        got = process.channel.receive()
        assert got is not None and why in got[0]["error"], got
    left, right = socket.socketpair()
    with left, right:
        fields = {"do": "join", "group": "a", "vm": "b", "pages": 1, "pool": [1, "x"]}
        process.channel.send(fields, [left.fileno()])
        got = process.channel.receive()
        assert got is not None and "a device and an inode" in got[0]["error"]
    assert process.channel.ask("audit")["findings"] == []
    process.channel.ask("stop")
    assert process.process.wait(10) == 0


def test_a_daemons_link_finds_the_sharer_again_and_replaces_a_dead_one(tmp_path: Path) -> None:
    loop, path, guest = Loop(), tmp_path / "sharer.sock", Guest()
    happened: list[str] = []

    def joined(answer: dict[str, object], fds: list[int]) -> None:
        happened.append("joined" if answer.get("ok") else str(answer["error"]))
        if fds:
            guest.vm.attach_sharer(fds[0], *fds[1:])
            for fd in fds:
                os.close(fd)
            if "lost" in happened:  # not before the vm has told what it uses
                link.recovered()
        loop.stop()

    def lost() -> None:
        happened.append("lost")
        link.join("tenant", "vm", PAGES, guest.vm.shared_pool(), joined)

    def wait() -> None:
        loop._stopping = False
        loop.run()

    loop.call_later(20, loop.stop)
    link = SharerLink(loop, path, lost)
    assert not link.start()
    first = link.pid
    link.join("tenant", "vm", PAGES, None, joined)
    wait()
    for page in range(10):
        guest.store(page, 0)
    guest.scan()
    assert (happened, guest.shared()) == (["joined"], 10)
    # A daemon goes, the sharer stays; the next daemon finds it.
    link.close()
    link = SharerLink(loop, path, lost)
    assert link.start() and link.pid is None
    assert first is not None
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    wait()
    assert happened == ["joined", "lost", "joined"]
    assert link.pid not in (None, first)
    guest.store(10, 0)
    guest.scan()
    guest.check()
    assert guest.shared() == 11
    second = link.pid
    link.close()
    assert second is not None
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)


def test_vms_that_share_nothing_yet_survive_the_sharer(processes: Callable[[], Process]) -> None:
    process, guests = processes(), [Guest(), Guest()]
    for guest in guests:
        process.attach(guest)
    process.kill()
    process = processes()
    for guest in guests:
        process.attach(guest)
    process.channel.ask("recovered")
    for guest in guests:
        guest.store(1, 7)
        guest.scan()
    guests[0].scan()
    assert [guest.shared() for guest in guests] == [1, 1]
