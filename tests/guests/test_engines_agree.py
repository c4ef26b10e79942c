"""Our self-checking guests on both engines: each passes, and leaves the same registers and memory behind."""

from collections.abc import Callable
from typing import Any

import pytest

from ringzero import _core

GUESTS = [
    "across",
    "alignment",
    "arithmetic",
    "debug",
    "exceptions",
    "flow",
    "interrupts",
    "keys",
    "paging",
    "self_modifying",
    "simd",
    "strings",
    "system",
    "telling",
    "xsave",
]

# How many instructions behind the OUT that powers it off a processor still runs is no part of the architecture: the
# guests go on to another OUT and a halt, which change these two.
AFTER_THE_END = {"rax", "rip"}

# What a clock interrupted is in guests/interrupts.c's `rip_at`, and left behind on the stack: a page each.
PAGES_OF_CLOCKS = {"interrupts": 2}


# What a guest wants of its processor beyond the usual.
CPU = {"keys": "+pku,+pks"}


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_passes_and_ends_alike_on_both_engines(name: str, run: Callable[..., Any]) -> None:
    ends = {engine: run(name, engine, cpu=CPU.get(name, "")) for engine in _core.engines()}
    for engine, end in ends.items():
        assert end.reason == "poweroff", engine
        assert [line for line in end.lines if line.startswith("FAIL")] == [], engine
        assert end.lines[-1] == "PASS", engine
        assert sum(line.startswith("ok ") for line in end.lines) > 5, engine
    specification = ends["interpret"]
    for engine, end in ends.items():
        assert end.lines == specification.lines, engine
        changed = {n for n, value in end.registers.items() if value != specification.registers[n]}
        assert changed <= AFTER_THE_END, engine
        differing = specification.differing_pages(end)
        assert len(differing) <= PAGES_OF_CLOCKS.get(name, 0), [hex(page) for page in differing]


def test_hello_tells_the_same_machine_on_both_engines(run: Callable[..., Any]) -> None:
    told = []
    for engine in _core.engines():
        end = run("hello", engine)
        assert end.reason == "poweroff"
        assert "powering off" in end.lines[-1]
        # Lines with measured times apart.
        told.append([line for line in end.lines if " ms" not in line and "MHz" not in line])
    assert all(lines == told[0] for lines in told)
    assert len(told[0]) > 10
