"""Set-up: system packages, virtual environment, guests, Rust core. A step that is done is not done again."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from house.shell import ROOT, VENV, Failed, call, environment, output_of, say, which

BUILTIN = ROOT / "python/ringzero/images/builtin"

# What the build calls, and the Debian and Ubuntu packages that bring it.
SYSTEM_PROGRAMS = {"gcc": "gcc", "make": "make", "git": "git"}
SYSTEM_FILES = {Path("/usr/include/stdio.h"): "libc6-dev"}


def prepare(*, force: bool = False) -> None:
    """Bring the tree to the point where `.venv/bin/ringzero` runs. Does nothing when nothing has changed."""
    system()
    environment_ready()
    guests()
    core(force=force)


def system() -> None:
    """Make sure of compilers and Python's venv module: install them through apt where that is allowed.

    Raises Failed with the command to type when it is not.
    """
    wanted = {package for program, package in SYSTEM_PROGRAMS.items() if which(program) is None}
    wanted |= {package for file, package in SYSTEM_FILES.items() if not file.exists()}
    if not (VENV / "bin/python").exists() and not has_venv():
        wanted.add(f"python3.{sys.version_info.minor}-venv")
    if wanted:
        apt_install(sorted(wanted))
    rust()


def has_venv() -> bool:
    """Say whether this Python can make a virtual environment with pip in it."""
    # Debian's python3 has venv but not ensurepip until python3-venv is installed.
    return output_of([sys.executable, "-c", "import venv, ensurepip"]) is not None


def apt_install(packages: list[str]) -> None:
    """Install Debian packages, or raise Failed with the line to type."""
    line = f"apt-get install -y --no-install-recommends {shlex.join(packages)}"
    if shutil.which("apt-get") is None:
        raise Failed(f"install what these Debian packages hold, then try again: {', '.join(packages)}", 2)
    if os.geteuid() == 0:
        before: list[str] = []
    elif shutil.which("sudo") and output_of(["sudo", "-n", "true"]) is not None:
        before = ["sudo", "-n"]
    else:
        raise Failed(f"some packages are missing; type `sudo {line}`, then try again", 2)
    say(line)
    # A fresh machine or container has no package lists yet.
    for command in (["apt-get", "update", "-q"], shlex.split(line)):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run([*before, *command], env=quiet, stdin=subprocess.DEVNULL).returncode != 0:
            raise Failed(f"`{shlex.join(command)}` failed; type `sudo {line}` yourself, then try again", 2)


def rust() -> None:
    """Make sure of a Rust new enough for Cargo.toml's rust-version, with rustfmt and clippy."""
    wanted = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["rust-version"]
    if which("cargo") is None and which("rustup") is None and os.geteuid() == 0 and apt_has("rustup"):
        apt_install(["rustup"])
    found = rust_version()
    if (found is None or found < version(wanted)) and which("rustup"):
        say(f"rustup: a stable Rust, {wanted} or newer")
        call(["rustup", "toolchain", "install", "stable", "--profile", "minimal"])
        call(["rustup", "default", "stable"])
        found = rust_version()
    if found is None or found < version(wanted):
        have = "there is none on the PATH" if found is None else f"this one is {'.'.join(map(str, found))}"
        raise Failed(
            f"Rust {wanted} or newer is needed and {have}: install it by rustup "
            "(Debian 13, Ubuntu 24.04: `sudo apt-get install rustup && rustup default stable`) and try again",
            2,
        )
    missing = [part for part in ("cargo-fmt", "cargo-clippy") if which(part) is None or not runs(part)]
    if missing and which("rustup"):
        call(["rustup", "component", "add", "rustfmt", "clippy"])
    elif missing:
        raise Failed(f"{' and '.join(missing)} are missing: install rustfmt and clippy beside cargo", 2)


def apt_has(package: str) -> bool:
    """Say whether apt could install a package: Debian 13 and Ubuntu 24.04 have rustup, older ones do not."""
    return "Candidate: 1" in (output_of(["apt-cache", "policy", package]) or "")


def runs(part: str) -> bool:
    """Say whether a cargo subcommand answers: rustup leaves a proxy for an absent component."""
    return output_of([part, "--version"]) is not None


def rust_version() -> tuple[int, ...] | None:
    """Return cargo's version, or None if there is none that works."""
    text = output_of(["cargo", "--version"])
    match = re.match(r"cargo (\d+\.\d+)", text or "")
    return version(match[1]) if match else None


