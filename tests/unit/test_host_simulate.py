"""Replays of recorded counters, and the command that shows them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from ringzero.cli import run_command
from ringzero.errors import InputError
from ringzero.host import trace
from ringzero.host.policy import MemoryPolicy, OwnPolicy
from ringzero.host.simulate import replay
from ringzero.host.trace import Instant
from ringzero.policy import Decision, HostMemory, Level, Parameters, VmMemory
from tests.unit.memory_hosts import MIB, random_host, two_vms

NO_TAX = "from ringzero.policy import Parameters\nparameters = Parameters(tax=0)\n"


def two_vm_trace(path: Path, instants: int = 10) -> Path:
    host, vms = two_vms(360 * MIB, Parameters())
    path.write_text("".join(trace.line(30 * number, host, vms) for number in range(instants)))
    return path


class Recorded:
    """A policy that never changes anything."""

    name = "recorded"
    parameters = Parameters()

    def __init__(self) -> None:
        self.told: list[tuple[HostMemory, list[VmMemory]]] = []

    def decide(self, host: HostMemory, vms: list[VmMemory], before: Decision | None) -> Decision:
        self.told.append((host, list(vms)))
        decision = OwnPolicy().decide(host, vms, before)
        return replace(
            decision,
            vms=tuple(
                replace(one, balloon=vm.ballooned, compress=0, swap=0)
                for one, vm in zip(decision.vms, vms, strict=True)
            ),
        )

    admit = OwnPolicy.admit


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    choose = Random(1)
    written = [(number / 2, *random_host(choose)) for number in range(50)]
    path = tmp_path / "trace"
    path.write_text("\n".join(trace.line(*one) for one in written))
    assert trace.read(path) == [Instant(at, host, tuple(vms), {}) for at, host, vms in written]


def test_a_policy_that_changes_nothing_is_told_what_was_recorded() -> None:
    # Active pages that had been swapped come back at once; so the guests here use none of those.
    choose = Random(2)
    for _ in range(60):
        host, vms = random_host(choose)
        vms = [replace(vm, active=0, max=vm.size) for vm in vms]
        instants = [Instant(number, host, tuple(vms), {}) for number in range(3)]
        policy = Recorded()
        replay(instants, policy)
        books_right = any(vm.shared for vm in vms) and any(vm.compressed for vm in vms)
        for told_host, told in policy.told:
            assert told == vms
            if books_right:
                assert told_host == host


def test_any_trace_can_be_replayed_and_its_books_stay_right() -> None:
    choose = Random(3)
    for _ in range(100):
        instants: list[Instant] = []
        for number in range(6):
            host, vms = random_host(choose)
            instants.append(Instant(number, host, tuple(vms), {}))
        done = replay(instants, OwnPolicy())
        assert sum(done.seconds_at(level) for level in Level) == 5
        for moment in done.moments:
            for vm in moment.vms.values():
                assert 0 <= vm.short <= vm.active
                assert vm.held >= 0


def test_the_tax_helps_the_active_one_in_a_replay(tmp_path: Path) -> None:
    instants = trace.read(two_vm_trace(tmp_path / "trace"))
    taxed = replay(instants, OwnPolicy())
    without = replay(instants, OwnPolicy("no tax", Parameters(tax=0)))
    last, last_without = taxed.moments[-1].vms["busy"], without.moments[-1].vms["busy"]
    assert last.held >= 1.3 * last_without.held
    assert last.short == 0 < last_without.short
    assert taxed.moments[-1].vms["idle"].held < without.moments[-1].vms["idle"].held
    assert taxed.level_changes == 0
    assert taxed.seconds_at(Level.HIGH) == 270


def test_guests_that_grow_beyond_the_host_are_held_and_nothing_is_lost() -> None:
    total = 1000 * MIB
    instants = []
    for number in range(150):
        want = min(300, 100 + 2 * number) * MIB
        vms = tuple(
            VmMemory(
                name=f"vm{which}",
                size=400 * MIB,
                min=50 * MIB,
                max=400 * MIB,
                private=want,
                active=0.5 if which < 2 else 0.02,
                balloons=which != 3,
            )
            for which in range(5)
        )
        free = max(0, total - 5 * want)
        host = HostMemory(total=total, free=free, swap_size=2000 * MIB, swap_free=2000 * MIB)
        instants.append(Instant(10 * number, host, vms, {}))
    done = replay(instants, OwnPolicy())
    assert done.overrun == 0
    assert done.unmet == 0
    assert done.moments[-1].level is Level.HIGH
    assert done.ballooned["vm4"] > 0
    assert done.swapped["vm3"] > 0  # which has no balloon
    assert done.swapped["vm4"] == 0
    assert done.mean("vm0", "short") == 0
    assert done.level_changes <= 20


def test_pages_that_are_used_again_come_back() -> None:
    host = HostMemory(total=1000, free=500, compressed=25, swap_size=1000, swap_free=900)
    vm = VmMemory(name="a", size=400, min=10, max=400, private=100, compressed=50, swapped=100, active=0)
    awake = replace(vm, active=0.5)
    policy = Recorded()
    done = replay([Instant(0, host, (vm,), {}), *(Instant(at, host, (awake,), {}) for at in (1, 2))], policy)
    assert done.back["a"] == 100  # 200 are used, 100 were there; and they come back once
    told = policy.told[-1][1][0]
    assert (told.private, told.compressed, told.swapped) == (200, 0, 50)
    assert policy.told[-1][0].swap_free == 950


def test_samples_in_a_trace_become_averages(tmp_path: Path) -> None:
    host, vms = two_vms(360 * MIB, Parameters())
    path = tmp_path / "trace"
    lines = []
    for number in range(60):
        record = json.loads(trace.line(30 * number, host, vms))
        for vm in record["vms"]:
            del vm["active"]
            vm |= {"touched": 4 if vm["name"] == "idle" else 90, "sampled": 100}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines))
    done = replay(trace.read(path), OwnPolicy())
    first, last = done.moments[0].vms["idle"].active, done.moments[-1].vms["idle"].active
    assert first > 0.5 * 256 * MIB
    assert last < 0.05 * 256 * MIB


def test_vms_come_and_go() -> None:
    host, (idle, busy) = two_vms(360 * MIB, Parameters())
    instants = [Instant(at, host, vms, {}) for at, vms in enumerate([(idle,), (idle, busy), (busy,), ()])]
    done = replay(instants, OwnPolicy())
    assert done.names() == ["idle", "busy"]
    assert [sorted(moment.vms) for moment in done.moments] == [["idle"], ["busy", "idle"], ["busy"], []]


GOOD = json.loads(trace.line(0, *two_vms(360 * MIB, Parameters())))


def changed(change: Callable[[dict[str, object]], object]) -> str:
    record = json.loads(json.dumps(GOOD))
    change(record)
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["0 instants"]),
        (json.dumps(GOOD), ["1 instants"]),
        ("{", ["line 1", "not JSON"]),
        ("[" * 100_000, ["line 1"]),
        ("[1]\n", ["line 1", '"at"']),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), ["line 2", "must rise"]),
        (changed(lambda it: it.update(at="now")), ["at is 'now'"]),
        (changed(lambda it: it.update(at=float("nan"))), ["at is nan"]),
        (changed(lambda it: it.update(vms=7)), ["vms is 7"]),
        (changed(lambda it: it.update(vms=[7])), ["a vm is 7"]),
        (changed(lambda it: it["vms"].append(it["vms"][0])), ["same name"]),
        (changed(lambda it: it["vms"][0].pop("size")), ["no 'size'"]),
        (changed(lambda it: it["vms"][0].update(colour=1)), ["has 'colour'", "swapped"]),
        (changed(lambda it: it["vms"][0].update(active=2)), ["'idle'", "active is 2"]),
        (changed(lambda it: it["vms"][0].update(touched=2)), ["touched 2 of sampled None"]),
        (changed(lambda it: it["vms"][0].update(touched=2, sampled=1)), ["touched 2"]),
        (changed(lambda it: it["host"].update(free=10**9)), ["more is free"]),
        (changed(lambda it: it["host"].update(total="all")), ["total is 'all'"]),
        (changed(lambda it: it["vms"][0].update(name=["a"])), ["name is ['a']"]),
        (changed(lambda it: it["vms"][0].update(name="a\x1b[2J")), ["can be printed"]),
        (changed(lambda it: it["vms"][0].update(size=10**400, max=10**400)), ["'idle'", "no host"]),
        (json.dumps(GOOD).replace('"at": 0', '"at": ' + "9" * 5000), ["line 1"]),
    ],
)
def test_a_damaged_trace_is_one_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        trace.read(path)
    said = str(caught.value)
    assert "\n" not in said
    for word in (str(path), *words):
        assert word in said


def test_random_damage_to_a_trace_raises_nothing_but_our_own_errors(tmp_path: Path) -> None:
    choose = Random(4)
    good = two_vm_trace(tmp_path / "good", 3).read_bytes()
    path = tmp_path / "damaged"
    outcomes = {"replayed": 0, "error": 0}
    digits = [at for at, byte in enumerate(good) if byte in b"0123456789"]
    for number in range(400):
        data = bytearray(good)
        for _ in range(choose.randint(1, 3)):
            if number % 2:  # numbers that differ
                data[choose.choice(digits)] = choose.choice(b"0123456789")
            else:
                data[choose.randrange(len(data))] = choose.choice(b'0159-.e"{}[],:tn \x00\xff\n')
        path.write_bytes(data)
        try:
            replay(trace.read(path), OwnPolicy())
            outcomes["replayed"] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes["error"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no trace"):
        trace.read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\x80\x81\x82" * 100)
    with pytest.raises(InputError, match="not text"):
        trace.read(tmp_path / "binary")


# The command.


def test_two_policies_are_compared_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = two_vm_trace(tmp_path / "trace", 40)
    mine = tmp_path / "no_tax.py"
    mine.write_text(NO_TAX)
    figures = tmp_path / "figures.json"
    arguments = ["host", "simulate", str(recorded), "--policy", str(mine), "--json", str(figures)]
    assert run_command(arguments) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if "no_tax" in line]
    assert "180.0" in rows[0]
    for words in ("idle", "busy", "default", "level high", "1170"):
        assert words in shown
    ours, theirs = json.loads(figures.read_text())
    assert (ours["policy"], theirs["policy"]) == ("default", "no_tax")
    assert ours["vms"]["busy"]["held"] >= 1.3 * theirs["vms"]["busy"]["held"]


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, (idle, busy) = two_vms(360 * MIB, Parameters())
    vms = [replace(idle, name="[/]"), replace(busy, name="[red]$x")]
    path = tmp_path / "trace"
    path.write_text(trace.line(0, host, vms) + trace.line(1, host, vms))
    mine = tmp_path / "[b]$.py"
    mine.write_text(NO_TAX)
    arguments = ["host", "simulate", str(path), "--policy", str(mine)]
    assert run_command(arguments) == 0
    shown = capsys.readouterr().out
    for name in ("[/]", "[red]$x", "[b]$"):
        assert name in shown
    if importlib.util.find_spec("matplotlib"):
        assert run_command([*arguments, "--picture", str(tmp_path / "x.png")]) == 0


def test_one_policy_or_two_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = two_vm_trace(tmp_path / "trace", 2)
    assert run_command(["host", "simulate", str(recorded)]) == 0
    assert "default" in capsys.readouterr().out
    mine = [tmp_path / name for name in ("one.py", "two.py", "three.py")]
    for path in mine:
        path.write_text(NO_TAX)
    given = [word for path in mine for word in ("--policy", str(path))]
    assert run_command(["host", "simulate", str(recorded), *given[:4]]) == 0
    shown = capsys.readouterr().out
    assert "one" in shown
    assert "two" in shown
    assert "default" not in shown
    assert run_command(["host", "simulate", str(recorded), *given]) == 2


def test_a_picture_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recorded = two_vm_trace(tmp_path / "trace", 2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_command(["host", "simulate", str(recorded), "--picture", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capfd.readouterr().err


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib (pip install matplotlib)")
    picture = tmp_path / "x.png"
    assert (
        run_command(["host", "simulate", str(two_vm_trace(tmp_path / "t")), "--picture", str(picture)]) == 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        run_command(["host", "simulate", str(tmp_path / "t"), "--picture", str(tmp_path / "no/x.png")]) == 2
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["host", "simulate"], ["TRACE"]),
        (["host", "simulate", "/nonexistent/trace"], ["/nonexistent/trace", "JSON lines"]),
        (["host", "simulate", "/dev/null", "--policy", "/nonexistent/p.py"], ["/nonexistent/p.py"]),
        (["host", "simulat"], ["simulat"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_our_own_policy_and_a_files_are_policies() -> None:
    policies: list[MemoryPolicy] = [OwnPolicy()]
    assert [policy.name for policy in policies] == ["default"]
