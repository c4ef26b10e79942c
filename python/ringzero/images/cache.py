"""The image cache: a directory an image, with a manifest that says what each file must be.

    $XDG_CACHE_HOME/ringzero/          (~/.cache/ringzero without the variable)
        lock                           held by the one process that writes
        debian-6.1/
            manifest.json              written last: an image without one does not exist
            vmlinuz  initrd

An image is built in a directory beside its place and renamed into it, so that nobody ever sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ringzero.errors import FetchError, InputError

MANIFEST = "manifest.json"
# Raised whenever what a recipe puts into an image changes, so that older copies are built again.
FORMAT = 3


@dataclass(frozen=True)
class CachedFile:
    """What the manifest holds of one file. `sha256` decides; size and times (ns) only spare reading it each
    time.
    """

    sha256: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Manifest:
    """What is in an image, and what it was made from."""

    image: str
    format: int
    made_from: dict[str, str]
    files: dict[str, CachedFile]


def cache_root() -> Path:
    """Return the cache directory, by the XDG base directory specification 0.8: a relative value does not
    count.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if configured and os.path.isabs(configured):
        return Path(configured) / "ringzero"
    try:
        return Path.home() / ".cache" / "ringzero"
    except RuntimeError as error:
        raise InputError(
            "no home directory is known: set XDG_CACHE_HOME to a directory for images"
        ) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    import hashlib  # here, not above: OpenSSL takes 10 ms to load, and most runs check no sum

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ImageCache:
    """Images by name, below one directory."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_root()

    def names(self) -> list[str]:
        """Return the names of the images that have a manifest (which may still be found damaged)."""
        try:
            return sorted(entry.parent.name for entry in self.root.glob(f"*/{MANIFEST}"))
        except OSError:
            return []

    def manifest(self, name: str) -> Manifest | None:
        """Return an image's manifest; None when it is absent, unreadable, or of another format."""
        try:
            raw = json.loads((self.root / name / MANIFEST).read_bytes())
            manifest = Manifest(
                image=str(raw["image"]),
                format=int(raw["format"]),
                made_from={str(k): str(v) for k, v in raw["made_from"].items()},
                files={str(k): CachedFile(**v) for k, v in raw["files"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return manifest if manifest.format == FORMAT and manifest.image == name else None

    def find(self, name: str, *, thorough: bool = False) -> dict[str, Path] | None:
        """Return the files of an image by name, or None when it is absent or damaged.

        A file whose size, inode and time of change are those of the manifest is taken as whole; any other is
        read and its sum compared. `thorough` reads every file.
        """
        manifest = self.manifest(name)
        if manifest is None or not manifest.files:
            return None
        directory = self.root / name
        if not all(_whole(directory / part, known, thorough) for part, known in manifest.files.items()):
            return None
        return {part: directory / part for part in manifest.files}

    @contextlib.contextmanager
    def writing(self, name: str, made_from: dict[str, str]) -> Iterator[Path]:
        """Give an empty directory to fill; on leaving without an error it becomes the image `name`.

        Every file in it goes into the manifest. Call this with `locked` held. `made_from` may be added to
        inside.
        """
        import shutil  # these two here, not above: a run with a cached image writes nothing
        import tempfile

        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self.root))
        try:
            yield scratch
            files = {}
            for path in sorted(p for p in scratch.iterdir() if p.is_file()):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                facts = path.stat()
                files[path.name] = CachedFile(sha256_of(path), facts.st_size, facts.st_mtime_ns, facts.st_ino)
            manifest = Manifest(name, FORMAT, made_from, files)
            text = json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"
            (scratch / MANIFEST).write_text(text, encoding="utf-8")
            scratch.chmod(0o755)
            self.remove(name)
            scratch.rename(self.root / name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Forget an image: its manifest first, so that a reader never finds half of it."""
        import shutil

        directory = self.root / name
        (directory / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, *, waiting: contextlib.AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Hold the right to write, one process at a time. `waiting` is entered while another one holds it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FetchError(
                f"the cache {self.root} cannot be written ({error.strerror}): "
                "set XDG_CACHE_HOME to a directory that can"
            ) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with waiting if waiting is not None else contextlib.nullcontext():
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _whole(path: Path, known: CachedFile, thorough: bool) -> bool:
    try:
        facts = path.stat()
        if facts.st_size != known.size:
            return False
        if not thorough and facts.st_mtime_ns == known.mtime_ns and facts.st_ino == known.inode:
            return os.access(path, os.R_OK)
        return sha256_of(path) == known.sha256
    except OSError:
        return False
