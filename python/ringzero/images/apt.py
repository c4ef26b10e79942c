"""Fetch Debian packages through the machine's own apt configuration, as any user.

apt reads the machine's sources and keys, but works in a directory of ours: package lists, caches and
downloads go there, so nothing on the machine changes and root is not needed (apt.conf(5): Dir::State::lists,
Dir::Cache, Dir::Etc::sourcelist). What arrives was checked by apt against the signed lists.

Where the packages are looked for, in this order:
  1. in the lists that the machine has;
  2. in fresh lists of the machine's sources (a container image often has none);
  3. in another suite of the same mirrors (backports, or the neighbouring release).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringzero.errors import FetchError

ESSENTIAL = ("?essential", "usr-is-merged")
"""What every system has: apt-patterns(7). The second says that /bin is /usr/bin already, for which its alternative
brings all of Perl.
"""

Progress = Callable[[str, int, int | None], None]
"""Told of every step: what is being done, how much of it is done, and of how much (bytes; None: not
known).
"""


def no_progress(step: str, done: int, total: int | None) -> None:
    """Say nothing of progress."""


@dataclass(frozen=True)
class Package:
    """One version of a package that can be had."""

    name: str
    version: str
    size: int


@dataclass(frozen=True)
class System:
    """The .deb files of a whole system: those that every system has, which come first, and the others."""

    essential: list[Path]
    others: list[Path]


@dataclass(frozen=True)
class Source:
    """One entry of apt's sources: sources.list(5), in either of its two forms."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def deb822(self) -> str:
        """Return the entry as a paragraph of a .sources file."""
        lines = [
            "Types: deb",
            f"URIs: {' '.join(self.uris)}",
            f"Suites: {' '.join(self.suites)}",
            f"Components: {' '.join(self.components)}",
            *(f"{key}: {value}" for key, value in self.options),
        ]
        return "\n".join(lines) + "\n"


def parse_deb822(text: str) -> Iterator[Source]:
    """Yield the enabled binary sources of a .sources file."""
    # A comment line stands for nothing, wherever it is: it must not end a paragraph.
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for paragraph in re.split(r"\n\s*\n", kept):
        fields: dict[str, str] = {}
        last = ""
        for line in paragraph.splitlines():
            if line[:1] in (" ", "\t") and last:
                fields[last] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                last = name.strip().lower()
                fields[last] = value.strip()
        words = {
            name: tuple(fields.get(name, "").split()) for name in ("types", "uris", "suites", "components")
        }
        if "deb" not in words["types"] or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        options = tuple(
            (name, fields[key])
            for key, name in (("signed-by", "Signed-By"), ("trusted", "Trusted"))
            if key in fields
        )
        yield Source(words["uris"], words["suites"], words["components"], options)


