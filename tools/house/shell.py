"""Running other programs, and saying which one runs."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"


class Failed(Exception):
    """The command cannot go on; the message is one sentence for the person who typed it."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def say(text: str) -> None:
    """Print a progress line, in order with the output of the programs that run."""
    print(f"== {text}", flush=True)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for child processes: the venv and cargo on the PATH."""
    result = dict(os.environ)
    # rustup's own folder is often not on the PATH of a non-login shell, and CI has no login shell.
    cargo_home = Path(result.get("CARGO_HOME", Path.home() / ".cargo"))
    result["PATH"] = os.pathsep.join(
        [str(VENV / "bin"), result.get("PATH", os.defpath), str(cargo_home / "bin")]
    )
    result["VIRTUAL_ENV"] = str(VENV)
    result.pop("PYTHONHOME", None)
    result.update(extra or {})
    return result


def which(program: str) -> str | None:
    """Return the path of a program as the children of tools/dev would find it."""
    return shutil.which(program, path=environment()["PATH"])


def status_of(command: Sequence[str | Path], *, extra: Mapping[str, str] | None = None) -> int:
    """Run a command at the root of the tree, its output going straight through; return its exit status."""
    return subprocess.run([str(word) for word in command], cwd=ROOT, env=environment(extra)).returncode


def call(command: Sequence[str | Path], *, extra: Mapping[str, str] | None = None) -> None:
    """Run a command at the root of the tree; raise Failed if it fails."""
    status = status_of(command, extra=extra)
    if status != 0:
        raise Failed(f"`{shlex.join(str(word) for word in command)}` ended with status {status}")


def output_of(command: Sequence[str | Path]) -> str | None:
    """Return what a command prints, or None if it is missing or fails."""
    try:
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def watch(
    command: Sequence[str | Path], *, limit: float | None = None, extra: Mapping[str, str] | None = None
) -> tuple[int, list[str]]:
    """Run a command, pass its output through as it comes, and return (status, lines).

    After `limit` seconds it is killed with all that it started, and the status is 124.
    """
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    late = threading.Event()

    def kill_all() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    # A hung test in native code hears no signal handler of Python's, so this is the last word.
    timer = threading.Timer(limit, kill_all) if limit is not None else None
    if timer is not None:
        timer.start()
    lines: list[str] = []
    try:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line.rstrip("\n"))
        status = process.wait()
    except BaseException:
        kill_all()
        process.wait()
        raise
    finally:
        if timer is not None:
            timer.cancel()
    return 124 if late.is_set() else status, lines


def tracked_files() -> list[Path]:
    """Return the files of the project, relative to ROOT: what git tracks or would track."""
    listing = output_of(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"])
    if listing is None:
        raise Failed("`git ls-files` failed: this check wants a git clone and git installed")
    return sorted({Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()})
