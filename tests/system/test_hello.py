"""The guest of our own: the first thing to try, and it needs nothing but the package."""

import os
import subprocess
from pathlib import Path

import pytest

from .conftest import Run


@pytest.mark.parametrize("engine", ["translate", "interpret"])
def test_it_says_what_machine_it_found_itself_on(ringzero: Run, engine: str) -> None:
    done = ringzero("run", "hello", engine=engine)
    assert done.returncode == 0, done.stderr
    for words in (b"long mode", b"255 MiB", b"ringzero", b"page fault    caught", b"powering off"):
        assert words in done.stdout
    assert done.stderr == b""


def test_it_sees_the_memory_that_it_was_given(ringzero: Run) -> None:
    assert b"63 MiB of RAM" in ringzero("run", "hello", "--memory", "64M").stdout


def test_statistics_go_to_standard_error(ringzero: Run) -> None:
    done = ringzero("run", "hello", "--stats")
    assert done.returncode == 0
    assert b"memory.touched_bytes" in done.stderr
    assert b"memory.touched_bytes" not in done.stdout


def test_a_trace_has_an_instruction_a_line(ringzero: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    done = ringzero("run", "hello", "--trace", str(path), engine="interpret")
    assert done.returncode == 0, done.stderr
    with path.open() as file:
        assert sum(1 for _ in file) > 1000


def test_a_trace_that_cannot_be_written(ringzero: Run, tmp_path: Path) -> None:
    done = ringzero("run", "hello", "--trace", str(tmp_path / "no" / "trace"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1


def test_nobody_takes_its_output(ringzero: Run) -> None:
    read, write = os.pipe()
    os.close(read)
    done = ringzero("run", "hello", stdout=write)
    os.close(write)
    assert done.returncode == 2
    assert done.stderr.startswith(b"ringzero: standard output was closed")


def test_it_runs_with_every_stream_closed(ringzero: Run) -> None:
    import sys

    command = f"exec {sys.executable} -m ringzero run hello <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False, timeout=120).returncode in (0, 2)
