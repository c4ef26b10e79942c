"""tools/dev explains itself, refuses what it does not know, and ends with the status of what it ran."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from house import door, run, setup, tests
from house.shell import Failed, watch

DEV = Path(__file__).resolve().parents[2] / "tools/dev"


def dev(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DEV), *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "command", ["check", "test", "guests", "fuzz", "conformance", "soak", "bench", "build"]
)
def test_help_names_every_command(command: str) -> None:
    assert command in dev("--help").stdout


@pytest.mark.parametrize("words", [["check", "nonsense"], ["test", "nonsense"], ["nonsense"]])
def test_what_it_does_not_know_is_bad_input(words: list[str]) -> None:
    done = dev(*words)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["soak", "bench"])
def test_options_of_another_parser_are_passed_on(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(setup, "prepare", lambda: None)
    monkeypatch.setattr(run, "house_program", lambda _, words: seen.append(["soak", *words]) or 0)
    monkeypatch.setattr(run, "ringzero", lambda words: seen.append(words) or 0)
    assert door.main([command, "--first", "x", "second"]) == 0
    assert seen == [[command, "--first", "x", "second"]]


def test_one_failed_suite_fails_the_whole_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def suite(name: str, status: int) -> tests.Suite:
        def run() -> tuple[int, list[str]]:
            ran.append(name)
            return status, [f"closing line of {name}"]

        return run

    monkeypatch.setattr(setup, "prepare", lambda: None)
    monkeypatch.setattr(tests, "SUITES", {"first": suite("first", 3), "second": suite("second", 0)})
    assert tests.test() == 1
    assert ran == ["first", "second"]
    output = capsys.readouterr().out
    assert "first: FAILED with status 3" in output
    assert "closing line of second" in output


def test_the_digest_sees_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("a")
    before = setup.digest([one])
    assert setup.digest([two]) != before
    one.write_text("b")
    assert setup.digest([one]) != before
    one.unlink()
    assert setup.digest([one]) != before


def test_without_root_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    with pytest.raises(
        Failed, match=r"`sudo apt-get install -y --no-install-recommends gcc libc6-dev`"
    ) as raised:
        setup.apt_install(["gcc", "libc6-dev"])
    assert raised.value.status == 2


@pytest.mark.parametrize("found", [None, (1, 63)])
def test_an_old_rust_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, ...] | None
) -> None:
    monkeypatch.setattr(setup, "which", lambda name: None)
    monkeypatch.setattr(setup, "apt_has", lambda name: False)
    monkeypatch.setattr(setup, "rust_version", lambda: found)
    with pytest.raises(Failed, match=r"Rust 1\.\d+ or newer is needed .*rustup"):
        setup.rust()


@pytest.mark.needs_debian
def test_make_run_without_a_terminal_demonstrates_the_guest_and_ends_with_0() -> None:
    # What `make run` does after the build; the build itself is what made this test possible.
    program = "import sys; from house import run; sys.exit(run.default_guest())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(DEV.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "-cloud-amd64" in done.stdout
    assert done.stdout.rstrip().endswith("--- done")


def test_a_suite_that_hangs_is_stopped_with_all_that_it_started(capfd: pytest.CaptureFixture[str]) -> None:
    status, lines = watch(["sh", "-c", "echo here; sleep 300 & wait"], limit=1)
    assert status == 124
    assert lines == ["here"]


def test_the_status_and_lines_of_a_suite_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    assert watch(["sh", "-c", "echo out; echo error >&2; exit 3"], limit=60) == (3, ["out", "error"])
    assert capfd.readouterr().out == "out\nerror\n"
