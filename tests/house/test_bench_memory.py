"""The arithmetic of `ringzero bench memory`, its report, and the program that guests run for it. Nothing is timed."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from ringzero.bench.memory import item, overhead, pattern, services
from ringzero.bench.memory.command import ITEMS, SMALL, MemoryBench
from ringzero.bench.memory.fleet import Tally
from ringzero.bench.memory.item import Figure, Outcome
from ringzero.bench.memory.mixes import MIXES
from ringzero.bench.memory.sharing import Savings
from ringzero.errors import InputError


def test_a_figure_keeps_its_bar_or_misses_it() -> None:
    assert Figure("a", 70, bar=70).meets
    assert not Figure("a", 69.9, bar=70).meets
    assert Figure("a", 8, bar=8, at_most=True).meets
    assert not Figure("a", 8.1, bar=8, at_most=True).meets
    assert Figure("a", 8.1).meets


def test_missed_bars_are_named_and_shown() -> None:
    outcomes = [Outcome("one", "title", [Figure("good", 1, bar=0), Figure("bad", 1, "MiB", 2, theirs=3)])]
    assert item.missed(outcomes) == ["one: bad"]
    assert item.as_json(outcomes, {})["missed"] == ["one: bad"]
    out = io.StringIO()
    item.show(Console(file=out, width=120), outcomes)
    assert "missed" in out.getvalue()
    assert "3 MiB" in out.getvalue()


def test_savings_count_what_is_common_once_and_leave_out_what_was_never_touched() -> None:
    before = Tally(zero=400, private=500, shared=0, image=100, ballooned=0)
    after = Tally(zero=450, private=150, shared=300, image=100, ballooned=0)
    savings = Savings(before, after, pool=80, images=20, passes=4)
    assert savings.shared == 85
    assert savings.common == 40
    assert savings.machine == 250
    assert savings.reclaimed == 75
    assert savings.held == 600
    assert savings.reclaimed_of_held == pytest.approx(100 * 350 / 600)


def test_ballooned_pages_are_not_held() -> None:
    assert Tally(zero=1, private=2, ballooned=4, swapped=8).held == 10


def test_every_item_has_a_small_form_and_others_are_refused() -> None:
    assert ITEMS.keys() == SMALL.keys()
    assert MemoryBench([]).items == list(ITEMS)
    with pytest.raises(InputError, match="there is no item 'nothing'"):
        MemoryBench(["nothing"])


def test_the_mixes_have_the_papers_numbers_of_guests_and_about_its_memory() -> None:
    for mix, count in zip(MIXES, (10, 9, 5), strict=True):
        assert sum(guests for *_, guests, _ in mix.guests) == count
        memory = sum(guests * size for *_, guests, size in mix.guests)
        assert memory == pytest.approx(mix.total, rel=0.01)
        assert mix.percent == pytest.approx(100 * mix.saved / mix.total, abs=0.06)
        assert all(service in services.SERVICES for service, *_ in mix.guests)


def test_the_pattern_is_the_same_for_a_seed_and_another_for_another() -> None:
    first = pattern.run_here(["check", "2", "500", "1"])
    assert first.startswith("PATTERN RIGHT 512 pages, 500 changes, sum ")
    assert pattern.run_here(["check", "2", "500", "1"]) == first
    assert pattern.run_here(["check", "2", "500", "2"]) != first
    assert pattern.run_here(["check", "2", "501", "1"]) != first


def test_what_a_process_takes_is_found_and_its_guests_pages_are_not() -> None:

    program = (
        "import os, mmap, sys\n"
        "held = []\n"
        "for name in ('ringzero-pool', 'ringzero-code'):\n"
        "    fd = os.memfd_create(name); os.ftruncate(fd, 4 << 20); held.append(mmap.mmap(fd, 4 << 20))\n"
        "    held[-1].write(b'x' * (4 << 20))\n"
        "held.append(bytearray(b'y' * (3 << 20)))\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        weight = overhead.weigh(child.pid)
        child.kill()
    assert weight.parts["file in memory ringzero-code"] == 4 << 20
    assert not any("pool" in name for name in weight.parts)
    assert 7 << 20 < weight.total < 40 << 20
    assert weight.processes == 1
