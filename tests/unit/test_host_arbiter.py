"""The arbiter of memory and a VM's orders, without a guest: who tells lies, who is slow, and what is sent when."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ringzero.errors import InputError
from ringzero.host import trace
from ringzero.host.arbiter import Arbiter
from ringzero.host.guest import Phase
from ringzero.host.guest_counters import GuestCounters
from ringzero.host.loop import Loop
from ringzero.host.map import cells, draw, unpacked_states
from ringzero.host.memory import HostMemoryView
from ringzero.host.metrics import exposition
from ringzero.host.policy import OwnPolicy
from ringzero.host.rows import host_row
from ringzero.host.spec import GuestSpec
from ringzero.host.vm_memory import STATES
from ringzero.host.vm_orders import Orders
from ringzero.policy import Decision, HostMemory, Level, Parameters, VmMemory

MIB = 1 << 20
SIZE = 64 * MIB
PAGES = SIZE // 4096


def told(private: int, **more: int) -> dict[str, Any]:
    """Return what a VM's process tells."""
    counts = dict.fromkeys(STATES, 0) | {"private": private} | more
    counts["zero"] += PAGES - sum(counts.values())
    return {
        "counts": counts,
        "balloon": {"driver": 1},
        "swap": {"compressed_bytes": 0},
        "done": {"scanned": 5},
    }


class FakeGuest:
    """A guest that answers at once, unless it is slow, and remembers what it was asked."""

    def __init__(self, name: str, answer: dict[str, Any] | None, **spec: Any) -> None:
        self.spec = GuestSpec.checked(name=name, memory=SIZE, **spec)
        self.name = name
        self.phase = Phase.RUNNING
        self.pid = None
        self.memory = GuestCounters(SIZE)
        self.memory.weighed_at = float("inf")
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    def ask(self, do: str, answered: Callable[[dict[str, Any]], None], **fields: Any) -> None:
        assert do == "memory"
        self.asked.append(fields)
        if self.answer is not None:
            answered(self.answer)


