"""What all commands of `ringzero bench` have in common: they show, write, and end with status 1 on complaints."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from ringzero.bench import command
from ringzero.errors import InputError


def finish(measured: list[str], report: Path | None) -> list[Any]:
    """Measure this list, each of which is a complaint; return what was shown."""
    shown: list[Any] = []
    command.finish(
        lambda _: measured,
        lambda _, found: shown.append(found),
        lambda found, machine: {"found": found, "machine": machine},
        lambda found: found,
        report,
    )
    return shown


def test_without_complaints_it_shows_and_writes(tmp_path: Path) -> None:
    assert finish([], tmp_path / "report") == [[]]
    written = json.loads((tmp_path / "report").read_text())
    assert written["found"] == []
    assert "processor" in written["machine"]


def test_with_complaints_it_writes_all_the_same_and_ends_with_1(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit) as ended:
        finish(["wrong"], tmp_path / "report")
    assert ended.value.exit_code == 1
    assert json.loads((tmp_path / "report").read_text())["found"] == ["wrong"]


@pytest.mark.parametrize("name", ["boot", "compute", "nano", "system", "programs", "idle", "balloon"])
def test_every_bench_closes_alike(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.touch()
    closed: list[Any] = []
    monkeypatch.setattr(command, "finish", lambda measure, *rest: closed.append((measure, rest)))
    words: dict[str, Any] = {"json": tmp_path / "report"}
    if name == "boot":
        words["kernel"] = [kernel]
    elif name not in ("nano", "idle", "balloon"):
        words["kernel"] = kernel
    getattr(command, name)(**words)
    [(measure, rest)] = closed
    assert measure.__name__ == "measure"
    assert rest[-1] == tmp_path / "report"


def test_a_kernel_file_goes_before_the_series(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.touch()
    assert command.one_kernel("6.1", kernel) == kernel
    with pytest.raises(InputError, match="there is no kernel"):
        command.one_kernel("6.1", tmp_path / "missing")
