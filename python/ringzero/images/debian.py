"""The Debian image: which kernels there are, and where a copy in the cache is.

This is all that a run with a cached image needs, and it is kept light: how the image is made is in `debian_build`.
"""

from __future__ import annotations

from pathlib import Path

from ringzero.errors import InputError
from ringzero.images.cache import ImageCache
from ringzero.images.initramfs import agent_path

__all__ = ["DEFAULT_KERNEL", "KERNELS", "agent_mark", "cache_name", "find_debian"]

KERNELS = ("6.1", "6.12")
DEFAULT_KERNEL = "6.1"

FILES = ("vmlinuz", "initrd")


def cache_name(kernel: str) -> str:
    """Return the cache's name of the image with this kernel series. Raises InputError for an unknown
    series.
    """
    if kernel not in KERNELS:
        raise InputError(f"there is no Debian image with kernel {kernel!r}; there is: {', '.join(KERNELS)}")
    return f"debian-{kernel}"


def find_debian(kernel: str, cache: ImageCache, *, thorough: bool = False) -> dict[str, Path] | None:
    """Return the files of a cached image, or None when it must be pulled (absent, damaged, or of another
    agent).
    """
    name = cache_name(kernel)
    manifest = cache.manifest(name)
    if manifest is None or manifest.made_from.get("agent") != agent_mark():
        return None
    files = cache.find(name, thorough=thorough)
    return files if files and all(part in files for part in FILES) else None


def agent_mark() -> str:
    """Name the agent in this package by size and sum of its bytes: an image with another one is built
    again.
    """
    from zlib import crc32  # a name, not a proof: cheap enough to make at every start

    data = agent_path().read_bytes()
    return f"{len(data)}-{crc32(data):08x}"
