"""Several processors on one memory: our guest of that name, and what hostile ones do to each other."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ringzero import Machine
from ringzero._core import CoreError, Vm

Build = Callable[[str], Path]
CLEAN = {"poweroff", "reboot", "panic", "triple-fault", "stopped"}


def run(
    guest: Path, engine: str, cpus: int, append: str = "", patience: float = 60.0
) -> tuple[str, list[str]]:
    """Run a guest to its end, or stop it after `patience` seconds; return why it ended and what it said."""
    output = bytearray()
    with Machine(
        kernel=guest, engine=engine, memory="64M", cpus=cpus, append=append, console=output.extend
    ) as machine:
        reason = machine.wait(patience)
        if reason is None:
            machine.stop()
            reason = machine.end_reason
    assert reason is not None
    return reason, output.decode("ascii", "replace").replace("\r", "").splitlines()


@pytest.mark.parametrize("cpus", [2, 3])
def test_processors_agree_on_memory_code_and_interrupts(cpus: int, engine: str, build: Build) -> None:
    reason, lines = run(build("processors"), engine, cpus)
    assert [line for line in lines if not line.startswith("ok ")] == ["PASS"]
    assert reason == "poweroff"
    assert len(lines) == 31


@pytest.mark.parametrize("cpus", range(2, 17))
def test_up_to_sixteen_start(cpus: int, build: Build) -> None:
    reason, lines = run(build("processors"), "translate", cpus, "start")
    assert (reason, lines[-1]) == ("poweroff", "PASS")
    assert lines[0] == "ok all-started"


@pytest.mark.parametrize("cpus", [0, 17])
def test_more_or_fewer_are_refused_in_one_sentence(cpus: int) -> None:
    with pytest.raises(CoreError, match=f"^machines of {cpus} processors .* give a number from 1 to 16$"):
        Vm(16 << 20, cpus=cpus)


@pytest.mark.parametrize(
    ("what", "ends"),
    [
        # Code at random places may end the machine by any port.
        ("nowhere", CLEAN),
        ("init-self", CLEAN),
        ("triple", {"triple-fault"}),
        ("storm", CLEAN),
    ],
)
def test_hostile_processors(
    what: str, ends: set[str], engine: str, build: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    reason, lines = run(build("hostile_processors"), engine, 4, what, patience=3)
    assert reason in ends
    assert lines[0] == what
    assert "panicked" not in capfd.readouterr().err
