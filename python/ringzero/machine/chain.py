"""The files that a disk is in: an image, what lies behind it, what lies behind that.

An image names what lies behind it, and whoever made the image chose that name: it may be any file of the host. So a
chain stays in the folder of the image that the operator named, unless he allows more. No format is ever guessed from
what is in a file: a guest writes there what it likes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ringzero.errors import InputError

__all__ = ["FORMATS", "Link", "chain", "format_by_name"]

FORMATS = ("raw", "qcow2")
Link = tuple[str, str]
"""A file's path, and its format."""
_LONGEST = 64
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def format_by_name(path: str | os.PathLike[str]) -> str:
    """Return the format that a file's name stands for: qcow2 for .qcow2, raw for all others."""
    return "qcow2" if os.fspath(path).endswith(".qcow2") else "raw"


def chain(path: Path, image_format: str = "", allowed: Sequence[Path] = ()) -> list[Link]:
    """Return the files of a disk, the top first. `allowed` are files and folders that may lie behind it, besides those
    of its own folder.

    Raises InputError for a chain that is not whole, loops, or leads out of where it may, and the core's CoreError for
    an image that cannot be read.
    """
    from ringzero import _core

    places = [path.resolve().parent, *(one.resolve() for one in allowed)]
    links: list[Link] = []
    seen: set[tuple[int, int]] = set()
    current, current_format = path, image_format or format_by_name(path)
    while True:
        if current_format not in FORMATS:
            raise InputError(
                f"the disk {current} has the format {current_format!r}: there is {', '.join(FORMATS)}"
            )
        facts = current.stat()
        if (facts.st_dev, facts.st_ino) in seen or len(links) >= _LONGEST:
            raise InputError(
                f"the disk {path} is behind itself: the chain of its images comes back to {current}"
            )
        seen.add((facts.st_dev, facts.st_ino))
        links.append((os.fspath(current), current_format))
        if current_format == "raw":
            return links
        info = _core.image_info(os.fspath(current))
        name = info["backing"]
        if name is None:
            return links
        behind = _behind(current, name, places)
        current, current_format = behind, info["backing_format"] or format_by_name(behind)


def _behind(image: Path, name: str, places: Sequence[Path]) -> Path:
    """Return the file that an image names as what is behind it, if it may be there."""
    if _SCHEME.match(name):
        raise InputError(f"the image {image} wants {name!r} behind it, which is no file: not supported")
    named = image.parent / name
    behind = named.resolve()
    if not any(behind == place or behind.is_relative_to(place) for place in places):
        raise InputError(
            f"the image {image} wants {name} behind it, which is outside its folder: "
            f"if that is right, allow it with backing={behind}"
        )
    if not behind.is_file():
        raise InputError(f"the image {image} wants {name} behind it, and {behind} is not a file")
    return behind