def version(text: str) -> tuple[int, ...]:
    """Return '1.90' as (1, 90)."""
    return tuple(int(part) for part in text.split("."))


def environment_ready() -> None:
    """Make .venv with what pyproject.toml asks for, when it or the interpreter has changed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    # The interpreter's own path is part of it: a venv of another Python is another venv. For .venv's own Python it is
    # the path of the Python behind it.
    python = str(getattr(sys, "_base_executable", sys.executable))
    mark = digest_of_text([python, sys.version, *packages])
    if is_stamped("packages", mark) and (VENV / "bin/python").exists():
        return
    say(f"virtual environment in {VENV.relative_to(ROOT)}/, Python {sys.version.split()[0]}")
    if stamp("python").exists() and stamp("python").read_text() != python:
        shutil.rmtree(VENV)
    call([python, "-m", "venv", VENV])
    stamp("python").parent.mkdir(exist_ok=True)
    stamp("python").write_text(python)
    call([VENV / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
    set_stamp("packages", mark)


def guests() -> None:
    """Compile guests/ into python/ringzero/images/builtin/, where the wheel takes them from."""
    mark = digest(files_under([ROOT / "guests"]))
    if is_stamped("guests", mark) and all((BUILTIN / name).exists() for name in stamped_names()):
        return
    BUILTIN.mkdir(parents=True, exist_ok=True)
    say("guests")
    for script in [ROOT / "guests/build.py", *sorted((ROOT / "guests").glob("*/build.py"))]:
        call([sys.executable, script])
    for makefile in sorted((ROOT / "guests").glob("*/Makefile")):
        call(["make", "--no-print-directory", "-C", makefile.parent, f"OUT={BUILTIN}"])
    stamp("guest-names").parent.mkdir(parents=True, exist_ok=True)
    stamp("guest-names").write_text("\n".join(sorted(path.name for path in BUILTIN.iterdir())))
    set_stamp("guests", mark)


def stamped_names() -> list[str]:
    """Return the names of the guests that the last build made."""
    return stamp("guest-names").read_text().split() if stamp("guest-names").exists() else []


def core(*, force: bool = False) -> None:
    """Build ringzero._core in release mode, and put the package into .venv in editable form."""
    # Python sources are used where they stand, so only these make a new build necessary.
    mark = digest(
        [*files_under([ROOT / "crates"]), ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "pyproject.toml"]
    )
    built = list((ROOT / "python/ringzero").glob("_core*.so"))
    if not force and built and is_stamped("core", mark) and (VENV / "bin/ringzero").exists():
        return
    say("ringzero._core, release profile (some minutes the first time)")
    log = VENV / "build.log"
    with log.open("w") as output:
        built_it = subprocess.run(
            [VENV / "bin/maturin", "develop", "--release"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if built_it.returncode != 0:
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-60:]), flush=True)
        raise Failed(f"maturin could not build ringzero._core: the end of {log.relative_to(ROOT)} is above")
    # cargo may have written Cargo.lock just now, so the mark is taken again.
    mark = digest(
        [*files_under([ROOT / "crates"]), ROOT / "Cargo.toml", ROOT / "Cargo.lock", ROOT / "pyproject.toml"]
    )
    set_stamp("core", mark)


def wheel() -> None:
    """Make an abi3 wheel in dist/."""
    system()
    environment_ready()
    guests()
    call([VENV / "bin/maturin", "build", "--release", "--out", "dist"])


def files_under(folders: Iterable[Path]) -> list[Path]:
    """Return all files below some folders, without what a build leaves there."""
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not {"target", "build", "__pycache__"} & set(path.relative_to(ROOT).parts)
    )


def digest(files: Iterable[Path]) -> str:
    """Return a digest of the names and contents of some files: unlike times, it survives a checkout."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.relative_to(ROOT)}\0".encode())
        whole.update(path.read_bytes() if path.exists() else b"absent")
    return whole.hexdigest()


def digest_of_text(parts: Iterable[str]) -> str:
    """Return a digest of some strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def stamp(name: str) -> Path:
    """Return the file that remembers what a step was last done with."""
    return VENV / "stamps" / name


def is_stamped(name: str, mark: str) -> bool:
    """Say whether a step was last done with this very input."""
    return stamp(name).exists() and stamp(name).read_text() == mark


def set_stamp(name: str, mark: str) -> None:
    """Remember what a step was done with."""
    stamp(name).parent.mkdir(parents=True, exist_ok=True)
    stamp(name).write_text(mark)
