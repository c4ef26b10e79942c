"""What a machine is to be: `MachineSpec`, checked before anything starts.

Sizes are accepted as people write them: "256M", "1G", "1.5G", "262144K", "268435456", or a number of bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ringzero.errors import InputError
from ringzero.machine import address_map

__all__ = [
    "CPU_FEATURES",
    "DEFAULT_MEMORY",
    "ENGINES",
    "LEAST_MEMORY",
    "MOST_CPUS",
    "MOST_MEMORY",
    "MachineSpec",
    "format_size",
    "parse_memory",
    "parse_size",
    "requested_features",
]

DEFAULT_MEMORY: Final = 256 * address_map.MIB
LEAST_MEMORY: Final = 1 * address_map.MIB
"""What any machine needs: below this lie the tables that every start needs."""
MOST_MEMORY: Final = 256 * address_map.GIB
"""A sanity limit: the pmap alone would need half a GiB here, at 8 bytes a page."""
MOST_CPUS: Final = 16
ENGINES: Final = ("direct", "translate", "interpret")
TRANSPORTS: Final = ("pci", "mmio")
"""On the PCI bus, or each at an address of its own, for small kernels without PCI."""
CPU_FEATURES: Final = ("pku", "pks")
"""What processors have only where it is asked for, as /proc/cpuinfo calls it: protection keys."""

_UNITS: Final = {
    "": 1,
    "K": address_map.KIB,
    "M": address_map.MIB,
    "G": address_map.GIB,
    "T": 1 << 40,
}
_SIZE: Final = re.compile(
    r"\s*([0-9]{1,20}(?:\.[0-9]{1,6})?)\s*(?:([KMGT])(?:I?B)?|B)?\s*\Z", re.IGNORECASE | re.ASCII
)
_ACCEPTED: Final = "give a size such as 256M, 1G or a number of bytes"


def parse_size(text: str | int, what: str = "memory size") -> int:
    """Return a size in bytes. K, M, G and T are powers of 1024; a plain number is bytes.

    Raises InputError, which names what is accepted, for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise InputError(f"{what} {text} is negative: {_ACCEPTED}")
        return text
    match = _SIZE.match(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"{what} {text!r} is not a size: {_ACCEPTED}")
    number, unit = match.groups()
    factor = _UNITS[(unit or "").upper()]
    if "." not in number:
        return int(number) * factor
    if factor == 1:
        raise InputError(f"{what} {text!r} is not a whole number of bytes: {_ACCEPTED}")
    return math.floor(float(number) * factor)


def parse_memory(text: str | int) -> int:
    """Return a machine's memory in bytes, a whole number of 4 KiB pages.

    Raises InputError when it is no size, too small for any machine, or absurd. Whether it is enough for the
    kernel that is to run is seen when that has been read (`ringzero.machine.boot.plan_boot`).
    """
    size = parse_size(text)
    if size < LEAST_MEMORY:
        least = format_size(LEAST_MEMORY)
        raise InputError(f"{format_size(size)} of memory is too small: a machine needs at least {least}")
    if size > MOST_MEMORY:
        most = format_size(MOST_MEMORY)
        raise InputError(f"{format_size(size)} of memory is too much: at most {most} is possible")
    return size - size % address_map.PAGE


def requested_features(cpu: str) -> list[str]:
    """Return the features that "+pku,+pks" asks for. Raises InputError for one that there is not."""
    words = [word.strip() for word in cpu.split(",")] if cpu.strip() else []
    for word in words:
        if not word.startswith("+") or word[1:] not in CPU_FEATURES:
            known = ", ".join(f"+{name}" for name in CPU_FEATURES)
            raise InputError(f"processors have no {word!r} to add: choose from {known}")
    return list(dict.fromkeys(word[1:] for word in words))


def format_size(size: int) -> str:
    """Return a size as an operator would write it: "256M", "1G", or plain bytes when it is no whole number of
    KiB.
    """
    for unit in ("T", "G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


@dataclass(frozen=True)
class MachineSpec:
    """A machine as the operator asked for it. Make one with `MachineSpec.checked`.

    memory: bytes, a whole number of 4 KiB pages.
    cpus: virtual processors.
    engine: what runs guest instructions.
    cpu: features of the processors beyond the usual, as "+pku,+pks".
    kernel, initrd: files, not yet read; None when the caller has them in memory.
    command_line: for the kernel.
    linux: whether the kernel is a Linux, which needs more memory than a guest of ours.
    transport: how the guest finds virtio devices, one of `TRANSPORTS`.
    kaslr: whether a bzImage unpacks itself, at an address of its own choice, or is unpacked before it starts.
    """

    memory: int = DEFAULT_MEMORY
    cpus: int = 1
    engine: str = "direct"
    cpu: str = ""
    kernel: Path | None = None
    initrd: Path | None = None
    command_line: str = ""
    linux: bool = True
    kaslr: bool = False
    transport: str = "pci"

    @classmethod
    def checked(
        cls,
        *,
        memory: str | int = DEFAULT_MEMORY,
        cpus: int = 1,
        engine: str = "direct",
        cpu: str = "",
        kernel: Path | str | None = None,
        initrd: Path | str | None = None,
        command_line: str = "",
        linux: bool = True,
        kaslr: bool = False,
        transport: str = "pci",
        engines: Sequence[str] = ENGINES,
        most_cpus: int = MOST_CPUS,
    ) -> MachineSpec:
        """Return a spec of which every field makes sense.

        `engines` is what this build and host have (`ringzero._core.engines()`), `most_cpus` what the monitor
        can run. Raises InputError that names the field, the value and what is accepted.
        """
        size = parse_memory(memory)
        least = address_map.LEAST_LINUX_MEMORY
        if linux and size < least:
            raise InputError(
                f"{format_size(size)} of memory is too small: Linux needs at least {format_size(least)}"
            )
        if isinstance(cpus, bool) or not isinstance(cpus, int) or not 1 <= cpus <= most_cpus:
            raise InputError(f"{cpus} processors are not possible: give a number from 1 to {most_cpus}")
        if engine not in engines:
            raise InputError(f"there is no engine {engine!r}: choose one of {', '.join(engines)}")
        if transport not in TRANSPORTS:
            raise InputError(f"there is no transport {transport!r}: choose one of {', '.join(TRANSPORTS)}")
        requested_features(cpu)
        if "\0" in command_line:
            raise InputError("the kernel command line holds a null character: remove it")
        return cls(
            memory=size,
            cpus=cpus,
            engine=engine,
            cpu=cpu,
            kernel=None if kernel is None else Path(kernel),
            initrd=None if initrd is None else Path(initrd),
            command_line=command_line,
            linux=linux,
            kaslr=kaslr,
            transport=transport,
        )
