"""subprocess and a guest, side by side: the same cases, the same results.

The guest's side is the real agent, as a process of this host.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringzero.machine.drive import Driven

from .agents import agent_here

PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


class Native:
    """subprocess, with what the guest's side has by default."""

    def run(self, args: Any, **how: Any) -> Any:
        if "input" not in how:
            how.setdefault("stdin", DEVNULL)
        if not {"stdout", "stderr", "capture_output"} & how.keys():
            how["capture_output"] = True
        how.setdefault("env", ENVIRONMENT)
        return subprocess.run(args, **how)

    def popen(self, args: Any, *rest: Any, **how: Any) -> Any:
        how.setdefault("stdin", DEVNULL)
        how.setdefault("env", ENVIRONMENT)
        return subprocess.Popen(args, *rest, **how)


@pytest.fixture(scope="module")
def here() -> Iterator[Driven]:
    with agent_here() as driven:
        yield driven


@pytest.fixture(params=["subprocess", "guest"])
def vm(request: pytest.FixtureRequest) -> Any:
    return Native() if request.param == "subprocess" else request.getfixturevalue("here")


def outcome(what: Any) -> Any:
    """Return a result, or an exception with all that is known of it, so that two can be compared."""
    try:
        done = what()
    except subprocess.SubprocessError as error:
        return type(error), dict(vars(error)), str(error)
    except Exception as error:
        return type(error), error.args, getattr(error, "filename", None), str(error)
    return done.args, done.returncode, done.stdout, done.stderr


SCRIPT = ["sh", "-c", "cat; echo out; echo err >&2; exit 3"]
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("plain", ["true"], {}),
    ("one word", "true", {}),
    ("a path", Path("/bin/true"), {}),
    ("bytes", [b"echo", b"\xff\xfe"], {}),
    ("status", ["sh", "-c", "exit 9"], {}),
    ("status 255", ["sh", "-c", "exit 255"], {}),
    ("signal", ["sh", "-c", "kill -9 $$"], {}),
    ("outputs", SCRIPT, {}),
    ("input", SCRIPT, {"input": b"in\r\n"}),
    ("text", SCRIPT, {"input": "ä\n", "text": True}),
    ("line ends", ["printf", r"a\r\nb\rc\n"], {"text": True}),
    ("line ends in bytes", ["printf", r"a\r\nb\rc\n"], {}),
    ("encoding", ["printf", r"\344"], {"encoding": "latin-1"}),
    ("errors", ["printf", r"\344"], {"errors": "replace", "encoding": "utf-8"}),
    ("bad text", ["printf", r"\344"], {"encoding": "utf-8"}),
    ("universal newlines", ["echo", "x"], {"universal_newlines": True}),
    ("contradiction", ["true"], {"text": True, "universal_newlines": False}),
    ("check", SCRIPT, {"check": True}),
    ("check of a signal", ["sh", "-c", "kill -15 $$"], {"check": True}),
    ("check of text", SCRIPT, {"check": True, "text": True}),
    ("merged", ["sh", "-c", "echo a; echo b >&2; echo c"], {"stdout": PIPE, "stderr": STDOUT}),
    ("stdout alone", SCRIPT, {"stdout": PIPE, "stderr": DEVNULL}),
    ("stderr alone", SCRIPT, {"stdout": DEVNULL, "stderr": PIPE}),
    ("nothing", SCRIPT, {"stdout": DEVNULL, "stderr": DEVNULL}),
    ("capture and stdout", ["true"], {"capture_output": True, "stdout": PIPE}),
    ("input and stdin", ["true"], {"input": b"x", "stdin": PIPE}),
    ("no such command", ["nonesuch-at-all"], {}),
    ("not executable", ["/etc/passwd"], {}),
    ("a folder", ["/etc"], {}),
    ("no such directory", ["true"], {"cwd": "/nonesuch"}),
    ("a directory", ["pwd"], {"cwd": "/usr"}),
    ("environment", ["sh", "-c", 'echo "$A"'], {"env": {"A": "b  c=d", **ENVIRONMENT}}),
    ("no environment", ["/usr/bin/env"], {"env": {}}),
    ("umask", ["sh", "-c", "umask"], {"umask": 0o27}),
    ("timeout", ["sh", "-c", "echo begun; exec sleep 60"], {"timeout": 0.5}),
    ("timeout of text", ["sh", "-c", "echo begun; exec sleep 60"], {"timeout": 0.5, "text": True}),
    ("timeout with nothing said", ["sleep", "60"], {"timeout": 0.2}),
    (
        "timeout with input",
        ["sh", "-c", "echo begun; exec sleep 60"],
        {"timeout": 0.5, "input": b"x" * 1_000_000},
    ),
    ("time enough", ["echo", "x"], {"timeout": 60}),
    ("nobody reads the input", ["true"], {"input": b"x" * 1_000_000}),
    ("SIGPIPE is not ignored", ["sh", "-c", "yes | head -1; echo $?"], {}),
    ("no signal is blocked", ["grep", "SigBlk", "/proc/self/status"], {}),
    ("descriptors", ["sh", "-c", "ls /proc/self/fd | wc -l"], {}),
]
AS_ROOT: list[tuple[str, Any, dict[str, Any]]] = [
    ("user", ["id", "-u"], {"user": "nobody"}),
    ("user by number", ["id", "-u"], {"user": 4321}),
    ("group", ["id", "-g"], {"group": "tty"}),
    ("groups", ["id", "-G"], {"user": 4321, "group": 4322, "extra_groups": [4323, "tty"]}),
    ("no right", ["cat", "/etc/shadow"], {"user": "nobody", "extra_groups": [], "group": 65534}),
]


