"""The programs of `ringzero bench programs`: Debian packages, fetched by the machine's apt, kept in the image cache.

What is kept is one archive of a small root: the programs, the shared objects that they load, and their loader. They are
run through that loader, so that the same files run on this host and in a guest, whatever the host is.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ringzero.errors import FetchError
from ringzero.images.apt import Apt, Progress, no_progress
from ringzero.images.cache import ImageCache

__all__ = ["LIBRARIES", "LOADER", "find_program", "loaded_by", "unpack_programs"]

NAME = "bench-programs"
ARCHIVE = "root.tar"
SUITES = ("bookworm", "bookworm-security", "trixie", "trixie-security")
LOADER, LIBRARIES = "lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu"

# By label; names carry the versions of what they package, and since 2024 some the mark of 64-bit time.
PACKAGES = {
    label: re.compile(pattern)
    for label, pattern in {
        "C library": r"libc6",
        "openssl": r"openssl",
        "openssl's library": r"libssl3(t64)?",
        "python": r"python3\.\d+-minimal",
        "python's modules": r"libpython3\.\d+-minimal",
        "expat": r"libexpat1",
        "zlib": r"zlib1g",
        "sqlite3": r"sqlite3",
        "sqlite3's library": r"libsqlite3-0",
        "readline": r"libreadline8(t64)?",
        "tinfo": r"libtinfo6",
        "xz": r"xz-utils",
        "xz's library": r"liblzma5",
        "C compiler": r"cpp-\d+(-x86-64-linux-gnu)?",
        "isl": r"libisl23",
        "mpc": r"libmpc3",
        "mpfr": r"libmpfr6",
        "gmp": r"libgmp10(t64)?",
        "zstd": r"libzstd1",
    }.items()
}
# Where each program is in its package.
PROGRAMS = {
    "openssl": "usr/bin/openssl",
    "python3": "usr/bin/python3.[0-9]*",
    "sqlite3": "usr/bin/sqlite3",
    "xz": "usr/bin/xz",
    "cc1": "usr/*/gcc/x86_64-linux-gnu/*/cc1",
}


def find_program(root: Path, name: str) -> Path:
    """Return a program of an unpacked root. Raises FetchError when the packages do not hold it."""
    found = sorted(path for path in root.glob(PROGRAMS[name]) if path.is_file())
    if not found:
        raise FetchError(f"the fetched packages do not hold {name}")
    return found[0]


def unpack_programs(into: Path, progress: Progress = no_progress) -> None:
    """Unpack the programs' root into a directory, fetched first when it is not in the cache."""
    cache = ImageCache()
    with cache.locked():
        files = cache.find(NAME)
        if files is None:
            _build(cache, progress)
            files = cache.find(NAME)
    if files is None:
        raise FetchError(f"the programs in {cache.root / NAME} changed while they were written: try again")
    with tarfile.open(files[ARCHIVE]) as archive:
        archive.extractall(into, filter="data")


def _build(cache: ImageCache, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache.root) as scratch_name:
        scratch = Path(scratch_name)
        apt, tree = Apt(scratch, progress), scratch / "tree"
        fetched = apt.fetch(PACKAGES, SUITES, scratch / "debs")
        for _, deb in fetched:
            apt.unpack(deb, tree)
        kept = _kept(tree)
        with (
            cache.writing(NAME, {package.name: package.version for package, _ in fetched}) as directory,
            tarfile.open(directory / ARCHIVE, "w", dereference=True) as archive,
        ):
            for name, path in sorted(kept.items()):
                archive.add(path, name, recursive=False)


def _kept(tree: Path) -> dict[str, Path]:
    """Return what of the packages goes into the root: name there -> file."""
    loaders = sorted(tree.glob("**/ld-linux-x86-64.so.2"))
    if not loaders:
        raise FetchError("the fetched packages do not hold the C library's loader")
    loader = loaders[0].resolve()
    kept = {LOADER: loader}
    for name in PROGRAMS:
        program = find_program(tree, name)
        kept[str(program.relative_to(tree))] = program
        kept |= {f"{LIBRARIES}/{wanted}": path for wanted, path in loaded_by(loader, tree, program).items()}
    for path in tree.glob("usr/lib/python3.[0-9]*/**/*"):
        if path.is_file():
            kept[str(path.relative_to(tree))] = path
    return kept


def loaded_by(loader: Path, tree: Path, program: Path) -> dict[str, Path]:
    """Return the shared objects that a program of an unpacked tree loads, by name. Raises FetchError without them."""
    folders = [path for path in (tree / LIBRARIES, tree / "usr" / LIBRARIES) if path.is_dir()]
    command = [str(loader), "--library-path", ":".join(map(str, folders)), "--list", str(program)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        reason = (listed.stderr.strip().splitlines() or ["the loader says nothing"])[-1]
        raise FetchError(f"the fetched packages do not hold what {program.name} loads: {reason}")
    found = {}
    for wanted, path in re.findall(r"^\s*(\S+) => (.+?)(?: \(0x[0-9a-f]+\))?$", listed.stdout, re.MULTILINE):
        if path == "not found":
            raise FetchError(f"the fetched packages do not hold {wanted}, which {program.name} loads")
        if "/" not in wanted:  # the loader lists itself, by its path
            found[wanted] = Path(path)
    return found