class FixedPolicy(OwnPolicy):
    """Decides what it is told to."""

    def __init__(self, changes: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        object.__setattr__(self, "changes", changes)

    def decide(self, host: HostMemory, vms: Any, before: Decision | None) -> Decision:
        decision = super().decide(host, vms, before)
        return replace(
            decision, vms=tuple(replace(one, **self.changes.get(one.name, {})) for one in decision.vms)
        )


def rounds(
    guests: list[FakeGuest],
    policy: Any = None,
    *,
    total: int = 1024 * MIB,
    record: Path | None = None,
    seconds: float = 0.1,
) -> tuple[Arbiter, list[tuple[str, str | None, str]]]:
    """Let an arbiter begin, and return it with what it told."""
    loop = Loop()
    said: list[tuple[str, str | None, str]] = []
    by_name: Any = {guest.name: guest for guest in guests}
    arbiter = Arbiter(
        loop,
        by_name,
        policy or OwnPolicy(),
        HostMemoryView(total, 0),
        lambda *words: said.append(words),
        record,
    )
    arbiter.begin()
    loop.call_later(seconds, loop.stop)
    loop.run()
    loop.close()
    return arbiter, said


def test_counters_become_decisions_and_orders(tmp_path: Path) -> None:
    a, b = FakeGuest("a", told(9000)), FakeGuest("b", told(3000, shared=1000), shares=5)
    record = tmp_path / "record"
    arbiter, said = rounds([a, b], record=record)
    assert arbiter.level is Level.HIGH and said == []
    assert a.memory.target == PAGES
    # One message a VM a round: nothing was urgent. What is to be scanned goes with the next.
    assert len(a.asked) == len(b.asked) == 1
    assert a.memory.orders["scan"] == Parameters().scan_calm * 9000 // 12000
    assert a.asked[0]["sample"] == 100
    line = json.loads(record.read_text())
    assert [vm["private"] for vm in line["vms"]] == [9000, 3000]
    record.write_text("".join(json.dumps(line | {"at": at}) + "\n" for at in (1, 2)))
    assert trace.read(record)[0].vms[1].shared == 1000


def test_what_is_urgent_is_sent_at_once() -> None:
    a, b = FakeGuest("a", told(9000)), FakeGuest("b", told(3000))
    rounds([a, b], FixedPolicy({"a": {"compress": 50, "swap": 7, "blocked": True}}))
    assert len(b.asked) == 1
    assert [fields["orders"].get("evict") for fields in a.asked] == [None, 57]
    assert a.asked[1]["orders"]["blocked"] is True
    # Evicted once, not with every round.
    assert "evict" not in a.memory.orders


def test_memory_that_runs_short_is_told_and_taken() -> None:
    a = FakeGuest("a", told(PAGES - 100), min=8 * MIB)
    arbiter, said = rounds([a], total=74 * MIB)
    assert arbiter.level > Level.HIGH
    assert [kind for kind, *_ in said] == ["level"]
    last = a.asked[-1]["orders"]
    assert last["balloon"] > 0 or last["evict"] > 0


@pytest.mark.parametrize(
    "lie",
    [
        {"counts": {"private": 1}},
        {"counts": {"private": -1, "zero": PAGES + 1}},
        {"counts": {"private": 1e6}},
        {"counts": [1]},
        {"counts": None},
        {"balloon": {"driver": "yes"}},
        {"swap": 3},
        {"done": {"scanned": 1 << 70}},
        {"sampled": [5, 3]},
    ],
)
def test_a_vm_that_lies_keeps_its_last_counters(lie: dict[str, Any]) -> None:
    liar, other = FakeGuest("liar", told(100)), FakeGuest("other", told(200))
    rounds([liar, other])
    liar.answer = told(500) | lie
    arbiter, said = rounds([liar, other])
    assert [kind for kind, *_ in said] == ["counters"]
    assert arbiter.decision is not None and len(arbiter.decision.vms) == 2
    assert liar.memory.activity.fraction(Parameters()) == 1.0


def test_a_vm_that_does_not_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringzero.host.arbiter.ANSWER_LIMIT", 0.02)
    arbiter, _ = rounds([FakeGuest("deaf", None), FakeGuest("other", told(200))])
    assert arbiter.decision is not None and len(arbiter.decision.vms) == 2


def test_a_policy_that_fails_is_told_once() -> None:
    class Broken(OwnPolicy):
        def decide(self, host: HostMemory, vms: Any, before: Decision | None) -> Decision:
            raise InputError("policy x failed in decide: no idea")

    loop = Loop()
    said: list[str] = []
    guests: Any = {"a": FakeGuest("a", told(100))}
    arbiter = Arbiter(
        loop, guests, Broken(), HostMemoryView(1 << 30, 0), lambda *words: said.append(words[2])
    )
    arbiter.begin()
    for at in (0.1, 0.2, 0.3):
        loop.call_later(at, arbiter.hurry)
    loop.call_later(0.4, loop.stop)
    loop.run()
    loop.close()
    assert len(guests["a"].asked) == 4
    assert said == ["the policy cannot decide: policy x failed in decide: no idea"]


class FakeMemory:
    """Counts what is asked of it."""

    def __init__(self, evictable: int = 1 << 30) -> None:
        self.evictable = evictable
        self.private = 0
        self.calls: list[tuple[str, int]] = []

    def counts(self) -> dict[str, int]:
        return {"private": self.private}

    def balloon(self, pages: int) -> None:
        self.calls.append(("balloon", pages))

    def scan(self, pages: int) -> dict[str, int]:
        self.calls.append(("scan", pages))
        return {"scanned": pages, "shared": 1, "zeroed": 2}

    def evict(self, pages: int) -> tuple[int, str | None]:
        self.calls.append(("evict", pages))
        gone = min(pages, self.evictable)
        self.evictable -= gone
        self.private -= gone
        return gone, None if gone == pages else "the store is full"


def orders(memory: FakeMemory, *given: dict[str, Any], seconds: float = 0.3) -> tuple[Orders, list[str]]:
    loop = Loop()
    vm: Any = SimpleNamespace(pause=lambda: moves.append("pause"), resume=lambda: moves.append("resume"))
    moves: list[str] = []
    of_vm = Orders(loop, vm, memory)  # type: ignore[arg-type]
    for one in given:
        of_vm.take(one)
    loop.call_later(seconds, loop.stop)
    loop.run()
    loop.close()
    return of_vm, moves


def test_orders_are_carried_out_in_pieces() -> None:
    memory = FakeMemory()
    done, _ = orders(memory, {"balloon": 30, "evict": 1000, "scan": 20, "seconds": 5})
    assert memory.calls[0] == ("balloon", 30)
    evicted = [pages for what, pages in memory.calls if what == "evict"]
    assert sum(evicted) == 1000 and max(evicted) <= 256
    # A slow pace is one wake-up a period.
    assert [pages for what, pages in memory.calls if what == "scan"] == [100]
    assert done.totals == {"scanned": 100, "shared": 1, "zeroed": 2, "evicted": 1000}


def test_a_fast_scan_is_paced() -> None:
    memory = FakeMemory()
    orders(memory, {"scan": 10_000, "seconds": 5}, seconds=0.2)
    assert 2 <= len(memory.calls) <= 5


def test_a_store_that_is_full_ends_an_eviction() -> None:
    memory = FakeMemory(evictable=300)
    done, _ = orders(memory, {"evict": 10_000})
    assert done.totals["evicted"] == 300 and done.full == "the store is full"
    assert len(memory.calls) == 2


def test_a_bound_is_kept_whatever_comes_back() -> None:
    memory = FakeMemory()
    memory.private = 1500
    loop = Loop()
    of_vm = Orders(loop, SimpleNamespace(), memory)  # type: ignore[arg-type]
    of_vm.take({"evict": 500, "most": 1000})

    def come_back() -> None:
        memory.private += 300

    loop.call_later(0.1, come_back)
    loop.call_later(0.2, loop.stop)
    loop.run()
    assert memory.private == 1000
    of_vm.take({"most": None})
    memory.private = 2000
    loop.call_later(0.1, loop.stop)
    loop.run()
    loop.close()
    assert memory.private == 2000


def test_a_bound_holds_no_longer_than_the_daemon_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringzero.host.vm_orders.ORDERS_HOLD", 0.05)
    memory = FakeMemory()
    loop = Loop()
    Orders(loop, SimpleNamespace(), memory).take({"most": 0})  # type: ignore[arg-type]
    loop.call_later(0.2, loop.stop)
    loop.run()
    memory.private = 100
    loop.call_later(0.1, loop.stop)
    loop.run()
    loop.close()
    assert memory.private == 100


def test_a_vm_is_blocked_no_longer_than_the_daemon_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringzero.host.vm_orders.ORDERS_HOLD", 0.05)
    _, moves = orders(FakeMemory(), {"blocked": True}, {"blocked": True})
    assert moves == ["pause", "resume"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"balloon": -1},
        {"balloon": 1.5},
        {"scan": "many"},
        {"evict": True},
        {"evict": 1 << 50},
        {"seconds": 0},
    ],
)
def test_orders_that_make_no_sense(wrong: dict[str, Any]) -> None:
    memory = FakeMemory()
    with pytest.raises(InputError):
        orders(memory, wrong)
    assert memory.calls == []


