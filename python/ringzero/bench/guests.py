"""What runs inside the engines that are compared: kernels from the image cache, initramfs made here."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from pathlib import Path

from ringzero import images
from ringzero.errors import InternalError
from ringzero.images.newc import NewcWriter

__all__ = [
    "POWEROFF",
    "basics",
    "boot_initramfs",
    "busybox",
    "compute_initramfs",
    "disk_initramfs",
    "disk_program",
    "kernel",
    "members",
    "nano",
    "program",
]

POWEROFF = "poweroff"
"""The argument with which the bench program, as /init, powers the machine off at once."""


def program() -> Path:
    """Return the bench program: /init of a guest, or an ordinary program of this host (guests/bench)."""
    return _builtin("bench", "the bench program")


def disk_program() -> Path:
    """Return the program that works on disks: /init of a guest, or an ordinary program of this host (guests/disk)."""
    return _builtin("disk", "the program that works on disks")


def nano() -> Path:
    """Return our guest that measures single operations (guests/nano)."""
    return _builtin("nano.elf", "the guest 'nano'")


def _builtin(name: str, what: str) -> Path:
    path = Path(images.__file__).parent / "builtin" / name
    if not path.is_file():
        raise InternalError(f"{what} is missing from the package ({path}): build it with tools/dev guests")
    return path


def kernel(series: str) -> Path:
    """Return Debian's cloud kernel of a series, "6.1" or "6.12", pulled first if it is not in the cache."""
    return images.pull("debian", series).kernel


def busybox() -> bytes:
    """Return the static busybox of the default image."""
    initrd = images.pull("debian").initrd
    found = None if initrd is None else member(initrd.read_bytes(), "bin/busybox")
    if found is None:
        raise InternalError(
            "the debian image holds no bin/busybox: pull it again with `ringzero pull debian --force`"
        )
    return found


def boot_initramfs() -> bytes:
    """Return an initramfs whose /init can do nothing but say that it runs and power off."""
    return _initramfs(None)


def compute_initramfs() -> bytes:
    """Return an initramfs that runs the whole compute set and powers off."""
    return _initramfs(busybox())


# Each after those that it needs. What is built into the kernel has no file.
_DISK_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)


def disk_initramfs(series: str) -> bytes:
    """Return an initramfs whose /init works on virtio disks, with the drivers of a series' kernel."""
    initrd = images.pull("debian", series).initrd
    files = b"" if initrd is None else initrd.read_bytes()
    out = io.BytesIO()
    with NewcWriter(out) as archive:
        archive.device("dev/console", 5, 1)
        archive.device("dev/null", 1, 3, mode=0o666)
        archive.file("init", disk_program().read_bytes(), 0o755)
        modules = [module for name in _DISK_MODULES if (module := member(files, f"lib/modules/{name}.ko"))]
        for number, module in enumerate(modules):
            archive.file(f"modules/{number}", module, 0o644)
    return out.getvalue()


def _initramfs(tools: bytes | None) -> bytes:
    out = io.BytesIO()
    with NewcWriter(out) as archive:
        basics(archive)
        if tools is not None:
            archive.file("bin/busybox", tools, 0o755)
    return out.getvalue()


def basics(archive: NewcWriter) -> None:
    """Add what every guest of a bench has: its /init and a few devices."""
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3, mode=0o666)
    archive.device("dev/zero", 1, 5, mode=0o666)
    archive.device("dev/urandom", 1, 9, mode=0o666)
    archive.file("init", program().read_bytes(), 0o755)


def member(archive: bytes, name: str) -> bytes | None:
    """Return one file of a newc archive of our own making, or None."""
    return next((data for found, data in members(archive) if found == name), None)


def members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Go through the names and contents of the files in a newc archive of our own making (Linux, buffer-format.rst)."""
    at = 0
    while archive[at : at + 6] == b"070701" and at + 110 <= len(archive):
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        start = _padded(at + 110 + name_size)
        if stat.S_ISREG(fields[1]):
            yield (archive[at + 110 : at + 110 + name_size - 1].decode(), archive[start : start + size])
        at = _padded(start + size)


def _padded(offset: int) -> int:
    return (offset + 3) & ~3
