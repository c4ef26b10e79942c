"""Guests that mean harm, or are out of their mind: each ends or is stopped, and this process lives on.

That a machine is stopped within seconds is asserted by `run`; the monitor's own defects end a machine as 'error: ...'.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ringzero import Machine, _core

Run = Callable[..., Any]
CLEAN = {"poweroff", "reboot", "panic", "triple-fault", "stopped"}


@pytest.fixture(autouse=True)
def no_panic(capfd: pytest.CaptureFixture[str]) -> Any:
    """A panic of the core prints to standard error, whatever becomes of its thread."""
    yield
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("seed", range(1, 7))
def test_random_bytes_as_kernel_code(seed: int, engine: str, run: Run) -> None:
    end = run("hostile_random", engine, f"seed={seed}", patience=3)
    assert end.reason in CLEAN
    assert end.lines[0] == f"random bytes, seed {seed}, 2000 rounds"


def test_random_bytes_as_user_code_leave_the_kernel_whole(run: Run) -> None:
    counts = []
    for engine in _core.engines():
        end = run("hostile_random_user", engine)
        assert (end.reason, end.lines[-1]) == ("poweroff", "PASS")
        rows = [line.split() for line in end.lines if line.startswith("vector")]
        counts.append(Counter({int(row[1].rstrip(":")): int(row[2]) for row in rows}))
        assert counts[-1].total() == 3000
    # A round in 3000 branches on a flag that the manual leaves undefined; and a clock ends rounds that loop.
    assert (counts[0] - counts[-1]).total() <= 4


def test_tables_rewritten_at_random(engine: str, run: Run) -> None:
    end = run("hostile_page_tables", engine, patience=10)
    assert end.reason in CLEAN
    assert "round 15000" in end.lines


def test_every_port_and_the_device_hole(engine: str, run: Run) -> None:
    end = run("hostile_sprayer", engine, patience=20)
    assert end.reason in CLEAN
    assert "spraying the ports that end the machine" in end.lines


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_balloon_of_lies(cpus: int, engine: str, build: Callable[[str], Any]) -> None:
    output = bytearray()
    kernel = build("hostile_balloon")
    with Machine(kernel=kernel, engine=engine, cpus=cpus, memory="64M", console=output.extend) as machine:
        # It says this and gives the page that it runs on: what comes then is nobody's to say.
        reason, patience = None, time.monotonic() + 60
        while reason is None and b"and now everything" not in output and time.monotonic() < patience:
            reason = machine.wait(0.1)
        reason = reason or machine.wait(0.5)
        machine.stop()
        lines = output.decode("ascii", "replace").replace("\r", "").splitlines()
        assert (reason or "stopped") in CLEAN
        assert lines[-2:] == ["so far so good", "and now everything"], lines
        assert machine._vm.memory_audit() == []
        counts = machine._vm.balloon_stats(ask=False)
        assert min(counts[name] for name in ("refused_inflations", "refused_deflations", "malformed")) > 10


def test_an_interrupt_storm_passes(engine: str, run: Run) -> None:
    end = run("hostile_interrupt_storm", engine)
    assert (end.reason, end.lines[-1]) == ("poweroff", "PASS")


def test_a_triple_fault_is_told(engine: str, run: Run) -> None:
    end = run("hostile_triple_fault", engine)
    assert (end.reason, end.lines) == ("triple-fault", ["about to fault three times"])


@pytest.mark.parametrize("name", ["cli_loop", "halt"])
def test_a_guest_without_interrupts_is_stopped(name: str, engine: str, run: Run) -> None:
    end = run(f"hostile_{name}", engine, patience=1)
    assert end.reason == "stopped"
    assert len(end.lines) == 1


def test_a_loop_can_be_looked_at_and_goes_on(engine: str, build: Callable[[str], Any]) -> None:
    with Machine(kernel=build("hostile_cli_loop"), engine=engine, memory="16M") as machine:
        machine.console.expect("interrupts off")
        seen = set()
        for _ in range(20):
            machine.pause()
            registers = machine.registers()
            seen.add(registers["rip"])
            assert registers["cs"] == 0x10
            assert registers["rflags"] & 0x200 == 0
            assert machine.read_memory(registers["rip"], 1) in (b"\xeb", b"\xfa", b"\xee", b"\x5b")
            machine.resume()
        assert machine.wait(0.05) is None
        assert len(seen) <= 3