def test_metrics_of_a_host() -> None:
    arbiter, _ = rounds([FakeGuest("a", told(9000))])
    row = {
        "name": 'a"\n',
        "phase": "running",
        "pid": 1,
        "spec": GuestSpec.checked(name="a", memory=SIZE).as_json(),
        "pages": told(9000)["counts"],
        "target": 100,
        "own": 5000,
        "active": 0.5,
        "done": {"scanned": 7},
        "cpu": 1.5,
    }
    text = exposition(host_row(arbiter, HostMemoryView(1 << 30, 0)), [row])
    assert (
        f'ringzero_vm_memory_bytes{{state="private",vm="a\\"\\n"}} {9000.0 * 4096:.8g}'.split("} ")[0] in text
    )
    assert 'ringzero_host_memory_level{level="high"} 1.0' in text
    assert 'ringzero_vms{phase="running"} 1.0' in text


def test_a_map_of_pages(tmp_path: Path) -> None:
    states = bytes([0] * 100 + [1] * 60 + [2] * 40 + [0] * 50 + [1])
    # A part is zero only if all of it is: otherwise what it mostly has besides.
    assert cells(states, 5) == ["zero", "zero", "private", "shared", "private"]
    assert cells(b"\1", 3) == ["private"] * 3
    assert cells(b"", 2) == [None, None]
    image = pytest.importorskip("PIL.Image")
    draw([("one", states), ("two", b"\5" * 1000)], tmp_path / "map.png")
    with image.open(tmp_path / "map.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 16)}
    assert {(214, 92, 72), (84, 168, 104), (150, 104, 190)} <= colours
    with pytest.raises(InputError, match="cannot be written"):
        draw([], tmp_path / "none" / "map.png")
    for wrong in ("%", "AAAA", "eJxLBAAAYgBi"):  # not base64, not packed, a state that there is not
        with pytest.raises(InputError):
            unpacked_states(wrong)


def test_counters_are_what_a_policy_wants() -> None:
    guest: Any = FakeGuest("a", None)
    guest.memory.take(told(100, shared=10, image=5, ballooned=7, compressed=3, swapped=2), Parameters())
    counters = HostMemoryView(1 << 30, 0).counters(guest)
    assert isinstance(counters, VmMemory)
    assert (counters.private, counters.shared, counters.ballooned) == (100, 15, 7)
    assert counters.touched == 127 and counters.balloons
