"""`tools/dev soak` finds what is wrong in what a guest says, and tells it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from house.shell import ROOT
from house.soak import command, kinds
from house.soak.kinds import Compile, Pipelines, Torture
from ringzero import images
from ringzero.errors import GuestEnded

NUMBERS = "7d6f9c0d8ee9b9d6d4ca0f0ac1cc5f6e9d2c3d0e0d6e4f5a9b8c7d6e5f4a3b2c"


class Guest:
    """Stands in for a Machine: says what it is told to."""

    end_reason: str | None = None

    def __init__(self, output: str = "", errors: str = "", status: int = 0) -> None:
        self.output, self.errors, self.status = output, errors, status
        self.scripts: list[str] = []

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_ready(self, timeout: float) -> bool:
        return True

    def panic_message(self) -> str | None:
        return None

    def run(self, args: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.scripts.append(args[-1])
        if args == ["dmesg"]:
            return subprocess.CompletedProcess(args, 0, "traps: a fault\n", "")
        return subprocess.CompletedProcess(args, self.status, self.output, self.errors)


def test_pipelines_are_right_only_with_every_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "sum_of_numbers", lambda last: NUMBERS)
    assert Pipelines().round(Guest(f"{NUMBERS}\n" * 3), 1.0) == []
    assert Pipelines().round(Guest(f"{NUMBERS}\n{NUMBERS}\nother\n"), 1.0) == [
        f"reverse: other instead of {NUMBERS}"
    ]
    assert len(Pipelines().round(Guest(f"{NUMBERS}\n"), 1.0)) == 2
    assert Pipelines().round(Guest(f"{NUMBERS}\n" * 3, "Segmentation fault\n"), 1.0) == ["Segmentation fault"]
    assert len(Pipelines().round(Guest(f"{NUMBERS}\n" * 3, status=139), 1.0)) == 1


def test_the_sums_are_those_of_seq_itself() -> None:
    seq = subprocess.run("seq 1 123 | sha256sum", shell=True, check=True, capture_output=True, text=True)
    assert kinds.sum_of_numbers(123) == seq.stdout.split()[0]


def test_torture_is_right_only_when_it_came_to_its_end() -> None:
    good = "ran heap 3\ntorture: 3 tests, 0 wrong\n"
    assert Torture().round(Guest(good), 1.0) == []
    assert Torture().round(Guest("WRONG heap: 1\n" + good, status=1), 1.0) == ["WRONG heap: 1"]
    assert Torture().round(Guest(good, status=1), 1.0) == ["torture ended with status 1"]
    assert Torture().round(Guest("ran heap 3\n"), 1.0) == ["torture did not come to its end"]
    assert Torture().round(Guest(""), 1.0) == ["torture did not come to its end"]


def test_compiling_is_compared_with_this_host() -> None:
    kind = Compile(wanted=["a", "b", "c", "d"], command=["cc1"])
    assert kind.round(Guest("a\nb\nc\nd\n"), 1.0) == []
    assert kind.round(Guest("a\nx\nc\nd\n"), 1.0) == ["-O1: x instead of b"]


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Guest]]:
    """The machines of a soak, one after the other."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"12345")
    queue: list[Guest] = []
    monkeypatch.setattr(images, "pull", lambda _: images.Image("debian", initrd, initrd, agent=True))
    monkeypatch.setattr(command, "Machine", lambda *_, **__: queue.pop(0))
    yield queue


class Once:
    """A kind with one file, whose rounds say what the guest's output says."""

    memory = "64M"

    def prepare(self, scratch: Path) -> dict[str, Path]:
        (scratch / "file").write_text("contents of the file")
        return {"file": scratch / "file"}

    def round(self, machine: Any, limit: float) -> list[str]:
        if machine.output == "ended":
            raise GuestEnded("it ended", "panic")
        if machine.output == "late":
            raise subprocess.TimeoutExpired("x", limit)
        return list(machine.run(["x"]).stdout.splitlines())


@pytest.mark.parametrize("said", ["a wrong sum\n", "ended", "late"])
def test_a_wrong_round_is_told_with_the_kernels_words_and_the_next_machine_is_a_new_one(
    guests: list[Guest], capsys: pytest.CaptureFixture[str], said: str
) -> None:
    guests += [Guest(said), Guest("")]
    tally = command.soak(Once(), "translate", 1, seconds=0.2)
    assert (guests, tally.wrong) == ([], 1)
    assert tally.rounds >= 2
    out = capsys.readouterr().out
    assert "WRONG in round 1" in out
    assert "dmesg: traps: a fault" in out
    assert {"a wrong sum\n": "a wrong sum", "ended": "it ended", "late": "did not end within"}[said] in out


def test_there_is_at_least_one_round_and_the_status_tells(
    guests: list[Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "KINDS", {"pipelines": Once})
    guests += [Guest("")]
    assert command.main(["--minutes", "0"]) == 0
    guests += [Guest("wrong\n")]
    assert command.main(["--minutes", "0", "--kind", "pipelines"]) == 1


def test_files_go_behind_the_images_own(guests: list[Guest], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("contents")
    image = command.image_with({"folder/file": file}, tmp_path / "new")
    assert image.initrd is not None
    data = image.initrd.read_bytes()
    assert data.startswith(b"12345" + bytes(3) + b"070701")
    assert b"soak/folder/file" in data


def test_torture_finds_nothing_wrong_on_this_host(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, str(ROOT / "guests/torture/build.py"), str(tmp_path)],
        check=True,
        capture_output=True,
    )
    torture = built.stdout.decode().split()[0]
    done = subprocess.run([torture, "0", "2"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].endswith(" tests, 0 wrong")
    assert " 0\n" not in done.stdout.replace(", 0 wrong\n", "")
    assert subprocess.run([torture, "0", "1", "nonsense"], capture_output=True).returncode == 2
