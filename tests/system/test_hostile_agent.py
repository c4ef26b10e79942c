"""A guest whose root plays the agent, on the line that an agent begins on: what it can say, and what comes of it."""

import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringzero import Machine
from ringzero.errors import GuestError
from ringzero.machine import guest_process, tar
from ringzero.machine import machine as machine_module
from ringzero.machine.frames import EXIT, HEADER, MAGIC, OUTPUT_MAX, READY, STDOUT, WORD

from .conftest import ENGINE

pytestmark = pytest.mark.needs_debian

TAKE_OVER = """
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
cat /root/ready >&3
(while cat /root/lies; do :; done) >&3 2>/dev/null &
exec cat <&3 >/dev/null
"""


def frame(kind: int, number: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, 0, number, len(payload)) + payload


@pytest.fixture
def guest() -> Iterator[Machine]:
    with Machine("debian", memory="128M", engine=ENGINE, shell=False) as machine:
        machine.run(["true"], check=True)
        while not machine._ports.is_open("org.ringzero.agent"):  # the true one has left the line
            time.sleep(0.05)
        yield machine


def lie(guest: Machine, lies: bytes) -> None:
    """Have the guest's root say on the first line that it is an agent, and then `lies` for ever."""
    guest.path("/root/ready").write_bytes(frame(READY, 0, MAGIC + WORD.pack(4321)))
    guest.path("/root/lies").write_bytes(lies)
    with pytest.raises(GuestError, match="started again"):
        guest.run(["sh", "-c", TAKE_OVER], timeout=60)


def all_numbers(kind: int, payload: bytes) -> bytes:
    """For the commands that will be asked for next: the first four are used up."""
    return b"".join(frame(kind, number, payload) for number in range(5, 10))


LIES = {
    "flood": all_numbers(STDOUT, b"y" * 500),
    "outside": all_numbers(STDOUT, tar._head(tar.Member("../out", "0", 0o644, 5, 0)) + b"x" * 512),
    "endless": all_numbers(STDOUT, tar._head(tar.Member(".", "5", 0o755, 0, 0))),
    "ends": all_numbers(EXIT, WORD.pack(7)),
    "enormous": HEADER.pack(STDOUT, 0, 1, OUTPUT_MAX + 1) * 64,
    "noise": bytes(range(256)) * 8,
}


@pytest.mark.parametrize("lies", LIES.values(), ids=LIES)
def test_what_a_false_agent_can_do(
    guest: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lies: bytes
) -> None:
    monkeypatch.setattr(guest_process, "PATIENCE", 0.2)
    monkeypatch.setattr(machine_module, "AGAIN_TIMEOUT", 0.3)
    lie(guest, lies)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = guest.files.within(0.3)
    (tmp_path / "in").mkdir()
    for work in (
        lambda: guest.run(["true"], timeout=0.3, check=True),
        lambda: files.read_bytes("/etc/passwd", most=1 << 20),
        lambda: files.get("/root", tmp_path / "in" / "copied", most=1 << 20),
        lambda: files.path("/root").stat(),
    ):
        began = time.monotonic()
        with pytest.raises((GuestError, OSError, subprocess.SubprocessError)):
            work()
        assert time.monotonic() - began < 60
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert {path.name for path in (tmp_path / "in").iterdir()} <= {"copied"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
