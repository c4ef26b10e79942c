"""A picture of every VM's pages by state: as a PNG, and in a terminal."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ringzero.errors import InputError
from ringzero.host.vm_memory import STATES

__all__ = ["COLOURS", "cells", "draw", "unpacked_states"]

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "zero": (32, 32, 38),
    "private": (214, 92, 72),
    "shared": (84, 168, 104),
    "image": (86, 130, 200),
    "ballooned": (222, 186, 82),
    "compressed": (150, 104, 190),
    "swapped": (120, 120, 128),
}
_LARGEST = 1 << 30
"""Pages of a map: more are no VM's."""
_WIDTH = 128
"""Pages a row of a VM's picture: half a MiB."""
_GAP, _TITLE = 8, 14
_MOST_ACROSS = 10


def unpacked_states(text: str) -> bytes:
    """Return the states of a VM's pages from what its process sent. Raises InputError for what cannot be."""
    try:
        unpacker = zlib.decompressobj()
        states = unpacker.decompress(base64.b64decode(text, validate=True), _LARGEST)
    except (ValueError, zlib.error) as error:
        raise InputError(f"a vm's process sent no page states: {error}") from error
    if unpacker.unconsumed_tail or (states and max(states) >= len(STATES)):
        raise InputError("a vm's process sent page states that there are not")
    return states


def cells(states: bytes, count: int) -> list[str | None]:
    """Return, for `count` equal parts of a VM's memory, the state that most pages are in: zero only if all are."""
    if not states:
        return [None] * count
    found: list[str | None] = []
    for number in range(count):
        part = states[
            number * len(states) // count : max(
                (number + 1) * len(states) // count, number * len(states) // count + 1
            )
        ]
        counted = [part.count(state) for state in range(len(STATES))]
        counted[0] = 1 if counted[0] == len(part) else 0
        found.append(STATES[counted.index(max(counted))])
    return found


def draw(vms: Sequence[tuple[str, bytes]], path: Path) -> None:
    """Draw VMs, a pixel a page, into a PNG. Raises InputError where it cannot be written."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise InputError("the picture needs Pillow: pip install pillow") from error
    heights = [max(1, -(-len(states) // _WIDTH)) for _, states in vms] or [1]
    across = max(1, min(_MOST_ACROSS, len(vms)))
    tile = (_WIDTH + _GAP, max(heights) + _TITLE + _GAP)
    size = (across * tile[0] + _GAP, -(-len(vms) // across) * tile[1] + _GAP + _TITLE)
    picture: Any = Image.new("RGB", (max(size[0], 420), size[1]), (16, 16, 18))
    pen = ImageDraw.Draw(picture)
    palette = [channel for state in STATES for channel in COLOURS[state]]
    for number, (name, states) in enumerate(vms):
        x, y = _GAP + number % across * tile[0], _GAP + number // across * tile[1]
        pen.text((x, y), name[:21], fill=(230, 230, 230))
        rows = heights[number]
        pixels: Any = Image.frombytes("P", (_WIDTH, rows), states.ljust(rows * _WIDTH, b"\0"))
        pixels.putpalette(palette)
        picture.paste(pixels.convert("RGB"), (x, y + _TITLE))
    x = _GAP
    for state in STATES:
        pen.rectangle(
            (x, size[1] - _TITLE, x + 8, size[1] - _TITLE + 8), fill=COLOURS[state], outline=(90, 90, 90)
        )
        pen.text((x + 12, size[1] - _TITLE - 2), state, fill=(230, 230, 230))
        x += 20 + 6 * len(state)
    try:
        picture.save(path, format="PNG", optimize=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
