"""The command line: every bad input is one sentence on standard error and status 2, and nothing is a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringzero import cli
from ringzero.cli import quick
from ringzero.cli.app import COMMANDS, application
from ringzero.cli.guest import RunOptions
from ringzero.cli.stats import format_stats

PYTHON_TREE = str(Path(cli.__file__).parents[2])


def ringzero(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": PYTHON_TREE}
    options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(
        [sys.executable, "-m", "ringzero", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=120,
        **options,
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ringzero: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rum"], ["did you mean 'run'", "doctor"]),
        (["run"], ["ringzero run debian", "--kernel"]),
        (["run", "debain"], ["did you mean 'debian'"]),
        (["run", "windows"], ["windows", "debian, debian-full, hello"]),
        (["run", "debian:5.10"], ["5.10", "6.12"]),
        (["run", "hello:2"], ["hello"]),
        (["run", "hello", "--bogus"], ["--bogus"]),
        (["run", "hello", "--memry", "1G"], ["did you mean", "--memory"]),
        (["run", "hello", "--memory"], ["--memory"]),
        (["run", "hello", "--memory", "banana"], ["banana", "256M"]),
        (["run", "hello", "--memory", "-5M"], ["-5M"]),
        (["run", "hello", "--memory", "0"], ["too small"]),
        (["run", "hello", "--memory", "900T"], ["too much"]),
        (["run", "hello", "--engine", "warp"], ["warp", "direct, translate, interpret"]),
        (["run", "hello", "--cpus", "0"], ["0 processors"]),
        (["run", "hello", "--cpus", "many"], ["--cpus"]),
        (["run", "hello", "--timeout", "soon"], ["--timeout"]),
        (["run", "hello", "--timeout", "0"], ["--timeout", "above 0"]),
        (["run", "hello", "--timeout", "nan"], ["--timeout"]),
        (["run", "hello", "--", "ls"], ["agent"]),
        (["run", "debian", "--"], ["command"]),
        (["run", "debian", "uname", "-a"], ["write -- before", "-- uname -a"]),
        (["run", "debian", "--env", "novalue", "--", "ls"], ["NAME=VALUE"]),
        (["run", "--kernel", "/nonexistent/vmlinuz"], ["/nonexistent/vmlinuz", "does not exist"]),
        (["run", "--kernel", "/"], ["not a regular file"]),
        (["run", "--kernel", "/dev/zero"], ["not a regular file"]),
        (["run", "--kernel", "/dev/null"], ["not a regular file"]),
        (["run", "--kernel", ""], ["--kernel"]),
        (["pull"], ["IMAGE"]),
        (["pull", "windows"], ["windows"]),
        (["pull", "debian", "--kernel", "2.4"], ["2.4", "6.1"]),
        (["images", "extra"], ["extra"]),
        (["doctor", "--bogus"], ["--bogus"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str]) -> None:
    refused(ringzero(*arguments), *words)


def test_bad_kernels_and_initramfs(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("this is no kernel\n" * 100)
    refused(ringzero("run", "--kernel", str(text)), str(text))
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    refused(ringzero("run", "--kernel", str(empty)), "empty")
    half = tmp_path / "half"
    half.write_bytes(b"\0" * 0x1FE + b"\x55\xaa" + b"\0" * 100)
    refused(ringzero("run", "--kernel", str(half)), str(half))
    elf = tmp_path / "elf"
    elf.write_bytes(b"\x7fELF" + b"\2\1\1" + bytes(20))
    refused(ringzero("run", "--kernel", str(elf)), str(elf))
    refused(ringzero("run", "--kernel", str(text), "--initrd", str(tmp_path / "none")), "initramfs", "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_kernel(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    refused(ringzero("run", "--kernel", str(path)), "permissions")


def test_output_that_nobody_takes() -> None:
    read, write = os.pipe()
    os.close(read)
    refused(ringzero("--help", stdout=write), "closed")
    os.close(write)
    with open("/dev/full", "w") as full:
        refused(ringzero("--help", stdout=full), "No space left")


def test_no_apt_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(ringzero("pull", "debian"), "apt-get", "ringzero run --kernel", "ringzero run hello")
    refused(ringzero("run", "debian", "--", "true"), "apt-get", "ringzero run hello")


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused(ringzero("pull", "debian"), "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (("Linux", "aarch64"), "aarch64"),
        (("Darwin", "x86_64"), "Darwin"),
        (("Linux", "i686"), "i686"),
    ],
)
def test_another_host(
    facts: tuple[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = os.uname_result((facts[0], "host", "1", "1", facts[1]))
    monkeypatch.setattr(os, "uname", lambda: fake)
    assert cli.run_command(["run", "hello"]) == 2
    assert words in capfd.readouterr().err


def test_a_defect_is_named_as_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(quick, "read_run", broken)
    assert cli.run_command(["run", "hello"]) == 1
    said = capfd.readouterr().err
    assert "defect" in said
    assert "ZeroDivisionError" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_examples(command: str) -> None:
    done = ringzero(*([command] if command else []), "--help")
    assert done.returncode == 0
    assert "Usage: ringzero" in done.stdout
    if command in ("", "run", "pull"):
        assert "Examples:" in done.stdout


def test_version() -> None:
    assert ringzero("--version").stdout.startswith("ringzero ")


def test_images_and_doctor_say_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed = ringzero("images")
    assert listed.returncode == 0
    for word in ("hello", "debian:6.1", "debian:6.12", "ringzero pull debian"):
        assert word in " ".join(listed.stdout.split())
    assert "FSGSBASE" in ringzero("doctor").stdout


# --- the short way and the long way read the same -------------------------------------------------------------


class Read(Exception):
    """Carries what the long way read."""


def slowly(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> RunOptions | None:
    from ringzero.cli import run as run_module

    def stop(options: RunOptions) -> int:
        raise Read(options)

    monkeypatch.setattr(run_module, "run_guest", stop)
    try:
        application().main(args=arguments, prog_name="ringzero", standalone_mode=False)
    except Read as read:
        return read.args[0]
    except Exception:
        return None
    return None


@pytest.mark.parametrize(
    "words",
    [
        "hello",
        "debian -- true",
        "debian -- sh -c exit\\ 7 --memory -- x",
        "debian --memory 512M --cpus 2 --engine interpret --timeout 1.5",
        "debian --memory=512M --cpus=2",
        "--kernel a --initrd b --append console=ttyS0\\ panic=-1 --trace t --stats --verbose",
        "debian -t -e A=b -e C=d -w /tmp -v -- env",
        "--append= hello",
        "debian --tty --cwd / --env X=",
        "debian:6.12 --kaslr -- true",
        "--kernel a --device debug-exit --device=pc-testdev",
        "hello --timeout 1e3",
    ],
)
def test_the_short_way_reads_what_typer_reads(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["run", *(word.replace("\\ ", " ") for word in words.replace("\\ ", "\0").split(" "))]
    arguments = [word.replace("\0", " ") for word in arguments]
    fields = quick.read_run(arguments)
    assert fields is not None
    assert RunOptions(**fields) == slowly(arguments, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        "doctor",
        "run --help",
        "run -h",
        "run hello --memory",
        "run hello --bogus",
        "run hello extra",
        "run hello --cpus two",
        "run hello --stats=yes",
        "run hello --append --stats",
        "run hello -tv",
        "--version",
        "",
    ],
)
def test_what_is_not_plain_is_left_to_typer(words: str) -> None:
    assert quick.read_run(words.split()) is None


def test_both_ways_know_the_same_options() -> None:
    command = application().get_command(None, "run")
    known = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")}
    assert known - {"--help", "-h"} == set(quick.OPTIONS)


def test_statistics_are_readable() -> None:
    text = format_stats(
        {"tlb.hits": 999, "tlb.misses": 1, "translate.time_ns": 2_500_000, "exits.io": 1234567}
    )
    assert "1,234,567" in text
    assert "2.500 ms" in text
    assert "tlb.hit_rate" in text
    assert "99.900 %" in text