@pytest.mark.parametrize(("args", "how"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_run_as_subprocess_does(here: Driven, args: Any, how: dict[str, Any]) -> None:
    assert outcome(lambda: here.run(args, **how)) == outcome(lambda: Native().run(args, **how))


@pytest.mark.needs_root
@pytest.mark.parametrize(("args", "how"), [case[1:] for case in AS_ROOT], ids=[case[0] for case in AS_ROOT])
def test_users_as_subprocess_has_them(here: Driven, args: Any, how: dict[str, Any]) -> None:
    assert outcome(lambda: here.run(args, **how)) == outcome(lambda: Native().run(args, **how))


def test_megabytes_both_ways(vm: Any) -> None:
    data = os.urandom(3_000_000)
    assert vm.run(["cat"], input=data, timeout=60).stdout == data


def test_a_conversation(vm: Any) -> None:
    with vm.popen(["sh", "-c", "while read x; do echo <$x>; done"], stdin=PIPE, stdout=PIPE) as process:
        pass
    talk = 'while read x; do echo "<$x>"; done; echo end >&2; exit 4'
    with vm.popen(["sh", "-c", talk], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, bufsize=1) as process:
        for word in ("one", "two"):
            process.stdin.write(f"{word}\n")
            assert process.stdout.readline() == f"<{word}>\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.stderr.read() == "end\n"
    assert process.returncode == 4
    assert process.wait() == 4


def test_lines_of_a_stream(vm: Any) -> None:
    with vm.popen(["seq", "100000"], stdout=PIPE, text=True) as process:
        assert sum(int(line) for line in process.stdout) == 5000050000
    assert process.returncode == 0


def test_a_stream_that_is_closed_ends_its_writer(vm: Any) -> None:
    with vm.popen(["yes"], stdout=PIPE) as process:
        assert process.stdout.read(4) == b"y\ny\n"
    assert process.returncode == -signal.SIGPIPE


def test_signals(vm: Any) -> None:
    for send, number in (("terminate", 15), ("kill", 9)):
        process = vm.popen(["sleep", "60"])
        assert process.poll() is None
        getattr(process, send)()
        assert process.wait(20) == -number
        getattr(process, send)()  # nothing, when it has ended
        assert process.poll() == process.returncode == -number
    process = vm.popen(
        ["sh", "-c", 'trap "echo caught; exit 5" USR1; echo on; while :; do sleep 0.01; done'], stdout=PIPE
    )
    assert process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate() == (b"caught\n", None)
    assert process.returncode == 5


def test_a_timeout_loses_nothing(vm: Any) -> None:
    process = vm.popen(["sh", "-c", "echo a; exec sleep 60"], stdin=PIPE, stdout=PIPE, stderr=PIPE)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        process.wait(0.1)
    assert (caught.value.cmd, caught.value.output) == (process.args, None)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        process.communicate(timeout=0.3)
    assert (caught.value.output, caught.value.stderr) == (b"a\n", None)
    process.kill()
    assert process.communicate() == (b"a\n", b"")


def test_files_in_the_place_of_streams(vm: Any, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"content")
    with open(tmp_path / "in", "rb") as read, open(tmp_path / "out", "wb") as write:
        process = vm.popen(["sh", "-c", "cat; echo e"], stdin=read, stdout=write, stderr=DEVNULL)
        assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
        assert process.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"contente\n"


def test_a_pipe_of_the_host(vm: Any) -> None:
    reads, writes = os.pipe()
    process = vm.popen(["cat"], stdin=reads, stdout=PIPE)
    os.close(reads)
    os.write(writes, b"through")
    os.close(writes)
    assert process.communicate()[0] == b"through"


def test_writing_to_one_that_has_ended(vm: Any) -> None:
    process = vm.popen(["true"], stdin=PIPE)
    assert process.wait() == 0
    with pytest.raises(BrokenPipeError):
        process.stdin.write(b"x" * 100_000)
        process.stdin.flush()
    process.__exit__(None, None, None)


def test_what_cannot_be_started_is_known_at_once(vm: Any) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        vm.popen(["nonesuch-at-all"])
    assert caught.value.filename == "nonesuch-at-all"
    with pytest.raises(FileNotFoundError) as caught:
        vm.popen(["true"], cwd="/nonesuch")
    assert caught.value.filename == "/nonesuch"


def test_a_process_has_a_number(vm: Any) -> None:
    with vm.popen(["sh", "-c", "echo $$"], stdout=PIPE, text=True) as process:
        assert int(process.stdout.read()) == process.pid


# --- what the guest's side alone has


def test_a_stream_that_nobody_reads_holds_nobody_else_up(here: Driven) -> None:
    idle = here.popen(["yes"], stdout=PIPE)
    time.sleep(0.2)
    assert here.run(["echo", "on"]).stdout == b"on\n"
    idle.kill()
    assert idle.wait(20) == -9


def test_input_goes_on_after_a_timeout(here: Driven) -> None:
    # CPython 3.11 forgets the input here, and waits for ever.
    process = here.popen(["sh", "-c", "sleep 0.5; wc -c"], stdin=PIPE, stdout=PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(bytes(1_000_000), timeout=0.1)
    with pytest.raises(ValueError, match="Cannot send input after starting communication"):
        process.communicate(b"more")
    assert process.communicate() == (b"1000000\n", None)


def test_many_at_once(here: Driven) -> None:
    results = {}

    def one(number: int) -> None:
        results[number] = here.run(["sh", "-c", f"cat; exit {number}"], input=b"x" * number * 1000)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {number: (done.returncode, len(done.stdout)) for number, done in results.items()} == {
        number: (number, number * 1000) for number in range(40)
    }


def test_a_terminal(here: Driven) -> None:
    command = ["sh", "-c", "tty; stty size; read x; stty size; echo $x"]
    with here.popen(command, stdin=PIPE, stdout=PIPE, window=(33, 111), text=True) as process:
        assert process.stdout.readline().startswith("/dev/pts/")
        assert process.stdout.readline() == "33 111\n"
        process.resize(44, 122)
        process.stdin.write("yes\n")
        process.stdin.flush()
        assert process.stdout.read() == "yes\n44 122\nyes\n"
    assert process.returncode == 0


def test_output_that_is_not_captured_is_this_process_s_own(here: Driven, capfd: Any) -> None:
    done = here.run(["sh", "-c", "echo out; echo err >&2"], capture_output=False)
    assert (done.stdout, done.stderr) == (None, None)
    assert capfd.readouterr() == ("out\n", "err\n")


def test_users_that_are_not_there(here: Driven) -> None:
    from ringzero.errors import InputError

    with pytest.raises(InputError, match="no user 'nonesuch'"):
        here.run(["true"], user="nonesuch")