def parse_one_line(text: str) -> Iterator[Source]:
    """Yield the binary sources of a sources.list file."""
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s+([^#]*)", line)
        if match is None:
            continue
        names = {"signed-by": "Signed-By", "trusted": "Trusted"}
        pairs = (option.partition("=") for option in (match[1] or "").split())
        options = tuple((names[key.lower()], value) for key, _, value in pairs if key.lower() in names)
        yield Source((match[2],), (match[3],), tuple(match[4].split()), options)


class Apt:
    """apt with a private state below `directory`, which must exist and be ours."""

    def __init__(self, directory: Path, progress: Progress = no_progress) -> None:
        for tool in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise FetchError(f"Debian's packages are fetched with {tool}, which is not on this machine")
        self._directory = directory
        self._progress = progress
        self._options = [
            f"Dir::Cache={directory / 'cache'}",
            # As root, apt would hand downloads to a user which cannot enter our directory.
            "APT::Sandbox::User=",
            "Acquire::Retries=2",
            "Acquire::http::Timeout=20",
            "Acquire::https::Timeout=20",
        ]
        (directory / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)

    def fetch(
        self, patterns: dict[str, re.Pattern[str]], suites: tuple[str, ...], into: Path
    ) -> list[tuple[Package, Path]]:
        """Fetch, for each label, the newest package whose name matches its pattern; return them in that order.

        `suites` are names of other suites to try on the machine's mirrors when its own suites do not have
        everything. Each .deb is below `into`. Raises FetchError when something cannot be had anywhere.
        """
        places: tuple[Callable[[], None], ...] = (
            lambda: None,
            self._own_lists,
            lambda: self._other_suites(suites),
        )
        problem = FetchError("apt knows of no place to fetch packages from")
        for prepare in places:
            try:
                prepare()
                found = [self._newest(label, pattern) for label, pattern in patterns.items()]
                return [(package, self._download(package, into / package.name)) for package in found]
            except FetchError as error:
                # Lists that are older than the mirror name files which are gone: fresh ones come next.
                problem = error
        raise problem

    def fetch_system(self, packages: Sequence[str], into: Path) -> System:
        """Fetch what a system needs that has no package yet: the essential ones, `packages`, and what these depend on.

        From the machine's own suites alone: a system of several would not hold together. Each .deb is in `into`. Raises
        FetchError when something cannot be had.
        """
        problem = FetchError("apt knows of no place to fetch packages from")
        places: tuple[Callable[[], None], ...] = (lambda: None, self._own_lists)
        for prepare in places:
            try:
                prepare()
                essential = self._closure(ESSENTIAL)
                everything = self._closure([*ESSENTIAL, *packages])
                self._download_closure([*ESSENTIAL, *packages], sum(everything.values()), into)
                return System(
                    essential=[into / name for name in essential],
                    others=[into / name for name in everything if name not in essential],
                )
            except FetchError as error:
                problem = error
        raise problem

    def _closure(self, wanted: Sequence[str]) -> dict[str, int]:
        """Return the file names of `wanted` and of what they depend on, with their sizes in bytes."""
        result = self._run(self._install_command("--print-uris", *wanted))
        rows = re.findall(r"^'\S+' (\S+\.deb) (\d+)", result.stdout, re.MULTILINE)
        if result.returncode != 0 or not rows:
            raise FetchError(
                f"the apt sources of this machine do not make a system: {_reason(result.stderr or result.stdout)}"
            )
        return {name: int(size) for name, size in rows}

    def _download_closure(self, wanted: Sequence[str], total: int, into: Path) -> None:
        (into / "partial").mkdir(parents=True, exist_ok=True)
        options = ("-o", f"Dir::Cache::archives={into}", "--download-only")
        with self._watched("fetching Debian's packages", total, into, "**/*.deb"):
            result = self._run(self._install_command(*options, *wanted))
        if result.returncode != 0:
            raise FetchError(f"Debian's packages could not be fetched: {_reason(result.stderr)}")

    def _install_command(self, *arguments: str) -> list[str]:
        """apt-get install, as for a system on which nothing is installed."""
        status = self._directory / "status"
        status.touch()
        # No lock of the machine's own dpkg is taken: nothing is installed on it.
        options = (f"Dir::State::status={status}", "APT::Install-Recommends=false", "Debug::NoLocking=true")
        words = [word for option in options for word in ("-o", option)]
        return self._command("apt-get", *words, "-qq", "--yes", "install", *arguments)

    @contextlib.contextmanager
    def _watched(self, label: str, total: int, directory: Path, pattern: str = "*.deb") -> Iterator[None]:
        """Tell of the bytes that arrive below `directory`, as apt writes them."""
        done = threading.Event()

        def arrived() -> int:
            size = 0
            for path in directory.glob(pattern):
                with contextlib.suppress(OSError):  # renamed when it is whole
                    size += path.stat().st_size
            return size

        def watch() -> None:
            while not done.wait(0.1):
                self._progress(label, arrived(), total)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _download(self, package: Package, into: Path) -> Path:
        """Fetch a package and return the path of its .deb file."""
        label = f"fetching {package.name}"
        into.mkdir(parents=True, exist_ok=True)
        command = self._command("apt-get", "download", f"{package.name}={package.version}")
        with self._watched(label, package.size, into):
            result = self._run(command, cwd=into)
        files = list(into.glob("*.deb"))
        if result.returncode != 0 or len(files) != 1:
            raise FetchError(f"{package.name} could not be fetched: {_reason(result.stderr)}")
        self._progress(label, package.size, package.size)
        return files[0]

    def unpack(self, deb: Path, into: Path) -> None:
        """Unpack a package's files below `into`."""
        self._progress(f"unpacking {deb.name.partition('_')[0]}", 0, None)
        into.mkdir(parents=True, exist_ok=True)
        result = self._run(["dpkg-deb", "-x", str(deb), str(into)])
        if result.returncode != 0:
            raise FetchError(f"{deb.name} could not be unpacked: {_reason(result.stderr)}")

    def _newest(self, label: str, pattern: re.Pattern[str]) -> Package:
        listed = self._run(self._command("apt-cache", "pkgnames")).stdout.split()
        names = sorted((name for name in listed if pattern.fullmatch(name)), key=_version_key, reverse=True)
        for name in names:
            # A name may be listed only because something else mentions it: `show` gives what can be had.
            shown = self._run(self._command("apt-cache", "show", "--no-all-versions", name)).stdout
            fields = dict(re.findall(r"^(Version|Size|Filename): (.*)$", shown, re.MULTILINE))
            if "Filename" in fields:
                return Package(name, fields["Version"], int(fields.get("Size", "0")))
        raise FetchError(f"the apt sources of this machine offer no {label}")

    def _own_lists(self) -> None:
        self._update([])

    def _other_suites(self, suites: tuple[str, ...]) -> None:
        """Point apt at other suites of the mirrors that serve the machine's own release."""
        sources = [source for source in self._sources() if "main" in source.components]
        wanted = []
        for suite in suites:
            # Security updates come from an archive of their own, so each kind of suite is asked of its own
            # kind.
            security = suite.endswith("-security")
            wanted += [
                Source(source.uris, (suite,), ("main",), source.options)
                for source in sources
                if any(own.endswith("-security") for own in source.suites) == security
            ]
        if not wanted:
            raise FetchError("the machine's apt sources name no Debian mirror")
        parts = self._directory / "sources"
        parts.mkdir(exist_ok=True)
        text = "\n".join(source.deb822() for source in dict.fromkeys(wanted))
        (parts / "ringzero.sources").write_text(text, encoding="utf-8")
        # Own sources stay: busybox comes from there.
        own = "\n".join(source.deb822() for source in sources)
        (parts / "own.sources").write_text(own, encoding="utf-8")
        self._update([f"Dir::Etc::sourceparts={parts}", "Dir::Etc::sourcelist=/dev/null"])

    def _update(self, options: list[str]) -> None:
        self._progress("reading package lists", 0, None)
        lists = self._directory / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        self._options += [f"Dir::State::lists={lists}", *options]
        result = self._run(self._command("apt-get", "update"))
        # A suite that a mirror does not have is an error for apt, but the others were read: only no list at
        # all counts.
        if not any(lists.glob("*Packages*")):
            raise FetchError(f"the package lists could not be fetched: {_reason(result.stderr)}")

    def _sources(self) -> list[Source]:
        shown = self._run(
            ["apt-config", "shell", "MAIN", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"]
        )
        places = dict(re.findall(r"^(MAIN|PARTS)='(.*)'$", shown.stdout, re.MULTILINE))
        parts = Path(places.get("PARTS", "/etc/apt/sources.list.d"))
        files = [Path(places.get("MAIN", "/etc/apt/sources.list")), *sorted(parts.glob("*"))]
        found: list[Source] = []
        for path in files:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if path.suffix == ".sources":
                found += parse_deb822(text)
            elif path.suffix == ".list":
                found += parse_one_line(text)
        return found

    def _command(self, tool: str, *arguments: str) -> list[str]:
        return [tool, *(word for option in self._options for word in ("-o", option)), *arguments]

    @staticmethod
    def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        # Messages are read, so they must be in one language.
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )


def _version_key(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _reason(stderr: str) -> str:
    """Pick the sentence that says most from what apt wrote."""
    lines = [line[2:].strip() for line in stderr.splitlines() if line.startswith(("E:", "W:"))]
    errors = [
        line for line in lines if re.search(r"resolv|connect|timed out|not found|Unable|Failed", line, re.I)
    ]
    return (errors or lines or stderr.strip().splitlines()[-1:] or ["no reason was given"])[0].rstrip(".")
