"""The image `debian-full`: a whole Debian on a root disk, with systemd, as it is in the cache.

    disk.raw          the root disk, an ext4 without a partition table; runs have overlays
    vmlinuz initrd    its kernel and initramfs, as they are in its /boot
    start-*.initrd    that initramfs with our agent beside it, made when it is first needed

This is all that a run with a cached image needs, and it is kept light: how the image is made is in
`debian_full_build`.
"""

from __future__ import annotations

import os
from pathlib import Path

from ringzero.images.cache import ImageCache
from ringzero.images.initramfs import agent_path

__all__ = ["NAME", "RECIPE", "find_full", "recipe_mark", "with_agent"]

NAME = "debian-full"
RECIPE = Path(__file__).parent / "recipe"
"""What goes into the image besides packages, and how they are installed."""

FILES = ("disk.raw", "vmlinuz", "initrd")


def find_full(cache: ImageCache, *, thorough: bool = False) -> dict[str, Path] | None:
    """Return the files of the cached image, or None when it must be pulled (absent, damaged, or of another recipe).

    "initrd" is the one with the agent in it.
    """
    manifest = cache.manifest(NAME)
    if manifest is None or manifest.made_from.get("recipe") != recipe_mark():
        return None
    files = cache.find(NAME, thorough=thorough)
    if not files or not all(part in files for part in FILES):
        return None
    return files | {"initrd": with_agent(files["initrd"], manifest.files["initrd"].sha256)}


def recipe_mark() -> str:
    """Name the recipe in this package by a sum of its files: an image of another one is built again."""
    from zlib import crc32  # a name, not a proof: cheap enough to make at every start

    found = 0
    for path in sorted(
        path for part in ("root", "install.sh", "finish.sh") for path in _files(RECIPE / part)
    ):
        found = crc32(str(path.relative_to(RECIPE)).encode() + b"\0" + path.read_bytes(), found)
    return f"{found:08x}"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]


def with_agent(initrd: Path, sha256: str) -> Path:
    """Return the initramfs that brings this package's agent along, beside `initrd`, whose sum is given.

    The kernel unpacks archives that follow each other, compressed or not, each from a multiple of four bytes
    ("initramfs buffer format", Linux 6.1), and a file of a later one takes the place of one of the same name.
    """
    from zlib import crc32

    files = {
        "ringzero/agent": (agent_path(), 0o755),
        "ringzero/ringzero-agent.service": (RECIPE / "agent" / "ringzero-agent.service", 0o644),
        "scripts/init-bottom/ORDER": (RECIPE / "agent" / "ORDER", 0o644),
        "scripts/init-bottom/zz-ringzero-agent": (RECIPE / "agent" / "init-bottom", 0o755),
    }
    contents = {name: (path.read_bytes(), mode) for name, (path, mode) in files.items()}
    mark = 0
    for data, _ in contents.values():
        mark = crc32(data, mark)
    start = initrd.with_name(f"start-{sha256[:8]}-{mark:08x}.initrd")
    if start.is_file():
        return start
    import io
    import tempfile

    from ringzero.images.newc import NewcWriter

    extra = io.BytesIO()
    with NewcWriter(extra) as archive:
        for name, (data, mode) in contents.items():
            archive.file(name, data, mode)
    whole = initrd.read_bytes()
    whole += bytes(-len(whole) % 4) + extra.getvalue()
    with tempfile.NamedTemporaryFile(dir=initrd.parent, delete=False) as file:
        file.write(whole)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, start)
    for old in initrd.parent.glob("start-*.initrd"):
        if old != start:
            old.unlink(missing_ok=True)
    return start
